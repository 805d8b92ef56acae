# SPDX-License-Identifier: Apache-2.0
"""Plans the bytes that training takes on each rank, by kind, before anything is allocated.

Uses the optimizer's own layout, formats and tables, so that a plan equals ``optimizer.memory()``. Allocates no
tensor of a parameter's size, and measures nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from math import lcm, prod
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from shardadam import update
from shardadam.checks.arguments import Options
from shardadam.engine.reduction.staging import StagingPool
from shardadam.engine.tables import allocate_counters, table_bytes
from shardadam.layout import Arena, Bucket, Layout, ParameterSpec, build_layout, joined, renumbered
from shardadam.offload import offload_planned
from shardadam.optimizer import GradientSync
from shardadam.precision import Master, Moments, Precision
from shardadam.state.memory import Memory
from shardadam.transport import placement
from shardadam.update import formats


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """What a plan needs to know about a parameter.

    Args:
        shape: of what the planned rank holds: of a DTensor, the shape of its local tensor.
        group: index of its param group; groups never share a bucket.
        trainable: a frozen parameter has no state, but counts as memory of the rank.
        is_tied: whether several modules of the model use it. Autograd keeps the gradient of its first use until it has
            that of the last, and then holds both and their sum.
        expert_parallel: number of groups that the data-parallel ranks are divided into for its param group
            (``process_group``): its state is split over ``Setting.world_size / expert_parallel`` ranks.
        copies: number of model-parallel ranks that hold each of its elements. Parameters that differ in this never
            share a bucket.
        is_dtensor: whether it is a DTensor; ``p.grad`` is then never a view of a flat buffer.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    group: int = 0
    trainable: bool = True
    is_tied: bool = False
    expert_parallel: int = 1
    copies: int = 1
    is_dtensor: bool = False

    @classmethod
    def of(cls, parameter: Tensor, group: int = 0) -> PlannedParameter:
        """Describe a tensor, which may be on the meta device, or what this rank holds of a DTensor.

        Among DTensors, an ordinary tensor counts as a copy on each rank of their mesh: set ``copies`` to their number.
        """
        shape = tuple(placement.local_tensor(parameter).shape)
        copies, is_dtensor = placement.copies_of(parameter), placement.mesh_of(parameter) is not None
        return cls(shape, parameter.dtype, group, parameter.requires_grad, copies=copies, is_dtensor=is_dtensor)

    @classmethod
    def of_model(cls, model: nn.Module) -> dict[str, PlannedParameter]:
        """Return all parameters by name, in the order of ``model.named_parameters()``; tied ones once."""
        uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        return {
            name: replace(cls.of(parameter), is_tied=uses[id(parameter)] > 1)
            for name, parameter in model.named_parameters()
        }

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


