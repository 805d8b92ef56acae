# SPDX-License-Identifier: Apache-2.0
"""Pretrains a small decoder-only transformer on bytes, with ShardedAdamW or, for comparison, DDP and torch's AdamW.

    torchrun --standalone --nproc-per-node 2 launch/pretrain.py            # two ranks on this machine
    python launch/pretrain.py --steps 50 --data book.txt                   # one process, your own text
    ... --save-dir runs/a --save-every 100 --resume                        # save and resume, on any number of ranks
    torchrun --standalone --max-restarts 3 ... --resume                    # restart when a rank has died
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 1:4 --max-restarts 3 --rdzv-backend c10d ... --resume
                                                                           # on the available nodes

Both optimizers see the same model, data, global batch and schedule for one `--seed`, whatever the number of ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import data
import metrics
from arguments import DTYPES, Ranks, offload_of, parse_arguments
from checkpoints import CannotResume, Saver, identity_of, starting_point
from model import Decoder, ModelConfig, generate, next_byte_loss
from preemption import Preemption
from rendezvous import destroyed_on_success, join
from report import Report, Silence, megabytes
from shardadam import CheckpointError, Precision, ShardedAdamW

BETAS = (0.9, 0.95)


class Sharded:
    """ShardedAdamW: no wrapper around the model; the optimizer averages and clips gradients."""

    def __init__(self, model: Decoder, args: argparse.Namespace) -> None:
        self.model: nn.Module = model
        self.optimizer = ShardedAdamW(
            parameter_groups(model, args.weight_decay),
            lr=args.lr,
            betas=BETAS,
            max_grad_norm=args.clip or None,
            gradient_sync=args.gradient_sync,
            precision=Precision(moments=args.moments, master=args.master, gradients=args.gradients, seed=args.seed),
            update=args.update,
            ema_decay=args.ema_decay,
            offload=offload_of(args),
        )
        self.has_averages = args.ema_decay is not None
        self.schedule = make_schedule(self.optimizer, args)
        on_gpu = any(p.is_cuda for p in model.parameters())
        if on_gpu if args.overlap_gather is None else args.overlap_gather:
            self.optimizer.overlap_gather(model)

    def no_sync(self) -> AbstractContextManager[None]:
        return self.optimizer.no_sync()

    def step(self) -> Tensor | None:
        """Updates the parameters and clears gradients; returns the norm before clipping, on the device, or None."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.optimizer.grad_norm

    def averaged(self) -> AbstractContextManager[None] | None:
        """The model has the averages of its weights meanwhile; None without --ema-decay. Collective at both ends."""
        return self.optimizer.averaged_parameters() if self.has_averages else None

    def state_bytes(self) -> int:
        """Of this rank, wherever it is."""
        memory = self.optimizer.memory()
        return memory.state + memory.on_host + memory.on_disk


class Replicated:
    """DistributedDataParallel (with more than one rank) and torch.optim.AdamW, with the whole state on every rank."""

    def __init__(self, model: Decoder, args: argparse.Namespace) -> None:
        self.model: nn.Module = model
        if dist.is_initialized():
            self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        groups = parameter_groups(model, args.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=BETAS, fused=True)
        self.schedule = make_schedule(self.optimizer, args)
        self.clip = args.clip

    def no_sync(self) -> AbstractContextManager[None]:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def step(self) -> Tensor | None:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip) if self.clip else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def averaged(self) -> None:
        """There are no averages."""

    def state_bytes(self) -> int:
        states = self.optimizer.state.values()
        return sum(v.nbytes for state in states for k, v in state.items() if k != "step")


