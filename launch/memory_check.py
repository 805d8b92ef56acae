# SPDX-License-Identifier: Apache-2.0
"""Checks before training whether it fits in memory, and finds a setting that does. All ranks decide alike.

Counts parameters, gradients, optimizer state (planned by shardadam.planner) and activations (measured). Does not count
temporaries of single operations, the copy of the parameters while an optimizer is built, and Python and torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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


# Available memory


@dataclass(frozen=True)
class AvailableMemory:
    """Bytes for the tensors of training.

    Args:
        free: bytes of a host, which its ranks share; of one rank if `ranks` is None.
        ranks: number of ranks now.
        parameters: bytes of a rank's parameters, which are in memory already and not part of `free`.
        source: where the number comes from, for the log.
    """

    free: int
    ranks: Ranks | None
    parameters: int
    source: str

    def per_rank(self, world_size: int) -> int:
        """Bytes for each of `world_size` ranks on as many hosts as now."""
        if self.ranks is None:
            return self.free + self.parameters
        hosts = -(-self.ranks.world_size // self.ranks.local_world_size)
        return self.free // -(-world_size // hosts) + self.parameters


def available_memory(limit: int | None, parameters: int, ranks: Ranks, device: torch.device) -> AvailableMemory | None:
    """The smallest amount that any rank finds; None where it is unknown. Collective: all ranks must call it."""
    if limit is not None:
        return AvailableMemory(limit, None, 0, f"--memory-limit {megabytes(limit)}")
    if device.type == "cuda":
        free, source = torch.cuda.mem_get_info(device)[0], "free on the GPU"
    else:
        free, source = free_host_bytes(), f"free on this host, over {ranks.local_world_size} ranks"
    if dist.is_initialized():
        smallest = torch.tensor(-1 if free is None else free, device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        free = int(smallest) if smallest >= 0 else None
    if free is None:
        return None
    return AvailableMemory(free, None if device.type == "cuda" else ranks, parameters, source)


def free_host_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """What Linux counts as available; None elsewhere. Ignores the limit of a container: pass --memory-limit there."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


# Needed memory


