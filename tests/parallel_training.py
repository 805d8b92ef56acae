# SPDX-License-Identifier: Apache-2.0
"""Train parallel models on all ranks, and their twins with torch's AdamW on whole batches in one process; compare.

Parameters would not show a wrong scale of gradients, as Adam hardly depends on it, so each comparison also compares the
norms that clip in each step. ``ByHand`` trains parallel models without the sharded optimizer: it proves that they equal
their twins. With wrong divisors or weights of the norm it stands for optimizers that the comparison must refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import shardadam
from shardadam import ShardedAdamW
from shardadam.engine.parameters import ShardedParameters
from shardadam.engine.storage import ShardGroup
from shardadam.transport import Job, placement
from tests.ranks import rank_and_size
from tests.runs import differences

LR = 1e-3
MAX_NORM = 0.1  # every norm here is larger: the comparison checks it
BUCKET_MB = 0.002

ParamGroups = list[dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        clip: ``"call"``: clip_grad_norm_ before each step. ``"constructor"``: max_grad_norm.
        accumulate: backward passes, or microbatches of a pipeline, in each step.
        poisoned: (step, rank): in that step, one gradient of that rank is NaN.
        overlap: gather parameters during the next forward (``overlap_gather``).
        by_hand: keyword arguments of ``ByHand``, to train with that instead; None: with ``ShardedAdamW``.
        options: further keyword arguments of ``ShardedAdamW``.
    """

    gradient_sync: str = "backward"
    clip: str = "call"
    accumulate: int = 1
    dtype: torch.dtype = torch.float32
    steps: int = 10
    poisoned: tuple[int, int] | None = None
    overlap: bool = False
    by_hand: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        fields = Training.__dataclass_fields__
        default = Training()
        changed = [f"{name}={getattr(self, name)}" for name in fields if getattr(self, name) != getattr(default, name)]
        return ",".join(changed) or "default"

    def is_poisoned(self, step: int) -> bool:
        return self.poisoned is not None and self.poisoned[0] == step


@dataclass
class Trained:
    """What a training ends with on one rank.

    Args:
        parameters: whole values of the parameters that the rank holds, by the twin's names.
        state: their whole moments and steps, by "name.kind"; empty after training by hand.
    """

    parameters: dict[str, Tensor]
    state: dict[str, Tensor]
    norms: list[float]
    skipped: int


def param_groups(model: nn.Module, prefix: str = "") -> ParamGroups:
    """Return matrices with weight decay, and vectors without; frozen parameters too."""
    named = [(prefix + name, p) for name, p in model.named_parameters()]
    matrices = [(name, p) for name, p in named if p.dim() >= 2]
    vectors = [(name, p) for name, p in named if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]] or groups[:1]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def adamw(
    training: Training,
    groups: ParamGroups,
    process_group: dist.ProcessGroup | DeviceMesh | None,
    *,
    copies_of_plain: int = 1,
    **options: Any,
) -> Any:
    """Return this rank's optimizer.

    Args:
        copies_of_plain: how many ranks with equal batches hold each plain parameter, for ``ByHand``.
        options: for ``ShardedAdamW`` only.
    """
    max_norm = MAX_NORM if training.clip == "constructor" else None
    if training.by_hand is not None:
        average = training.gradient_sync != "external"
        return ByHand(groups, process_group, copies_of_plain, max_norm, average, **training.by_hand)
    return ShardedAdamW(
        groups, lr=LR, process_group=process_group, gradient_sync=training.gradient_sync, max_grad_norm=max_norm,  # type: ignore[arg-type]
        **{"bucket_mb": BUCKET_MB, **training.options, **options},
    )  # fmt: skip


