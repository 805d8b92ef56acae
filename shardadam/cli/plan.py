# SPDX-License-Identifier: Apache-2.0
"""``shardadam plan``: tells whether training a model fits in memory, in which format and on how many ranks.

Defines the options and the JSON output. ``comparison`` computes; ``plan_text`` and ``plan_plot`` show the result.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from shardadam.cli.comparison import KINDS, MOST_RANKS, Comparison, Usage, compare
from shardadam.cli.disk_speed import DiskSpeed, Moved, measure
from shardadam.cli.errors import CommandError
from shardadam.cli.model_source import DTYPES, find_model_source
from shardadam.cli.plan_parallel import ModelParallel
from shardadam.cli.plan_plot import plot
from shardadam.cli.plan_text import as_text
from shardadam.cli.text import show
from shardadam.optimizer import GradientSync
from shardadam.planner import Fit, Need, Setting
from shardadam.planner.planning import When
from shardadam.precision import Gradients, Master, Moments, Precision

_DESCRIPTION = """\
Computes the bytes that training takes on each rank, by kind, in every format,
and compares them with torch.optim.AdamW and FSDP2. Uses the optimizer's own
layout, and allocates nothing. Does not count activations, buffers of the model,
and what torch itself takes."""

_EPILOG = f"""\
WHAT is one of
  7B, 350M, 1.3e9          a number of parameters: planned as a decoder of
                           exactly that size, with Llama 2's proportions
  DIR, config.json         a Hugging Face model, built without weights or
                           network; needs transformers
  Qwen/Qwen3-8B            the same by name, from the local cache, or with
                           --download from the Hugging Face Hub
  module:function          a function (or class) without arguments that returns
                           an nn.Module, called on the meta device; the current
                           directory is searched for the module first

Model parallelism: --ranks counts all ranks. Ranks that hold the same part of
the model, N / (T P) of them, are data-parallel and split its state; N / (T P E)
of them hold the same experts. Tensors are cut by their names, as usual; "What a
rank holds" lists how.

--json prints one object. All sizes are bytes of one rank; "ranks" counts the
ranks of all hosts:
  version     1; within a version, fields may be added but do not change
  what        name, source (number, hugging_face, function), description,
              tensors, parameters, trainable, dtypes {{fp32, bf16, ...:
              elements}}
  asked       your settings: ranks, hosts, replicas, device, gradient_sync,
              update, gradients, moments, master, bucket_bytes, clip, ema,
              offload, transport
  parallel    null without model parallelism: tensor, expert, pipeline, data
              (ranks that hold the same part), and what the planned rank holds,
              the fullest: stage (from 1), layers (first and last), tensors,
              parameters, trainable, cuts {{how: names}}
  memory      the value of --memory, or null
  formats     one for each format and gradient_sync: moments, master, gradients,
              gradient_sync, update, asked (whether these are your settings),
              built (fields of optimizer.memory() after construction, and their
              total), bytes (the same kinds in training, p.grad and frozen
              parameters included, and their total), fits, fits_from
  comparison  adamw, adamw_fp32_master, step, backward, external, fsdp2, and
              choice and here if formats do not have them on any number of
              ranks: name, estimate, bytes, fits, fits_from
  choice      null without --memory: fits, changes (what differs from your
              settings), ranks, gradient_sync, update, clip, offload, gradients,
              moments, master, bytes {{parameters, gradients, optimizer,
              total}}; if nothing fits, all but fits and changes null
  here        the same for as many ranks as in your settings, if choice has
              others; else null
  disk        null without --measure-disk or --disk-bandwidth: directory, read,
              write, both (bytes a second: alone, and together while both go
              on), state (bytes of one rank), sharing (ranks of a host), seconds
              (to read and write the state once a step), step_time,
              slowdown_at_least, slowdown_at_most (null without --step-time)
fits and fits_from are null without --memory; fits_from is the smallest power of
two of ranks (times the replicas, and the parts of the model) on which it fits,
or --ranks if that is less and fits; null if it does not fit on up to
{MOST_RANKS} data-parallel ranks.

