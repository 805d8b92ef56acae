# SPDX-License-Identifier: Apache-2.0
"""transformers: a Trainer whose optimizer state is sharded, and a callback that makes a plain Trainer's checkpoints
whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import SaveStrategy

from shardadam.checkpoint import load, save
from shardadam.integrations.accelerate import ShardedAccelerator
from shardadam.optimizer import ShardedAdam, ShardedAdamW

_FOLDER = "shardadam"


class ShardedTrainerMixin:
    """To be put before Trainer, or a subclass of it: ``class MyTrainer(ShardedTrainerMixin, Trainer)``.

    The optimizer is a ``ShardedAdamW`` with the learning rate, betas, eps and weight decay of the TrainingArguments, or
    the one that is passed as ``optimizers=(optimizer, scheduler)`` or ``optimizer_cls_and_kwargs=(ShardedAdamW,
    {"lr": ..., "precision": ...})``. The model is not wrapped in DistributedDataParallel: the optimizer averages
    gradients. Checkpoints hold the shards of all ranks, and training resumes from them on any number of ranks; so it
    does from those of a plain Trainer with AdamW.

    Raises:
        ValueError: ``TrainingArguments.optim`` is not one of torch's AdamW, or there is another engine (DeepSpeed,
            FSDP).
        TypeError: another optimizer is passed, or one with ``gradient_sync="external"``.
    """

    accelerator: Any
    args: TrainingArguments
    lr_scheduler: Any
    model: Any
    optimizer: Any
    state: TrainerState

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        ShardedAccelerator.adopt(self.accelerator)

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: Any = None
    ) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        found, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if found is not torch.optim.AdamW:
            raise ValueError(
                f'TrainingArguments.optim: found "{getattr(args.optim, "value", args.optim)}", expected "adamw_torch" '
                "or another of torch's AdamW. Leave it out; for other formats of the state pass "
                "optimizer_cls_and_kwargs=(ShardedAdamW, {...}) to the Trainer."
            )
        return ShardedAdamW, options

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        super().create_optimizer(model)  # type: ignore[misc]
        if is_new:
            _name_parameters(self.optimizer, self.model if model is None else model)
        # train() calls the model's zero_grad, which does not reach what one that was interrupted has reduced.
        self.optimizer.zero_grad()
        return cast(torch.optim.Optimizer, self.optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        step = self.state.global_step
        save(Path(output_dir) / _FOLDER, step=step, optimizer=_unwrapped(self.optimizer), keep=1)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / _FOLDER).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        # The Trainer restores random number generators itself, after it has skipped the data that was seen.
        load(Path(checkpoint) / _FOLDER, optimizer=_unwrapped(self.optimizer), random_states=False)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


class ShardedTrainer(ShardedTrainerMixin, Trainer):
    """transformers.Trainer with a ``ShardedAdamW``; see ``ShardedTrainerMixin``."""


class ConsolidateCallback(TrainerCallback):
    """For a plain Trainer with ``optimizers=(ShardedAdamW(..., gradient_sync="external"), None)``, which writes what
    rank 0's ``state_dict()`` gives: gathers the whole state there before each checkpoint.

    Rank 0 holds it, in float32 on the CPU, until the next step; ``ShardedTrainer`` writes shards instead.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self._consolidate(args, kwargs["optimizer"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self._consolidate(args, kwargs["optimizer"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Whether this evaluation was the best is decided after this, and nothing is called before that is saved.
        if args.save_strategy == SaveStrategy.BEST and kwargs.get("optimizer") is not None:
            self._consolidate(args, kwargs["optimizer"])

    @staticmethod
    def _consolidate(args: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
        sharded = _unwrapped(optimizer)
        if isinstance(sharded, ShardedAdam) and not args.save_only_model:
            sharded.consolidate_state_dict()


def _name_parameters(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """The Trainer builds its optimizer over bare tensors, and checkpoints would tell those by position: after a change
    in what is frozen, another parameter's state would be loaded.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    if all(id(p) in names for group in optimizer.param_groups for p in group["params"]):
        for group in optimizer.param_groups:
            group.setdefault("param_names", [names[id(p)] for p in group["params"]])


def _unwrapped(optimizer: Any) -> Any:
    """What accelerate's prepare has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
