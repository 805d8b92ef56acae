# SPDX-License-Identifier: Apache-2.0
"""A sharded AdamW for data-parallel training: torch.optim's surface, 1/N of the optimizer's memory on each of N
ranks.
"""

from shardadam.adamw import ShardedAdamW
from shardadam.checkpoint import Checkpoint, CheckpointError, has_checkpoint, load, save
from shardadam.clipping import clip_grad_norm_
from shardadam.grad_scaler import GradScaler
from shardadam.offload import DiskOffload, HostOffload
from shardadam.optimizer import ShardedAdam
from shardadam.precision import Precision
from shardadam.profiler import profile
from shardadam.ranks.desync import RankDesyncError
from shardadam.state.memory import Memory
from shardadam.version import __version__

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DiskOffload",
    "GradScaler",
    "HostOffload",
    "Memory",
    "Precision",
    "RankDesyncError",
    "ShardedAdam",
    "ShardedAdamW",
    "__version__",
    "clip_grad_norm_",
    "has_checkpoint",
    "load",
    "profile",
    "save",
]
