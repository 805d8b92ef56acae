# SPDX-License-Identifier: Apache-2.0
"""A plugin for Axolotl: ``plugins: [shardadam.integrations.axolotl.ShardedPlugin]`` in its configuration."""

from __future__ import annotations

from typing import Any

from shardadam.integrations.importing import importing
from shardadam.integrations.transformers import ShardedTrainer

with importing("axolotl", has_extra=False):
    from axolotl.integrations.base import BasePlugin


class ShardedPlugin(BasePlugin):
    """Shards the trainer that Axolotl has built (``ShardedTrainer.adopt``); ``optimizer`` chooses the format.

    Raises:
        ValueError, TypeError: as ``ShardedTrainer`` and ``adopt``, when the trainer is built or trains: ``optimizer``
            is none of AdamW's names, or the configuration has DeepSpeed or FSDP.
    """

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        ShardedTrainer.adopt(trainer)
