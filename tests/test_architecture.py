# SPDX-License-Identifier: Apache-2.0
"""The layering of the package: imports point downwards, and collectives are called in two places only."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.utils._device import _device_constructors

import shardadam

PACKAGE = Path(shardadam.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}

# From the top down. A module imports modules of lower tiers, and of its own room: a folder, or a file where a folder's
# files are listed one by one.
TIERS: tuple[tuple[str, ...], ...] = (
    ("__init__", "cli", "integrations"),
    ("adamw", "grad_scaler", "checkpoint", "clipping", "planner", "profiler"),
    ("optimizer",),
    ("engine.inspection",),
    ("state.stateful_optimizer",),
    (
        "engine.checkpoint_seam",
        "engine.collective_method",
        "engine.joining",
        "engine.norms",
        "state.loading",
        "state.state_dict",
        "state.torch_view",
    ),
    ("engine.step",),
    ("engine.in_backward",),
    ("engine.averaging", "engine.updating"),
    ("engine.step_sync", "engine.parameters", "engine.clipping"),
    ("engine.overlap", "checks.misuse", "checks.replicas", "state.memory", "state.whole"),
    ("state.averages",),
    ("state.masters",),
    (
        "engine.reduction",
        "engine.gathering",
        "engine.outside",
        "engine.bindings",
        "engine.borrowing",
        "engine.merging",
        "state.local",
        "checks.arguments",
        "checks.claims",
    ),
    ("engine.storage", "engine.profiling"),
    ("engine.tables",),
    ("offload",),
    ("update", "transport"),
    ("ranks", "sums", "state.flat_shard"),
    ("engine.snapshot",),
    ("layout", "precision", "chunks", "pages", "version", "checks.torch_patches", "engine.garbage", "engine.strides"),
)
LISTED_BY_FILE = ("engine", "checks", "state")
TIER_OF = {room: tier for tier, rooms in enumerate(TIERS) for room in rooms}

MAY_CALL_COLLECTIVES = ("transport/", "ranks/agreement.py")
COLLECTIVES = {
    name
    for name in dir(dist)
    if name.lstrip("_").startswith(
        ("all_", "reduce", "broadcast", "gather", "scatter", "send", "recv", "isend", "irecv")
    )
    or name in ("barrier", "batch_isend_irecv", "monitored_barrier")
}
GROUP_METHODS = {"allreduce", "allgather", "alltoall", "alltoall_base", "_allgather_base", "_reduce_scatter_base"}


def room_of(path: str) -> str:
    """``engine/reduction/base.py`` is in ``engine.reduction``, ``cli/plan.py`` in ``cli``."""
    first, *rest = path.removesuffix(".py").split("/")
    return f"{first}.{rest[0]}" if first in LISTED_BY_FILE and rest != ["__init__"] else first


def imports(source: str) -> Iterator[str]:
    """The dotted name of everything imported: ``a.b.c`` for ``from a.b import c``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(source: str) -> set[str]:
    """Rooms of the project; ``__init__`` where something is taken from the package itself."""
    rooms = set()
    for name in imports(source):
        project, *parts = name.split(".")
        if project == "shardadam":
            path = "/".join(parts)
            while path and not (PACKAGE / path).is_dir() and not (PACKAGE / f"{path}.py").is_file():
                path = path.rpartition("/")[0]  # what is imported from a module
            rooms.add(room_of(path or "__init__"))
    return rooms


def collectives(source: str) -> list[str]:
    """Everything that names a collective of torch.distributed, or of a process group."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # what a name in the file stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    names[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom):
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    found = [name for name in names.values() if is_collective(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (is_collective(dotted(node)) or node.attr in GROUP_METHODS):
            found.append(dotted(node))
    return found


def is_collective(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return "functional_collectives" in name or (module.startswith("torch.distributed") and last in COLLECTIVES)


def test_layout_imports_the_standard_library_alone() -> None:
    assert {name.partition(".")[0] for name in imports(MODULES["layout.py"])} <= sys.stdlib_module_names


@pytest.mark.parametrize("path", ["layout.py", "sums/reference.py", "update/reference.py"])
def test_truths_import_nothing_of_the_project(path: str) -> None:
    assert imported_rooms(MODULES[path]) == set()


def test_every_room_has_its_tier() -> None:
    empty = {*LISTED_BY_FILE}  # their __init__.py
    assert {room_of(path) for path in MODULES} - set(TIER_OF) - empty == set(), "give a new room its place in TIERS"


@pytest.mark.parametrize("folder", LISTED_BY_FILE)
def test_folders_listed_by_file_import_nothing_by_themselves(folder: str) -> None:
    assert list(imports(MODULES[f"{folder}/__init__.py"])) == []


def test_few_modules_lie_at_the_root() -> None:
    assert len([path for path in MODULES if "/" not in path]) <= 10


@pytest.mark.parametrize("path", MODULES)
def test_no_module_is_long(path: str) -> None:
    assert MODULES[path].count("\n") <= 520


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) in TIER_OF])
def test_imports_point_downwards(path: str) -> None:
    room = room_of(path)
    upwards = {other for other in imported_rooms(MODULES[path]) - {room} if TIER_OF[other] <= TIER_OF[room]}
    assert upwards == set()


@pytest.mark.parametrize("path", [path for path in MODULES if not path.startswith(MAY_CALL_COLLECTIVES)])
def test_collectives_are_called_by_transports_and_agreement_alone(path: str) -> None:
    assert collectives(MODULES[path]) == []


def test_the_search_for_collectives_finds_them_where_they_are() -> None:
    assert collectives(MODULES["transport/gloo.py"])
    assert collectives(MODULES["transport/nccl.py"])
    assert collectives(MODULES["ranks/agreement.py"])
    for source in (
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "import torch\ntorch.distributed.barrier()",
        "from torch import distributed\ndistributed.reduce_scatter_tensor(x, y)",
        "from torch.distributed import broadcast as tell\ntell(x)",
        "import torch.distributed as d\ngather = d.all_gather_into_tensor",
        "from torch.distributed._functional_collectives import all_reduce",
        "group.allreduce([x])",
    ):
        assert collectives(source), source
    assert collectives("import torch.distributed as dist\ntransport.all_reduce(x)\ndist.get_rank()") == []


def test_the_search_for_imports_finds_them_in_every_form() -> None:
    assert imported_rooms("import shardadam.optimizer") == {"optimizer"}
    assert imported_rooms("from shardadam.engine import reduction, storage") == {"engine.reduction", "engine.storage"}
    assert imported_rooms("from shardadam.update.fused import FusedUpdate") == {"update"}
    assert imported_rooms("from shardadam import ShardedAdamW") == {"__init__"}
    assert imported_rooms("def f():\n    from shardadam.transport import Transport") == {"transport"}


CONSTRUCTORS = {function.__name__ for function in _device_constructors()}  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("path", MODULES)
def test_every_new_tensor_has_a_device(path: str) -> None:
    """Without one it would be on the device of ``torch.set_default_device``, which may be any."""
    for node in ast.walk(ast.parse(MODULES[path])):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in CONSTRUCTORS}:
            has_device = any(keyword.arg == "device" for keyword in node.keywords)
            assert has_device or any(isinstance(each, ast.Starred) for each in node.args), ast.unparse(node)
