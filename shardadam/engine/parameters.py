# SPDX-License-Identifier: Apache-2.0
"""Adds parameters: names them, checks that they are the same on all ranks, binds trainable ones to flat storage and
broadcasts rank 0's values.

Knows nothing about gradients: ``engine/step.py`` passes new parameters to the reducer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.checks import arguments, claims
from shardadam.checks.arguments import Options, is_stored_elsewhere, parts_of
from shardadam.engine.bindings import Bindings
from shardadam.engine.borrowing import lent
from shardadam.engine.storage import (
    FlatArena,
    FlatBucket,
    NamedParameter,
    ShardedParam,
    ShardGroup,
    allocate,
    plan_layout,
)
from shardadam.engine.strides import is_dense, unrepeated
from shardadam.offload import Reserved, open_store
from shardadam.ranks import agreement, desync
from shardadam.ranks.agreement import Claim, ManyClaims
from shardadam.transport import SingleProcessTransport, Transport, connect, placement
from shardadam.transport.groups import ranks_of
from shardadam.transport.job import ranks_of_transport


def named_parameters(param_groups: Sequence[Mapping[str, Any]], first_group: int = 0) -> list[NamedParameter]:
    """Return the parameters of ``param_groups[first_group:]``, named as by the user, or else by position."""
    named: list[NamedParameter] = []
    param_id = sum(len(group["params"]) for group in param_groups[:first_group])
    for index, group in enumerate(param_groups[first_group:], first_group):
        parameters = group["params"]
        names = group.get("param_names") or [f"param_groups[{index}]['params'][{i}]" for i in range(len(parameters))]
        for parameter, name in zip(parameters, names, strict=True):
            named.append(NamedParameter(parameter, name, index, param_id))
            param_id += 1
    return named


def listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters as a list. As in torch.nn.utils, a tensor stands for itself, not for its rows."""
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


@contextmanager
def agreed(control: dist.ProcessGroup | None) -> Iterator[list[Claim | ManyClaims]]:
    """Context manager: raise on all ranks if the block raises on any rank, or if ranks append different claims.

    Collective: all ranks of ``control`` must enter it.

    Args:
        control: None for one rank.
    """
    found: list[Claim | ManyClaims] = []
    try:
        yield found
    except Exception as error:
        agreement.announce_failure(error, control)
        raise
    agreement.require(found, control)


@contextmanager
def agreed_or_closed(transport: Transport) -> Iterator[list[Claim | ManyClaims]]:
    """Context manager: ``agreed`` between the ranks of a new transport, which is closed if it raises. Collective."""
    try:
        with agreed(transport.control) as found:
            yield found
    except Exception:
        transport.close(clean=True)
        raise
    except BaseException:
        transport.abort()
        raise


@contextmanager
def built_or_aborted(parameters: ShardedParameters) -> Iterator[None]:
    """Context manager: if the block raises, tell the other ranks why, and abort the new transports. Local."""
    try:
        with desync.announcing_failure("could not build its optimizer"):
            yield
    except BaseException:
        parameters.abort()
        raise


class _OwnGroup(NamedTuple):
    """What a param group says of the ranks that hold its parameters, None where it says nothing.

    Args:
        ranks: of the process group, ascending.
    """

    process_group: Any
    ranks: tuple[int, ...] | None
    divisor: float | None


