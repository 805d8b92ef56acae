# SPDX-License-Identifier: Apache-2.0
"""An Accelerator for accelerate that leaves gradients to a ShardedAdam(W) instead of wrapping models in DDP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardadam.checkpoint import load, save
from shardadam.engine.step_sync import host_runs_ahead
from shardadam.grad_scaler import GradScaler
from shardadam.integrations.importing import importing
from shardadam.optimizer import ShardedAdam
from shardadam.transport.groups import launched_processes

with importing("accelerate"):
    from accelerate import Accelerator, DistributedType
    from accelerate.optimizer import AcceleratedOptimizer

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

    If a gradient is not finite on some rank, the step is skipped, ``optimizer_step_was_skipped`` is True, and prepared
    schedulers stay. On a GPU without fp16 they are told one step later, so that the host need not wait for the device.

    Raises:
        ValueError: the launcher has set up DeepSpeed, FSDP or another engine that shards by itself; or it has started
            several processes that accelerate does not join (on CPUs without ``cpu=True``).
    """

    scaler: Any
    _optimizers: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check(self)
        self._set_up_sharding()

    @classmethod
    def adopt(cls, accelerator: Accelerator) -> ShardedAccelerator:
        """Turn an accelerator that has prepared nothing yet into a ShardedAccelerator, in place, and return it.

        Raises:
            ValueError: as the constructor.
        """
        cls._check(accelerator)
        accelerator.__class__ = cls
        accelerator._set_up_sharding()
        return accelerator

    @classmethod
    def _check(cls, accelerator: Accelerator) -> None:
        """Raise ValueError if ``accelerator`` has set up what a ShardedAccelerator cannot use."""
        if accelerator.distributed_type not in _DATA_PARALLEL:
            raise ValueError(
                f"{cls.__name__}: found distributed_type {accelerator.distributed_type.value}, expected plain data "
                "parallelism (NO, MULTI_CPU or MULTI_GPU). Remove the engine from the accelerate config, or use "
                "accelerate.Accelerator."
            )
        check_all_are_counted(cls.__name__, accelerator.num_processes)

    def _set_up_sharding(self) -> None:
        if self.scaler is not None:
            options = self.scaler_handler.to_kwargs() if self.scaler_handler is not None else {}
            self.scaler = GradScaler(self.device.type, **options)
        self._state_directory: Path | None = None
        self.register_load_state_pre_hook(self._remember_directory)

    # Preparing

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Prepare models, optimizers, data loaders and schedulers, as accelerate does. Collective.

        Raises:
            ValueError: a model is not on ``self.device``, and its optimizer is built already; or accelerate would give
                model-parallel ranks different batches.
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
        self._check_batches()
        return prepared

    def _check_batches(self) -> None:
        """Raise if accelerate, which knows of no model parallelism, deals out batches to model-parallel ranks."""
        if self._dataloaders and getattr(self, "torch_device_mesh", None) is None and self._is_model_parallel:
            raise ValueError(
                "prepare: found a data loader beside an optimizer with model-parallel ranks, expected none: accelerate "
                "would give them different batches. Do not prepare the loader; give its DataLoader "
                'DistributedSampler(dataset, num_replicas=mesh["dp"].size(), rank=mesh["dp"].get_local_rank()). With a '
                "Trainer, override get_train_dataloader and get_eval_dataloader. On GPUs, "
                "ParallelismConfig(tp_size=...) does it, too."
            )

    @property
    def _is_model_parallel(self) -> bool:
        return any(is_model_parallel(prepared.optimizer) for prepared in self._optimizers)

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
            # Not model.parameters(), which would wait for all-gathers that overlap the next forward.
            own = (p for module in model.modules() for p in module._parameters.values() if p is not None)
            for optimizer in self._optimizers_of(own):
                stack.enter_context(optimizer.no_sync())
            yield

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float | Tensor, norm_type: float = 2
    ) -> Tensor:
        """Clip the norm of the gradients of ``parameters``. Collective.

        Args:
            parameters: of one prepared optimizer; the same on all ranks.
            max_norm: the largest norm.
            norm_type: p of the p-norm, positive; ``float("inf")`` for the largest absolute value.

        Returns:
            The norm before clipping, 0-dim float32 on the device.

        Raises:
            ValueError: ``parameters`` or ``norm_type`` is not as described.
        """
        optimizer, some = self._before_clipping("clip_grad_norm_", parameters)
        return optimizer.clip_grad_norm_(max_norm, norm_type, parameters=some)

    def clip_grad_value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """Clamp every element of the gradients of ``parameters``. Collective. Arguments as ``clip_grad_norm_``."""
        optimizer, some = self._before_clipping("clip_grad_value_", parameters)
        optimizer.clip_grad_value_(clip_value, parameters=some)

    def _before_clipping(
        self, call: str, parameters: Tensor | Iterable[Tensor]
    ) -> tuple[ShardedAdam, list[Tensor] | None]:
        """Unscale gradients; return the optimizer that has ``parameters``, and those, or None for all of its own."""
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        optimizers = self._optimizers_of(given)
        trainable = {id(p) for p in given if p.requires_grad}
        if len(optimizers) != 1 or not trainable <= {id(p) for p in _parameters(optimizers[0])}:
            raise ValueError(
                f"{call}: found {len(given)} parameters of {len(optimizers)} optimizers, or of none, expected "
                "parameters of one ShardedAdam(W). Call it once for each optimizer."
            )
        self.unscale_gradients()
        everything = trainable == {id(p) for p in _parameters(optimizers[0]) if p.requires_grad}
        return optimizers[0], None if everything else [p for p in given if p.requires_grad]

    # Checkpoints

    def save_state(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Save as accelerate does, with all ranks' shards under ``shardadam_0`` and so on. Collective.

        Raises:
            ValueError: the model is cut over model-parallel ranks: accelerate would write one of its parts.
        """
        if self._is_model_parallel:
            raise ValueError(
                "save_state: found a model that is cut over model-parallel ranks, expected a whole one: accelerate "
                "writes what one rank holds. On all ranks, call shardadam.save(directory, model=model, "
                "optimizer=optimizer.optimizer), and shardadam.load to resume."
            )
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


class SkippedSteps:
    """Tells whether the last step of a ShardedAdam(W) was skipped, because a gradient was infinite or NaN on some rank.

    Note: skipped steps on a GPU
        accelerate's schedulers ask after every step, and the device alone knows. So that the host need not wait for the
        step that it has just launched, it is told of the step before: a schedule still skips once for each skipped
        step, one step later, and at the same step on all ranks.

    Args:
        may_wait: wait for the device, and tell of the last step itself. On CPUs, always so.
    """

    def __init__(self, optimizer: ShardedAdam, *, may_wait: bool) -> None:
        self._optimizer = optimizer
        is_late = not may_wait and host_runs_ahead(optimizer.skipped_steps.device)
        self._flags: list[_HostFlag | bool] = [False] * (1 + is_late)  # of the last steps; the first one is told

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Return a context around a call of ``optimizer.step``."""
        before = self._optimizer.skipped_steps.clone()
        yield
        self._flags = [*self._flags[1:], _HostFlag(self._optimizer.skipped_steps != before)]

    def is_of(self, optimizer: ShardedAdam) -> bool:
        return self._optimizer is optimizer

    def __bool__(self) -> bool:
        return bool(self._flags[0])


class _HostFlag:
    """A copy of a 0-dim bool on the host. The copy is asynchronous; reading it waits."""

    def __init__(self, flag: Tensor) -> None:
        self._flag = flag
        self._event: torch.cuda.Event | None = None
        if flag.is_cuda:
            self._flag = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
            self._event = torch.cuda.current_stream(flag.device).record_event()

    def __bool__(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)


class _PreparedOptimizer(AcceleratedOptimizer):
    """Tells accelerate which steps were skipped, with loss scaling and without; has all that the optimizer has."""

    def __init__(self, optimizer: ShardedAdam, device_placement: bool = True, scaler: Any = None) -> None:
        super().__init__(optimizer, device_placement, scaler)
        self._skipped = SkippedSteps(optimizer, may_wait=scaler is not None)  # accelerate waits for its scaler, too

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # while a copy or pickle of this one is built
            raise AttributeError(f"{type(self).__name__} has no optimizer yet")
        return getattr(self.optimizer, name)

    @property
    def _join_config(self) -> Any:
        return self.optimizer._join_config

    @_join_config.setter
    def _join_config(self, config: Any) -> None:
        self.optimizer._join_config = config  # set by torch.distributed.algorithms.Join, read by the optimizer

    def step(self, closure: Any = None) -> None:
        # While gradients accumulate, accelerate does not call the optimizer: the last step is still the last one.
        with self._skipped.around_step() if self.gradient_state.sync_gradients else nullcontext():
            super().step(closure)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped for a gradient that is not finite; on a GPU see ``SkippedSteps``."""
        return bool(self._skipped)


def is_model_parallel(optimizer: ShardedAdam) -> bool:
    """Return whether other ranks hold other parts of the model, for the same batch."""
    return optimizer._engine.job.is_parallel


def _parameters(optimizer: ShardedAdam) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _has_any(optimizer: ShardedAdam, parameters: Iterable[Tensor]) -> bool:
    given = {id(p) for p in parameters}
    return any(id(p) in given for p in _parameters(optimizer))
