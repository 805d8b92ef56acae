# SPDX-License-Identifier: Apache-2.0
"""Adds parameters: names them, checks that they are the same on all ranks, binds trainable ones to flat storage and
broadcasts rank 0's values.

Knows nothing about gradients: ``engine/step.py`` passes new parameters to the reducer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.checks import arguments
from shardadam.checks.arguments import Options
from shardadam.engine.storage import (
    FlatArena,
    FlatBucket,
    NamedParameter,
    ShardedParam,
    allocate,
    is_dense,
    unrepeated,
)
from shardadam.ranks import agreement, desync
from shardadam.ranks.agreement import Claim
from shardadam.transport import Transport


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
def agreed(control: dist.ProcessGroup | None) -> Iterator[list[Claim]]:
    """Context manager: raise on all ranks if the block raises on any rank, or if ranks append different claims.

    Collective: all ranks of ``control`` must enter it.

    Args:
        control: None for one rank.
    """
    claims: list[Claim] = []
    try:
        yield claims
    except Exception as error:
        agreement.announce_failure(error, control)
        raise
    agreement.require(claims, control)


@contextmanager
def agreed_or_closed(transport: Transport) -> Iterator[list[Claim]]:
    """Context manager: ``agreed`` between the ranks of a new transport, which is closed if it raises. Collective."""
    try:
        with agreed(transport.control) as claims:
            yield claims
    except Exception:
        transport.close(clean=True)
        raise
    except BaseException:
        transport.abort()
        raise


@contextmanager
def built_or_aborted(transport: Transport) -> Iterator[None]:
    """Context manager: if the block raises, tell the other ranks why, and abort the new transport. Local."""
    try:
        with desync.announcing_failure("could not build its optimizer"):
            yield
    except BaseException:
        transport.abort()
        raise


class ShardedParameters:
    """All parameters of one optimizer.

    Attributes:
        params: the trainable ones, by ``ShardedParam.index``.
        arenas, buckets: their flat storage.
        frozen: the parameters with ``requires_grad=False``, which are only broadcast.
    """

    def __init__(self, transport: Transport, options: Options) -> None:
        self.params: list[ShardedParam] = []
        self.arenas: list[FlatArena] = []
        self.buckets: list[FlatBucket] = []
        self.frozen: list[NamedParameter] = []
        self._transport = transport
        self._options = options

    def add(self, named: Sequence[NamedParameter]) -> tuple[list[ShardedParam], list[FlatBucket]]:
        """Bind the trainable parameters to new flat storage, and broadcast rank 0's values of all parameters.

        Collective: all ranks must add the same parameters; see ``agreed``.

        Returns:
            The new ``params`` and the new ``buckets``.
        """
        trainable = [p for p in named if p.parameter.requires_grad]
        frozen = [p for p in named if not p.parameter.requires_grad]
        arenas = allocate(
            trainable,
            transport=self._transport,
            precision=self._options.precision,
            bucket_bytes=self._options.bucket_bytes(
                {p.parameter.device.type for p in trainable},
                sum(p.parameter.nbytes for p in trainable),
                self._transport.world_size,
            ),
            first_index=len(self.params),
        )
        params = [param for arena in arenas for param in arena.params]
        buckets = [bucket for arena in arenas for bucket in arena.buckets]
        self.broadcast([*(bucket.parameters for bucket in buckets), *(p.parameter for p in frozen)])
        for bucket in buckets:
            if bucket.shard.master is not None:
                bucket.shard.master.copy_(bucket.shard.parameter)
        self.arenas += arenas
        self.params += params
        self.buckets += buckets
        self.frozen += frozen
        return params, buckets

    def take_unfrozen(self) -> list[NamedParameter]:
        """Remove and return the ``frozen`` parameters that now have ``requires_grad=True``, checked on all ranks.

        Collective if there are any.
        """
        unfrozen = [p for p in self.frozen if p.parameter.requires_grad]
        if unfrozen:
            with agreed(self._transport.control) as claims:
                self.check(unfrozen)
                claims += arguments.claims([], unfrozen)
            self.frozen = [p for p in self.frozen if not p.parameter.requires_grad]
        return unfrozen

    def check(self, named: Sequence[NamedParameter]) -> None:
        """Raise ValueError or TypeError if ``named`` cannot be added. Local."""
        arguments.check_parameters(named, self._options.precision, self._transport, taken=self.taken())

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
        return {name: parameter for name, parameter in module.named_parameters() if id(parameter) not in mine}

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

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast rank 0's values of ``tensors``, of any dtype and strides. Collective.

        Raises:
            TypeError: a tensor is sparse, or of another layout that is not ``torch.strided``. Nothing has been sent.
            ValueError: the process group has no backend for the device of a tensor. Nothing has been sent.
        """
        transfers = []
        tensors = list(tensors)
        for tensor in tensors:
            arguments.check_device(f"A tensor of shape {tuple(tensor.shape)}", tensor, self._transport)
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
            transfers.append((self._transport.broadcast(dense), whole, dense))
        for pending, whole, dense in transfers:
            pending.wait()
            if dense is not whole:
                whole.copy_(dense)
        for pending, _, _ in transfers:
            pending.await_release()
