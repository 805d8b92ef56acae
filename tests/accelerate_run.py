# SPDX-License-Identifier: Apache-2.0
"""One training script for the tests of the accelerate integration, as a user would write it; run under torchrun.

    torchrun accelerate_run.py OUT FLAVOUR [option=value ...]

FLAVOUR is "stock" (accelerate.Accelerator, DistributedDataParallel, torch.optim.AdamW) or "sharded". Every rank writes
its results to OUT/FLAVOUR-RANK.pt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from shardadam import Precision, ShardedAdamW
from shardadam.integrations.accelerate import ShardedAccelerator


@contextmanager
def as_launched() -> Iterator[None]:
    """In a worker of tests/ranks.py, set torchrun's variables; at the end, reset accelerate's process-wide state."""
    known = torch.distributed.is_initialized()
    rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if known else (0, 1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    launched = {name: str(value) for name, value in names.items()} if world_size > 1 else {}
    with mock.patch.dict(os.environ, {**launched, "ACCELERATE_USE_CPU": "true"}):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


EXAMPLES, GLOBAL_BATCH, WIDTH = 96, 8, 33


class Net(nn.Module):
    """A model with a buffer, a frozen weight and dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(6, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.last = nn.Linear(WIDTH, 2)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.frozen(self.first(x).tanh() + self.shift)))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(EXAMPLES, 6, generator=generator)
    return TensorDataset(x, torch.stack((x.sum(1), x.prod(1)), 1))


def train(
    flavour: str,
    out: Path,
    *,
    epochs: int = 2,
    accumulate: int = 1,
    sync_each_batch: bool = False,
    mixed_precision: str = "no",
    clip: float = 2.0,
    gamma: float = 0.7,
    dropout: float = 0.0,
    gradient_sync: str = "backward",
    moments: str = "fp32",
    save: int = 0,
    resume: int = 0,
    naming: bool = False,
) -> dict[str, Any]:
    """
    Args:
        save: the epoch after which to save; 0: never.
        resume: the epoch after which the loaded state was saved; 0: start from the beginning.
        naming: accelerate chooses the checkpoints' directories.
    """
    sharded = flavour == "sharded"
    project = ProjectConfiguration(str(out / "project"), automatic_checkpoint_naming=True) if naming else None
    accelerator = (ShardedAccelerator if sharded else Accelerator)(
        cpu=True,
        mixed_precision=mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(accumulate, sync_each_batch=sync_each_batch),
        project_config=project,
    )
    torch.manual_seed(accelerator.process_index)  # ranks start with different weights; all must get rank 0's
    model = Net(dropout)
    if sharded:
        precision = Precision(moments=moments)  # type: ignore[arg-type]
        optimizer: Any = ShardedAdamW(
            model.named_parameters(),
            lr=1e-2,
            gradient_sync=gradient_sync,
            precision=precision,  # type: ignore[arg-type]
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=gamma)
    batch = GLOBAL_BATCH // accelerator.num_processes // accumulate
    loader = DataLoader(data(), batch_size=batch, shuffle=False)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    torch.manual_seed(100 + accelerator.process_index)
    directory = None if naming else str(out / "checkpoint")
    if resume:
        accelerator.load_state(directory)

    losses, norms = [], []
    for epoch in range(resume, epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = (model(x) - y).pow(2).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients and clip:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), clip)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(float(accelerator.gather(loss.detach()).mean()))
        if save == epoch + 1:
            accelerator.save_state(directory)
    unwrapped = accelerator.unwrap_model(model)
    found = {
        "type": type(model).__name__,
        "losses": losses,
        "norms": norms,
        "lr": scheduler.get_last_lr(),
        "model": {name: value.clone() for name, value in unwrapped.state_dict().items()},
        "skipped": accelerator.optimizer_step_was_skipped,
    }
    if sharded:
        full = optimizer.optimizer.full_state_dict()
        found["state"] = full.get("state", {})
        found["rounds"] = optimizer.optimizer._engine.reducer.rounds
    return found


def main() -> None:
    out, flavour, *options = sys.argv[1:]
    given: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        given[name] = value if not value.replace(".", "").isdigit() else float(value) if "." in value else int(value)
    found = train(flavour, Path(out), **given)
    torch.save(found, Path(out) / f"{flavour}-{PartialState().process_index}.pt")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
