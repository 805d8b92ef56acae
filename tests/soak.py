# SPDX-License-Identifier: Apache-2.0
"""Train for minutes with a fault every few seconds, then prove that nothing was lost.

    python tests/soak.py --minutes 30 --seed 0 [--json log.json]

Each episode resumes from the newest checkpoint, on 1 to 4 ranks, with random formats, gradient modes and transports,
some of them with tensor parallelism, and runs to its last step or to a fault. Exits with 1 and a message unless all of
this holds:

- no hang: every live rank finishes or raises within the process group's timeout and a margin;
- no poison: at the end of an episode, parameters are finite, and equal on all live ranks;
- no leak: no process, file descriptor, shared memory or temporary directory of a checkpoint is left, and the memory of
  this process does not grow;
- only steps since the last checkpoint are lost: a replay of the same worlds and steps without faults gives the same
  bits, and the loss has fallen.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardadam
from shardadam import CheckpointError, Precision, ShardedAdamW
from shardadam.transport.placement import local_tensor
from tests.ranks import ranks_of

TIMEOUT_S = 3.0
MARGIN_S = 12.0  # for two desync reports, the time limit of a save, and a busy machine
START_S = 60.0
BATCH = 12  # a multiple of 1 to 4
SAVE_EVERY = 4
GROWTH_BYTES = 64 << 20


# Random choices


@dataclass(frozen=True)
class World:
    """The settings of an episode."""

    ranks: int
    hybrid: bool
    dtype: str
    moments: str
    master: str
    gradient_sync: str
    transport: str
    overlap: bool
    asynchronous: bool
    tensor_parallel: bool = False

    @property
    def parts(self) -> int:
        """The number of ranks that hold one copy of the model."""
        return 2 if self.tensor_parallel else 1

    @property
    def alone(self) -> World:
        """The same on one rank."""
        return replace(self, ranks=1, hybrid=False, tensor_parallel=False)

    @staticmethod
    def draw(choose: random.Random, dtype: str) -> World:
        ranks = choose.randint(1, 4)
        gradient_sync = choose.choice(("backward", "backward", "step"))
        tensor_parallel = ranks in (2, 4) and choose.random() < 0.5
        return World(
            ranks=ranks,
            tensor_parallel=tensor_parallel,
            hybrid=ranks == 4 and not tensor_parallel and choose.random() < 0.5,
            dtype=dtype,
            moments=choose.choice(("fp32", "bf16", "int8")),
            master=choose.choice(("auto", "split", "fp32")) if dtype == "bfloat16" else "auto",
            gradient_sync=gradient_sync,
            transport=choose.choice(("auto", "collective")),
            overlap=choose.random() < 0.3,
            asynchronous=choose.random() < 0.3,
        )


@dataclass(frozen=True)
class Fault:
    """A fault of one rank after ``after`` steps of the episode."""

    kind: str
    rank: int
    after: int
    delay_s: float = 0.0

    @staticmethod
    def draw(choose: random.Random, ranks: int) -> Fault:
        kinds = [kind for kind in sorted(FAULTS) if ranks > 1 or kind not in NEEDS_OTHERS]
        return Fault(choose.choice(kinds), choose.randrange(ranks), choose.randint(1, 9), choose.random() * 0.02)


def soon(delay_s: float, number: int) -> None:
    """Send a signal to this process after ``delay_s``, within the next step."""
    pid = os.getpid()
    threading.Timer(delay_s, lambda: os.kill(pid, number)).start()


def killed(run: Run, fault: Fault) -> None:
    soon(fault.delay_s, signal.SIGKILL)


def terminated(run: Run, fault: Fault) -> None:
    soon(fault.delay_s, signal.SIGTERM)


def interrupted(run: Run, fault: Fault) -> None:
    soon(fault.delay_s, signal.SIGINT)


def stopped(run: Run, fault: Fault) -> None:
    soon(fault.delay_s, signal.SIGSTOP)


def exits(run: Run, fault: Fault) -> None:
    os._exit(0)


def raises(run: Run, fault: Fault) -> None:
    raise ZeroDivisionError("in the user's code")


def raises_in_backward(run: Run, fault: Fault) -> None:
    parameter = run.model[0].weight

    def hook(_: Tensor) -> None:
        raise ZeroDivisionError("in backward")

    parameter.register_hook(hook)


def sleeps(run: Run, fault: Fault) -> None:
    time.sleep(TIMEOUT_S + 2)


def skips_a_step(run: Run, fault: Fault) -> None:
    run.loss(run.step).backward()
    run.optimizer.zero_grad()


def steps_alone(run: Run, fault: Fault) -> None:
    run.optimizer.step()


def looks_at_state(run: Run, fault: Fault) -> None:
    run.optimizer.full_state(run.model[0].weight)


def clips(run: Run, fault: Fault) -> None:
    run.optimizer.clip_grad_norm_(1.0)


def saves_alone(run: Run, fault: Fault) -> None:
    shardadam.save(run.directory, step=run.step, optimizer=run.optimizer, timeout_s=TIMEOUT_S)


def changes_lr(run: Run, fault: Fault) -> None:
    run.optimizer.param_groups[0]["lr"] *= 2


def killed_in_save(run: Run, fault: Fault) -> None:
    save_alike(run, lambda: soon(fault.delay_s / 4, signal.SIGKILL))


def poisoned(run: Run, fault: Fault) -> None:
    """All ranks skip the poisoned batch and continue."""


def corrupted(run: Run, fault: Fault) -> None:
    """The newest checkpoint is damaged after the episode; the next episode must refuse to load it."""


FAULTS: dict[str, Callable[[Run, Fault], None]] = {
    fault.__name__: fault
    for fault in (
        *(killed, killed, terminated, interrupted, stopped, exits, raises, raises_in_backward, sleeps, skips_a_step),
        *(steps_alone, looks_at_state, clips, saves_alone, changes_lr, killed_in_save, poisoned, corrupted),
    )
}
GENTLE = ("poisoned", "corrupted")
# With one rank these are no faults, or no other rank notices.
NEEDS_OTHERS = ("stopped", "changes_lr", "clips", "saves_alone")


# One rank


@dataclass
class Run:
    model: nn.Sequential
    optimizer: ShardedAdamW
    rank: int
    ranks: int
    directory: str
    parts: int
    step: int = 0
    before_save: Callable[[], None] | None = None

    def loss(self, step: int, poison: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 16, generator=generator)
        y = torch.sin(x @ torch.linspace(-1, 1, 16)[:, None])
        index, count = self.rank // self.parts, self.ranks // self.parts
        own = slice(index * BATCH // count, (index + 1) * BATCH // count)
        dtype = self.model[0].weight.dtype
        return (self.model(x[own].to(dtype)).float() - y[own]).square().mean() * poison


def save_alike(run: Run, before: Callable[[], None]) -> None:
    run.before_save = before


@dataclass(frozen=True)
class Episode:
    """A function for each rank: train from the newest checkpoint to step ``last`` or to the fault."""

    world: World
    directory: str
    last: int
    fault: Fault | None

    def __call__(self, rank: int, pipe: Connection) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        run: Run | None = None
        try:
            run = build(self.world, rank, self.directory)
            if shardadam.has_checkpoint(self.directory):
                run.step = shardadam.load(
                    self.directory, model=run.model, optimizer=run.optimizer, random_states=False, timeout_s=TIMEOUT_S
                ).step
            pipe.send(("began", run.step))
            self.train(run)
            end = ("through", "")
        except BaseException as error:  # also KeyboardInterrupt
            end = (type(error).__name__, str(error))
        parameters = [] if run is None else [local_tensor(p.detach()) for p in run.model.parameters()]
        values = [p.float().flatten().tolist() for p in parameters]
        pipe.send((*end, -1 if run is None else run.step, values))
        if end[0] != "through":
            os._exit(1)  # as a script would; the others notice
        dist.barrier()
        os._exit(0)

    def train(self, run: Run) -> None:
        began = run.step
        saved: Path | Future[Path] | None = None
        while run.step < self.last:
            is_due = self.fault is not None and run.step - began == self.fault.after
            if is_due and self.fault is not None:
                if self.fault.kind == "poisoned":
                    self.skip_a_poisoned_batch(run, self.fault)
                elif run.rank == self.fault.rank:
                    FAULTS[self.fault.kind](run, self.fault)
            run.loss(run.step).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.step += 1
            if run.step % SAVE_EVERY == 0 or run.step == self.last:
                if run.before_save is not None:
                    run.before_save()
                saved = shardadam.save(
                    self.directory,
                    step=run.step,
                    model=run.model,
                    optimizer=run.optimizer,
                    asynchronous=self.world.asynchronous,
                    timeout_s=TIMEOUT_S,
                )
        run.optimizer.synchronize()
        if isinstance(saved, Future):
            saved.result()

    def skip_a_poisoned_batch(self, run: Run, fault: Fault) -> None:
        skipped = int(run.optimizer.skipped_steps)
        run.loss(run.step, float("nan") if run.rank == fault.rank else 1.0).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        if int(run.optimizer.skipped_steps) != skipped + 1:
            raise AssertionError("a poisoned batch was not skipped")


def build(world: World, rank: int, directory: str) -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 1))
    model.to(getattr(torch, world.dtype))
    mesh: DeviceMesh | None = None
    if world.hybrid:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    elif world.tensor_parallel:
        mesh, tensor_parallel = mesh_of_parts(world)
        parallelize_module(model, tensor_parallel, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = ShardedAdamW(
        model.named_parameters(),
        lr=5e-3,
        max_grad_norm=1.0,
        bucket_mb=0.002,
        process_group=mesh,
        gradient_sync=world.gradient_sync,  # type: ignore[arg-type]
        transport=world.transport,  # type: ignore[arg-type]
        precision=Precision(moments=world.moments, master=world.master),  # type: ignore[arg-type]
    )
    if world.overlap:
        optimizer.overlap_gather(model)
    return Run(model, optimizer, rank, world.ranks, directory, world.parts)


def mesh_of_parts(world: World) -> tuple[DeviceMesh, DeviceMesh]:
    """Return the data-parallel and the tensor-parallel mesh. ``init_device_mesh`` would not take the time limit."""
    rows = [[rank + part for part in range(world.parts)] for rank in range(0, world.ranks, world.parts)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    found = []
    for lines in (columns, rows):
        groups = [dist.new_group(line, timeout=timedelta(seconds=TIMEOUT_S)) for line in lines]
        own = next(index for index, line in enumerate(lines) if dist.get_rank() in line)
        found.append(DeviceMesh.from_group(groups[own], "cpu", mesh=lines[own]))
    return found[0], found[1]


# All ranks


@dataclass
class Outcome:
    """How a rank ended: ``kind`` is "through", an exception's name, or "silent" (no message)."""

    kind: str = "silent"
    message: str = ""
    step: int = -1
    parameters: list[list[float]] = field(default_factory=list)
    began: int | None = None


