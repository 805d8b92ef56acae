# SPDX-License-Identifier: Apache-2.0
"""A transformers.Trainer run for the tests, as a user has it: stock, sharded, or plain with external gradients."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from shardadam import ShardedAdamW
from shardadam.integrations.transformers import ConsolidateCallback, ShardedTrainer
from tests.accelerate_run import as_launched

EXAMPLES, LENGTH, VOCABULARY = 48, 12, 50


class Texts(Dataset):
    """Counting upwards from a random number: something that can be learned."""

    def __init__(self, seed: int) -> None:
        starts = torch.randint(VOCABULARY, (EXAMPLES,), generator=torch.Generator().manual_seed(seed))
        self.tokens = (starts[:, None] + torch.arange(LENGTH)) % VOCABULARY

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def train(
    flavour: str,
    out: str,
    *,
    resume: str | None = None,
    dropout: float = 0.0,
    callback: bool = True,
    optimizer: dict[str, Any] | None = None,
    trainings: int = 1,
    **arguments: Any,
) -> dict[str, Any]:
    """
    Args:
        flavour: "stock" (Trainer, DDP, torch's AdamW), "sharded" (ShardedTrainer) or "external" (Trainer with a
            ShardedAdamW).
        resume: a checkpoint, relative to ``out``.
        optimizer: of a ShardedAdamW that is passed to the ShardedTrainer; None: it makes its own.
        trainings: how often ``train`` is called.
        arguments: of TrainingArguments.
    """
    with as_launched(), contextlib.redirect_stdout(open(os.devnull, "w")):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=32,
            n_layer=2,
            n_head=2,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        )
        model = GPT2LMHeadModel(config)
        options = {
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_grad_norm": 1.0,
            **arguments,
        }
        training_arguments = TrainingArguments(
            out, use_cpu=True, report_to=[], disable_tqdm=True, seed=1, dataloader_pin_memory=False, **options
        )
        given: dict[str, Any] = {}
        if flavour == "external":
            given["optimizers"] = (ShardedAdamW(model.parameters(), lr=1e-3, gradient_sync="external"), None)
            given["callbacks"] = [ConsolidateCallback()] if callback else []
        elif optimizer is not None:
            given["optimizers"] = (ShardedAdamW(model.named_parameters(), lr=1e-3, **optimizer), None)
        kind = ShardedTrainer if flavour == "sharded" else Trainer
        trainer = kind(model, training_arguments, train_dataset=Texts(2), eval_dataset=Texts(3), **given)
        for _ in range(trainings):
            trainer.train(resume_from_checkpoint=str(Path(out) / resume) if resume else None)
        history = trainer.state.log_history
        return {
            "wrapped": type(trainer.model_wrapped).__name__,
            "optimizer": type(trainer.optimizer.optimizer).__name__,
            "model": {name: value.clone() for name, value in model.state_dict().items()},
            "losses": [entry["loss"] for entry in history if "loss" in entry],
            "norms": [float(entry["grad_norm"]) for entry in history if "loss" in entry],
            "rates": [entry["learning_rate"] for entry in history if "loss" in entry],
            "evaluations": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
            "best": trainer.state.best_model_checkpoint,
            "evaluated_after": trainer.evaluate()["eval_loss"],
        }
