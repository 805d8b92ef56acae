# SPDX-License-Identifier: Apache-2.0
"""Runs everything that needs a GPU in one go: tests, bandwidth, memory, a trace, and a profile of the kernel.

    python benchmarks/gpu.py --to DIR [--minutes 9.5] [--only tests update ...] [--rehearse]

Runs the parts one after the other, the most important first, each in its own process with a time limit; if one fails or
times out, the others still run. Writes to DIR: `result.json` with all results, hardware and versions, the output of
each part as text, pictures, and `summary.md`, which compares the results with the goals. Exits with 1 if a part failed.

`--rehearse` runs every part with small numbers, with or without a GPU: it tests the script, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from update import versions

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS, PEERS, GOAL = "#D55E00", "#9A9A9A", "#0072B2"
KERNELS = "equals_reference and (bfloat16-split-int8 or float32-own-fp32)"


@dataclass(frozen=True)
class Part:
    """`limit_s`: of a real run. `tool`: an external program that the part needs and that may not be installed."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    tool: str | None = None


def parts(to: Path, rehearse: bool) -> list[Part]:
    python = sys.executable
    small = ("--rehearse",) if rehearse else ()
    sizes = ("1024", "4096", "16384") if not rehearse else ("1",)
    pytest = (python, "-m", "pytest", str(ROOT / "tests" / "test_gpu.py"), "-m", "gpu", "-q", "-p", "no:cacheprovider")
    bandwidth = (python, str(HERE / "update.py"), "--rounds", "1" if rehearse else "5")
    train = (python, str(HERE / "gpu_train.py"))
    int8 = ("--only", "bfloat16", "split", "int8", "--mib", sizes[0])
    profiled = ("--kernel-name", "update", "--launch-skip", "20", "--launch-count", "1", "--set", "detailed")
    return [
        Part("tests", (*pytest, "-rs", "--junitxml", str(to / "tests.xml")), 180),
        Part("update", (*bandwidth, "--mib", *sizes, "--json", str(to / "update.json")), 130),
        Part("steps", (*train, "steps", *small), 110),
        Part("trace", (python, str(HERE / "gpu_trace.py"), "--to", str(to), *small), 40),
        Part("capture", (*train, "capture", *small), 40),
        Part("ranks", (*train, "ranks", *small), 40),
        Part("largest", (*train, "largest", *small), 90),
        Part("ncu", ("ncu", *profiled, *bandwidth, *int8), 60, "ncu"),
        Part("tune", (*bandwidth, "--tune", "--mib", sizes[0], "--json", str(to / "tune.json")), 60),
        Part(
            "memcheck", ("compute-sanitizer", "--error-exitcode", "9", *pytest, "-k", KERNELS), 60, "compute-sanitizer"
        ),
        Part(
            "racecheck",
            ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *pytest, "-k", KERNELS),
            60,
            "compute-sanitizer",
        ),
    ]


