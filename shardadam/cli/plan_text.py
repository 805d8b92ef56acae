# SPDX-License-Identifier: Apache-2.0
"""``shardadam plan`` for a reader: what is asked for, two tables and a sentence on what to choose."""

from __future__ import annotations

import textwrap

from shardadam.cli.comparison import LOW, MOST_RANKS, Comparison, Way
from shardadam.cli.model_source import ModelSource
from shardadam.cli.text import Unit, binary_size, plural, table
from shardadam.planner import Fit, Setting

NAMES = {
    "adamw": "torch.optim.AdamW on every rank",
    "adamw_fp32_master": "the same over float32 masters",
    "step": 'shardadam "step" (ZeRO-1)',
    "backward": 'shardadam "backward" (ZeRO-2)',
    "external": 'shardadam "external" under DDP',
    "fsdp2": "FSDP2, estimated",
}
_WIDTH = 100


def as_text(found: Comparison) -> str:
    unit = Unit(found.asked_way.total)
    parts = [
        _head(found),
        _kinds(found, unit),
        _peers(found, unit),
        _wrapped(_notes(found)),
        _wrapped([_choice(found, unit)]),
    ]
    return "\n\n".join(parts)


def _head(found: Comparison) -> str:
    asked, source = found.asked, found.source
    where = f"{plural(found.ranks, 'rank')} on {plural(found.hosts, 'host')}, {asked.device}"
    if asked.replicas > 1:
        where += f", {plural(asked.replicas, 'replica')} of the state over {plural(asked.world_size, 'rank')} each"
    facts = [
        ("model", f"{source.what}: {source.description}"),
        ("parameters", _parameters(source)),
        ("ranks", where),
        ("optimizer", _call(asked, source)),
        ("buckets", binary_size(asked.bucket_bytes)),
    ]
    if found.available is not None:
        facts.append(("memory", f"{Unit(found.available).named(found.available)} a rank"))
    return table(facts, right=())


def _parameters(source: ModelSource) -> str:
    dtypes = ", ".join(f"{name} {count:,}" if len(source.dtypes) > 1 else name for name, count in source.dtypes.items())
    frozen = source.numel - source.trainable_numel
    return f"{source.numel:,} in {plural(len(source.parameters), 'tensor')}, {dtypes}" + (
        f"; {frozen:,} of them frozen" if frozen else ""
    )


def _has_masters(source: ModelSource) -> bool:
    return any(one.trainable and one.dtype in LOW for one in source.planned)


def _call(setting: Setting, source: ModelSource) -> str:
    precision = [f'moments="{setting.precision.moments}"']
    if _has_masters(source):
        precision.append(f'master="{setting.precision.master}"')
    return f'ShardedAdamW(gradient_sync="{setting.gradient_sync}", precision=Precision({", ".join(precision)}))'


def _kinds(found: Comparison, unit: Unit) -> str:
    """Every format with the ``gradient_sync`` asked for."""
    has_masters = _has_masters(found.source)
    columns = {
        "parameters": ("parameters",),
        "gradients": ("gradients",),
        "grad shard": ("gradient_shard",),
        "staging": ("staging",),
        "moments": ("moments",),
        "master": ("master",),
        "tables": ("scalars", "tables"),
    }
    if not has_masters:
        del columns["master"]
    names = ["moments", "master"] if has_masters else ["moments"]
    rows = [["", *names, *columns, "total", *_fits_header(found)]]
    for way in found.formats:
        if way.setting is None or way.setting.gradient_sync != found.asked.gradient_sync:
            continue
        precision = way.setting.precision
        cells = [unit(sum(way.kinds[kind] for kind in kinds)) for kinds in columns.values()]
        formats = [precision.moments, precision.master] if has_masters else [precision.moments]
        rows.append([">" if found.is_asked(way) else "", *formats, *cells, unit(way.total), *_fits(found, way)])
    title = (
        f'{unit.name} a rank in training, by kind, gradient_sync="{found.asked.gradient_sync}"; > is what was asked for'
    )
    return f"{title}\n{table(rows, right=range(1 + len(names), len(rows[0])))}"


