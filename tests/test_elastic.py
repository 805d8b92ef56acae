# SPDX-License-Identifier: Apache-2.0
"""Training under torchrun survives lost ranks: it resumes from the newest checkpoint on the remaining ranks, with the
losses of an undisturbed run.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import shardadam
from tests.ranks import on_ranks, processes, rank_and_size, restart

pytestmark = [pytest.mark.scripts, pytest.mark.quiet]
ROOT = Path(__file__).parent.parent
LAUNCH = str(ROOT / "launch")
STEPS, SAVE_EVERY, DROPOUT = 12, 2, 0.1
SMALL = [
    *("--layers=1", "--width=16", "--heads=2", "--context=16", "--validation-windows=4", "--sample-bytes=0"),
    *(f"--steps={STEPS}", "--lr=0.02", "--warmup=1", "--log-every=1", "--timeout=30"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Write a file to train on; at the end stop the workers, which have imported launch/ and must not be reused."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join("".join(generator.choices("abcde", k=4)) for _ in range(1500)))
    yield str(path)
    for world_size in (2, 3):
        restart(world_size)


# Undisturbed runs, in warm workers


def curve(arguments: list[str], dropout: float = 0.0) -> list[float]:
    """Return the loss of each step."""
    if LAUNCH not in sys.path:
        sys.path.insert(0, LAUNCH)
    import arguments as command_line
    import data
    import model
    import pretrain
    from report import Silence

    losses: list[float] = []
    forward = model.Decoder.forward

    class Kept(Silence):
        def __init__(self, steps: int, log_dir: str | None) -> None:
            pass

        def metrics(self, step: int, values: Any, state_bytes: int) -> None:
            losses.append(values["loss"])

    def with_dropout(self: model.Decoder, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(forward(self, tokens), dropout if torch.is_grad_enabled() else 0.0)

    rank, world_size = rank_and_size()
    ranks = command_line.Ranks(rank, world_size, rank, world_size, launched=world_size > 1)
    with (
        mock.patch.object(pretrain, "Report", Kept),
        mock.patch.object(model.Decoder, "forward", with_dropout),
        mock.patch.object(sys, "argv", ["pretrain.py", *SMALL, *arguments]),
    ):
        args, _, device = command_line.parse_arguments(ranks)
        pretrain.pretrain(args, data.load(args.data, args.context), ranks, device)
    return losses


def undisturbed(world_size: int, arguments: list[str], dropout: float = 0.0) -> list[float]:
    return on_ranks(world_size, curve, arguments, dropout)[0]


@pytest.mark.parametrize("optimizer", [["--gradient-sync=backward"], ["--gradient-sync=step"], ["--optimizer=adamw"]])
def test_losses_depend_on_neither_ranks_nor_micro_batches(text: str, optimizer: list[str]) -> None:
    """8 windows on 3 ranks are 2, 3 and 3; with a batch of 1, two of three ranks have no window."""
    for batch, others in ((8, [(1, 3), (2, None), (2, 3), (3, 1)]), (1, [(3, None)])):
        common = ["--data", text, f"--batch={batch}", *optimizer]
        reference = undisturbed(1, common)
        assert len(reference) == STEPS and reference[0] - min(reference) > 1.0
        for world_size, micro_batch in others:
            micro = [] if micro_batch is None else [f"--micro-batch={micro_batch}"]
            assert undisturbed(world_size, [*common, *micro]) == pytest.approx(reference, abs=2e-4), world_size


def test_a_batch_is_split_evenly_over_ranks_and_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(LAUNCH)
    import data

    for batch, world_size, micro_batch in itertools.product(range(1, 14), range(1, 7), (None, 1, 2, 3, 20)):
        ranks = [
            data.parts(batch, rank=rank, world_size=world_size, micro_batch=micro_batch) for rank in range(world_size)
        ]
        assert [window for parts in ranks for part in parts for window in range(batch)[part]] == list(range(batch))
        assert len({len(parts) for parts in ranks}) == 1
        sizes = [len(range(batch)[part]) for parts in ranks for part in parts]
        assert max(sizes) <= (micro_batch or batch) and max(sizes) - min(sizes) <= 1


def check_some(arguments: list[str]) -> int:
    check = shardadam.ShardedAdamW.check_in_sync
    with mock.patch.object(shardadam.ShardedAdamW, "check_in_sync", autospec=True, side_effect=check) as check:
        curve(arguments)
    return check.call_count


def test_replicas_are_checked_every_k_steps(text: str) -> None:
    assert on_ranks(2, check_some, ["--data", text, "--check-every=5"]) == [2, 2]


# Runs under torchrun


class Torchrun:
    """A torchrun agent and the notes of its workers. Ends the processes that it started."""

    def __init__(self, directory: Path, name: str, launcher: list[str], script: list[str], **environment: str) -> None:
        self.losses, self.log = directory / "losses", directory / f"{name}.log"
        command = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.1", *launcher]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LOSSES": str(self.losses), **environment}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, str(ROOT / "tests" / "faulty_pretrain.py"), *SMALL, *script],
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.kill()

    def kill(self) -> None:
        """Kill the agent and its workers, as if their machine were lost."""
        self.process.kill()
        self.process.wait()
        for pid in {note["pid"] for note in self.notes() if note["agent"] == self.process.pid}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def notes(self) -> list[dict[str, Any]]:
        if not self.losses.exists():
            return []
        return [json.loads(line) for line in self.losses.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def await_note(self, condition: Callable[[dict[str, Any]], bool], deadline_s: float = 40.0) -> dict[str, Any]:
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline:
            for note in self.notes():
                if condition(note):
                    return note
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"did not come to it: {self.notes()[-3:]}\n{self.log.read_text()[-3000:]}")

    def ends(self, deadline_s: float = 60.0) -> tuple[int, str]:
        code = self.process.wait(deadline_s)
        return code, self.log.read_text()


def at_each_step(notes: list[dict[str, Any]]) -> dict[int, list[float]]:
    """Return the logged losses of each step; a repeated step has several."""
    losses: dict[int, list[float]] = {}
    for note in notes:
        if "loss" in note:
            losses.setdefault(note["step"], []).append(note["loss"])
    return losses


def fault(generator: random.Random, moment: str, attempt: int, *, any_step: bool = False) -> str:
    """Return a fault at a random step after the first checkpoint that the attempt reaches."""
    words = {"moment": moment, "attempt": attempt}
    words["rank"] = 0 if moment in ("save-manifest", "save-published") else generator.randrange(2)  # rank 0 publishes
    if moment != "load" and not any_step:
        words["step"] = SAVE_EVERY * (2 * attempt + (generator.choice((1, 2)) if attempt else 2))
        if not moment.startswith("save"):
            words["step"] -= generator.randrange(2)
    return " ".join(f"{name}={value}" for name, value in words.items())


FORMATS = {
    "fp32": [],
    "int8-async": ["--dtype=bf16", "--moments=int8", "--save-async", "--save-on-sigterm"],
    "step-uneven": ["--gradient-sync=step", "--batch=7", "--micro-batch=2"],
}
ORDINARY = {"fp32": ("forward", "load", "save"), "int8-async": ("step", "backward")}
PAIRS = [
    *(("forward", "backward"), ("step", "load"), ("save", "save")),
    *(("save-manifest", "raise"), ("save-published", "load")),
]
SWEEP = [
    pytest.param(name, pair, marks=pytest.mark.long, id=f"{name}-{pair[0]}-{pair[1]}")
    for name in FORMATS
    for pair in PAIRS
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "moments"), [*(pytest.param(n, m, id=n) for n, m in ORDINARY.items()), *SWEEP])
def test_a_rank_killed_at_any_moment_changes_no_loss(
    text: str, tmp_path: Path, name: str, moments: tuple[str, ...]
) -> None:
    """Dropout is on, so random number generators must resume, too."""
    generator = random.Random(f"{name} {moments}")
    is_async = "--save-async" in FORMATS[name]
    faults = [
        fault(generator, moment, attempt, any_step=is_async and moment.startswith("save"))
        for attempt, moment in enumerate(moments)
    ]
    options = ["--data", text, *FORMATS[name]]
    saving = ["--save-dir", str(tmp_path / "saved"), f"--save-every={SAVE_EVERY}", "--resume"]
    launcher = ["--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    environment = {"FAULTS": ";".join(faults), "DROPOUT": str(DROPOUT)}
    with Torchrun(tmp_path, "agent", launcher, [*options, *saving], **environment) as torchrun:
        code, output = torchrun.ends(200)
    assert code == 0, output
    notes = torchrun.notes()
    injected = [note for note in notes if "fault" in note]
    assert [note["fault"] for note in injected] == list(moments), faults
    plain = [option for option in options if option not in ("--save-async", "--save-on-sigterm")]
    expected = undisturbed(2, plain, DROPOUT)
    assert at_each_step(notes).keys() == set(range(1, STEPS + 1))
    for step, losses in at_each_step(notes).items():
        assert set(losses) == {expected[step - 1]}, (step, faults)
    for note in injected:
        after = [other for other in notes if other["time"] > note["time"]]
        # No rank waits for its timeout of 30 s.
        assert min(other["time"] for other in after if "started" in other) - note["time"] < 28
        lost = note["step"] - min(other["step"] for other in after if "loss" in other) + 1
        assert lost <= (2 if is_async else 1) * SAVE_EVERY, faults
    assert "raise" not in moments or "ArithmeticError: this rank has found a loss of NaN" in output
    left = {path.name for path in (tmp_path / "saved").iterdir()}
    assert left == {"latest", f"step-{STEPS:08d}", f"step-{STEPS - SAVE_EVERY:08d}"}  # no files of interrupted saves


def test_training_continues_with_fewer_nodes_and_then_with_more(text: str, tmp_path: Path) -> None:
    """In torch 2.13, nodes that join later cannot connect if torchrun shares its store with the workers."""
    steps = 50
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives each node
    rendezvous = "last_call_timeout=1,join_timeout=40,read_timeout=20,keep_alive_interval=1,keep_alive_max_attempt=3"
    options = ["--data", text, "--batch=7", f"--steps={steps}", "--lr=0.005"]
    saving = ["--save-dir", str(tmp_path / "saved"), "--save-every=4", "--resume"]
    launcher = [
        *("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=elastic"),
        *(f"--rdzv-endpoint=127.0.0.1:{store.port}", f"--rdzv-conf=is_host=0,{rendezvous}", "--local-addr=127.0.0.1"),
    ]

    def node(name: str) -> Torchrun:
        environment = {"PAUSE": "0.2", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return Torchrun(tmp_path, name, launcher, [*options, *saving], **environment)

    with node("first") as first, node("second") as second:
        second.await_note(lambda note: "loss" in note and note["step"] >= 6)
        first.kill()
        alone = second.await_note(lambda note: note.get("world_size") == 1)
        second.await_note(lambda note: note.get("world_size") == 1 and note["step"] >= alone["step"] + 6)
        with node("third") as third:
            assert third.ends(80)[0] == 0, third.log.read_text()
        assert second.ends()[0] == 0, second.log.read_text()
    sizes = [note["world_size"] for note in second.notes() if "loss" in note]
    assert [size for size, _ in itertools.groupby(sizes)] == [2, 1, 2]
    expected = undisturbed(2, options)
    assert at_each_step(second.notes()).keys() == set(range(1, steps + 1))
    for step, losses in at_each_step(second.notes()).items():
        assert losses == pytest.approx([expected[step - 1]] * len(losses), abs=2e-4), step


@pytest.mark.parametrize(("whom", "extra"), [("torchrun", []), ("rank 1", ["--save-every=3", "--save-async"])])
def test_sigterm_saves_the_current_step(text: str, tmp_path: Path, whom: str, extra: list[str]) -> None:
    options = ["--data", text, "--save-dir", str(tmp_path / "saved"), *extra]
    launcher = ["--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    with Torchrun(tmp_path, "agent", launcher, [*options, "--save-on-sigterm"], PAUSE="0.3") as torchrun:
        torchrun.await_note(lambda note: "loss" in note and note["step"] >= 4)
        rank_1 = torchrun.await_note(lambda note: note["rank"] == 1)
        os.kill(torchrun.process.pid if whom == "torchrun" else rank_1["pid"], signal.SIGTERM)
        code, output = torchrun.ends(20)
    assert (code == 0) == (whom != "torchrun")  # torchrun itself raises on SIGTERM
    losses = at_each_step(torchrun.notes())
    last = max(losses)
    assert 4 <= last < STEPS
    assert f"SIGTERM: stopped after step {last} of {STEPS}, which is saved; continue with --resume" in output
    rest = undisturbed(1, [*options, "--resume", "--save-on-sigterm"])
    found = [loss for step in sorted(losses) for loss in losses[step]] + rest
    assert found == pytest.approx(undisturbed(2, ["--data", text]), abs=2e-4)


def told_twice(pause_s: float) -> None:
    sys.path.insert(0, LAUNCH)
    import preemption

    preemption.REPEATED_S = 0.2
    with preemption.Preemption() as preempted:
        assert not preempted.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preempted.requested()
        time.sleep(pause_s)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preempted.requested()


@pytest.mark.parametrize(("pause_s", "code"), [(0.0, 0), (0.4, 128 + signal.SIGTERM)])
def test_a_second_sigterm_ends_at_once_but_a_duplicate_does_not(pause_s: float, code: int) -> None:
    """A signal to a POSIX process group reaches a worker twice: directly and through torchrun."""
    process = processes.Process(target=told_twice, args=(pause_s,))
    process.start()
    process.join(20)
    assert process.exitcode == code
