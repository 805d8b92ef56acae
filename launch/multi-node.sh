#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs your training script on several machines, with the torchrun in PATH. Run the same command on each machine:
#
#     NNODES=2 RDZV_ENDPOINT=node0:29500 bash launch/multi-node.sh train.py --its options
#
# NNODES          number of machines, or MIN:MAX: starts with MIN, continues when machines fail, and adds new ones (see
#                 MAX_RESTARTS)
# RDZV_ENDPOINT   HOST:PORT of one machine, the same on all; all must be able to connect to it
# RDZV_ID         name of the run (default: shardadam)
# NPROC           ranks on this machine (default: the number of GPUs, or 2)
# MAX_RESTARTS    how often to restart all ranks when one fails (default: 0; 10 with NNODES=MIN:MAX)
# INTERFACE       network interface of the ranks, for example eth0 (default: chosen by Gloo and NCCL)
# LOCAL_ADDR      address of this machine for the others (default: its host name, which they must resolve)
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
