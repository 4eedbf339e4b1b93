#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them; other options go to pytest.
#   ./scripts/test.sh           all tests
#   ./scripts/test.sh --fast    without those marked slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_project "[test,gym,smollm2]"
cd "$root"
arguments=()
for argument in "$@"; do
    if [ "$argument" = "--fast" ]; then
        arguments+=(-m "not slow")
    else
        arguments+=("$argument")
    fi
done
exec "$venv/bin/python" -m pytest "${arguments[@]}"