def parameter_groups(model: Decoder, weight_decay: float) -> list[dict]:
    """Matrices decay, vectors do not."""
    named = list(model.named_parameters())
    return [
        {"params": [(name, p) for name, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]


def warmup_and_cosine(step: int, *, warmup: int, steps: int) -> float:
    """Factor of the learning rate: rises linearly to 1 over `warmup` steps, then falls to 0 as half a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def make_schedule(optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: warmup_and_cosine(step, warmup=args.warmup, steps=args.steps))


@dataclass(frozen=True)
class Timings:
    """Seconds of each step."""

    forward_backward: list[float]
    optimizer: list[float]

    def medians(self) -> tuple[float, float] | tuple[None, None]:
        """Without the first few steps, which allocate buffers. None if no step was taken."""
        if not self.optimizer:
            return None, None
        skip = min(5, len(self.optimizer) // 2)
        return statistics.median(self.forward_backward[skip:]), statistics.median(self.optimizer[skip:])


def train(
    run: Sharded | Replicated,
    saver: Saver,
    preemption: Preemption | None,
    span: range,
    model: Decoder,
    corpus: data.Corpus,
    args: argparse.Namespace,
    ranks: Ranks,
    device: torch.device,
    report: Silence,
) -> tuple[int, Timings]:
    """Takes the steps in `span`; returns the last one and timings. Collective: each rank takes its part of each batch.

    Outside the optimizer, ranks communicate only to log, to save and to agree on a stop (`preemption`).
    """
    timings = Timings([], [])
    step = span.start - 1
    last_log, last_step = time.perf_counter(), span.start - 1
    for step in span:
        started = time.perf_counter()
        loss = torch.zeros((), device=device)
        batches = local_batches(corpus.training, step, args, ranks)
        for i, (tokens, weight) in enumerate(batches):
            tokens = tokens.to(device)
            with run.no_sync() if i + 1 < len(batches) else nullcontext():
                part = next_byte_loss(run.model(tokens[:, :-1]), tokens) * weight
                part.backward()
            loss += part.detach()
        synchronize(device)
        backward_done = time.perf_counter()
        is_logged = step in (span[0], span[-1]) or step % args.log_every == 0
        looks = is_logged and args.log_parameters and isinstance(run, Sharded)
        values: dict[str, float] = {}
        if looks and args.update == "step":  # with "backward" there are no gradients any more
            values |= metrics.before_step(run.optimizer)
        step_begun = time.perf_counter()
        grad_norm = run.step()
        synchronize(device)
        timings.forward_backward.append(backward_done - started)
        timings.optimizer.append(time.perf_counter() - step_begun)

        if is_logged:
            loss = average(loss, ranks)
            if looks:
                values |= metrics.after_step(run.optimizer)
            now = time.perf_counter()
            values |= {
                "loss": loss.item(),
                "lr": run.schedule.get_last_lr()[0],
                "tokens_per_s": (step - last_step) * args.batch * args.context / (now - last_log),
            }
            if grad_norm is not None:
                values["grad_norm"] = grad_norm.item()
            report.metrics(step, values, run.state_bytes())
            last_log, last_step = now, step
        report.step_done(step)
        run.schedule.step()
        if args.check_every and step % args.check_every == 0:
            run.optimizer.check_in_sync()
        saver.step_done(step)
        if preemption is not None and preemption.requested():
            break
        if args.validate_every and step % args.validate_every == 0 and step < span[-1]:
            report.validation(step, validation_loss(model, corpus.validation, args, ranks, device))
    saver.finish(step)
    return step, timings


def local_batches(text: Tensor, step: int, args: argparse.Namespace, ranks: Ranks) -> list[tuple[Tensor, float]]:
    """This rank's windows (count, context + 1) for each backward of the step, and the weight of their mean loss.

    With these weights, the sum over backwards, averaged over ranks, is the mean over the global batch. A backward
    without windows gets one of weight 0, as all ranks must run equally many.
    """
    starts = data.training_starts(text, step=step, batch=args.batch, context=args.context, seed=args.seed)
    parts = data.parts(args.batch, rank=ranks.rank, world_size=ranks.world_size, micro_batch=args.micro_batch)
    own = [starts[part] for part in parts]
    return [
        (data.windows(text, some if len(some) else starts[:1], args.context), len(some) * ranks.world_size / args.batch)
        for some in own
    ]


@torch.no_grad()
def validation_loss(
    model: Decoder, text: Tensor, args: argparse.Namespace, ranks: Ranks, device: torch.device
) -> float:
    """Nats a byte over the same windows in every run, summed in fp64. Collective."""
    starts = data.validation_starts(text, count=args.validation_windows, context=args.context)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for some in starts[ranks.rank :: ranks.world_size].split(8):
        tokens = data.windows(text, some, args.context).to(device)
        total += next_byte_loss(model(tokens[:, :-1]), tokens, reduction="sum").double()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / (len(starts) * args.context)


def average(value: Tensor, ranks: Ranks) -> Tensor:
    """The mean over ranks. Collective."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value / ranks.world_size


def synchronize(device: torch.device) -> None:
    """Waits for the GPU, so that the host's clock measures its work. All-gathers under the next forward go on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def fingerprint(corpus: data.Corpus) -> list[int]:
    """The number of training bytes, and checksums of both texts."""
    return [len(corpus.training), zlib.crc32(corpus.training.numpy()), zlib.crc32(corpus.validation.numpy())]


def check_same_text(corpus: data.Corpus, device: torch.device) -> None:
    """Raises DataError on all ranks if they read different files. Collective."""
    if not dist.is_initialized():
        return
    low = torch.tensor(fingerprint(corpus), device=device)
    high = low.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise data.DataError(
            f"Ranks read different text: {len(corpus.training):,} training bytes here, {low[0]:,} to {high[0]:,} over "
            "all ranks. Give every machine the same files, or the same Python version."
        )


def unsharded_state_bytes(model: Decoder) -> int:
    """Unsharded state of one rank: two fp32 moments a parameter, and an fp32 master where the parameter is not fp32."""
    return sum(p.numel() * (8 if p.dtype == torch.float32 else 12) for p in model.parameters())


def steps_to_take(args: argparse.Namespace, taken: int) -> range:
    """The steps after `taken`, at most --stop-after of them. Steps count from 1."""
    last = min(args.steps, taken + args.stop_after) if args.stop_after else args.steps
    return range(taken + 1, last + 1)


def pretrain(args: argparse.Namespace, corpus: data.Corpus, ranks: Ranks, device: torch.device) -> None:
    """Builds or resumes, trains, validates, and prints the results on rank 0. Collective."""
    check_same_text(corpus, device)
    identity = identity_of(args, fingerprint(corpus))
    start = starting_point(args, identity)
    span = steps_to_take(args, start.step if start else 0)
    torch.manual_seed(args.seed)  # the same model on every rank
    model = Decoder(ModelConfig(args.layers, args.width, args.heads, args.context)).to(device, DTYPES[args.dtype])
    run = (Sharded if args.optimizer == "sharded" else Replicated)(model, args)
    numel = sum(p.numel() for p in model.parameters())

    with Report(args.steps, args.log_dir) if ranks.rank == 0 else Silence() as report:
        report.say(
            f"{numel:,} {args.dtype} parameters, {args.optimizer} on {ranks.world_size} x {device.type}; "
            f"{len(corpus.training):,} bytes to train on: {corpus.source}"
        )
        saver = Saver(args, identity, run, report)
        saver.begin(start)
        started = time.perf_counter()
        with Preemption() if args.save_on_sigterm else nullcontext() as preemption:
            last, timings = train(run, saver, preemption, span, model, corpus, args, ranks, device, report)
        total_seconds = time.perf_counter() - started
        if last < span.stop - 1:
            report.say(f"SIGTERM: stopped after step {last} of {args.steps}, which is saved; continue with --resume")
            return
        loss = validation_loss(model, corpus.validation, args, ranks, device)
        average_loss = None
        if (averaged := run.averaged()) is not None:
            with averaged:
                average_loss = validation_loss(model, corpus.validation, args, ranks, device)
        report.validation(span.stop - 1, loss)
        if span.stop <= args.steps:
            report.say(f"stopped after step {span.stop - 1} of {args.steps}; continue with --resume")
    if ranks.rank != 0:
        return

    forward_backward, optimizer = timings.medians()
    results = {
        "optimizer": args.optimizer,
        "world_size": ranks.world_size,
        "device": device.type,
        "dtype": args.dtype,
        "steps": args.steps,
        "first_step": span.start,
        "last_step": span.stop - 1,
        "parameters": numel,
        "validation_loss": loss,
        "average_validation_loss": average_loss,
        "state_bytes": run.state_bytes(),
        "unsharded_state_bytes": unsharded_state_bytes(model),
        "forward_backward_s": forward_backward,
        "optimizer_s": optimizer,
        "total_s": total_seconds,
        "saves": saver.count,
        "save_s": saver.seconds,
        "tokens_per_s": len(span) * args.batch * args.context / total_seconds,
    }
    prompt = args.prompt.encode()
    sample = generate(model, data.SEPARATOR + prompt, args.sample_bytes, seed=args.seed)
    report.summary(table_rows(results), prompt + sample if sample else b"")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


def table_rows(results: dict) -> dict[str, str]:
    state, unsharded = results["state_bytes"], results["unsharded_state_bytes"]
    rows = {
        "validation loss, nats a byte": f"{results['validation_loss']:.4f}",
        "of the averaged weights": f"{results['average_validation_loss'] or 0:.4f}",
        "optimizer state a rank": megabytes(state),
        "AdamW would hold": f"{megabytes(unsharded)} ({unsharded / state:.2f} x)",
    }
    if results["average_validation_loss"] is None:
        del rows["of the averaged weights"]
    if results["optimizer"] == "adamw":
        del rows["AdamW would hold"]
    if results["last_step"] >= results["first_step"]:
        rows["forward and backward, median step"] = f"{results['forward_backward_s'] * 1e3:.1f} ms"
        rows["optimizer, median step"] = f"{results['optimizer_s'] * 1e3:.1f} ms"
        rows["training, total"] = f"{results['total_s']:.1f} s, {results['tokens_per_s']:,.0f} tokens/s"
        rows["steps of this process"] = f"{results['first_step']} to {results['last_step']}"
    else:
        rows["steps of this process"] = "none left"
    if results["last_step"] - results["first_step"] + 1 == results["steps"]:
        del rows["steps of this process"]
    if results["saves"]:
        rows["training waited for saves"] = f"{results['save_s']:.2f} s, {results['saves']} of them"
    return rows


@record
def main() -> None:
    """`record` lets torchrun print the error of the rank that failed first."""
    ranks = Ranks.from_environment()
    args, parser, device = parse_arguments(ranks)
    try:
        corpus = data.load(args.data, args.context)
    except data.DataError as error:
        parser.error(str(error))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(args.threads)
    if ranks.launched:
        join(ranks, "nccl" if device.type == "cuda" else "gloo", timeout_s=args.timeout)
    with destroyed_on_success():
        try:
            pretrain(args, corpus, ranks, device)
        except CannotResume as error:
            parser.error(str(error))
        except (CheckpointError, TimeoutError) as error:
            parser.failure(str(error))


if __name__ == "__main__":
    main()
