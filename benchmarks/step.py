# SPDX-License-Identifier: Apache-2.0
"""How much time and memory does a whole training step take, compared with other optimizers?

    export THP_MEM_ALLOC_ENABLE=1 OMP_NUM_THREADS=1
    torchrun --standalone --nproc-per-node 2 benchmarks/step.py [--dtype bf16] [--json out.json]

Every rank trains the same 60.6M-parameter decoder (`contenders.py`) on 16 tokens of its own, so that forward and
backward are short and the optimizer takes most of the time. THP_MEM_ALLOC_ENABLE gives torch huge pages for large
tensors: without it, every contender spends a third of its backward in page faults of new gradients.

**Time.** In each of `--rounds` rounds every contender is built from the same weights, takes 3 steps to warm up and
`--steps-per-round` timed ones, each after a barrier, and is torn down, so that only one is in memory at a time. The
order rotates by one each round. A step takes as long as its slowest rank; a round's time is the median of its steps.
Tables give the median over rounds (and the fastest and slowest), the parts of the step on the slowest rank, and medians
(and extremes) of ratios to others in the same round. "Fastest peer" is the fastest other optimizer of that round; in
bf16 only those that keep float32 masters, as shardadam does, count. What shardadam sends during backward is part of
"backward".

**Memory.** Every contender runs in its own process group. Its memory is the proportional set size (`Pss` of
/proc/self/smaps_rollup, in which a page that k processes map counts 1/k), which a thread reads every 5 ms and after
each part of 4 steps, minus its value with only the plain model in memory, in its training dtype, and libraries loaded.
"Peak" is the highest value in a step; "building" is the highest before the first. The same run measures `state`, what
the optimizer keeps (moments, masters), and the bytes that a rank's sockets send in the last step (`wchar` of
/proc/self/io). That leaves out shared memory: where shardadam sends almost nothing, each rank has read (N-1)/N of all
gradients and parameters directly from its peers' memory.

**Losses.** In the first 5 steps of every round, every contender's losses on every rank must equal those of DDP + AdamW
(bf16: of DDP + AdamW on fp32 copies) within the relative `TOLERANCE`. Otherwise the exit code is 1.

**The limit.** A ZeRO step on these cores can hardly be faster than forward and backward alone, on all ranks at once and
without communication, plus the bytes that a rank must move, at the rate at which all ranks at once can stream (the
faster of copy and triad, on arrays far larger than the cache, timed in every round). With n parameters of e bytes on N
ranks, and moments and master of k bytes for each parameter (fp32: 8; bf16: 12),

    bytes = e n                     the N gradients of its own slice, n / N each, are read
          + 2 (k + e) n / N         moments, master and parameters of its slice are read and written
          + 2 e n (N - 1) / N       the others' parameters are read and written

(bf16: parameters of its own slice are written only, as the master is read: e n / N less.)
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import ENTRIES, Contender, Entry, Settings, make_data, make_model, no_update

WARM_UP = 3
CHECKED = 5  # losses of these first steps are compared
MEMORY_STEPS = 4
MEMORY_TIMEOUT_S = 300
STREAM_NUMEL = 2**25  # 128 MiB an array
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {  # relative; (with masters or in fp32, without)
    "fp32": (1e-4, 1e-4),
    "bf16": (1e-2, 5e-2),
}
COMPUTE = "compute"
PARTS = ("step", "forward", "backward", "update")


# Time


def run_steps(
    contender: Contender, data: list[torch.Tensor], count: int, on_part: Callable[[str], None]
) -> list[float]:
    """Trains; calls `on_part` with the name of each part when it ends, and returns the losses."""
    losses = []
    for index in range(count):
        on_part("start")
        loss = contender.forward(data[index % len(data)])
        on_part("forward")
        contender.backward(loss)
        on_part("backward")
        contender.update()
        on_part("update")
        losses.append(loss.item())
    return losses


def one_round(name: str, template: torch.nn.Module, settings: Settings, steps: int) -> dict[str, Any]:
    """Builds, times and drops a contender; returns seconds of each step on its slowest rank, by part. Collective."""
    build = no_update if name == COMPUTE else ENTRIES[name].build
    contender = build(copy.deepcopy(template), settings)
    clock: list[float] = []

    def on_part(part: str) -> None:
        if part == "start":
            dist.barrier()
        clock.append(time.perf_counter())

    losses = run_steps(contender, make_data(dist.get_rank()), WARM_UP + steps, on_part)
    contender.close()
    del contender
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

    points = torch.tensor(clock, dtype=torch.float64).view(-1, len(PARTS))[WARM_UP:]
    taken = torch.cat((points[:, -1:] - points[:, :1], points.diff()), dim=1)
    of_ranks = [torch.empty_like(taken) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, taken)
    slowest = [max(ranks, key=lambda rank: float(rank[0])).tolist() for ranks in zip(*of_ranks, strict=True)]
    return {"steps": slowest, "losses": losses[:CHECKED]}


def stream_rate() -> float:
    """Return the bytes per second that a rank moves while all ranks do: the faster of copy and triad. Collective."""
    a, b, c = (torch.ones(STREAM_NUMEL) for _ in range(3))
    forms: list[tuple[Callable[[], object], int]] = [
        (lambda: b.copy_(a), 2 * a.nbytes),
        (lambda: torch.add(a, b, alpha=0.5, out=c), 3 * a.nbytes),
    ]
    rates = []
    for run, moved in forms:
        seconds = []
        for _ in range(5):
            dist.barrier()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        rates.append(moved / statistics.median(seconds))
    mean = torch.tensor(rates, dtype=torch.float64)
    dist.all_reduce(mean)
    return float(mean.max()) / dist.get_world_size()


def least_bytes(numel: int, dtype: str, world_size: int) -> float:
    """Return the bytes that a rank must move in a step, by the formula in the module's docstring."""
    e, kept = (4, 8) if dtype == "fp32" else (2, 12)
    own = 2 * (kept + e) - (0 if dtype == "fp32" else e)
    return e * numel + own * numel / world_size + 2 * e * numel * (world_size - 1) / world_size


