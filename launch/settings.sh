# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Sourced, not run: settings of all launchers. Sets defaults of NPROC, MAX_RESTARTS and variables of torch, and rejects
# values that torchrun would misread.

# need NAME PATTERN EXPECTED: exits unless the variable matches PATTERN.
need() {
    if [[ ! ${!1:-} =~ $2 ]]; then
        echo "$(basename "$0"): $1: found '${!1:-}', expected $3; set it in front of the command: $1=..." >&2
        exit 2
    fi
}

# need_script SCRIPT ...: exits unless the first argument is a file and torchrun is in PATH.
need_script() {
    if [[ ! -f ${1:-} ]]; then
        echo "$(basename "$0"): found '${1:-}', expected a training script: bash launch/$(basename "$0") train.py ..." >&2
        exit 2
    fi
    if ! command -v torchrun >/dev/null; then
        echo "$(basename "$0"): torchrun is not in PATH; activate the environment that has torch." >&2
        exit 2
    fi
}

count_gpus() {
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
}

default_nproc() {
    local gpus
    gpus=$(count_gpus)
    if ((gpus > 0)); then echo "$gpus"; else echo 2; fi
}

NPROC=${NPROC:-$(default_nproc)}
if [[ ${NNODES:-} == *:* ]]; then
    MAX_RESTARTS=${MAX_RESTARTS:-10}
else
    MAX_RESTARTS=${MAX_RESTARTS:-0}
fi
need NPROC '^[1-9][0-9]*$' "a number of ranks"
need MAX_RESTARTS '^[0-9]+$' "a number"
# Otherwise restarted ranks connect to dead ones, whose addresses stay in torchrun's store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
