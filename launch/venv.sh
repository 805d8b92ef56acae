# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Sourced, not run: defines `use_venv`, which creates or reuses .venv in the repository's root and puts it first in
# PATH. Recreates it when its interpreter, its path or the presence of a GPU changed; installs again when pyproject.toml
# or constraints.txt changed. PYTHON chooses the interpreter.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

# use_venv EXTRA...: with shardadam and these extras of pyproject.toml.
use_venv() {
    local extra kind wanted missing=()
    kind=$(torch_kind)
    if ! venv_fits "$kind"; then
        make_venv "$kind"
    fi
    wanted=$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)
    for extra in "$@"; do
        if [[ $(cat "$VENV/installed-$extra" 2>/dev/null) != "$wanted" ]]; then
            missing+=("$extra")
        fi
    done
    if ((${#missing[@]})); then
        install_into_venv "$kind" "$(IFS=,; echo "${missing[*]}")"
        for extra in "${missing[@]}"; do
            echo "$wanted" >"$VENV/installed-$extra"
        done
    fi
    export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
    unset PYTHONHOME
}

# Prints the build of torch for this machine.
torch_kind() {
    if nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo cpu; fi
}

# Whether .venv works and was made for this path, this build of torch and the interpreter in PYTHON, if set.
venv_fits() {
    [[ $(cat "$VENV/made-for" 2>/dev/null) == "$VENV $1" ]] && "$VENV/bin/python" -c '' 2>/dev/null || return 1
    [[ -z ${PYTHON:-} || $(python_version "$PYTHON") == "$(python_version "$VENV/bin/python")" ]]
}

python_version() {
    "$1" -c 'import sys; print(sys.version)' 2>/dev/null
}

make_venv() {
    local python
    python=$(find_python)
    echo "Creating $VENV with $("$python" --version)."
    "$python" -m venv --clear "$VENV"
    echo "$VENV $1" >"$VENV/made-for"
}

# Prints the interpreter to use; fails with a message if there is none.
find_python() {
    local python usable='import sys; sys.exit(sys.version_info < (3, 10))'
    for python in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$python" -c "$usable" 2>/dev/null; then
            if "$python" -c 'import venv, ensurepip' 2>/dev/null; then
                echo "$python"
                return
            fi
            echo "$python cannot make virtual environments: venv or ensurepip is missing." >&2
            echo "Install them (Debian and Ubuntu: apt install python3-venv), or set PYTHON to another interpreter." >&2
            return 1
        elif [[ $python == "${PYTHON:-}" ]]; then
            echo "PYTHON=$python: found $("$python" --version 2>/dev/null || echo "no such program"), expected Python 3.10 or newer." >&2
            return 1
        fi
    done
    echo "Found no Python 3.10 or newer (python3 is: $(python3 --version 2>/dev/null || echo "not there"))." >&2
    echo "Install one, or set PYTHON to it." >&2
    return 1
}

# install_into_venv KIND EXTRA,EXTRA
install_into_venv() {
    local show=--quiet torch
    if [[ -t 1 ]]; then show=--progress-bar=on; fi
    echo "Installing shardadam[$2] into $VENV; the first time, this downloads torch."
    if [[ $1 == cpu ]] && ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
        # The CPU build is smaller, but not on every index; the plain one works too.
        torch=$(grep '^torch==' "$ROOT/constraints.txt")
        pip_install --quiet "$torch+cpu" 2>/dev/null || echo "Found no CPU build of torch; installing the plain one."
    fi
    pip_install "$show" --editable "${ROOT}[$2]"
}

pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check --constraint "$ROOT/constraints.txt" "$@" </dev/null
}
