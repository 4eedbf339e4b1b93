# Sourced by static.sh and elastic.sh: what both say to torchrun. Sets the array `torchrun` and the function `fail`.
#
#   RANKS_PER_NODE   ranks that each node starts (default: one a GPU)
#   LOG_DIR          where each rank's output goes, a file a rank, besides the screen (default: runs/logs)
#   LOCAL_ADDR       address by which the other nodes reach this one (default: what its host name resolves to)
#   PYTHON           interpreter with the project (default: .venv's, else python3)

fail() {
    echo "error: $*" >&2
    exit 2
}

[ $# -ge 1 ] || fail "give a recipe: $0 RECIPE [key=value ...]"
[ -f "$1" ] || fail "there is no recipe '$1'. Paths are relative to the directory of the command."
[[ "${NODES:-}" =~ ^[1-9][0-9]*$ ]] || fail "NODES is the number of nodes; got '${NODES:-}'. Set it alike on all nodes."

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x "$root/.venv/bin/python" ] && PYTHON="$root/.venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] ' # torchrun fills it in; its own names only the local rank
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-590}" # seconds for a step and a save
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
torchrun=("$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "${RANKS_PER_NODE:-gpu}"
    --log-dir "${LOG_DIR:-runs/logs}" --tee 3 ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"})
