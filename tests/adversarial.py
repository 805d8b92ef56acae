# SPDX-License-Identifier: Apache-2.0
"""A transport on the CPU that turns a missing wait or an early reuse of a buffer into NaN, every time.

A transfer runs only when it is waited for. Until then its results (the shard of a reduce-scatter, the other ranks'
slices in an all-gather) are NaN. A staging buffer becomes NaN when its transfer is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from shardadam.transport import Pending, ReduceScatter, Staging, Transport
from shardadam.transport.base import own_slice


class AdversarialTransport(Transport):
    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.rank, self.world_size, self.replicas = inner.rank, inner.world_size, inner.replicas
        self.control = inner.control
        self.store_barrier = inner.store_barrier
        self._late: list[_Late] = []
        self._shards: dict[int, Tensor] = {}  # by address: a shard's contents after the transfers that have run

    def allocate_staging(self, *arguments: object) -> Staging:
        staging = self._inner.allocate_staging(*arguments)  # type: ignore[arg-type]
        staging.send.fill_(math.nan)
        return staging

    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        shard = request.shard
        address = shard.data_ptr()
        self._shards.setdefault(address, shard.clone())
        shard.fill_(math.nan)

        def run() -> Pending:
            shard.copy_(self._shards.pop(address))
            inner = self._inner.reduce_scatter(request)
            inner.wait()
            if any(late.address == address for late in self._late):
                self._shards[address] = shard.clone()
                shard.fill_(math.nan)
            return inner

        transfer = self._add(run)
        transfer.address = address
        transfer.sent = request.staging.send
        return transfer

    def all_gather(self, flat: Tensor) -> Pending:
        own = own_slice(flat, self.rank, self.world_size)
        kept = own.clone()
        flat.fill_(math.nan)
        own.copy_(kept)
        return self._add(lambda: _waited(self._inner.all_gather(flat)))

    def all_reduce(self, block: Tensor) -> Pending:
        kept = block.clone()
        block.fill_(math.nan)

        def run() -> Pending:
            block.copy_(kept)
            return _waited(self._inner.all_reduce(block))

        return self._add(run)

    def broadcast(self, tensor: Tensor) -> Pending:
        return self._add(lambda: _waited(self._inner.broadcast(tensor)))

    def free_staging(self, staging: Staging) -> None:
        self._inner.free_staging(staging)

    def allocate_gradients(self, *arguments: object) -> Tensor | None:
        return self._inner.allocate_gradients(*arguments)  # type: ignore[arg-type]

    def sources(self, flat: Tensor) -> list[Tensor]:
        return self._inner.sources(flat)

    def fence(self) -> None:
        self._run_all()
        self._inner.fence()

    def close(self, *, clean: bool) -> None:
        self._inner.close(clean=clean)

    def _add(self, run: Callable[[], Pending]) -> _Late:
        late = _Late(self, run)
        self._late.append(late)
        return late

    def run_until(self, last: _Late) -> None:
        """Run transfers in the order of their start, which is the same on all ranks, up to ``last``."""
        while not last.is_run:
            late = self._late.pop(0)
            late.inner = late.run()
            late.is_run = True

    def _run_all(self) -> None:
        if self._late:
            self.run_until(self._late[-1])


def _waited(pending: Pending) -> Pending:
    pending.wait()
    return pending


class _Late(Pending):
    def __init__(self, transport: AdversarialTransport, run: Callable[[], Pending]) -> None:
        self._transport = transport
        self.run = run
        self.is_run = False
        self.inner: Pending | None = None
        self.address: int | None = None
        self.sent: Tensor | None = None

    def done(self) -> bool:
        return self.is_run

    def wait(self) -> None:
        self._transport.run_until(self)

    def is_released(self) -> bool:
        assert self.inner is not None
        if not self.inner.is_released():
            return False
        if self.sent is not None:
            self.sent.fill_(math.nan)
        return True

    def await_release(self) -> None:
        assert self.inner is not None
        self.inner.await_release()
        assert self.is_released()
