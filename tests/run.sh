#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes or reuses .venv, then runs the tests, side by side on the cores: in twelve minutes on two all but those that start
# whole training scripts (launchers, restarts, accelerate, transformers and Lightning, every block of the README and the
# docs), which --scripts runs instead. --long runs everything, and the full counts of every sweep (tests/conftest.py)
# instead of seeded samples. Other arguments go to pytest.
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"
use_venv test launch lint accelerate transformers trl lightning finetune

case " $* " in
*" --scripts "*) which=(-m scripts) ;;
*" --long "*) which=() ;;
*) which=(-m "not scripts") ;;
esac
cd "$ROOT"
# A path among the arguments replaces the whole of tests/, and its tests run one after the other:
# run.sh tests/test_layout.py
arguments=()
paths=(tests -n logical --maxprocesses 4 --dist loadfile)
for argument in "$@"; do
    if [[ $argument != --scripts ]]; then arguments+=("$argument"); fi
    if [[ $argument != -* && -e ${argument%%::*} ]]; then paths=(); fi
done

export OMP_NUM_THREADS=1
exec python -m pytest "${paths[@]}" --durations 15 "${which[@]}" "${arguments[@]}"