class Failure(AssertionError):
    """A guarantee is broken."""


def play(episode: Episode, store: Path) -> list[Outcome]:
    """Run the ranks of an episode; return when all live ranks have sent their outcome."""
    outcomes = [Outcome() for _ in range(episode.world.ranks)]
    with ranks_of(episode.world.ranks, store, episode, timeout_s=TIMEOUT_S) as ranks:
        deadline = time.monotonic() + START_S
        waiting = set(range(episode.world.ranks))
        while waiting:
            for rank in sorted(waiting):
                try:
                    if not ranks.pipes[rank].poll(0.02):
                        if not ranks.processes[rank].is_alive() and not ranks.pipes[rank].poll(0):
                            raise EOFError
                        continue
                    answer = ranks.pipes[rank].recv()
                except EOFError:
                    waiting.discard(rank)
                    deadline = min(deadline, time.monotonic() + TIMEOUT_S + MARGIN_S)
                    continue
                if answer[0] == "began":
                    outcomes[rank].began = answer[1]
                    deadline = time.monotonic() + START_S
                else:
                    outcomes[rank] = Outcome(*answer, began=outcomes[rank].began)
                    waiting.discard(rank)
                    deadline = min(deadline, time.monotonic() + TIMEOUT_S + MARGIN_S)
            stopped = {episode.fault.rank} if episode.fault is not None and episode.fault.kind == "stopped" else set()
            if waiting and waiting <= stopped and len(outcomes) > 1:
                break
            if waiting and time.monotonic() > deadline:
                raise Failure(f"ranks {sorted(waiting)} hang: {episode}, {outcomes}")
    return outcomes


