# SPDX-License-Identifier: Apache-2.0
"""Every script in examples/ runs on two ranks and prints the figures of its stock twin: torch.optim.AdamW under DDP.

Losses are averages over ranks, so that a rank's share of the data does not matter.
"""

from __future__ import annotations

import re
import runpy
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.scripts import run_script

EXAMPLES = Path(__file__).parent.parent / "examples"
DEADLINE_S = 120.0


def run(name: str, *arguments: str, ranks: int = 2) -> str:
    with tempfile.NamedTemporaryFile() as output:
        return run_script(
            EXAMPLES / name,
            arguments,
            ranks=ranks,
            output=Path(output.name),
            deadline_s=DEADLINE_S,
            skips_exit="--stock" in arguments,
        )


def run_stock(name: str, *arguments: str, ranks: int = 2) -> str:
    return run(name, *arguments, "--stock", ranks=ranks)


NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?")


def numbers(label: str, output: str) -> list[float]:
    return [float(found) for found in re.findall(rf"{label}[: \['=]+({NUMBER.pattern})", output)]


def figures(output: str) -> list[tuple[str, list[float]]]:
    """Return each printed line's words, and its numbers; warnings of torch and accelerate are not ours."""
    lines = [line for line in output.splitlines() if re.match(r"(step|epoch|loss|losses|state|fp32|int8)\b", line)]
    return [(NUMBER.sub("#", line), [float(found) for found in NUMBER.findall(line)]) for line in lines]


def assert_twins(mine: str, stock: str, *, rel: float) -> None:
    """Expect the same lines, with numbers that differ by ``rel`` at most, or by one unit in the last printed place."""
    ours, theirs = figures(mine), figures(stock)
    assert [words for words, _ in ours] == [words for words, _ in theirs] and ours
    for (words, found), (_, expected) in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=rel, abs=1.5e-6), words


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_say_how_to_run_them(path: Path) -> None:
    text = path.read_text()
    assert 30 <= text.count("\n") <= 70
    assert f"torchrun --nproc-per-node 2 examples/{path.name}" in text


TWINS = {  # the largest relative difference, and arguments
    "accelerate_loop.py": (1e-4, []),
    "accumulate_and_clip.py": (1e-5, []),
    "compiled.py": (1e-5, ["blocks", "inductor"]),
    "ema.py": (2e-5, []),
    "gan.py": (1e-5, []),
    "gradient_penalty.py": (1e-5, []),
    "moe.py": (1e-5, []),
    "muon.py": (1e-3, []),  # Muon orthogonalises in bfloat16, which turns a last bit into a thousandth
    "uneven.py": (1e-5, []),
}


@pytest.mark.scripts
@pytest.mark.timeout(420)  # it starts two runs
@pytest.mark.parametrize("name", TWINS)
def test_a_script_prints_the_figures_of_its_stock_twin(name: str) -> None:
    rel, arguments = TWINS[name]
    mine, stock = run(name, *arguments), run_stock(name, *arguments)
    assert_twins(mine, stock, rel=rel)
    if not name.startswith(("gan", "ema", "gradient_penalty")):  # a game without a falling loss; other tests below
        losses = numbers("loss", mine)
        assert losses[-1] < 0.8 * losses[0] or len(losses) == 1


@pytest.mark.scripts
@pytest.mark.timeout(420)
@pytest.mark.parametrize(("name", "arguments"), [("compiled.py", ["whole", "aot_eager"])])
def test_other_ways_of_a_script_print_the_same_figures(name: str, arguments: list[str]) -> None:
    assert_twins(run(name, *arguments), run_stock(name, *arguments), rel=1e-5)


@pytest.mark.scripts
@pytest.mark.timeout(420)
@pytest.mark.parametrize("mode", ["step", "in_backward"])
def test_a_gradient_penalty_is_trained_in_every_mode(mode: str) -> None:
    assert_twins(run("gradient_penalty.py", mode), run_stock("gradient_penalty.py"), rel=1e-5)


@pytest.mark.scripts
@pytest.mark.timeout(420)
def test_plain_loop() -> None:
    mine, stock = run("plain_loop.py"), run_stock("plain_loop.py")
    (state,), (whole,) = numbers("state", mine), numbers("state", stock)
    assert_twins(mine.split("state")[0], stock.split("state")[0], rel=1e-5)
    assert whole / 2 <= state < 0.51 * whole


@pytest.mark.scripts
@pytest.mark.timeout(420)
def test_bf16_and_int8() -> None:
    """Only the first format is the twin's; the gradients of both travel in bfloat16."""
    output, stock = run("bf16_and_int8.py"), run_stock("bf16_and_int8.py")
    nbytes = [float(found) for found in re.findall(r"([0-9.]+) bytes a parameter", output)]
    assert [round(each) for each in nbytes] == [12, 10, 4]
    losses, (loss,) = numbers("loss", output), numbers("loss", stock)
    assert losses[0] == pytest.approx(loss, rel=2e-2)
    assert losses[1:] == pytest.approx([loss, loss], rel=5e-2)


@pytest.mark.scripts
@pytest.mark.timeout(420)  # it starts four runs
def test_checkpoint_and_resume(tmp_path: Path) -> None:
    first, second = (run("checkpoint_and_resume.py", str(tmp_path / "c"), ranks=ranks) for ranks in (2, 3))
    stock = [run_stock("checkpoint_and_resume.py", str(tmp_path / "d"), ranks=ranks) for ranks in (2, 3)]
    assert_twins(first + second, "".join(stock), rel=1e-5)
    losses = numbers("loss", first + second)
    assert "step 30" in second and losses == sorted(losses, reverse=True)


@pytest.mark.scripts
@pytest.mark.timeout(420)
def test_trainer(tmp_path: Path) -> None:
    mine, stock = run("trainer.py", str(tmp_path / "out")), run_stock("trainer.py", str(tmp_path / "stock"))
    assert_twins(mine, stock, rel=1e-4)
    assert (tmp_path / "out" / "checkpoint-20").is_dir()


@pytest.mark.scripts
@pytest.mark.timeout(420)
def test_torchtitans_container(tmp_path: Path) -> None:
    """.ci/run installs torchtitan for this test alone: its requirements pin other packages."""
    pytest.importorskip("torchtitan")
    mine = run("torchtitan_container.py", str(tmp_path / "mine"))
    assert_twins(mine, run_stock("torchtitan_container.py", str(tmp_path / "stock")), rel=1e-5)


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
    for mine, theirs in zip(cut, train_parallels_model_with_adamw(), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=2e-5)


def train_parallels_model_with_adamw() -> list[list[float]]:
    """Return step, loss and norm of the model of parallel.py, trained in one process."""
    torch.manual_seed(0)
    texts = torch.randint(64, (8, 17))
    model = runpy.run_path(str(EXAMPLES / "parallel.py"))["Model"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lines = []
    for step in range(40):
        loss = nn.functional.cross_entropy(model(texts[:, :-1]).transpose(1, 2), texts[:, 1:])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        lines.append([float(step), loss.item(), norm.item()])
    return lines[::5]
