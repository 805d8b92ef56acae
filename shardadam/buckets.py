# SPDX-License-Identifier: Apache-2.0
"""Flat storage: parameters as views of it, gradient shards, moments and masters, and the pool of staging buffers.

Holds tensors where ``layout.py`` says; moves nothing between ranks and knows no arithmetic of Adam.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from shardadam import layout, update
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.precision import Format, Precision
from shardadam.tracing import span
from shardadam.transport import Pending, Staging, Transport
from shardadam.transport.base import Finished, own_slice
from shardadam.update import Counters, Shard, Update, formats


@dataclass(eq=False, slots=True)
class Member:
    """One trainable parameter of the optimizer and where it lives.

    ``ordinal`` counts all members in the order of the arenas they lie in, ``index`` those of the arena; ``place`` is
    that among all parameters of the optimizer. ``spans`` are the stretches of the parameter that lie in this rank's
    shards, in memory order, and lie in ``state_slice`` of the arena's state one after the other.
    """

    parameter: Tensor
    name: str
    ordinal: int
    index: int
    place: int
    arena: FlatArena
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    address: int = 0
    buckets: list[FlatBucket] = field(default_factory=list)
    spans: list[layout.Segment] = field(default_factory=list)
    state_start: int = 0

    @property
    def state_slice(self) -> slice:
        return slice(self.state_start, self.state_start + sum(span.numel for span in self.spans))

    @property
    def block_slice(self) -> slice:
        """Where the scales of its blocks of ``ALIGNMENT_NUMEL`` elements lie."""
        state = self.state_slice
        return slice(state.start // ALIGNMENT_NUMEL, -(-state.stop // ALIGNMENT_NUMEL))


@dataclass(eq=False, slots=True)
class FlatArena:
    """The flat storage of one (param group, dtype, device): parameters whole, everything else this rank's shards of
    it: ``state`` as ``update/formats.py`` names it, ``blocks`` as ``Shard`` describes it.
    """

    group_index: int
    format: Format
    members: list[Member]
    buckets: list[FlatBucket]
    parameters: Tensor
    gradient_shard: Tensor
    state: dict[str, Tensor]
    blocks: Tensor
    counters: Counters
    update: Update

    @property
    def ordinals(self) -> slice:
        return slice(self.members[0].ordinal, self.members[-1].ordinal + 1)


@dataclass(eq=False, slots=True)
class FlatBucket:
    """One bucket's slices of its arena: ``parameters`` whole, and this rank's shard.

    ``index`` counts the buckets of the optimizer.
    """

    plan: layout.Bucket
    arena: FlatArena
    pieces: list[tuple[Member, layout.Piece]]
    segments: list[tuple[Member, layout.Segment]]
    parameters: Tensor
    shard: Shard
    wire_dtype: torch.dtype
    index: int = -1

    @property
    def numel(self) -> int:
        return self.plan.numel

    def exact_state(self, name: str) -> Tensor:
        """The shard's exp_avg, exp_avg_sq or master, in float32 (float64) whatever it is stored in."""
        stored = {key: getattr(self.shard, key) for key in self.arena.state}
        if name != "master":
            return formats.read_moments(stored)[formats.MOMENTS.index(name)]
        master = formats.read_master(stored, self.shard.parameter)
        return self.shard.parameter if master is None else master


@dataclass(frozen=True, slots=True)
class NamedParameter:
    """A parameter to be taken in, with the param group it belongs to and its place among all parameters."""

    parameter: Tensor
    name: str
    group_index: int
    place: int


def allocate(
    parameters: Sequence[NamedParameter],
    *,
    transport: Transport,
    precision: Precision,
    bucket_bytes: int,
    first_ordinal: int,
) -> list[FlatArena]:
    """Builds the flat storage of ``parameters`` and makes them views of it, with their values unchanged.

    Args:
        first_ordinal: how many members there are already.
    """
    specs = [
        layout.ParameterSpec(p.numel(), p.element_size(), (named.group_index, p.dtype, p.device))
        for named in parameters
        for p in (named.parameter,)
    ]
    plan = layout.build_layout(specs, world_size=transport.world_size, bucket_bytes=bucket_bytes)
    arenas = []
    for index, arena_plan in enumerate(plan.arenas):
        in_arena = [parameters[i] for i in arena_plan.parameters]
        arena = _allocate_arena(arena_plan, in_arena, transport, precision, first_ordinal)
        indices = {i: position for position, i in enumerate(arena_plan.parameters)}
        for bucket in plan.buckets:
            if bucket.arena == index:
                pieces = tuple(replace(piece, parameter=indices[piece.parameter]) for piece in bucket.pieces)
                wire_dtype = precision.wire_dtype(arena.parameters.dtype)
                _add_bucket(arena, replace(bucket, pieces=pieces), transport.rank, wire_dtype)
        first_ordinal += len(arena.members)
        arenas.append(arena)
    if any(named.parameter.device.type == "cpu" for named in parameters):
        _return_freed_memory()
    return arenas


