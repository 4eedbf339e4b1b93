#!/usr/bin/env bash
# What a machine with a GPU has to show, in stages; each measurement is written as soon as it is there. Installs nothing,
# downloads nothing. Run again, it resumes where it ended and repeats nothing that has a result.
#   ./scripts/gpu_check.sh                     all stages
#   ./scripts/gpu_check.sh smoke               the first minute; ./scripts/gpu_check.sh --list names the others
#   ./scripts/gpu_check.sh --seconds 520       no longer than that
#   ./scripts/gpu_check.sh --toy               every stage at toy size, on a CPU
#   ./scripts/gpu_check.sh --tables FOLDER     the tables of docs/ from what such a machine has written
#   PYTHON             interpreter with the project, its tests and, for all rows, its `bench` extra (default: .venv's,
#                      else python3)
#   OUT                folder of the results (default: runs/gpu_check)
#   GPU_CHECK_COMMIT   the commit, where the checkout does not know it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
"$PYTHON" -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ["torch", "psutil", "yaml"])))' || {
    echo "error: '$PYTHON' lacks the project's packages. ./scripts/test.sh makes .venv with them; or name an interpreter" \
        "that has them: PYTHON=/path/to/python $0" >&2
    exit 2
}
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m gpu_check ${OUT:+--out "$OUT"} "$@"
