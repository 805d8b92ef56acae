# SPDX-License-Identifier: Apache-2.0
"""Options of the test suite: ``--long`` runs every case of each sweep, an ordinary run a seeded sample. Fixtures that
several files use. Tests may run side by side, those marked ``quiet`` while no other runs.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.ranks import stop_all
from tests.sampling import covering_sample
from tests.triton_processes import process

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
# Numba would go on with the machine code of a module after a change in another one that it imports.
_SOURCES = [*ROOT.glob("shardadam/sums/*.py"), *ROOT.glob("shardadam/update/*.py")]
_CHECKSUM = zlib.crc32(b"".join(path.read_bytes() for path in sorted(_SOURCES)))
os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / ".numba_cache" / f"{_CHECKSUM:08x}"))
hypothesis.settings.register_profile("sample", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=2000, deadline=None, derandomize=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the full counts of every sweep")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sweep(keep): an ordinary run keeps a seeded sample of that many of its cases")
    config.addinivalue_line("markers", "quiet: measures times or waits for short ones; runs while no other test runs")
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "sample")


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process that interprets Triton kernels."""
    with process(interpret=True) as pool:
        yield pool


@pytest.fixture(scope="session")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """A process that compiles Triton kernels."""
    with process(interpret=False) as pool:
        yield pool


def pytest_sessionfinish() -> None:
    stop_all()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if "PYTEST_XDIST_TESTRUNUID" not in os.environ:
        return (yield)
    with _turn(item.config.cache.mkdir("turns"), alone=item.get_closest_marker("quiet") is not None):
        return (yield)


@contextmanager
def _turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """Wait until no quiet test runs, or if ``alone`` until no test does. No later test overtakes one that waits."""
    with open(folder / "running", "ab") as running:
        with open(folder / "next", "ab") as following:
            fcntl.flock(following, fcntl.LOCK_EX)
            fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(running, fcntl.LOCK_UN)  # closing would not do while a child has the file, too


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="runs with --long"))
    left_out = _left_out_of_samples(items)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def _left_out_of_samples(items: list[pytest.Item]) -> set[pytest.Item]:
    sweeps: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sweep"):
            sweeps.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out: set[pytest.Item] = set()
    for name, items_of_sweep in sweeps.items():
        marker = items_of_sweep[0].get_closest_marker("sweep")
        assert marker is not None
        cases = [item.callspec.params for item in items_of_sweep]  # type: ignore[attr-defined]
        kept = set(covering_sample(cases, marker.args[0], seed=name))
        left_out |= {item for index, item in enumerate(items_of_sweep) if index not in kept}
    return left_out
