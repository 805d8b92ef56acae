# SPDX-License-Identifier: Apache-2.0
"""Does training take the memory that `shardadam plan` computes?

    OMP_NUM_THREADS=1 python benchmarks/plan.py [--ranks 1 2 4] [--models decoder gpt2] [--cases 0 3]

Starts the ranks itself, new ones for every line. Six models train for 3 steps on inputs so small that activations
hardly count. The memory of a rank is its proportional set size without pages of files (`Pss_Anon` of
/proc/PID/smaps_rollup, and its share of all ranks' `Pss_Shmem`): the highest of samples a millisecond apart while it
trains, minus the value before the model was built (a model with one layer has trained before, so that libraries are
loaded). Means over ranks:

    planned   `need(...)` of shardadam.planner: parameters, gradients and everything that the optimizer holds
    measured  with a malloc that returns freed memory at once (MALLOC_MMAP_THRESHOLD_=65536)
    default   with malloc's default, which keeps some of it
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn

from shardadam import Precision, ShardedAdamW
from shardadam.planner import PlannedParameter, Setting, need

sys.path.append(str(Path(__file__).resolve().parents[1] / "launch"))
from model import Decoder, ModelConfig

TOKENS = 4
STEPS = 3
PERIOD_S = 0.001
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    gradient_sync: str
    precision: Precision = field(default_factory=Precision)
    transport: str = "auto"

    HEAD: ClassVar[str] = "   dtype |     sync | moments |  transport"

    def setting(self, world_size: int) -> Setting:
        return Setting(
            world_size=world_size,
            precision=self.precision,
            gradient_sync=self.gradient_sync,  # type: ignore[arg-type]
            transport=self.transport,  # type: ignore[arg-type]
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype:>8} | {self.gradient_sync:>8} | {self.precision.moments:>7} | {self.transport:>10}"


CASES = (
    Case(torch.float32, "backward"),
    Case(torch.float32, "backward", transport="collective"),
    Case(torch.float32, "backward", Precision(moments="int8")),
    Case(torch.float32, "step"),
    Case(torch.bfloat16, "backward"),
    Case(torch.bfloat16, "step"),
)


@dataclass(frozen=True)
class Model:
    """A model to measure: how to build it with a number of layers, and how to run its forward."""

    layers: int
    build: Callable[[int], nn.Module]
    feed: Callable[[nn.Module, torch.dtype], Tensor]


def decoder(layers: int) -> nn.Module:
    return Decoder(ModelConfig(layers, 512, 8, TOKENS))


def gpt2(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 64, "n_embd": 512, "n_layer": layers, "n_head": 8, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=8192, **sizes))


def bert(layers: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=8192, hidden_size=512, num_hidden_layers=layers, num_attention_heads=8))


def t5(layers: int) -> nn.Module:
    """An encoder and a decoder that share an embedding with the head."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=8192, num_layers=layers, tie_word_embeddings=True))


