# SPDX-License-Identifier: Apache-2.0
"""A client of torch's default store, through which the ranks have joined. Only this module uses the store directly.

All keys have a prefix. Requests use the client's own connection, and have a time limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

_R = TypeVar("_R")


def default_store(prefix: str) -> dist.distributed_c10d.Store:
    """Return torch's default store, with keys under ``shardadam/<prefix>``. torch.distributed must be initialised."""
    # torch has no public way to get it.
    store = dist.distributed_c10d._get_default_store()
    return dist.distributed_c10d.PrefixStore(f"shardadam/{prefix}", store)


class StoreClient:
    """Reads and writes short texts in a store. Threads may share a client.

    A request connects first if there is no connection, and raises ``dist.DistError`` if the store has ended. A request
    may block for ever: make it in a daemon thread, or in ``run_with_limit``.

    Note: a store that does not answer
        If the host of the store is cut off, a request never returns and its connection stays locked. So requests run in
        a thread that can be abandoned, on a connection that nothing else waits for. The next request opens a new
        connection.

    Args:
        store: is cloned if possible, and then not used itself.
        answer_s: how long ``run_with_limit`` waits for the answer to one request, in seconds.
        may_share_connection: use ``store`` itself if it cannot be cloned (torch's FakeStore, stores written in Python);
            otherwise requests raise ``dist.DistStoreError`` then.
    """

    def __init__(
        self, store: dist.distributed_c10d.Store, *, answer_s: float = 10.0, may_share_connection: bool = True
    ) -> None:
        self.answer_s = answer_s
        self._store = store
        self._may_share_connection = may_share_connection
        self._connection: Any = None
        self._asked_at: dict[int, float] = {}  # by thread, while its request is not answered

    def run_with_limit(self, work: Callable[[], _R]) -> _R:
        """Run ``work`` in a thread; return what it returns, or raise what it raises.

        Raises:
            dist.DistStoreError: one of its requests was not answered within ``answer_s``. The thread is abandoned.
        """
        results: list[_R] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="shardadam.store", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(min(0.5, self.answer_s / 10))
            asked_at = self._asked_at.get(thread.ident or 0)
            if thread.is_alive() and asked_at is not None and time.monotonic() - asked_at > self.answer_s:
                self._connection = None
                raise dist.DistStoreError(f"a request was not answered within {self.answer_s:g} s")
        if errors:
            raise errors[0]
        return results[0]

    def connect(self) -> None:
        """Connect now instead of at the first request.

        Raises:
            dist.DistStoreError: the store cannot be cloned, and its connection must not be shared.
        """
        self._connected()

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether all keys exist."""
        return bool(self._request("check", list(keys)))

    def get(self, key: str) -> str:
        return bytes(self._request("get", key)).decode()

    def get_all(self, keys: Sequence[str]) -> list[str]:
        """Return the values of ``keys``, which must exist; with one request if the store supports it."""
        if not self._request("has_extended_api"):
            return [self.get(key) for key in keys]
        return [bytes(value).decode() for value in self._request("multi_get", list(keys))]

    def set(self, key: str, value: str) -> None:
        self._request("set", key, value)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which starts at 0; return its new value."""
        return int(self._request("add", key, amount))

    def set_if_missing(self, key: str, value: str) -> str:
        """Set a key that does not exist; return its value, which is another rank's if that rank was first."""
        return bytes(self._request("compare_set", key, "", value)).decode()

    def delete(self, key: str) -> None:
        self._request("delete_key", key)

    def _request(self, name: str, *arguments: Any) -> Any:
        self._asked_at[threading.get_ident()] = time.monotonic()
        try:
            return getattr(self._connected(), name)(*arguments)
        finally:
            del self._asked_at[threading.get_ident()]

    def _connected(self) -> Any:
        connection = self._connection
        if connection is not None:
            return connection
        with suppress(AttributeError, RuntimeError):  # raised by stores that cannot be cloned
            connection = self._store.clone()  # type: ignore[attr-defined]
            connection.set_timeout(timedelta(seconds=self.answer_s))
        if connection is None:
            if not self._may_share_connection:
                raise dist.DistStoreError("the store cannot be cloned")
            connection = self._store
        self._connection = connection
        return connection