# Memory


def pss_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no Pss in /proc/self/smaps_rollup: a kernel without it")


def sent_bytes() -> int:
    """Return the bytes that this process has written since it started, sockets included."""
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


@contextmanager
def watching(peak: list[int]) -> Iterator[Callable[[], None]]:
    """Context manager: keep `peak[0]` at the highest `Pss` so far; yields a function that samples it at once."""

    def sample() -> None:
        peak[0] = max(peak[0], pss_bytes())

    def watch() -> None:
        while not over.wait(0.005):
            sample()

    over = threading.Event()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield sample
    finally:
        over.set()
        thread.join()
        sample()


def measure_memory(name: str, settings: Settings, json_path: str) -> None:
    """Measure one contender in this process group; rank 0 writes the measurements of all ranks."""
    entry = ENTRIES[name]
    if entry.needs is not None:
        __import__(entry.needs)
    data = make_data(dist.get_rank())
    small = no_update(make_model(settings.dtype, width=64, layers=1), settings)  # loads libraries and fills heaps
    run_steps(small, data, 2, lambda part: None)
    dist.all_reduce(torch.ones(1000))
    model = make_model(settings.dtype)
    del small
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()
    before, building, stepping, sent = pss_bytes(), [0], [0], [0]
    dist.barrier()
    with watching(building):
        contender = entry.build(model, settings)
    del model
    dist.barrier()
    with watching(stepping) as sample:

        def on_part(part: str) -> None:
            sample()
            if part == "start":
                sent[0] = sent_bytes()

        losses = run_steps(contender, data, MEMORY_STEPS, on_part)
        sent[0] = sent_bytes() - sent[0]
        dist.barrier()
    measured = {
        "building": building[0] - before,
        "peak": stepping[0] - before,
        "state": contender.state_bytes(),
        "sent": sent[0],
        "losses": losses,
    }
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, measured)
    if dist.get_rank() == 0:
        Path(json_path).write_text(json.dumps({key: [rank[key] for rank in of_ranks] for key in measured}))
    contender.close()


