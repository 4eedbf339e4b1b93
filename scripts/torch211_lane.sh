#!/usr/bin/env bash
# Runs the tests with the versions that GPU machines with torch 2.11 have (constraints-torch2.11.txt), twice: with
# Transformer Engine importable, as there, and without it. No GPU is needed; what needs one is skipped. Run it before a
# change of kernels, losses or renio_megatron/megatron/ is sent to a GPU: twice the time of test.sh, 6 GB of disk.
#   ./scripts/torch211_lane.sh      options go to pytest
#   PYTHON      a Python 3.12 (default: the one on PATH or under pyenv)
#   TE_WHEELS   folder with Transformer Engine's wheels for that torch and Python (default: .te)
# Exit status: pytest's; 77 where the tests passed, but only without Transformer Engine, because there are no wheels.
set -euo pipefail
if [ -n "${TE_WHEELS:-}" ] && [ "${TE_WHEELS#/}" = "$TE_WHEELS" ]; then TE_WHEELS="$PWD/$TE_WHEELS"; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
wheels="${TE_WHEELS:-.te}"
only_without=77

PYTHON="${PYTHON:-$(find_python_3_12)}"
[ -n "$PYTHON" ] || fail "there is no Python 3.12 on PATH or under pyenv. Install it, or name one: PYTHON=/path/to/python3.12 $0"
[ "$(version_of "$PYTHON")" = 3.12 ] || fail "'$PYTHON' is Python $(version_of "$PYTHON"), and the versions are those for 3.12"
export PYTHON
constraints="$root/constraints-torch2.11.txt"
install_project "[test,gym,smollm2]" "$constraints" "$root/.venv-torch2.11"
te="$venv/transformer-engine"

# install_te: Transformer Engine in a folder of its own, so that a run sees it or not; what it needs may be seen by both.
install_te() {
    "$venv/bin/python" -m pip install --quiet -c "$constraints" einops importlib-metadata onnx onnxscript packaging pydantic ||
        fail "pip could not install what Transformer Engine needs; see above."
    rm -rf "$te"
    "$venv/bin/python" -m pip install --quiet --no-index --no-deps --target "$te" "$wheels"/transformer_engine*.whl ||
        fail "pip could not install the wheels in $wheels; see above. They must be built for Python 3.12."
    PYTHONPATH="$te" "$venv/bin/python" -c 'import torch, transformer_engine.pytorch' ||
        fail "the Transformer Engine in $wheels does not import; see above. It must be built beside torch 2.11."
}

with=0 without=0
if compgen -G "$wheels/transformer_engine*.whl" >/dev/null; then
    install_te
    echo "torch 2.11 lane: with Transformer Engine"
    PYTHONPATH="$te${PYTHONPATH:+:$PYTHONPATH}" run_tests "$@" || with=$?
else
    echo "torch 2.11 lane: no wheels of Transformer Engine in $wheels, so only the half without it runs. Put" \
        "transformer_engine, transformer_engine_cu13 and transformer_engine_torch there, built beside torch 2.11 for" \
        "Python 3.12, or name their folder: TE_WHEELS=/path/to/wheels $0"
    with="$only_without"
fi
echo "torch 2.11 lane: without Transformer Engine"
run_tests "$@" || without=$?
# A failure says more than a half that was left out.
if [ "$without" != 0 ] && { [ "$with" = 0 ] || [ "$with" = "$only_without" ]; }; then
    exit "$without"
fi
exit "$with"