def _return_freed_memory() -> None:
    """Lets go of the parameters' old memory: glibc keeps freed blocks of up to 32 MiB unless it is asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _allocate_arena(
    plan: layout.Arena,
    parameters: Sequence[NamedParameter],
    transport: Transport,
    precision: Precision,
    first_ordinal: int,
) -> FlatArena:
    first = parameters[0]
    dtype, device = first.parameter.dtype, first.parameter.device
    numel = plan.numel // transport.world_size
    format = precision.format(dtype, device)
    counters = allocate_counters([named.place for named in parameters], plan.offsets, device)
    block_count, block_dtype = block_table(numel, len(parameters), format, device)
    arena = FlatArena(
        group_index=first.group_index,
        format=format,
        members=[],
        buckets=[],
        parameters=transport.parameters(plan.numel, dtype, device),
        gradient_shard=torch.empty(numel, dtype=format.exact_dtype, device=device),  # written before it is read
        state=formats.allocate(format, numel, device),
        blocks=torch.zeros(block_count, dtype=block_dtype, device=device),
        counters=counters,
        update=update.choose(counters, dtype, seed=precision.seed, rank=transport.rank),
    )
    for index, (named, offset) in enumerate(zip(parameters, plan.offsets, strict=True)):
        shape, stride = named.parameter.shape, named.parameter.stride()
        place = (first_ordinal + index, index, named.place)
        member = Member(named.parameter, named.name, *place, arena, offset, shape, stride)
        bind(member)
        arena.members.append(member)
    return arena


def allocate_counters(places: Sequence[int], offsets: Sequence[int], device: torch.device) -> Counters:
    """Of parameters that have not been updated yet, and begin at ``offsets`` of their arena."""
    return Counters(
        steps=torch.zeros(len(places), dtype=torch.float32, device=device),
        bounds=torch.zeros(len(places), dtype=torch.float64, device=device),
        places=torch.tensor(places, device=device),
        first_blocks=torch.tensor([offset // ALIGNMENT_NUMEL for offset in offsets], device=device),
    )


def block_table(numel: int, parameter_count: int, format: Format, device: torch.device) -> tuple[int, torch.dtype]:
    """Length and dtype of ``Shard.blocks`` for a rank's ``numel`` elements; length 0 where the update needs none."""
    is_needed = format.is_random or update.has_kernel(format.dtype, device)
    return numel // ALIGNMENT_NUMEL if is_needed else 0, torch.int16 if parameter_count < 2**15 else torch.int32


