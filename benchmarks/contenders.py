# SPDX-License-Identifier: Apache-2.0
"""What `step.py` compares: ways to train one decoder on several ranks, each built from the same plain model.

Every builder takes a model in the training dtype, which it may wrap and change, and returns a `Contender`. The other
optimizers are set up as their own documentation says, with torch's fused AdamW inside. Measures nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from shardadam import Precision, ShardedAdamW

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))
from model import Decoder, ModelConfig, next_byte_loss

LEARNING_RATE = 1e-3
BATCHES = 4  # of each rank, used in turn
VOCABULARY = 32_000
TOKENS = 16  # for each rank and step: few, so that the optimizer takes most of the time


@dataclass(frozen=True)
class Settings:
    """Settings of all contenders of one run; `bucket_mb` is for shardadam only."""

    dtype: torch.dtype
    max_grad_norm: float | None = None
    bucket_mb: float | None = None


@dataclass(frozen=True)
class Contender:
    """One training loop, in parts. `update` clips, steps and clears gradients; `state_bytes` is this rank's."""

    module: nn.Module
    update: Callable[[], None]
    state_bytes: Callable[[], int]
    backward: Callable[[Tensor], Any] = Tensor.backward
    close: Callable[[], None] = lambda: None

    def forward(self, tokens: Tensor) -> Tensor:
        return next_byte_loss(self.module(tokens[:, :-1]), tokens)


