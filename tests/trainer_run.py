# SPDX-License-Identifier: Apache-2.0
"""A transformers.Trainer run as a user would write it: stock, sharded, or plain with external gradients."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from shardadam import ShardedAdamW
from shardadam.integrations.transformers import ConsolidateCallback, ShardedTrainer
from shardadam.transport import connect
from tests.accelerate_run import as_launched
from tests.adversarial import AdversarialTransport

EXAMPLES, LENGTH, VOCABULARY = 48, 12, 50
EPS = 1e-6  # gradients of attention's key biases are only rounding errors, which 1e-8 would turn into steps


class Texts(Dataset):
    """Sequences that count upwards from a random number, which can be learned."""

    def __init__(self, seed: int) -> None:
        starts = torch.randint(VOCABULARY, (EXAMPLES,), generator=torch.Generator().manual_seed(seed))
        self.tokens = (starts[:, None] + torch.arange(LENGTH)) % VOCABULARY

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Stream(IterableDataset):
    """Texts in an order drawn from the global random number generator when iteration begins."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        texts = Texts(2)
        for index in torch.randint(EXAMPLES, (500,)):
            yield texts[int(index)]


class Interrupted(Exception):
    pass


class Accidents(TrainerCallback):
    """After ``poisoned`` updates the last rank gets a gradient of NaN; after ``interrupted`` updates the first training
    ends between backward and step. ``moves``: how far parameters have moved in each update.
    """

    def __init__(self, poisoned: int | None, interrupted: int | None) -> None:
        self.poisoned, self.interrupted = poisoned, interrupted
        self.moves: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.parameters = list(kwargs["model"].parameters())
        self.before = [p.detach().clone() for p in self.parameters]
        if state.global_step == self.poisoned and args.process_index == args.world_size - 1:
            hook = self.parameters[0].register_hook(lambda gradient: gradient * math.nan)
            self.parameters[0].register_post_accumulate_grad_hook(lambda _: hook.remove())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.interrupted:
            self.interrupted = None
            raise Interrupted

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pairs = zip(self.parameters, self.before, strict=True)
        self.moves.append(max(float((p.detach() - before).abs().max()) for p, before in pairs))


def train(
    flavour: str,
    out: str,
    *,
    resume: str | None = None,
    dropout: float = 0.0,
    callback: bool = True,
    optimizer: dict[str, Any] | None = None,
    optimizer_class: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    trainings: int = 1,
    stream: bool = False,
    frozen: str | None = None,
    poisoned: int | None = None,
    interrupted: int | None = None,
    overlap: bool | None = None,
    callbacks: bool = True,
    dtype: torch.dtype = torch.float32,
    whole_state: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """
    Args:
        flavour: "stock" (Trainer, DDP, torch's AdamW), "sharded" (ShardedTrainer) or "external" (Trainer with a
            ShardedAdamW).
        resume: a checkpoint, relative to ``out``.
        optimizer: arguments of the flavour's AdamW, which is passed to the Trainer; None: the Trainer creates one.
        optimizer_class: the Trainer's ``optimizer_cls_and_kwargs``.
        trainings: how often ``train`` is called.
        stream: train on an iterable dataset.
        frozen: part of the names of parameters that are not trained.
        poisoned, interrupted: see ``Accidents``.
        overlap: the ShardedTrainer's ``overlap_gather``; its parameters are NaN until all-gathers are waited for.
        callbacks: False leaves ``Accidents`` out.
        dtype: of the model.
        whole_state: return the optimizer's ``full_state_dict``.
        arguments: of TrainingArguments.
    """
    with as_launched(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=32,
            n_layer=2,
            n_head=2,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        )
        model = GPT2LMHeadModel(config).to(dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen is None or frozen not in name)
        options = {
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "adam_epsilon": EPS,
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
        accidents, pending = Accidents(poisoned, interrupted), []
        given: dict[str, Any] = {"optimizer_cls_and_kwargs": optimizer_class, "callbacks": [accidents] * callbacks}
        if flavour == "external":
            optimizer = {"gradient_sync": "external"}
            given["callbacks"] += [ConsolidateCallback()] if callback else []
        if optimizer is not None:
            optimizer_type = torch.optim.AdamW if flavour == "stock" else ShardedAdamW
            given["optimizers"] = (optimizer_type(model.named_parameters(), lr=1e-3, eps=EPS, **optimizer), None)
        kind = ShardedTrainer if flavour == "sharded" else Trainer
        if overlap is not None:
            kind = type("Overlapped", (ShardedTrainer,), {"overlap_gather": overlap})
            sharded = ShardedAdamW(
                model.named_parameters(),
                lr=1e-3,
                eps=EPS,
                bucket_mb=0.01,
                transport=AdversarialTransport(connect(None, kind="collective")),
            )
            given["optimizers"] = (sharded, None)
            model.register_forward_pre_hook(lambda *_: pending.append(sharded._engine.gatherer.has_pending))
        texts = Stream() if stream else Texts(2)
        trainer = kind(model, training_arguments, train_dataset=texts, eval_dataset=Texts(3), **given)
        for _ in range(trainings):
            with contextlib.suppress(Interrupted):
                trainer.train(resume_from_checkpoint=str(Path(out) / resume) if resume else None)
        history = trainer.state.log_history
        return {
            "state": trainer.optimizer.optimizer.full_state_dict() if whole_state else None,
            "wrapped": type(trainer.model_wrapped).__name__,
            "optimizer": type(trainer.optimizer.optimizer).__name__,
            "moves": accidents.moves,
            "pending": pending,
            "model": {name: value.clone() for name, value in model.state_dict().items()},
            "losses": [entry["loss"] for entry in history if "loss" in entry],
            "norms": [float(entry["grad_norm"]) for entry in history if "loss" in entry],
            "rates": [entry["learning_rate"] for entry in history if "loss" in entry],
            "evaluations": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
            "best": trainer.state.best_model_checkpoint,
            "evaluated_after": trainer.evaluate()["eval_loss"],
        }
