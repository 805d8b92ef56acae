# SPDX-License-Identifier: Apache-2.0
"""Checks by checksums that ranks hold equal bits where they must. Reads every replicated tensor and changes none.

Note: the checksum
    Memory is read as 64-bit words w_i. A checksum is sum(a_i w_i) mod 2^64, where the a_i are fixed, random and odd. If
    one word changes by d, the sum changes by d a_i. That is 0 only for d = 0, because an odd a_i has an inverse. Each
    chunk of 1 MiB is summed by itself, and the sums of chunks are combined in the same way. Before that, the upper bits
    of each word are mixed into its lower ones: 2^63 times any odd number is 2^63, so without mixing the changes of two
    highest bits would cancel each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.engine.storage import NamedParameter, ShardedParam
from shardadam.engine.strides import is_dense
from shardadam.ranks.agreement import exchange, name_ranks
from shardadam.state import averages
from shardadam.state.local import local_state
from shardadam.state.masters import refresh_
from shardadam.transport import Job, Transport, placement

_CHUNK_WORDS = 1 << 17
_MASK = (1 << 64) - 1
_REMEDY = (
    "Load the last checkpoint on all ranks, and look for what writes on some ranks only: code under `if rank == 0`, a "
    "scheduler, or failing memory."
)


@dataclass(frozen=True, eq=False)
class ReplicatedTensor:
    """A tensor that other ranks hold too.

    Args:
        name: for the message, as in "Ranks hold different values of ...".
        value: of any shape and dtype. Compared in memory order, or in logical order if it has gaps in memory.
        is_shard: only the ranks of a replica group hold it; else all ranks do.
    """

    name: str
    value: Tensor
    is_shard: bool = False


def replicated_tensors(
    params: Sequence[ShardedParam], frozen: Sequence[NamedParameter], skipped_steps: Tensor, transport: Transport
) -> list[ReplicatedTensor]:
    """Return all replicated tensors of an optimizer, in the same order on every rank. Local.

    Shards of the state are replicated only with hybrid sharding.
    """
    every: list[ShardedParam | NamedParameter] = [*params, *frozen]
    tensors = [ReplicatedTensor(f"parameter {one.name!r}", one.local.detach()) for one in every]
    if transport.replicas > 1:
        for param in params:  # some replicas may have looked at the state since the parameters were written
            refresh_(param)
        averages.refresh_(params)
    states = [(param, local_state(param)) for param in params]
    tensors += [ReplicatedTensor(f"the step of parameter {param.name!r}", state["step"]) for param, state in states]
    tensors.append(ReplicatedTensor("skipped_steps", skipped_steps))
    if transport.replicas > 1:
        tensors += [
            ReplicatedTensor(f"{kind} of parameter {param.name!r}", value, is_shard=True)
            for param, state in states
            for kind, value in state.items()
        ]
    return tensors


def outside_tensors(parameters: Mapping[str, Tensor]) -> list[ReplicatedTensor]:
    """Return parameters that the optimizer does not have, in the order of the mapping."""
    return [
        ReplicatedTensor(
            f"parameter {name!r}, which this optimizer does not have (see average_gradients)",
            placement.local_tensor(p.detach()),
        )
        for name, p in parameters.items()
    ]


@torch.no_grad()
def check(tensors: Sequence[ReplicatedTensor], shard_rank: int, group: dist.ProcessGroup | None) -> None:
    """Check that every tensor is equal, bit for bit, on all ranks that hold it. Collective.

    Args:
        tensors: of the same names in the same order on every rank.
        shard_rank: this rank's rank in its shard group; the ranks of a replica group have equal ones.
        group: all ranks; None for one rank.

    Raises:
        RuntimeError: on every rank; names the first tensor that differs and the ranks that do not hold the most common
            value.
    """
    if group is None:
        return
    checksums = [checksum(tensor.value) for tensor in tensors]
    common = _combine([one for tensor, one in zip(tensors, checksums, strict=True) if not tensor.is_shard])
    of_shards = _combine([one for tensor, one in zip(tensors, checksums, strict=True) if tensor.is_shard])
    answers = exchange((common, shard_rank, of_shards), group)
    by_shard_rank = {answer[1]: answer[2] for answer in answers}
    if any((one, shards) != (common, by_shard_rank[its_rank]) for one, its_rank, shards in answers):
        _raise_difference(tensors, checksums, shard_rank, group)


@contextmanager
def told_to_all(job: Job) -> Iterator[None]:
    """Context manager: if the block raises on some ranks of the job, raise on all of them. Collective over the job.

    Raises:
        RuntimeError: on ranks on which the block did not raise.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if job.is_parallel and job.control is not None:
            exchange(str(error), job.control)
        raise
    if job.is_parallel and job.control is not None:
        errors = [one for one in exchange(None, job.control) if one is not None]
        if errors:
            raise RuntimeError(f"Other parts of the model are not in sync: {errors[0]}")


