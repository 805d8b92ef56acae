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
from shardadam.ranks import agreement
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
            bucket_bytes=self._options.bucket_bytes(p.parameter.device for p in trainable),
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
                arguments.check_parameters(unfrozen, self._options.precision, taken=self.taken())
                claims += arguments.claims([], unfrozen)
            self.frozen = [p for p in self.frozen if not p.parameter.requires_grad]
        return unfrozen

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
        """Broadcast rank 0's values of ``tensors``, of any dtype and strides. Collective."""
        transfers = []
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            whole = unrepeated(tensor.detach())
            dense = whole if is_dense(whole) else whole.contiguous()
            transfers.append((self._transport.broadcast(dense), whole, dense))
        for pending, whole, dense in transfers:
            pending.wait()
            if dense is not whole:
                whole.copy_(dense)
        for pending, _, _ in transfers:
            pending.await_release()
