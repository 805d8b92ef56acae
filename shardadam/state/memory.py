# SPDX-License-Identifier: Apache-2.0
"""The bytes that an optimizer holds on a rank, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from shardadam.engine.reduction import Reducer
from shardadam.engine.storage import FlatArena
from shardadam.update import formats


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that an optimizer holds on this rank, by kind.

    Args:
        parameters: the flat buffers that trainable parameters are views of, whole on every rank; none for parameters of
            ``fully_shard``, which are copied for the length of a step.
        gradients: the flat buffers that ``p.grad`` are views of, with ``gradient_sync="step"`` over shared memory. On
            one rank, the gradients that backward has made and the next step will use.
        gradient_shard: this rank's shard of the reduced gradients, in the dtype that ``Precision.gradients`` says.
            Where gradients are not reduced by this optimizer (one rank, ``gradient_sync="external"``), and over shared
            memory with ``gradient_sync="step"``, it is allocated when something first needs it: the norm over shared
            memory, a full gradient, clipping by value, a second backward in a step. With ``update="backward"``, the
            shards of two buckets, and those that wait for ``step``.
        staging: the current buffers for buckets of gradients that are being reduced. They grow while backward is ahead
            of the peers.
        moments: this rank's shard of exp_avg and exp_avg_sq, scales included.
        master: this rank's shard of the exact values behind low-precision parameters, or of their remainders. Until the
            next step, also a float32 copy of masters whose parameters were written from outside, or not loaded yet.
        average: this rank's shard of the averages of the weights (``ema_decay``).
        offload_buffers: through which offloaded state passes on its way to the update: that of two buckets.
        scalars: each parameter's step counter, bound on its update, and number of averages.
        tables: which parameter each block of 128 elements belongs to, each parameter's inputs for the kernels, and the
            sums of squares that they write.
        on_host: moments, masters and averages in pinned memory of the host (``HostOffload``), which do not count
            elsewhere.
        on_disk: the same in files (``DiskOffload``).
    """

    parameters: int
    gradients: int
    gradient_shard: int
    staging: int
    moments: int
    master: int
    average: int
    offload_buffers: int
    scalars: int
    tables: int
    on_host: int
    on_disk: int

    @property
    def state(self) -> int:
        """What torch.optim.AdamW keeps as state, and the averages, as far as it is in memory of the device."""
        return self.moments + self.master + self.average + self.scalars

    @property
    def total(self) -> int:
        """All of it that is in memory of the device: without ``on_host`` and ``on_disk``."""
        reduced = self.gradients + self.gradient_shard + self.staging
        return self.parameters + reduced + self.offload_buffers + self.state + self.tables


def held_by(arenas: Sequence[FlatArena], reducer: Reducer) -> Memory:
    """Returns the bytes that these arenas and this reducer hold now."""
    resident = [arena for arena in arenas if arena.reserved is None]
    reserved = [arena.reserved for arena in arenas if arena.reserved is not None]
    offloaded: Counter[str] = Counter()
    for one in reserved:
        offloaded[one.store.kind] += one.nbytes
    return Memory(
        parameters=sum(arena.parameters.nbytes for arena in arenas if not arena.is_borrowed),
        gradients=reducer.gradient_bytes(),
        gradient_shard=reducer.shard_bytes()
        + sum(0 if arena.gradient_shard is None else arena.gradient_shard.nbytes for arena in arenas),
        staging=reducer.staging_bytes(),
        moments=_nbytes(resident, (*formats.MOMENTS, *formats.SCALES)),
        master=_nbytes(resident, formats.MASTERS) + _kept_nbytes(arenas),
        average=_nbytes(resident, (formats.AVERAGE,)),
        offload_buffers=sum(store.buffer_bytes for store in {one.store for one in reserved}),
        scalars=sum(arena.counters.scalar_bytes for arena in arenas),
        tables=sum(
            arena.blocks.nbytes
            + sum(table.nbytes for table in (arena.positions, arena.squares) if table is not None)
            + arena.counters.table_bytes
            + arena.update.nbytes
            for arena in arenas
        ),
        on_host=offloaded["host"],
        on_disk=offloaded["disk"],
    )


def _nbytes(arenas: Sequence[FlatArena], names: Sequence[str]) -> int:
    states = [arena.flat_state for arena in arenas]  # read only, so that copies for a save can wait
    return sum(state[name].nbytes for state in states for name in names if name in state)


def _kept_nbytes(arenas: Sequence[FlatArena]) -> int:
    kept = (param.kept_master for arena in arenas for param in arena.params)
    return sum(master.nbytes for master in kept if master is not None)
