# SPDX-License-Identifier: Apache-2.0
"""A transport that makes missing waits and early reuses visible, on the CPU and every time.

A transfer runs only when it is waited for. What must not be read before that (the shard of a reduce-scatter, the slices
of others in an all-gather) is NaN until then, and so is a staging buffer once its transfer is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from shardadam.transport import Pending, Staging, Transport, Visit
from shardadam.transport.base import own_slice


class AdversarialTransport(Transport):
    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.rank, self.world_size, self.control = inner.rank, inner.world_size, inner.control
        self.meeting = inner.meeting
        self._late: list[_Late] = []
        self._shards: dict[int, Tensor] = {}  # by address: what a shard holds, or will hold once transfers have run

    def staging(self, *arguments: object) -> Staging:
        staging = self._inner.staging(*arguments)  # type: ignore[arg-type]
        staging.send.fill_(math.nan)
        return staging

    def reduce_scatter(
        self,
        staging: Staging,
        numel: int,
        shard: Tensor,
        *,
        scale: float,
        accumulate: bool,
        visit: Visit | None = None,
    ) -> Pending:
        address = shard.data_ptr()
        self._shards.setdefault(address, shard.clone())
        shard.fill_(math.nan)

        def run() -> None:
            shard.copy_(self._shards.pop(address))
            self._inner.reduce_scatter(staging, numel, shard, scale=scale, accumulate=accumulate, visit=visit).wait()
            staging.send.fill_(math.nan)
            if any(late.address == address for late in self._late):
                self._shards[address] = shard.clone()
                shard.fill_(math.nan)

        transfer = self._add(run)
        transfer.address = address
        return transfer

    def all_gather(self, flat: Tensor) -> Pending:
        own = own_slice(flat, self.rank, self.world_size)
        kept = own.clone()
        flat.fill_(math.nan)
        own.copy_(kept)
        return self._add(lambda: self._inner.all_gather(flat).wait())

    def all_reduce(self, block: Tensor) -> Pending:
        kept = block.clone()
        block.fill_(math.nan)

        def run() -> None:
            block.copy_(kept)
            self._inner.all_reduce(block).wait()

        return self._add(run)

    def broadcast(self, tensor: Tensor) -> Pending:
        return self._add(lambda: self._inner.broadcast(tensor).wait())

    def close(self, *, clean: bool) -> None:
        self._inner.close(clean=clean)

    def _add(self, run: Callable[[], None]) -> _Late:
        late = _Late(self, run)
        self._late.append(late)
        return late

    def run_until(self, last: _Late) -> None:
        """All ranks must run transfers in one order, whatever order they wait in."""
        while not last.is_run:
            late = self._late.pop(0)
            late.run()
            late.is_run = True


class _Late(Pending):
    def __init__(self, transport: AdversarialTransport, run: Callable[[], None]) -> None:
        self._transport = transport
        self.run = run
        self.is_run = False
        self.address: int | None = None

    def done(self) -> bool:
        return self.is_run

    def wait(self) -> None:
        self._transport.run_until(self)
