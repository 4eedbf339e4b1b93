#!/usr/bin/env bash
# Whether this tree trains as another commit does, bit for bit: ten steps in each of seven set-ups, on the CPU, 3 minutes.
#   ./scripts/same_curve.sh REV [SET-UP ...] [--relative 1e-15]      status 1 where a value differs
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# -ge 1 ] || fail "give the commit to compare with: $0 REV"
install_project "[test,gym,smollm2]"
cd "$root"
exec "$venv/bin/python" -m tests.helpers.same_curve "$@"
