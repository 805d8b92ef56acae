# SPDX-License-Identifier: Apache-2.0
"""The numbers behind ``shardadam plan``: bytes a rank in every format, and beside what peers take. Prints nothing.

All bytes of our own come from the planner, hence from the layout itself. The only formula here is FSDP2's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast, get_args

import torch

from shardadam.cli.model_source import ModelSource
from shardadam.layout import Layout
from shardadam.optimizer import GradientSync
from shardadam.planner import (
    Fit,
    PlannedParameter,
    Setting,
    adamw_need,
    fitting,
    lay_out,
    memory_of,
    need_of,
)
from shardadam.precision import Master, Moments, Precision
from shardadam.state.memory import Memory

KINDS = ("parameters", "gradients", "gradient_shard", "staging", "moments", "master", "scalars", "tables")
MOST_RANKS = 1024
LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to train, and the bytes of a rank in it.

    Args:
        name: "adamw", "adamw_fp32_master", "step", "backward", "external" or "fsdp2".
        kinds: bytes in training, of all ``KINDS``.
        built: ``optimizer.memory()`` right after it has been built; None for peers.
        setting: None for peers.
        fits: None where no memory is known.
        fits_from: on how many ranks it does, the smallest power of two (times the replicas); None: not on
            ``MOST_RANKS``, or no memory is known.
    """

    name: str
    kinds: dict[str, int]
    built: Memory | None = None
    setting: Setting | None = None
    is_estimate: bool = False
    fits: bool | None = None
    fits_from: int | None = None

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True, slots=True)
class Comparison:
    """
    Args:
        hosts: over which all ranks are spread evenly.
        available: bytes on a rank; None: not known.
        formats: ours in every format with every ``gradient_sync``, the one asked for first of each.
        peers: the ways to train side by side, ours in the format asked for among them.
        fit: None where no memory is known.
    """

    source: ModelSource
    asked: Setting
    hosts: int
    available: int | None
    formats: tuple[Way, ...]
    peers: tuple[Way, ...]
    fit: Fit | None

    @property
    def ranks(self) -> int:
        return self.asked.world_size * self.asked.replicas

    def is_asked(self, way: Way) -> bool:
        return way.setting == self.asked

    @property
    def asked_way(self) -> Way:
        return next(way for way in self.formats if self.is_asked(way))


def compare(source: ModelSource, asked: Setting, *, hosts: int = 1, available: int | None = None) -> Comparison:
    """
    Raises:
        ValueError, TypeError: the optimizer would refuse ``asked``.
    """
    planned = source.planned
    asked = replace(asked, precision=_explicit(asked, planned))

    @cache
    def layout_of(world_size: int) -> Layout:
        return lay_out(planned, replace(asked, world_size=world_size))

    def ours(setting: Setting) -> Way:
        layout = layout_of(setting.world_size)
        memory, need = memory_of(layout, setting, peak=True), need_of(planned, layout, setting)
        kinds = {kind: getattr(memory, kind) for kind in KINDS}
        kinds |= {"parameters": need.parameters, "gradients": need.gradients}
        return Way(setting.gradient_sync, kinds, memory_of(layout, setting), setting)

    def judged(of: Callable[[int], Way]) -> Way:
        """``of`` the number of ranks of a shard group."""
        way = of(asked.world_size)
        if available is None:
            return way
        return replace(way, fits=way.total <= available, fits_from=_fits_from(of, available, asked.replicas))

    def in_format(sync: GradientSync, precision: Precision) -> Way:
        return judged(lambda ranks: ours(replace(asked, world_size=ranks, gradient_sync=sync, precision=precision)))

    syncs: list[GradientSync] = ["step", "backward"]
    if asked.gradient_sync == "external":
        syncs.append("external")
    formats = tuple(in_format(sync, precision) for sync in syncs for precision in precisions(planned, asked))
    peers = [judged(lambda ranks: adamw(planned))]
    if any(one.trainable and one.dtype in LOW for one in planned):
        peers.append(judged(lambda ranks: adamw_with_masters(planned)))
    peers += [way for way in formats if way.setting is not None and way.setting.precision == asked.precision]
    keeps_masters = asked.precision.master != "none"
    peers.append(judged(lambda ranks: fsdp2(source, ranks, keeps_masters=keeps_masters)))
    fit = None if available is None else _fitting(planned, asked, available, layout_of(asked.world_size))
    return Comparison(source, asked, hosts, available, formats, tuple(peers), fit)


