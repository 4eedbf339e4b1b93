#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them, two files at a time; other options go to pytest.
#   ./scripts/test.sh           all tests
#   ./scripts/test.sh --fast    for every edit, in minutes: without those marked slow, and of each matrix a part of the cases
#   ./scripts/test.sh --shuffle 7          the files in a random order
#   TEST_WORKERS=4 ./scripts/test.sh       so many files at a time (default: 2)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_project "[test,gym,smollm2]"
cd "$root"
run_tests "$@"
