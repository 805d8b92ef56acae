# SPDX-License-Identifier: Apache-2.0
"""Lightning runs for the tests, under torchrun: with torch's AdamW and with a ShardedAdamW.

    torchrun lightning_run.py OUT

Rank 0 writes its results to OUT/results-WORLD_SIZE.pt. On one rank it only resumes from a checkpoint of two ranks.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from shardadam import ShardedAdamW

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Module(lightning.LightningModule):
    def __init__(self, sharded: bool, gradient_sync: Any = "external") -> None:
        super().__init__()
        self.sharded, self.gradient_sync = sharded, gradient_sync
        self.net = nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 2))
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.net(batch).pow(2).mean()
        self.seen.append((loss.item(), 0.0))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])
        self.seen[-1] = (self.seen[-1][0], float(norm))

    def configure_optimizers(self) -> Any:
        if self.sharded:
            optimizer: Any = ShardedAdamW(self.parameters(), lr=1e-2, gradient_sync=self.gradient_sync)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


def fit(module: Module, out: Path, *, epochs: int, resume: Path | None = None, save: bool = False) -> dict[str, Any]:
    lightning.seed_everything(0, verbose=False)
    data = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))[RANK::WORLD_SIZE]
    loader = torch.utils.data.DataLoader(data, batch_size=8 // WORLD_SIZE)
    saving = ModelCheckpoint(out, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy="ddp" if WORLD_SIZE > 1 else "auto",
        max_epochs=epochs,
        use_distributed_sampler=False,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=save,
        callbacks=[saving] if save else [],
    )
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True if resume else None)
    return {
        "wrapped": type(trainer.strategy.model).__name__,
        "model": {name: value.clone() for name, value in module.state_dict().items()},
        "seen": module.seen,
    }


def main(out: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    checkpoint = out / "epoch=0.ckpt"
    if WORLD_SIZE == 1:
        results = {"resumed": fit(make(True), out, epochs=3, resume=checkpoint)}
    else:
        results = {
            "stock": fit(make(False), out, epochs=3),
            "sharded": fit(make(True), out, epochs=3, save=True),
            "resumed": fit(make(True), out, epochs=3, resume=checkpoint),
        }
        try:
            fit(make(True, "backward"), out, epochs=1)
        except RuntimeError as error:
            results["refused"] = str(error)
    if RANK == 0:
        torch.save(results, out / f"results-{WORLD_SIZE}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def make(sharded: bool, gradient_sync: Any = "external") -> Module:
    torch.manual_seed(7)
    return Module(sharded, gradient_sync)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
