# SPDX-License-Identifier: Apache-2.0
"""Do compressed moments harm training? Trains the byte-level model of launch/pretrain.py in one process.

    OMP_NUM_THREADS=1 python benchmarks/moments.py [--moments fp32 int8] [--beta2 0.95 0.999] [--seeds 0 1 2]
        [--dtype fp32] [--master auto] [--steps 500] [--json PATH]

Trains every combination with pretrain.py's defaults and reports the validation loss and the largest single-weight
update of the run: the farthest that any weight moved in one step, without its decay, in units of that step's learning
rate. The seed sets the model, the order of the data and the stochastic rounding. Of fp32 runs it also reports which
share of the elements of v is how far below the largest of its block of 128, which share one 8-bit scale.

    OMP_NUM_THREADS=1 python benchmarks/moments.py --decades 4 6 8 10

Trains nothing: gives every block gradients of random sign and normal size whose v spans that many decades, and reports
v and the updates in 8 bits, relative to fp32's, for each eighth of the block from the largest to the smallest.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from shardadam import Precision, ShardedAdamW
from shardadam.layout import ALIGNMENT_NUMEL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))
import data
from arguments import DTYPES, Ranks
from model import Decoder, ModelConfig, next_byte_loss
from pretrain import parameter_groups, validation_loss, warmup_and_cosine

LR, WEIGHT_DECAY, CLIP, WARMUP, BATCH, CONTEXT, WINDOWS = 1e-3, 0.1, 1.0, 50, 8, 128, 256


def train(corpus: data.Corpus, moments: str, beta2: float, seed: int, args: argparse.Namespace) -> dict:
    torch.manual_seed(seed)
    model = Decoder(ModelConfig(layers=4, width=192, heads=3, context=CONTEXT)).to(DTYPES[args.dtype])
    optimizer = ShardedAdamW(
        parameter_groups(model, WEIGHT_DECAY),
        lr=LR,
        betas=(0.9, beta2),
        max_grad_norm=CLIP,
        precision=Precision(moments=moments, master=args.master, seed=seed),
    )
    schedule = LambdaLR(optimizer, lambda step: warmup_and_cosine(step, warmup=WARMUP, steps=args.steps))
    largest = 0.0
    started = time.perf_counter()
    for step in range(1, args.steps + 1):
        starts = data.training_starts(corpus.training, step=step, batch=BATCH, context=CONTEXT, seed=seed)
        tokens = data.windows(corpus.training, starts, CONTEXT)
        next_byte_loss(model(tokens[:, :-1]), tokens).backward()
        before = weights(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        largest = max(largest, largest_update(optimizer, before))
        schedule.step()
    settings = argparse.Namespace(context=CONTEXT, validation_windows=WINDOWS)
    ranks = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, launched=False)
    return {
        "moments": moments,
        "beta2": beta2,
        "seed": seed,
        "validation_loss": validation_loss(model, corpus.validation, settings, ranks, torch.device("cpu")),
        "largest_update": largest,
        "share_below": shares_below(optimizer) if moments == "fp32" else None,
        "seconds": time.perf_counter() - started,
    }


def weights(optimizer: ShardedAdamW) -> list[torch.Tensor]:
    """Copies of the exact weights of all parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    has_master = any(optimizer.state[p].keys() & {"master", "remainder"} for p in parameters)
    return [(optimizer.full_state(p)["master"] if has_master else p.detach().float()).clone() for p in parameters]


def largest_update(optimizer: ShardedAdamW, before: list[torch.Tensor]) -> float:
    """Return the largest update in units of lr, without weight decay."""
    largest, after = 0.0, iter(weights(optimizer))
    earlier = iter(before)
    for group in optimizer.param_groups:
        for _ in group["params"]:
            old = next(earlier)
            moved = next(after) - old * (1 - group["lr"] * group["weight_decay"])
            if group["lr"] > 0:
                largest = max(largest, moved.abs().max().item() / group["lr"])
    return largest


def shares_below(optimizer: ShardedAdamW) -> dict[str, float]:
    """Return the share of the elements of v, other than 0, that are below a fraction of the largest of their block."""
    ratios = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            v = optimizer.full_state(parameter)["exp_avg_sq"].flatten()
            blocks = torch.nn.functional.pad(v, (0, -v.numel() % ALIGNMENT_NUMEL)).view(-1, ALIGNMENT_NUMEL)
            ratios.append((blocks / blocks.amax(dim=1, keepdim=True).clamp(min=1e-38))[blocks > 0])
    every = torch.cat(ratios)
    return {f"{below:g}": (every < below).float().mean().item() for below in (1e-2, 1e-4, 1e-6, 1e-8)}


