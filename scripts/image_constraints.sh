#!/usr/bin/env bash
# What pip must leave alone in an image that brings its own torch; for the Dockerfile.
#   ./scripts/image_constraints.sh pins                        prints PACKAGE==VERSION of what is compiled together
#   ./scripts/image_constraints.sh constraints PINS FILE       prints PINS, and the lines of FILE about other packages
# PYTHON names the interpreter (default: python).
set -euo pipefail
compiled='torch|torchvision|torchaudio|torchao|triton|pytorch[-_]triton|transformer[-_]engine[a-z0-9_-]*|flash[-_]attn|apex|numpy|nvidia-[a-z0-9_-]*'

case "${1:-}" in
    pins)
        # Not `pip freeze`: it writes the path of the wheel that the image was built from in place of the version.
        "${PYTHON:-python}" -m pip list --format=freeze | grep -iE "^($compiled)==" | LC_ALL=C sort
        ;;
    constraints)
        cat "$2"
        names="$(sed -E 's/==.*//' "$2" | paste -sd '|' -)"
        grep -viE "^($names)==" "$3"
        ;;
    *)
        echo "error: give pins, or constraints PINS FILE; got '${1:-}'" >&2
        exit 2
        ;;
esac
