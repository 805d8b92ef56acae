# SPDX-License-Identifier: Apache-2.0
"""Axolotl's own trainer trains sharded with the plugin as without it with DDP. Skipped where Axolotl is missing."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import on_ranks

pytest.importorskip("axolotl")

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from tests.accelerate_run import as_launched
from tests.trainer_run import Texts

pytestmark = [pytest.mark.scripts, pytest.mark.timeout(240), pytest.mark.filterwarnings("ignore")]
PLUGIN = "shardadam.integrations.axolotl.ShardedPlugin"


def train(out: str, plugged: bool, optim: str) -> dict[str, Any]:
    import torch

    with as_launched(), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=12, n_embd=32, n_layer=2, n_head=2, **dropout))
        arguments = AxolotlTrainingArguments(
            out,
            optim=optim,
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            adam_epsilon=1e-6,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            remove_unused_columns=False,
        )
        tokens = Texts(2).tokens.tolist()
        texts = Dataset.from_list([{"input_ids": one, "labels": one} for one in tokens])
        trainer = AxolotlTrainer(model=model, args=arguments, train_dataset=texts)
        trainer.axolotl_cfg = cfg = DictDefault({"plugins": [PLUGIN]})
        manager = PluginManager.get_instance()
        manager.plugins.clear()
        if plugged:
            manager.register(PLUGIN)
        manager.post_trainer_create(cfg, trainer)
        trainer.train()
        return {
            "wrapped": type(trainer.model_wrapped).__name__,
            "optimizer": type(trainer.optimizer.optimizer).__name__,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }


def test_the_plugin_shards_axolotls_trainer(tmp_path: Path) -> None:
    stock = on_ranks(2, train, str(tmp_path), False, "adamw_torch", deadline_s=200.0)
    ours = on_ranks(2, train, str(tmp_path), True, "adamw_torch", deadline_s=200.0)
    int8 = on_ranks(2, train, str(tmp_path), True, "adamw_8bit", deadline_s=200.0)
    assert (stock[0]["wrapped"], stock[0]["optimizer"]) == ("DistributedDataParallel", "AdamW")
    for runs in (ours, int8):
        assert (runs[0]["wrapped"], runs[0]["optimizer"]) == ("GPT2LMHeadModel", "ShardedAdamW")
    assert ours[0]["losses"] == pytest.approx(stock[0]["losses"], rel=1e-5) and len(ours[0]["losses"]) == 6
    assert int8[0]["losses"] == pytest.approx(stock[0]["losses"], rel=2e-3)
