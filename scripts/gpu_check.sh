#!/usr/bin/env bash
# What a machine with a GPU has to show, in under ten minutes: the GPU's tests, the short benchmark of the loss, 20 steps of
# a model of 1.7B taught by one of 4B (and the same in FP8, where Transformer Engine is), the kernels under NVIDIA's
# memory checker. Installs nothing, downloads nothing; a part that fails is shown and the others still run.
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
part tests 200 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider
lines=45 part benchmark 260 "$PYTHON" benchmarks/loss.py --quick --device cuda --out "$out"
steps=(benchmarks/step.py --sequences 16 --completion 64 --steps 20)
part step 60 "$PYTHON" "${steps[@]}" --out "$out/step.json"
if "$PYTHON" -c 'import transformer_engine.pytorch' 2>"$out/transformer_engine.txt"; then
    part step_fp8 60 "$PYTHON" "${steps[@]}" --fp8 both --out "$out/step_fp8.json"
else
    echo "step_fp8: not run, Transformer Engine does not import" | tee -a "$summary"
fi
part profile 60 "$PYTHON" benchmarks/step.py --sequences 16 --completion 32 --profile
if sanitizer="$(command -v compute-sanitizer)"; then
    part sanitizer 60 "$sanitizer" --error-exitcode 9 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/test_triton.py \
        -k "on_the_gpu and (shards or views or nothing)"
else
    echo "sanitizer: not run, there is no compute-sanitizer" | tee -a "$summary"
fi
"$PYTHON" - "$out" <<'END'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
whole = {"parts": (out / "summary.txt").read_text().splitlines()}
for name in ("loss", "step", "step_fp8"):
    if (out / f"{name}.json").is_file():
        whole[name] = json.loads((out / f"{name}.json").read_text())
if "step" in whole and "step_fp8" in whole:
    pairs = list(zip(whole["step"]["losses"], whole["step_fp8"]["losses"]))
    whole["fp8_loss_difference"] = max(abs(a - b) / abs(a) for a, b in pairs)
    print(f"FP8 against bf16: largest difference of {len(pairs)} losses {whole['fp8_loss_difference']:.2%} (bar 5 %)")
(out / "gpu_check.json").write_text(json.dumps(whole, indent=2) + "\n")
END

echo
echo "== summary ($out)"
cat "$summary"
sed -n '/^Bars of/,$p' "$out/benchmark.txt"
exit "$failed"