Exit code: 0; 1 if training with your settings does not fit in --memory, or
cannot be planned."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "plan",
        help="compute the memory that training takes on each rank, and what fits",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("what", metavar="WHAT", help="number of parameters, Hugging Face model, or module:function")
    command.add_argument("--ranks", metavar="N", type=_whole, default=8, help="number of all ranks; default: 8")
    command.add_argument(
        "--hosts", metavar="H", type=_whole, default=1, help="hosts that share the ranks evenly; default: 1"
    )
    command.add_argument(
        "--replicas",
        metavar="R",
        type=_whole,
        default=1,
        help="hybrid sharding: R copies of the state, each split over N/R ranks; default: 1",
    )
    command.add_argument(
        "--tensor-parallel",
        metavar="T",
        type=_whole,
        default=1,
        help="T ranks split single tensors: attention and MLP by columns and rows, embedding and head over the "
        "vocabulary; default: 1",
    )
    command.add_argument(
        "--expert-parallel",
        metavar="E",
        type=_whole,
        default=1,
        help="experts are spread over E groups of the data-parallel ranks; default: 1",
    )
    command.add_argument(
        "--pipeline-parallel",
        metavar="P",
        type=_whole,
        default=1,
        help="P stages of layers; the fullest is planned; default: 1",
    )
    command.add_argument(
        "--dtype", choices=DTYPES, help="of parameters; default: the model's own, and bf16 for a number"
    )
    command.add_argument(
        "--gradients", choices=get_args(Gradients), default="auto", help="format of gradient shards; default: auto"
    )
    command.add_argument("--moments", choices=get_args(Moments), default="fp32", help="default: fp32")
    command.add_argument("--master", choices=get_args(Master), default="auto", help="default: auto")
    command.add_argument(
        "--gradient-sync", choices=get_args(GradientSync), default="backward", help="default: backward"
    )
    command.add_argument(
        "--update",
        choices=get_args(When),
        default="step",
        help="backward: each bucket is updated while backward runs, and nothing clips; default: step",
    )
    command.add_argument(
        "--bucket-mb",
        metavar="MIB",
        type=_positive,
        help="default: the optimizer's, by the size of the parameters: on CPUs a quarter of it, 0.25 to 8; on GPUs a "
        "sixteenth of it, 32 to 128, or to 2 for each rank if that is more (at most 1024)",
    )
    command.add_argument("--clip", action="store_true", help="gradients are clipped (max_grad_norm)")
    command.add_argument("--ema", action="store_true", help="keep an average of the weights (ema_decay)")
    command.add_argument(
        "--offload", choices=("host", "disk"), help="keep the state there between steps; default: with the parameters"
    )
    command.add_argument(
        "--measure-disk",
        metavar="DIRECTORY",
        type=Path,
        help="measure the disk of a directory as DiskOffload uses it (a few seconds, at most 1 GiB, leaves no file), "
        "and say how long the state takes to it and back",
    )
    command.add_argument(
        "--disk-bandwidth",
        metavar="SIZE",
        type=parse_size,
        help="bytes a second to read and write together, not measured",
    )
    command.add_argument(
        "--step-time",
        metavar="SECONDS",
        type=_positive,
        help="of a step with state in memory, to compare with the disk",
    )
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    command.add_argument(
        "--memory",
        "--gpu-memory",
        metavar="SIZE",
        type=parse_size,
        help="memory of each rank: 80GB (of 10^9 bytes), 80GiB (of 2^30), 512MB, or bytes",
    )
    command.add_argument("--download", action="store_true", help="look up a model's name on the Hugging Face Hub")
    command.add_argument("--json", action="store_true", help="print JSON, for programs; see below")
    command.add_argument("--plot", metavar="FILE", type=Path, help="draw bars: .png, .svg or .pdf; needs matplotlib")
    command.set_defaults(run=_run)


def _whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 2**20:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of 1 to {2**20:,}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive number")
    return number


_UNITS: dict[str, int] = {"": 1, **{f"{letter}b": 10 ** (3 * (i + 1)) for i, letter in enumerate("kmgt")}}
_UNITS |= {f"{letter}ib": 2 ** (10 * (i + 1)) for i, letter in enumerate("kmgt")}
_UNITS |= {letter: _UNITS[f"{letter}b"] for letter in "kmgt"} | {"b": 1}