def _peers(found: Comparison, unit: Unit) -> str:
    rows = [["", "", "parameters", "gradients", "the rest", "total", *_fits_header(found)]]
    for way in found.peers:
        parameters, gradients = way.kinds["parameters"], way.kinds["gradients"]
        cells = [unit(value) for value in (parameters, gradients, way.total - parameters - gradients, way.total)]
        rows.append([">" if found.is_asked(way) else "", NAMES[way.name], *cells, *_fits(found, way)])
    return f"{unit.name} a rank, side by side\n{table(rows, right=range(2, len(rows[0])))}"


def _fits_header(found: Comparison) -> list[str]:
    return [] if found.available is None else ["fits", "fits from"]


def _fits(found: Comparison, way: Way) -> list[str]:
    if found.available is None:
        return []
    return ["yes" if way.fits else "no", "never" if way.fits_from is None else plural(way.fits_from, "rank")]


def _notes(found: Comparison) -> list[str]:
    notes = [
        "Not counted: activations, buffers of the model, and what torch and NCCL take. While an optimizer is built, "
        "its parameters exist twice.",
        "FSDP2: everything sharded, and the largest module twice more, unsharded (Zhao et al. 2023, "
        "arXiv:2304.11277, and prefetching): an estimate. All others are counted, not estimated.",
    ]
    if found.asked.device == "cpu":
        together = found.asked_way.total * found.ranks // found.hosts
        notes.append(f"The ranks of one host take {Unit(together).named(together)} together, as asked for.")
    if found.available is not None:
        notes.append(f'"fits from": powers of two{_of_replicas(found)}, to {MOST_RANKS:,}.')
    return notes


def _of_replicas(found: Comparison) -> str:
    return f" times {found.asked.replicas} replicas" if found.asked.replicas > 1 else ""


def _wrapped(paragraphs: list[str]) -> str:
    return "\n".join(textwrap.fill(paragraph, _WIDTH) for paragraph in paragraphs)


# What to choose


def _choice(found: Comparison, unit: Unit) -> str:
    fit = found.fit
    if fit is None:
        return "Give --memory (80GB) to see what fits, and from how many ranks on."
    if fit.nearest is None:
        return _nothing_fits(found, fit, unit)
    assert fit.nearest_need is not None
    takes, left = fit.nearest_need.total, fit.available - fit.nearest_need.total
    leaves = f"{unit.named(takes)}, which leaves {unit.named(left)} for activations and all else"
    if fit.fits:
        return f"Choose what was asked for: it takes {leaves}."
    return (
        f"What was asked for takes {unit.named(fit.need.total)} and does not fit. Choose {_changes(fit, found)} "
        f"instead, the least change that fits: it takes {leaves}."
    )


def _changes(fit: Fit, found: Comparison) -> str:
    assert fit.nearest is not None
    said = {
        "moments": f'moments="{fit.nearest.precision.moments}"',
        "world_size": f"{plural(fit.nearest.world_size * fit.nearest.replicas, 'rank')}",
        "gradient_sync": f'gradient_sync="{fit.nearest.gradient_sync}"',
        "master": f'master="{fit.nearest.precision.master}"',
    }
    return " and ".join(said[change] for change in fit.changes)


def _nothing_fits(found: Comparison, fit: Fit, unit: Unit) -> str:
    parameters = unit.named(fit.need.parameters)
    if fit.need.parameters > fit.available:
        why = f"parameters alone take {parameters} on every rank, however many there are."
    else:
        why = f"on up to {MOST_RANKS:,} ranks, parameters take {parameters} of it on every rank, and the rest too much."
    fsdp = next(way for way in found.peers if way.name == "fsdp2")
    if fsdp.fits_from is None:
        remedy = "Shard them too (FSDP2, tensor parallelism), or take ranks with more memory."
    else:
        remedy = f"FSDP2, which shards them too, would fit from about {plural(fsdp.fits_from, 'rank')} on."
    return f"Nothing fits in {unit.named(fit.available)}: {why} {remedy}"
