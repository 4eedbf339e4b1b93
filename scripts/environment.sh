# Sourced by the other scripts: makes a virtual environment and installs the project with the tested versions.
#
#   PYTHON   interpreter, 3.10 or newer (default: python3). It gets .venv, or .venv-3.12 (after its version) where .venv
#            is of another version already.
#
# pip's own environment variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are pip's to read. On a machine without a GPU,
# point them to PyTorch's CPU wheels to save some gigabytes.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

fail() {
    echo "error: $*" >&2
    exit 2
}

# version_of INTERPRETER: 3.12; nothing where it does not run.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# find_python_3_12: the first interpreter that really is 3.12; a pyenv shim may be there and run nothing.
find_python_3_12() {
    local candidate
    for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3; do
        if [ "$(version_of "$candidate")" = 3.12 ]; then
            echo "$candidate"
            return
        fi
    done
}

# choose_venv: sets $venv. Without PYTHON it is .venv, whatever made it.
choose_venv() {
    venv="$root/.venv"
    if [ -n "${PYTHON:-}" ]; then
        local wanted
        wanted="$(version_of "$PYTHON")"
        if [ -d "$venv-$wanted" ] || { [ -x "$venv/bin/python" ] && [ "$(version_of "$venv/bin/python")" != "$wanted" ]; }; then
            venv="$venv-$wanted"
        fi
    fi
}

# install_project EXTRAS [CONSTRAINTS VENV]: $venv with the project and its extras ("" or "[test,gym]"), once for each
# state of the files that say what to install.
install_project() {
    local extras="$1" constraints="${2:-$root/constraints.txt}" python="${PYTHON:-python3}"
    command -v "$python" >/dev/null || fail "there is no '$python'. Install Python 3.10 or newer, or name one: PYTHON=/path/to/python $0"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "'$python' is $("$python" --version 2>&1); Python 3.10 or newer is needed. Name one: PYTHON=/path/to/python $0"
    if [ -n "${3:-}" ]; then venv="$3"; else choose_venv; fi
    if [ ! -x "$venv/bin/python" ]; then
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "'$python' cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"
        echo "making $venv"
        "$python" -m venv "$venv" || { rm -rf "$venv"; fail "python -m venv failed; see above."; }
    fi
    local stamp="$venv/.renio-installed" state
    state="$extras $(cat "$constraints" "$root/pyproject.toml" | cksum)"
    if [ -f "$stamp" ] && grep -qxF "$state" "$stamp"; then
        return
    fi
    echo "installing into $venv (PyTorch is the largest part)"
    # torch first and exactly: another package's open range would pick the newest build.
    "$venv/bin/python" -m pip install --quiet -c "$constraints" torch setuptools ||
        fail "pip could not install torch; see above. A proxy or a mirror goes into pip's environment variables."
    "$venv/bin/python" -m pip install --quiet -c "$constraints" -e "$root$extras" ||
        fail "pip could not install the project; see above."
    echo "$state" >>"$stamp"
}

# run_tests [OPTION ...]: pytest of $venv, TEST_WORKERS files at a time (2), then the tests that nothing may run
# beside; the worse of the two statuses. That one of the two has no test is no failure.
run_tests() {
    local arguments=() marks=() worst=0 some=0
    while [ $# -gt 0 ]; do
        case "$1" in
            -m) marks+=("(${2:?-m needs an expression})") && shift ;;
            *) arguments+=("$1") ;;
        esac
        shift
    done
    _run_marked "not alone" -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder
    _run_marked "alone"
    [ "$some" = 1 ] || { echo "error: no test was run" >&2 && return 5; }
    return "$worst"
}

_run_marked() {
    local code=0 mark chosen="$1"
    for mark in ${marks[@]+"${marks[@]}"}; do chosen+=" and $mark"; done
    "$venv/bin/python" -m pytest -m "$chosen" "${@:2}" ${arguments[@]+"${arguments[@]}"} || code=$?
    [ "$code" = 5 ] || some=1
    [ "$code" = 5 ] || [ "$code" -le "$worst" ] || worst=$code
}
