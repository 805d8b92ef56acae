# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written by N ranks and read by any number, whole or not at all, and without ever running code.

``saving`` and ``loading`` are the two ways; ``contents`` says what goes in and what it is called, ``files`` how it
lies in files, ``directory`` how a checkpoint appears among others. ``values`` reads it for ``export`` and ``dcp``, the
ways to everybody else. Tensors are named by parameter and cut by positions in it, never by bucket, rank or number of
ranks.
"""

from shardadam.checkpoint.dcp import DcpReader
from shardadam.checkpoint.directory import has_checkpoint
from shardadam.checkpoint.files import CheckpointError
from shardadam.checkpoint.loading import Checkpoint, load
from shardadam.checkpoint.saving import save

__all__ = ["Checkpoint", "CheckpointError", "DcpReader", "has_checkpoint", "load", "save"]
