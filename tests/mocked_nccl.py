# SPDX-License-Identifier: Apache-2.0
"""NCCL on a machine without GPUs, as far as torch's Python code sees it.

``ProcessGroupNCCL`` is a Gloo group that serves the device type "cuda" alone, is built from NCCL's options, and records
how it was built. So ``init_process_group("nccl")`` works, a CPU tensor finds no backend in such a group, and with a
bound device torch splits communicators, as with real NCCL.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


class MockedNccl(c10d.ProcessGroupGloo):
    """
    Attributes:
        made: all of this process.
        world_splits: how often torch has made this rank take part in splitting the world's communicator for a group
            that it is not in.
    """

    made: ClassVar[list[MockedNccl]] = []
    world_splits = 0

    class Options:
        split_from: Any = None
        _timeout: timedelta
        group_name: str
        global_ranks_in_group: list[int]

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        super().__init__(store, rank, size, timeout=options._timeout)
        self.nccl_options = options
        MockedNccl.made.append(self)

    @property
    def options(self) -> Options:
        return self.nccl_options

    @property
    def supports_splitting(self) -> bool:
        return True

    def perform_nocolor_split(self, device: torch.device) -> None:
        MockedNccl.world_splits += 1

    def eager_connect_single_device(self, device: torch.device) -> None:
        return None


def init_nccl(rank: int, world_size: int, store: Path, *, timeout_s: float) -> None:
    """Replace the default group by one of mocked NCCL with a bound device, as ``init_process_group("nccl",
    device_id=...)`` builds it. For a process of its own.
    """
    dist.destroy_process_group()
    c10d.ProcessGroupNCCL, c10d._NCCL_AVAILABLE = MockedNccl, True  # type: ignore[attr-defined]
    options: Any = {"store": dist.FileStore(str(store), world_size), "timeout": timedelta(seconds=timeout_s)}
    dist.init_process_group("nccl", rank=rank, world_size=world_size, **options)
    default: Any = dist.group.WORLD
    default.bound_device_id = torch.device("cuda", rank)


@contextmanager
def recorded_groups() -> Iterator[list[dict[str, Any]]]:
    """Context manager: what torch's function that builds process groups is given, by name, and the bound device of the
    default group meanwhile.
    """
    seen: list[dict[str, Any]] = []
    original = c10d._new_process_group_helper
    default: Any = dist.group.WORLD

    def helper(*arguments: Any, **options: Any) -> Any:
        given = inspect.signature(original).bind(*arguments, **options).arguments
        seen.append({**given, "bound": default.bound_device_id})
        return original(*arguments, **options)

    with mock.patch.object(c10d, "_new_process_group_helper", helper):
        yield seen


@contextmanager
def recorded_collectives() -> Iterator[list[Any]]:
    """Context manager: the group of every collective of torch.distributed that is called; None is the default group."""
    seen: list[Any] = []

    def recording(original: Any) -> Any:
        def collective(*arguments: Any, **options: Any) -> Any:
            seen.append(inspect.signature(original).bind(*arguments, **options).arguments.get("group"))
            return original(*arguments, **options)

        return collective

    names = [name for name in dir(c10d) if name.startswith(("all_", "barrier", "broadcast", "reduce", "scatter"))]
    functions = [name for name in names if inspect.isfunction(getattr(c10d, name))]
    with mock.patch.multiple(
        dist, **{name: recording(getattr(dist, name)) for name in functions if hasattr(dist, name)}
    ):
        yield seen