def train(
    training: Training, optimizers: Sequence[Any], backward: Callable[[int], object], models: Sequence[nn.Module]
) -> Trained:
    """Train on this rank; ``backward(step)`` adds the gradients of a step.

    With ``gradient_sync="external"`` it also averages them.
    """
    rank, _ = rank_and_size()
    if training.overlap:
        for optimizer, model in zip(optimizers, models, strict=True):
            optimizer.overlap_gather(model)
    norms = []
    for step in range(training.steps):
        before = [{name: whole(p) for name, p in m.named_parameters()} for m in models] if step == 5 else None
        poison = None
        if training.poisoned == (step, rank):
            calls: list[int] = []
            poisoned = next(p for p in models[0].parameters() if p.requires_grad)
            poison = poisoned.register_hook(lambda g, calls=calls: calls.append(1) or g * math.nan)  # type: ignore[misc]
        backward(step)
        if poison is not None:
            poison.remove()
            if not calls:  # fully_shard writes p.grad without autograd
                local(poisoned.grad).mul_(math.nan)  # type: ignore[arg-type]
        if training.clip == "call":
            norms.append(float(clip(optimizers)))
        for optimizer in optimizers:
            optimizer.step()
        if training.clip == "constructor":
            assert len({float(optimizer.grad_norm) for optimizer in optimizers} | {math.nan}) <= 2
            norms.append(float(optimizers[0].grad_norm))
        for optimizer in optimizers:
            optimizer.zero_grad()
        if training.is_poisoned(step) and before is not None:
            after = [{name: whole(p) for name, p in m.named_parameters()} for m in models]
            assert all(not differences(*pair) for pair in zip(before, after, strict=True)), "a step was not skipped"
    skipped = {int(optimizer.skipped_steps) for optimizer in optimizers}
    assert len(skipped) == 1
    parameters: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for optimizer, model in zip(optimizers, models, strict=True):
        for name, parameter in model.named_parameters():
            parameters[name] = whole(parameter)
            if parameter.requires_grad and not isinstance(optimizer, ByHand):
                is_ours = isinstance(optimizer, ShardedAdamW)
                values = optimizer.full_state(parameter) if is_ours else optimizer.state[parameter]
                if isinstance(parameter, DTensor):
                    of_moments = (values["exp_avg"], values["exp_avg_sq"])
                    assert all(isinstance(v, DTensor) and v.placements == parameter.placements for v in of_moments)
                state |= {f"{name}.{kind}": whole(value) for kind, value in values.items()}
    return Trained(parameters, state, norms, skipped.pop())


def clip(optimizers: Sequence[Any]) -> Tensor:
    if len(optimizers) == 1:
        return optimizers[0].clip_grad_norm_(MAX_NORM)  # type: ignore[no-any-return]
    if isinstance(optimizers[0], ByHand):
        return clip_by_hand(optimizers)
    return shardadam.clip_grad_norm_(optimizers, MAX_NORM)  # type: ignore[attr-defined, no-any-return]


def average_by_hand(parameters: Iterable[Tensor], group: dist.ProcessGroup, divisor: int | None = None) -> None:
    """Average ``p.grad`` over ``group``, as DDP would; zeros for a gradient that only other ranks have. Collective."""
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        used = torch.tensor(float(parameter.grad is not None))
        dist.all_reduce(used, group=group)
        if not used:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad._local_tensor if isinstance(parameter.grad, DTensor) else parameter.grad
        dist.all_reduce(gradient, group=group)
        gradient /= divisor or dist.get_world_size(group)


# Twins


