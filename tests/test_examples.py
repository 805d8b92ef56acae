# SPDX-License-Identifier: Apache-2.0
"""Every script in examples/ runs on two ranks and prints what its docstring promises."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from tests.scripts import run_script

EXAMPLES = Path(__file__).parent.parent / "examples"
DEADLINE_S = 100.0


def run(name: str, *arguments: str, ranks: int = 2) -> str:
    with tempfile.NamedTemporaryFile() as output:
        return run_script(EXAMPLES / name, arguments, ranks=ranks, output=Path(output.name), deadline_s=DEADLINE_S)


def numbers(label: str, output: str) -> list[float]:
    return [float(found) for found in re.findall(rf"{label}[: ]+'?([-+]?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?)", output)]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_say_how_to_run_them(path: Path) -> None:
    text = path.read_text()
    assert 30 <= text.count("\n") <= 60
    assert f"torchrun --nproc-per-node 2 examples/{path.name}" in text


@pytest.mark.scripts
def test_plain_loop() -> None:
    output = run("plain_loop.py")
    losses = numbers("loss", output)
    assert losses[-1] < 0.2 * losses[0]
    (state,), (count,) = numbers("state", output), re.findall(r"for (\d+) parameters on 2 ranks", output)
    assert 4 * int(count) <= state <= 5 * int(count)


@pytest.mark.scripts
def test_accumulate_and_clip() -> None:
    output = run("accumulate_and_clip.py")
    losses, rates = numbers("loss", output), numbers("lr", output)
    assert losses[-1] < 0.5 * losses[0] and max(rates) > 2 * rates[0] and rates[-1] < max(rates)
    assert all(norm > 0 for norm in numbers("norm", output))


@pytest.mark.scripts
def test_bf16_and_int8() -> None:
    output = run("bf16_and_int8.py")
    nbytes = [float(found) for found in re.findall(r"([0-9.]+) bytes a parameter", output)]
    assert [round(each) for each in nbytes] == [12, 10, 4]
    losses = numbers("loss", output)
    assert len(losses) == 3 and max(losses) < 1.5 * min(losses) + 0.01


@pytest.mark.scripts
@pytest.mark.timeout(240)  # it starts two runs
def test_checkpoint_and_resume(tmp_path: Path) -> None:
    first = numbers("loss", run("checkpoint_and_resume.py", str(tmp_path / "c")))
    output = run("checkpoint_and_resume.py", str(tmp_path / "c"), ranks=3)
    again = numbers("loss", output)
    assert "step 30" in output and again[-1] < again[0] < first[-1] < first[0]


@pytest.mark.scripts
def test_accelerate_loop() -> None:
    losses = numbers("loss", run("accelerate_loop.py"))
    assert len(losses) == 5 and losses[-1] < 0.5 * losses[0]


@pytest.mark.scripts
def test_trainer(tmp_path: Path) -> None:
    output = run("trainer.py", str(tmp_path / "out"))
    (first,), (last,) = numbers("first loss", output), numbers("last loss", output)
    assert last < first and (tmp_path / "out" / "checkpoint-20").is_dir()


def printed_by_parallel(directory: Path, ranks: int, tensor_parallel: int) -> list[list[float]]:
    """Return step, loss and norm of each line."""
    output = run("parallel.py", str(directory), str(tensor_parallel), ranks=ranks)
    return list(map(list, zip(*(numbers(label, output) for label in ("step", "loss", "norm")), strict=True)))


@pytest.mark.scripts
@pytest.mark.timeout(420)  # it starts four runs
def test_parallel(tmp_path: Path) -> None:
    """Tensor parallelism over 2 of 4 ranks equals one process, and each continues the other's run."""
    cut = printed_by_parallel(tmp_path / "a", 4, 2) + printed_by_parallel(tmp_path / "a", 1, 1)
    whole = printed_by_parallel(tmp_path / "b", 1, 1) + printed_by_parallel(tmp_path / "b", 4, 2)
    assert [line[0] for line in cut] == [line[0] for line in whole] == list(range(0, 40, 5))
    for mine, theirs in zip(cut, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=2e-5)
    assert whole[-1][1] < 0.5 * whole[0][1]