Planned = Iterable[PlannedParameter | Tensor]
"""Parameters in the optimizer's order. A tensor, which may be on the meta device, belongs to param group 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The arguments of an optimizer that its memory depends on, and where it will run.

    Args:
        world_size: number of ranks that split the state; with hybrid sharding, of one shard group.
        precision: as the optimizer takes it.
        gradient_sync: as the optimizer takes it.
        bucket_mb: as the optimizer takes it; None: the default of the device.
        device: of all parameters: "cpu" or "cuda". For CUDA the plan assumes NCCL, and Triton if it is installed here.
        transport: as the optimizer takes it; "auto" is planned as for ranks of one host.
        replicas: with hybrid sharding, the number of shard groups; else 1.
        clips: whether the norm of the gradients is computed, for clipping.
        ema: whether the optimizer has an ``ema_decay``.
        offload: where the state is kept between steps; None: on the device of the parameters.
    """

    world_size: int = 1
    precision: Precision = field(default_factory=Precision)
    gradient_sync: GradientSync = "backward"
    bucket_mb: float | None = None
    device: str = "cpu"
    transport: Literal["auto", "collective", "shared_memory"] = "auto"
    replicas: int = 1
    clips: bool = False
    ema: bool = False
    offload: Literal["host", "disk"] | None = None

    @property
    def is_local(self) -> bool:
        """Whether no rank reduces gradients: statistics and update read them where autograd has left them."""
        return self.gradient_sync == "external" or self.world_size * self.replicas == 1

    def shard_group(self, parameter: PlannedParameter) -> int:
        """Return the number of ranks that split the state of ``parameter``.

        Raises:
            ValueError: ranks cannot be divided into ``parameter.expert_parallel`` groups, or with hybrid sharding.
        """
        groups = parameter.expert_parallel
        if groups < 1 or self.world_size % groups or (groups > 1 and self.replicas > 1):
            raise ValueError(
                f"expert_parallel: found {groups} with {self.world_size} ranks that split the state in "
                f"{self.replicas} replicas, expected a divisor of the ranks, and no replicas. Change one of them."
            )
        return self.world_size // groups

    def bucket_bytes(self, nbytes: int, ranks: int | None = None) -> int:
        """Return the size of a bucket that the optimizer would use for parameters of ``nbytes``.

        Args:
            ranks: that split their state; None: ``world_size``.

        Raises:
            ValueError, TypeError: the optimizer would refuse these arguments.
        """
        options = Options(self.gradient_sync, None, self.precision, self.bucket_mb, self.transport)
        options.check()
        return options.bucket_bytes({torch.device(self.device).type}, nbytes, ranks or self.world_size)


def plan(parameters: Planned, setting: Setting, *, peak: bool = False) -> Memory:
    """Return what ``optimizer.memory()`` returns on each rank when an optimizer is built over ``parameters``.

    Args:
        peak: plan for training instead: with ``clips`` all gradient shards. In training, staging exceeds the plan only
            while peers are late, and gradient shards only once a step has several backwards or needs gradients in
            shards (``Memory.gradient_shard``). On CPUs tables then grow by a few bytes for each parameter, which are
            not counted.

    Raises:
        ValueError, TypeError: the optimizer would refuse these arguments, or a parameter's dtype.
    """
    return memory_of(lay_out(parameters, setting), setting, peak=peak)


def lay_out(parameters: Planned, setting: Setting) -> Layout:
    """Return the layout of the trainable parameters, for ``memory_of``. Raises as ``plan`` does."""
    device = torch.device(setting.device)
    trainable = _trainable(_planned(parameters))
    for index, one in enumerate(trainable):
        setting.precision.check_parameter(one.dtype, str(index))
    of_groups: dict[int | None, list[int]] = {None: []}  # by param group, where it has a shard group of its own
    for index, one in enumerate(trainable):
        of_groups.setdefault(one.group if one.expert_parallel > 1 else None, []).append(index)
    layouts = []
    for indices in of_groups.values():
        some = [trainable[index] for index in indices]
        ranks = setting.shard_group(some[0]) if some else setting.world_size
        keys = [ArenaKey.of(one, device) for one in some]
        of_dtensors = {key for key, one in zip(keys, some, strict=True) if one.is_dtensor}
        specs = [
            ParameterSpec(one.numel, one.dtype.itemsize, key._replace(is_plain=key not in of_dtensors))
            for key, one in zip(keys, some, strict=True)
        ]
        bucket_bytes = setting.bucket_bytes(sum(one.nbytes for one in some), ranks)
        layouts.append(renumbered(build_layout(specs, world_size=ranks, bucket_bytes=bucket_bytes), indices))
    return joined(layouts)


class ArenaKey(NamedTuple):
    """What parameters have in common that share an arena (``FlatArena``).

    Args:
        own_group: index of the param group if its state is split over ranks of its own; else None.
        is_plain: whether there is no DTensor among them.
    """

    group: int
    dtype: torch.dtype
    device: torch.device
    copies: int
    own_group: int | None
    is_plain: bool = True

    @classmethod
    def of(cls, one: PlannedParameter, device: torch.device) -> ArenaKey:
        return cls(one.group, one.dtype, device, one.copies, one.group if one.expert_parallel > 1 else None)


