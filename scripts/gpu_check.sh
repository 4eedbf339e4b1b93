#!/usr/bin/env bash
# What a machine with a GPU has to show, in under ten minutes: the GPU's tests, the kernels' tests, the short benchmark.
# Installs nothing; a part that fails is shown and the others still run.
#   ./scripts/gpu_check.sh
#   PYTHON   interpreter with the project, its tests and, for all rows, its `bench` extra (default: .venv's, else python3)
#   OUT      folder of the results (default: runs/gpu_check)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
out="${OUT:-runs/gpu_check}"
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
summary="$out/summary.txt"
: >"$summary"
failed=0

# part NAME SECONDS COMMAND...: runs it into $out/NAME.txt and notes how it ended.
part() {
    local name="$1" seconds="$2" begin="$SECONDS" status
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$seconds" "$@" >"$out/$name.txt" 2>&1
    status=$?
    tail -n "${lines:-15}" "$out/$name.txt"
    case $status in
        0) result="ok" ;;
        5) result="no such tests here" ;; # pytest's status
        124 | 137) result="FAILED: longer than $seconds s" ;;
        *) result="FAILED ($status)" ;;
    esac
    [[ $result == FAILED* ]] && failed=1
    echo "$name: $result, $((SECONDS - begin)) s" | tee -a "$summary"
}

part device 40 "$PYTHON" -c 'import sys, torch
print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "without CUDA")
sys.exit(not torch.cuda.is_available())'
part tests 230 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider
lines=45 part benchmark 320 "$PYTHON" benchmarks/loss.py --quick --device cuda --out "$out"

echo
echo "== summary ($out)"
cat "$summary"
sed -n '/^Bars of/,$p' "$out/benchmark.txt"
exit "$failed"