def kept_bytes(forward: Callable[[], Tensor], parameters: Sequence[Tensor]) -> tuple[int, set[int]]:
    """Runs forward and backward once; frees each gradient as soon as it is complete.

    Returns the bytes that forward keeps for backward, without `parameters`, and the positions of the parameters that
    receive a gradient.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is reused
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
    """Bytes that one rank needs in training."""

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
    """The model to train and the settings of training.

    Args:
        parameters: in the optimizer's order, with frozen ones.
        text_bytes: bytes of activations for each text of a micro-batch.
        texts: number of texts in a step, over all ranks and all micro-batches.
        accumulate: number of micro-batches in a step.
    """

    parameters: Sequence[PlannedParameter]
    setting: Setting
    sharded: bool
    text_bytes: float
    texts: int
    accumulate: int

    def activations(self, world_size: int, accumulate: int) -> int | None:
        """Bytes on each rank; None where the texts of a step cannot be divided evenly."""
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


def nearest(work: Workload, memory: AvailableMemory) -> tuple[list[str], Demand] | None:
    """Finds options with which training fits; returns them as typed, and the memory needed then. None: nothing fits.

    Tries, in this order: other settings of the optimizer on as many ranks (shardadam.planner.fitting), these with
    smaller micro-batches, and both on other numbers of ranks.
    """
    for other_world_sizes in (False, True):
        accumulate = work.accumulate
        while work.activations(work.setting.world_size, accumulate) is not None:
            if work.setting.update == "backward" and accumulate > 1:
                break  # all gradients would be kept for the last backward
            found = _nearest(work, memory, accumulate, other_world_sizes)
            if found is not None:
                return found
            accumulate *= 2
    return None


def _nearest(
    work: Workload, memory: AvailableMemory, accumulate: int, other_world_sizes: bool
) -> tuple[list[str], Demand] | None:
    asked = work.setting.world_size

    def available(world_size: int) -> int:
        activations = work.activations(world_size, accumulate)
        if activations is None or (world_size != asked and not other_world_sizes):
            return -1
        return memory.per_rank(world_size) - activations

    most_ranks = 8 * asked if other_world_sizes else asked
    keep = ("update", "clips") if accumulate > 1 else ()
    fit = fitting(work.parameters, work.setting, available, most_ranks=most_ranks, keep=keep)
    if fit.nearest is None or fit.nearest_need is None:
        return None
    options = [] if work.sharded else ["--optimizer sharded"]
    options += [option(name, fit.nearest) for name in fit.changes]
    if accumulate != work.accumulate:
        options.append(f"--accumulate {accumulate}")
    return options, Demand(fit.nearest_need, work.activations(fit.nearest.world_size, accumulate) or 0)


def option(name: str, setting: Setting) -> str:
    """A changed field of a setting, as typed on the command line."""
    if name == "world_size":
        return f"{setting.world_size} ranks (torchrun --nproc-per-node)"
    if name == "clips":
        return "--clip 0"
    if name == "offload":
        return "--offload disk --offload-dir DIR"
    value = getattr(setting if name in ("gradient_sync", "update") else setting.precision, name)
    typed = "master-weights" if name == "master" else name.replace("_", "-")
    return f"--{typed} {value}"


# The cheapest setting that fits


@dataclass(frozen=True)
class Tried:
    """A row of what ``cheapest`` has tried.

    Args:
        options: the options that it adds to the row before (or takes back), as typed.
        demand: None if they cannot be used.
        verdict: whether it fits, or why not.
    """

    options: str
    demand: Demand | None
    verdict: str

    def cells(self) -> tuple[str, ...]:
        """As text, under ``HEADER``."""
        counts = (self.demand.total, self.demand.need.optimizer, self.demand.need.gradients) if self.demand else ()
        return self.options, *(megabytes(count) for count in counts), *[""] * (3 - len(counts)), self.verdict


HEADER = ("--fit tries", "a rank needs", "optimizer", "gradients", "")


def cheapest(work: Workload, memory: AvailableMemory, *, has_disk: bool) -> tuple[Workload | None, list[Tried]]:
    """Adds one saving after another, from what costs least, until training fits; then takes back those that it does
    without, what costs most first. Returns the workload with the setting that fits (None: none does), and all rows.

    Args:
        has_disk: whether there is a directory for the state.
    """
    available = memory.per_rank(work.setting.world_size)
    rows: list[Tried] = []
    added: list[str] = []

    def row(options: str, found: Workload) -> bool:
        fits = found.demand().total <= available
        rows.append(Tried(options, found.demand(), "fits" if fits else "does not fit"))
        return fits

    def with_savings(names: Sequence[str]) -> Workload:
        setting = work.setting
        for name in names:
            setting = SAVINGS[name](setting)
        return replace(work, setting=setting)

    fits = row("as asked", work)
    for name in SAVINGS if not fits else ():
        before, after = with_savings(added), with_savings([*added, name])
        options = " ".join(changed_options(before.setting, after.setting))
        if before.setting == after.setting:
            continue
        if name == "update" and work.accumulate > 1:
            rows.append(Tried(f"+ {options}", None, f"not with --accumulate {work.accumulate}"))
        elif name == "offload" and not has_disk:
            rows.append(Tried(f"+ {options}", after.demand(), "give --offload-dir to try"))
        elif after.demand().total >= before.demand().total:
            rows.append(Tried(f"+ {options}", after.demand(), "saves nothing"))
        else:
            added.append(name)
            fits = row(f"+ {options}", after)
            if fits:
                break
    if not fits:
        return None, rows
    for name in reversed(added[:-1]):
        left = [other for other in added if other != name]
        options = " ".join(changed_options(with_savings(left).setting, with_savings(added).setting))
        if row(f"- {options}", with_savings(left)):
            added = left
    return with_savings(added), rows


def _in_backward(setting: Setting) -> Setting:
    return replace(setting, update="backward", gradient_sync="backward", clips=False)


def _without_masters(setting: Setting) -> Setting:
    return replace(setting, precision=replace(setting.precision, master="none"))


def _on_disk(setting: Setting) -> Setting:
    return setting if setting.offload else replace(setting, offload="disk")


SAVINGS: dict[str, Callable[[Setting], Setting]] = {
    "gradients": lambda setting: replace(setting, precision=replace(setting.precision, gradients="bf16")),
    "moments": lambda setting: replace(setting, precision=replace(setting.precision, moments="int8")),
    "update": _in_backward,
    "master": _without_masters,
    "offload": _on_disk,
}
"""What ``cheapest`` adds, in this order: from what costs least."""


def changed_options(before: Setting, after: Setting) -> list[str]:
    """The options that differ, as typed."""
    found = [name for name in ("gradients", "moments", "master") if _differs(before.precision, after.precision, name)]
    found += [name for name in ("update", "gradient_sync", "clips", "offload") if _differs(before, after, name)]
    return [option(name, after) for name in found]


def _differs(before: object, after: object, name: str) -> bool:
    return getattr(before, name) != getattr(after, name)