def check_outcomes(episode: Episode, outcomes: Sequence[Outcome]) -> None:
    fault = episode.fault
    for one in outcomes:
        if one.kind in ("AssertionError", "KeyError", "AttributeError", "IndexError", "TypeError"):
            raise Failure(f"{one.kind}: {one.message} in {episode}")
        if not all(abs(x) < 1e6 for values in one.parameters for x in values):  # False for NaN
            raise Failure(f"parameters are not finite: {episode}")
    if (fault is None or fault.kind in GENTLE) and any(one.kind != "through" for one in outcomes):
        raise Failure(f"an episode without a fatal fault did not complete: {episode}, {outcomes}")
    by_step: dict[tuple[int, int], list[list[list[float]]]] = {}
    for rank, one in enumerate(outcomes):
        if one.parameters and one.kind == "through":
            by_step.setdefault((one.step, rank % episode.world.parts), []).append(one.parameters)
    if any(any(values != same[0] for values in same) for same in by_step.values()):
        raise Failure(f"ranks have completed with different parameters: {episode}")


def newest_step(directory: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in directory.glob("step-*")), default=0)


def corrupt_newest(directory: Path, choose: random.Random) -> None:
    newest = directory / f"step-{newest_step(directory):08d}"
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size > 0)
    file = choose.choice(files)
    content = bytearray(file.read_bytes())
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    file.write_bytes(content)


