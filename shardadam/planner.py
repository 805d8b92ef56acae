# SPDX-License-Identifier: Apache-2.0
"""Bytes a rank, by kind, before anything is allocated: the layout, the formats and the tables are those that the
optimizer itself would make. Holds no tensor of a parameter's size, and measures nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from shardadam import update
from shardadam.checks.arguments import Options
from shardadam.engine.reduction.staging import StagingPool
from shardadam.engine.storage import allocate_counters, block_table
from shardadam.layout import Arena, Layout, ParameterSpec, build_layout
from shardadam.optimizer import GradientSync
from shardadam.precision import Master, Moments, Precision
from shardadam.state.memory import Memory
from shardadam.update import formats


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """What a plan must know of a parameter.

    Args:
        group: index of its param group; groups never share a bucket.
        trainable: frozen ones take no part, but count to what a rank needs.
        is_tied: it is in several places of the model. Autograd keeps the gradient of the first until that of the last
            is there, and has both and their sum then.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    group: int = 0
    trainable: bool = True
    is_tied: bool = False

    @classmethod
    def of(cls, parameter: Tensor, group: int = 0) -> PlannedParameter:
        return cls(tuple(parameter.shape), parameter.dtype, group, parameter.requires_grad)

    @classmethod
    def of_model(cls, model: nn.Module) -> dict[str, PlannedParameter]:
        """By name, in the order of ``model.named_parameters()``; tied ones once."""
        places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        return {
            name: replace(cls.of(parameter), is_tied=places[id(parameter)] > 1)
            for name, parameter in model.named_parameters()
        }

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


Planned = Iterable[PlannedParameter | Tensor]
"""Parameters in the optimizer's order. A tensor, which may be on the meta device, is one of param group 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The arguments of an optimizer that its memory depends on, and where it will run.

    Args:
        world_size: ranks that split the state; with hybrid sharding those of one shard group.
        precision: as the optimizer takes it.
        gradient_sync: as the optimizer takes it.
        bucket_mb: as the optimizer takes it.
        transport: as the optimizer takes it; "auto" is planned as for ranks of one host.
        device: of all parameters, "cpu" or "cuda". For CUDA the plan assumes NCCL, and Triton where it is installed
            here.
        replicas: with hybrid sharding the number of shard groups.
        clips: the norm of the gradients will be wanted.
    """

    world_size: int = 1
    precision: Precision = field(default_factory=Precision)
    gradient_sync: GradientSync = "backward"
    bucket_mb: float | None = None
    device: str = "cpu"
    transport: Literal["auto", "collective", "shared_memory"] = "auto"
    replicas: int = 1
    clips: bool = False

    @property
    def bucket_bytes(self) -> int:
        """
        Raises:
            ValueError, TypeError: an argument is not as the optimizer would take it.
        """
        options = Options(self.gradient_sync, None, self.precision, self.bucket_mb, self.transport)
        options.check()
        return options.bucket_bytes([torch.device(self.device)])


def plan(parameters: Planned, setting: Setting, *, peak: bool = False) -> Memory:
    """What ``optimizer.memory()`` says on every rank right after the optimizer has been built over ``parameters``.

    Args:
        peak: what it says in training instead: staging at its bound of two buffers of each dtype that travels (one if
            that has one bucket), which it passes only while peers are late; and with ``clips`` all gradient shards.
            Tables grow by some bytes a parameter on the CPU then, which are not counted.

    Raises:
        ValueError, TypeError: the optimizer would refuse these arguments, or a parameter's dtype.
    """
    return memory_of(lay_out(parameters, setting), setting, peak=peak)


def lay_out(parameters: Planned, setting: Setting) -> Layout:
    """The layout of the trainable ones, for ``memory_of``; raises as ``plan`` does."""
    device = torch.device(setting.device)
    trainable = _trainable(_planned(parameters))
    for index, one in enumerate(trainable):
        setting.precision.check_parameter(one.dtype, str(index))
    specs = [ParameterSpec(one.numel, one.dtype.itemsize, (one.group, one.dtype, device)) for one in trainable]
    return build_layout(specs, world_size=setting.world_size, bucket_bytes=setting.bucket_bytes)


def memory_of(layout: Layout, setting: Setting, *, peak: bool = False) -> Memory:
    """``plan`` for a layout that is there already; precision, ``gradient_sync``, transport and ``clips`` may differ
    from those that it was laid out with."""
    total: Counter[str] = Counter(staging=_staging_bytes(layout, setting) if peak else 0)
    for arena in layout.arenas:
        total.update(_arena_bytes(arena, layout.world_size, setting, peak=peak))
    return Memory(**{kind.name: total[kind.name] for kind in fields(Memory)})


def _planned(parameters: Planned) -> list[PlannedParameter]:
    return [PlannedParameter.of(one) if isinstance(one, Tensor) else one for one in parameters]


def _trainable(parameters: Sequence[PlannedParameter]) -> list[PlannedParameter]:
    return [one for one in parameters if one.trainable]


