# SPDX-License-Identifier: Apache-2.0
"""The numbers of ``shardadam plan``: bytes per rank in every format, and with torch.optim.AdamW and FSDP2.

The planner computes the bytes of our own optimizer, from the layout; ``fsdp2`` estimates those of FSDP2.
Prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any, cast, get_args

import torch

from shardadam.cli.disk_speed import Moved
from shardadam.cli.fsdp2 import fsdp2_bytes
from shardadam.cli.model_source import ModelSource
from shardadam.cli.plan_parallel import ModelParallel, Part, divide
from shardadam.layout import Layout
from shardadam.optimizer import GradientSync
from shardadam.planner import (
    Fit,
    Need,
    PlannedParameter,
    Setting,
    adamw_need,
    fitting,
    lay_out,
    memory_of,
    need_of,
    shard_group_multiple,
)
from shardadam.precision import Master, Moments, Precision
from shardadam.state.memory import Memory

KINDS = (
    "parameters",
    "gradients",
    "gradient_shard",
    "staging",
    "moments",
    "master",
    "average",
    "offload_buffers",
    "scalars",
    "tables",
)
MOST_RANKS = 1024
_LEAST_BUCKET_MB = 0.015625
"""16 KiB: smaller buckets are not proposed."""
LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Usage:
    """The bytes that one way to train takes on each rank.

    Args:
        name: "adamw", "adamw_fp32_master", "step", "backward", "external", "fsdp2"; "choice" for the nearest setting
            that fits, "here" for the nearest that fits on as many ranks as requested.
        kinds: bytes in training, by kind; has all ``KINDS``.
        built: ``optimizer.memory()`` right after construction; None for other optimizers.
        setting: None for other optimizers.
        is_estimate: computed by a formula instead of counted from a layout.
        fits: in the available memory; None if that is not known.
        fits_from: the smallest power of two of ranks (times the replicas and the parts of the model) on which it fits,
            or the requested number if that is smaller and fits; None if it does not fit on up to ``MOST_RANKS``
            data-parallel ranks, or the available memory is not known.
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
    """The result of ``compare``.

    Args:
        part: the model, and what the planned rank holds of it.
        asked: the requested setting, without a master of "auto" if all parameters get the same one.
        hosts: number of hosts that share the ranks evenly.
        available: bytes of memory for each rank; None if not known.
        formats: our optimizer in every format of moments and master with every ``gradient_sync``; of each, the
            requested format is first. "backward" has the requested ``update``.
        alternatives: other optimizers, and ours in the requested format; and the nearest settings that fit, unless
            ``formats`` have them on some number of ranks.
        fit: None if the available memory is not known.
        moved: what it costs to keep the state on a disk; None if its speed is not known.
        here: the nearest setting that fits on as many ranks as requested, if ``fit`` has found another number.
        stock: the row of torch.optim.AdamW that is compared with: over float32 masters if the requested format has any.
        less: if the requested setting takes more than ``stock``: the nearest one on as many ranks that takes less. A
            smaller bucket counts as a change, too: "bucket_mb".
    """

    part: Part
    asked: Setting
    hosts: int
    available: int | None
    formats: tuple[Usage, ...]
    alternatives: tuple[Usage, ...]
    fit: Fit | None
    stock: Usage
    here: Fit | None = None
    less: Fit | None = None
    moved: Moved | None = None

    @property
    def source(self) -> ModelSource:
        """The whole model."""
        return self.part.source

    @property
    def data_parallel(self) -> int:
        """Number of ranks that hold the same part of the model, experts aside."""
        return self.asked.world_size * self.asked.replicas

    @property
    def ranks(self) -> int:
        return self.data_parallel * self.part.parallel.ranks

    @property
    def bucket_bytes(self) -> int:
        """Size of a bucket; of experts that have a process group of their own, it may differ."""
        common = (one for one in self.part.held.planned if one.trainable and one.expert_parallel == 1)
        return self.asked.bucket_bytes(sum(one.nbytes for one in common))

    @property
    def state_bytes(self) -> int:
        """Moments, masters and averages of one rank, wherever they are."""
        built = self.asked_usage.built
        assert built is not None
        return built.moments + built.master + built.average + built.on_host + built.on_disk

    def is_asked(self, usage: Usage) -> bool:
        return usage.setting == self.asked

    @property
    def asked_usage(self) -> Usage:
        return next(usage for usage in self.formats if self.is_asked(usage))