@torch.no_grad()
def check_copies(params: Sequence[ShardedParam], parts: frozenset[int], job: Job) -> None:
    """Check that parameters are equal on the model-parallel ranks that hold the same elements. Collective over the job.

    Args:
        params: those of this rank.
        parts: the ranks that hold different parts of DTensors, with this one.

    Raises:
        RuntimeError: on every rank; names the parameter and the ranks that do not hold the most common value.
    """
    if not job.is_parallel or job.control is None:
        return
    mine: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for param in params:
        if param.arena.norm_weight * param.arena.transport.replicas < 1:
            cut = [str(one) for one in placement.runs_of(param.parameter)] if param.local is not param.parameter else []
            mine[param.name, ",".join(cut), tuple(sorted(parts))] = checksum(param.local.detach())
    ranks = dist.get_process_group_ranks(job.control)
    holders: dict[tuple[str, str, tuple[int, ...]], dict[int, int]] = {}
    for rank, found in zip(ranks, exchange(mine, job.control), strict=True):
        for key, one in found.items():
            holders.setdefault(key, {})[rank] = one
    for (name, _, _), by_rank in sorted(holders.items()):
        if len(set(by_rank.values())) > 1:
            raise RuntimeError(f"Ranks hold different copies of parameter {name!r}: {_compare(by_rank)} {_REMEDY}")


def _raise_difference(
    tensors: Sequence[ReplicatedTensor], checksums: Sequence[int], shard_rank: int, group: dist.ProcessGroup
) -> None:
    """Find the first tensor whose checksums differ, and raise. Collective."""
    answers = exchange((shard_rank, list(checksums)), group)
    ranks = dist.get_process_group_ranks(group)
    shard_ranks = [answer[0] for answer in answers]
    rows = zip(*(answer[1] for answer in answers), strict=False)  # a row per tensor, a checksum per rank
    for tensor, row in zip(tensors, rows, strict=False):
        for wanted in sorted(set(shard_ranks)) if tensor.is_shard else [None]:
            columns = zip(ranks, shard_ranks, row, strict=True)
            by_rank = {rank: one for rank, its_shard_rank, one in columns if wanted in (None, its_shard_rank)}
            if len(set(by_rank.values())) > 1:
                raise RuntimeError(f"Ranks hold different values of {tensor.name}: {_compare(by_rank)} {_REMEDY}")
    raise RuntimeError(f"Ranks hold different numbers of parameters. {_REMEDY}")


def _compare(by_rank: Mapping[int, int]) -> str:
    """Say which ranks' checksums differ from the most common one."""
    (most_common, count), (_, next_count) = Counter(by_rank.values()).most_common(2)
    equal = [rank for rank, one in by_rank.items() if one == most_common]
    other = [rank for rank, one in by_rank.items() if one != most_common]
    verb = "differ" if len(other) > 1 else "differs"
    doubt = " No value has a majority, so which is right is not known." * (count == next_count)
    return f"{name_ranks(other)} {verb} from {name_ranks(equal)}.{doubt}"


def checksum(tensor: Tensor) -> int:
    """Return a checksum of 64 bits of the tensor's values. Waits for the device."""
    memory = _memory(tensor)
    weights = _weights(memory.device)
    whole = memory.numel() // 8 * 8
    words = memory[:whole].view(torch.int64)
    chunks = [words[start : start + _CHUNK_WORDS] for start in range(0, words.numel(), _CHUNK_WORDS)]
    if whole < memory.numel():
        last_word = memory.new_zeros(8)
        last_word[: memory.numel() - whole] = memory[whole:]
        chunks.append(last_word.view(torch.int64))
    if not chunks:
        return _combine([])
    scratch = torch.empty_like(chunks[0])
    sums = [_mix(chunk, scratch).mul_(weights[: chunk.numel()]).sum() for chunk in chunks]
    return _combine([int(one) & _MASK for one in torch.stack(sums).tolist()])


def _mix(words: Tensor, scratch: Tensor) -> Tensor:
    """Return, in ``scratch``, each word with its upper bits XORed into its lower ones; different words stay different.

    Shifts by 37 bits, so that signs 8, 16 or 32 bits apart in one word come to different bits.
    """
    mixed = torch.bitwise_right_shift(words, 37, out=scratch[: words.numel()])
    return mixed.bitwise_and_((1 << 27) - 1).bitwise_xor_(words)


def _memory(tensor: Tensor) -> Tensor:
    """Return the values as uint8, 1-D, from an address that is a multiple of 8."""
    if not tensor.numel():
        return tensor.new_empty(0, dtype=torch.uint8)
    dense = tensor if is_dense(tensor) else tensor.contiguous()
    flat = dense.as_strided((tensor.numel(),), (1,))
    return (flat.clone() if flat.data_ptr() % 8 else flat).view(torch.uint8)


@cache
def _weights(device: torch.device) -> Tensor:
    """Return random odd int64 numbers, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (_CHUNK_WORDS,), generator=generator, device="cpu") * 2 + 1).to(device)


def _combine(checksums: Sequence[int]) -> int:
    """Return one checksum of several, which depends on their order and number."""
    total = len(checksums)
    for index, one in enumerate(checksums):
        total = (total + one * (2 * (index * 0x9E3779B97F4A7C15 & _MASK) + 1)) & _MASK
    return total
