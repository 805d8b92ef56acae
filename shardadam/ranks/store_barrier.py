# SPDX-License-Identifier: Apache-2.0
"""A barrier through the store: ranks exchange short texts without a collective, and within a time limit."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch.distributed as dist

from shardadam.ranks import desync
from shardadam.ranks.agreement import name_ranks
from shardadam.ranks.store import StoreClient

_LINGER_S = 5.0
_HEARTBEAT_S = 0.5
_FIRST_LOG_S = 10.0
_LOG_S = 30.0  # between later ones
_log = logging.getLogger("shardadam")


class StoreBarrier:
    """Exchanges short texts among ranks through the store; names the ranks that do not arrive in time, on all others.

    A call that failed cannot be confused with a later one. May be used in a thread beside training.

    Note: rounds of the barrier
        In each round, every rank writes a text; the round is complete when all texts are there. If a rank waits past
        its limit, it closes the round with a verdict that names the missing ranks. The verdict is written once
        (compare-and-set), so all ranks read the same one. A rank that arrives at a closed round goes on to the next
        open one.

    Args:
        store: None for one rank.
        rank: this rank's position in ``ranks``.
        ranks: the global ranks, for messages.
    """

    def __init__(self, store: StoreClient | None, rank: int, ranks: Sequence[int]) -> None:
        self.rank = rank
        self.ranks = list(ranks)
        self._store = store
        self._round = 0

    def exchange(self, text: str, *, what: str, timeout_s: float, linger: bool = False) -> list[str]:
        """Return the texts of all ranks, in rank order. All ranks must call it.

        Args:
            what: what the ranks are doing; begins every message.
            timeout_s: how long to wait for a rank that shows no heartbeat, in seconds.
            linger: rank 0, whose process may host the store, returns only after the others have read the texts, or
                after 5 s. Pass True if the process may end after this call.

        Raises:
            TimeoutError: names the ranks that did not arrive.
            RuntimeError: the store cannot be reached.
        """
        store = self._store
        if store is None:
            return [text]
        try:
            return store.run_with_limit(lambda: self._exchange_and_linger(store, text, what, timeout_s, linger))
        except dist.DistError as error:
            raise RuntimeError(
                f"{what}: cannot reach the store of the process group. The process that hosts it (rank 0, or "
                f"torchrun's agent) has probably ended, or its host is cut off. ({error})"
            ) from error

    def _exchange_and_linger(
        self, store: StoreClient, text: str, what: str, timeout_s: float, linger: bool
    ) -> list[str]:
        texts = self._exchange(store, text, what, timeout_s)
        with suppress(dist.DistError):  # this rank has its texts already
            read = self._key("read", self._round - 1)
            store.add(read, 1)
            deadline = time.monotonic() + (_LINGER_S if linger and self.rank == 0 else 0)
            while time.monotonic() < deadline and store.add(read, 0) < len(self.ranks):
                time.sleep(0.001)
        return texts

    @contextmanager
    def heartbeat(self, status: Callable[[], str | None] = lambda: "busy") -> Iterator[None]:
        """Context manager: make the other ranks wait for this one, past their time limits, while the block advances.

        Args:
            status: returns what the block is doing, for messages on other ranks; None if it does not advance.
        """
        store, done = self._store, threading.Event()
        if store is None:
            yield
            return

        def beat() -> None:
            is_told = False
            with suppress(dist.DistError):
                while not done.wait(_HEARTBEAT_S):
                    doing = status()
                    if doing is not None:
                        store.set(f"doing/{self.rank}", doing)
                        store.add(f"beats/{self.rank}", 1)
                        is_told = True
                if is_told:
                    store.delete(f"doing/{self.rank}")

        thread = threading.Thread(target=beat, name="shardadam.heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(store.answer_s)

    def _exchange(self, store: StoreClient, text: str, what: str, timeout_s: float) -> list[str]:
        while store.check([self._key("verdict")]):  # closed without this rank
            self._round += 1
        keys = [self._key(rank) for rank in range(len(self.ranks))]
        store.set(keys[self.rank], "=" + text)
        verdict = self._wait_for_verdict(store, keys, what, timeout_s)
        this_round, self._round = self._round, self._round + 1
        if verdict != "complete":
            missing = [int(rank) for rank in verdict.split()]
            if self.rank in missing:  # another rank closed the round while this one wrote its text
                return self._exchange(store, text, what, timeout_s)
            raise TimeoutError(
                f"{what}: {name_ranks([self.ranks[rank] for rank in missing])} did not arrive within {timeout_s:g} s"
                f"{self._doing(store, missing)}. All ranks of the optimizer's process group must make this call; check "
                "the logs of the missing ranks."
            )
        texts = store.get_all(keys)
        if this_round > 0:  # all ranks in this round have read the one before
            store.delete(self._key(self.rank, this_round - 1))
            if self.rank == 0:
                store.delete(self._key("verdict", this_round - 1))
                store.delete(self._key("read", this_round - 1))
        return [text[1:] for text in texts]

    def _wait_for_verdict(self, store: StoreClient, keys: Sequence[str], what: str, timeout_s: float) -> str:
        """Return ``complete``, or the positions of the missing ranks."""
        verdict_key = self._key("verdict")
        beats: list[int] = []
        start = alive_at = checked_at = time.monotonic()
        log_at = start + min(_FIRST_LOG_S, timeout_s / 2)
        pause = 0.001
        while not store.check([verdict_key]):
            if store.check(keys):
                return store.set_if_missing(verdict_key, "complete")
            now = time.monotonic()
            if now - checked_at >= min(1.0, timeout_s / 4):
                checked_at, before = now, beats
                missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
                beats = [store.add(f"beats/{rank}", 0) for rank in missing]
                if before and len(before) == len(beats) and before != beats:
                    alive_at = now
                if missing and now >= log_at:
                    log_at = now + min(_LOG_S, timeout_s / 2)
                    if self.rank == min(set(range(len(keys))) - set(missing)):  # one of those that wait
                        names = name_ranks([self.ranks[rank] for rank in missing])
                        doing = self._doing(store, missing)
                        status = "" if doing else desync.known_status(self.ranks)
                        _log.warning("%s: waiting for %s, for %.0f s%s.%s", what, names, now - start, doing, status)
                if missing and now - alive_at >= timeout_s:
                    return store.set_if_missing(verdict_key, " ".join(map(str, missing)))
            time.sleep(pause)
            pause = min(0.05, pause * 1.5)
        return store.get(verdict_key)

    def _doing(self, store: StoreClient, missing: Sequence[int]) -> str:
        """Return what missing ranks are doing, as far as they tell, to be appended to a message."""
        texts = []
        for rank in missing[:3]:
            with suppress(dist.DistError):
                if store.check([f"doing/{rank}"]):
                    texts.append(f"rank {self.ranks[rank]}: {store.get(f'doing/{rank}')}")
        return f" ({'; '.join(texts)})" if texts else ""

    def _key(self, what: object, round: int | None = None) -> str:
        return f"{self._round if round is None else round}/{what}"