def updates_of_blocks(
    moments: str, beta2: float, decades: float, steps: int, rows: int = 32
) -> dict[str, torch.Tensor]:
    """Return means over the last half of the steps and over ``rows`` blocks, for each position in a block."""
    size = torch.logspace(0, -decades / 2, ALIGNMENT_NUMEL).repeat(rows)  # of gradients
    parameter = torch.nn.Parameter(torch.zeros_like(size))
    optimizer = ShardedAdamW(
        [parameter],
        lr=LR,
        betas=(0.9, beta2),
        eps=1e-30,
        weight_decay=0.0,
        gradient_sync="external",
        precision=Precision(moments=moments),
    )
    generator = torch.Generator().manual_seed(1)
    sums = {"v": torch.zeros_like(size), "squared update": torch.zeros_like(size), "|update|": torch.zeros_like(size)}
    for step in range(steps):
        parameter.grad = torch.randn(size.shape, generator=generator) * size
        before = parameter.detach().clone()
        optimizer.step()
        if step >= steps // 2:
            update = (parameter.detach() - before) / LR
            sums["v"] += optimizer.full_state(parameter)["exp_avg_sq"] / size.square()
            sums["squared update"] += update.square()
            sums["|update|"] += update.abs()
    means = {name: total.view(rows, -1).mean(dim=0) / (steps - steps // 2) for name, total in sums.items()}
    return {"v": means["v"], "rms update": means["squared update"].sqrt(), "mean |update|": means["|update|"]}


def report_blocks(args: argparse.Namespace) -> None:
    for beta2 in args.beta2:
        for decades in args.decades:
            exact, coded = (updates_of_blocks(moments, beta2, decades, args.steps) for moments in ("fp32", "int8"))
            print(f"\nb2 = {beta2}, v spans {decades:g} decades; int8 relative to fp32")
            for name in exact:
                parts = zip(coded[name].chunk(8), exact[name].chunk(8), strict=True)
                eighths = " ".join(f"{float(one.mean() / other.mean()):6.3f}" for one, other in parts)
                whole = float(coded[name].mean() / exact[name].mean())
                print(f"{name:>14} | {eighths} | all {whole:.3f}", flush=True)


def report(runs: list[dict]) -> None:
    for beta2 in sorted({run["beta2"] for run in runs}):
        print(f"\nb2 = {beta2}")
        print(
            f"{'moments':>8} | {'validation loss of each seed':^40} | {'mean':>8} | {'spread':>7} | largest update / lr"
        )
        for moments in dict.fromkeys(run["moments"] for run in runs):
            some = [run for run in runs if (run["moments"], run["beta2"]) == (moments, beta2)]
            losses = [run["validation_loss"] for run in some]
            each = "  ".join(f"{loss:.5f}" for loss in losses)
            largest = "  ".join(f"{run['largest_update']:.3f}" for run in some)
            spread = max(losses) - min(losses)
            print(f"{moments:>8} | {each:^40} | {statistics.mean(losses):.5f}  | {spread:.5f} | {largest}")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--moments", nargs="+", default=["fp32", "int8"], choices=("fp32", "bf16", "int8"))
    parser.add_argument("--beta2", nargs="+", type=float, default=[0.95, 0.999])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of parameters")
    parser.add_argument("--master", choices=("auto", "split", "fp32", "none"), default="auto")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--decades", nargs="+", type=float, default=None, help="of v in a block; trains nothing")
    parser.add_argument("--json", default=None, metavar="PATH", help="a file for the numbers of every run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.decades is not None:
        report_blocks(args)
        return
    corpus = data.load([], CONTEXT)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {args.steps} steps, {args.dtype} parameters")
    runs = []
    for beta2 in args.beta2:
        for seed in args.seeds:
            for moments in args.moments:
                runs.append(train(corpus, moments, beta2, seed, args))
                print(runs[-1], flush=True)
                if args.json:
                    Path(args.json).write_text(json.dumps(runs, indent=1) + "\n")
    report(runs)


if __name__ == "__main__":
    main()
