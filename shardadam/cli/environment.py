# SPDX-License-Identifier: Apache-2.0
"""``shardadam env``: describes this machine for a bug report. Reads, and changes nothing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import socket
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardadam.cli.text import binary_size, show, table
from shardadam.transport.unix_sockets import why_unsupported
from shardadam.version import __version__

PACKAGES = ("numpy", "safetensors", "accelerate", "transformers", "lightning", "peft", "deepspeed")
VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
)
PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TRITON_")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "env",
        help="describe this machine, for a bug report",
        description="Prints versions, hardware, the environment variables that matter, and what works here. Paste the "
        "output into a bug report; check first that the variables contain nothing private.",
    )
    command.add_argument("--json", action="store_true", help="print JSON, for programs: an object of sections")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    found = environment()
    if options.json:
        show(json.dumps(found, indent=2))
    else:
        show("\n\n".join(_section(name, facts) for name, facts in found.items()))
    return 0


def _section(name: str, facts: dict[str, Any]) -> str:
    rows = [(f"  {key}", _text(value)) for key, value in facts.items()] or [("  none", "")]
    return f"{name}\n{table(rows, right=())}"


def _text(value: Any) -> str:
    if value is None:
        return "no"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "; ".join(value) or "none" if isinstance(value, list) else str(value)


def environment() -> dict[str, dict[str, Any]]:
    """Returns facts by section and name: strings, numbers, booleans, lists of strings, or None if not installed or not
    found.
    """
    return {
        "versions": _versions(),
        "machine": _machine(),
        "gpus": _gpus(),
        "works here": _works(),
        "environment variables": dict(_variables()),
    }


def _versions() -> dict[str, Any]:
    versions = {
        "shardadam": __version__,
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None,  # type: ignore[no-untyped-call]
        "triton": _version("triton"),
        "numba": _version("numba"),
    }
    return versions | {name: version for name in PACKAGES if (version := _version(name)) is not None}


def _version(package: str) -> str | None:
    """Returns the version of a package without importing it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    nbytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read("/sys/fs/cgroup/memory.max")
    return {
        "system": _pretty_name(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "CPU": _cpu(),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "threads of torch": torch.get_num_threads(),
        "memory": binary_size(nbytes),
        "memory limit": binary_size(int(limit)) if limit.isdecimal() else None,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _pretty_name() -> str | None:
    match = re.search(r'^PRETTY_NAME="?(.*?)"?$', _read("/etc/os-release"), re.MULTILINE)
    return None if match is None else match[1]


def _cpu() -> str:
    match = re.search(r"^model name\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return platform.processor() or platform.machine() if match is None else match[1]


def _gpus() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _read("/proc/driver/nvidia/version"))
    facts: dict[str, Any] = {"driver": None if driver is None else driver[1]}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        facts[f"cuda:{index}"] = f"{device.name}, {binary_size(device.total_memory)}, {capability}"
    return facts


def _works() -> dict[str, Any]:
    unsupported = why_unsupported()
    return {
        "torch.distributed": dist.is_available(),
        "Gloo": dist.is_gloo_available(),
        "NCCL": dist.is_nccl_available(),
        "shared memory between ranks": unsupported is None or f"no: {unsupported}",
        "pidfd (deaths are noticed at once)": _has_pidfd(),
        "triton kernels": _triton(),
        "host name resolves": _resolves(),
    }


def _has_pidfd() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _triton() -> bool | str:
    if importlib.util.find_spec("triton") is None:
        return "no: triton is not installed"
    if torch.cuda.is_available():
        return True
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    return "in its interpreter only: no GPU" if interprets else "no: no GPU"


def _resolves() -> bool:
    """Returns whether the host's name has an address. Gloo listens on it, unless GLOO_SOCKET_IFNAME is set."""
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return False
    return True


def _variables() -> Iterator[tuple[str, str]]:
    for name, value in sorted(os.environ.items()):
        if name in VARIABLES or name.startswith(PREFIXES):
            yield name, value
