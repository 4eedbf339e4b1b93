#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them, two files at a time; other options go to pytest.
#   ./scripts/test.sh           all tests
#   ./scripts/test.sh --fast    without those marked slow
#   TEST_WORKERS=4              so many files at a time (default: 2)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_project "[test,gym,smollm2]"
cd "$root"
arguments=() marks=()
while [ $# -gt 0 ]; do
    case "$1" in
        --fast) marks+=("not slow") ;;
        -m) marks+=("($2)") && shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

# run MARK [OPTION ...]: the chosen tests with this mark; that there are none of them is no failure.
run() {
    local code=0 chosen="$1"
    for mark in "${marks[@]}"; do chosen+=" and $mark"; done
    "$venv/bin/python" -m pytest -m "$chosen" "${@:2}" "${arguments[@]}" || code=$?
    [ "$code" = 5 ] || some=1
    [ "$code" = 5 ] || [ "$code" -le "$worst" ] || worst=$code
}

worst=0 some=0
run "not alone" -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder
run "alone"
[ "$some" = 1 ] || { echo "error: no test was run" >&2; exit 5; }
exit "$worst"
