#!/usr/bin/env bash
# Tests what differs between versions of Megatron-core on a second interpreter: Python 3.12, for which constraints.txt
# has the newer one. The imports, the shim, every layout's update and checkpoints; options go to pytest.
#   ./scripts/second_lane.sh                                  finds python3.12 on PATH or under pyenv
#   PYTHON=/path/to/python3.13 ./scripts/second_lane.sh       another one, 3.12 or newer
# Without such an interpreter it says so and ends with status 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
files=(tests/repo/test_doctests.py tests/megatron/test_{shim,training,layout_matrix,resharding,checkpoint,own_loop,te_spec}.py)

if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ] && .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
        echo "second lane: left out, .venv is Python $(version_of .venv/bin/python) already"
        exit 0
    fi
    PYTHON="$(find_python_3_12)"
    if [ -z "$PYTHON" ]; then
        echo "second lane: left out, there is no Python 3.12 on PATH or under pyenv"
        exit 0
    fi
fi
export PYTHON
present=()
for file in "${files[@]}"; do
    if [ -f "$file" ]; then
        present+=("$file")
    fi
done
echo "second lane: $("$PYTHON" --version)"
exec ./scripts/test.sh "${present[@]}" "$@"
