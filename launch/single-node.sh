#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs your training script on this machine, with the torchrun in PATH: one rank a GPU, or two ranks without GPUs.
#
#     bash launch/single-node.sh train.py --its options
#
# NPROC          ranks (default: the number of GPUs, or 2)
# MAX_RESTARTS   how often to restart all ranks when one fails (default: 0); the script must resume from its checkpoint
set -euo pipefail

# shellcheck source=launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
need_script "$@"

exec torchrun --standalone --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" "$@"
