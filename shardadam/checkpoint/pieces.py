# SPDX-License-Identifier: Apache-2.0
"""The pieces of a parameter that this rank owns, in which ``save`` and ``load`` read and write it. Local."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from shardadam.engine.storage import FlatArena, ShardedParam
from shardadam.engine.strides import memory_order
from shardadam.layout import ALIGNMENT_NUMEL, ITEM_BYTES, cut
from shardadam.state.local import SCALARS, local_state, spans_of
from shardadam.update import formats

PIECE_NUMEL = 4 * ITEM_BYTES
"""Pieces end at multiples of this. It bounds temporary memory where a format is converted or a GPU's memory copied."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start : stop`` of a local tensor, in memory order, which lie in this rank's shards.

    ``state_start``: where their state begins in the tensors of ``local_state``.
    """

    param: ShardedParam
    start: int
    stop: int
    state_start: int

    def parameter(self) -> Tensor:
        """Returns a view of the elements, 1-D."""
        local = self.param.local.detach()
        return memory_order(local, local)[self.start : self.stop]

    def state(self) -> dict[str, Tensor]:
        """Returns views of their state, 1-D: moments, their scales, master or remainder, and average."""
        begin, end = self.state_start, self.state_start + self.stop - self.start
        elements, blocks = slice(begin, end), slice(begin // ALIGNMENT_NUMEL, -(-end // ALIGNMENT_NUMEL))
        return {
            kind: tensor[blocks if kind in formats.SCALES else elements]
            for kind, tensor in local_state(self.param).items()
            if kind not in SCALARS
        }

    def read_state(self, kind: str) -> Tensor:
        """Returns one of them to be read only. Of state in files, it is a copy, and takes no other memory.

        Raises:
            OSError: it cannot be read.
        """
        arena = self.param.arena
        if arena.reserved is None:
            return self.state()[kind]
        start = self.param.state_start + self.state_start
        stop = start + self.stop - self.start
        elements = slice(start, stop)
        if kind in formats.SCALES:
            elements = slice(start // ALIGNMENT_NUMEL, -(-stop // ALIGNMENT_NUMEL))
        return arena.reserved.store.read(arena.reserved, kind, elements)

    def held_in(self, kind: str) -> FlatArena | None:
        """Returns the arena whose snapshot may copy what ``read_state`` returns, because only the optimizer writes it.

        None: it must be copied before the user goes on.
        """
        arena = self.param.arena
        is_held = kind in arena.flat_state and arena.reserved is None and arena.parameters.device.type == "cpu"
        return arena if is_held and not self.param.has_views else None

    def state_was_written(self) -> None:
        """Frees memory that writing to ``state`` has taken, if it is in files.

        Raises:
            OSError: it cannot be stored.
        """
        arena = self.param.arena
        if arena.reserved is not None:
            arena.reserved.store.has_written(arena.reserved, sum(tensor.nbytes for tensor in self.state().values()))


def pieces_of(param: ShardedParam) -> Iterator[Piece]:
    """Yields this rank's pieces in ascending order; each starts at a multiple of ``ALIGNMENT_NUMEL``."""
    state_start = 0
    for span in spans_of(param):
        for start, stop in cut(span.start, span.stop, PIECE_NUMEL):
            yield Piece(param, start, stop, state_start + start - span.start)
        state_start += span.numel
