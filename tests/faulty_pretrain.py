# SPDX-License-Identifier: Apache-2.0
"""``launch/pretrain.py`` with faults, which ``test_elastic.py`` starts under torchrun.

Environment variables:

FAULTS   faults separated by ``;``, such as ``rank=1 step=7 moment=backward attempt=0``: kills that rank at that moment,
         or raises in it (``raise``). ``attempt`` counts restarts of torchrun. Omitted conditions match anything.
LOSSES   a file: rank 0 appends a line of JSON after every step, and every rank at its start and at its fault.
DROPOUT  the share of logits to drop, so that training uses random numbers.
PAUSE    seconds to sleep in every step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))

import torch

import data
import model
import pretrain
import report
from shardadam.checkpoint import loading, saving
from shardadam.engine.gathering import ParameterGatherer

RANK, ATTEMPT = (int(os.environ.get(name, 0)) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
FAULTS = [dict(word.split("=") for word in fault.split()) for fault in os.environ.get("FAULTS", "").split(";") if fault]
now_step = 0


def inject(moment: str) -> None:
    here = {"rank": str(RANK), "step": str(now_step), "moment": moment, "attempt": str(ATTEMPT)}
    for fault in FAULTS:
        if fault.items() <= here.items():
            note(fault=moment)
            if moment == "raise":
                raise ArithmeticError("this rank has found a loss of NaN")
            os.kill(os.getpid(), signal.SIGKILL)


def note(**values: Any) -> None:
    if "LOSSES" in os.environ:
        who = {"attempt": ATTEMPT, "rank": RANK, "pid": os.getpid(), "agent": os.getppid()}
        line = {**who, "step": now_step, "time": time.time(), **values}
        with open(os.environ["LOSSES"], "a") as file:
            file.write(json.dumps(line) + "\n")


def wrap(owner: Any, name: str, *, before: str | None = None, after: str | None = None) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if before:
            inject(before)
        result = original(*arguments, **options)
        if after:
            inject(after)
        return result

    setattr(owner, name, wrapped)


wrap(ParameterGatherer, "dispatch", before="step")  # a bucket is updated but not gathered
wrap(saving, "_write_part", after="save")  # this rank's file is written; other ranks' may not be
wrap(saving, "_write_manifest", after="save-manifest")  # all files are written but not published
wrap(saving, "publish", after="save-published")  # published, but the other ranks do not know yet
wrap(loading, "read_tensors", after="load")  # this rank's shards are read, its random state is not

training_starts, forward, metrics = data.training_starts, model.Decoder.forward, report.Report.metrics


def counted_training_starts(*arguments: Any, step: int, **options: Any) -> Any:
    global now_step
    now_step = step
    time.sleep(float(os.environ.get("PAUSE", 0)))
    inject("raise")
    return training_starts(*arguments, step=step, **options)


def faulty_forward(self: model.Decoder, tokens: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return forward(self, tokens)
    inject("forward")
    return torch.nn.functional.dropout(forward(self, tokens), float(os.environ.get("DROPOUT", 0)))


def faulty_block(self: model.Block, *arguments: Any) -> torch.Tensor:
    output = block(self, *arguments)
    if output.requires_grad:
        output.register_hook(lambda gradient: inject("backward"))  # the head's gradient is reduced, the block's is not
    return output


def noted_metrics(self: report.Report, step: int, values: dict[str, float], state_bytes: int) -> None:
    metrics(self, step, values, state_bytes)
    note(loss=values["loss"], world_size=int(os.environ.get("WORLD_SIZE", 1)))


block = model.Block.forward
data.training_starts = counted_training_starts
model.Decoder.forward = faulty_forward  # type: ignore[method-assign]
model.Block.forward = faulty_block  # type: ignore[method-assign]
report.Report.metrics = noted_metrics  # type: ignore[method-assign, assignment]

if __name__ == "__main__":
    note(started=True)
    pretrain.main()