def shared_memory_names() -> set[str]:
    """Return the names in /dev/shm, without semaphores and torch's shared tensors."""
    found = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return {name for name in found if not name.startswith(("sem.mp-", "torch_"))}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Log:
    """Counts of the whole soak."""

    seed: int
    minutes: float
    episodes: int = 0
    steps: int = 0  # repeated steps count again
    lost_steps: int = 0  # since the checkpoints that episodes resumed from
    most_lost: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    worlds: Counter[str] = field(default_factory=Counter)
    slowest_end_s: float = 0.0
    refused: int = 0
    first_loss: float = 0.0
    last_loss: float = 0.0
    segments: int = 0


def evaluate(directory: Path, world: World) -> float:
    run = build(world.alone, 0, str(directory))
    shardadam.load(directory, model=run.model, random_states=False)
    with torch.no_grad():
        return sum(run.loss(10**6 + i).item() for i in range(20)) / 20


def content_of(directory: Path, world: World) -> dict[str, Any]:
    """Return the exact parameters and state of a checkpoint."""
    run = build(replace(world.alone, moments="fp32", overlap=False), 0, str(directory))
    shardadam.load(directory, model=run.model, optimizer=run.optimizer, random_states=False)
    state = run.optimizer.full_state_dict()["state"]
    return {
        "parameters": {name: p.detach().clone() for name, p in run.model.named_parameters()},
        "state": {f"{index}.{name}": value for index, one in state.items() for name, value in one.items()},
    }


