# SPDX-License-Identifier: Apache-2.0
"""The bytes that an optimizer holds on a rank, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from shardadam.engine.reduction import Reducer
from shardadam.engine.storage import FlatArena
from shardadam.precision import Format
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
        adamw: what torch.optim.AdamW would hold as state for the same parameters, on every rank: exp_avg and exp_avg_sq
            in the dtype of the parameter, and its step. Where this optimizer keeps masters, AdamW is one over float32
            copies of the parameters: these copies count, and its moments are float32.

    ``print(optimizer.memory())`` prints the bytes of each kind, their total, and the state beside AdamW's.
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
    adamw: int

    @property
    def state(self) -> int:
        """What torch.optim.AdamW keeps as state, and the averages, as far as it is in memory of the device."""
        return self.moments + self.master + self.average + self.scalars

    @property
    def total(self) -> int:
        """All of it that is in memory of the device: without ``on_host`` and ``on_disk``."""
        reduced = self.gradients + self.gradient_shard + self.staging
        return self.parameters + reduced + self.offload_buffers + self.state + self.tables

    @property
    def saved(self) -> int:
        """How much less memory of the device the state takes than AdamW's, buffers for offloaded state included."""
        return self.adamw - (self.moments + self.master + self.scalars + self.offload_buffers)

    def __str__(self) -> str:
        """Return a table of the kinds that are not 0, in bytes, and what the state saves, without averages."""
        elsewhere = ("on_host", "on_disk")
        rows = {name: value for name, value in asdict(self).items() if value and name not in (*elsewhere, "adamw")}
        rows |= {"total": self.total}
        rows |= {name: value for name in elsewhere if (value := getattr(self, name))}
        names = {name: name.replace("_", " ") for name in rows}
        rows = {names[name]: value for name, value in rows.items()}
        held = self.adamw - self.saved
        rows |= {"state and its buffers": held, "AdamW's state": self.adamw, "state saved": self.saved}
        left, right = max(map(len, rows)), max(len(f"{value:,}") for value in rows.values())
        lines = [f"{name:{left}}  {value:>{right},}" for name, value in rows.items()]
        if self.adamw:
            lines[-1] += f"  ({self.saved / self.adamw:.1%})"
        return "\n".join(["bytes on this rank", *lines])


def adamw_bytes(format: Format, numel: int, parameter_count: int) -> int:
    """Return ``Memory.adamw`` for parameters of one format, ``numel`` elements together."""
    moment = format.exact_dtype if format.master in ("split", "fp32") else format.dtype
    copies = format.exact_dtype.itemsize if format.master in ("split", "fp32") else 0
    return numel * (2 * moment.itemsize + copies) + parameter_count * torch.float32.itemsize


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
        adamw=sum(
            adamw_bytes(arena.format, sum(param.shape.numel() for param in arena.params), len(arena.params))
            for arena in arenas
        ),
    )


def _nbytes(arenas: Sequence[FlatArena], names: Sequence[str]) -> int:
    states = [arena.flat_state for arena in arenas]  # read only, so that copies for a save can wait
    return sum(state[name].nbytes for state in states for name in names if name in state)


def _kept_nbytes(arenas: Sequence[FlatArena]) -> int:
    kept = (param.kept_master for arena in arenas for param in arena.params)
    return sum(master.nbytes for master in kept if master is not None)
