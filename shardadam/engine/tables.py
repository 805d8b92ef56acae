# SPDX-License-Identifier: Apache-2.0
"""Counters of parameters, and the tables that the update's kernels read, beside the flat storage of an arena.

Also tells the planner how long they are. Knows nothing of other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from shardadam import layout
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.precision import Format
from shardadam.sums.reference import program_count
from shardadam.update import Counters, uses_kernels


def allocate_counters(
    param_ids: Sequence[int],
    offsets: Sequence[int],
    numels: Sequence[int],
    device: torch.device,
    *,
    has_average: bool,
) -> Counters:
    """Return counters at zero for parameters of ``numels`` elements at ``offsets`` in their arena, in elements."""
    return Counters(
        steps=torch.zeros(len(param_ids), dtype=torch.float32, device=device),
        bounds=torch.zeros(len(param_ids), dtype=torch.float64, device=device),
        param_ids=torch.tensor(param_ids, device=device),
        first_blocks=torch.tensor([offset // ALIGNMENT_NUMEL for offset in offsets], device=device),
        numels=torch.tensor(numels, dtype=torch.int64, device=device),
        n_averaged=torch.zeros(len(param_ids), dtype=torch.int64, device=device) if has_average else None,
    )


def block_table(numel: int, parameter_count: int, format: Format, device: torch.device) -> tuple[int, torch.dtype]:
    """Return length and dtype of ``Shard.blocks`` for ``numel`` elements of a rank; length 0 if it is not needed."""
    is_needed = format.is_random or uses_kernels(format, device)
    return numel // ALIGNMENT_NUMEL if is_needed else 0, torch.int16 if parameter_count < 2**15 else torch.int32


def kernel_tables(plans: Sequence[layout.Bucket], format: Format, device: torch.device) -> tuple[int, int]:
    """Return the lengths of ``FlatArena.squares`` and ``positions`` for an arena of these buckets; 0: not needed."""
    if not uses_kernels(format, device):
        return 0, 0
    block_count = sum(plan.shard_numel for plan in plans) // ALIGNMENT_NUMEL
    return sum(program_count(plan.shard_numel) for plan in plans), block_count if plans[0].world_size > 1 else 0


def table_bytes(plans: Sequence[layout.Bucket], parameter_count: int, format: Format, device: torch.device) -> int:
    """Return the bytes of these tables for an arena of these buckets, without its counters."""
    numel = sum(plan.shard_numel for plan in plans)
    block_count, block_dtype = block_table(numel, parameter_count, format, device)
    squares, positions = kernel_tables(plans, format, device)
    blocks = block_count * block_dtype.itemsize
    return blocks + squares * torch.float64.itemsize + positions * torch.int32.itemsize


def fill_blocks(blocks: Tensor, segments: Sequence[layout.Segment]) -> None:
    """Write which parameter each block belongs to; padding belongs to the parameter before it."""
    if segments:
        firsts = [segment.offset // ALIGNMENT_NUMEL for segment in segments]
        lengths = [stop - first for first, stop in pairwise([0, *firsts[1:], len(blocks)])]
        owners = torch.tensor([segment.parameter for segment in segments], dtype=blocks.dtype, device="cpu")
        blocks.copy_(owners.repeat_interleave(torch.tensor(lengths, device="cpu")))
