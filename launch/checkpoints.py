# SPDX-License-Identifier: Apache-2.0
"""When a run saves, where it goes on, and what must be the same for that.

What is in a checkpoint and how it gets there is the business of shardadam.save and load; everything here is collective.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import shardadam
from report import Silence

# With others a run would not go on as it began, or they would be ignored: checkpoints hold learning rate and decay.
REPEATED = (
    *("steps", "seed", "batch", "context", "layers", "width", "heads", "dtype", "moments", "master"),
    *("lr", "warmup", "weight_decay", "clip"),
)


class CannotResume(ValueError):
    """The checkpoints in --save-dir do not belong to this run; the message says why and what to do."""


def identity_of(args: argparse.Namespace, text: list[int]) -> dict[str, Any]:
    """What a checkpoint says of the run that it belongs to; `text` is the fingerprint of what it trains on."""
    return {**{name: getattr(args, name) for name in REPEATED}, "text": text}


def starting_point(args: argparse.Namespace, identity: Mapping[str, Any]) -> shardadam.Checkpoint | None:
    """Collective: the checkpoint to go on from, of which nothing is loaded yet; None: begin.

    Raises CannotResume where it is another run's, or where this run would begin among the checkpoints of another.
    """
    if not args.save_dir or not rank_0_finds_a_checkpoint(args.save_dir):
        return None
    if not args.resume:
        raise CannotResume(
            f"--save-dir {args.save_dir} holds checkpoints of an earlier run, and new ones would push them out "
            f"(--keep {args.keep}); go on from them with --resume, or choose another directory"
        )
    found = shardadam.load(args.save_dir)
    if found.path == Path(args.save_dir).absolute():
        raise CannotResume(
            f"--save-dir {args.save_dir} is itself a checkpoint; give the directory in which it lies, "
            f"{Path(args.save_dir).parent} (to go on from an older one, move the newer ones out of it)"
        )
    check_same_run(shown(found.path, args), found.extras[0], identity)
    return found


def rank_0_finds_a_checkpoint(directory: str) -> bool:
    """Rank 0 looks, so that all ranks decide alike; where others do not see what it sees, `load` says so."""
    found = [shardadam.has_checkpoint(directory)]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def check_same_run(path: Path, saved: Any, identity: Mapping[str, Any]) -> None:
    """Raises CannotResume with everything that differs, and the options that make it equal."""
    if not isinstance(saved, dict) or saved.keys() != identity.keys():
        raise CannotResume(
            f"--resume: {path} was not saved by this version of pretrain.py: it does not hold the options of its run; "
            "give another --save-dir"
        )
    differing = [name for name in REPEATED if saved[name] != identity[name]]
    if differing:
        found, expected = options(differing, identity), options(differing, saved)
        raise CannotResume(
            f"--resume: this run has {found}, and {path} belongs to one with {expected}; "
            f"give {expected}, or another --save-dir to begin anew"
        )
    if saved["text"] != identity["text"]:
        raise CannotResume(
            f"--resume: this run trains on {identity['text'][0]:,} bytes, and {path} belongs to one that trained on "
            f"{saved['text'][0]:,} or on different ones; give the same --data (without --data: the same Python), "
            "or another --save-dir to begin anew"
        )


def options(names: list[str], values: Mapping[str, Any]) -> str:
    """As they are typed."""
    return " ".join(f"--{name.replace('_', '-')} {values[name]}" for name in names)


def shown(path: Path, args: argparse.Namespace) -> Path:
    """The path of a checkpoint as the user calls its directory."""
    return Path(args.save_dir) / path.name


class Run(Protocol):
    """What is saved of a run."""

    model: nn.Module
    optimizer: Any
    schedule: LRScheduler


class Saver:
    """Saves a run every --save-every steps and where it ends. All ranks call it at the same steps."""

    def __init__(self, args: argparse.Namespace, identity: Mapping[str, Any], run: Run, report: Silence) -> None:
        self.args = args
        self.identity = dict(identity)
        self.content = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.schedule}
        self.report = report
        self.newest_step = -1
        self.count = 0
        self.seconds = 0.0  # that training waited
        self.writing: Future[Path] | None = None

    def begin(self, start: shardadam.Checkpoint | None) -> None:
        """Loads what `starting_point` has found."""
        if start is not None:
            shardadam.load(start.path, **self.content)
            self.newest_step = start.step
            ranks = f"{start.world_size} rank{'s' if start.world_size > 1 else ''}"
            self.report.say(f"went on from step {start.step} of {shown(start.path, self.args)}, saved on {ranks}")
        elif self.args.resume:
            self.report.say(f"starts from the beginning: {self.args.save_dir} holds no checkpoint")

    def step_done(self, step: int) -> None:
        if self.writing is not None and self.writing.done() and self.writing.exception() is None:
            self.wait_all()  # what failed is told where all ranks are: by the next save
        if self.args.save_every and step % self.args.save_every == 0:
            self.save(step)

    def finish(self, step: int) -> None:
        """Saves the last step unless that has just been done, and waits until all is written."""
        asked = self.args.save_every or self.args.stop_after or self.args.save_on_sigterm
        if asked and step != self.newest_step:
            self.save(step)
        self.wait_all()

    def save(self, step: int) -> None:
        self.wait_all()
        started = time.perf_counter()
        options = {"step": step, "keep": self.args.keep, "asynchronous": self.args.save_async}
        saved = shardadam.save(self.args.save_dir, extra=self.identity, **self.content, **options)
        self.seconds += time.perf_counter() - started
        self.newest_step, self.count = step, self.count + 1
        if isinstance(saved, Future):
            self.writing = saved
        else:
            self.report.say(f"step {step}: saved {shown(saved, self.args)}")

    def wait_all(self) -> None:
        """Waits for what is being written in the background, and raises what it failed with."""
        if self.writing is None:
            return
        started = time.perf_counter()
        writing, self.writing = self.writing, None
        path = writing.result()
        self.seconds += time.perf_counter() - started
        self.report.say(f"step {self.newest_step}: saved {shown(path, self.args)}")