def convolutions(layers: int) -> nn.Module:
    """BatchNorm's buffers, and kernels of 2.4M parameters each."""
    blocks = [(nn.Conv2d(512, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(nn.Conv2d(3, 512, 3, padding=1), *(module for block in blocks for module in block))


def lstm(layers: int) -> nn.Module:
    """torch's kernels reorder its weights, and return the gradients of several of them at once."""
    return nn.LSTM(512, 768, num_layers=layers)


def tokens() -> Tensor:
    return torch.arange(TOKENS)[None] + 1


MODELS = {
    "decoder": Model(8, decoder, lambda model, dtype: model(tokens())),
    "gpt2": Model(8, gpt2, lambda model, dtype: model(tokens()).logits),
    "bert": Model(8, bert, lambda model, dtype: model(tokens()).pooler_output),
    "t5": Model(4, t5, lambda model, dtype: model(input_ids=tokens(), decoder_input_ids=tokens()).logits),
    "convolutions": Model(10, convolutions, lambda model, dtype: model(torch.ones(1, 3, 2, 2, dtype=dtype))),
    "lstm": Model(6, lstm, lambda model, dtype: model(torch.ones(TOKENS, 1, 512, dtype=dtype))[0]),
}


def pss_bytes(pids: Sequence[int]) -> tuple[Tensor, float]:
    """Return anonymous bytes of each process, and shared bytes of all. Leaves out pages of files, such as code."""
    own, shared = [], 0
    for pid in pids:
        found = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        own.append(1024 * int(found["Pss_Anon"].split()[0]))
        shared += 1024 * int(found["Pss_Shmem"].split()[0])
    return torch.tensor(own, dtype=torch.float64), shared


def build(case: Case, model: nn.Module) -> ShardedAdamW:
    return ShardedAdamW(
        model.parameters(),
        precision=case.precision,
        gradient_sync=case.gradient_sync,  # type: ignore[arg-type]
        transport=case.transport,  # type: ignore[arg-type]
    )


def train(spec: Model, model: nn.Module, dtype: torch.dtype, optimizer: ShardedAdamW) -> None:
    for _ in range(STEPS):
        spec.feed(model, dtype).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def work(rank: int, world_size: int, store: str, name: str, case: Case, barrier: Any, trained: Any) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    spec = MODELS[name]
    small = spec.build(1).to(case.dtype)
    optimizer = build(case, small)
    train(spec, small, case.dtype, optimizer)  # loads libraries and fills heaps
    del small, optimizer
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    barrier.wait(TIMEOUT_S)  # the parent reads the memory before
    barrier.wait(TIMEOUT_S)
    model = spec.build(spec.layers).to(case.dtype)
    optimizer = build(case, model)
    gc.collect()
    barrier.wait(TIMEOUT_S)  # the parent samples from here on
    train(spec, model, case.dtype, optimizer)
    if world_size > 1:
        dist.barrier()
    trained.set()
    barrier.wait(TIMEOUT_S)
    del model, optimizer
    if world_size > 1:
        dist.destroy_process_group()


def measure(name: str, case: Case, world_size: int) -> float:
    """Return the bytes per rank at the peak."""
    spawn = processes.get_context("spawn")
    barrier, trained = spawn.Barrier(world_size + 1), spawn.Event()
    with tempfile.TemporaryDirectory() as directory:
        arguments = (world_size, str(Path(directory) / "store"), name, case, barrier, trained)
        ranks = processes.spawn(work, arguments, nprocs=world_size, join=False)  # type: ignore[attr-defined]
        barrier.wait(TIMEOUT_S)
        own_before, shared_before = pss_bytes(ranks.pids())
        own, shared = own_before, shared_before
        barrier.wait(TIMEOUT_S)
        barrier.wait(TIMEOUT_S)
        has_trained = False
        while not has_trained:
            has_trained = trained.is_set()
            own_now, shared_now = pss_bytes(ranks.pids())
            own, shared = torch.maximum(own, own_now), max(shared, shared_now)
            time.sleep(PERIOD_S)
        barrier.wait(TIMEOUT_S)
        while not ranks.join():
            pass
    return (own - own_before).mean().item() + (shared - shared_before) / world_size


def planned(name: str, case: Case, world_size: int) -> tuple[int, int]:
    """Return the number of parameters, and bytes per rank with the model's buffers, which the planner omits."""
    with torch.device("meta"):
        model = MODELS[name].build(MODELS[name].layers).to(case.dtype)
    parameters = PlannedParameter.of_model(model).values()
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return sum(one.numel for one in parameters), need(parameters, case.setting(world_size)).total + buffers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument(
        "--cases", nargs="+", type=int, help="numbers of formats; all for the first model, 0 for others"
    )
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, torch {torch.__version__}; MB per rank")
    print(" N |        model | M param. | " + Case.HEAD + " | planned | measured |  more | default")
    for world_size in args.ranks:
        for name in args.models:
            for index in args.cases or (range(len(CASES)) if name == args.models[0] else [0]):
                if world_size > 1 or CASES[index].transport == "auto":
                    line(name, CASES[index], world_size)


def line(name: str, case: Case, world_size: int) -> None:
    numel, expected = planned(name, case, world_size)
    measured = []
    for threshold in ("65536", None):
        if threshold is None:
            os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
        else:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = threshold
        measured.append(measure(name, case, world_size))
    setting = f"{world_size:>2} | {name:>12} | {numel / 1e6:8.1f} | {case}"
    found = f"{expected / 1e6:7.1f} | {measured[0] / 1e6:8.1f} | {100 * (measured[0] / expected - 1):+4.1f}%"
    print(f"{setting} | {found} | {measured[1] / 1e6:7.1f}", flush=True)


if __name__ == "__main__":
    main()