class ShardedParameters:
    """All parameters of one optimizer.

    Attributes:
        params: the trainable ones, by ``ShardedParam.index``.
        arenas, buckets: their flat storage.
        bindings: of ``params`` to it.
        frozen: the parameters with ``requires_grad=False``, which are only broadcast.
        store: where the state is kept between steps, if it is offloaded.
    """

    def __init__(self, transport: Transport, options: Options) -> None:
        self.params: list[ShardedParam] = []
        self.arenas: list[FlatArena] = []
        self.buckets: list[FlatBucket] = []
        self.bindings = Bindings()
        self.frozen: list[NamedParameter] = []
        self.transport = transport
        self.options = options
        self.store = open_store(options.offload)
        self._common = ShardGroup(transport, transport.world_size * transport.replicas)
        self._requested: dict[int, _OwnGroup] = {}  # by the index of a param group that has one of its own
        self._own: dict[int, ShardGroup] = {}  # the same, once connected
        self._alone = ShardGroup(SingleProcessTransport(), 1)  # of parameters that other code stores
        self._parts: frozenset[int] = frozenset()  # the ranks that hold different parts of DTensors

    @property
    def transports(self) -> list[Transport]:
        """The transport of the optimizer, and those of param groups that have one of their own."""
        return list(dict.fromkeys([self.transport, *(group.transport for group in self._own.values())]))

    @property
    def parts(self) -> frozenset[int]:
        """The ranks that hold different parts of DTensors, with this one; empty if there are none."""
        return self._parts

    def abort(self) -> None:
        """Tell the other ranks, where that is supported, that this rank has left the current call. Local."""
        for transport in self.transports:
            transport.abort()

    def take_group(self, index: int, param_group: dict[str, Any]) -> dict[str, Any]:
        """Return ``param_group`` without ``process_group`` and ``gradient_divisor``, which are remembered. Local.

        Raises:
            ValueError, TypeError: they are invalid.
        """
        if not param_group.keys() & {"process_group", "gradient_divisor"}:
            return param_group  # as in torch, the user's dict becomes that of the optimizer
        left = dict(param_group)
        process_group, divisor = left.pop("process_group", None), left.pop("gradient_divisor", None)
        if process_group is None and divisor is None:
            return left
        ranks = None
        if process_group is not None:
            ranks = ranks_of(f"Param group {index}, process_group", process_group)
        arguments.check_own_group(index, ranks, divisor, self.options, self.transport)
        self._requested[index] = _OwnGroup(process_group, None if ranks is None else tuple(ranks), divisor)
        return left

    def forget_group(self, index: int) -> None:
        """Forget a group that could not be added."""
        self._requested.pop(index, None)

    def connect_groups(self, named: Sequence[NamedParameter]) -> None:
        """Connect the ranks of param groups that have a process group of their own. Collective.

        Raises:
            ValueError: on all ranks of the optimizer, if the process groups overlap; or on those of a group, if its
                parameters or divisors differ.
            RuntimeError: on all other ranks then.
        """
        everyone = sorted(ranks_of_transport(self.transport))
        for index, one in self._requested.items():
            if index in self._own:
                continue
            transport = self.transport
            if one.ranks is not None and self.transport.control is not None:
                given = agreement.exchange(one.ranks, self.transport.control)
                order = list(self.transport.store_barrier.ranks)
                arguments.check_partition(index, given, order)
                # No rank goes on to the next collective if the ranks of another group raise.
                try:
                    with agreed(self.transport.control):
                        if list(one.ranks) != everyone:
                            transport = self._connect(one, [p for p in named if p.group_index == index])
                except Exception:
                    if transport is not self.transport:
                        transport.close(clean=True)
                    raise
            divisor = self._common.divisor if one.divisor is None else float(one.divisor)
            self._own[index] = ShardGroup(transport, divisor)

    def _connect(self, group: _OwnGroup, named: Sequence[NamedParameter]) -> Transport:
        """Return a transport between the ranks of ``group``, which agree on its parameters. Collective over them."""
        exact_sums = self.options.precision.accumulate == "fp32"
        transport = connect(group.process_group, kind=self.options.transport, exact_sums=exact_sums)
        with agreed_or_closed(transport) as found:
            found.append(claims.of_parameters(named))
            found.append(Claim("the param group", "gradient_divisor", repr(group.divisor)))
        return transport

    def shard_group_of(self, named: NamedParameter) -> ShardGroup:
        """Return the ranks that split the state of a parameter, once they are connected."""
        return self._alone if self._is_elsewhere(named) else self._own.get(named.group_index, self._common)

    def _is_elsewhere(self, named: NamedParameter) -> bool:
        """Return whether other code stores the parameter (``fully_shard``)."""
        if self.options.gradient_sync != "external" or placement.mesh_of(named.parameter) is None:
            return False
        return is_stored_elsewhere(named.parameter, self._ranks_of(named))

    def _ranks_of(self, named: NamedParameter) -> frozenset[int]:
        one = self._requested.get(named.group_index)
        return ranks_of_transport(self.transport) if one is None or one.ranks is None else frozenset(one.ranks)

    def own_groups(self) -> list[tuple[Transport, slice]]:
        """Return the transports of param groups that have one of their own, each with indices of params."""
        if not self._own:
            return []
        return [
            (arena.transport, arena.indices)
            for arena in self.arenas
            if arena.transport is not self.transport and not arena.is_borrowed
        ]

    def of_transport(self, transport: Transport) -> tuple[list[ShardedParam], list[NamedParameter]]:
        """Return the params and the frozen parameters that all ranks of ``transport`` hold alike."""
        params = [param for param in self.params if param.arena.transport is transport]
        return params, [one for one in self.frozen if self.shard_group_of(one).transport is transport]

    def has_own_group(self, named: NamedParameter) -> bool:
        """Return whether other ranks of the optimizer's group may hold another parameter in this one's place."""
        one = self._requested.get(named.group_index)
        if one is None or one.ranks is None:
            return False
        return frozenset(one.ranks) != ranks_of_transport(self.transport)

    def add(self, named: Sequence[NamedParameter]) -> tuple[list[ShardedParam], list[FlatBucket]]:
        """Bind the trainable parameters to new flat storage, and broadcast rank 0's values of all parameters.

        Collective: all ranks must add the same parameters; see ``agreed``.

        Returns:
            The new ``params`` and the new ``buckets``.
        """
        self.connect_groups(named)
        trainable = [p for p in named if p.parameter.requires_grad]
        frozen = [p for p in named if not p.parameter.requires_grad]
        of_groups: dict[ShardGroup, list[NamedParameter]] = {}
        for one in trainable:
            of_groups.setdefault(self.shard_group_of(one), []).append(one)
        parts = self._parts | parts_of([p.parameter for p in named], self.transport)
        reserved = self._reserve(of_groups, parts)
        self._take_parts(parts)
        arenas: list[FlatArena] = []
        for group, members in of_groups.items():
            arenas += allocate(
                members,
                shard_group=group,
                copies=[_copies_of(p.parameter, parts) for p in members],
                is_borrowed=group is self._alone,
                precision=self.options.precision,
                has_average=self.options.ema_decay is not None,
                bucket_bytes=self._bucket_bytes(group, members),
                reserved=reserved.get(group, ()),
                first_index=len(self.params) + sum(len(arena.params) for arena in arenas),
            )
        params = [param for arena in arenas for param in arena.params]
        buckets = [bucket for arena in arenas for bucket in arena.buckets]
        for group in {**of_groups, **{self.shard_group_of(one): None for one in frozen}}:
            own = [bucket.parameters for bucket in buckets if bucket.arena.shard_group is group]
            own += [one.local for one in frozen if self.shard_group_of(one) is group]
            if group is not self._alone:
                self.broadcast(own, group.transport)
        with lent(arenas, written=False):
            for bucket in buckets:
                home = bucket.arena.reserved
                for exact in (bucket.shard.master, bucket.shard.average):
                    if exact is not None:
                        exact.copy_(bucket.shard.parameter)
                        if home is not None:
                            home.store.has_written(home, exact.nbytes)
        self.arenas += arenas
        self.params += params
        self.bindings.add(params)
        self.buckets += buckets
        added = {id(one.parameter) for one in trainable}
        self.frozen = [one for one in self.frozen if id(one.parameter) not in added] + frozen
        return params, buckets

    def _bucket_bytes(self, group: ShardGroup, members: Sequence[NamedParameter]) -> int:
        local = [named.local for named in members]
        devices, nbytes = {one.device.type for one in local}, sum(one.nbytes for one in local)
        return self.options.bucket_bytes(devices, nbytes, group.transport.world_size)

    def _reserve(
        self, of_groups: Mapping[ShardGroup, Sequence[NamedParameter]], parts: frozenset[int]
    ) -> dict[ShardGroup, list[Reserved]]:
        """Return room for the state of each arena that will be allocated, if it is offloaded. Collective then.

        Raises:
            OSError: there is no room on this rank.
            RuntimeError: there is none on another one.
        """
        if self.store is None:
            return {}
        reserved: dict[ShardGroup, list[Reserved]] = {}
        with agreed(self.transport.control):
            for group, members in of_groups.items():
                ranks = group.transport.world_size
                copies = [_copies_of(p.parameter, parts) for p in members]
                plan = plan_layout(members, copies, ranks, self._bucket_bytes(group, members))
                reserved[group] = []
                for arena in plan.arenas:
                    local = members[arena.parameters[0]].local
                    has_average = self.options.ema_decay is not None
                    format = self.options.precision.format(local.dtype, local.device, has_average=has_average)
                    reserved[group].append(self.store.reserve(format, arena.numel // ranks, local.device))
        return reserved

    def _take_parts(self, parts: frozenset[int]) -> None:
        """Take in that DTensors are now on ``parts``: parameters that were added before have copies on all of them."""
        before, self._parts = self._parts, parts
        for arena in self.arenas:
            arena.norm_weight *= max(1, len(before)) / max(1, len(self._parts))

    def take_unfrozen(self) -> list[NamedParameter]:
        """Return the ``frozen`` parameters that now have ``requires_grad=True``, checked on all ranks, for ``add``.

        Collective if there are any.
        """
        unfrozen = [p for p in self.frozen if p.parameter.requires_grad]
        if unfrozen:
            with agreed(self.transport.control) as found:
                self.check(unfrozen)
                found += self.claims([], unfrozen)
        return unfrozen

    def claims(
        self, groups: Sequence[Mapping[str, Any]], named: Sequence[NamedParameter], first_group: int = 0
    ) -> list[Claim | ManyClaims]:
        """Return what must be equal on all ranks of the optimizer; not the names of experts, which differ."""
        result: list[Claim | ManyClaims] = []
        if groups:
            result.append(Claim("the number of param groups", "", str(len(groups))))
        for index in range(first_group, first_group + len(groups)):
            one = self._requested.get(index)
            is_own = one is not None and one.ranks is not None
            result.append(Claim(f"param group {index}", "process_group", "one of its own" if is_own else "none"))
            if not is_own:  # else the ranks of each group agree on it
                divisor = None if one is None else one.divisor
                result.append(Claim(f"param group {index}", "gradient_divisor", repr(divisor)))
        different = {one.param_id for one in named if self.has_own_group(one)}
        elsewhere = {one.param_id for one in named if self._is_elsewhere(one)}
        result.append(claims.of_parameters(named, unnamed=different, elsewhere=elsewhere))
        return [*result, *claims.of_groups(groups, first_group=first_group)]

    def check(self, named: Sequence[NamedParameter]) -> None:
        """Raise ValueError or TypeError if ``named`` cannot be added. Local."""
        own = {one.group_index: self._ranks_of(one) for one in {p.group_index: p for p in named}.values()}
        arguments.check_parameters(named, self.options, self.transport, own, taken=self.taken())

    def taken(self) -> list[Tensor]:
        return [param.parameter for param in self.params]

    def find(self, parameter: Tensor) -> ShardedParam:
        """Return the ``ShardedParam`` of ``parameter``.

        Raises:
            ValueError: it is frozen, or not a parameter of this optimizer.
        """
        for param in self.params:
            if param.parameter is parameter:
                return param
        for named in self.frozen:
            if named.parameter is parameter:
                raise ValueError(
                    f"Parameter {named.name!r} is frozen, expected a trainable parameter: a frozen one has neither "
                    "gradient nor state in the optimizer. Set requires_grad on it first, on all ranks."
                )
        raise ValueError(
            "This tensor is not a trainable parameter of the optimizer. Pass one of its param_groups' params."
        )

    def outside(self, module: torch.nn.Module) -> dict[str, Tensor]:
        """Return the module's parameters that this optimizer does not have, by name."""
        mine = {id(named.parameter) for named in self.frozen} | self.by_id().keys()
        ranks = ranks_of_transport(self.transport)
        return {
            name: parameter
            for name, parameter in module.named_parameters()
            if id(parameter) not in mine and not is_stored_elsewhere(parameter, ranks)
        }

    def of_others(self, parameters: Tensor | Iterable[Tensor], *, may_be_mine: bool) -> list[Tensor]:
        """Return the trainable ones of ``parameters``, whose gradients this optimizer is to average. Local.

        Raises:
            ValueError: one of them is this optimizer's, unless it ``may_be_mine``; or not a parameter; or on a device
                that the transport does not serve.
        """
        mine = {} if may_be_mine else self.by_id()
        given = []
        for position, parameter in enumerate(listed(parameters)):
            what = f"average_gradients: tensor {position} of {tuple(parameter.shape)}"
            if id(parameter) in mine:
                raise ValueError(
                    f"average_gradients: found parameter {mine[id(parameter)].name!r} of this optimizer, expected "
                    "parameters that it does not have. Leave its own out: it averages their gradients itself."
                )
            if not parameter.is_leaf:
                raise ValueError(
                    f"{what} is computed from others, expected parameters, which have a gradient of their own."
                )
            if parameter.requires_grad:
                arguments.check_device(what, parameter, self.transport)
                given.append(parameter)
        return given

    def trainable(self, parameters: Tensor | Iterable[Tensor]) -> list[ShardedParam]:
        """Return the ``ShardedParam`` of each of the parameters that is trainable, each once.

        Raises:
            ValueError: one is not a parameter of this optimizer.
        """
        by_id, frozen = self.by_id(), {id(named.parameter) for named in self.frozen}
        found: dict[int, ShardedParam] = {}
        for position, parameter in enumerate(listed(parameters)):
            if id(parameter) in by_id:
                found[id(parameter)] = by_id[id(parameter)]
            elif id(parameter) not in frozen:
                raise ValueError(
                    f"Tensor {position} of {tuple(parameter.shape)} is not a parameter of the optimizer. Pass some of "
                    "its param_groups' params."
                )
        return list(found.values())

    def by_id(self) -> dict[int, ShardedParam]:
        """Return all params by the ``id`` of their parameter."""
        return {id(param.parameter): param for param in self.params}

    def release(self) -> None:
        """Free all storage now. Parameters, arenas and buckets refer to each other, and would otherwise live until the
        cyclic garbage collector runs.
        """
        for param in self.params:
            param.buckets.clear()
        for arena in self.arenas:
            arena.params.clear()
            arena.buckets.clear()
        if self.store is not None:
            self.store.close()

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor], transport: Transport | None = None) -> None:
        """Broadcast rank 0's values of ``tensors``, of any dtype and strides. Collective.

        Args:
            transport: None for the optimizer's.

        Raises:
            TypeError: a tensor is sparse, or of another layout that is not ``torch.strided``. Nothing has been sent.
            ValueError: the process group has no backend for the device of a tensor. Nothing has been sent.
        """
        transport = self.transport if transport is None else transport
        transfers = []
        tensors = list(tensors)
        for tensor in tensors:
            arguments.check_device(f"A tensor of shape {tuple(tensor.shape)}", tensor, transport)
            if tensor.layout != torch.strided:
                raise TypeError(
                    f"Found a tensor of layout {tensor.layout} and shape {tuple(tensor.shape)} to broadcast from rank "
                    "0, expected dense ones (torch.strided). Keep it out of the module's parameters and buffers, and "
                    "build it alike on every rank."
                )
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            whole = unrepeated(tensor.detach())
            dense = (whole if is_dense(whole) else whole.contiguous()).resolve_conj().resolve_neg()
            transfers.append((transport.broadcast(dense), whole, dense))
        for pending, whole, dense in transfers:
            pending.wait()
            if dense is not whole:
                whole.copy_(dense)
        for pending, _, _ in transfers:
            pending.await_release()


def _copies_of(parameter: Tensor, parts: frozenset[int]) -> int:
    """Return how many model-parallel ranks hold the elements of the parameter, or its shards in ``external``.

    Args:
        parts: the ranks that hold different parts of DTensors, with this one.
    """
    if placement.mesh_of(parameter) is None:
        return max(1, len(parts))
    held = len(parts & placement.mesh_ranks(parameter)) or 1
    return placement.copies_of(parameter) * max(1, len(parts)) // held
