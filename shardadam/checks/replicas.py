# SPDX-License-Identifier: Apache-2.0
"""Do ranks that must hold the same bits hold the same bits? By checksums, which find any single changed element, and of
which ranks exchange one number each where all is well. Reads everything, and changes nothing.

Note: the checksum
    Memory is read as 64-bit words, w_i, and sum(w_i a_i) mod 2^64 is taken with odd a_i, which depend on i. If one word
    changes by d, the sum changes by d a_i, which is 0 for d = 0 only, as a_i is odd and so has an inverse. Sums of
    stretches of 1 MiB are added up in the same way. The upper bits of a word go into its lower ones first: an odd
    multiple of the highest bit is that bit, whatever the multiple, and two changed signs would cancel each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.engine.storage import NamedParameter, ShardedParam, is_dense
from shardadam.layout import Span
from shardadam.ranks.agreement import exchange, name_ranks
from shardadam.state.local import local_state, state_spans
from shardadam.transport import Transport

_WORDS = 1 << 17
_MASK = (1 << 64) - 1
_REMEDY = (
    "Load the last checkpoint on all ranks, and look for what writes on some ranks only: code under `if rank == 0`, a "
    "scheduler, or failing memory."
)


@dataclass(frozen=True, eq=False)
class ReplicatedTensor:
    """Something of which ranks hold copies.

    Args:
        what: as in "Ranks hold different values of ...".
        value: of any dtype; its elements are compared in memory order, or in logical order where it has gaps.
        shard: None: all ranks hold it; else the ranks whose ``shard`` is the same.
        spans: the stretches of the whole that ``value`` holds, one after the other; none: it is the whole.
    """

    what: str
    value: Tensor
    shard: int | None = None
    spans: Sequence[Span] = ()


def copies(
    params: Sequence[ShardedParam], frozen: Sequence[NamedParameter], skipped_steps: Tensor, transport: Transport
) -> list[ReplicatedTensor]:
    """What other ranks hold, too, of an optimizer. Local."""
    found = [
        ReplicatedTensor(f"parameter {one.name!r}", one.parameter.detach()) for some in (params, frozen) for one in some
    ]
    local = [(param, local_state(param)) for param in params]
    found += [ReplicatedTensor(f"the step of parameter {param.name!r}", state["step"]) for param, state in local]
    found.append(ReplicatedTensor("skipped_steps", skipped_steps))
    if transport.replicas > 1:
        found += [
            ReplicatedTensor(f"{kind} of parameter {param.name!r}", value, transport.rank, state_spans(kind, param))
            for param, state in local
            for kind, value in state.items()
        ]
    return found


@torch.no_grad()
def check(tensors: Sequence[ReplicatedTensor], shard: int, group: dist.ProcessGroup | None) -> None:
    """Collective: raises on every rank, with one message, unless all copies of every tensor are equal bit for bit.

    Args:
        tensors: as many on every rank, those of all ranks first.
        shard: which one this rank holds.

    Raises:
        RuntimeError: names the first tensor that differs, the ranks that are in the minority, and the element.
    """
    if group is None:
        return
    sums = [checksum(tensor.value) for tensor in tensors]
    whole = _combined([total for tensor, total in zip(tensors, sums, strict=True) if tensor.shard is None])
    replicated = _combined([total for tensor, total in zip(tensors, sums, strict=True) if tensor.shard is not None])
    answers = exchange((whole, shard, replicated), group)
    shards = {shard: replicated for _, shard, replicated in answers}
    if all(one == whole for one, _, _ in answers) and all(one == shards[shard] for _, shard, one in answers):
        return
    _explain(tensors, sums, shard, group)


def checksum(tensor: Tensor) -> int:
    """64 bits."""
    return _combined(_sums(tensor))


def _sums(tensor: Tensor) -> list[int]:
    """Of each stretch of its memory."""
    memory = _memory(tensor)
    weights = _weights(memory.device)
    whole = memory.numel() // 8 * 8
    words = memory[:whole].view(torch.int64)
    if whole < memory.numel():
        rest = memory.new_zeros(8)
        rest[: memory.numel() - whole] = memory[whole:]
        tail = rest.view(torch.int64)
    else:
        tail = words[:0]
    stretches = (words[start : start + _WORDS] for start in range(0, words.numel(), _WORDS))
    room = words.new_empty(min(max(1, words.numel()), _WORDS))
    found = [_mixed(stretch, room).mul_(weights[: stretch.numel()]).sum() for stretch in stretches]
    found += [_mixed(tail, room).mul_(weights[-1]).sum()] if tail.numel() else []
    return [int(total) & _MASK for total in torch.stack(found).tolist()] if found else []


def _mixed(words: Tensor, room: Tensor) -> Tensor:
    """In ``room``: each word with its upper bits in its lower ones, too; no two words become one.

    By 37 bits: signs that are packed into one word, 8, 16 or 32 bits apart, come to different places.
    """
    room = torch.bitwise_right_shift(words, 37, out=room[: words.numel()])
    return room.bitwise_and_((1 << 27) - 1).bitwise_xor_(words)


def _memory(tensor: Tensor) -> Tensor:
    """As bytes."""
    flat = _flat(tensor)
    if flat.data_ptr() % 8:  # a slice that begins inside a word
        flat = flat.clone()
    return flat.view(torch.uint8) if tensor.numel() else flat.new_empty(0, dtype=torch.uint8)


def _flat(tensor: Tensor) -> Tensor:
    """In one dimension, in memory order; in logical order where there are gaps."""
    whole = tensor.detach()
    return (whole if is_dense(whole) else whole.contiguous()).as_strided((tensor.numel(),), (1,))


@cache
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (_WORDS + 1,), generator=generator) * 2 + 1).to(device)


def _combined(sums: Sequence[int]) -> int:
    total = len(sums)
    for index, one in enumerate(sums):
        total = (total + one * (2 * (index * 0x9E3779B97F4A7C15 & _MASK) + 1)) & _MASK
    return total


# What differs


def _explain(tensors: Sequence[ReplicatedTensor], sums: Sequence[int], shard: int, group: dist.ProcessGroup) -> None:
    everybody = exchange((shard, list(sums)), group)
    ranks = dist.get_process_group_ranks(group)
    for index in range(min(len(sums) for _, sums in everybody)):
        # All ranks make the same exchanges, of tensors that they do not hold, too.
        for key in [None] if tensors[index].shard is None else sorted({shard for shard, _ in everybody}):
            holders = [place for place, (shard, _) in enumerate(everybody) if key in (None, shard)]
            values = [everybody[place][1][index] for place in holders]
            if len(set(values)) > 1:
                (usual, count), *others = Counter(values).most_common(2)
                odd = next(place for place, value in zip(holders, values, strict=True) if value != usual)
                other = next(place for place, value in zip(holders, values, strict=True) if value == usual)
                what, element = _locate(tensors[index], odd, other, group)
                alike = [ranks[place] for place, value in zip(holders, values, strict=True) if value == usual]
                unlike = [ranks[place] for place, value in zip(holders, values, strict=True) if value != usual]
                verb = "differ" if len(unlike) > 1 else "differs"
                where = (
                    "though not when they are looked at again: memory fails, or something writes meanwhile"
                    if element is None
                    else f"first at element {element[0]}, which is {element[1]} on rank {ranks[odd]} and {element[2]} "
                    f"on rank {ranks[other]}"
                )
                doubt = " As many hold the one as the other, so which is right is not known." * (count == others[0][1])
                raise RuntimeError(
                    f"Ranks hold different values of {what}: {name_ranks(unlike)} {verb} from {name_ranks(alike)}, "
                    f"{where}.{doubt} {_REMEDY}"
                )
    raise RuntimeError(f"Ranks hold different numbers of parameters. {_REMEDY}")


def _locate(
    tensor: ReplicatedTensor, odd: int, other: int, group: dist.ProcessGroup
) -> tuple[str, tuple[int, str, str] | None]:
    """What it is on the ``odd`` rank, and the first element of the whole that differs, with both values; None where all
    are equal when they are looked at again. Collective.
    """
    place = dist.get_rank(group)
    takes_part = place in (odd, other)
    flat = _flat(tensor.value).cpu()
    sums = exchange(_sums(tensor.value) if takes_part else None, group)
    stretch = next((i for i, (a, b) in enumerate(zip(sums[odd], sums[other], strict=False)) if a != b), 0)
    size = 8 * _WORDS // flat.element_size()
    start = min(stretch * size, max(0, flat.numel() - size))  # the last one may be a tail of some bytes
    chunk = flat[start : start + size + 8].clone()  # a view would be sent with all that it is a view of
    looks = exchange((tensor.what, tensor.spans, start, chunk) if takes_part else None, group)
    (what, spans, start, one), (*_, two) = looks[odd], looks[other]
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    positions = (one.view(bits) != two.view(bits)).nonzero()
    if not positions.numel():
        return what, None
    position = int(positions[0])
    first, second = (_shown(some[position], some.view(bits)[position]) for some in (one, two))
    return what, (_in_the_whole(start + position, spans), first, second)


def _in_the_whole(element: int, spans: Sequence[Span]) -> int:
    for span in spans:
        if element < span.numel:
            return span.start + element
        element -= span.numel
    return element


def _shown(value: Tensor, bits: Tensor) -> str:
    """With its bits: NaNs and zeros that differ in them alone would read the same."""
    return f"{value.item()} ({bits.item() % (1 << 8 * bits.element_size()):#x})"