def run(part: Part, to: Path, limit_s: float) -> dict[str, Any]:
    """Run a part; return how it ended, and the JSON that it printed last or wrote to a file."""
    if part.tool is not None and shutil.which(part.tool) is None:
        return {"end": f"{part.tool} is not installed"}
    if limit_s <= 0:
        return {"end": "no time was left"}
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    output = to / f"{part.name}.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            part.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            end = f"exit code {process.wait(limit_s)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end = f"cut off after {limit_s:.0f} s"
    found: dict[str, Any] = {"end": end, "seconds": time.monotonic() - start, "command": list(part.command)}
    lines = output.read_text().splitlines()
    found["last_line"] = lines[-1][:300] if lines else ""
    for text in (lines[-1] if lines else "", read(to / f"{part.name}.json")):
        if text.startswith("{"):
            found["last_line"], found["found"] = "", json.loads(text)
    return found


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def hardware() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"device": f"no GPU, {platform.processor() or platform.machine()}"}
    index = torch.cuda.get_device_properties(0)
    found = {"device": index.name, "memory": f"{index.total_memory / 2**30:.0f} GiB", "cuda": str(torch.version.cuda)}
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.mem,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    ]
    if shutil.which("nvidia-smi"):
        found["driver, clocks, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


# Results, compared with the goals


def summary(result: dict[str, Any]) -> Iterable[str]:
    yield "# benchmarks/gpu.py\n"
    yield ", ".join(f"{key} {value}" for key, value in {**result["hardware"], **result["versions"]}.items()) + "\n"
    if result["rehearsal"]:
        yield "A rehearsal: the numbers mean nothing.\n"
    yield "| part | end | s | last line |\n|---|---|---|---|"
    for name, one in result["parts"].items():
        yield f"| {name} | {one['end']} | {one.get('seconds', 0):.0f} | {one.get('last_line', '')} |"
    forms = found_of(result, "update").get("forms", [])
    if forms:
        yield "\n| format | MiB | GB/s | of copy | goal |\n|---|---|---|---|---|"
        for form in forms:
            if "floor" in form:
                goal = 0.8 if form["moments"] == "int8" else 0.9
                verdict = f"{goal} {'met' if form['floor'] >= goal else 'MISSED'}"
                yield f"| {label(form)} | {form['mib']:g} | {form['gbs']:.0f} | {form['floor']:.2f} | {verdict} |"
        yield "\n| format | peer | its time / ours |\n|---|---|---|"
        for form in forms:
            for peer, one in form.get("peers", {}).items():
                yield (
                    f"| {label(form)} | {peer} | {one['ratio']:.2f} |"
                    if isinstance(one, dict)
                    else (f"| {label(form)} | {peer} | {one} |")
                )
    for name, one in found_of(result, "ranks").items():
        if name != "job" and one["measured"]:
            share = 100 * (one["measured"] / one["planned"] - 1)
            yield f"\nranks {name}: measured against planned {share:+.2f}% (goal 2%)"
    for name, one in found_of(result, "capture").items():
        if name != "job":
            yield f"\ncapture, {name} moments: {'equal to eager' if one['equal'] else 'NOT EQUAL to eager'}"
    trace = found_of(result, "trace")
    if trace:
        yield f"\ntrace: the host waited {len(trace['waits'])} times; {trace['streams']}"


def found_of(result: dict[str, Any], part: str) -> dict[str, Any]:
    found: dict[str, Any] = result["parts"].get(part, {}).get("found", {})
    return found


def label(form: dict[str, Any]) -> str:
    master = "" if form["master"] == "auto" else f", {form['master']} master"
    return f"{form['dtype'].removeprefix('torch.')}{master}, {form['moments']} moments"


def draw_bandwidth(forms: list[dict[str, Any]], path: Path) -> None:
    forms = [form for form in forms if "floor" in form]
    sizes = sorted({form["mib"] for form in forms})
    names = list(dict.fromkeys(map(label, forms)))
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(names) + 1.5))
    for index, size in enumerate(sizes):
        of_size = [form for form in forms if form["mib"] == size]
        places = [names.index(label(form)) + 0.27 * (index - (len(sizes) - 1) / 2) for form in of_size]
        shade = 0.45 + 0.55 * (index + 1) / len(sizes)
        axes.barh(places, [form["floor"] for form in of_size], 0.25, color=OURS, alpha=shade, label=f"{size:g} MiB")
    for row, name in enumerate(names):
        goal = 0.8 if "int8" in name else 0.9
        axes.plot([goal, goal], [row - 0.45, row + 0.45], color=GOAL, lw=2, label="goal" if row == 0 else None)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("share of the bandwidth of a copy")
    axes.legend(ncol=4, loc="upper center", bbox_to_anchor=(0.4, -0.12), frameon=False)
    save(figure, path)


def draw_steps(found: dict[str, Any], path: Path) -> None:
    rows = {name: one for name, one in found["contenders"].items() if isinstance(one, dict)}
    names = list(rows)
    colours = [OURS if name.startswith("shardadam") else PEERS for name in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.4 * len(names) + 1.5), sharey=True)
    left.barh(names, [1e3 * statistics.median(rows[name]["seconds"]) for name in names], color=colours)
    left.axvline(
        1e3 * statistics.median(found["forward_backward"]["seconds"]), color=GOAL, label="forward and backward"
    )
    left.set_xlabel("ms a step")
    left.legend(frameon=False)
    right.barh(names, [rows[name]["peak_bytes"] / 1e9 for name in names], color=colours)
    right.set_xlabel("peak memory, GB")
    left.invert_yaxis()
    figure.suptitle(f"{found['numel'] / 1e9:.2f}B parameters, bf16")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight", dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("found no CUDA device; run it on one, or give --rehearse")
    to = args.to.resolve()
    to.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    result: dict[str, Any] = {"rehearsal": args.rehearse, "hardware": hardware(), "versions": versions(), "parts": {}}
    known = parts(to, args.rehearse)
    if unknown := set(args.only) - {part.name for part in known}:
        parser.error(f"--only: found {', '.join(sorted(unknown))}, expected of {', '.join(p.name for p in known)}")
    for part in known:
        if args.only and part.name not in args.only:
            continue
        if args.rehearse and part.name == "tune":
            continue  # needs the compiled kernel
        one = result["parts"][part.name] = run(part, to, min(part.limit_s, end - time.monotonic()))
        print(
            f"{part.name:>10} | {one['end']} | {one.get('seconds', 0):.0f} s | {one.get('last_line', '')}", flush=True
        )
        (to / "result.json").write_text(json.dumps(result, indent=1))
    (to / "summary.md").write_text("\n".join(summary(result)) + "\n")
    if forms := found_of(result, "update").get("forms"):
        draw_bandwidth(forms, to / "bandwidth.png")
    if steps := found_of(result, "steps"):
        draw_steps(steps, to / "steps.png")
    print(to / "summary.md")
    bad = [name for name, one in result["parts"].items() if not one["end"].endswith(("exit code 0", "not installed"))]
    sys.exit(f"failed: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
