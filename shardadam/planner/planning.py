# SPDX-License-Identifier: Apache-2.0
"""The bytes that an optimizer will hold on each rank, by kind: equal to ``optimizer.memory()``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from math import lcm, prod
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from shardadam import update
from shardadam.checks.arguments import Options
from shardadam.engine.reduction.scratch import ShardScratch
from shardadam.engine.reduction.staging import StagingPool
from shardadam.engine.tables import allocate_counters, table_bytes
from shardadam.layout import Arena, Bucket, Layout, ParameterSpec, build_layout, joined, renumbered
from shardadam.offload import offload_planned
from shardadam.optimizer import GradientSync
from shardadam.precision import Precision
from shardadam.state.memory import Memory, adamw_bytes
from shardadam.transport import placement
from shardadam.update import formats

When = Literal["step", "backward"]
"""When parameters are updated."""


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
        update: as the optimizer takes it.
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
    update: When = "step"

    def check(self) -> None:
        """Raise ValueError or TypeError if the optimizer would refuse these arguments."""
        self._options.check()
        if self.update == "backward" and self.clips:
            raise ValueError(
                'update="backward": found clips=True, expected False: the norm is known only after backward. Choose '
                'update="step", or do not clip.'
            )
        if self.offload == "host" and torch.device(self.device).type == "cpu":
            raise ValueError(
                'offload: found "host" with device="cpu", expected "disk" or None: the state is in memory of the host '
                "already."
            )

    @property
    def _options(self) -> Options:
        return Options(self.gradient_sync, None, self.precision, self.bucket_mb, self.transport, self.update)

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
        self.check()
        return self._options.bucket_bytes({torch.device(self.device).type}, nbytes, ranks or self.world_size)


def plan(parameters: Planned, setting: Setting, *, peak: bool = False) -> Memory:
    """Return what ``optimizer.memory()`` returns on each rank when an optimizer is built over ``parameters``.

    Args:
        peak: plan for training instead: with ``clips`` all gradient shards. In training, staging (and with
            ``update="backward"`` gradient shards) exceed the plan only while peers are late or parameters are unused,
            and gradient shards otherwise only once a step has several backwards or needs gradients in shards
            (``Memory.gradient_shard``). On CPUs tables then grow by a few bytes for each parameter, which are
            not counted.

    Raises:
        ValueError, TypeError: the optimizer would refuse these arguments, or a parameter's dtype.
    """
    return memory_of(lay_out(parameters, setting), setting, peak=peak)


def lay_out(parameters: Planned, setting: Setting) -> Layout:
    """Return the layout of the trainable parameters, for ``memory_of``. Raises as ``plan`` does."""
    device = torch.device(setting.device)
    trainable = trainable_of(described(parameters))
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
    """Return ``plan`` for an existing layout. The setting's precision, ``gradient_sync``, ``update``, transport and
    ``clips`` may differ from those that the layout was built with.

    Raises:
        ValueError, TypeError: the optimizer would refuse these arguments.
    """
    setting.check()
    total: Counter[str] = Counter()
    total.update(staging=_staging_bytes(layout, setting), gradient_shard=_scratch_bytes(layout, setting))
    homes = []
    for index, arena in enumerate(layout.arenas):
        buckets = [bucket for bucket in layout.buckets if bucket.arena == index]
        total.update(_arena_bytes(arena, buckets, setting, peak=peak))
        key = key_of(arena)
        homes.append((setting.precision.format(key.dtype, key.device, has_average=setting.ema), buckets))
    total = offload_planned(total, setting.offload, homes)
    return Memory(**{kind.name: total[kind.name] for kind in fields(Memory)})


def described(parameters: Planned) -> list[PlannedParameter]:
    listed = list(parameters)
    largest = max((len(placement.mesh_ranks(one)) for one in listed if isinstance(one, Tensor)), default=0)

    def of(tensor: Tensor) -> PlannedParameter:
        """Count copies on the ranks of the largest mesh."""
        one, held = PlannedParameter.of(tensor), len(placement.mesh_ranks(tensor)) or 1
        return replace(one, copies=max(1, one.copies * largest // held))

    return [of(one) if isinstance(one, Tensor) else one for one in listed]


def trainable_of(parameters: Sequence[PlannedParameter]) -> list[PlannedParameter]:
    return [one for one in parameters if one.trainable]


def shard_group_multiple(parameters: Iterable[PlannedParameter]) -> int:
    """Return what a world size must be a multiple of, so that it can be divided into the groups of all experts."""
    return lcm(*(one.expert_parallel for one in parameters if one.trainable))


def _arena_bytes(arena: Arena, buckets: Sequence[Bucket], setting: Setting, *, peak: bool) -> dict[str, int]:
    key, ranks = key_of(arena), buckets[0].world_size
    dtype, device = key.dtype, key.device
    numel = arena.numel // ranks
    format = setting.precision.format(dtype, device, has_average=setting.ema)
    state = {name: count * kind.itemsize for name, (count, kind) in formats.tensors(format, numel).items()}
    parameter_numel = sum(segment.numel for bucket in buckets for segment in bucket.segments)
    zeros = [0] * len(arena.parameters)
    counters = allocate_counters(zeros, arena.offsets, zeros, torch.device("meta"), has_average=setting.ema)
    tables = counters.table_bytes + table_bytes(buckets, len(arena.parameters), format, device)
    tables += update.scalar_table_bytes(len(arena.parameters), format, device)
    is_bucket_view = has_bucket_view(key, ranks, setting)
    is_kept = setting.update == "step" and not setting.is_local
    has_shard = is_kept and (not is_bucket_view or (peak and setting.clips))
    return {
        "parameters": arena.numel * dtype.itemsize,
        "gradients": arena.numel * dtype.itemsize if is_bucket_view else 0,
        "gradient_shard": numel * _shard_dtype(key, setting).itemsize if has_shard else 0,
        "moments": sum(state.get(name, 0) for name in (*formats.MOMENTS, *formats.SCALES)),
        "master": sum(state.get(name, 0) for name in formats.MASTERS),
        "average": state.get(formats.AVERAGE, 0),
        "scalars": counters.scalar_bytes,
        "tables": tables,
        "adamw": adamw_bytes(format, parameter_numel, len(arena.parameters)),
    }


def key_of(arena: Arena) -> ArenaKey:
    return cast("ArenaKey", arena.key)


def _is_shared(device: torch.device, ranks: int, setting: Setting) -> bool:
    """Return whether the ``ranks`` of a shard group read each other's memory (shared-memory transport)."""
    return device.type == "cpu" and ranks > 1 and setting.transport != "collective"


