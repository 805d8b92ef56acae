# SPDX-License-Identifier: Apache-2.0
"""Every Python and bash block of the README and the docs runs as printed.

A comment before a block says how:

    torchrun: NAME        a whole script, on two ranks; with ", 4 ranks" after the name on four
    fragment              part of one, on two ranks, after what ``prepared`` gives it
    file: NAME            a file that shell blocks of the page use
    before and after      a diff with all of a script: run before, after, and after from the checkpoint of before
    diff: NAME            the lines that turn the script NAME into another one; both print the same
    shell                 commands; ``needs`` files of the docs, or ``launch``; ``after`` a script, in its directory
    elsewhere: WHY        what runs it instead, or why nothing can

and a block without a language is the output of the shell block before it: all its lines but "..." occur as whole lines,
in order. Plans for GPUs depend on whether Triton is installed, not on the machine; the extra ``test`` has it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardadam
from shardadam import Precision, ShardedAdamW
from tests.ranks import on_ranks, rank_and_size
from tests.scripts import run_script

pytestmark = pytest.mark.scripts
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (.*?) -->\n\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "ACCELERATE_USE_CPU": "true",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "COLUMNS": "80",
}
NOT_RUN = {
    "README.md": 4,
    "checkpoints.md": 1,
    "index.md": 2,
    "integrations.md": 2,
    "launch.md": 2,
    "logging.md": 1,
    "memory.md": 2,
    "migrating.md": 1,
}


@dataclass(frozen=True)
class Block:
    page: str
    number: int
    how: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def blocks_of(page: Path) -> list[Block]:
    return [
        Block(page.name, number, how, language, text)
        for number, (how, language, text) in enumerate(BLOCK.findall(page.read_text()))
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def those(how: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.how.partition(":")[0] == how]


def run(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        arguments, cwd=directory, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_block(block: Block, directory: Path) -> None:
    (directory / "train.py").write_text(block.text)
    ranks = re.search(r", (\d+) ranks$", block.how)
    run_script(
        directory / "train.py",
        ranks=int(ranks[1]) if ranks else 2,
        directory=directory,
        environment=ENVIRONMENT,
        output=directory / "output.txt",
        skips_exit=block.how.endswith("_before"),
    )


@pytest.mark.parametrize("block", those("torchrun"))
def test_a_script_runs_on_its_ranks(block: Block, tmp_path: Path) -> None:
    name = block.how.partition(": ")[2].partition(",")[0]
    if name in ("accelerate", "transformers", "lightning", "peft"):
        pytest.importorskip(name)
    run_block(block, tmp_path)


# A script before and after


def test_the_whole_ddp_script_prints_the_same_before_and_after(tmp_path: Path) -> None:
    """Also if the new script goes on from the old one's checkpoint, and from its own."""
    [block] = [block for block in BLOCKS if block.how == "before and after"]
    lines = block.text.splitlines()
    assert {line[:1] for line in lines} == {" ", "-", "+", ""}
    for name, other in (("before.py", "+"), ("after.py", "-")):
        kept = [line[1:] for line in lines if not line.startswith(other)]
        (tmp_path / name).write_text("\n".join(kept) + "\n")

    def losses(script: str, epochs: int, directory: str) -> list[str]:
        where = tmp_path / directory
        where.mkdir(exist_ok=True)
        printed = run_script(
            tmp_path / script,
            [str(epochs)],
            directory=where,
            environment=ENVIRONMENT,
            output=where / "output.txt",
            skips_exit=script == "before.py",
        )
        return re.findall(r"^epoch \d+: loss .*$", printed, re.MULTILINE)

    first = losses("before.py", 2, "old")
    shutil.copytree(tmp_path / "old", tmp_path / "moved")
    rest = losses("before.py", 4, "old")
    assert len(first) == len(rest) == 2
    assert losses("after.py", 2, "new") == first
    assert losses("after.py", 4, "new") == losses("after.py", 4, "moved") == rest


