#!/usr/bin/env bash
# Installs the project into .venv (scripts/environment.sh: which one) and runs its main job on two CPU ranks; options go to `renio quickstart`.
#   PYTHON=/path/to/python3.12 ./scripts/quickstart.sh [--fresh] [--output-dir DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_project ""
exec "$venv/bin/renio" quickstart "$@"