def compare(
    source: ModelSource,
    asked: Setting,
    *,
    hosts: int = 1,
    available: int | None = None,
    parallel: ModelParallel | None = None,
) -> Comparison:
    """Plans ``source`` in every format, and with other optimizers.

    Args:
        asked: the requested setting, for the data-parallel ranks.
        hosts: number of hosts that share the ranks evenly.
        available: bytes of memory for each rank; None if not known.
        parallel: how the model is divided, with every optimizer; None: not at all.

    Raises:
        ValueError, TypeError: ``asked`` is not a valid setting of the optimizer.
        CommandError: the model cannot be divided so.
    """
    part = divide(source, parallel or ModelParallel())
    planned = part.held.planned
    multiple, model_ranks = shard_group_multiple(planned), asked.replicas * part.parallel.ranks
    asked = replace(asked, precision=_explicit(asked, planned))

    @cache
    def layout_of(world_size: int) -> Layout:
        return lay_out(planned, replace(asked, world_size=world_size))

    def ours(setting: Setting) -> Usage:
        layout = layout_of(setting.world_size)
        memory, need = memory_of(layout, setting, peak=True), need_of(planned, layout, setting)
        kinds = {kind: getattr(memory, kind) for kind in KINDS}
        kinds |= {"parameters": need.parameters, "gradients": need.gradients}
        return Usage(setting.gradient_sync, kinds, memory_of(layout, setting), setting)

    def with_fit(usage_on: Callable[[int], Usage]) -> Usage:
        """``usage_on`` takes the number of ranks of a shard group."""
        usage = usage_on(asked.world_size)
        if available is None:
            return usage
        fits = usage.total <= available
        fits_from = _fits_from(usage_on, available, multiple, asked.replicas)
        if fits and (fits_from is None or fits_from > asked.world_size):
            fits_from = asked.world_size
        return replace(usage, fits=fits, fits_from=None if fits_from is None else fits_from * model_ranks)

    def in_format(sync: GradientSync, precision: Precision) -> Usage:
        when = asked.update if sync == "backward" else "step"
        setting = replace(asked, gradient_sync=sync, update=when, precision=precision)
        return with_fit(lambda ranks: ours(replace(setting, world_size=ranks)))

    syncs: list[GradientSync] = ["step", "backward"]
    if asked.gradient_sync == "external":
        syncs.append("external")
    formats = tuple(in_format(sync, precision) for sync in syncs for precision in precisions(planned, asked))
    alternatives = [with_fit(lambda ranks: adamw(planned))]
    if any(one.trainable and one.dtype in LOW for one in planned):
        alternatives.append(with_fit(lambda ranks: adamw_with_masters(planned)))
    alternatives += [
        usage for usage in formats if usage.setting is not None and usage.setting.precision == asked.precision
    ]
    keeps_masters = asked.precision.master != "none"
    alternatives.append(with_fit(lambda ranks: fsdp2(part.held, ranks, keeps_masters=keeps_masters)))
    fit = None if available is None else _fitting(planned, asked, available, layout_of(asked.world_size))
    here = None
    if available is not None and fit is not None and "world_size" in fit.changes:
        here = fitting(planned, asked, available, keep=["world_size"])
    for name, found in (("choice", fit), ("here", here)):
        if found is None or found.nearest is None:
            continue
        nearest = found.nearest
        if replace(nearest, world_size=asked.world_size) not in [usage.setting for usage in formats]:
            fits_from = with_fit(partial(lambda one, ranks: ours(replace(one, world_size=ranks)), nearest)).fits_from
            alternatives.append(replace(ours(nearest), name=name, fits=True, fits_from=fits_from))
    with_masters = keeps_masters and alternatives[1].name == "adamw_fp32_master"
    stock = alternatives[1] if with_masters else alternatives[0]
    less = _taking_less(planned, asked, stock.total)
    return Comparison(part, asked, hosts, available, formats, tuple(alternatives), fit, stock, here, less)


