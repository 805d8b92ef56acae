# SPDX-License-Identifier: Apache-2.0
"""The bytes of FSDP2 (``fully_shard``) with torch.optim.AdamW on a rank, when a step takes the most. Prints nothing.

Follows torch's ``distributed/fsdp/_fully_shard`` from forward to the end of backward; ``tests/test_plan_fsdp2.py``
compares it with what torch allocates. After Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data
Parallel", arXiv:2304.11277.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shardadam.cli.model_source import ModelSource
from shardadam.planner import PlannedParameter

_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Fsdp2Bytes:
    """Bytes of a rank.

    Args:
        parameters: shards, and what is unsharded.
        gradients: unsharded ones.
        gradient_shard: after reduce-scatter.
        staging: flat buffers of all-gather and reduce-scatter.
        moments: two for each trainable parameter, in the dtype of its shard.
        scalars: step counters.
    """

    parameters: int
    gradients: int
    gradient_shard: int
    staging: int
    moments: int
    scalars: int


@dataclass(frozen=True, slots=True)
class _Group:
    """The parameters of one module that ``fully_shard`` is called on.

    Args:
        shard: bytes of their shards.
        gathered: of all of them unsharded, each padded to equal shards; those of a flat buffer of all-gather, too.
        gradients: of their unsharded gradients.
        summed: extra bytes while autograd adds up the gradients of a tied parameter.
        last: of the gradient that torch still refers to while the sum is in flight.
        reduced: of the flat input of reduce-scatter.
        received: of its output.
        gradient_shard: of the output in the dtype of the shard; ``received`` itself if that is the same dtype.
    """

    shard: int
    gathered: int
    gradients: int
    summed: int
    last: int
    reduced: int
    received: int
    gradient_shard: int

    @classmethod
    def of(cls, parameters: Sequence[PlannedParameter], ranks: int, *, keeps_masters: bool) -> _Group:
        shard = gathered = gradients = summed = last = reduced = received = gradient_shard = 0
        for one in parameters:
            group = ranks // one.expert_parallel
            padded = -(-one.shape[0] // group) * (one.numel // one.shape[0]) if one.numel and one.shape else one.numel
            itemsize = one.dtype.itemsize
            stored = 4 if keeps_masters and one.dtype in _LOW else itemsize
            shard += padded * stored
            gathered += group * padded * itemsize
            if one.trainable:
                gradients += one.nbytes
                summed = max(summed, 2 * one.nbytes * one.is_tied)
                last = one.nbytes
                reduced += group * padded * itemsize
                received += padded * itemsize
                gradient_shard += padded * stored
        return cls(shard, gathered, gradients, summed, last, reduced, received, gradient_shard)

    @property
    def arriving(self) -> int:
        """Bytes of the output of reduce-scatter, and of its copy in the dtype of the shard, if it needs one."""
        return self.gradient_shard + (self.received if self.received != self.gradient_shard else 0)


def fsdp2_bytes(source: ModelSource, ranks: int, *, keeps_masters: bool) -> Fsdp2Bytes:
    """Return the bytes of FSDP2, of what ``ranks`` data-parallel ranks hold of a model.

    Assumes ``fully_shard(module)`` on each of ``source.units()``, then ``fully_shard(model)``, with torch's defaults:
    a module is unsharded while it runs, whole, however many experts one tensor of it has; the one before it is
    gathered meanwhile in backward. What is in no module (embedding, head, last norm) belongs to the model: it stays
    unsharded from the beginning of forward to the end of backward, and so do its gradients once they are computed.

    Args:
        keeps_masters: bfloat16 and float16 parameters are stored in float32 and cast when they are gathered
            (``MixedPrecisionPolicy(param_dtype=...)``).
    """
    units = source.units()
    root = _Group.of(units.pop("", []), ranks, keeps_masters=keeps_masters)
    blocks = [_Group.of(unit, ranks, keeps_masters=keeps_masters) for unit in units.values()]
    everything = [root, *blocks]
    shards, trained = sum(one.shard for one in everything), sum(one.gradient_shard for one in everything)
    early = sum(one.nbytes for one in _used_last(source) if one.trainable)
    parameters, gradients, gradient_shard, staging = max(_moments_of_a_step(root, blocks, ranks, early), key=sum)
    return Fsdp2Bytes(
        parameters=shards + parameters,
        gradients=gradients,
        gradient_shard=gradient_shard,
        staging=staging,
        moments=2 * trained,
        scalars=4 * sum(one.trainable for one in source.planned),
    )


def _used_last(source: ModelSource) -> Iterator[PlannedParameter]:
    """Yield what the model itself has after its first module, such as the head; and what is tied."""
    in_module = {id(one) for name, unit in source.units().items() if name for one in unit}
    is_after = False
    for one in source.planned:
        is_after |= id(one) in in_module
        if id(one) not in in_module and (is_after or one.is_tied):
            yield one


def _moments_of_a_step(
    root: _Group, blocks: Sequence[_Group], ranks: int, early: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield unsharded parameters, unsharded gradients, gradient shards and flat buffers when they may be largest.

    Args:
        early: bytes of those gradients of ``root`` that exist throughout backward: of the head.
    """
    flat = {id(one): one.gathered if ranks > 1 else 0 for one in (root, *blocks)}
    # Forward frees the buffer of an all-gather only after the next one has been copied out.
    yield root.gathered, 0, 0, flat[id(root)]
    for before, one in zip((root, *blocks), blocks, strict=False):
        yield root.gathered + one.gathered, 0, 0, flat[id(before)] + flat[id(one)]
    done, reducing = 0, 0  # gradient shards; the last input of reduce-scatter, which is kept until the next
    for index in reversed(range(len(blocks))):
        one, next_flat = blocks[index], flat[id(blocks[index - 1])] if index else 0
        # Copied out of its buffer, which is freed then; the last input of reduce-scatter is still kept.
        yield root.gathered + one.gathered, early, done, flat[id(one)] + reducing
        yield root.gathered + one.gathered, early + one.gradients + one.summed, done, next_flat + reducing
        yield root.gathered, early + one.last, done + one.arriving, next_flat + one.reduced
        done += one.gradient_shard
        reducing = one.reduced
    yield root.gathered, root.gradients + root.summed, done, reducing
    yield 0, root.last, done + root.arriving, root.reduced
