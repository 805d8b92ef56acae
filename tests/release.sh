#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the wheel and the sdist and checks them: metadata, contents, that the sdist builds an equal wheel, that each
# Python of 3.10 to 3.13 on this machine compiles it. Installs the wheel into a fresh environment, and there runs
# `shardadam env` and two examples on two ranks, outside the checkout; then the same with the sdist. Puts both into
# the folder dist/.
#
#     bash tests/release.sh          with the interpreter of .venv
#     bash tests/release.sh --all    with every Python of 3.10 to 3.13 on this machine
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"
use_venv release
cd "$ROOT"
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
unset PYTHONPATH
export PIP_CONSTRAINT=$ROOT/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1

# Prints an interpreter of this version, if there is one: in PATH, or of pyenv, whose shims may be switched off.
interpreter() {
    local python
    for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$python" -c "import sys, venv, ensurepip; assert '%d.%d' % sys.version_info[:2] == '$1'" 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
}

# Builds from a copy of what git knows, so that no stale file of the checkout gets in.
build() {
    local copy
    for copy in source direct known; do
        mkdir "$made/$copy"
        git ls-files -z | tar --create --null --files-from - | tar --extract --directory "$made/$copy"
    done
    quietly python -m build --outdir "$made/dist" "$made/source"
    quietly python -m build --wheel --no-isolation --outdir "$made/other" "$made/direct"
    python -m twine --no-color check --strict "$made"/dist/*
    python tests/release_contents.py "$made/known" "$made"/dist/*.whl "$made"/dist/*.tar.gz "$made"/other/*.whl
}

# quietly COMMAND...: shows its output only if it fails.
quietly() {
    "$@" >"$made/log" 2>&1 || { cat "$made/log" >&2; return 1; }
}

# compile PYTHON: every module of the wheel, a warning being an error.
compile() {
    rm -rf "$made/unpacked"
    python -m zipfile --extract "$made"/dist/*.whl "$made/unpacked"
    "$1" -W error -m compileall -q "$made/unpacked/shardadam"
    echo "compiles with $("$1" --version)"
}

# install PYTHON: the wheel into a fresh environment, and tries it; then the sdist, and tries that.
install() {
    local python=$made/venv/bin/python torch distribution seconds=$SECONDS
    rm -rf "$made/venv" "$made/outside"
    "$1" -m venv "$made/venv"
    # The CPU build is smaller, but not there for every index and interpreter; the plain one works too.
    torch=$(grep '^torch==' "$ROOT/constraints.txt")
    if [[ $(torch_kind) == cpu ]]; then "$python" -m pip install "$torch+cpu" >"$made/log" 2>&1 || true; fi
    for distribution in "$made"/dist/*.whl "$made"/dist/*.tar.gz; do
        quietly "$python" -m pip install --force-reinstall --no-deps "$distribution"
        quietly "$python" -m pip install "$distribution" # what it needs
        quietly "$python" -m pip check
        try "$made/venv/bin"
    done
    echo "$("$1" --version): wheel and sdist install and train, in $((SECONDS - seconds)) s"
}

# try BIN: the environment's shardadam, outside the checkout. Importing it must not warn; torch does where NumPy is missing.
try() {
    mkdir -p "$made/outside"
    cp "$ROOT"/examples/{plain_loop,checkpoint_and_resume}.py "$made/outside"
    (
        cd "$made/outside"
        rm -rf checkpoints
        "$1/python" -W error -W "ignore:Failed to initialize NumPy" -c "
import shardadam, sys
assert shardadam.__file__.startswith(sys.prefix), shardadam.__file__
assert shardadam.__version__ == sys.argv[1], (shardadam.__version__, sys.argv[1])" "$version"
        "$1/shardadam" env >env.txt
        grep --quiet "$version" env.txt
        "$1/torchrun" --standalone --nproc-per-node 2 plain_loop.py
        "$1/torchrun" --standalone --nproc-per-node 2 checkpoint_and_resume.py checkpoints
        "$1/shardadam" inspect checkpoints >inspected.txt
    )
}

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' shardadam/version.py)
if ! grep --quiet --fixed-strings "## [$version]" CHANGELOG.md; then
    echo "CHANGELOG.md has no section [$version], the version of shardadam/version.py; write it." >&2
    exit 1
fi
build
for wanted in 3.10 3.11 3.12 3.13; do
    python=$(interpreter "$wanted")
    if [[ -z $python ]]; then
        echo "Python $wanted: not on this machine, not checked"
    elif [[ " $* " == *" --all "* ]]; then
        compile "$python"
        install "$python"
    else
        compile "$python"
    fi
done
if [[ " $* " != *" --all "* ]]; then install "$VENV/bin/python"; fi
mkdir -p dist
cp "$made"/dist/* dist/
