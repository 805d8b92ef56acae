# SPDX-License-Identifier: Apache-2.0
"""Ranks exchange short texts through the store they met by, without a collective and with a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch.distributed as dist

from shardadam.ranks import desync
from shardadam.ranks.agreement import name_ranks

_R = TypeVar("_R")


class StoreBarrier:
    """Where ranks exchange short texts without a collective, through the store that they met by at the beginning.

    A rank that does not come is named within a time limit, on all that came, and nothing is left behind that a later
    collective could be mixed up with. May be used in a thread beside training.

    Note: rounds of a store_barrier
        In a round every rank leaves a text; the round succeeds when all are there. The first rank whose patience ends
        closes it instead, by a verdict that names who is missing: it is written once (compare-and-set), so all ranks
        see the same one. A rank that comes late to a closed round goes on to the next that is open.

    Note: a store that does not answer
        Where the host that holds the store is cut off, a request to it never returns. Requests are made in a thread,
        which is given up then. They go by a connection of their own, as one that is given up stays taken.

    Args:
        store: None for one rank.
        rank: this rank's position among ``ranks``.
        ranks: what the ranks are called in messages.
    """

    def __init__(self, store: dist.distributed_c10d.Store | None, rank: int, ranks: Sequence[int]) -> None:
        self.rank = rank
        self.ranks = list(ranks)
        self._store = None if store is None else _Requests(store)
        self._round = 0

    def exchange(self, text: str, *, what: str, timeout_s: float, linger: bool = False) -> list[str]:
        """The texts of all ranks, in rank order. All ranks must call it.

        Args:
            what: what the ranks are there for, for the message.
            timeout_s: how long to wait, in seconds, for a rank that gives no sign of life.
            linger: rank 0, whose process may hold the store, returns only when the others have what they came for, or
                after 5 s: it may end after this.

        Raises:
            TimeoutError: names the ranks that did not come.
            RuntimeError: the store is gone.
        """
        store = self._store
        if store is None:
            return [text]
        try:
            return store.in_time(lambda: self._exchange_and_linger(store, text, what, timeout_s, linger))
        except dist.DistError as error:
            raise RuntimeError(
                f"{what}: the store through which ranks meet cannot be reached any more; the process that holds it "
                f"(rank 0, or torchrun's agent) has probably ended, or its host is cut off. ({error})"
            ) from error

    def _exchange_and_linger(self, store: _Requests, text: str, what: str, timeout_s: float, linger: bool) -> list[str]:
        texts = self._exchange(store, text, what, timeout_s)
        with suppress(dist.DistError):  # this rank has what it came for
            read = f"{self._round - 1}/read"
            store.add(read, 1)
            deadline = time.monotonic() + (5 if linger and self.rank == 0 else 0)
            while time.monotonic() < deadline and store.add(read, 0) < len(self.ranks):
                time.sleep(0.001)
        return texts

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Inside, this rank works on something that may take longer than others have patience; they are told."""
        store, done = self._store, threading.Event()
        if store is None:
            yield
            return

        def beat() -> None:
            while not done.wait(0.5):
                try:
                    store.add(f"beats/{self.rank}", 1)
                except dist.DistError:
                    return

        thread = threading.Thread(target=beat, name="shardadam.heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(_ANSWER_S)

    def _exchange(self, store: _Requests, text: str, what: str, timeout_s: float) -> list[str]:
        while store.check([self._key("verdict")]):  # closed without this rank
            self._round += 1
        everybody = [self._key(rank) for rank in range(len(self.ranks))]
        store.set(everybody[self.rank], "=" + text)
        verdict = self._await_verdict(store, everybody, timeout_s)
        this_round, self._round = self._round, self._round + 1
        if verdict != "complete":
            missing = [int(rank) for rank in verdict.split()]
            if self.rank in missing:  # the verdict came while this rank was coming
                return self._exchange(store, text, what, timeout_s)
            raise TimeoutError(
                f"{what}: {name_ranks([self.ranks[rank] for rank in missing])} did not come within {timeout_s:g} s. "
                "All ranks of the optimizer's process group must make this call; see what kept the missing ones."
            )
        extended = store.has_extended_api()
        texts = store.multi_get(everybody) if extended else [store.get(key) for key in everybody]
        if this_round > 0:  # whoever is in this round has read the one before
            store.delete_key(self._key(self.rank, this_round - 1))
            if self.rank == 0:
                store.delete_key(self._key("verdict", this_round - 1))
                store.delete_key(self._key("read", this_round - 1))
        return [bytes(text).decode()[1:] for text in texts]

    def _await_verdict(self, store: _Requests, everybody: Sequence[str], timeout_s: float) -> str:
        """``complete``, or the positions of the ranks that are missing."""
        verdict_key = self._key("verdict")
        beats: list[int] = []
        alive = looked = time.monotonic()
        pause = 0.001
        while not store.check([verdict_key]):
            if store.check(list(everybody)):
                return bytes(store.compare_set(verdict_key, "", "complete")).decode()
            now = time.monotonic()
            if now - looked >= min(1.0, timeout_s / 4):
                looked, before = now, beats
                missing = [rank for rank, key in enumerate(everybody) if not store.check([key])]
                beats = [store.add(f"beats/{rank}", 0) for rank in missing]
                if before and len(before) == len(beats) and before != beats:
                    alive = now
                if missing and now - alive >= timeout_s:
                    return bytes(store.compare_set(verdict_key, "", " ".join(map(str, missing)))).decode()
            time.sleep(pause)
            pause = min(0.05, pause * 1.5)
        return bytes(store.get(verdict_key)).decode()

    def _key(self, what: object, round: int | None = None) -> str:
        return f"{self._round if round is None else round}/{what}"


_ANSWER_S = 10.0


class _Requests:
    """A store, and whether it answers."""

    def __init__(self, store: dist.distributed_c10d.Store) -> None:
        self._everybodys = store
        self._own: Any = None
        self._asked_at: dict[int, float] = {}  # by thread, unless it has been answered

    def in_time(self, work: Callable[[], _R]) -> _R:
        """What ``work`` returns or raises.

        Raises:
            dist.DistStoreError: a request in it was not answered within 10 s.
        """
        results: list[_R] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="shardadam.store_barrier", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
            asked_at = self._asked_at.get(thread.ident or 0)
            if thread.is_alive() and asked_at is not None and time.monotonic() - asked_at > _ANSWER_S:
                self._own = None
                raise dist.DistStoreError(f"a request was not answered within {_ANSWER_S:g} s")
        if errors:
            raise errors[0]
        return results[0]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def request(*arguments: Any) -> Any:
            self._asked_at[threading.get_ident()] = time.monotonic()
            try:
                if self._own is None:
                    self._own = desync.clone_of(self._everybodys) or self._everybodys
                return getattr(self._own, name)(*arguments)
            finally:
                del self._asked_at[threading.get_ident()]

        return request
