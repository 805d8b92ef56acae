# SPDX-License-Identifier: Apache-2.0
"""``shardadam plan`` as text: the requested setting, two tables, notes, and one sentence on what to choose."""

from __future__ import annotations

from shardadam.cli.comparison import LOW, MOST_RANKS, Comparison, Usage
from shardadam.cli.disk_speed import Moved
from shardadam.cli.model_source import ModelSource
from shardadam.cli.text import Unit, binary_size, facts, paragraph, plural, side_by_side, table
from shardadam.planner import Fit, Setting

NAMES = {
    "adamw": "AdamW on every rank",
    "adamw_fp32_master": "AdamW over float32 masters",
    "step": 'shardadam "step" (ZeRO-1)',
    "backward": 'shardadam "backward" (ZeRO-2)',
    "external": 'shardadam "external" under DDP',
    "fsdp2": "FSDP2, estimated",
    "choice": "the choice below",
    "here": "the choice for as many ranks",
}
_OFFLOADS = {"host": "offload=HostOffload()", "disk": 'offload=DiskOffload("DIRECTORY")'}


def as_text(found: Comparison) -> str:
    unit = Unit(found.asked_usage.total)
    parts = [
        _head(found),
        *([_parts(found)] if found.part.parallel.is_used else []),
        _kinds(found, unit),
        _alternatives(found, unit),
        _wrapped(_notes(found)),
        _wrapped([_choice(found, unit), *_no_saving(found, unit)]),
        *([_wrapped([_moved(found.moved)])] if found.moved is not None else []),
    ]
    return "\n\n".join(parts)


def _head(found: Comparison) -> str:
    asked, source = found.asked, found.source
    where = f"{plural(found.ranks, 'rank')} on {plural(found.hosts, 'host')}, {asked.device}"
    if asked.replicas > 1:
        where += f", {plural(asked.replicas, 'replica')} of the state over {plural(asked.world_size, 'rank')} each"
    held = found.part.held
    known = [
        ("model", f"{source.what}: {source.description}"),
        ("parameters", _parameters(source)),
        ("ranks", where),
        ("optimizer", _call(asked, held)),
        ("buckets", binary_size(found.bucket_bytes)),
    ]
    if found.available is not None:
        known.append(("memory", f"{Unit(found.available).named(found.available)} per rank"))
    return facts(known)