def train_twin(training: Training, model: nn.Module, loss_of: Callable[[nn.Module, int], Tensor]) -> Trained:
    """Train with torch's AdamW in this process; ``loss_of(model, step)`` is that of the whole batch."""
    optimizer = torch.optim.AdamW(param_groups(model), lr=LR)
    norms, skipped = [], 0
    for step in range(training.steps):
        loss_of(model, step).backward()
        if training.is_poisoned(step):
            norms.append(math.nan)
            skipped += 1
        else:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
            optimizer.step()
        optimizer.zero_grad()
    state = {
        f"{name}.{kind}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    return Trained({name: whole(p) for name, p in model.named_parameters()}, state, norms, skipped)


def assert_equals_twin(results: Sequence[Trained], twin: Trained, *, max_norm: float = MAX_NORM) -> None:
    """Check that ranks hold the twin's parameters within 5e-6, and clipped by its norms within 1e-5 of them; its state
    within 1e-5 of each tensor's largest value.

    In float64, all within 1e-10. Ranks agree in every bit of norms, and of the parameters that several of them hold.
    """
    exact = next(iter(twin.parameters.values())).dtype == torch.float64
    tolerance, norm_tolerance = (1e-10, 1e-10) if exact else (5e-6, 1e-5)
    assert all(math.isnan(norm) or norm > max_norm for norm in twin.norms), "the recipe does not clip"
    seen: dict[str, Tensor] = {}
    for rank, result in enumerate(results):
        assert result.norms == pytest.approx(twin.norms, rel=norm_tolerance, nan_ok=True), f"rank {rank}"
        assert result.norms == pytest.approx(results[0].norms, rel=0, abs=0, nan_ok=True), f"ranks 0 and {rank} differ"
        assert result.skipped == twin.skipped, f"rank {rank}"
        for name, value in result.parameters.items():
            expected = twin.parameters[name]
            assert (value.shape, value.dtype) == (expected.shape, expected.dtype), name
            error = float((value - expected).abs().max())
            assert error <= tolerance, f"rank {rank}, {name}: differs by {error:.3g}"
            assert torch.equal(value, seen.setdefault(name, value)), f"rank {rank}, {name}: another rank has other bits"
        for name, value in result.state.items():
            expected = twin.state.get(name, torch.zeros(()))  # torch has no state for what has never had a gradient
            error = float((value - expected).abs().max())
            assert error <= norm_tolerance * float(expected.abs().max()), f"rank {rank}, {name}: differs by {error:.3g}"
    assert seen.keys() == twin.parameters.keys()


def bytes_of_adamw(model: nn.Module, loss: Tensor) -> int:
    """Return the bytes of the state that torch's AdamW keeps for a whole model; ``loss`` is one of it."""
    optimizer = torch.optim.AdamW(param_groups(model), lr=LR)
    loss.backward()
    optimizer.step()
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


# Broken optimizers, which the comparison must refuse


def _each_copy_counts(parameter: Tensor, parts: Any) -> int:
    return 1


def _parts_stay_apart(self: Any, block: Tensor) -> None:
    pass


def _averaged_over_copies(transport: Any, divisor: float) -> ShardGroup:
    return ShardGroup(transport, transport.world_size * transport.replicas)


def _partial_gradient(parameter: Tensor) -> Tensor | None:
    return None if parameter.grad is None else local(parameter.grad)


MUTANTS: dict[str, tuple[str, Any]] = {
    "each copy counts in the norm": (
        f"{ShardedParameters.__module__}._copies_of",
        _each_copy_counts,
    ),
    "parts of the model stay apart": (f"{Job.__module__}.Job.sum_parts_", _parts_stay_apart),
    "experts' gradients are averaged over copies": (
        f"{ShardedParameters.__module__}.ShardGroup",
        _averaged_over_copies,
    ),
    "partial gradients are not summed up": (f"{placement.__name__}.local_gradient", _partial_gradient),
}


def broken(mutant: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` with a broken optimizer."""
    with patch(*MUTANTS[mutant]):
        return function(*arguments)


# Without the sharded optimizer


class ByHand:
    """AdamW on local tensors after one all-reduce for each gradient: the surface of ``ShardedAdamW`` that tests use.

    Args:
        groups: as for ``ShardedAdamW``, with "process_group" and "gradient_divisor".
        copies_of_plain: how many ranks with equal batches hold each plain parameter.
        average: False: gradients are averaged already.
        copies_count: a wrong optimizer: each rank's copy of an element counts in the norm.
        experts_are_averaged: a wrong optimizer: experts' gradients are divided by the number of ranks that hold them.
        norm_of_each_rank: a wrong optimizer: clips by the norm of this rank and those with other batches.
    """

    def __init__(
        self,
        groups: ParamGroups,
        process_group: dist.ProcessGroup | DeviceMesh | None,
        copies_of_plain: int,
        max_norm: float | None,
        average: bool,
        *,
        copies_count: bool = False,
        experts_are_averaged: bool = False,
        norm_of_each_rank: bool = False,
    ) -> None:
        self.skipped_steps = 0
        self.grad_norm: Tensor | None = None
        self._max_norm, self._average = max_norm, average
        self._norm_group = group_of(process_group) if norm_of_each_rank else dist.group.WORLD
        self._entries: list[tuple[Tensor, Tensor, dist.ProcessGroup, int, int]] = []
        local_groups = []
        for group in groups:
            over = group_of(group.get("process_group", process_group))
            held_by = dist.get_world_size(over)
            divisor = held_by if experts_are_averaged else dist.get_world_size(group_of(process_group))
            divisor = group.get("gradient_divisor", divisor)
            mine = []
            for _, parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                values = nn.Parameter(local(parameter).detach())
                copies = copies_of_plain
                if isinstance(parameter, DTensor):
                    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
                    copies = math.prod(size for placement, size in sizes if placement.is_replicate())
                self._entries.append((parameter, values, over, divisor, 1 if copies_count else copies * held_by))
                mine.append(values)
            if mine:
                local_groups.append({"params": mine, "weight_decay": group["weight_decay"]})
        self._adamw = torch.optim.AdamW(local_groups, lr=LR) if local_groups else None

    def average(self) -> None:
        if not self._average:
            for parameter, values, *_ in self._entries:
                if parameter.grad is not None:
                    values.grad = _placed_alike(parameter)
            return
        for parameter, values, over, divisor, _ in self._entries:
            used = torch.tensor(float(parameter.grad is not None))
            dist.all_reduce(used, group=over)
            if used:
                gradient = torch.zeros_like(values) if parameter.grad is None else _placed_alike(parameter).clone()
                dist.all_reduce(gradient, group=over)
                values.grad = gradient / divisor

    def sum_of_squares(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for _, values, _, _, copies in self._entries:
            if values.grad is not None:
                total += values.grad.double().square().sum() / copies
        return total

    def scale_(self, norm: Tensor) -> None:
        self.grad_norm = norm
        for _, values, *_ in self._entries:
            if values.grad is not None:
                values.grad *= min(1.0, MAX_NORM / (float(norm) + 1e-6))

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        return clip_by_hand([self])

    def step(self) -> None:
        if self._max_norm is not None:
            self.clip_grad_norm_(self._max_norm)
        assert self.grad_norm is not None
        if not self.grad_norm.isfinite():
            self.skipped_steps += 1
        elif self._adamw is not None:
            self._adamw.step()

    def zero_grad(self) -> None:
        for parameter, values, *_ in self._entries:
            parameter.grad = values.grad = None


@torch.no_grad()
def clip_by_hand(optimizers: Sequence[ByHand]) -> Tensor:
    for optimizer in optimizers:
        optimizer.average()
    total = sum((optimizer.sum_of_squares() for optimizer in optimizers), torch.zeros((), dtype=torch.float64))
    dist.all_reduce(total, group=optimizers[0]._norm_group)
    for optimizer in optimizers:
        optimizer.scale_(total.sqrt())
    return total.sqrt()


def _placed_alike(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient).detach()


def group_of(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh) and group.ndim == 2:
        assert group.size() == dist.get_world_size()  # replicas and shards: all ranks
        group = None
    if isinstance(group, DeviceMesh):
        return group.get_group()
    return dist.group.WORLD if group is None else group  # type: ignore[return-value]


def refuses(results: Sequence[Trained], twin: Trained) -> bool:
    """Return whether the comparison finds an error."""
    try:
        assert_equals_twin(results, twin)
    except AssertionError:
        return True
    return False
