# SPDX-License-Identifier: Apache-2.0
"""All bytes that training takes on each rank: parameters, gradients, and what the optimizer holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardadam.layout import Layout
from shardadam.planner.planning import (
    Planned,
    PlannedParameter,
    Setting,
    described,
    has_bucket_view,
    key_of,
    lay_out,
    memory_of,
    trainable_of,
)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that training takes on a rank.

    Does not count activations, buffers of the model, what torch itself takes, and the second copy of the parameters
    while an optimizer is built.

    Args:
        parameters: of all parameters, frozen ones included.
        gradients: of the gradients that exist at once. With ``gradient_sync="backward"`` on several ranks, and with
            ``update="backward"``, those of one bucket, as backward completes buckets roughly in order.
        optimizer: of its state and everything else that it holds.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def adamw_bytes(parameters: Planned) -> int:
    """Return the bytes of torch.optim.AdamW's state: two moments in the parameter's dtype, a float32 step counter."""
    return sum(2 * one.nbytes + 4 for one in trainable_of(described(parameters)))


def adamw_need(parameters: Planned) -> Need:
    """Return what training with torch.optim.AdamW takes on each rank.

    Does not count DDP's own buckets, which take extra memory unless gradients are views of them.
    """
    known = described(parameters)
    gradients = sum(one.nbytes for one in trainable_of(known)) + _while_summed(trainable_of(known))
    return Need(sum(one.nbytes for one in known), gradients, adamw_bytes(known))


def need(parameters: Planned, setting: Setting) -> Need:
    """Return what training with ``ShardedAdam`` or ``ShardedAdamW`` takes on each rank. Raises as ``plan`` does."""
    known = described(parameters)
    return need_of(known, lay_out(known, setting), setting)


def need_of(parameters: Planned, layout: Layout, setting: Setting) -> Need:
    """Return ``need`` for an existing layout of ``parameters``; ``setting`` may differ as in ``memory_of``."""
    known = described(parameters)
    memory = memory_of(layout, setting, peak=True)
    frozen = sum(one.nbytes for one in known if not one.trainable)
    return Need(
        parameters=memory.parameters + frozen,
        gradients=memory.gradients + _gradient_bytes(trainable_of(known), layout, setting),
        optimizer=memory.total - memory.parameters - memory.gradients,
    )


def _gradient_bytes(trainable: Sequence[PlannedParameter], layout: Layout, setting: Setting) -> int:
    """Return the most bytes of gradients that exist at once outside the optimizer's buffers."""
    if setting.update == "backward" or (setting.gradient_sync == "backward" and not setting.is_local):
        buckets = ({segment.parameter for segment in bucket.segments} for bucket in layout.buckets)
        tied = {index for index, one in enumerate(trainable) if one.is_tied}  # may wait for their last use

        def with_bucket(bucket: set[int]) -> int:
            nbytes = sum(trainable[index].nbytes for index in bucket | tied)
            return nbytes + _while_summed([trainable[index] for index in bucket])

        return max(map(with_bucket, buckets), default=0)
    viewed: list[PlannedParameter] = []
    others: list[PlannedParameter] = []
    for arena in layout.arenas:
        some = [trainable[index] for index in arena.parameters]
        is_view = has_bucket_view(key_of(arena), setting.shard_group(some[0]), setting)
        (viewed if is_view else others).extend(some)
    just_made = max((one.nbytes for one in viewed), default=0)  # by autograd, before it is copied into its view
    return sum(one.nbytes for one in others) + max(_while_summed(others), just_made, _while_summed(viewed, of=3))


def _while_summed(parameters: Iterable[PlannedParameter], *, of: int = 2) -> int:
    """Return the extra bytes while autograd adds up the gradients of a tied parameter: ``of`` times the largest one."""
    return max((of * one.nbytes for one in parameters if one.is_tied), default=0)
