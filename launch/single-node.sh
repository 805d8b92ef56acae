#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts a training script of yours on this machine, with the torchrun in PATH: a rank for every GPU or, where there is
# none, two.
#
#     bash launch/single-node.sh train.py --its options
#
# NPROC          ranks (the number of GPUs; 2 without)
# MAX_RESTARTS   how often all ranks are started again when one fails (0); the script resumes from its checkpoint
set -euo pipefail

# shellcheck source=launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
need_script "$@"

exec torchrun --standalone --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" "$@"
