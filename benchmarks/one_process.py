# SPDX-License-Identifier: Apache-2.0
"""How much memory, and time, does fine-tuning on one process take, compared with what a user would pick today?

    export OMP_NUM_THREADS=1
    python benchmarks/one_process.py [--dtypes fp32 bf16] [--rounds 2] [--json out.json [--resume | --report]]
    python benchmarks/one_process.py --plan

Trains a decoder of 101M parameters (`launch/model.py`) on a few tokens, so that activations do not hide the optimizer.
In each of `--rounds` rounds every contender (`one_process_contenders.py`) runs in a process of its own; the order
rotates by one each round. The process trains a decoder with one such layer first, which loads libraries and compiles
kernels for the same shapes, drops it, builds the model and the optimizer, and takes `--steps` steps.

**Memory** is the resident set of the process (`VmRSS` and `VmHWM` of /proc/self/status; 5 written to
/proc/self/clear_refs resets `VmHWM`, the highest so far, which the kernel keeps exactly; nothing is sampled):

    beyond    highest in the steps, the first one included, minus the value with only the built model in memory
    total     the same, minus the value before the model was built: the model and all that training takes
    counted   beyond, by theory: bytes of the tensors that must exist at once (state, gradients), without temporaries
    building  highest while the optimizer is built, minus the value with only the built model in memory

`trimmed` is `beyond` with a malloc that returns freed memory at once (MALLOC_MMAP_THRESHOLD_=65536), in three steps of
a run of its own; all others are with malloc's default. Files that `DiskOffload` writes are not part of memory, nor is
the page cache; `--directory` says where they go, which must not be a file system in memory.

**Time** is that of a step, forward and backward included: the median over steps after 2 to warm up, and over rounds
(the fastest and slowest). "CPU" counts the processor time of all threads of the process, which other work on the
machine hardly changes; waits for a disk are only in "step".

**Groups.** "Exact weights": training goes on with float32 weights, be they float32 parameters or a master behind
bf16 ones. "The rest" rounds weights to bf16 in every step. Moments in 8 bits, and Adafactor, which is another
algorithm, are named.

**Losses.** The losses of all steps must equal those of AdamW within the relative `TOLERANCE`, so that no contender wins
by computing something else: of fused AdamW in fp32, of AdamW on fp32 copies in bf16. shardadam rounds float32 masters
to bf16 with exact ties away from zero, torch to even; its losses in bf16 must equal those of AdamW on copies that are
rounded so. Otherwise the exit code is 1. Adafactor's are printed only.

**--plan** trains each of shardadam's settings on 4 tokens and compares `shardadam.planner` with `optimizer.memory()`,
byte for byte, and with the measured peak, which must be within 5%.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from one_process_contenders import BF16, ENTRIES, FP32, Contender, Entry, make_data, make_model
from step import hardware, median_and_range, versions
from torch import Tensor

from shardadam.planner import PlannedParameter, Setting, need, plan

DTYPES = {"fp32": FP32, "bf16": BF16}
REFERENCE = {"fp32": "adamw", "bf16": "adamw-copies"}
REFERENCE_OF_OURS = {"fp32": "adamw", "bf16": "adamw-copies-away"}
BASELINE = "adamw"  # of ratios of time
REFERENCES = {BASELINE, *REFERENCE.values(), *REFERENCE_OF_OURS.values()}
WARM_UP = 2  # steps that are not timed
TIMEOUT_S = 400
TRIMMING = {"MALLOC_MMAP_THRESHOLD_": "65536"}
TRIMMED_STEPS = 3
PLAN_TOKENS, PLAN_TOLERANCE = 4, 0.05
GOAL = 0.6
MB = 1e6
GROUPS = {"fp32": "exact weights", "rounded": "the rest"}
PACKAGES = ("torchao", "bitsandbytes", "flashoptim")


def tolerance(entry: Entry, dtype: torch.dtype) -> float | None:
    """Return how far losses may be from the reference's, relatively; None for another algorithm."""
    if entry.moments == "factored":
        return None
    if entry.weights_in(dtype) == "rounded":
        return 5e-2
    if entry.moments == "fp32":
        return 1e-5
    return 2e-2


# One contender, in a process of its own


def resident_bytes(field: str = "VmRSS") -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status: not Linux")


def highest_in(run: Callable[[], Any]) -> tuple[int, Any]:
    """Return the highest resident set while `run` runs, and what it returns."""
    Path("/proc/self/clear_refs").write_text("5")
    result = run()
    return resident_bytes("VmHWM"), result