def _arena_bytes(arena: Arena, world_size: int, setting: Setting, *, peak: bool) -> dict[str, int]:
    dtype, device = _kind_of(arena)
    numel = arena.numel // world_size
    format = setting.precision.format(dtype, device)
    state = {name: count * kind.itemsize for name, (count, kind) in formats.tensors(format, numel).items()}
    counters = allocate_counters([0] * len(arena.parameters), arena.offsets, torch.device("meta"))
    block_count, block_dtype = block_table(numel, len(arena.parameters), format, device)
    tables = counters.param_ids.nbytes + counters.first_blocks.nbytes + block_count * block_dtype.itemsize
    if update.has_kernel(dtype, device):
        from shardadam.update.triton import TritonUpdate

        tables += TritonUpdate(counters, seed=0).nbytes
    is_exposed = _exposes(dtype, device, setting)
    has_shard = not is_exposed or (peak and setting.clips)
    return {
        "parameters": arena.numel * dtype.itemsize,
        "gradients": arena.numel * dtype.itemsize if is_exposed else 0,
        "gradient_shard": numel * format.exact_dtype.itemsize if has_shard else 0,
        "moments": sum(state.get(name, 0) for name in (*formats.MOMENTS, *formats.SCALES)),
        "master": sum(state.get(name, 0) for name in formats.MASTERS),
        "scalars": counters.steps.nbytes + counters.bounds.nbytes,
        "tables": tables,
    }


def _kind_of(arena: Arena) -> tuple[torch.dtype, torch.device]:
    _, dtype, device = cast("tuple[int, torch.dtype, torch.device]", arena.key)
    return dtype, device


def _is_shared(device: torch.device, setting: Setting) -> bool:
    """Whether ranks read each other's memory."""
    return device.type == "cpu" and setting.world_size > 1 and setting.transport != "collective"


def _exposes(dtype: torch.dtype, device: torch.device, setting: Setting) -> bool:
    """Whether ``p.grad`` lies where peers read it."""
    travels_as_it_is = setting.precision.wire_dtype(dtype) == dtype
    is_read = setting.gradient_sync == "step" and setting.replicas == 1 and _is_shared(device, setting)
    return is_read and travels_as_it_is


def _staging_bytes(layout: Layout, setting: Setting) -> int:
    """Two buffers of each dtype that travels, each as large as the largest of its buckets."""
    if setting.gradient_sync == "external":
        return 0
    numels: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for bucket in layout.buckets:
        dtype, device = _kind_of(layout.arenas[bucket.arena])
        if not _exposes(dtype, device, setting):
            numels.setdefault((setting.precision.wire_dtype(dtype), device), []).append(bucket.numel)
    total = 0
    for (dtype, device), some in numels.items():
        received = _received_numel(max(some), device, setting)
        total += min(StagingPool.SIZE, len(some)) * (max(some) + received) * dtype.itemsize
    return total


def _received_numel(numel: int, device: torch.device, setting: Setting) -> int:
    """How much room for what peers send comes with a buffer of ``numel`` elements."""
    if setting.world_size == 1 or _is_shared(device, setting):
        return 0
    if device.type == "cpu":
        return numel - numel // setting.world_size
    return numel if setting.precision.accumulate == "fp32" else 0  # NCCL sums in place


# What a whole rank needs


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that training takes on a rank, without activations, buffers of the model, and what torch itself takes.

    While an optimizer is built its parameters exist twice, which is not counted either.

    Args:
        parameters: all of them, frozen ones too.
        gradients: as many as exist at once. Of ``gradient_sync="backward"`` those of one bucket: backward completes
            buckets about in their order.
        optimizer: its state, and all else that it holds.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def adamw_bytes(parameters: Planned) -> int:
    """The state of a torch.optim.AdamW: two moments in the parameter's dtype, and a float32 step counter."""
    return sum(2 * one.nbytes + 4 for one in _trainable(_planned(parameters)))


def adamw_need(parameters: Planned) -> Need:
    """With torch.optim.AdamW on every rank; DDP's own buckets, where they are not ``p.grad``, come on top."""
    known = _planned(parameters)
    gradients = sum(one.nbytes for one in _trainable(known)) + _while_summed(_trainable(known))
    return Need(sum(one.nbytes for one in known), gradients, adamw_bytes(known))


def need(parameters: Planned, setting: Setting) -> Need:
    """With ``ShardedAdam`` or ``ShardedAdamW``, in training; raises as ``plan`` does."""
    known = _planned(parameters)
    return need_of(known, lay_out(known, setting), setting)


def need_of(parameters: Planned, layout: Layout, setting: Setting) -> Need:
    """``need`` for a layout of ``parameters`` that is there already; the rest may differ, as for ``memory_of``."""
    known = _planned(parameters)
    memory = memory_of(layout, setting, peak=True)
    frozen = sum(one.nbytes for one in known if not one.trainable)
    return Need(
        parameters=memory.parameters + frozen,
        gradients=memory.gradients + _gradient_bytes(_trainable(known), layout, setting),
        optimizer=memory.total - memory.parameters - memory.gradients,
    )


