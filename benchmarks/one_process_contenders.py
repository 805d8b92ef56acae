# SPDX-License-Identifier: Apache-2.0
"""What `one_process.py` compares: ways to fine-tune one decoder on one process, each built from the same plain model.

Every builder takes a model in the training dtype, which it may change, and returns a `Contender`. Peers are set up as
their own documentation says, and with the leanest of its options that runs on a CPU. Measures nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Optimizer

from shardadam import Precision, ShardedAdamW

sys.path.append(str(Path(__file__).resolve().parents[1] / "launch"))
from model import Decoder, ModelConfig, next_byte_loss

LEARNING_RATE = 3e-4
BATCHES = 2  # used in turn, so that the loss falls within a few steps and shows what the optimizer does
FP32, BF16 = torch.float32, torch.bfloat16

Moments = Literal["fp32", "bf16", "8-bit", "factored"]
Weights = Literal["fp32", "rounded"]


@dataclass(frozen=True)
class Contender:
    """A training loop, in parts.

    Args:
        update: steps and clears the gradients; does nothing if backward has done it.
        state_bytes: counts what the optimizer keeps in memory between steps, from its tensors.
        releases_gradients: whether a parameter's gradient is freed in backward, so that one exists at a time.
        memory: `ShardedAdamW.memory`, for its own contenders.
    """

    model: nn.Module
    update: Callable[[], None]
    state_bytes: Callable[[], int]
    releases_gradients: bool = False
    memory: Callable[[], Any] | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        return next_byte_loss(self.model(tokens[:, :-1]), tokens)

    def counted_bytes(self) -> int:
        """Return the bytes of all tensors beyond the model that exist at once, without temporaries."""
        gradients = [p.nbytes for p in self.model.parameters()]
        return self.state_bytes() + (max(gradients) if self.releases_gradients else sum(gradients))


@dataclass(frozen=True)
class Entry:
    """A contender's label, builder and what it computes.

    Args:
        weights: "fp32" if the weights that training goes on with are exact to float32 (float32 parameters, or a
            master behind low-precision ones); "rounded" if each step rounds them to the parameter's dtype.
        moments: how the moments are kept; "factored": another algorithm, whose losses are not Adam's.
        needs: a package that it imports.
        is_combined: whether the hooks of torch's tutorial step an optimizer that its documentation does not use so.
        precision, options: of `ShardedAdamW`, for its own contenders; None for peers.
    """

    label: str
    build: Callable[..., Contender]
    moments: Moments
    weights: Weights = "fp32"
    dtypes: tuple[torch.dtype, ...] = (FP32, BF16)
    needs: str | None = None
    is_combined: bool = False
    precision: Precision | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def is_ours(self) -> bool:
        return self.precision is not None

    @property
    def is_installed(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    @property
    def is_offloaded(self) -> bool:
        """Whether `build` takes `directory`, where it writes the state."""
        return dict(self.options).get("offload") is not None

    def weights_in(self, dtype: torch.dtype) -> Weights:
        return "fp32" if dtype == FP32 else self.weights


def make_model(dtype: torch.dtype, *, layers: int, width: int, tokens: int) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(layers=layers, width=width, heads=width // 64, context=tokens)).to(dtype)


def make_data(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (1, tokens + 1), generator=generator) for _ in range(BATCHES)]


# Peers


def plain(model: Decoder, make: Callable[[list[nn.Parameter]], Optimizer]) -> Contender:
    optimizer = make(list(model.parameters()))
    return Contender(model, _step_and_clear(optimizer), lambda: state_bytes([optimizer]))


def released(model: Decoder, make: Callable[[list[nn.Parameter]], Optimizer]) -> Contender:
    """One optimizer for each parameter, stepped in backward: torch's tutorial "optimizer step in backward"."""
    optimizers = {p: make([p]) for p in model.parameters()}

    def hook(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    return Contender(model, lambda: None, lambda: state_bytes(optimizers.values()), releases_gradients=True)


def on_fp32_copies(model: Decoder, *, ties_away: bool = False) -> Contender:
    """AdamW on float32 copies of low-precision parameters, as users write it by hand.

    `ties_away`: round exact ties away from zero, as a split master does, instead of to even. That concerns about one
    weight in 65,536, which is enough for other losses within three steps.
    """
    parameters = list(model.parameters())
    masters = [p.detach().float() for p in parameters]
    optimizer = AdamW(masters, lr=LEARNING_RATE, fused=True)

    @torch.no_grad()
    def update() -> None:
        for p, master in zip(parameters, masters, strict=True):
            master.grad = p.grad.float()
            p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if ties_away:
            for p, master in zip(parameters, masters, strict=True):
                p.copy_(((master.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(BF16))
        else:
            torch._foreach_copy_(parameters, masters)

    def kept() -> int:
        """Masters, and their gradients: those of the parameters are freed one by one meanwhile."""
        extra = sum(master.nbytes - p.nbytes for p, master in zip(parameters, masters, strict=True))
        return state_bytes([optimizer]) + sum(master.nbytes for master in masters) + extra

    return Contender(model, update, kept)


def torchao_8bit(parameters: list[nn.Parameter]) -> Optimizer:
    from torchao.optim import AdamW8bit

    # Without stochastic rounding, low-precision weights would lose most updates; torchao recommends it.
    return AdamW8bit(parameters, lr=LEARNING_RATE, bf16_stochastic_round=parameters[0].dtype == BF16)


def torchao_offload(parameters: list[nn.Parameter]) -> Optimizer:
    from torchao.optim import CPUOffloadOptimizer

    return CPUOffloadOptimizer(parameters, AdamW, offload_gradients=True, lr=LEARNING_RATE)


def bitsandbytes_8bit(parameters: list[nn.Parameter]) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=LEARNING_RATE)


def flashoptim(model: Decoder) -> Contender:
    """With 32-bit masters and gradient release."""
    from flashoptim import FlashAdamW, enable_gradient_release

    optimizer = FlashAdamW(model.parameters(), lr=LEARNING_RATE, master_weight_bits=32)
    enable_gradient_release(model, optimizer)
    return Contender(model, lambda: None, lambda: state_bytes([optimizer]), releases_gradients=True)


# shardadam


def ours(
    model: Decoder, *, precision: Precision, options: tuple[tuple[str, Any], ...], directory: Path | None = None
) -> Contender:
    """`options` are `ShardedAdamW`'s; `offload` "disk" stands for `DiskOffload(directory)`."""
    arguments = dict(options)
    if arguments.get("offload") == "disk":
        from shardadam import DiskOffload

        arguments["offload"] = DiskOffload(directory)
    optimizer = ShardedAdamW(model.named_parameters(), lr=LEARNING_RATE, precision=precision, **arguments)

    def kept() -> int:
        memory = optimizer.memory()
        return memory.total - memory.parameters - memory.gradients

    releases = arguments.get("update") == "backward"
    return Contender(model, _step_and_clear(optimizer), kept, releases, optimizer.memory)


def _step_and_clear(optimizer: Optimizer) -> Callable[[], None]:
    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return sum(_nbytes(value) for state in states for value in state.values() if isinstance(value, Tensor))


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of the tensors that a subclass wraps."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def _adamw(parameters: list[nn.Parameter], **form: bool) -> Optimizer:
    return AdamW(parameters, lr=LEARNING_RATE, **form)


def _adafactor(parameters: list[nn.Parameter]) -> Optimizer:
    return Adafactor(parameters, lr=LEARNING_RATE)


def _ours(label: str, moments: str = "fp32", master: str = "auto", **options: Any) -> Entry:
    precision = Precision(moments=moments, master=master)  # type: ignore[arg-type]
    packed = tuple(options.items())
    return Entry(
        ", ".join(("shardadam", label) if label else ("shardadam",)),
        partial(ours, precision=precision, options=packed),
        moments="8-bit" if moments == "int8" else moments,  # type: ignore[arg-type]
        weights="rounded" if master == "none" else "fp32",
        dtypes=(BF16,) if master == "none" else (FP32, BF16),
        precision=precision,
        options=packed,
    )


ENTRIES: dict[str, Entry] = {
    "adamw": Entry("AdamW, fused", partial(plain, make=partial(_adamw, fused=True)), "fp32", "rounded"),
    "adamw-foreach": Entry("AdamW, foreach", partial(plain, make=partial(_adamw, foreach=True)), "fp32", "rounded"),
    "adamw-copies": Entry("AdamW on fp32 copies", on_fp32_copies, "fp32", dtypes=(BF16,)),
    "adamw-copies-away": Entry(
        "AdamW on fp32 copies, ties away", partial(on_fp32_copies, ties_away=True), "fp32", dtypes=(BF16,)
    ),
    "released": Entry("AdamW in backward", partial(released, make=partial(_adamw, fused=True)), "fp32", "rounded"),
    "torchao": Entry("torchao AdamW8bit", partial(plain, make=torchao_8bit), "8-bit", "rounded", needs="torchao"),
    "torchao-released": Entry(
        "torchao AdamW8bit in backward",
        partial(released, make=torchao_8bit),
        "8-bit",
        "rounded",
        needs="torchao",
        is_combined=True,
    ),
    "torchao-offload": Entry(
        "torchao CPUOffloadOptimizer", partial(plain, make=torchao_offload), "fp32", "rounded", needs="torchao"
    ),
    "bitsandbytes": Entry(
        "bitsandbytes AdamW8bit", partial(plain, make=bitsandbytes_8bit), "8-bit", "rounded", needs="bitsandbytes"
    ),
    "bitsandbytes-released": Entry(
        "bitsandbytes AdamW8bit in backward",
        partial(released, make=bitsandbytes_8bit),
        "8-bit",
        "rounded",
        needs="bitsandbytes",
        is_combined=True,
    ),
    "flashoptim": Entry("FlashAdamW, 32-bit, in backward", flashoptim, "8-bit", needs="flashoptim"),
    "adafactor": Entry("Adafactor", partial(plain, make=_adafactor), "factored", "rounded"),
    "adafactor-released": Entry(
        "Adafactor in backward", partial(released, make=_adafactor), "factored", "rounded", is_combined=True
    ),
    "ours": _ours(""),
    "ours-backward": _ours("in backward", update="backward"),
    "ours-int8": _ours("int8", "int8"),
    "ours-int8-backward": _ours("int8, in backward", "int8", update="backward"),
    "ours-int8-none": _ours("int8, no master", "int8", "none"),
    "ours-int8-none-backward": _ours("int8, no master, in backward", "int8", "none", update="backward"),
    "ours-disk": _ours("on disk", offload="disk"),
    "ours-disk-backward": _ours("on disk, in backward", update="backward", offload="disk"),
    "ours-disk-int8-backward": _ours("on disk, int8, in backward", "int8", update="backward", offload="disk"),
}
