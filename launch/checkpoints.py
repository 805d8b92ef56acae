# SPDX-License-Identifier: Apache-2.0
"""Saves and resumes a run: when to save, which checkpoint to resume from, and which options must be equal.

shardadam.save and load read and write the files. Collective: all ranks must make these calls.
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

# Other values would change a run halfway, or be ignored: checkpoints hold learning rate and weight decay.
REPEATED = (
    *("steps", "seed", "batch", "context", "layers", "width", "heads", "dtype", "moments", "master"),
    *("lr", "warmup", "weight_decay", "clip"),
)


class CannotResume(ValueError):
    """The checkpoints in --save-dir belong to another run; the message says how they differ, and what to do."""


def identity_of(args: argparse.Namespace, text: list[int]) -> dict[str, Any]:
    """The options of a run that its checkpoints record; `text` is the fingerprint of its training text."""
    return {**{name: getattr(args, name) for name in REPEATED}, "text": text}


def starting_point(args: argparse.Namespace, identity: Mapping[str, Any]) -> shardadam.Checkpoint | None:
    """Returns the checkpoint to resume from, without its tensors; None to start at the first step. Collective.

    Raises CannotResume where it belongs to another run, or --save-dir holds checkpoints and --resume is missing.
    """
    if not args.save_dir or not rank_0_finds_a_checkpoint(args.save_dir):
        return None
    if not args.resume:
        raise CannotResume(
            f"--save-dir {args.save_dir} holds checkpoints of an earlier run, and new ones would replace them "
            f"(--keep {args.keep}); add --resume to continue that run, or choose another directory"
        )
    found = shardadam.load(args.save_dir)
    if found.path == Path(args.save_dir).absolute():
        raise CannotResume(
            f"--save-dir {args.save_dir} is itself a checkpoint; give its parent directory, "
            f"{Path(args.save_dir).parent} (to resume from an older one, move the newer ones out of it)"
        )
    check_same_run(shown(found.path, args), found.extras[0], identity)
    return found


def rank_0_finds_a_checkpoint(directory: str) -> bool:
    """Asks rank 0 alone, so that all ranks decide alike; `load` raises where another rank does not see the files."""
    found = [shardadam.has_checkpoint(directory)]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def check_same_run(path: Path, saved: Any, identity: Mapping[str, Any]) -> None:
    """Raises CannotResume with all options that differ, and the values that resume."""
    if not isinstance(saved, dict) or saved.keys() != identity.keys():
        raise CannotResume(
            f"--resume: {path} was not saved by this version of pretrain.py: it does not hold the options of its run; "
            "choose another --save-dir"
        )
    differing = [name for name in REPEATED if saved[name] != identity[name]]
    if differing:
        found, expected = options(differing, identity), options(differing, saved)
        raise CannotResume(
            f"--resume: this run has {found}, and {path} belongs to one with {expected}; "
            f"give {expected}, or another --save-dir to start a new run"
        )
    if saved["text"] != identity["text"]:
        raise CannotResume(
            f"--resume: this run trains on {identity['text'][0]:,} bytes, and {path} belongs to one that trained on "
            f"{saved['text'][0]:,} or on different ones; give the same --data (without --data: the same Python), "
            "or another --save-dir to start a new run"
        )


def options(names: list[str], values: Mapping[str, Any]) -> str:
    """As typed on the command line."""
    return " ".join(f"--{name.replace('_', '-')} {values[name]}" for name in names)


def shown(path: Path, args: argparse.Namespace) -> Path:
    """The path of a checkpoint, with its directory as the user typed it."""
    return Path(args.save_dir) / path.name


class Run(Protocol):
    """The parts of a run that are saved."""

    model: nn.Module
    optimizer: Any
    schedule: LRScheduler


class Saver:
    """Saves a run every --save-every steps and at its end. Collective: all ranks must call it at the same steps."""

    def __init__(self, args: argparse.Namespace, identity: Mapping[str, Any], run: Run, report: Silence) -> None:
        self.args = args
        self.identity = dict(identity)
        self.content = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.schedule}
        self.report = report
        self.newest_step = -1
        self.count = 0
        self.seconds = 0.0  # of training spent waiting for saves
        self.writing: Future[Path] | None = None

    def begin(self, start: shardadam.Checkpoint | None) -> None:
        """Loads the checkpoint that `starting_point` returned."""
        if start is not None:
            shardadam.load(start.path, **self.content)
            self.newest_step = start.step
            ranks = f"{start.world_size} rank{'s' if start.world_size > 1 else ''}"
            self.report.say(f"resumed from step {start.step} of {shown(start.path, self.args)}, saved on {ranks}")
        elif self.args.resume:
            self.report.say(f"starting at step 1: {self.args.save_dir} holds no checkpoint")

    def step_done(self, step: int) -> None:
        if self.writing is not None and self.writing.done() and self.writing.exception() is None:
            self.wait_all()  # a failure is raised by the next save, on all ranks
        if self.args.save_every and step % self.args.save_every == 0:
            self.save(step)

    def finish(self, step: int) -> None:
        """Saves the last step, unless it is saved, and waits until all files are written."""
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
        """Waits for the save in the background; raises its error."""
        if self.writing is None:
            return
        started = time.perf_counter()
        writing, self.writing = self.writing, None
        path = writing.result()
        self.seconds += time.perf_counter() - started
        self.report.say(f"step {self.newest_step}: saved {shown(path, self.args)}")