def has_bucket_view(key: ArenaKey, ranks: int, setting: Setting) -> bool:
    """Return whether ``p.grad`` is a view of a flat buffer that peers read (``engine/reduction/bucket_view.py``).

    Args:
        ranks: of the shard group.
    """
    is_wire_dtype = setting.precision.wire_dtype(key.dtype) == key.dtype
    is_read = setting.gradient_sync == "step" and setting.replicas == 1 and _is_shared(key.device, ranks, setting)
    return is_read and is_wire_dtype and key.is_plain


def _shard_dtype(key: ArenaKey, setting: Setting) -> torch.dtype:
    """Return the dtype of a shard of reduced gradients."""
    format = setting.precision.format(key.dtype, key.device)
    # NCCL writes its sums to the shard, in the dtype on the wire.
    is_wire = key.device.type == "cuda" and setting.replicas == 1 and setting.precision.accumulate == "wire"
    is_wire = is_wire and format.gradients == "auto"
    return setting.precision.wire_dtype(key.dtype) if is_wire else format.gradient_dtype


def _scratch_bytes(layout: Layout, setting: Setting) -> int:
    """Return the bytes of gradient shards that are used again with ``update="backward"``: two for each shard group and
    dtype (one if it has one bucket), each as large as that of its largest bucket.
    """
    if setting.update == "step" or setting.is_local:
        return 0
    numels: dict[tuple[int | None, int, torch.dtype, torch.device], list[int]] = {}
    for bucket in layout.buckets:
        key = key_of(layout.arenas[bucket.arena])
        users = key.own_group, bucket.world_size, _shard_dtype(key, setting), key.device
        numels.setdefault(users, []).append(bucket.shard_numel)
    return sum(
        min(ShardScratch.SIZE, len(some)) * max(some) * dtype.itemsize for (_, _, dtype, _), some in numels.items()
    )


def _staging_bytes(layout: Layout, setting: Setting) -> int:
    """Return the bytes of two staging buffers for each shard group and dtype that is reduced (one if it has one
    bucket), each as large as its largest bucket.
    """
    if setting.is_local:
        return 0
    numels: dict[tuple[int | None, int, torch.dtype, torch.device], list[int]] = {}
    for bucket in layout.buckets:
        key = key_of(layout.arenas[bucket.arena])
        if not has_bucket_view(key, bucket.world_size, setting):
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