def soak(minutes: float, seed: int, root: Path) -> Log:
    choose = random.Random(seed)
    log = Log(seed, minutes)
    dtype = choose.choice(("float32", "bfloat16"))
    checkpoints = root / "checkpoints"
    segments: list[tuple[World, int, int]] = []  # history of the current state: world, first and last step
    end = time.monotonic() + minutes * 60
    shm, descriptors, memory = shared_memory_names(), len(os.listdir("/proc/self/fd")), 0
    damaged: set[int] = set()  # steps of damaged checkpoints; if no rank reads the damaged byte, the replay differs
    first = World.draw(choose, dtype)
    log.first_loss = fresh_loss(first)
    while time.monotonic() < end or not segments:
        world = World.draw(choose, dtype)
        fault = Fault.draw(choose, world.ranks) if choose.random() < 0.9 else None
        start = newest_step(checkpoints)
        episode = Episode(world, str(checkpoints), start + choose.randint(4, 14), fault)
        store = root / "store"
        began = time.monotonic()
        outcomes = play(episode, store)
        seconds = time.monotonic() - began
        store.unlink(missing_ok=True)
        if start in damaged and any(one.kind == "CheckpointError" for one in outcomes):
            log.refused += 1
            shutil.rmtree(checkpoints / f"step-{start:08d}")
            segments = cut(segments, newest_step(checkpoints))
            continue
        check_outcomes(episode, outcomes)
        log.episodes += 1
        log.worlds[name_of(world)] += 1
        log.faults[fault.kind if fault else "none"] += 1
        log.ends.update(one.kind for one in outcomes)
        log.slowest_end_s = max(log.slowest_end_s, seconds)
        reached = newest_step(checkpoints)
        furthest = max([one.step for one in outcomes] + [reached])
        log.steps += furthest - start
        lost = furthest - reached
        log.lost_steps, log.most_lost = log.lost_steps + lost, max(log.most_lost, lost)
        if lost > SAVE_EVERY * (2 if world.asynchronous else 1):
            raise Failure(f"{lost} steps lost, with a checkpoint every {SAVE_EVERY}: {episode}, {outcomes}")
        if reached > start:
            segments.append((world, start, reached))
        if (
            fault is not None
            and fault.kind == "corrupted"
            and reached > 0
            and len(list(checkpoints.glob("step-*"))) > 1
        ):
            corrupt_newest(checkpoints, choose)
            damaged.add(reached)
        gc.collect()
        if log.episodes == 5:
            descriptors, memory = len(os.listdir("/proc/self/fd")), resident_bytes()
        elif log.episodes > 5:
            check_leaks(shm, descriptors, memory)
        print(
            f"{log.episodes:>4}  {name_of(world)}  {fault.kind if fault else 'no fault':<18} steps {start}-{reached}"
            f"  {seconds:.1f} s  {dict(Counter(one.kind for one in outcomes))}",
            flush=True,
        )
    if newest_step(checkpoints) in damaged:
        shutil.rmtree(checkpoints / f"step-{newest_step(checkpoints):08d}")
        segments = cut(segments, newest_step(checkpoints))
    last = segments[-1][0]
    log.last_loss = evaluate(checkpoints, last)
    if not log.last_loss < log.first_loss:
        raise Failure(f"the loss has not fallen: {log.first_loss:.4f} to {log.last_loss:.4f}")
    log.segments = len(segments)
    check_replay(segments, checkpoints, root)
    check_leaks(shm, descriptors, memory)
    return log


def cut(segments: list[tuple[World, int, int]], step: int) -> list[tuple[World, int, int]]:
    """Return the segments up to ``step``, from which training resumes."""
    kept = [(world, start, min(stop, step)) for world, start, stop in segments if start < step]
    return kept


def name_of(world: World) -> str:
    return f"{world.ranks // world.parts} x {world.parts} ranks"


def fresh_loss(world: World) -> float:
    run = build(world.alone, 0, "")
    with torch.no_grad():
        return sum(run.loss(10**6 + i).item() for i in range(20)) / 20


def check_leaks(shm: set[str], descriptors: int, memory: int) -> None:
    if new := shared_memory_names() - shm:
        raise Failure(f"left in /dev/shm: {sorted(new)}")
    if len(os.listdir("/proc/self/fd")) > descriptors + 2:
        raise Failure(f"{len(os.listdir('/proc/self/fd'))} descriptors are open, {descriptors} before")
    if memory and resident_bytes() > memory + GROWTH_BYTES:
        raise Failure(f"{resident_bytes():,} bytes are resident, {memory:,} before")


def check_replay(segments: Sequence[tuple[World, int, int]], checkpoints: Path, root: Path) -> None:
    """Check that the same worlds and steps without faults give the same bits."""
    replayed = root / "replayed"
    for world, start, stop in segments:
        if newest_step(replayed) != start:
            raise Failure(f"found step {newest_step(replayed)} in the replay, expected {start}")
        outcomes = play(Episode(world, str(replayed), stop, None), root / "store")
        (root / "store").unlink(missing_ok=True)
        if any(one.kind != "through" for one in outcomes):
            raise Failure(f"a replay did not complete: {world}, {outcomes}")
        name = f"step-{stop:08d}"
        found, expected = content_of(checkpoints / name, world), content_of(replayed / name, world)
        for kind, values in expected.items():
            for tensor, value in values.items():
                if not torch.equal(found[kind][tensor], value):
                    raise Failure(f"{kind} {tensor} at step {stop} differs from the replay's, from {start} in {world}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="a file for the counts of episodes, faults and steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="shardadam-soak-"))
    began = time.monotonic()
    try:
        log = soak(args.minutes, args.seed, root)
    except (Failure, CheckpointError) as error:
        print(f"FAILED with --seed {args.seed} after {time.monotonic() - began:.0f} s: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    seen = {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(log).items()}
    print(json.dumps(seen, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(seen, indent=1) + "\n")
    print(f"held, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