@dataclass(frozen=True)
class Entry:
    """A contender's label and builder. `has_master`: it keeps a float32 master of each bf16 parameter. `can_clip`: it
    takes `max_grad_norm`.
    """

    label: str
    build: Callable[[Decoder, Settings], Contender]
    has_master: bool = False
    is_ours: bool = False
    can_clip: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    needs: str | None = None

    @property
    def is_installed(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def make_model(dtype: torch.dtype, *, width: int = 640, layers: int = 4) -> Decoder:
    """Return the decoder, equal on all ranks; by default with 60.6M parameters.

    With Llama 2's vocabulary and an untied head, forward and backward are short for so many parameters.
    """
    torch.manual_seed(0)
    model = Decoder(ModelConfig(layers=layers, width=width, heads=width // 64, context=TOKENS))
    model.embedding, model.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY, bias=False)
    for weight in (model.embedding.weight, model.head.weight):
        nn.init.normal_(weight, std=0.02)
    return model.to(dtype)


def make_data(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + rank)
    return [torch.randint(VOCABULARY, (1, TOKENS + 1), generator=generator) for _ in range(BATCHES)]


# Other optimizers


def ddp(model: Decoder, settings: Settings, *, views: bool) -> Contender:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=views)
    optimizer = AdamW(wrapped.parameters(), lr=LEARNING_RATE, fused=True)
    return Contender(wrapped, _torch_update(wrapped, optimizer, settings), lambda: _state_bytes(optimizer))


def ddp_with_master(model: Decoder, settings: Settings) -> Contender:
    """bf16 parameters under DDP, with AdamW on float32 copies, as users write it by hand."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    parameters = list(model.parameters())
    masters = [p.detach().float() for p in parameters]
    optimizer = AdamW(masters, lr=LEARNING_RATE, fused=True)

    @torch.no_grad()
    def update() -> None:
        for p, master in zip(parameters, masters, strict=True):
            master.grad = p.grad.float()
            p.grad = None
        if settings.max_grad_norm is not None:
            clip_grad_norm_(masters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_copy_(parameters, masters)

    return Contender(wrapped, update, lambda: _state_bytes(optimizer) + _nbytes(masters))


def zero_redundancy(model: Decoder, settings: Settings, *, views: bool) -> Contender:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        wrapped.parameters(), AdamW, parameters_as_bucket_view=views, lr=LEARNING_RATE, fused=True
    )
    return Contender(wrapped, _torch_update(wrapped, optimizer, settings), lambda: _state_bytes(optimizer.optim))


def fsdp2(model: Decoder, settings: Settings, *, reshard_after_forward: bool) -> Contender:
    """Sharded block by block. bf16: float32 parameters, equal to the bf16 ones at first; bf16 arithmetic and wire."""
    policy = MixedPrecisionPolicy()
    if settings.dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        for p in model.parameters():  # not model.float(): the rotary tables stay bf16, as they are for the others
            p.data = p.data.float()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    options: dict[str, Any] = dict(mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def state_bytes() -> int:
        return _state_bytes(optimizer) + (_nbytes(model.parameters()) if settings.dtype == torch.bfloat16 else 0)

    return Contender(model, _torch_update(model, optimizer, settings), state_bytes)


def fairscale_oss(model: Decoder, settings: Settings) -> Contender:
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim.oss import OSS

    optimizer = OSS(model.parameters(), AdamW, lr=LEARNING_RATE, fused=True)
    wrapped = ShardedDataParallel(model, optimizer)

    def update() -> None:
        if settings.max_grad_norm is not None:
            optimizer.clip_grad_norm(settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return Contender(wrapped, update, lambda: _state_bytes(optimizer.optim))


def deepspeed_zero(model: Decoder, settings: Settings, *, stage: int) -> Contender:
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": settings.max_grad_norm or 0.0,
        "bf16": {"enabled": settings.dtype == torch.bfloat16},
    }
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    engine, sharded, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def state_bytes() -> int:
        return _state_bytes(sharded.optimizer) + _nbytes(sharded.single_partition_of_fp32_groups)

    return Contender(engine, engine.step, state_bytes, backward=engine.backward, close=engine.destroy)


# shardadam


def ours(model: Decoder, settings: Settings, *, precision: Precision | None = None, **options: Any) -> Contender:
    optimizer = ShardedAdamW(
        model.named_parameters(),
        lr=LEARNING_RATE,
        max_grad_norm=settings.max_grad_norm,
        bucket_mb=settings.bucket_mb,
        precision=precision,
        **options,
    )

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Contender(model, update, lambda: optimizer.memory().state)


# Not a contender: part of the limit


def no_update(model: Decoder, settings: Settings) -> Contender:
    """Forward and backward only, on all ranks at once, without communication."""

    def update() -> None:
        model.zero_grad()

    return Contender(model, update, lambda: 0)


def _torch_update(module: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings) -> Callable[[], None]:
    def update() -> None:
        if settings.max_grad_norm is not None:
            clip_grad_norm_(module.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return update


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return _nbytes(value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor))


_BF16 = (torch.bfloat16,)

ENTRIES: dict[str, Entry] = {
    "ddp": Entry("DDP + AdamW", partial(ddp, views=False)),
    "ddp-views": Entry("DDP + AdamW, gradient views", partial(ddp, views=True)),
    "ddp-master": Entry("DDP + AdamW on fp32 copies", ddp_with_master, has_master=True, dtypes=_BF16),
    "zero": Entry("ZeroRedundancyOptimizer", partial(zero_redundancy, views=False)),
    "zero-views": Entry("ZeroRedundancyOptimizer, views", partial(zero_redundancy, views=True)),
    "fsdp2-zero2": Entry("FSDP2, ZeRO-2", partial(fsdp2, reshard_after_forward=False), has_master=True),
    "fsdp2-zero3": Entry("FSDP2, ZeRO-3", partial(fsdp2, reshard_after_forward=True), has_master=True),
    "deepspeed-1": Entry("DeepSpeed ZeRO-1", partial(deepspeed_zero, stage=1), has_master=True, needs="deepspeed"),
    "deepspeed-2": Entry("DeepSpeed ZeRO-2", partial(deepspeed_zero, stage=2), has_master=True, needs="deepspeed"),
    "oss": Entry("fairscale OSS + ShardedDDP", fairscale_oss, needs="fairscale"),
    **{
        f"shardadam-{sync}-{transport}": Entry(
            f"shardadam, {sync}, {transport}",
            partial(ours, gradient_sync=sync, transport=transport),
            has_master=True,
            is_ours=True,
        )
        for transport in ("auto", "collective")
        for sync in ("step", "backward")
    },
    "shardadam-update-backward": Entry(
        "shardadam, update in backward",
        partial(ours, update="backward"),
        has_master=True,
        is_ours=True,
        can_clip=False,
    ),
    **{
        f"shardadam-{sync}-int8": Entry(
            f"shardadam, {sync}, auto, int8",
            partial(ours, gradient_sync=sync, precision=Precision(moments="int8")),
            has_master=True,
            is_ours=True,
            dtypes=_BF16,
        )
        for sync in ("step", "backward")
    },
}