def _gradient_bytes(trainable: Sequence[PlannedParameter], layout: Layout, setting: Setting) -> int:
    """Of those that lie in no buffer of the optimizer's."""
    if setting.gradient_sync == "backward":
        members = ({piece.parameter for piece in bucket.pieces} for bucket in layout.buckets)
        waiting = {index for index, one in enumerate(trainable) if one.is_tied}

        def with_bucket(some: set[int]) -> int:
            there = sum(trainable[index].nbytes for index in some | waiting)
            return there + _while_summed([trainable[index] for index in some])

        return max(map(with_bucket, members), default=0)
    device = torch.device(setting.device)
    viewed = [one for one in trainable if _exposes(one.dtype, device, setting)]
    others = [one for one in trainable if not _exposes(one.dtype, device, setting)]
    just_made = max((one.nbytes for one in viewed), default=0)  # by autograd, on its way to its place
    return sum(one.nbytes for one in others) + max(_while_summed(others), just_made, _while_summed(viewed, of=3))


def _while_summed(parameters: Iterable[PlannedParameter], *, of: int = 2) -> int:
    """What the largest tied one takes on top for a moment: the gradients of two places beside their sum."""
    return max((of * one.nbytes for one in parameters if one.is_tied), default=0)


# What would fit


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether what was asked for fits, and what would.

    Args:
        available: bytes for a rank with the setting that was asked for; ``need`` is what that takes.
        nearest: the setting with the fewest changes that fits: ``asked`` itself if it does, None if none does;
            ``nearest_need`` is what it takes.
        changes: in what ``nearest`` differs, of "moments", "world_size", "gradient_sync" and "master".
    """

    asked: Setting
    available: int
    need: Need
    nearest: Setting | None
    nearest_need: Need | None
    changes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.nearest == self.asked


def fitting(
    parameters: Planned, asked: Setting, available: int | Callable[[int], int], *, most_ranks: int = 1024
) -> Fit:
    """The setting nearest to ``asked`` that fits.

    Nearest is what changes fewest of moments, ranks, ``gradient_sync`` and master; where several change as many, what
    changes the first of them in this order; then what goes the fewest steps down the formats and up the powers of two
    of ranks, to ``most_ranks``, before it goes down them. ``gradient_sync="external"`` is kept or left, never proposed.

    Args:
        available: bytes for each rank; or a function of the number of ranks that tells them, as for ranks that share a
            host: ``lambda ranks: host_bytes // ranks``.

    Raises:
        ValueError, TypeError: the optimizer would refuse ``asked``.
    """
    known = _planned(parameters)
    layouts = {asked.world_size: lay_out(known, asked)}
    room = available if callable(available) else lambda _: available
    asked_need = need_of(known, layouts[asked.world_size], asked)
    for candidate, changes in _candidates(known, asked, most_ranks):
        if candidate.world_size not in layouts:
            layouts[candidate.world_size] = lay_out(known, candidate)
        found = need_of(known, layouts[candidate.world_size], candidate)
        if found.total <= room(candidate.world_size):
            return Fit(asked, room(asked.world_size), asked_need, candidate, found, changes)
    return Fit(asked, room(asked.world_size), asked_need, None, None)


def _candidates(
    parameters: Sequence[PlannedParameter], asked: Setting, most_ranks: int
) -> Iterator[tuple[Setting, tuple[str, ...]]]:
    """All settings, the nearest first. A change that takes more bytes is never part of the nearest that fits."""
    precision, dtypes = asked.precision, {one.dtype for one in _trainable(parameters)}
    moments: list[Moments] = [precision.moments]
    if torch.float64 not in dtypes:
        moments += [other for other in get_args(Moments) if other != precision.moments]
    masters: list[Master] = [precision.master]
    if dtypes & {torch.bfloat16, torch.float16}:
        masters += [other for other in ("split", "none") if other != precision.master]
    syncs: list[GradientSync] = [asked.gradient_sync]
    syncs += [other for other in ("backward", "step") if other != asked.gradient_sync]
    powers = [2**power for power in range(most_ranks.bit_length()) if 2**power <= most_ranks]
    more = [ranks for ranks in powers if ranks > asked.world_size]
    fewer = [ranks for ranks in reversed(powers) if ranks < asked.world_size]
    choices = (moments, [asked.world_size, *more, *fewer], syncs, masters)
    names = ("moments", "world_size", "gradient_sync", "master")

    def distance(indices: tuple[int, ...]) -> tuple[int, tuple[bool, ...], int, tuple[int, ...]]:
        is_kept = tuple(index == 0 for index in indices)
        return is_kept.count(False), is_kept, sum(indices), indices  # those that change the first names come first

    for indices in sorted(itertools.product(*(range(len(some)) for some in choices)), key=distance):
        m, n, s, w = indices
        yield (
            replace(
                asked,
                world_size=choices[1][n],
                gradient_sync=syncs[s],
                precision=replace(precision, moments=moments[m], master=masters[w]),
            ),
            tuple(name for name, index in zip(names, indices, strict=True) if index),
        )
