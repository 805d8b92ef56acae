# SPDX-License-Identifier: Apache-2.0
"""accelerate: an Accelerator that leaves gradients to a ShardedAdam(W) instead of wrapping models in DDP."""

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

_FOLDER = "shardadam_{}"
_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class ShardedAccelerator(Accelerator):
    """accelerate.Accelerator whose models are trained by ``ShardedAdam`` or ``ShardedAdamW``: the same arguments and
    methods.

    Models are not wrapped in DistributedDataParallel: the optimizer averages gradients. ``accumulate``, ``no_sync`` and
    ``clip_grad_norm_`` go to it, fp16 takes ``shardadam.GradScaler``, and ``save_state`` and ``load_state`` write and
    read the shards of all ranks, for any number of them. What DDP's constructor broadcasts (buffers, frozen
    parameters), ``prepare`` broadcasts. Move the model to ``accelerator.device`` before building the optimizer.

    Raises:
        ValueError: the launcher has set up DeepSpeed, FSDP or another engine with an optimizer of its own.
    """

    scaler: Any
    _optimizers: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._take_over()

    @classmethod
    def adopt(cls, accelerator: Accelerator) -> ShardedAccelerator:
        """Makes an accelerator that has prepared nothing yet one of these, in place."""
        accelerator.__class__ = cls
        accelerator._take_over()
        return accelerator

    def _take_over(self) -> None:
        if self.distributed_type not in _PLAIN:
            raise ValueError(
                f"{type(self).__name__}: found distributed_type {self.distributed_type.value}, expected plain data "
                "parallelism. Leave the engine out of the accelerate config, or use accelerate.Accelerator."
            )
        if self.scaler is not None:
            options = self.scaler_handler.to_kwargs() if self.scaler_handler is not None else {}
            self.scaler = GradScaler(self.device.type, **options)
        self._state_directory: Path | None = None
        self.register_load_state_pre_hook(self._remember_directory)

    # Preparing

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        optimizers = [one for one in args if isinstance(one, ShardedAdam)]
        for model in (one for one in args if isinstance(one, nn.Module)):
            if self._must_move(model) and any(_holds(optimizer, model.parameters()) for optimizer in optimizers):
                raise ValueError(
                    f"The model is not on {self.device}, and its optimizer has been built. Call "
                    "model.to(accelerator.device) before building the optimizer."
                )
        prepared = super().prepare(*args, device_placement=device_placement)
        for model in self._models:
            for optimizer in self._holders(model.parameters()):
                if optimizer in optimizers or any(model is one for one in args):
                    optimizer.sync_module(model)
        return prepared

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        if device_placement is None:
            device_placement = self.device_placement and self._must_move(model)
        return super().prepare_model(model, device_placement, evaluation_mode=True)

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        if getattr(optimizer, "_is_accelerate_prepared", False):
            return super().prepare_optimizer(optimizer, device_placement)
        if not isinstance(optimizer, ShardedAdam) or optimizer.gradient_sync == "external":
            found = 'one with gradient_sync="external"' if isinstance(optimizer, ShardedAdam) else type(optimizer)
            raise TypeError(
                f"prepare: found as optimizer {found}, expected a ShardedAdam or ShardedAdamW with gradient_sync "
                '"backward" or "step": models are not wrapped in DistributedDataParallel here, and nothing else would '
                "average gradients. Use accelerate.Accelerator for others."
            )
        prepared = _PreparedOptimizer(optimizer, device_placement=False, scaler=self.scaler)
        self._optimizers.append(prepared)
        return prepared

    def _must_move(self, model: nn.Module) -> bool:
        # accelerate's CPU is cpu:0, which is where cpu is, but moving there replaces every parameter's memory.
        here = self.device
        return any(p.device != here and (p.device.type, here.type) != ("cpu", "cpu") for p in model.parameters())

    def _holders(self, parameters: Iterable[Tensor]) -> list[ShardedAdam]:
        given = list(parameters)
        return [prepared.optimizer for prepared in self._optimizers if _holds(prepared.optimizer, given)]

    # The loop

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for optimizer in self._holders(model.parameters()):
                stack.enter_context(optimizer.no_sync())
            yield

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float | Tensor, norm_type: float = 2
    ) -> Tensor:
        """Clips the 2-norm of all gradients of the optimizer that holds ``parameters``. Collective.

        Raises:
            ValueError: another norm, or not all the parameters of exactly one optimizer.
        """
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        optimizers = self._holders(given)
        expected = {id(p) for optimizer in optimizers for p in _parameters(optimizer) if p.requires_grad}
        if len(optimizers) != 1 or expected != {id(p) for p in given if p.requires_grad} or norm_type != 2:
            raise ValueError(
                f"clip_grad_norm_: found {len(given)} parameters of {len(optimizers)} optimizers and norm_type "
                f"{norm_type}, expected all trainable parameters of one ShardedAdam(W), and norm_type 2."
            )
        self.unscale_gradients()
        return optimizers[0].clip_grad_norm_(max_norm)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        raise NotImplementedError(
            "clip_grad_value_: gradients are sharded, and clipped by norm alone (clip_grad_norm_)."
        )

    # Checkpoints

    def save_state(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As accelerate's, with each rank's shards under ``shardadam_0`` and so on. Collective."""
        with self._without_sharded():
            directory = super().save_state(output_dir, *args, **kwargs)
        for index, prepared in enumerate(self._optimizers):
            save(Path(directory) / _FOLDER.format(index), step=self.step, optimizer=prepared.optimizer, keep=1)
        return directory

    def load_state(self, input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As accelerate's, on any number of ranks. Collective."""
        with self._without_sharded():
            super().load_state(input_dir, *args, **kwargs)
        assert self._state_directory is not None
        for index, prepared in enumerate(self._optimizers):
            load(self._state_directory / _FOLDER.format(index), optimizer=prepared.optimizer, random_states=False)

    def _remember_directory(self, models: list[nn.Module], directory: str) -> None:
        self._state_directory = Path(directory)

    @contextmanager
    def _without_sharded(self) -> Iterator[None]:
        """accelerate would write rank 0's part of a sharded state, and load it on all."""
        every, self._optimizers = self._optimizers, []
        try:
            yield
        finally:
            self._optimizers = every


class _PreparedOptimizer(AcceleratedOptimizer):
    """Knows by the optimizer's own count whether a step was skipped: the loss scaler leaves that to the update."""

    _skipped_before: Tensor | None = None

    def step(self, closure: Any = None) -> None:
        if self.scaler is not None:
            self._skipped_before = self.optimizer.skipped_steps.clone()
        super().step(closure)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step met a gradient that was not finite, under loss scaling. Waits for the device."""
        return self._skipped_before is not None and bool(self.optimizer.skipped_steps != self._skipped_before)


def _parameters(optimizer: ShardedAdam) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _holds(optimizer: ShardedAdam, parameters: Iterable[Tensor]) -> bool:
    given = {id(p) for p in parameters}
    return any(id(p) in given for p in _parameters(optimizer))
