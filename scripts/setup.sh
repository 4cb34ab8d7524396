#!/bin/sh
# Makes a virtual environment that holds everything llmc is developed and demonstrated with.
#
#   scripts/setup.sh VENV
#
# PYTHON  the interpreter to build it from; by default python3.11, else any of 3.10 to 3.13
# TORCH   what to install as PyTorch, by default the pinned version from pip's own index; on a GPU host give the index
#         with PIP_INDEX_URL or PIP_EXTRA_INDEX_URL, or a wheel here
set -eu

venv=$1
torch=${TORCH:-torch==2.13.0}
root=$(cd "$(dirname "$0")/.." && pwd)

fits() {
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13 python3.10}; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python from 3.10 to 3.13 found${PYTHON:+ in PYTHON=$PYTHON}; install one, or set PYTHON=/path/to/python" >&2
    exit 1
}

# Debian ships python3 without venv; only root can put it right without asking.
install_venv_module() {
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "setup: $1 has no venv module; installing python$version-venv"
        apt-get update -qq && apt-get install -y -qq "python$version-venv"
    else
        echo "setup: $1 has no venv module: install it (Debian, Ubuntu: sudo apt-get install python$version-venv)" >&2
        exit 1
    fi
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || install_venv_module "$python"
    echo "setup: making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

echo "setup: installing $torch and llmc with its development tools (the first time takes minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[dev]"
