#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts a training script of yours on several machines, with the torchrun in PATH. Run the same command on each of them:
#
#     NNODES=2 RDZV_ENDPOINT=node0:29500 bash launch/multi-node.sh train.py --its options
#
# NNODES          machines, or MIN:MAX: it begins with MIN of them, goes on without those that fail, and takes in those
#                 that come (see MAX_RESTARTS)
# RDZV_ENDPOINT   HOST:PORT of one of them, the same everywhere; a port that all of them reach
# RDZV_ID         a name for the run (shardadam)
# NPROC           ranks on this machine (the number of GPUs; 2 without)
# MAX_RESTARTS    how often all ranks are started again when one fails (0; 10 with NNODES=MIN:MAX)
# INTERFACE       the network interface that ranks talk over, for example eth0 (left to Gloo and NCCL)
# LOCAL_ADDR      an address of this machine that the others reach (its host name, which they must be able to look up)
set -euo pipefail

# shellcheck source=launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
need_script "$@"
need NNODES '^[1-9][0-9]*(:[1-9][0-9]*)?$' "a number of machines, or MIN:MAX"
need RDZV_ENDPOINT '^[^:]+:[0-9]+$' "HOST:PORT of one of the machines"
if [[ -n ${INTERFACE:-} ]]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi

local_addr=()
if [[ -n ${LOCAL_ADDR:-} ]]; then
    local_addr=(--local-addr "$LOCAL_ADDR")
fi

exec torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-shardadam}" "${local_addr[@]}" "$@"
