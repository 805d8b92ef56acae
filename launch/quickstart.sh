#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains a small model on a fresh machine with Python 3.10 or newer: creates or reuses .venv, then trains on NPROC ranks
# (default: 2) of this machine. Passes its arguments to launch/pretrain.py; PYTHON chooses the interpreter.
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv launch

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --standalone --nproc-per-node "${NPROC:-2}" "$ROOT/launch/pretrain.py" "$@"