def _taking_less(planned: Sequence[PlannedParameter], asked: Setting, total: int) -> Fit | None:
    """Returns the nearest setting that takes less than ``total`` on as many ranks; None if ``asked`` does."""

    def need_with(setting: Setting) -> Need:
        return need_of(planned, lay_out(planned, setting), setting)

    need = need_with(asked)
    if need.total <= total:
        return None
    if asked.gradient_sync == "backward" and asked.update == "step":
        nearest = replace(asked, gradient_sync="step")
        found = need_with(nearest)
        if found.total < total:
            return Fit(asked, total, need, nearest, found, ("gradient_sync",))
    bucket_mb = asked.bucket_bytes(sum(one.nbytes for one in planned if one.trainable)) / 2**20
    while asked.world_size > 1 and bucket_mb > 2 * _LEAST_BUCKET_MB:
        bucket_mb /= 2
        nearest = replace(asked, bucket_mb=bucket_mb)
        found = need_with(nearest)
        if found.total < total:
            return Fit(asked, total, need, nearest, found, ("bucket_mb",))
    return fitting(planned, asked, total - 1, keep=["world_size", "offload"])


def _fitting(planned: Sequence[PlannedParameter], asked: Setting, available: int, layout: Layout) -> Fit:
    """Calls ``planner.fitting`` unless nothing can fit: for a large model, its layouts take seconds."""
    if sum(one.nbytes for one in planned) > available:
        return Fit(asked, available, need_of(planned, layout, asked), None, None)
    return fitting(planned, asked, available, most_ranks=MOST_RANKS)


def precisions(planned: Sequence[PlannedParameter], asked: Setting) -> list[Precision]:
    """Returns every format that these parameters can be trained in, the requested one first."""
    dtypes = {one.dtype for one in planned if one.trainable}
    moments: Iterable[Moments] = ("fp32",) if torch.float64 in dtypes else get_args(Moments)
    masters: Iterable[Any] = ("split", "fp32", "none") if dtypes & {*LOW} else (asked.precision.master,)
    all_of_them = [replace(asked.precision, moments=m, master=w) for w in masters for m in moments]
    return [asked.precision, *(one for one in all_of_them if one != asked.precision)]


def _explicit(asked: Setting, planned: Sequence[PlannedParameter]) -> Precision:
    """Returns the requested precision; replaces master "auto" if it selects one master for all parameters."""
    device = torch.device(asked.device)
    low = {one.dtype for one in planned if one.trainable and one.dtype in LOW}
    masters = {asked.precision.format(dtype, device).master for dtype in low}
    if asked.precision.master != "auto" or len(masters) != 1:
        return asked.precision
    return replace(asked.precision, master=cast("Master", masters.pop()))  # "own" is for float32 and float64 alone


def _fits_from(usage_on: Callable[[int], Usage], available: int, multiple: int, replicas: int) -> int | None:
    """Returns the smallest shard group that fits: a power of two times ``multiple``."""
    ranks = multiple
    while ranks * replicas <= max(MOST_RANKS, multiple * replicas):
        usage = usage_on(ranks)
        if usage.total <= available:
            return ranks
        if usage.setting is not None and usage.kinds["parameters"] > available:
            return None  # parameters are on every rank; more ranks only add padding
        ranks *= 2
    return None


# Other optimizers


def _alternative(name: str, *, is_estimate: bool = False, **kinds: int) -> Usage:
    return Usage(name, dict.fromkeys(KINDS, 0) | kinds, is_estimate=is_estimate)


def adamw(planned: Sequence[PlannedParameter]) -> Usage:
    """Counts torch.optim.AdamW on every rank, in the parameters' own dtype. Does not count DDP's buckets, which take
    extra memory unless gradients are views of them.
    """
    need = adamw_need(planned)
    steps = 4 * sum(one.trainable for one in planned)
    return _alternative(
        "adamw",
        parameters=need.parameters,
        gradients=need.gradients,
        moments=need.optimizer - steps,
        scalars=steps,
    )


def adamw_with_masters(planned: Sequence[PlannedParameter]) -> Usage:
    """Counts ``adamw`` on float32 copies of the bfloat16 and float16 parameters."""
    need = adamw_need(planned)
    exact = [(one, 4 if one.dtype in LOW else one.dtype.itemsize) for one in planned if one.trainable]
    return _alternative(
        "adamw_fp32_master",
        parameters=need.parameters,
        gradients=need.gradients,
        moments=sum(2 * one.numel * size for one, size in exact),
        master=sum(one.numel * size for one, size in exact if one.dtype in LOW),
        scalars=4 * len(exact),
    )


def fsdp2(source: ModelSource, ranks: int, *, keeps_masters: bool) -> Usage:
    """Estimates ``fully_shard`` with torch.optim.AdamW; see ``fsdp2_bytes``."""
    return _alternative("fsdp2", is_estimate=True, **asdict(fsdp2_bytes(source, ranks, keeps_masters=keeps_masters)))
