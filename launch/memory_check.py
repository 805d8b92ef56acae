# SPDX-License-Identifier: Apache-2.0
"""Does training fit into memory, and if not, which setting would: decided on all ranks alike, before training.

What the optimizer takes is planned (shardadam.planner), what a forward pass keeps for backward is measured. Temporaries
of single operations, the doubling of parameters while an optimizer is built, and what Python and torch take themselves
are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from arguments import Ranks
from report import megabytes
from shardadam.planner import Need, PlannedParameter, Setting, adamw_need, fitting, need

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Bytes of "2GB", "1.5GiB", "500 MB"; raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in UNITS:
        raise ValueError(f"found {text!r}, expected a size such as 500MB or 2GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


# What there is


@dataclass(frozen=True)
class Room:
    """Bytes that there are for training's tensors.

    Args:
        shared: of a host, whose ranks divide it; of one rank, if `ranks` is None.
        ranks: ranks of the host now.
        held: a rank's parameters, which are in memory already and therefore no longer part of what is free.
        source: where the number comes from, for the reader of the log.
    """

    shared: int
    ranks: Ranks | None
    held: int
    source: str

    def on(self, world_size: int) -> int:
        """For each of `world_size` ranks on as many hosts as now."""
        if self.ranks is None:
            return self.shared + self.held
        hosts = -(-self.ranks.world_size // self.ranks.local_world_size)
        return self.shared // -(-world_size // hosts) + self.held


def room(limit: int | None, held: int, ranks: Ranks, device: torch.device) -> Room | None:
    """Collective: the least that any rank finds; None where a machine does not tell, and nothing can be refused."""
    if limit is not None:
        return Room(limit, None, 0, f"--memory-limit {megabytes(limit)}")
    if device.type == "cuda":
        free, source = torch.cuda.mem_get_info(device)[0], "free on the GPU"
    else:
        free, source = free_host_bytes(), f"free on this host, over {ranks.local_world_size} ranks"
    if dist.is_initialized():
        least = torch.tensor(-1 if free is None else free, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        free = int(least) if least >= 0 else None
    if free is None:
        return None
    return Room(free, None if device.type == "cuda" else ranks, held, source)


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """What the host has left, or the cgroup of this process if that is less; None where neither can be read."""
    found = [left for left in (*meminfo(root), *cgroup(root)) if left is not None]
    return max(0, min(found)) if found else None


def meminfo(root: Path) -> list[int]:
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return []
    return [int(kilobytes) * 1024 for kilobytes in re.findall(r"MemAvailable:\s+(\d+) kB", text)]


def cgroup(root: Path) -> list[int]:
    """What is left of each limit above this process, in cgroups of version 2 or 1. Cache that can go counts as left."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            top, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        place = top / name.strip("/")
        for directory in (place, *place.parents):
            found.append(left_of(directory / limit, directory / used, directory / "memory.stat", cache))
            if directory == top:
                break
    return [left for left in found if left is not None]


def left_of(limit: Path, used: Path, statistics: Path, cache: str) -> int | None:
    """None: there is no limit (version 1 writes a huge number), or no such file."""
    try:
        most = int(limit.read_text())
        freeable = re.findall(rf"^{cache} (\d+)$", statistics.read_text(), re.MULTILINE)
        return most - int(used.read_text()) + sum(map(int, freeable)) if most < 2**60 else None
    except (OSError, ValueError):
        return None


# What is needed


def kept_bytes(forward: Callable[[], Tensor], parameters: Sequence[Tensor]) -> tuple[int, set[int]]:
    """Runs forward and backward once: bytes that forward keeps for backward besides `parameters`, and which of them
    (by position) receive a gradient. No gradient stays, and none but the newest exists at a time.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is taken twice
    reached: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    def dropped(index: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            reached.add(index)
            parameter.grad = None

        return hook

    hooks = [
        parameter.register_post_accumulate_grad_hook(dropped(index))
        for index, parameter in enumerate(parameters)
        if parameter.requires_grad
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    count = sum(kept.values())
    alive.clear()
    loss.backward()
    for hook in hooks:
        hook.remove()
    return count, reached


@dataclass(frozen=True)
class Demand:
    """Bytes of one rank in training."""

    need: Need
    activations: int

    @property
    def total(self) -> int:
        return self.need.total + self.activations

    def __str__(self) -> str:
        parts = [
            f"{name} {megabytes(count)}"
            for name, count in (
                ("parameters", self.need.parameters),
                ("gradients", self.need.gradients),
                ("optimizer", self.need.optimizer),
                ("activations", self.activations),
            )
        ]
        return f"{megabytes(self.total)} a rank ({', '.join(parts)})"


@dataclass(frozen=True)
class Workload:
    """What is to be trained and how.

    Args:
        parameters: in the optimizer's order, frozen ones too.
        text_bytes: of activations, of each text of a micro-batch.
        texts: in a step, over all ranks and all of `accumulate`.
    """

    parameters: Sequence[PlannedParameter]
    setting: Setting
    sharded: bool
    text_bytes: float
    texts: int
    accumulate: int

    def activations(self, world_size: int, accumulate: int) -> int | None:
        """On each rank; None where a step cannot be divided like that."""
        if self.texts % (world_size * accumulate):
            return None
        return round(self.text_bytes * (self.texts // (world_size * accumulate)))

    def demand(self) -> Demand:
        found = need(self.parameters, self.setting) if self.sharded else adamw_need(self.parameters)
        return self._with_activations(found)

    def adamw_demand(self) -> Demand:
        return self._with_activations(adamw_need(self.parameters))

    def _with_activations(self, found: Need) -> Demand:
        activations = self.activations(self.setting.world_size, self.accumulate)
        if activations is None:
            raise ValueError(f"{self.texts} texts cannot be divided over {self.setting.world_size} x {self.accumulate}")
        return Demand(found, activations)


def nearest(work: Workload, there: Room) -> tuple[list[str], Demand] | None:
    """The options to change so that it fits, as they are typed, and what it takes then; None: no change suffices.

    In this order: what the optimizer can change on as many ranks (shardadam.planner.fitting), smaller micro-batches
    with it, and the same on other numbers of ranks.
    """
    for may_move in (False, True):
        accumulate = work.accumulate
        while work.activations(work.setting.world_size, accumulate) is not None:
            found = _nearest(work, there, accumulate, may_move)
            if found is not None:
                return found
            accumulate *= 2
    return None


def _nearest(work: Workload, there: Room, accumulate: int, may_move: bool) -> tuple[list[str], Demand] | None:
    asked = work.setting.world_size

    def available(world_size: int) -> int:
        activations = work.activations(world_size, accumulate)
        if activations is None or (world_size != asked and not may_move):
            return -1
        return there.on(world_size) - activations

    fit = fitting(work.parameters, work.setting, available, most_ranks=8 * asked if may_move else asked)
    if fit.nearest is None or fit.nearest_need is None:
        return None
    options = [] if work.sharded else ["--optimizer sharded"]
    options += [option(name, fit.nearest) for name in fit.changes]
    if accumulate != work.accumulate:
        options.append(f"--accumulate {accumulate}")
    return options, Demand(fit.nearest_need, work.activations(fit.nearest.world_size, accumulate) or 0)


def option(name: str, setting: Setting) -> str:
    """A changed field of a setting, as the command line has it."""
    if name == "world_size":
        return f"{setting.world_size} ranks (torchrun --nproc-per-node)"
    value = setting.gradient_sync if name == "gradient_sync" else getattr(setting.precision, name)
    return f"--{name.replace('_', '-')} {value}"
