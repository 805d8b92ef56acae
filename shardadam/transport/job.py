# SPDX-License-Identifier: Apache-2.0
"""All ranks that train one model: the data-parallel ranks of every part of it.

Data-parallel ranks hold the same part of the model, model-parallel ranks different parts of one copy. The job is the
product of both: rank (d, m) is in one data-parallel group, {(0, m), (1, m), ...}, and in one model-parallel group,
{(d, 0), (d, 1), ...}. A sum over the first, then over the second, is a sum over the job.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.ranks.agreement import exchange
from shardadam.ranks.store_barrier import StoreBarrier
from shardadam.transport.base import Transport


@dataclass(eq=False, slots=True)
class Job:
    """All ranks of the job; those of the data-parallel transport if there is no model parallelism.

    Args:
        control: group over all ranks for small Python objects; None for one rank.
        store_barrier: over all ranks.
        model_parallel: transport between the ranks that hold different parts of the model; None if there is one part.
    """

    control: dist.ProcessGroup | None
    store_barrier: StoreBarrier
    model_parallel: Transport | None = None

    @property
    def rank(self) -> int:
        return self.store_barrier.rank

    @property
    def world_size(self) -> int:
        return len(self.store_barrier.ranks)

    @property
    def is_parallel(self) -> bool:
        """Whether there are several parts of the model."""
        return self.model_parallel is not None

    def expect_progress(self, device: torch.device) -> None:
        """As ``Transport.expect_progress``, of transfers between the parts of the model. Local."""
        if self.model_parallel is not None:
            self.model_parallel.expect_progress(device)

    def sum_parts_(self, block: Tensor) -> None:
        """Sum ``block`` over the model-parallel ranks, in place. Collective over them."""
        if self.model_parallel is not None:
            self.model_parallel.all_reduce(block).wait()


def ranks_of_transport(transport: Transport) -> frozenset[int]:
    """Return the ranks of the default group that ``transport`` connects."""
    if transport.control is None:
        is_initialized = dist.is_available() and dist.is_initialized()
        return frozenset([dist.get_rank() if is_initialized else 0])
    return frozenset(transport.store_barrier.ranks)


def ranks_of_job(transport: Transport, model_parallel: Transport) -> list[int]:
    """Return the ranks of the job, ascending. Collective over both groups.

    Raises:
        ValueError: they are no grid.
    """
    row = list(model_parallel.store_barrier.ranks)
    column = sorted(ranks_of_transport(transport))
    assert model_parallel.control is not None
    columns: list[list[int]] = exchange(column, model_parallel.control)
    rows: list[list[int]] = [row] if transport.control is None else exchange(row, transport.control)
    ranks = sorted({rank for one in columns for rank in one})
    if any(sorted(rank for one in lines for rank in one) != ranks for lines in (rows, columns)):
        raise ValueError(
            f"model_parallel_group: found the model-parallel groups {rows} over the data-parallel groups {columns}, "
            "expected a grid of ranks: each rank of a data-parallel group in a model-parallel group of its own, which "
            "has one rank of every data-parallel group. Take both from one DeviceMesh."
        )
    return ranks