def settle() -> int:
    """Free what can be freed; return the resident set."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train with one contender in this process. Raises what the contender raises."""
    entry, dtype = ENTRIES[name], DTYPES[args.dtypes[0]]
    torch.set_num_threads(1)
    data = make_data(args.tokens)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        small = build(entry, dtype, args, layers=1, directory=Path(directory) / "small")
        train(small.contender, data, 2)
        del small
        before = settle()
        one = build(entry, dtype, args, layers=args.layers, directory=Path(directory) / "state")
        sizes = {"planned": planned(entry, one.contender)} if entry.is_ours else {}
        settle()
        peak, (losses, seconds, cpu_seconds) = highest_in(lambda: train(one.contender, data, args.steps))
        return {
            "beyond": peak - one.model_bytes,
            "total": peak - before,
            "building": one.highest_bytes - one.model_bytes,
            "counted": one.contender.counted_bytes(),
            "numel": sum(p.numel() for p in one.contender.model.parameters()),
            "losses": losses,
            "seconds": seconds[WARM_UP:],
            "cpu_seconds": cpu_seconds[WARM_UP:],
            **sizes,
        }


@dataclass(frozen=True)
class Built:
    """A contender, the resident set with its model only, and the highest while its optimizer was built."""

    contender: Contender
    model_bytes: int
    highest_bytes: int


def build(entry: Entry, dtype: torch.dtype, args: argparse.Namespace, *, layers: int, directory: Path) -> Built:
    model = make_model(dtype, layers=layers, width=args.width, tokens=args.tokens)
    directory.mkdir()
    model_bytes = settle()
    where = {"directory": directory} if entry.is_offloaded else {}
    highest, contender = highest_in(lambda: entry.build(model, **where))
    return Built(contender, model_bytes, highest)


def train(contender: Contender, data: list[Tensor], count: int) -> tuple[list[float], list[float], list[float]]:
    """Return the losses, and the seconds and CPU seconds of each step."""
    losses, seconds, cpu_seconds = [], [], []
    for index in range(count):
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = contender.forward(data[index % len(data)])
        loss.backward()
        contender.update()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        losses.append(loss.item())
    return losses, seconds, cpu_seconds


def planned(entry: Entry, contender: Contender) -> dict[str, Any]:
    """Return the planner's bytes for a contender's setting, next to those that its optimizer counts when built.

    Without "plan" and "need", but with "failed", if the planner does not take an option.
    """
    assert entry.precision is not None and contender.memory is not None
    memory = contender.memory()
    sizes = {"memory": memory.total - memory.gradients}
    parameters = list(PlannedParameter.of_model(contender.model).values())
    try:
        setting = Setting(precision=entry.precision, **dict(entry.options))
    except TypeError as error:
        return {**sizes, "failed": str(error)}
    buffers = sum(buffer.nbytes for buffer in contender.model.buffers())
    return {**sizes, "plan": plan(parameters, setting).total, "need": need(parameters, setting).total + buffers}


def run_child(
    name: str, dtype: str, args: argparse.Namespace, environment: dict[str, str], *, steps: int
) -> dict[str, Any]:
    """Run `measure` in a new process; return `{"failed": why}` if the contender cannot run."""
    with tempfile.TemporaryDirectory() as directory:
        out, log = Path(directory) / "out.json", Path(directory) / "log"
        command = [sys.executable, __file__, "--measure", name, "--dtypes", dtype, "--json", str(out)]
        command += ["--steps", str(steps)]
        for option in ("layers", "width", "tokens", "directory"):
            if getattr(args, option) is not None:
                command += [f"--{option}", str(getattr(args, option))]
        with log.open("w") as to:
            try:
                code = subprocess.run(
                    command, env=os.environ | environment, stdout=to, stderr=to, timeout=TIMEOUT_S
                ).returncode
            except subprocess.TimeoutExpired:
                return {"failed": f"{TIMEOUT_S} s over"}
        if out.exists():
            return json.loads(out.read_text())
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        return {"failed": (lines or [f"exit code {code}"])[-1][-300:]}


# All contenders


