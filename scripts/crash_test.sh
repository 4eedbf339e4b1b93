#!/usr/bin/env bash
# Kills a small run at random moments, many of them inside a save, and proves that restarts lose and change nothing.
# 20 kills by SIGKILL and 4 by SIGTERM, 8 to 15 minutes on two cores; options go to tests/helpers/crash.py (--help lists them).
#   ./scripts/crash_test.sh [--kills 24] [--async-save] [--seed 1] [--keep DIRECTORY]
# PYTHON names the interpreter (default: .venv/bin/python). Exit status: 0 the same, 1 different.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" -m tests.helpers.crash "$@"