def parse_size(text: str) -> int:
    """Returns the bytes of a size such as "80GB", "79.6GiB" or "1000"."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?) ?([A-Za-z]*)", text)
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size such as 80GB, 79.6GiB or 512MB")
    return round(float(match[1]) * unit)


def _run(options: argparse.Namespace) -> int:
    parallel = ModelParallel(options.tensor_parallel, options.expert_parallel, options.pipeline_parallel)
    setting = _setting(options, parallel)
    source = find_model_source(options.what, DTYPES.get(options.dtype), download=options.download)
    try:
        found = compare(source, setting, hosts=options.hosts, available=options.memory, parallel=parallel)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    speed = _disk_speed(options, found)
    if speed is not None:
        moved = Moved(speed, found.state_bytes, found.ranks // found.hosts, options.step_time)
        found = replace(found, moved=moved)
    if options.plot is not None:
        plot(found, options.plot)
    show(json.dumps(as_json(found), indent=2) if options.json else as_text(found))
    return 1 if found.fit is not None and not found.fit.fits else 0


def _setting(options: argparse.Namespace, parallel: ModelParallel) -> Setting:
    """Returns the setting of the data-parallel ranks, which hold the same part of the model."""
    ranks, hosts, replicas = options.ranks, options.hosts, options.replicas
    if ranks % parallel.ranks:
        raise CommandError(
            f"--ranks: found {ranks} with --tensor-parallel {parallel.tensor} and --pipeline-parallel "
            f"{parallel.pipeline}, expected a multiple of {parallel.ranks}: their product is one copy of the model. "
            f"Give --ranks {-(-ranks // parallel.ranks) * parallel.ranks}, or fewer parts."
        )
    data = ranks // parallel.ranks
    of_what = f"--ranks {ranks}" if data == ranks else f"{data} data-parallel ranks"
    for name, parts, whole, what in (
        ("--hosts", hosts, ranks, f"--ranks {ranks}"),
        ("--replicas", replicas, data, of_what),
    ):
        if whole % parts:
            raise CommandError(f"{name}: found {parts} with {what}, expected a divisor of it")
    if data % parallel.expert:
        raise CommandError(
            f"--expert-parallel: found {parallel.expert} with {data} data-parallel ranks (ranks / tensor / pipeline), "
            "expected a divisor of it: groups of these ranks hold different experts. Give --expert-parallel "
            f"{math.gcd(data, parallel.expert)}, or more --ranks."
        )
    if parallel.expert > 1 and replicas > 1:
        raise CommandError(
            f"--replicas: found {replicas} with --expert-parallel {parallel.expert}, expected 1: experts are not "
            "sharded in two levels. Leave out one of them."
        )
    if options.update == "backward" and options.clip:
        raise CommandError(
            "--update: found backward with --clip, expected step: the norm is known only after backward. Leave out one "
            "of them."
        )
    if options.update == "backward" and options.gradient_sync != "backward":
        raise CommandError(
            f"--update: found backward with --gradient-sync {options.gradient_sync}, expected --gradient-sync "
            "backward: other code reads gradients after backward. Leave out one of them."
        )
    # Tensor parallelism is innermost: a shard group's ranks are that far apart.
    is_inside_host = (ranks // hosts) % (data // replicas * parallel.tensor) == 0
    return Setting(
        world_size=data // replicas,
        replicas=replicas,
        precision=Precision(moments=options.moments, master=options.master, gradients=options.gradients),
        gradient_sync=options.gradient_sync,
        bucket_mb=options.bucket_mb,
        device=options.device,
        transport="auto" if is_inside_host else "collective",
        clips=options.clip,
        ema=options.ema,
        offload=options.offload,
        update=options.update,
    )


def _disk_speed(options: argparse.Namespace, found: Comparison) -> DiskSpeed | None:
    if options.measure_disk is not None and options.disk_bandwidth is not None:
        raise CommandError("--disk-bandwidth with --measure-disk: found both, expected one. Leave out one of them.")
    if options.disk_bandwidth is not None:
        return DiskSpeed(float(options.disk_bandwidth))
    if options.measure_disk is None:
        if options.step_time is not None:
            raise CommandError("--step-time: needs --measure-disk DIRECTORY or --disk-bandwidth SIZE to compare with.")
        return None
    # A read or write is the part of a bucket in one tensor of the state, of this rank.
    block = found.bucket_bytes // found.asked.world_size
    return measure(options.measure_disk, min(max(block, 2**20), 2**26))


# JSON


def as_json(found: Comparison) -> dict[str, Any]:
    """Returns the object that ``--json`` prints; ``_EPILOG`` describes it."""
    source, asked = found.source, found.asked
    return {
        "version": 1,
        "what": {
            "name": source.what,
            "source": source.source,
            "description": source.description,
            "tensors": len(source.parameters),
            "parameters": source.numel,
            "trainable": source.trainable_numel,
            "dtypes": source.dtypes,
        },
        "asked": {
            "ranks": found.ranks,
            "hosts": found.hosts,
            "replicas": asked.replicas,
            "device": asked.device,
            "gradient_sync": asked.gradient_sync,
            "update": asked.update,
            "gradients": asked.precision.gradients,
            "moments": asked.precision.moments,
            "master": asked.precision.master,
            "bucket_bytes": found.bucket_bytes,
            "clip": asked.clips,
            "ema": asked.ema,
            "offload": asked.offload,
            "transport": asked.transport,
        },
        "parallel": _parallel(found),
        "memory": found.available,
        "formats": [_format(found, usage) for usage in found.formats],
        "comparison": [
            {"name": usage.name, "estimate": usage.is_estimate, "bytes": _bytes(usage), **_fits(usage)}
            for usage in found.alternatives
        ],
        "choice": _choice(found, found.fit),
        "here": _choice(found, found.here),
        "disk": _disk(found.moved),
    }


def _parallel(found: Comparison) -> dict[str, Any] | None:
    part = found.part
    if not part.parallel.is_used:
        return None
    return {
        **asdict(part.parallel),
        "data": found.data_parallel,
        "stage": part.stage + 1,
        "layers": None if part.layers is None else list(part.layers),
        "tensors": len(part.held.parameters),
        "parameters": part.held.numel,
        "trainable": part.held.trainable_numel,
        "cuts": part.cuts,
    }


def _format(found: Comparison, usage: Usage) -> dict[str, Any]:
    assert usage.setting is not None and usage.built is not None
    return {
        "moments": usage.setting.precision.moments,
        "master": usage.setting.precision.master,
        "gradients": usage.setting.precision.gradients,
        "gradient_sync": usage.setting.gradient_sync,
        "update": usage.setting.update,
        "asked": found.is_asked(usage),
        "built": {**asdict(usage.built), "total": usage.built.total},
        "bytes": _bytes(usage),
        **_fits(usage),
    }


def _bytes(usage: Usage) -> dict[str, int]:
    return {**{kind: usage.kinds[kind] for kind in KINDS}, "total": usage.total}


def _fits(usage: Usage) -> dict[str, Any]:
    return {"fits": usage.fits, "fits_from": usage.fits_from}


def _disk(moved: Moved | None) -> dict[str, Any] | None:
    if moved is None:
        return None
    speed, (low, high) = moved.speed, moved.slowdowns or (None, None)
    return {
        "directory": None if speed.directory is None else str(speed.directory),
        "read": speed.read,
        "write": speed.write,
        "both": speed.both,
        "state": moved.nbytes,
        "sharing": moved.ranks,
        "seconds": moved.seconds,
        "step_time": moved.step_seconds,
        "slowdown_at_least": low,
        "slowdown_at_most": high,
    }


def _choice(found: Comparison, fit: Fit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    nearest, need = fit.nearest, fit.nearest_need
    return {
        "fits": fit.fits,
        "changes": [{"world_size": "ranks", "clips": "clip"}.get(change, change) for change in fit.changes],
        "ranks": None if nearest is None else nearest.world_size * nearest.replicas * found.part.parallel.ranks,
        "gradient_sync": None if nearest is None else nearest.gradient_sync,
        "update": None if nearest is None else nearest.update,
        "clip": None if nearest is None else nearest.clips,
        "offload": None if nearest is None else nearest.offload,
        "gradients": None if nearest is None else nearest.precision.gradients,
        "moments": None if nearest is None else nearest.precision.moments,
        "master": None if nearest is None else nearest.precision.master,
        "bytes": None if need is None else _need(need),
    }


def _need(need: Need) -> dict[str, int]:
    return {**asdict(need), "total": need.total}