def _parts(found: Comparison) -> str:
    """Returns what the planned rank holds, and how tensors are cut."""
    part, parallel = found.part, found.part.parallel
    divided = [f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {found.data_parallel}"]
    if parallel.expert > 1:
        same = found.data_parallel // parallel.expert
        divided.append(f"experts over {plural(parallel.expert, 'group')} of {plural(same, 'data-parallel rank')}")
    known = [("divided", "; ".join(divided))]
    if parallel.pipeline > 1 and part.layers is not None:
        first, last = part.layers
        layers = first if first == last else f"{first} to {last}"
        known.append(("stage", f"the fullest, {part.stage + 1} of {parallel.pipeline}: {layers}"))
        known += [("on both ends", f"{name}, as it is tied") for name in part.copied]
    known.append(("parameters", _parameters(part.held)))
    known += [(how, ", ".join(names)) for how, names in part.cuts.items()]
    return f"What a rank holds\n{facts(known)}"


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
    if setting.precision.gradients != "auto":
        precision.append(f'gradients="{setting.precision.gradients}"')
    arguments = [*_when(setting), f"precision=Precision({', '.join(precision)})"]
    arguments += ["ema_decay=0.999"] if setting.ema else []
    arguments += [_OFFLOADS[setting.offload]] if setting.offload else []
    return f"ShardedAdamW({', '.join(arguments)})"


def _when(setting: Setting) -> list[str]:
    """Returns the arguments that say when gradients are reduced and parameters updated."""
    update = ['update="backward"'] if setting.update == "backward" else []
    return [f'gradient_sync="{setting.gradient_sync}"', *update]


def name_of(usage: Usage) -> str:
    """The row of ``usage`` in a table that compares optimizers."""
    if usage.name == "backward" and usage.setting is not None and usage.setting.update == "backward":
        return 'shardadam, update="backward"'
    return NAMES[usage.name]


def _kinds(found: Comparison, unit: Unit) -> str:
    """Returns the table of bytes by kind: a column for each format, with the requested ``gradient_sync``."""
    has_masters = _has_masters(found.part.held)
    kinds = {
        "parameters": ("parameters",),
        "gradients": ("gradients",),
        "grad shard": ("gradient_shard",),
        "staging": ("staging",),
        "moments": ("moments",),
        "master": ("master",),
        "average": ("average",),
        "buffers": ("offload_buffers",),
        "tables": ("scalars", "tables"),
    }
    if not has_masters:
        del kinds["master"]
    if not found.asked.ema:
        del kinds["average"]
    if found.asked.offload is None:
        del kinds["buffers"]
    formats = ["moments in", "master in"] if has_masters else ["moments in"]
    columns = []
    for usage in found.formats:
        if usage.setting is None or usage.setting.gradient_sync != found.asked.gradient_sync:
            continue
        precision = usage.setting.precision
        cells = [unit(sum(usage.kinds[kind] for kind in some)) for some in kinds.values()]
        head = [f"{'>' if found.is_asked(usage) else ''}{precision.moments}", precision.master][: len(formats)]
        columns.append([*head, *cells, unit(usage.total), *_fits(found, usage)])
    title = paragraph(f'{unit.name} per rank in training, with {", ".join(_when(found.asked))}; ">" is your settings')
    return f"{title}\n{side_by_side([*formats, *kinds, 'total', *_fits_header(found)], columns)}"


def _alternatives(found: Comparison, unit: Unit) -> str:
    rows = [["", "", "params", "grads", "rest", "total", *_fits_header(found)]]
    for usage in found.alternatives:
        parameters, gradients = usage.kinds["parameters"], usage.kinds["gradients"]
        cells = [unit(value) for value in (parameters, gradients, usage.total - parameters - gradients, usage.total)]
        rows.append([">" if found.is_asked(usage) else "", name_of(usage), *cells, *_fits(found, usage)])
    return f"{unit.name} per rank, compared with other optimizers\n{table(rows, right=range(2, len(rows[0])))}"


def _fits_header(found: Comparison) -> list[str]:
    return [] if found.available is None else ["fits", "from"]


def _fits(found: Comparison, usage: Usage) -> list[str]:
    if found.available is None:
        return []
    if usage.fits_from is None:
        return ["no", "never"]
    needs_staging = not usage.fits and usage.fits_from == found.ranks // found.asked.world_size
    return ["yes" if usage.fits else "no", f"{usage.fits_from} alone" if needs_staging else str(usage.fits_from)]


def _notes(found: Comparison) -> list[str]:
    notes = [
        "Not counted: activations, buffers of the model, and what torch and NCCL take. While the optimizer is built, "
        "parameters exist twice.",
        "FSDP2 is an estimate of fully_shard on each layer and on the model, when a step takes the most: all shards, "
        "what is unsharded then, and buffers. It assumes torch's defaults: a layer is unsharded whole, with all "
        "experts that one tensor has, while the next is gathered; embedding and head stay unsharded from forward to "
        "the end of backward, with their gradients. All other numbers are counted, not estimated.",
    ]
    parallel = found.part.parallel
    if parallel.is_used:
        notes.append(
            "All rows divide the model in the same way: torch.optim.AdamW (under DDP) and FSDP2 run over the "
            f"{plural(found.data_parallel, 'data-parallel rank')}, too."
        )
    if found.asked.device == "cpu":
        together = found.asked_usage.total * found.ranks // found.hosts
        at_most = "at most " if parallel.pipeline > 1 else ""
        notes.append(
            f"With your settings, all ranks of one host take {at_most}{Unit(together).named(together)} together."
        )
    if found.asked.offload is not None:
        where = {"host": "in pinned memory of the host", "disk": "on disk"}[found.asked.offload]
        state, together = found.state_bytes, found.state_bytes * found.ranks // found.hosts
        notes.append(
            f"Your settings keep {Unit(state).named(state)} of state of each rank {where}, "
            f"{Unit(together).named(together)} on each host, not counted above."
        )
    if found.available is not None:
        notes.append(
            f'"from" is the smallest number of ranks that fits: a power of two{_of_replicas(found)}, up to '
            f"{MOST_RANKS:,}{' data-parallel ranks' if parallel.is_used else ''}, or yours."
        )
        starts = {_fits(found, usage)[1] for usage in (*found.formats, *found.alternatives)}
        notes += [
            f'"{start}": state on one rank alone takes no staging, so that it fits there, and not on yours.'
            for start in starts
            if start.endswith("alone")
        ]
    return notes


def _of_replicas(found: Comparison) -> str:
    parallel = found.part.parallel
    factors = {"replicas": found.asked.replicas, "ranks of one copy of the model": parallel.ranks}
    factors["groups of experts"] = parallel.expert
    return "".join(f" times {factor} {name}" for name, factor in factors.items() if factor > 1)


def _wrapped(paragraphs: list[str]) -> str:
    return "\n".join(map(paragraph, paragraphs))


# What to choose


def _choice(found: Comparison, unit: Unit) -> str:
    fit = found.fit
    if fit is None:
        return "Give --memory (such as 80GB) to see what fits, and on how many ranks."
    if fit.nearest is None:
        return _nothing_fits(found, fit, unit)
    assert fit.nearest_need is not None
    if fit.fits:
        return f"Your settings fit: training takes {_leaves(fit, unit)}."
    text = f"With your settings, training takes {unit.named(fit.need.total)} and does not fit."
    advice = f"hoose {_changes(fit, found)} instead, the smallest change that fits: it takes {_leaves(fit, unit)}."
    if found.here is None:
        return f"{text} C{advice}"
    ranks = plural(found.ranks, "rank")
    if found.here.nearest_need is None:
        return f"{text} On {ranks}, nothing fits. C{advice}"
    here = f"On {ranks}, choose {_changes(found.here, found)}: it takes {_leaves(found.here, unit)}."
    return f"{text} {here} Or c{advice}"


def _leaves(fit: Fit, unit: Unit) -> str:
    assert fit.nearest_need is not None
    takes, left = fit.nearest_need.total, fit.available - fit.nearest_need.total
    return f"{unit.named(takes)} and leaves {unit.named(left)} for activations and everything else"


def _no_saving(found: Comparison, unit: Unit) -> list[str]:
    """Says so if torch.optim.AdamW takes less, and what to do."""
    less, stock = found.less, found.stock
    if less is None:
        return []
    text = (
        f"With your settings, training takes {unit.named(less.need.total)}, which is more than the "
        f"{unit.named(stock.total)} of {NAMES[stock.name]}:"
    )
    if found.data_parallel == 1:
        text += " there is no other rank to split the state with, and tables and padding come on top."
    elif found.asked.world_size == 1:
        text += " each replica is on one rank, which has no other to split the state with."
    else:
        text += " for a model this small, buffers, tables and padding take more than sharding saves."
    if less.nearest is None or less.nearest_need is None:
        return [f"{text} More ranks take less."]
    return [f"{text} {_changes(less, found)} takes less: {unit.named(less.nearest_need.total)}."]


def _changes(fit: Fit, found: Comparison) -> str:
    assert fit.nearest is not None
    texts = {
        "gradients": f'gradients="{fit.nearest.precision.gradients}"',
        "moments": f'moments="{fit.nearest.precision.moments}"',
        "world_size": plural(fit.nearest.world_size * fit.nearest.replicas * found.part.parallel.ranks, "rank"),
        "update": f'update="{fit.nearest.update}"',
        "clips": "no clipping (max_grad_norm=None)",
        "gradient_sync": f'gradient_sync="{fit.nearest.gradient_sync}"',
        "master": f'master="{fit.nearest.precision.master}"',
        "offload": _OFFLOADS.get(str(fit.nearest.offload), ""),
        "bucket_mb": f"bucket_mb={fit.nearest.bucket_mb}",
    }
    *others, last = (texts[change] for change in fit.changes)
    return f"{', '.join(others)} and {last}" if others else last


def _nothing_fits(found: Comparison, fit: Fit, unit: Unit) -> str:
    parameters = unit.named(fit.need.parameters)
    if fit.need.parameters > fit.available:
        why = f"parameters alone take {parameters} on every rank, on any number of ranks."
    else:
        why = f"parameters take {parameters} on every rank, and the rest does not fit on up to {MOST_RANKS:,} ranks."
    fsdp = next(usage for usage in found.alternatives if usage.name == "fsdp2")
    if fsdp.fits_from is None:
        remedy = "Shard parameters too (FSDP2, tensor parallelism), or use ranks with more memory."
    else:
        remedy = (
            f"FSDP2, which shards parameters too, would fit on about {plural(fsdp.fits_from, 'rank')} or more. To "
            "divide the model as well, give --tensor-parallel or --pipeline-parallel."
        )
    return f"Nothing fits in {unit.named(fit.available)}: {why} {remedy}"


def _moved(moved: Moved) -> str:
    """Says how long the state takes to the disk and back."""
    speed = moved.speed
    found = "The disk" if speed.directory is None else f"The disk of {speed.directory}"
    if speed.read is not None and speed.write is not None:
        found += f" reads {_per_second(speed.read)} and writes {_per_second(speed.write)}; together it"
    state = Unit(moved.nbytes).named(moved.nbytes)
    of = f"{state} of state" + (f" of each of {plural(moved.ranks, 'rank')} on it" if moved.ranks > 1 else "")
    text = f"{found} moves {_per_second(speed.both)}. To read and write {of} takes {moved.seconds:.2f} s in every step."
    if moved.slowdowns is None:
        return f"{text} Give --step-time to compare it with a step."
    low, high = moved.slowdowns
    return (
        f"{text} A step of {moved.step_seconds:g} s takes {low:.2f} times as long if all of it is hidden behind that, "
        f"{high:.2f} times if nothing is."
    )


def _per_second(nbytes: float) -> str:
    return f"{Unit(round(nbytes)).named(round(nbytes))}/s"