def chosen(dtype: str, args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Return the names of the contenders to run, references first; and why others cannot run."""
    able = [name for name, entry in ENTRIES.items() if DTYPES[dtype] in entry.dtypes]
    wanted = [name for name in able if args.only is None or name in args.only]
    names = list(dict.fromkeys((BASELINE, REFERENCE[dtype], REFERENCE_OF_OURS[dtype], *wanted)))
    missing = {
        name: f"{ENTRIES[name].needs} is not installed: pip install -c constraints.txt '.[peers]'"
        for name in names
        if not ENTRIES[name].is_installed
    }
    return [name for name in names if name not in missing], missing


Found = dict[str, dict[str, Any]]
"""What `run_child` has returned, by "dtype/round/name". Round "trimmed" is the one with another malloc."""


def run_all(args: argparse.Namespace, found: Found) -> dict[str, str]:
    """Run every contender in every dtype and round that `found` does not have; add to it, and save it in `--json`.

    Contenders that could not run are tried again. Returns why contenders did not run, by "dtype/name".
    """
    failed: dict[str, str] = {}
    for index, round_name in enumerate(round_names(args)):
        for dtype in args.dtypes:
            names, missing = chosen(dtype, args)
            failed |= {f"{dtype}/{name}": why for name, why in missing.items()}
            shift = index % len(names)
            for name in (*names[shift:], *names[:shift]):
                key = f"{dtype}/{round_name}/{name}"
                if key in found or f"{dtype}/{name}" in failed:
                    continue
                print(key, file=sys.stderr, flush=True)
                is_trimmed = round_name == "trimmed"
                one = run_child(
                    name, dtype, args, TRIMMING if is_trimmed else {}, steps=TRIMMED_STEPS if is_trimmed else args.steps
                )
                if "failed" in one:
                    failed[f"{dtype}/{name}"] = f"does not run: {one['failed']}"
                    print(f"  does not run: {one['failed']}", file=sys.stderr, flush=True)
                else:
                    found[key] = one
                    if args.json:
                        save(args, found)
    return failed


def save(args: argparse.Namespace, found: Found) -> None:
    saved = {"head": head(args), "settings": settings_of(args), "found": found}
    Path(args.json).write_text(json.dumps(saved, indent=1) + "\n")


def saved_in(path: str, args: argparse.Namespace) -> tuple[str, Found]:
    """Return the head and the results in a file. Raises ValueError if they are of other settings."""
    saved = json.loads(Path(path).read_text())
    if saved["settings"] != settings_of(args):
        raise ValueError(f"{path}: found results of {saved['settings']}, expected {settings_of(args)}: pass the former")
    return saved["head"], saved["found"]


def settings_of(args: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(args, name) for name in ("layers", "width", "tokens", "steps")}


def round_names(args: argparse.Namespace) -> list[str]:
    return ["1", "trimmed", *(str(index) for index in range(2, args.rounds + 1))]


def evaluated(dtype: str, args: argparse.Namespace, found: Found, failed: dict[str, str]) -> dict[str, Any]:
    """Return the results of a dtype: each contender's rounds with ratios, and the error of its losses.

    Ratios and errors compare equal rounds. A run that was stopped has contenders with fewer rounds, or none.
    """
    numbered = [index for index in round_names(args) if index != "trimmed"]

    def rounds_of(name: str) -> dict[str, dict[str, Any]]:
        return {index: found[key] for index in numbered if (key := f"{dtype}/{index}/{name}") in found}

    base = rounds_of(BASELINE)
    contenders, why = {}, {}
    for name in chosen(dtype, args)[0]:
        is_away = ENTRIES[name].is_ours or name == REFERENCE_OF_OURS[dtype]
        reference = rounds_of((REFERENCE_OF_OURS if is_away else REFERENCE)[dtype])
        some = {index: one for index, one in rounds_of(name).items() if index in base and index in reference}
        if not some:
            why[name] = "not measured"
            continue
        errors = [
            abs(a - b) / abs(b)
            for index, one in some.items()
            for a, b in zip(one["losses"], reference[index]["losses"], strict=True)
        ]
        rounds, trimmed = list(some.values()), found.get(f"{dtype}/trimmed/{name}")
        contenders[name] = {
            "label": ENTRIES[name].label,
            "numel": rounds[0]["numel"],
            "trimmed": None if trimmed is None else trimmed["beyond"],
            **{key: [one[key] for one in rounds] for key in ("beyond", "total", "building", "counted")},
            "loss_error": max(errors, key=lambda error: (math.isnan(error), error)),
            "losses": rounds[0]["losses"],
        }
        for key in ("seconds", "cpu_seconds"):
            medians = {index: statistics.median(one[key]) for index, one in some.items()}
            contenders[name][key] = list(medians.values())
            contenders[name][f"{key}_ratio"] = [
                value / statistics.median(base[index][key]) for index, value in medians.items()
            ]
    why |= {key.partition("/")[2]: text for key, text in failed.items() if key.startswith(f"{dtype}/")}
    return {"dtype": dtype, "contenders": contenders, "failed": why}


# Results


def table(result: dict[str, Any]) -> Iterator[str]:
    contenders, dtype = result["contenders"], DTYPES[result["dtype"]]
    yield (
        f"{'MB':40} | moments  | total | beyond             | counted | trimmed | building | step, ms             "
        "| CPU ms | CPU / AdamW         | loss off by (tolerance)"
    )
    for weights, title in GROUPS.items():
        mine = [name for name in contenders if ENTRIES[name].weights_in(dtype) == weights]
        if mine:
            yield f"-- {title}"
        for name in sorted(mine, key=lambda name: statistics.median(contenders[name]["total"])):
            one, entry = contenders[name], ENTRIES[name]
            megabytes = {key: statistics.median(one[key]) / MB for key in ("total", "building", "counted")}
            beyond = median_and_range([count / MB for count in one["beyond"]], ".0f")
            limit = tolerance(entry, dtype)
            trimmed = "" if one["trimmed"] is None else f"{one['trimmed'] / MB:.0f}"
            yield (
                f"{entry.label:40} | {entry.moments:8} | {megabytes['total']:5.0f} | {beyond:18} | "
                f"{megabytes['counted']:7.0f} | {trimmed:>7} | {megabytes['building']:8.0f} | "
                f"{median_and_range([1e3 * s for s in one['seconds']], '.0f'):20} | "
                f"{1e3 * statistics.median(one['cpu_seconds']):6.0f} | "
                f"{median_and_range(one['cpu_seconds_ratio'], '.2f'):19} | "
                f"{one['loss_error']:.1e} ({'another algorithm' if limit is None else f'{limit:.0e}'})"
            )
    for name, why in result["failed"].items():
        yield f"{ENTRIES[name].label:40} | {why}"
    one = contenders[REFERENCE[result["dtype"]]]
    losses = one["losses"]
    yield f"losses of {one['label']}: {losses[0]:.3f}, {', '.join(f'{loss:.3f}' for loss in losses[1:])}"


def wrong(result: dict[str, Any]) -> list[str]:
    """Return the labels of contenders whose losses are off."""
    found = []
    for name, one in result["contenders"].items():
        limit = tolerance(ENTRIES[name], DTYPES[result["dtype"]])
        if limit is not None and not one["loss_error"] <= limit:
            found.append(f"{one['label']} in {result['dtype']}")
    return found


def leanest(results: list[dict[str, Any]], key: str) -> Iterator[str]:
    """Compare the leanest contenders that keep exact weights, of each kind, by the median of `key`."""

    def least(kind: Callable[[Entry], bool]) -> tuple[float, str] | None:
        return min(
            (
                (statistics.median(one[key]), f"{one['label']}, {result['dtype']}")
                for result in results
                for name, one in result["contenders"].items()
                if ENTRIES[name].weights_in(DTYPES[result["dtype"]]) == "fp32" and kind(ENTRIES[name])
            ),
            default=None,
        )

    mine = {
        "in memory": lambda entry: entry.is_ours and not entry.is_offloaded,
        "offloaded": lambda entry: entry.is_ours and entry.is_offloaded,
    }
    peers = {
        "fp32 moments": lambda entry: not entry.is_ours and entry.moments == "fp32",
        "its own documentation's form": lambda entry: not entry.is_ours and not entry.is_combined,
        "any AdamW": lambda entry: not entry.is_ours and entry.moments != "factored",
        "any algorithm": lambda entry: not entry.is_ours,
    }
    for own_title, is_mine in mine.items():
        for title, is_peer in peers.items():
            if (own := least(is_mine)) is not None and (peer := least(is_peer)) is not None:
                ratio = own[0] / peer[0]
                yield (
                    f"{key:6} | {own_title:9} | {own[1]:44} | {own[0] / MB:5.0f} | {title:28} | {peer[1]:44} | "
                    f"{peer[0] / MB:5.0f} | {ratio:.2f} {'at most' if ratio <= GOAL else 'over'} {GOAL}"
                )


def report_plan(args: argparse.Namespace) -> int:
    """Print the planner's bytes, the optimizer's and the measured ones; return the exit code."""
    args.tokens, off = PLAN_TOKENS, []
    print(f"{'MB':40} | dtype | memory() | measured | plan, built | planned in training | measured more")
    for name, entry in ENTRIES.items():
        for dtype in args.dtypes:
            if not entry.is_ours or DTYPES[dtype] not in entry.dtypes or (args.only and name not in args.only):
                continue
            found = run_child(name, dtype, args, TRIMMING, steps=TRIMMED_STEPS)
            if "failed" in found:
                print(f"{entry.label:40} | {dtype:>5} | does not run: {found['failed']}", flush=True)
                continue
            sizes, measured = found["planned"], f"{found['total'] / MB:8.1f}"
            line = f"{entry.label:40} | {dtype:>5} | {sizes['memory'] / MB:8.1f} | {measured}"
            if "failed" in sizes:
                print(f"{line} | not planned: {sizes['failed']}", flush=True)
                off.append(f"{entry.label} in {dtype} (not planned)")
                continue
            more = found["total"] / sizes["need"] - 1
            print(f"{line} | {sizes['plan'] / MB:11.1f} | {sizes['need'] / MB:19.1f} | {100 * more:+8.1f}%", flush=True)
            if sizes["plan"] != sizes["memory"] or abs(more) > PLAN_TOLERANCE:
                off.append(f"{entry.label} in {dtype}")
    if off:
        print(f"WRONG: the plan of {'; '.join(off)}", file=sys.stderr)
    return 1 if off else 0


def head(args: argparse.Namespace) -> str:
    known = versions(("torch", "shardadam", *PACKAGES))
    threads = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} " if "OMP_NUM_THREADS" in os.environ else ""
    listed = ", ".join(f"{name} {version}" for name, version in known.items())
    return f"    {threads}python {shlex.join(sys.argv)}\n\n{hardware()}; {listed}; {time.strftime('%Y-%m-%d')}.\n"


def check_directory(directory: str | None) -> None:
    """Raise ValueError if files in `directory` would be in memory."""
    where = Path(directory or tempfile.gettempdir()).resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    point, kind = max((m for m in mounts if where.is_relative_to(m[0])), key=lambda mount: len(mount[0]))
    if kind in ("tmpfs", "ramfs"):
        raise ValueError(f"--directory: found {where} on {point} ({kind}), expected a file system on a disk")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--tokens", type=int, default=16, help="of each step")
    parser.add_argument("--only", nargs="+", choices=ENTRIES, help="these, and the references; default: all")
    parser.add_argument("--directory", help="for files of DiskOffload; default: the system's temporary directory")
    parser.add_argument("--json", help="file for all raw results")
    parser.add_argument("--resume", action="store_true", help="keep the results that the file of --json has")
    parser.add_argument("--report", action="store_true", help="run nothing; print what the file of --json has")
    parser.add_argument("--plan", action="store_true", help="compare the planner with memory() and with measurements")
    parser.add_argument("--measure", metavar="NAME", help="measure this contender only; used by one_process.py itself")
    args = parser.parse_args()
    if args.rounds < 1 or args.steps <= WARM_UP or args.width % 64:
        parser.error(f"--rounds must be at least 1, --steps more than {WARM_UP}, --width a multiple of 64")
    if (args.resume or args.report) and not args.json:
        parser.error("--resume and --report need --json, the file with results")
    if args.measure:
        Path(args.json).write_text(json.dumps(measure(args.measure, args)))
        return
    check_directory(args.directory)
    of_run, found = saved_in(args.json, args) if args.resume or args.report else (head(args), {})
    print(of_run if args.report else head(args), flush=True)
    if args.plan:
        sys.exit(report_plan(args))
    failed = {} if args.report else run_all(args, found)
    if absent := [key for key in failed if key.partition("/")[2] in REFERENCES]:
        sys.exit(f"nothing to compare with: {', '.join(absent)} did not run")
    results = [evaluated(dtype, args, found, failed) for dtype in args.dtypes]
    for result in results:
        numel = next(iter(result["contenders"].values()))["numel"]
        print(f"```\n{result['dtype']}, {numel:,} parameters, {args.tokens} tokens a step")
        print("\n".join(line.rstrip() for line in table(result)) + "\n```\n")
    print("Leanest with exact weights:\n\n```")
    print("\n".join(line for key in ("total", "beyond") for line in leanest(results, key)) + "\n```")
    off = [label for result in results for label in wrong(result)]
    if off:
        sys.exit(f"WRONG: losses differ from AdamW's: {'; '.join(off)}")


if __name__ == "__main__":
    main()