# Lines that change


def printed_by(text: str, directory: Path, *, ranks: int = 2) -> list[str]:
    (directory / "train.py").write_text(text)
    output = run_script(
        directory / "train.py",
        ranks=ranks,
        directory=directory,
        environment=ENVIRONMENT,
        output=directory / "out",
        skips_exit="DistributedDataParallel" in text,
    )
    return sorted(line for line in output.splitlines() if not line.startswith("Memory("))


@pytest.mark.parametrize("block", those("diff"))
def test_a_diff_leaves_what_the_script_prints(block: Block, tmp_path: Path) -> None:
    name = block.how.partition(": ")[2]
    (before,) = [one.text for one in BLOCKS if one.how == f"torchrun: {name}"]
    after = before
    removed: list[str] = []
    added: list[str] = []
    for line in [*block.text.splitlines(), " "]:
        if line[0] == "-" and not added:
            removed.append(line[1:] + "\n")
        elif line[0] == "+":
            added.append(line[1:] + "\n")
        else:
            assert removed and "".join(removed) in after, removed
            after = after.replace("".join(removed), "".join(added), 1)
            removed, added = [line[1:] + "\n"], []
    assert "Distributed" not in after and "ShardedAdamW" in after
    losses = printed_by(before, tmp_path)
    assert len(losses) == 10 and printed_by(after, tmp_path) == losses


def test_the_quick_start_prints_the_same_before_and_after(tmp_path: Path) -> None:
    """``train.py`` printed the loss of rank 0 on shuffled samples."""
    before, after = (
        next(one.text for one in BLOCKS if one.page == "index.md" and one.how == f"file: {name}")
        for name in ("before.py", "train.py")
    )
    losses = printed_by(before, tmp_path, ranks=1)
    assert len(losses) == 3
    assert [line for line in printed_by(after, tmp_path) if re.fullmatch(r"\d \d\.\d{4}", line)] == losses


# Fragments


class Output:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


