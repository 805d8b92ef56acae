# SPDX-License-Identifier: Apache-2.0
"""A Trainer for transformers whose optimizer state is sharded, and a callback for a plain Trainer's checkpoints."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from shardadam.adamw import ShardedAdamW
from shardadam.checkpoint import load, save
from shardadam.checkpoint.export import TRAINER_FOLDER
from shardadam.integrations.accelerate import (
    ShardedAccelerator,
    SkippedSteps,
    check_all_are_counted,
    is_model_parallel,
)
from shardadam.integrations.importing import importing
from shardadam.optimizer import ShardedAdam
from shardadam.precision import Moments, Precision

with importing("transformers"):
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer import SCHEDULER_NAME
    from transformers.trainer_utils import SaveStrategy

_FOLDER = TRAINER_FOLDER
_MOMENTS: dict[str, Moments] = {
    "adamw_torch": "fp32",
    "adamw_torch_fused": "fp32",
    "adamw_hf": "fp32",
    "paged_adamw_32bit": "fp32",
    "adamw_8bit": "int8",
    "adamw_bnb_8bit": "int8",
    "adamw_torch_8bit": "int8",
    "paged_adamw_8bit": "int8",
}
"""The format of the moments for each name of AdamW in ``TrainingArguments.optim``."""


class ShardedTrainerMixin:
    """Makes a Trainer, or a subclass of it, sharded: ``class MyTrainer(ShardedTrainerMixin, Trainer)``.

    The optimizer is a ``ShardedAdamW`` with the learning rate, betas, eps and weight decay of the TrainingArguments.
    ``TrainingArguments.optim`` chooses its ``Precision``: with "adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit" and
    "paged_adamw_8bit" moments are stored in 8 bits, with "adamw_anyprecision" in the dtype that ``optim_args`` names,
    and with "adamw_torch", "adamw_torch_fused" and "paged_adamw_32bit" in float32. None of these needs the package that
    the name stands for; nothing is paged. Or pass one as ``optimizers=(optimizer, scheduler)`` or
    ``optimizer_cls_and_kwargs=(ShardedAdamW, {"lr": ..., "precision": ...})``. The model is not wrapped in
    DistributedDataParallel: the optimizer averages gradients. Checkpoints hold the shards of all ranks. Training
    resumes on any number of ranks, from these checkpoints or from those of a plain Trainer with AdamW.

    Attributes:
        overlap_gather: whether all-gathers overlap the next forward. None: on GPUs, unless the Trainer compiles the
            model as a whole. Set it before ``train``. Callbacks that are not transformers' own always find gathered
            parameters: where there are any, all-gathers do not overlap.

    Raises:
        ValueError: ``TrainingArguments.optim`` is another optimizer, or "adamw_anyprecision" with other dtypes than
            float32 and bfloat16; there is another engine (DeepSpeed, FSDP); torchrun has started several processes on
            CPUs without ``TrainingArguments(use_cpu=True)``; or the model is cut over model-parallel ranks, and the
            Trainer would save it or deal out batches to all ranks.
        TypeError: the optimizer passed is not a ShardedAdam(W), or has ``gradient_sync="external"``.
    """

    overlap_gather: bool | None = None
    accelerator: Any
    args: TrainingArguments
    callback_handler: Any
    lr_scheduler: Any
    model: Any
    optimizer: Any
    state: TrainerState

    @classmethod
    def adopt(cls, trainer: Trainer) -> Any:
        """Turn a Trainer of any class that has not trained yet into a sharded one, in place, and return it. Local.

        For trainers that other code builds, or without a class of your own: ``ShardedTrainer.adopt(SFTTrainer(...))``.

        Raises:
            TypeError: ``trainer`` is no Trainer, or has an optimizer that is not a ShardedAdam(W).
            ValueError: it has trained or been prepared already; or as the constructor.
        """
        if isinstance(trainer, ShardedTrainerMixin):
            return trainer
        if not isinstance(trainer, Trainer):
            raise TypeError(f"adopt: found a {type(trainer).__name__}, expected a transformers.Trainer.")
        if not isinstance(trainer.optimizer, (ShardedAdam, type(None))):
            own = type(_unwrapped(trainer.optimizer)).__name__
            raise TypeError(
                f"adopt: found a trainer with an optimizer of its own ({own}), expected none yet. "
                "Call adopt before train, and leave out optimizers, or pass a ShardedAdamW."
            )
        if trainer.model_wrapped is not trainer.model or trainer.accelerator._optimizers:
            raise ValueError(
                f"adopt: found a trainer whose model is prepared already ({type(trainer.model_wrapped).__name__}), "
                "expected one that has not trained or evaluated. Call adopt right after building the trainer."
            )
        ShardedAccelerator.adopt(trainer.accelerator)
        trainer.__class__ = _class_of_adopted(cls, type(trainer))
        return trainer

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        ShardedAccelerator.adopt(self.accelerator)

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: Any = None
    ) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        options = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "precision": Precision(moments=_moments(args)),
        }
        return ShardedAdamW, options

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        given = () if model is None else (model,)  # some trainers' method takes no model
        super().create_optimizer(*given)  # type: ignore[misc]
        if is_new:
            _name_parameters(self.optimizer, self.model if model is None else model)
        self._check_saving()
        # An interrupted train() may have left reduced gradients, which the model's zero_grad does not reach.
        self.optimizer.zero_grad()
        self._overlap_gather(self.model if model is None else model)
        return cast(torch.optim.Optimizer, self.optimizer)

    def _check_saving(self) -> None:
        """Raise if the Trainer would save a model of which each rank holds a part."""
        optimizer = _unwrapped(self.optimizer)
        is_parallel = isinstance(optimizer, ShardedAdam) and is_model_parallel(optimizer)
        strategy = SaveStrategy(self.args.save_strategy)
        if is_parallel and strategy != SaveStrategy.NO:
            raise ValueError(
                f'TrainingArguments.save_strategy: found "{strategy.value}" with a model that is cut over '
                'model-parallel ranks, expected "no": the Trainer writes what one rank holds. In a callback on all '
                "ranks, call shardadam.save(directory, model=model, optimizer=trainer.optimizer.optimizer)."
            )

    def _overlap_gather(self, model: nn.Module) -> None:
        """Overlap all-gathers where that is wanted, before the Trainer compiles the model. Local."""
        optimizer, callbacks = _unwrapped(self.optimizer), self.callback_handler.callbacks
        wanted = self.overlap_gather
        if wanted is None:
            wanted = self.args.device.type == "cuda" and self.args.world_size > 1 and not self.args.torch_compile
        if not wanted or not isinstance(optimizer, ShardedAdam):
            return
        if any(isinstance(one, _GatherBeforeCallbacks) and one.is_of(optimizer) for one in callbacks):
            return
        try:
            optimizer.overlap_gather(model)
        except RuntimeError:  # the model has been compiled already
            if self.overlap_gather:
                raise
        else:
            callbacks.insert(0, _GatherBeforeCallbacks(optimizer, callbacks))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        step = self.state.global_step
        save(Path(output_dir) / _FOLDER, step=step, optimizer=_unwrapped(self.optimizer), keep=1)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / _FOLDER).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        # The Trainer itself restores random number generators, after it has skipped the data of earlier steps.
        load(Path(checkpoint) / _FOLDER, optimizer=_unwrapped(self.optimizer), random_states=False)
        self.lr_scheduler.load_state_dict(
            torch.load(Path(checkpoint) / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        )


class ShardedTrainer(ShardedTrainerMixin, Trainer):
    """transformers.Trainer with a ``ShardedAdamW``; see ``ShardedTrainerMixin``."""


def _class_of_adopted(mixin: type[ShardedTrainerMixin], kind: type[Trainer]) -> type[Any]:
    """Return the class of a trainer of class ``kind`` that ``mixin`` has adopted."""
    if issubclass(mixin, kind):
        return mixin

    def reduce(self: Any) -> tuple[Any, ...]:  # pickle does not find the class by its name
        return _new_adopted, (mixin, kind), self.__dict__

    return type(f"Sharded{kind.__name__}", (mixin, kind), {"__reduce__": reduce})


def _new_adopted(mixin: type[ShardedTrainerMixin], kind: type[Trainer]) -> Any:
    return object.__new__(_class_of_adopted(mixin, kind))


class _GatherBeforeCallbacks(TrainerCallback):
    """Waits for all-gathers after each step if the Trainer has callbacks that may keep lists of parameters, and at the
    end of training. Local. Must be the Trainer's first callback.
    """

    def __init__(self, optimizer: ShardedAdam, callbacks: list[TrainerCallback]) -> None:
        self._optimizer, self._callbacks = weakref.ref(optimizer), callbacks

    def is_of(self, optimizer: ShardedAdam) -> bool:
        return self._optimizer() is optimizer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not all(type(one).__module__.startswith(("transformers.", __name__)) for one in self._callbacks):
            self._wait()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._wait()

    def _wait(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._engine.gatherer.wait_all()


class ConsolidateCallback(TrainerCallback):
    """Gathers the whole state on rank 0 before each checkpoint of a plain Trainer, which saves rank 0's state only.

    For ``optimizers=(ShardedAdamW(..., gradient_sync="external"), None)``. Rank 0 holds the state, in float32 on the
    CPU, until the next step; ``ShardedTrainer`` writes shards instead. Also tells the Trainer which steps were skipped
    for a gradient that is not finite, so that its learning rate stays; on a GPU, one step later.

    Raises:
        ValueError: when training begins: torchrun has started several processes on CPUs without
            ``TrainingArguments(use_cpu=True)``.
    """

    _skipped: SkippedSteps | None = None
    _step: ExitStack | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_all_are_counted(type(self).__name__, args.world_size)  # else no rank's gradients are averaged

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        prepared: Any = kwargs.get("optimizer")
        sharded = _unwrapped(prepared)
        if isinstance(sharded, ShardedAdam) and type(prepared) is AcceleratedOptimizer and prepared.scaler is None:
            if self._skipped is None or not self._skipped.is_of(sharded):
                self._skipped = SkippedSteps(sharded, may_wait=False)
            self._step = ExitStack()
            self._step.enter_context(self._skipped.around_step())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._step is not None:
            self._step.close()
            self._step = None
            kwargs["optimizer"]._is_overflow = bool(self._skipped)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self._consolidate(args, kwargs["optimizer"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self._consolidate(args, kwargs["optimizer"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The Trainer decides after this whether the evaluation was the best, and then saves without another callback.
        if args.save_strategy == SaveStrategy.BEST and kwargs.get("optimizer") is not None:
            self._consolidate(args, kwargs["optimizer"])

    @staticmethod
    def _consolidate(args: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
        sharded = _unwrapped(optimizer)
        if isinstance(sharded, ShardedAdam) and not args.save_only_model:
            sharded.consolidate_state_dict()


class LogCallback(TrainerCallback):
    """Looks at each parameter's gradient and update at the steps that a Trainer logs (``logging_steps``).

    For ``ShardedTrainer``, and for a plain Trainer over a ``ShardedAdamW``.

    Args:
        log: called on rank 0 with numbers by name ("gradient_norm/...", before clipping by the optimizer;
            "gradient_norm_of_group/...", "gradient_norm_of_all", "update_ratio/...") and the step. After the Trainer
            itself has clipped ``p.grad``, with DDP, norms are those after it. With ``update="backward"``, there are
            ratios only.
    """

    def __init__(self, log: Callable[[dict[str, float], int], Any]) -> None:
        self._log = log
        self._values: dict[str, float] = {}

    @staticmethod
    def _is_logged(args: TrainingArguments, state: TrainerState) -> bool:
        step = state.global_step + 1  # counted after the update
        is_first = args.logging_first_step and step == 1
        return is_first or (args.logging_strategy == "steps" and step % max(1, int(state.logging_steps)) == 0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = _unwrapped(kwargs["optimizer"])
        self._values = {}
        if self._is_logged(args, state) and optimizer._engine.in_backward is None:
            _unscale(kwargs["optimizer"])
            norms = optimizer.gradient_norms()
            self._values = {f"gradient_norm/{name}": norm for name, norm in norms.parameters.items()}
            self._values |= {f"gradient_norm_of_group/{index}": norm for index, norm in enumerate(norms.groups)}
            self._values["gradient_norm_of_all"] = norms.total

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_logged(args, state):
            ratios = _unwrapped(kwargs["optimizer"]).update_ratios()
            values = self._values | {f"update_ratio/{name}": ratio for name, ratio in ratios.items()}
            if state.is_world_process_zero:
                self._log(values, state.global_step + 1)


def _unscale(prepared: Any) -> None:
    """Remove the loss scale from the gradients, unless the Trainer has: it does only to clip them. Collective."""
    scaler, optimizer = getattr(prepared, "scaler", None), _unwrapped(prepared)
    if scaler is None or not scaler.is_enabled():
        return
    if scaler._per_optimizer_states[id(optimizer)]["stage"] is torch.amp.grad_scaler.OptState.READY:
        scaler.unscale_(optimizer)


def _moments(args: TrainingArguments) -> Moments:
    """Return the format of the moments that ``TrainingArguments.optim`` stands for."""
    name = str(getattr(args.optim, "value", args.optim))
    if name == "adamw_anyprecision":
        return _anyprecision_moments(args.optim_args or "")
    if name not in _MOMENTS:
        expected = ", ".join(f'"{one}"' for one in (*_MOMENTS, "adamw_anyprecision"))
        raise ValueError(
            f'TrainingArguments.optim: found "{name}", expected one of {expected}: ShardedTrainer trains with AdamW. '
            "Leave optim out. For other formats of the state, pass optimizer_cls_and_kwargs=(ShardedAdamW, {...}) to "
            "the Trainer; for other optimizers, use transformers.Trainer."
        )
    return _MOMENTS[name]


def _anyprecision_moments(optim_args: str) -> Moments:
    """Return the format for AnyPrecisionAdamW's ``optim_args``.

    Masters behind low-precision parameters, which it has with ``use_kahan_summation`` only, are always kept.
    """
    pairs = (one.partition("=") for one in optim_args.replace(" ", "").split(",") if one)
    given = {key: value for key, _, value in pairs}
    dtypes = {given.get(key, "float32") for key in ("momentum_dtype", "variance_dtype")}
    formats: dict[str, Moments] = {"float32": "fp32", "bfloat16": "bf16"}
    if len(dtypes) != 1 or not dtypes <= formats.keys():
        raise ValueError(
            f'TrainingArguments.optim_args: found "{optim_args}", expected momentum_dtype and variance_dtype equal, '
            "float32 or bfloat16. Set both alike, or pass optimizer_cls_and_kwargs=(ShardedAdamW, {...}) to the "
            "Trainer."
        )
    return formats[dtypes.pop()]


def _name_parameters(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Name the parameters of an optimizer that the Trainer has built over bare tensors.

    Without names, checkpoints would find parameters by position and, if others are frozen now, load the wrong state.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    if all(id(p) in names for group in optimizer.param_groups for p in group["params"]):
        for group in optimizer.param_groups:
            group.setdefault("param_names", [names[id(p)] for p in group["params"]])


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that accelerate's ``prepare`` has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