def run_memory(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run `measure_memory` under a new torchrun; return `{"failed": why}` if the contender cannot run."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key
        not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
        and not key.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))
    }
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; torchrun then ends its ranks

    with tempfile.TemporaryDirectory() as directory:
        out, log = Path(directory) / "memory.json", Path(directory) / "log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={dist.get_world_size()}", __file__, *sys.argv[1:]]
        command += ["--measure-memory", name, "--json", str(out)]
        with log.open("w") as to:
            process = subprocess.Popen(command, env=environment, stdout=to, stderr=to, preexec_fn=end_with_parent)
            try:
                process.wait(MEMORY_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # torchrun ends its ranks
                process.wait()
        if out.exists():
            return json.loads(out.read_text())
        errors = [line for line in log.read_text().splitlines() if "Error: " in line and "ChildFailed" not in line]
        return {"failed": (errors or [f"exit code {process.returncode}, or {MEMORY_TIMEOUT_S} s over"])[0][-300:]}


# Results


def median_and_range(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def evaluate(result: dict[str, Any]) -> None:
    """Add to the raw times each contender's round times, its ratios, and the error of its losses."""
    contenders, dtype = result["contenders"], result["dtype"]
    for one in contenders.values():
        one["round_s"] = [statistics.median(step[0] for step in a_round["steps"]) for a_round in one["rounds"]]
        steps = [step for a_round in one["rounds"] for step in a_round["steps"]]
        one["parts_s"] = {
            part: statistics.median(some) for part, some in zip(PARTS, zip(*steps, strict=True), strict=True)
        }
    rivals = [name for name in contenders if name != COMPUTE and not ENTRIES[name].is_ours]
    if dtype == "bf16":
        rivals = [name for name in rivals if ENTRIES[name].has_master]
    fastest = [min(some) for some in zip(*(contenders[name]["round_s"] for name in rivals), strict=True)]
    moved = least_bytes(result["numel"], dtype, result["world_size"])
    limit = [
        compute + moved / rate
        for compute, rate in zip(contenders[COMPUTE]["round_s"], result["stream_bytes_per_s"], strict=True)
    ]
    result["limit_s"], result["least_bytes"], result["fastest_peer_s"] = limit, moved, fastest
    result["fastest_peer"] = min(rivals, key=lambda name: statistics.median(contenders[name]["round_s"]))
    reference = contenders["ddp" if dtype == "fp32" else "ddp-master"]["rounds"][0]["losses"]
    for name, one in contenders.items():
        for key, others in (("fastest", fastest), ("ddp", contenders["ddp"]["round_s"]), ("limit", limit)):
            one[f"to_{key}"] = [a / b for a, b in zip(one["round_s"], others, strict=True)]
        if name != COMPUTE:
            errors = [
                abs(a - b) / abs(b)
                for a_round in one["rounds"]
                for losses, expected in zip(a_round["losses"], reference, strict=True)
                for a, b in zip(losses, expected, strict=True)
            ]
            one["loss_error"] = max(errors, key=lambda error: (math.isnan(error), error))  # NaN is the worst
            one["loss_tolerance"] = TOLERANCE[dtype][0 if ENTRIES[name].has_master else 1]


def table(result: dict[str, Any]) -> Iterator[str]:
    contenders, mega = result["contenders"], 1e6
    yield f"{'':32} | masters | step, ms             | forward | backward | update | / fastest peer      | / DDP"
    ordered = sorted((n for n in contenders if n != COMPUTE), key=lambda n: statistics.median(contenders[n]["round_s"]))
    for name in ordered:
        one, entry = contenders[name], ENTRIES[name]
        milliseconds = [1e3 * s for s in one["round_s"]]
        parts = {part: 1e3 * s for part, s in one["parts_s"].items()}
        masters = "" if result["dtype"] == "fp32" else "yes" if entry.has_master else "no"
        yield (
            f"{entry.label:32} | {masters:>7} | {median_and_range(milliseconds, '.0f'):20} | {parts['forward']:7.1f} | "
            f"{parts['backward']:8.1f} | {parts['update']:6.1f} | {median_and_range(one['to_fastest'], '.2f'):19} | "
            f"{median_and_range(one['to_ddp'], '.2f')}"
        )
    yield ""
    yield f"{'':32} | peak MB, mean | max  | building | state MB | sent MB a step | loss off by (tolerance)"
    for name in ordered:
        one, memory = contenders[name], contenders[name].get("memory")
        columns = " " * 13 + " | " + " " * 4 + " | " + " " * 8 + " | " + " " * 8 + " | " + " " * 14
        if memory is not None:
            mean = {key: statistics.mean(memory[key]) / mega for key in ("peak", "building", "state", "sent")}
            columns = (
                f"{mean['peak']:13.0f} | {max(memory['peak']) / mega:4.0f} | {mean['building']:8.0f} | "
                f"{mean['state']:8.1f} | {mean['sent']:14.1f}"
            )
        yield f"{ENTRIES[name].label:32} | {columns} | {one['loss_error']:.1e} ({one['loss_tolerance']:.0e})"
    for name, why in result["failed"].items():
        yield f"{ENTRIES[name].label:32} | does not run: {why}"
    yield ""
    rates = [rate / 1e9 for rate in result["stream_bytes_per_s"]]
    compute = [1e3 * s for s in contenders[COMPUTE]["round_s"]]
    limit = [1e3 * s for s in result["limit_s"]]
    yield f"fastest peer: {ENTRIES[result['fastest_peer']].label}"
    yield (
        f"limit: {median_and_range(limit, '.0f')} ms = forward and backward alone, "
        f"{median_and_range(compute, '.0f')} ms, + {result['least_bytes'] / mega:.0f} MB a rank "
        f"at {median_and_range(rates, '.1f')} GB/s"
    )
    for name in ordered:
        if ENTRIES[name].is_ours:
            yield f"  {ENTRIES[name].label}: {median_and_range(contenders[name]['to_limit'], '.2f')} of the limit"


def versions(packages: Iterable[str] = ("torch", "shardadam", "deepspeed", "fairscale")) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return (
        f"{os.cpu_count()} cores of {model}, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    )


# The whole benchmark


def chosen(args: argparse.Namespace, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """Return the names of the contenders to run, references first; and why the others cannot run."""
    able: dict[str, Entry] = {
        name: entry
        for name, entry in ENTRIES.items()
        if dtype in entry.dtypes and (entry.can_clip or args.max_grad_norm is None)
    }
    peers = args.peers.split(",") if args.peers else [name for name, entry in able.items() if not entry.is_ours]
    mine = args.ours.split(",") if args.ours else [name for name, entry in able.items() if entry.is_ours]
    if unknown := [name for name in (*peers, *mine) if name not in able]:
        sys.exit(f"unknown in {args.dtype}, with this clipping: {', '.join(unknown)}; there are: {', '.join(able)}")
    references = ["ddp"] if dtype == torch.float32 else ["ddp", "ddp-master"]
    names = list(dict.fromkeys((*references, *peers, *mine)))
    missing = {name: f"{able[name].needs} is not installed" for name in names if not able[name].is_installed}
    return [name for name in names if name not in missing], missing


def compare(args: argparse.Namespace, settings: Settings) -> int:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    names, failed = chosen(args, settings.dtype)
    memory: dict[str, Any] = {}
    if rank == 0 and not args.no_memory:
        for name in names:
            print(f"memory of {name}", file=sys.stderr, flush=True)
            memory[name] = run_memory(name, args)
    agreed = [memory]
    dist.broadcast_object_list(agreed, src=0)
    failed |= {name: one["failed"] for name, one in agreed[0].items() if "failed" in one}
    names = [name for name in names if name not in failed]

    template = make_model(settings.dtype)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in (COMPUTE, *names)}
    rates = []
    for index in range(args.rounds):
        rates.append(stream_rate())
        turns = list(rounds)
        shift = index % len(turns)
        for name in (*turns[shift:], *turns[:shift]):
            if rank == 0:
                print(f"round {index + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
            rounds[name].append(one_round(name, template, settings, args.steps_per_round))
    of_ranks: list[Any] = [None] * world_size
    dist.all_gather_object(of_ranks, {name: [a_round["losses"] for a_round in some] for name, some in rounds.items()})
    for name, some in rounds.items():
        for index, a_round in enumerate(some):
            a_round["losses"] = [losses[name][index] for losses in of_ranks]
    result = {
        "command": f"{_environment()} torchrun --standalone --nproc-per-node {world_size} {shlex.join(sys.argv)}",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": versions(),
        "world_size": world_size,
        "dtype": args.dtype,
        "numel": sum(p.numel() for p in template.parameters()),
        "settings": {"max_grad_norm": args.max_grad_norm, "bucket_mb": args.bucket_mb, "rounds": args.rounds},
        "stream_bytes_per_s": rates,
        "failed": failed,
        "contenders": {
            name: {"label": ENTRIES[name].label if name in ENTRIES else name, "rounds": some}
            | ({"memory": memory[name]} if name in memory else {})
            for name, some in rounds.items()
        },
    }
    if rank == 0:
        evaluate(result)
        report(result, args.json)
    wrong = [result["contenders"][name].get("loss_error", 0.0) for name in names] if rank == 0 else []
    off = [
        name
        for name, error in zip(names, wrong, strict=rank == 0)
        if not error <= result["contenders"][name]["loss_tolerance"]
    ]
    off += [name for name in failed if ENTRIES[name].is_ours]
    shared = [off]
    dist.broadcast_object_list(shared, src=0)
    if rank == 0 and off:
        print(f"WRONG: losses of {', '.join(off)} differ from the reference's, or it does not run", file=sys.stderr)
    return 1 if shared[0] else 0


def report(result: dict[str, Any], json_path: str | None) -> None:
    known = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print(f"    {result['command']}\n")
    print(f"{result['hardware']}; {known}; {result['date']}.\n\n```")
    print(f"{result['world_size']} ranks, {result['dtype']}, {result['numel']:,} parameters")
    print("\n".join(line.rstrip() for line in table(result)) + "\n```")
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps-per-round", type=int, default=5)
    parser.add_argument(
        "--peers", help="names in contenders.ENTRIES, separated by commas; default: all. References always run"
    )
    parser.add_argument("--ours", help="the same for shardadam's entries")
    parser.add_argument("--max-grad-norm", type=float, help="clipping of all contenders")
    parser.add_argument("--bucket-mb", type=float, help="of shardadam")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", help="file for all raw results")
    parser.add_argument("--measure-memory", metavar="NAME", help="measure this contender only; used by step.py itself")
    args = parser.parse_args()
    if args.rounds < 1 or args.steps_per_round < CHECKED - WARM_UP:
        parser.error(f"--rounds must be at least 1, --steps-per-round at least {CHECKED - WARM_UP}")
    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    torch.set_num_threads(1)
    settings = Settings(dtype=DTYPES[args.dtype], max_grad_norm=args.max_grad_norm, bucket_mb=args.bucket_mb)
    code = 0
    if args.measure_memory:
        measure_memory(args.measure_memory, settings, args.json)
    else:
        code = compare(args, settings)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(code)


def _environment() -> str:
    names = ("THP_MEM_ALLOC_ENABLE", "OMP_NUM_THREADS")
    return " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


if __name__ == "__main__":
    main()
