# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: N ranks write them whole or not at all, any number of ranks reads them. Loading never runs their code.

``saving`` and ``loading`` are the entry points. ``contents`` names what is saved, ``part`` is what one rank writes,
``pieces`` what it owns of a parameter, ``shares`` which rank writes what several have. ``reading`` reads tensors in
place; ``boxes`` is the geometry of DTensors' parts. ``files`` is the format; ``schema`` and ``objects`` check what
``reader`` reads. ``unpublished`` is a checkpoint until ``directory`` publishes it, ``exchange`` lets ranks agree,
``background`` writes in a thread, ``disk`` limits how long a call may take. ``values`` decodes moments for ``export``
and ``dcp``. Tensors are named by parameter and cut by positions in it, never by bucket, rank or number of ranks.
"""

from shardadam.checkpoint.dcp import DcpReader
from shardadam.checkpoint.directory import has_checkpoint
from shardadam.checkpoint.files import CheckpointError
from shardadam.checkpoint.loading import Checkpoint, load
from shardadam.checkpoint.saving import save

__all__ = ["Checkpoint", "CheckpointError", "DcpReader", "has_checkpoint", "load", "save"]