class Model(nn.Module):
    """Return a loss, or an object that has one, as fragments expect."""

    def __init__(self, *, wrapped: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.wrapped = wrapped

    def forward(self, x: torch.Tensor) -> Any:
        loss = self.layer(x).square().mean()
        return Output(loss) if self.wrapped else loss


def prepared(text: str) -> dict[str, Any]:
    """Return the variables that a fragment uses without defining them."""
    torch.manual_seed(0)
    model = Model(wrapped="model(batch).loss" in text)
    names: dict[str, Any] = {
        "torch": torch,
        "shardadam": shardadam,
        "ShardedAdamW": ShardedAdamW,
        "Precision": Precision,
        "model": model,
        "build_model": lambda: Model(wrapped=True),
        "device": torch.device("cpu"),
        "loader": [torch.randn(2, 4) for _ in range(3)],
        "init_device_mesh": lambda _, shape, **options: torch.distributed.device_mesh.init_device_mesh(
            "cpu", shape, **options
        ),
        "nodes": 1,
        "gpus_per_node": rank_and_size()[1],
        "step": 1,
        "dist": torch.distributed,
        "batch": torch.randn(2, 4),
        "epoch": 0,
    }
    if "ShardedAdamW(" not in text and "optimizer =" not in text:
        names["optimizer"] = ShardedAdamW(model.named_parameters())
        names["scheduler"] = torch.optim.lr_scheduler.ConstantLR(names["optimizer"])
    return names


def run_fragments(texts: list[str], directory: str) -> list[str]:
    os.chdir(directory)
    done = []
    for text in texts:
        exec(text.replace("dist.init_process_group()", "pass"), prepared(text))
        done.append(text)
    os.chdir("/")
    return done


def test_fragments_run_on_two_ranks(tmp_path: Path) -> None:
    texts = [block.text for block in BLOCKS if block.how == "fragment"]
    assert len(texts) >= 6
    assert on_ranks(2, run_fragments, texts, str(tmp_path)) == [texts] * 2


# Commands


@pytest.mark.parametrize("block", those("shell"))
def test_commands_run_and_print_what_is_shown(block: Block, tmp_path: Path) -> None:
    page = [other for other in BLOCKS if other.page == block.page]
    options = block.how.partition(": ")[2]
    if options.startswith("after "):
        script = next(other for other in page if other.how == f"torchrun: {options.removeprefix('after ')}")
        run_block(script, tmp_path)
    files = {other.how.removeprefix("file: "): other.text for other in BLOCKS if other.how.startswith("file: ")}
    for name in re.findall(r"[\w.]+", options.partition("needs ")[2]):
        if name == "launch":
            (tmp_path / "launch").symlink_to(ROOT / "launch")
        else:
            (tmp_path / name).write_text(files[name])
    done = run(["bash", "-euo", "pipefail", "-c", block.text], tmp_path)
    shown = next((other for other in page if other.number == block.number + 1 and not other.language), None)
    if shown is not None:
        printed = done.stdout.splitlines()
        for line in shown.text.splitlines():
            if line.strip() and line.strip() != "...":
                assert line in printed, f"{line!r} is not, or not there, in\n{done.stdout}"
                printed = printed[printed.index(line) + 1 :]


# All blocks


def test_every_block_is_run_or_says_why_not() -> None:
    for block in BLOCKS:
        if block.language in ("python", "bash"):
            kind = block.how.partition(":")[0]
            assert kind in ("torchrun", "fragment", "file", "shell", "elsewhere"), f"{block}: {block.how!r}"
            assert kind == "elsewhere" or (block.language == "bash") == (kind == "shell"), block
    fences = sum(len(re.findall(r"^ *```\w+$", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert fences == sum(bool(block.language) for block in BLOCKS), "an indented block is not found"
    files = {block.how.removeprefix("file: ") for block in BLOCKS if block.how.startswith("file: ")}
    used = {name for block in BLOCKS if "needs " in block.how for name in files if name in block.how}
    assert files == used
    not_run = {page.name: sum(b.how.startswith("elsewhere") for b in blocks_of(page)) for page in PAGES}
    assert {name: count for name, count in not_run.items() if count} == NOT_RUN


def test_messages_in_the_docs_are_in_the_code() -> None:
    sources = [path.read_text() for path in (ROOT / "shardadam").rglob("*.py")]
    code = re.sub(r"['\"]\s*\n\s*f?['\"]", "", "\n".join(sources))  # join strings of several lines
    code = re.sub(r"\\\"", '"', code)
    pages = [(ROOT / "docs" / name).read_text() for name in ("troubleshooting.md", "parallelism.md")]
    messages = re.findall(r"\*\*`(.+?)`\*\*", "\n".join(pages))
    assert len(messages) > 25
    for message in messages:
        fixed = max(re.split(r"\.\.\.|\{.*?\}", message.replace("the last 10 steps", "the last ... steps")), key=len)
        assert fixed.strip() in code, message


def test_the_tests_that_the_page_on_failures_names_exist() -> None:
    page = (ROOT / "docs" / "failures.md").read_text()
    named = re.findall(r"`(test_\w+)(?:\.py|: (\w+))?`", page)
    assert len(named) > 12 and len(named) == page.count("`test_")
    for file, words in named:
        functions = re.findall(r"^def (test_\w+)", (ROOT / "tests" / f"{file}.py").read_text(), re.MULTILINE)
        assert any(words in function for function in functions), (file, words)


def test_the_timeline_in_the_docs_is_the_measured_one() -> None:
    measured = ROOT / "benchmarks" / "results" / "timeline.png"
    assert (ROOT / "docs" / "images" / "timeline.png").read_bytes() == measured.read_bytes()


def test_the_docs_have_a_script_for_every_integration() -> None:
    scripts = {block.how.partition(": ")[2] for block in BLOCKS if block.page == "integrations.md"}
    assert {"accelerate", "transformers", "lightning"} <= scripts
