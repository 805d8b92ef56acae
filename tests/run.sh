#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes or reuses .venv, then runs the tests. Arguments go to pytest; --long runs the full counts of every sweep
# (tests/conftest.py) instead of seeded samples.
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"
use_venv test launch lint accelerate transformers lightning finetune

cd "$ROOT"
export OMP_NUM_THREADS=1
exec python -m pytest tests "$@"
