# SPDX-License-Identifier: Apache-2.0
"""Flat storage: arenas that parameters are views of, and this rank's shards of gradients, moments and masters.

Allocates tensors as ``layout.py`` plans them. Moves nothing between ranks, and does no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardadam import layout, pages, update
from shardadam.engine.snapshot import Snapshot
from shardadam.engine.tables import allocate_counters, block_table, fill_blocks, kernel_tables
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.offload import Reserved, StoredShard
from shardadam.precision import Format, Precision
from shardadam.sums.reference import program_count
from shardadam.transport import Transport, placement
from shardadam.transport.base import own_slice
from shardadam.update import Counters, Shard, Update, formats

# Binding returns the parameters' old memory to the system in parts of so many bytes, but in so many parts at most.
_RETURNED_BYTES = 1 << 24
_RETURNED_PARTS = 16


@dataclass(eq=False, slots=True)
class ShardedParam:
    """One trainable parameter of the optimizer, and its position in the flat storage.

    Args:
        parameter: the user's tensor: it has the gradient and the hooks.
        local: what this rank holds of it (``transport/placement.py``); a view of ``arena.parameters`` at ``offset``, in
            elements, unless the arena is borrowed. The parameter itself, except for a DTensor.
        index: position among all ``ShardedParam`` of the optimizer, arena by arena.
        arena_index: position in its arena.
        param_id: position in the optimizer's ``param_groups``, counted over all groups, frozen parameters included.
        shape, stride: of ``local`` when it was added.
        is_plain: whether the parameter is its own local tensor, and contiguous: its logical order is its memory order.
        address: of the view's memory; differs from that of ``local`` if ``p.data`` was replaced.
        buckets: those that hold a part of it.
        shard_segments: its parts in this rank's shards, in memory order. Their state is contiguous in the arena's
            state, in ``state_slice``.
        state_start: start of ``state_slice``.
        kept_master: this rank's elements of an exact master that the parameter does not round to everywhere, in
            float32; see ``state/masters.py``. None between most steps.
        has_views: whether the user has been given views of its state, and may write them at any time.
    """

    parameter: Tensor
    local: Tensor
    name: str
    index: int
    arena_index: int
    param_id: int
    arena: FlatArena
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    is_plain: bool
    address: int = 0
    buckets: list[FlatBucket] = field(default_factory=list)
    shard_segments: list[layout.Segment] = field(default_factory=list)
    state_start: int = 0
    kept_master: Tensor | None = None
    has_views: bool = False

    @property
    def gradient(self) -> Tensor | None:
        """What this rank holds of ``p.grad``. Of a DTensor, it may be Partial: then collective over its mesh."""
        if self.local is self.parameter:
            return self.parameter.grad
        return placement.local_gradient(self.parameter)

    @property
    def state_slice(self) -> slice:
        return slice(self.state_start, self.state_start + sum(segment.numel for segment in self.shard_segments))

    @property
    def block_slice(self) -> slice:
        """The slice of the arena's scales, which have one element for each block of ``ALIGNMENT_NUMEL`` elements."""
        state = self.state_slice
        return slice(state.start // ALIGNMENT_NUMEL, -(-state.stop // ALIGNMENT_NUMEL))


@dataclass(eq=False, frozen=True, slots=True)
class ShardGroup:
    """The ranks that split the state of some param groups.

    Args:
        transport: between them.
        divisor: of the sum of gradients over these ranks and their replicas.
    """

    transport: Transport
    divisor: float

    @property
    def ranks(self) -> int:
        """The number of ranks whose gradients are summed up."""
        return self.transport.world_size * self.transport.replicas


@dataclass(eq=False, slots=True)
class FlatArena:
    """The flat storage of one (param group, dtype, device, number of copies) and shard group.

    Args:
        shard_group: the ranks that it is split over.
        norm_weight: of its squares in the sum over all ranks: 1 / the number of ranks that add the same ones.
        is_borrowed: other code stores the parameters (``fully_shard``): ``parameters`` has memory in ``lent`` only.
        parameters: whole. All other tensors are this rank's shards.
        gradient_shard: None while no gradients are reduced to it; see ``allocate_gradient_shard``.
        flat_state: see ``state``.
        blocks: as in ``update.Shard``.
        positions: as in ``update.Shard``, of all buckets; None if the update takes one bucket at a time.
        gradient_scale: the mean gradient is ``gradient_scale`` times what the gradient shard holds.
        squares: float64, for sums of squares of all buckets (``sums.GradStats``); None without kernels.
        reserved: the state's place in a store, if it is offloaded.
        joined: by offset and number of successive buckets: these as one (``engine/merging.py``).
        snapshot: the last one of the state.
    """

    group_index: int
    shard_group: ShardGroup
    norm_weight: float
    is_borrowed: bool
    format: Format
    params: list[ShardedParam]
    buckets: list[FlatBucket]
    parameters: Tensor
    gradient_shard: Tensor | None
    flat_state: dict[str, Tensor]
    blocks: Tensor
    positions: Tensor | None
    counters: Counters
    update: Update
    gradient_scale: float = 1.0
    squares: Tensor | None = None
    reserved: Reserved | None = None
    joined: dict[tuple[int, int], layout.Bucket] = field(default_factory=dict)
    snapshot: Snapshot = field(default_factory=Snapshot)

    @property
    def transport(self) -> Transport:
        """The transport of the shard group."""
        return self.shard_group.transport

    @property
    def indices(self) -> slice:
        return slice(self.params[0].index, self.params[-1].index + 1)

    @property
    def state(self) -> dict[str, Tensor]:
        """This rank's shards of the state, by the names in ``update/formats.py``, for all accesses but the update's.

        Offloaded state is on the CPU, wherever the parameters are; waits until the last step's changes are there.
        The caller may write it: see "Note: held state" in ``engine/snapshot.py``.
        """
        self.snapshot.finish()
        if self.reserved is not None:
            self.reserved.store.settle()
        return self.flat_state

    def allocate_gradient_shard(self, dtype: torch.dtype) -> None:
        """Allocate the gradient shard, uninitialised, unless there is one of this dtype. A new one replaces the old."""
        if self.gradient_shard is not None and self.gradient_shard.dtype == dtype:
            return
        numel = self.parameters.numel() // self.transport.world_size
        self.gradient_shard = torch.empty(numel, dtype=dtype, device=self.parameters.device)
        for bucket in self.buckets:
            bucket.shard = replace(bucket.shard, gradient=self.gradient_shard[bucket.shard_slice])


@dataclass(eq=False, slots=True)
class FlatBucket:
    """One bucket's slices of its arena.

    Args:
        segments, shard_segments: the parts of parameters in the bucket, and in this rank's shard.
        parameters: whole.
        shard: of this rank. If its state is offloaded, these are its places on the CPU.
        stored: its state, if that is offloaded.
        wire_dtype: in which gradients are sent.
        squares: of this rank's shard, as in ``FlatArena``.
        index: position among all buckets of the optimizer.
    """

    plan: layout.Bucket
    arena: FlatArena
    segments: list[tuple[ShardedParam, layout.Segment]]
    shard_segments: list[tuple[ShardedParam, layout.Segment]]
    parameters: Tensor
    shard: Shard
    wire_dtype: torch.dtype
    squares: Tensor | None = None
    index: int = -1
    stored: StoredShard | None = None

    @property
    def numel(self) -> int:
        return self.plan.numel

    @property
    def shard_slice(self) -> slice:
        """Where this rank's shard lies in the arena's shards."""
        start = self.plan.offset // self.plan.world_size
        return slice(start, start + self.plan.shard_numel)

    def exact_state(self, name: str) -> Tensor:
        """Return the shard's exp_avg, exp_avg_sq, average or master, in float32 (float64 for float64 parameters)."""
        device = self.shard.parameter.device
        stored: dict[str, Tensor] = {key: getattr(self.shard, key).to(device) for key in self.arena.state}
        if name == formats.AVERAGE:
            return stored[name]
        if name != "master":
            return formats.read_moments(stored)[formats.MOMENTS.index(name)]
        master = formats.read_master(stored, self.shard.parameter)
        return self.shard.parameter if master is None else master


class NamedParameter(NamedTuple):
    """A parameter to be added, the index of its param group, and its ``param_id`` (see ``ShardedParam``)."""

    parameter: Tensor
    name: str
    group_index: int
    param_id: int

    @property
    def local(self) -> Tensor:
        """What this rank holds of the parameter."""
        return placement.local_tensor(self.parameter)


def allocate(
    parameters: Sequence[NamedParameter],
    *,
    shard_group: ShardGroup,
    copies: Sequence[int],
    is_borrowed: bool,
    precision: Precision,
    has_average: bool,
    bucket_bytes: int,
    first_index: int,
    reserved: Sequence[Reserved] = (),
) -> list[FlatArena]:
    """Build flat storage for ``parameters`` and make them views of it; their values do not change.

    Collective over the shard group.

    Args:
        copies: how many model-parallel ranks hold the elements of each parameter.
        is_borrowed: as in ``FlatArena``.
        has_average: as in ``Format``.
        first_index: the number of ``ShardedParam`` that the optimizer has already.
        reserved: of each arena of ``plan_layout``, if the state is offloaded.
    """
    transport = shard_group.transport
    plan = plan_layout(parameters, copies, transport.world_size, bucket_bytes)
    arenas = []
    for index, arena_plan in enumerate(plan.arenas):
        in_arena = [parameters[i] for i in arena_plan.parameters]
        weight = 1 / (transport.replicas * copies[arena_plan.parameters[0]])
        format = precision.format(in_arena[0].local.dtype, in_arena[0].local.device, has_average=has_average)
        home = reserved[index] if reserved else None
        arena = _allocate_arena(
            arena_plan, in_arena, shard_group, weight, is_borrowed, format, precision.seed, first_index, home
        )
        indices = {i: position for position, i in enumerate(arena_plan.parameters)}
        buckets = [bucket for bucket in plan.buckets if bucket.arena == index]
        for bucket in buckets:
            segments = tuple(
                layout.Segment(indices[one.parameter], one.start, one.numel, one.offset) for one in bucket.segments
            )
            wire_dtype = precision.wire_dtype(arena.parameters.dtype)
            _add_bucket(arena, replace(bucket, segments=segments), transport.rank, wire_dtype)
        _add_kernel_tables(arena, buckets)
        if is_borrowed:
            arena.parameters.untyped_storage().resize_(0)
        first_index += len(arena.params)
        arenas.append(arena)
    return arenas


def plan_layout(
    parameters: Sequence[NamedParameter], copies: Sequence[int], world_size: int, bucket_bytes: int
) -> layout.Layout:
    """Return the layout that ``allocate`` builds of the same arguments."""
    specs = [
        layout.ParameterSpec(p.numel(), p.element_size(), (named.group_index, p.dtype, p.device, count))
        for named, count in zip(parameters, copies, strict=True)
        for p in (named.local,)
    ]
    return layout.build_layout(specs, world_size=world_size, bucket_bytes=bucket_bytes)


def _allocate_arena(
    plan: layout.Arena,
    parameters: Sequence[NamedParameter],
    shard_group: ShardGroup,
    norm_weight: float,
    is_borrowed: bool,
    format: Format,
    seed: int,
    first_index: int,
    reserved: Reserved | None,
) -> FlatArena:
    first, transport = parameters[0], shard_group.transport
    dtype, device = first.local.dtype, first.local.device
    numel = plan.numel // transport.world_size
    numels = [named.local.numel() for named in parameters]
    param_ids = [named.param_id for named in parameters]
    counters = allocate_counters(param_ids, plan.offsets, numels, device, has_average=format.has_average)
    block_count, block_dtype = block_table(numel, len(parameters), format, device)
    # A borrowed arena has no memory but in `lent`, and transports may allocate what cannot be resized.
    allocate_parameters: Callable[..., Tensor] = torch.empty if is_borrowed else transport.allocate_parameters
    arena = FlatArena(
        group_index=first.group_index,
        shard_group=shard_group,
        norm_weight=norm_weight,
        is_borrowed=is_borrowed,
        format=format,
        params=[],
        buckets=[],
        parameters=allocate_parameters(plan.numel, dtype=dtype, device=device),
        gradient_shard=None,
        flat_state={},
        blocks=torch.zeros(block_count, dtype=block_dtype, device=device),
        positions=None,
        counters=counters,
        update=update.choose(counters, format, seed=seed, rank=transport.rank),
        reserved=reserved,
    )
    view = torch.empty(0, dtype=dtype, device=device)
    freed_bytes, returned_bytes = 0, max(_RETURNED_BYTES, arena.parameters.nbytes // _RETURNED_PARTS)
    for index, (named, offset) in enumerate(zip(parameters, plan.offsets, strict=True)):
        local = named.local
        param = ShardedParam(
            parameter=named.parameter,
            local=local,
            name=named.name,
            index=first_index + index,
            arena_index=index,
            param_id=named.param_id,
            arena=arena,
            offset=offset,
            shape=local.shape,
            stride=local.stride(),
            is_plain=local is named.parameter and local.is_contiguous(),
        )
        if not is_borrowed:
            bind(param, view)
            freed_bytes += local.nbytes if device.type == "cpu" else 0
        arena.params.append(param)
        if freed_bytes >= returned_bytes:
            pages.return_freed()
            freed_bytes = 0
    if freed_bytes > 0:
        pages.return_freed()
    arena.flat_state = formats.allocate(format, numel, device) if reserved is None else reserved.state
    return arena


def _add_bucket(arena: FlatArena, plan: layout.Bucket, rank: int, wire_dtype: torch.dtype) -> None:
    start = plan.offset // plan.world_size
    elements = slice(start, start + plan.shard_numel)
    whole = arena.parameters[plan.offset : plan.offset + plan.numel]
    segments = list(plan.shard_segments(rank))
    if arena.blocks.numel() > 0:
        fill_blocks(arena.blocks[blocks_of(elements)], segments)
    first_block = (plan.offset + rank * plan.shard_numel) // ALIGNMENT_NUMEL
    bucket = FlatBucket(
        plan=plan,
        arena=arena,
        segments=[(arena.params[segment.parameter], segment) for segment in plan.segments],
        shard_segments=[(arena.params[segment.parameter], segment) for segment in segments],
        parameters=whole,
        shard=shard_of(arena, elements, own_slice(whole, rank, plan.world_size), first_block),
        wire_dtype=wire_dtype,
        stored=None if arena.reserved is None else arena.reserved.store.add(arena.reserved, elements, whole.device),
    )
    arena.buckets.append(bucket)
    for param, _ in bucket.segments:
        param.buckets.append(bucket)
    for param, segment in bucket.shard_segments:
        if not param.shard_segments:
            param.state_start = start + segment.offset
        param.shard_segments.append(segment)


def shard_of(arena: FlatArena, elements: slice, parameter: Tensor, first_block: int) -> Shard:
    """Return ``elements`` of the arena's state and gradients, with the parameters that they belong to."""
    blocks = blocks_of(elements)
    state: dict[str, Any] = dict.fromkeys(formats.STATE)
    for name, flat in arena.state.items():
        state[name] = flat[blocks if name in formats.SCALES else elements]
    return Shard(
        parameter=parameter,
        gradient=None if arena.gradient_shard is None else arena.gradient_shard[elements],
        blocks=arena.blocks[blocks],
        first_block=first_block,
        **state,
    )


def blocks_of(elements: slice) -> slice:
    return slice(elements.start // ALIGNMENT_NUMEL, elements.stop // ALIGNMENT_NUMEL)


def _add_kernel_tables(arena: FlatArena, plans: Sequence[layout.Bucket]) -> None:
    """Allocate what Triton kernels need of all buckets of an arena."""
    device = arena.parameters.device
    squares, positions = kernel_tables(plans, arena.format, device)
    if squares > 0:
        arena.squares = torch.zeros(squares, dtype=torch.float64, device=device)
        counts = [program_count(plan.shard_numel) for plan in plans]
        for bucket, part in zip(arena.buckets, torch.split(arena.squares, counts), strict=True):
            bucket.squares = part
    if positions > 0:
        found = [
            torch.arange(shard.first_block, shard.first_block + len(shard.blocks), dtype=torch.int32, device="cpu")
            for bucket in arena.buckets
            for shard in (bucket.shard,)
        ]
        arena.positions = torch.cat(found).to(device)


def gradient_shard(bucket: FlatBucket) -> Tensor:
    """Return this rank's shard of the bucket's gradients, which has been allocated."""
    gradient = bucket.shard.gradient
    assert gradient is not None
    return gradient


def bind(param: ShardedParam, view: Tensor | None = None) -> None:
    """Copy the parameter into its arena and make it a view; shape, strides and identity stay.

    Args:
        view: any tensor of the arena's dtype and device, which is changed: to make one for each of many costs time.
    """
    local = param.local
    if local.numel() > 0:
        view = view_of(param.arena.parameters, param, view)
        view.copy_(local.detach())
        local.data = view
    param.address = local.data_ptr()


def view_of(flat: Tensor, param: ShardedParam, view: Tensor | None = None) -> Tensor:
    """Return the parameter's view of ``flat``, which is as long as its arena; ``view`` itself, if it is given.

    The view has a storage of its own over the same memory. So torch.save, safetensors and deepcopy see an ordinary
    tensor, not a slice of a large one, and a write to one view does not change the versions of all.
    """
    begin = param.offset * flat.element_size()
    storage = flat.untyped_storage()[begin : begin + param.shape.numel() * flat.element_size()]
    if view is None:
        view = torch.empty(0, dtype=flat.dtype, device=flat.device)
    return view.set_(storage, 0, param.shape, param.stride)
