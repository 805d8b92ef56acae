# SPDX-License-Identifier: Apache-2.0
"""An Accelerator for accelerate that leaves gradients to a ShardedAdam(W) instead of wrapping models in DDP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from shardadam.checkpoint import load, save
from shardadam.grad_scaler import GradScaler
from shardadam.optimizer import ShardedAdam
from shardadam.transport.groups import launched_processes

_FOLDER = "shardadam_{}"
_DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def check_all_are_counted(what: str, num_processes: int) -> None:
    """Raise ValueError if several processes have been started, and accelerate takes each for the only one.

    Args:
        what: begins the message.
        num_processes: as accelerate counts them.
    """
    count = launched_processes()
    if num_processes == 1 < count:
        raise ValueError(
            f"{what}: found num_processes 1, but {count} processes have been started (WORLD_SIZE): each would train on "
            "all of the data, and act as the main process. On CPUs, pass ShardedAccelerator(cpu=True), or "
            "TrainingArguments(use_cpu=True) to a Trainer. If this process trains alone, unset WORLD_SIZE, RANK and "
            "LOCAL_RANK."
        )


class ShardedAccelerator(Accelerator):
    """accelerate.Accelerator for models that a ``ShardedAdam`` or ``ShardedAdamW`` trains, with the same interface.

    Does not wrap models in DistributedDataParallel: the optimizer averages gradients. ``accumulate``, ``no_sync`` and
    ``clip_grad_norm_`` call the optimizer's methods, and fp16 uses ``shardadam.GradScaler``. ``prepare`` broadcasts
    rank 0's buffers and frozen parameters, as DDP's constructor does. ``save_state`` writes the shards of all ranks,
    and ``load_state`` reads them on any number of ranks. Move the model to ``accelerator.device`` before building the
    optimizer.

    Raises:
        ValueError: the launcher has set up DeepSpeed, FSDP or another engine that shards by itself; or it has started
            several processes that accelerate does not join (on CPUs without ``cpu=True``).
    """

    scaler: Any
    _optimizers: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up_sharding()

    @classmethod
    def adopt(cls, accelerator: Accelerator) -> ShardedAccelerator:
        """Turn an accelerator that has prepared nothing yet into a ShardedAccelerator, in place, and return it.

        Raises:
            ValueError: as the constructor.
        """
        accelerator.__class__ = cls
        accelerator._set_up_sharding()
        return accelerator

    def _set_up_sharding(self) -> None:
        if self.distributed_type not in _DATA_PARALLEL:
            raise ValueError(
                f"{type(self).__name__}: found distributed_type {self.distributed_type.value}, expected plain data "
                "parallelism (NO, MULTI_CPU or MULTI_GPU). Remove the engine from the accelerate config, or use "
                "accelerate.Accelerator."
            )
        check_all_are_counted(type(self).__name__, self.num_processes)
        if self.scaler is not None:
            options = self.scaler_handler.to_kwargs() if self.scaler_handler is not None else {}
            self.scaler = GradScaler(self.device.type, **options)
        self._state_directory: Path | None = None
        self.register_load_state_pre_hook(self._remember_directory)

    # Preparing

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Prepare models, optimizers, data loaders and schedulers, as accelerate does. Collective.

        Raises:
            ValueError: a model is not on ``self.device``, and its optimizer is built already.
            TypeError: an optimizer is not a ShardedAdam(W), or has ``gradient_sync="external"``.
        """
        optimizers = [one for one in args if isinstance(one, ShardedAdam)]
        for model in (one for one in args if isinstance(one, nn.Module)):
            if self._must_move(model) and any(_has_any(optimizer, model.parameters()) for optimizer in optimizers):
                raise ValueError(
                    f"prepare: found a model that is not on {self.device} although its optimizer is built, expected it "
                    "there. Call model.to(accelerator.device) before building the optimizer."
                )
        prepared = super().prepare(*args, device_placement=device_placement)
        for model in self._models:
            for optimizer in self._optimizers_of(model.parameters()):
                if optimizer in optimizers or any(model is one for one in args):
                    optimizer.sync_module(model)
        return prepared

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Prepare a model as for evaluation, which does not wrap it."""
        if device_placement is None:
            device_placement = self.device_placement and self._must_move(model)
        return super().prepare_model(model, device_placement, evaluation_mode=True)

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """Wrap a ShardedAdam(W) for accelerate; raise TypeError for other optimizers."""
        if getattr(optimizer, "_is_accelerate_prepared", False):
            return super().prepare_optimizer(optimizer, device_placement)
        if not isinstance(optimizer, ShardedAdam) or optimizer.gradient_sync == "external":
            external = ' with gradient_sync="external"' * isinstance(optimizer, ShardedAdam)
            raise TypeError(
                f"prepare: found a {type(optimizer).__name__}{external}, expected a ShardedAdam or ShardedAdamW with "
                'gradient_sync "backward" or "step": models are not wrapped in DistributedDataParallel, and nothing '
                "else averages gradients. Use accelerate.Accelerator for other optimizers."
            )
        prepared = _PreparedOptimizer(optimizer, device_placement=False, scaler=self.scaler)
        self._optimizers.append(prepared)
        return prepared

    def _must_move(self, model: nn.Module) -> bool:
        # accelerate's device is cpu:0. That is the same as cpu, but moving there would replace all parameters' memory.
        here = self.device
        return any(p.device != here and (p.device.type, here.type) != ("cpu", "cpu") for p in model.parameters())

    def _optimizers_of(self, parameters: Iterable[Tensor]) -> list[ShardedAdam]:
        """Return the prepared optimizers that have any of ``parameters``."""
        given = list(parameters)
        return [prepared.optimizer for prepared in self._optimizers if _has_any(prepared.optimizer, given)]

    # The loop

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Return a context in which backward accumulates gradients of ``model`` and reduces nothing. Local."""
        with ExitStack() as stack:
            for optimizer in self._optimizers_of(model.parameters()):
                stack.enter_context(optimizer.no_sync())
            yield

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float | Tensor, norm_type: float = 2
    ) -> Tensor:
        """Clip the 2-norm of all gradients of the optimizer that has ``parameters``. Collective.

        Args:
            parameters: all trainable parameters of one optimizer.
            max_norm: the largest norm.
            norm_type: must be 2.

        Returns:
            The norm before clipping, 0-dim float32 on the device.

        Raises:
            ValueError: ``parameters`` or ``norm_type`` is not as described.
        """
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        optimizers = self._optimizers_of(given)
        expected = {id(p) for optimizer in optimizers for p in _parameters(optimizer) if p.requires_grad}
        if len(optimizers) != 1 or expected != {id(p) for p in given if p.requires_grad} or norm_type != 2:
            raise ValueError(
                f"clip_grad_norm_: found {len(given)} parameters of {len(optimizers)} optimizers and norm_type "
                f"{norm_type}, expected all trainable parameters of one ShardedAdam(W), and norm_type 2. Pass "
                "model.parameters()."
            )
        self.unscale_gradients()
        return optimizers[0].clip_grad_norm_(max_norm)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Raise NotImplementedError: gradients are sharded, and can only be clipped by norm."""
        raise NotImplementedError("clip_grad_value_: not supported for sharded gradients. Use clip_grad_norm_.")

    # Checkpoints

    def save_state(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Save as accelerate does, with all ranks' shards under ``shardadam_0`` and so on. Collective."""
        with self._without_optimizers():
            directory = super().save_state(output_dir, *args, **kwargs)
        for index, prepared in enumerate(self._optimizers):
            save(Path(directory) / _FOLDER.format(index), step=self.step, optimizer=prepared.optimizer, keep=1)
        return directory

    def load_state(self, input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Load as accelerate does, on any number of ranks. Collective."""
        with self._without_optimizers():
            super().load_state(input_dir, *args, **kwargs)
        assert self._state_directory is not None
        for index, prepared in enumerate(self._optimizers):
            load(self._state_directory / _FOLDER.format(index), optimizer=prepared.optimizer, random_states=False)

    def _remember_directory(self, models: list[nn.Module], directory: str) -> None:
        self._state_directory = Path(directory)

    @contextmanager
    def _without_optimizers(self) -> Iterator[None]:
        """Hide the optimizers from accelerate, which would save rank 0's shards and load them on all ranks."""
        optimizers, self._optimizers = self._optimizers, []
        try:
            yield
        finally:
            self._optimizers = optimizers


class _PreparedOptimizer(AcceleratedOptimizer):
    """Tells by the optimizer's ``skipped_steps`` whether a step was skipped: ``GradScaler.step`` does not know it."""

    _skipped_before: Tensor | None = None

    def step(self, closure: Any = None) -> None:
        if self.scaler is not None:
            self._skipped_before = self.optimizer.skipped_steps.clone()
        super().step(closure)

    @property
    def step_was_skipped(self) -> bool:
        """Whether loss scaling has skipped the last step for a gradient that is not finite. Waits for the device."""
        return self._skipped_before is not None and bool(self.optimizer.skipped_steps != self._skipped_before)


def _parameters(optimizer: ShardedAdam) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _has_any(optimizer: ShardedAdam, parameters: Iterable[Tensor]) -> bool:
    given = {id(p) for p in parameters}
    return any(id(p) in given for p in _parameters(optimizer))