def _add_bucket(arena: FlatArena, plan: layout.Bucket, rank: int, wire_dtype: torch.dtype) -> None:
    start = plan.offset // plan.world_size
    shard = slice(start, start + plan.shard_numel)
    blocks = slice(shard.start // ALIGNMENT_NUMEL, shard.stop // ALIGNMENT_NUMEL)
    whole = arena.parameters[plan.offset : plan.offset + plan.numel]
    segments = list(plan.segments(rank))
    if arena.blocks.numel() > 0:
        _fill_blocks(arena.blocks[blocks], segments)

    def state(name: str) -> Tensor | None:
        flat = arena.state.get(name)
        return None if flat is None else flat[blocks if name in formats.SCALES else shard]

    bucket = FlatBucket(
        plan=plan,
        arena=arena,
        pieces=[(arena.members[piece.parameter], piece) for piece in plan.pieces],
        segments=[(arena.members[segment.parameter], segment) for segment in segments],
        parameters=whole,
        shard=Shard(
            parameter=own_slice(whole, rank, plan.world_size),
            gradient=arena.gradient_shard[shard],
            exp_avg=arena.state["exp_avg"][shard],
            exp_avg_sq=arena.state["exp_avg_sq"][shard],
            exp_avg_scale=state("exp_avg_scale"),
            exp_avg_sq_scale=state("exp_avg_sq_scale"),
            master=state("master"),
            remainder=state("remainder"),
            blocks=arena.blocks[blocks],
            first_block=(plan.offset + rank * plan.shard_numel) // ALIGNMENT_NUMEL,
        ),
        wire_dtype=wire_dtype,
    )
    arena.buckets.append(bucket)
    for member, _ in bucket.pieces:
        member.buckets.append(bucket)
    for member, segment in bucket.segments:
        if not member.spans:
            member.state_start = start + segment.offset
        member.spans.append(segment)


def _fill_blocks(blocks: Tensor, segments: Sequence[layout.Segment]) -> None:
    """Says which parameter each block belongs to; padding counts to the one before it."""
    if segments:
        firsts = [segment.offset // ALIGNMENT_NUMEL for segment in segments]
        lengths = [stop - first for first, stop in pairwise([0, *firsts[1:], len(blocks)])]
        owners = torch.tensor([segment.parameter for segment in segments], dtype=blocks.dtype)
        blocks.copy_(owners.repeat_interleave(torch.tensor(lengths)))


def bind(member: Member) -> None:
    """Copies the parameter into its arena and makes it a view of it; shape, strides and identity stay."""
    parameter = member.parameter
    if parameter.numel() > 0:
        view = view_of(member.arena.parameters, member)
        view.copy_(parameter.detach())
        parameter.data = view
    member.address = parameter.data_ptr()


def view_of(flat: Tensor, member: Member) -> Tensor:
    """The parameter's place in a flat buffer of its arena's size.

    The view has a storage of its own that aliases the buffer's memory: torch.save, safetensors and deepcopy then see an
    ordinary tensor instead of a slice of something large, and writes to one do not count as writes to all.
    """
    parameter = member.parameter
    begin = member.offset * flat.element_size()
    storage = flat.untyped_storage()[begin : begin + parameter.numel() * flat.element_size()]
    view = torch.empty(0, dtype=flat.dtype, device=flat.device)
    return view.set_(storage, 0, member.shape, member.stride)


def rebind_moved(members: Sequence[Member]) -> None:
    """Takes back parameters whose data somebody has replaced (``p.data = ...``, ``model.to``) by a tensor of the same
    kind.

    Raises:
        RuntimeError: a parameter has another device, dtype, shape or memory format than it was taken in with. None of
            them has been changed then.
    """
    moved = [member for member in members if member.parameter.data_ptr() != member.address]
    for member in moved:
        parameter, flat = member.parameter, member.arena.parameters
        found = (parameter.device, parameter.dtype, parameter.shape)
        expected = (flat.device, flat.dtype, member.shape)
        if found != expected or not same_order(parameter.stride(), member.stride, member.shape):
            raise RuntimeError(
                f"Parameter {member.name!r} was replaced after the optimizer was built: found {_describe(*found)} with "
                f"strides {parameter.stride()}, expected {_describe(*expected)} with strides {member.stride}. Call "
                "model.to(...) before building the optimizer."
            )
    for member in moved:
        bind(member)


def _describe(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{dtype} of shape {tuple(shape)} on {device}"


def is_dense(tensor: Tensor) -> bool:
    """True if the elements fill a stretch of memory without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def unrepeated(tensor: Tensor) -> Tensor:
    """Without the repetitions that ``expand`` makes of the same memory, which cannot be written to."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` as one dimension, in the memory order of ``like``; a view where its strides allow it."""
    if not same_order(tensor.stride(), like.stride(), like.shape):
        ordered = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
        tensor = ordered.copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def same_order(one: tuple[int, ...], other: tuple[int, ...], shape: torch.Size) -> bool:
    """Equal strides but for dimensions of size 1, whose stride means nothing."""
    return one == other or all(a == b for a, b, size in zip(one, other, shape, strict=True) if size != 1)


@dataclass(slots=True)
class InFlight:
    """A reduce-scatter in a staging buffer: under way, or the last one that was."""

    staging: Staging
    pending: Pending


class StagingPool:
    """Staging buffers, each as large as the largest bucket, used in turn.

    Note: growing instead of waiting
        Where a peer is slow, all buffers may be in flight when the next bucket is complete. Waiting for the peer
        inside a backward hook would be a deadlock: it may sit in a collective of the user's, waiting for us. So the
        pool grows: the gradient then lies in a buffer instead of in ``p.grad``. What has grown is given back in
        ``trim``. Before it grows it looks out for the peers for a moment, which cannot be a deadlock: they are mostly
        just behind.

    Note: a buffer on another stream
        Hooks run on the streams of their gradients. That which has waited for a transfer need not be that which fills
        the buffer next, so the latter waits, too. After ``trim`` it need not: whatever a next backward runs on comes
        after the step. (And it must not: events of before a CUDA graph's capture are none of its own.)
    """

    SIZE = 2
    PATIENCE_S = 0.25

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._numel: dict[tuple[torch.dtype, torch.device], int] = {}
        self._free: dict[tuple[torch.dtype, torch.device], list[InFlight]] = {}
        self._in_flight: deque[InFlight] = deque()
        self._is_patient = True
        self._unreleased: deque[InFlight] = deque()  # waited for here, but peers may still be reading them

    def reserve(self, bucket: FlatBucket) -> None:
        """Makes later buffers large enough for ``bucket``."""
        key = (bucket.wire_dtype, bucket.parameters.device)
        if bucket.numel > self._numel.get(key, 0):
            self._numel[key] = bucket.numel
            for free in self._free.get(key, []):
                self._transport.discard(free.staging)
            self._free[key] = []

    def acquire(self, bucket: FlatBucket, *, may_wait: bool) -> Staging:
        """A free buffer for ``bucket``. With ``may_wait`` the pool waits for the oldest transfer instead of growing."""
        key = (bucket.wire_dtype, bucket.parameters.device)
        free = self._free[key]
        self._take_back()
        while not free and self._in_flight and self._count() >= self.SIZE:
            if not (may_wait or self._in_flight[0].pending.done()):
                break
            self._settle_oldest()
            self._take_back()
        if not free and may_wait and self._unreleased and self._count() >= self.SIZE:
            self._unreleased[0].pending.await_release()
            self._take_back()
        if not free and self._count() >= self.SIZE and self._is_patient:
            end = time.monotonic() + self.PATIENCE_S
            while not free and (left := end - time.monotonic()) > 0 and self._transport.look_out(left):
                self.progress()
                self._take_back()
            self._is_patient = bool(free)  # if not, not again until a peer has come
        if not free:
            return self._transport.staging(self._numel[key], *key)
        last = free.pop()
        last.pending.wait_on_this_stream()
        return last.staging

    def launched(self, staging: Staging, pending: Pending) -> None:
        self._in_flight.append(InFlight(staging, pending))

    def progress(self) -> None:
        """Completes what waits for the host alone; never waits for a peer."""
        while self._in_flight and self._in_flight[0].pending.on_host and self._in_flight[0].pending.done():
            self._settle_oldest()

    def drain(self) -> None:
        """Waits for all transfers, in order."""
        while self._in_flight:
            self._settle_oldest()

    def trim(self) -> None:
        """Gives back what the pool has grown by, as far as peers have done with it."""
        self._take_back()
        for free in self._free.values():
            for last in free[self.SIZE :]:
                self._transport.discard(last.staging)
            free[:] = [InFlight(last.staging, Finished()) for last in free[: self.SIZE]]

    @property
    def is_idle(self) -> bool:
        return not self._in_flight

    def buffers(self) -> Iterator[Staging]:
        for some in (*self._free.values(), self._in_flight, self._unreleased):
            yield from (in_flight.staging for in_flight in some)

    def _count(self) -> int:
        return len(self._in_flight) + len(self._unreleased)

    def _settle_oldest(self) -> None:
        # Always in order: the sums of two rounds are added into one shard, and must be added the same way every time.
        with span("reduce_scatter"):
            self._in_flight[0].pending.wait()
        self._is_patient = True
        self._unreleased.append(self._in_flight.popleft())

    def _take_back(self) -> None:
        while self._unreleased and self._unreleased[0].pending.is_released():
            last = self._unreleased.popleft()
            send = last.staging.send
            if send.numel() == self._numel[send.dtype, send.device]:
                self._free[send.dtype, send.device].append(last)
            else:
                self._transport.discard(last.staging)
