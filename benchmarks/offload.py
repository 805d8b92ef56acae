# SPDX-License-Identifier: Apache-2.0
"""Does a run whose state is larger than its memory train with ``DiskOffload``, and how much slower than it must be?

    OMP_NUM_THREADS=2 python benchmarks/offload.py [--limit-mb 1000] [--steps 6] [--directory /var/tmp]

Trains 100M bfloat16 parameters with float32 moments and masters (1.2 GB of state) in one process: first without a
limit and with the state in memory, then with the state in files, in a control group (version 2, or 1) that may use
``--limit-mb`` of memory, page cache included. Both print a checksum of all parameters, which must be equal. The disk's
speed is measured in the same control group, by the same reads and writes of whole buckets, alone and both at once; the
fastest counts. A step cannot be faster than it is in memory, nor than its bytes pass to and from the disk. Needs Linux,
and the right to make a control group; without it, the limited run is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LAYERS, WIDTH = 96, 1024
CGROUP = Path("/sys/fs/cgroup")


# The runs, each in a process of its own


def train(update: str, directory: str | None, steps: int, batch: int) -> dict[str, Any]:
    import torch
    from torch import nn

    from shardadam import DiskOffload, Precision, ShardedAdamW
    from shardadam.offload.files import memory_of

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    optimizer = ShardedAdamW(
        model.parameters(),
        precision=Precision(master="fp32"),
        update=update,  # type: ignore[arg-type]
        offload=None if directory is None else DiskOffload(directory),
    )
    whole, last = [], []
    for step in range(steps):
        x = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(step))
        begin = time.perf_counter()
        model(x).square().mean().backward()
        middle = time.perf_counter()
        optimizer.step()
        whole.append(time.perf_counter() - begin)
        last.append(time.perf_counter() - middle)
        optimizer.zero_grad()
    memory = optimizer.memory()
    checksum = 0
    for parameter in model.parameters():
        checksum = zlib.crc32(memory_of(parameter.detach()), checksum)
    return {
        "whole": whole[1:],
        "step": last[1:],
        "checksum": checksum,
        "numel": sum(p.numel() for p in model.parameters()),
        "state": memory.moments + memory.master + memory.on_disk,
        "buffers": memory.offload_buffers,
        "buckets": [bucket.plan.shard_numel for bucket in optimizer._engine.parameters.buckets],
        "torch": torch.__version__,
    }


def disk(directory: str, nbytes: int, block: int, rounds: int) -> dict[str, Any]:
    """Return seconds to read and to write ``nbytes``, alone and both at once, in blocks of ``block``."""
    from shardadam.offload.files import StateFile, aligned, memory_of
    from shardadam.offload.regions import whole_blocks

    block = whole_blocks(block)
    count = nbytes // block
    file = StateFile(Path(directory), count * block)
    buffers = [aligned(block, pinned=False) for _ in range(2)]
    into, content = (memory_of(buffer) for buffer in buffers)

    def read() -> None:
        for index in range(count):
            file.read(into, index * block)

    def write() -> None:
        for index in range(count):
            file.write(content, index * block)
            if not file.is_direct:
                file.flush(index * block, block)

    def both() -> None:
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(write), pool.submit(read)]:
                future.result()

    write()
    found: dict[str, Any] = {"is_direct": file.is_direct, "bytes": count * block}
    parts: dict[str, Callable[[], None]] = {"read": read, "write": write, "both": both}
    for _ in range(rounds):
        for name, part in parts.items():
            begin = time.perf_counter()
            part()
            found.setdefault(name, []).append(time.perf_counter() - begin)
    return found


def child(arguments: dict[str, Any]) -> None:
    kind = arguments.pop("kind")
    print(json.dumps({"train": train, "disk": disk}[kind](**arguments)))


# Control groups


@contextmanager
def control_group(limit: int) -> Iterator[tuple[Path, int] | str]:
    """Context manager: make a control group of ``limit`` bytes; give it and its version, or why there is none."""
    name = f"shardadam-offload-{os.getpid()}"
    controllers = CGROUP / "cgroup.controllers"
    try:
        if controllers.exists() and "memory" in controllers.read_text():
            group, version = CGROUP / name, 2
            (CGROUP / "cgroup.subtree_control").write_text("+memory")
            group.mkdir()
            (group / "memory.max").write_text(str(limit))
            (group / "memory.swap.max").write_text("0")
        elif (CGROUP / "memory" / "memory.limit_in_bytes").exists():
            group, version = CGROUP / "memory" / name, 1
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(limit))
        else:
            yield "no control groups with a memory controller under /sys/fs/cgroup"
            return
    except OSError as error:
        yield f"no right to make a control group ({error})"
        return
    try:
        yield group, version
    finally:
        time.sleep(0.2)
        group.rmdir()


def run(group: Path | None, **arguments: Any) -> dict[str, Any]:
    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments} ended with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# Results


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def peak_of(group: Path, version: int) -> int:
    """Return the most bytes that the control group has used."""
    path = group / ("memory.peak" if version == 2 else "memory.max_usage_in_bytes")
    return int(path.read_text()) if path.exists() else 0


def compare(update: str, arguments: argparse.Namespace) -> None:
    common: dict[str, Any] = {"update": update, "steps": arguments.steps + 1, "batch": arguments.batch}
    resident = run(None, kind="train", directory=None, **common)
    state, numel = resident["state"], resident["numel"]
    print(f'\nupdate="{update}", {numel:,} bfloat16 parameters, {state / 1e6:,.0f} MB of state, ', end="")
    print(f"torch {resident['torch']}, {arguments.steps} steps of batches of {arguments.batch}")
    print(f"  state in memory, no limit: {spread(resident['whole'])}, of it step() {spread(resident['step'])}")
    limit = arguments.limit_mb * 10**6
    if limit >= state:
        sys.exit(f"--limit-mb: found {arguments.limit_mb}, expected less than the state, {state / 1e6:.0f} MB")
    with control_group(limit) as found:
        if isinstance(found, str):
            print(f"  skipped: {found}")
            return
        group, version = found
        block = max(resident["buckets"]) * 4
        speed = run(group, kind="disk", directory=arguments.directory, nbytes=state, block=block, rounds=3)
        offloaded = run(group, kind="train", directory=arguments.directory, **common)
        used = peak_of(group, version)
    rates = {name: speed["bytes"] / min(speed[name]) for name in ("read", "write", "both")}
    rates["both"] *= 2
    # Reading and writing one after the other, or both at once: whatever is faster
    least = min(state / rates["read"] + state / rates["write"], 2 * state / rates["both"])
    print(f"  state in files, at most {limit / 1e6:,.0f} MB: {spread(offloaded['whole'])}, ", end="")
    print(f"of it step() {spread(offloaded['step'])}")
    print(f"  control group version {version}: at most {used / 1e6:,.0f} MB used; ", end="")
    print(f"two buffers of {offloaded['buffers'] / 2e6:.0f} MB")
    print(f"  disk, blocks of {block / 2**20:.0f} MiB, direct: {speed['is_direct']}; ", end="")
    print(", ".join(f"{name} {rate / 1e9:.2f} GB/s" for name, rate in rates.items()))
    print(f"  {2 * state / 1e6:,.0f} MB a step take the disk at least {least:.2f} s")
    for name in ("whole", "step") if update == "step" else ("whole",):
        bound = max(statistics.median(resident[name]), least)
        ratio = statistics.median(offloaded[name]) / bound
        print(f"  {'whole step' if name == 'whole' else 'step()'}: {ratio:.2f} times what it must take, {bound:.2f} s")
    same = "equal, bit for bit" if resident["checksum"] == offloaded["checksum"] else "DIFFERENT"
    print(f"  parameters after {arguments.steps + 1} steps: {same} ({resident['checksum']:08x})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-mb", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--directory", default="/var/tmp")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(json.loads(arguments.child))
        return
    print(f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, ", end="")
    print(f"{platform.system()} {platform.release()}, load {os.getloadavg()[0]:.1f}")
    for update in ("step", "backward"):
        compare(update, arguments)


if __name__ == "__main__":
    main()