def memory_of(layout: Layout, setting: Setting, *, peak: bool = False) -> Memory:
    """Return ``plan`` for an existing layout. The setting's precision, ``gradient_sync``, transport and ``clips`` may
    differ from those that the layout was built with.
    """
    total: Counter[str] = Counter(staging=_staging_bytes(layout, setting))
    homes = []
    for index, arena in enumerate(layout.arenas):
        buckets = [bucket for bucket in layout.buckets if bucket.arena == index]
        total.update(_arena_bytes(arena, buckets, setting, peak=peak))
        key = _key_of(arena)
        homes.append((setting.precision.format(key.dtype, key.device, has_average=setting.ema), buckets))
    total = offload_planned(total, setting.offload, homes)
    return Memory(**{kind.name: total[kind.name] for kind in fields(Memory)})


def _planned(parameters: Planned) -> list[PlannedParameter]:
    listed = list(parameters)
    largest = max((len(placement.mesh_ranks(one)) for one in listed if isinstance(one, Tensor)), default=0)

    def of(tensor: Tensor) -> PlannedParameter:
        """Count copies on the ranks of the largest mesh."""
        one, held = PlannedParameter.of(tensor), len(placement.mesh_ranks(tensor)) or 1
        return replace(one, copies=max(1, one.copies * largest // held))

    return [of(one) if isinstance(one, Tensor) else one for one in listed]


def _trainable(parameters: Sequence[PlannedParameter]) -> list[PlannedParameter]:
    return [one for one in parameters if one.trainable]


def shard_group_multiple(parameters: Iterable[PlannedParameter]) -> int:
    """Return what a world size must be a multiple of, so that it can be divided into the groups of all experts."""
    return lcm(*(one.expert_parallel for one in parameters if one.trainable))


def _arena_bytes(arena: Arena, buckets: Sequence[Bucket], setting: Setting, *, peak: bool) -> dict[str, int]:
    key, ranks = _key_of(arena), buckets[0].world_size
    dtype, device = key.dtype, key.device
    numel = arena.numel // ranks
    format = setting.precision.format(dtype, device, has_average=setting.ema)
    state = {name: count * kind.itemsize for name, (count, kind) in formats.tensors(format, numel).items()}
    zeros = [0] * len(arena.parameters)
    counters = allocate_counters(zeros, arena.offsets, zeros, torch.device("meta"), has_average=setting.ema)
    tables = counters.table_bytes + table_bytes(buckets, len(arena.parameters), format, device)
    if update.has_kernel(dtype, device):
        from shardadam.update.triton import TritonUpdate

        tables += TritonUpdate(counters, seed=0).nbytes
    is_bucket_view = _has_bucket_view(key, ranks, setting)
    has_shard = not setting.is_local and (not is_bucket_view or (peak and setting.clips))
    # NCCL writes its sums to the shard, in the dtype on the wire.
    is_wire = device.type == "cuda" and setting.replicas == 1 and setting.precision.accumulate == "wire"
    is_wire = is_wire and format.gradients == "auto"
    shard_dtype = setting.precision.wire_dtype(dtype) if is_wire else format.gradient_dtype
    return {
        "parameters": arena.numel * dtype.itemsize,
        "gradients": arena.numel * dtype.itemsize if is_bucket_view else 0,
        "gradient_shard": numel * shard_dtype.itemsize if has_shard else 0,
        "moments": sum(state.get(name, 0) for name in (*formats.MOMENTS, *formats.SCALES)),
        "master": sum(state.get(name, 0) for name in formats.MASTERS),
        "average": state.get(formats.AVERAGE, 0),
        "scalars": counters.scalar_bytes,
        "tables": tables,
    }


def _key_of(arena: Arena) -> ArenaKey:
    return cast("ArenaKey", arena.key)


def _is_shared(device: torch.device, ranks: int, setting: Setting) -> bool:
    """Return whether the ``ranks`` of a shard group read each other's memory (shared-memory transport)."""
    return device.type == "cpu" and ranks > 1 and setting.transport != "collective"


def _has_bucket_view(key: ArenaKey, ranks: int, setting: Setting) -> bool:
    """Return whether ``p.grad`` is a view of a flat buffer that peers read (``engine/reduction/bucket_view.py``).

    Args:
        ranks: of the shard group.
    """
    is_wire_dtype = setting.precision.wire_dtype(key.dtype) == key.dtype
    is_read = setting.gradient_sync == "step" and setting.replicas == 1 and _is_shared(key.device, ranks, setting)
    return is_read and is_wire_dtype and key.is_plain


def _staging_bytes(layout: Layout, setting: Setting) -> int:
    """Return the bytes of two staging buffers for each shard group and dtype that is reduced (one if it has one
    bucket), each as large as its largest bucket.
    """
    if setting.is_local:
        return 0
    numels: dict[tuple[int | None, int, torch.dtype, torch.device], list[int]] = {}
    for bucket in layout.buckets:
        key = _key_of(layout.arenas[bucket.arena])
        if not _has_bucket_view(key, bucket.world_size, setting):
            users = key.own_group, bucket.world_size, setting.precision.wire_dtype(key.dtype), key.device
            numels.setdefault(users, []).append(bucket.numel)
    total = 0
    for (_, ranks, dtype, device), some in numels.items():
        received = _received_numel(max(some), device, ranks, setting)
        total += min(StagingPool.SIZE, len(some)) * (max(some) + received) * dtype.itemsize
    return total


def _received_numel(numel: int, device: torch.device, ranks: int, setting: Setting) -> int:
    """Return how many extra elements a staging buffer of ``numel`` elements has to receive what peers send."""
    if ranks == 1 or _is_shared(device, ranks, setting):
        return 0
    if device.type == "cpu":
        return numel - numel // ranks
    return numel if setting.precision.accumulate == "fp32" else 0  # NCCL sums in place


# All memory of a rank


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that training takes on a rank.

    Does not count activations, buffers of the model, what torch itself takes, and the second copy of the parameters
    while an optimizer is built.

    Args:
        parameters: of all parameters, frozen ones included.
        gradients: of the gradients that exist at once. With ``gradient_sync="backward"`` those of one bucket, as
            backward completes buckets roughly in order.
        optimizer: of its state and everything else that it holds.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def adamw_bytes(parameters: Planned) -> int:
    """Return the bytes of torch.optim.AdamW's state: two moments in the parameter's dtype, a float32 step counter."""
    return sum(2 * one.nbytes + 4 for one in _trainable(_planned(parameters)))


def adamw_need(parameters: Planned) -> Need:
    """Return what training with torch.optim.AdamW takes on each rank.

    Does not count DDP's own buckets, which take extra memory unless gradients are views of them.
    """
    known = _planned(parameters)
    gradients = sum(one.nbytes for one in _trainable(known)) + _while_summed(_trainable(known))
    return Need(sum(one.nbytes for one in known), gradients, adamw_bytes(known))


def need(parameters: Planned, setting: Setting) -> Need:
    """Return what training with ``ShardedAdam`` or ``ShardedAdamW`` takes on each rank. Raises as ``plan`` does."""
    known = _planned(parameters)
    return need_of(known, lay_out(known, setting), setting)


def need_of(parameters: Planned, layout: Layout, setting: Setting) -> Need:
    """Return ``need`` for an existing layout of ``parameters``; ``setting`` may differ as in ``memory_of``."""
    known = _planned(parameters)
    memory = memory_of(layout, setting, peak=True)
    frozen = sum(one.nbytes for one in known if not one.trainable)
    return Need(
        parameters=memory.parameters + frozen,
        gradients=memory.gradients + _gradient_bytes(_trainable(known), layout, setting),
        optimizer=memory.total - memory.parameters - memory.gradients,
    )


def _gradient_bytes(trainable: Sequence[PlannedParameter], layout: Layout, setting: Setting) -> int:
    """Return the most bytes of gradients that exist at once outside the optimizer's buffers."""
    if setting.gradient_sync == "backward" and not setting.is_local:
        buckets = ({segment.parameter for segment in bucket.segments} for bucket in layout.buckets)
        tied = {index for index, one in enumerate(trainable) if one.is_tied}  # may wait for their last use

        def with_bucket(bucket: set[int]) -> int:
            nbytes = sum(trainable[index].nbytes for index in bucket | tied)
            return nbytes + _while_summed([trainable[index] for index in bucket])

        return max(map(with_bucket, buckets), default=0)
    viewed: list[PlannedParameter] = []
    others: list[PlannedParameter] = []
    for arena in layout.arenas:
        some = [trainable[index] for index in arena.parameters]
        is_view = _has_bucket_view(_key_of(arena), setting.shard_group(some[0]), setting)
        (viewed if is_view else others).extend(some)
    just_made = max((one.nbytes for one in viewed), default=0)  # by autograd, before it is copied into its view
    return sum(one.nbytes for one in others) + max(_while_summed(others), just_made, _while_summed(viewed, of=3))


def _while_summed(parameters: Iterable[PlannedParameter], *, of: int = 2) -> int:
    """Return the extra bytes while autograd adds up the gradients of a tied parameter: ``of`` times the largest one."""
    return max((of * one.nbytes for one in parameters if one.is_tied), default=0)


# What fits


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a requested setting fits, and the nearest one that does.

    Args:
        asked: the requested setting.
        available: bytes of memory for each rank with ``asked``.
        need: what ``asked`` takes.
        nearest: the setting with the fewest changes that fits: ``asked`` itself if it fits, None if no setting fits.
        nearest_need: what ``nearest`` takes.
        changes: how ``nearest`` differs from ``asked``: of "moments", "world_size", "gradient_sync" and "master".
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
    """Find the setting nearest to ``asked`` that fits.

    Nearest is the setting that changes the fewest of moments, ranks, ``gradient_sync`` and master. Among equals, one
    that changes an earlier of these is nearer; then one with fewer steps down the formats, and up the powers of two of
    ranks before down them (times ``shard_group_multiple``). ``gradient_sync="external"`` is never proposed, though it
    may be kept or given up.

    Args:
        available: bytes of memory for each rank; or a function from the number of ranks to them, as for ranks that
            share a host: ``lambda ranks: host_bytes // ranks``.
        most_ranks: the largest number of ranks to propose.

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
    """Yield all settings with their changes, the nearest first.

    Includes changes that take more bytes: the nearest that fits never has one.
    """
    precision, dtypes = asked.precision, {one.dtype for one in _trainable(parameters)}
    moments: list[Moments] = [precision.moments]
    if torch.float64 not in dtypes:
        moments += [other for other in get_args(Moments) if other != precision.moments]
    masters: list[Master] = [precision.master]
    if dtypes & {torch.bfloat16, torch.float16}:
        masters += [other for other in ("split", "none") if other != precision.master]
    syncs: list[GradientSync] = [asked.gradient_sync]
    syncs += [other for other in ("backward", "step") if other != asked.gradient_sync]
    least = shard_group_multiple(parameters)
    powers = [least * 2**power for power in range(most_ranks.bit_length()) if least * 2**power <= most_ranks]
    more = [ranks for ranks in powers if ranks > asked.world_size]
    fewer = [ranks for ranks in reversed(powers) if ranks < asked.world_size]
    choices = (moments, [asked.world_size, *more, *fewer], syncs, masters)
    names = ("moments", "world_size", "gradient_sync", "master")

    def distance(indices: tuple[int, ...]) -> tuple[int, tuple[bool, ...], int, tuple[int, ...]]:
        is_kept = tuple(index == 0 for index in indices)
        return is_kept.count(False), is_kept, sum(indices), indices  # a change of an earlier name is nearer

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
