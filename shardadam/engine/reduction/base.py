# SPDX-License-Identifier: Apache-2.0
"""What all ways to bring gradients to their shards share: their surface, who may take a parameter's gradients, and what
a gradient must be.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from shardadam.engine.grad_stats import GradStats
from shardadam.engine.storage import FlatBucket, ShardedParam
from shardadam.update import Sources

_reducers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Who brings a parameter's gradients to its optimizer: the newest. An older one may live on in a scheduler or a
traceback, and would take them first.
"""


def take_over(params: list[ShardedParam], reducer: Reducer) -> None:
    for param in params:
        older = _reducers.get(param.parameter)  # type: ignore[no-untyped-call]
        if older is not None and (superseded := older()) is not None:
            superseded.is_superseded = True
        _reducers[param.parameter] = weakref.ref(reducer)


def reducer_of(parameter: Tensor) -> Reducer | None:
    """The one that brings its gradients to an optimizer, if that is alive."""
    newest = _reducers.get(parameter)  # type: ignore[no-untyped-call]
    return None if newest is None else newest()


class Reducer(ABC):
    """Brings the gradients of ``p.grad`` into the gradient shards of all buckets, as means over ranks.

    ``used[index]`` says whether this rank has had a gradient for a parameter since ``reset``; ``rounds`` counts;
    ``order`` is that in which buckets are launched, as their indices; ``local_error`` is what this rank has found wrong
    with its gradients when it last closed, to be raised where all ranks know of it.
    """

    def __init__(self) -> None:
        self.used: list[bool] = []
        self.rounds = 0
        self.is_superseded = False
        self.order: list[int] = []
        self.local_error: str | None = None
        self._params: list[ShardedParam] = []
        self._buckets: list[FlatBucket] = []

    def add(self, params: list[ShardedParam], buckets: list[FlatBucket]) -> None:
        """Takes new parameters in. Between rounds only. Collective."""
        take_over(params, self)
        self._params += params
        for index, bucket in enumerate(buckets, len(self._buckets)):
            bucket.index = index
            self.order.append(index)
        self._buckets += buckets
        self.used += [False] * len(params)

    def remove_hooks(self) -> None:
        return None

    def why_not_to_clip(self, parameter: Tensor) -> str | None:
        """Why its ``p.grad`` is not what the norm must be clipped of; None if it is."""
        return None

    @property
    def is_idle(self) -> bool:
        """Whether every transfer that was started has been completed."""
        return True

    @abstractmethod
    def close(self) -> None:
        """Launches what has not been launched since ``reset``, zeros for gradients that are absent.

        Collective: the ranks that have seen no gradient at all take part with zeros.
        """

    def close_open_round(self) -> None:
        """Launches what is left of a round that is open. Does nothing between rounds."""
        return None

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, gradients gather in ``p.grad``; the next round takes them."""
        return nullcontext()

    def catch_up(self, count: int) -> None:
        """Runs rounds of zeros until there have been ``count`` since ``reset``, as on the ranks that have run most."""
        return None

    @property
    def rounds_since_reset(self) -> int:
        """How many rounds this rank has run or opened since ``reset``."""
        return 0

    def wait_all(self) -> None:
        """Waits for all transfers."""
        return None

    def sum_up(self) -> None:
        """Waits for all transfers: the gradient shards hold the means. Collective."""
        self.wait_all()

    def sources(self, bucket: FlatBucket) -> Sources | None:
        """What the mean of the bucket's shard is made of, where it has not been summed up; else None."""
        return None

    def await_readers(self) -> None:
        """Waits until no other rank reads ``p.grad`` any more. Collective."""
        return None

    def grad_stats(self, *, with_squares: bool) -> list[GradStats]:
        """What is known of the settled gradients of this rank's shards, and, where they have not been summed up, of its
        gradients. Collective.
        """
        self.sum_up()
        grad_stats = []
        for bucket in self._buckets:
            grad_stats.append(GradStats(with_squares=with_squares))
            grad_stats[-1].update(bucket.shard.gradient)
        return grad_stats

    def learn_order(self) -> None:
        """Makes the order in which rank 0's last backward completed the buckets the launch order of all ranks.

        Collective.
        """
        return None

    @abstractmethod
    def reset(self) -> None:
        """Forgets the reduced gradients. Waits for what is under way."""

    def gradient_bytes(self) -> int:
        """Of what ``p.grad`` lies in."""
        return 0

    def staging_bytes(self) -> int:
        return 0


Snapshot = tuple[Tensor | None, int]


def snapshot(params: list[ShardedParam]) -> list[Snapshot]:
    """The gradients in ``p.grad``, such that ``is_current`` can tell whether they have been written since."""
    return [(g, -1 if g is None else g._version) for g in (param.parameter.grad for param in params)]


def is_current(taken: list[Snapshot], params: list[ShardedParam]) -> bool:
    if len(taken) != len(params):
        return False
    now = snapshot(params)
    return all(
        g is before and version == version_before
        for (g, version), (before, version_before) in zip(now, taken, strict=True)
    )


def check_gradient(param: ShardedParam) -> None:
    gradient = param.parameter.grad
    if gradient is None:
        return
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"Parameter {param.name!r} has a sparse gradient ({gradient.layout}), expected a dense one. Build the "
            "embedding with sparse=False, or keep the parameter in an optimizer of its own (torch.optim.SparseAdam)."
        )
    if gradient.shape != param.shape:
        raise RuntimeError(
            f"Parameter {param.name!r} has a gradient of shape {tuple(gradient.shape)}, expected "
            f"{tuple(param.shape)} as when the optimizer was built. Build it anew after changing a shape."
        )
