#!/usr/bin/env bash
# Whether the tests of another commit are all here: their names with parameters, and their skip and slow marks.
#   ./scripts/same_tests.sh REV     prints what is lost or newly skipped; status 1 where something is
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# = 1 ] || fail "give the commit to compare with: $0 REV"
install_project "[test,gym,smollm2]"
cd "$root"
exec "$venv/bin/python" -m tests.helpers.same_tests "$1"