def _fitting(planned: Sequence[PlannedParameter], asked: Setting, available: int, layout: Layout) -> Fit:
    """At once where nothing can fit: of a large model, the layouts on all numbers of ranks take seconds."""
    if sum(one.nbytes for one in planned) > available:
        return Fit(asked, available, need_of(planned, layout, asked), None, None)
    return fitting(planned, asked, available, most_ranks=MOST_RANKS)


def precisions(planned: Sequence[PlannedParameter], asked: Setting) -> list[Precision]:
    """Every format that these parameters can be trained in, the one asked for first."""
    dtypes = {one.dtype for one in planned if one.trainable}
    moments: Iterable[Moments] = ("fp32",) if torch.float64 in dtypes else get_args(Moments)
    masters: Iterable[Any] = ("split", "fp32", "none") if dtypes & {*LOW} else (asked.precision.master,)
    all_of_them = [replace(asked.precision, moments=m, master=w) for w in masters for m in moments]
    return [asked.precision, *(one for one in all_of_them if one != asked.precision)]


def _explicit(asked: Setting, planned: Sequence[PlannedParameter]) -> Precision:
    """With the master that "auto" means here, where it means one for all parameters."""
    device = torch.device(asked.device)
    low = {one.dtype for one in planned if one.trainable and one.dtype in LOW}
    masters = {asked.precision.format(dtype, device).master for dtype in low}
    if asked.precision.master != "auto" or len(masters) != 1:
        return asked.precision
    return replace(asked.precision, master=cast("Master", masters.pop()))  # low precision is never "own"


def _fits_from(of: Callable[[int], Way], available: int, replicas: int) -> int | None:
    ranks = 1
    while ranks * replicas <= max(MOST_RANKS, replicas):
        way = of(ranks)
        if way.total <= available:
            return ranks * replicas
        if way.setting is not None and way.kinds["parameters"] > available:
            return None  # more ranks only add padding
        ranks *= 2
    return None


# Peers


def _of_peer(name: str, *, is_estimate: bool = False, **kinds: int) -> Way:
    return Way(name, dict.fromkeys(KINDS, 0) | kinds, is_estimate=is_estimate)


def adamw(planned: Sequence[PlannedParameter]) -> Way:
    """torch.optim.AdamW on every rank, in the parameters' own dtype. The buckets of DDP, where gradients are no views
    of them, come on top."""
    need = adamw_need(planned)
    steps = 4 * sum(one.trainable for one in planned)
    return _of_peer(
        "adamw",
        parameters=need.parameters,
        gradients=need.gradients,
        moments=need.optimizer - steps,
        scalars=steps,
    )


def adamw_with_masters(planned: Sequence[PlannedParameter]) -> Way:
    """The same over float32 copies of low-precision parameters."""
    need = adamw_need(planned)
    exact = [(one, 4 if one.dtype in LOW else one.dtype.itemsize) for one in planned if one.trainable]
    return _of_peer(
        "adamw_fp32_master",
        parameters=need.parameters,
        gradients=need.gradients,
        moments=sum(2 * one.numel * size for one, size in exact),
        master=sum(one.numel * size for one, size in exact if one.dtype in LOW),
        scalars=4 * len(exact),
    )


def fsdp2(source: ModelSource, ranks: int, *, keeps_masters: bool) -> Way:
    """An estimate of ``fully_shard`` with torch.optim.AdamW.

    Everything is sharded along its first dimension: parameters, gradients and two moments; and the largest module that
    it is called on exists twice more, unsharded: as it computes, and as the next one is gathered ahead of time. After
    Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv:2304.11277 (all shards,
    and the largest unsharded unit), and the prefetching of ``torch.distributed.fsdp.fully_shard``. Unsharded gradients
    and what the allocator loses are not in it.

    Args:
        keeps_masters: low-precision parameters are stored in float32 and cast as they are gathered
            (MixedPrecisionPolicy).
    """
    parameters = gradients = steps = 0
    for one in source.planned:
        rows = one.shape[0] if one.shape else 1
        shard = -(-rows // ranks) * (one.numel // rows) if rows else 0
        nbytes = shard * (4 if keeps_masters and one.dtype in LOW else one.dtype.itemsize)
        parameters += nbytes
        gradients += nbytes * one.trainable
        steps += 4 * one.trainable
    largest = max(sum(one.nbytes for one in unit) for unit in source.units().values())
    return _of_peer(
        "fsdp2",
        is_estimate=True,
        parameters=parameters + 2 * largest,
        gradients=gradients,
        moments=2 * gradients,
        scalars=steps,
    )
