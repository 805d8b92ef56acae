#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh machine with Python 3.10 or newer to a trained model: makes or reuses .venv, then trains on NPROC ranks
# (2) of this machine. Arguments go to launch/pretrain.py; PYTHON chooses the interpreter.
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv launch

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --standalone --nproc-per-node "${NPROC:-2}" "$ROOT/launch/pretrain.py" "$@"
