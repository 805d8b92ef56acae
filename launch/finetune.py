# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a pretrained encoder to classify texts, all weights or LoRA adapters, in little memory. Prints the memory
that each rank needs before it trains, and refuses to start if that does not fit.

    torchrun --standalone --nproc-per-node 2 launch/finetune.py                   # all weights, on two ranks
    ... launch/finetune.py --moments int8 --memory-limit 350MB                    # in little memory
    ... launch/finetune.py --fit --memory-limit 260MB                             # chooses settings that fit
    ... launch/finetune.py --tune lora --data reviews.jsonl --save-dir tuned      # your own texts, adapters only

Without --data, it learns which module a docstring of Python's standard library belongs to. The baseline is a linear
probe of the same model, frozen. Both optimizers see the same model, data and schedule for one `--seed`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
import zlib
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import docstrings
from arguments import DTYPES, Parser, Ranks
from classifier import (
    Classifier,
    ModelError,
    load_pretrained,
    mean_pooled,
    packaged_model,
    padded,
    save,
    tokenize,
    with_adapters,
)
from data import DataError
from finetune_arguments import parse_arguments
from memory_check import (
    HEADER,
    Demand,
    Workload,
    available_memory,
    changed_options,
    cheapest,
    kept_bytes,
    nearest,
)
from pretrain import Replicated, Sharded, Timings, average, parameter_groups, synchronize
from probe import Scores, confusion, probe
from rendezvous import destroyed_on_success
from report import Report, Silence, megabytes
from shardadam import Precision
from shardadam.planner import PlannedParameter, Setting

EVALUATED_AT_ONCE = 64  # texts


class DoesNotFit(ValueError):
    """Not enough memory; the message says how much is available, how much is needed and which setting fits."""


@dataclass(frozen=True)
class Part:
    """Texts as token ids on the CPU, and their labels."""

    tokens: list[Tensor]
    labels: Tensor

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(one) for one in self.tokens])


@dataclass(frozen=True)
class Prepared:
    """A task, tokenized for one model; `padding` is the token that pads short texts."""

    training: Part
    validation: Part
    names: tuple[str, ...]
    padding: int

    def batch(self, part: Part, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, mask and labels of the texts at `indices`."""
        ids, mask = padded([part.tokens[i] for i in indices.tolist()], self.padding, device)
        return ids, mask, part.labels[indices].to(device)


def prepare(task: docstrings.Task, tokenizer: Any, args: argparse.Namespace) -> Prepared:
    """Tokenizes a task. Raises DataError where the training texts do not fill one batch."""
    if len(task.training) < args.batch:
        raise DataError(
            f"Found {len(task.training)} training texts in {task.source}, which do not fill one --batch {args.batch}. "
            "Give more texts, or a smaller batch."
        )
    training, validation = (
        Part(tokenize(tokenizer, texts.texts, args.max_length), torch.tensor(texts.labels))
        for texts in (task.training, task.validation)
    )
    return Prepared(training, validation, task.names, tokenizer.pad_token_id)


def batches(lengths: Tensor, *, batch: int, seed: int, epoch: int) -> Tensor:
    """(steps, batch) indices: the global batches of an epoch, each of texts of similar length. Drops the remainder."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator)[: len(lengths) // batch * batch]
    chunks = [chunk[lengths[chunk].argsort(stable=True)] for chunk in order.split(16 * batch)]
    result = torch.cat(chunks).view(-1, batch)
    return result[torch.randperm(len(result), generator=generator)]


# The model and its memory


def build(args: argparse.Namespace, encoder: nn.Module, classes: int, device: torch.device) -> Classifier:
    """Builds the model, equal on every rank."""
    torch.manual_seed(args.seed)
    hidden_size = encoder.config.hidden_size
    if args.tune == "lora":
        encoder = with_adapters(encoder, args.lora_rank)
    return Classifier(encoder, hidden_size, classes, args.dropout).to(device, DTYPES[args.dtype]).train()


def workload(
    model: Classifier, prepared: Prepared, args: argparse.Namespace, ranks: Ranks, device: torch.device
) -> Workload:
    """Measures a micro-batch of the longest texts, and freezes parameters without a gradient. Collective."""
    texts = args.batch // (ranks.world_size * args.accumulate)
    longest = prepared.training.lengths.argsort(descending=True, stable=True)[:texts]
    ids, mask, labels = prepared.batch(prepared.training, longest, device)
    parameters = list(model.parameters())
    kept, reached = kept_bytes(lambda: cross_entropy(model(ids, mask), labels), parameters)
    for index, parameter in enumerate(parameters):
        parameter.requires_grad_(index in reached)  # DDP would wait for a pooler's gradient
    most = torch.tensor(kept, device=device)
    if dist.is_initialized():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    setting = Setting(
        world_size=ranks.world_size,
        precision=Precision(moments=args.moments, master=args.master, gradients=args.gradients, seed=args.seed),
        gradient_sync=args.gradient_sync,
        update=args.update,
        device=device.type,
        clips=args.clip > 0,
        ema=args.ema_decay is not None,
        offload=args.offload,
    )
    planned = [
        PlannedParameter.of(parameter, group)
        for group, members in enumerate(parameter_groups(model, args.weight_decay))
        for _, parameter in members["params"]
    ]
    return Workload(planned, setting, args.optimizer == "sharded", most.item() / texts, args.batch, args.accumulate)


def check_memory(
    model: Classifier,
    work: Workload,
    prepared: Prepared,
    args: argparse.Namespace,
    ranks: Ranks,
    device: torch.device,
    report: Silence,
) -> Demand:
    """Prints the needed and the available memory; raises DoesNotFit on all ranks alike. Collective."""
    demand, plain = work.demand(), work.adamw_demand()
    held = sum(parameter.nbytes for parameter in model.parameters())
    memory = available_memory(args.memory_limit, held, ranks, device)
    report.say(f"plain AdamW would need {plain}")
    report.say(f"this needs          {demand}")
    if memory is None:
        report.say("available memory is unknown on this system; set --memory-limit to check against it")
        return demand
    available = memory.per_rank(ranks.world_size)
    report.say(f"available           {megabytes(available)} a rank ({memory.source})")
    if args.fit:
        fitted, tried = cheapest(work, memory, has_disk=args.offload_dir is not None)
        report.rows(HEADER, [row.cells() for row in tried])
        if fitted is not None:
            options = changed_options(work.setting, fitted.setting)
            report.say(f"--fit trains with {' '.join(options) or 'the settings as asked'}")
            adopt(fitted.setting, args)
            return fitted.demand()
    elif demand.total <= available:
        return demand
    options = nearest(work, memory)
    if options is None and args.tune == "full":
        adapted = argparse.Namespace(**{**vars(args), "tune": "lora"})
        smaller = build(adapted, model.encoder, len(prepared.names), device)
        other = workload(smaller, prepared, adapted, ranks, device)
        if other.sharded and other.demand().total <= available:
            options = ["--tune lora"], other.demand()
        else:
            options = nearest(other, memory)
            options = options and (["--tune lora", *options[0]], options[1])
    if options is None:
        remedy = "No other setting fits either: choose a smaller --model, --max-length or --batch."
    else:
        remedy = f"Nearest that fits: {' '.join(options[0])}, which needs {options[1]}."
    on = "one rank" if ranks.world_size == 1 else f"{ranks.world_size} ranks"
    raise DoesNotFit(
        f"memory is short: there are {megabytes(available)} a rank ({memory.source}), and --tune {args.tune} "
        f"{chosen_options(args)} on {on} needs {demand}; plain AdamW would need {plain}. {remedy}"
    )


def adopt(setting: Setting, args: argparse.Namespace) -> None:
    """Changes the options to those of ``setting``."""
    args.moments, args.master = setting.precision.moments, setting.precision.master
    args.gradients, args.update, args.gradient_sync = setting.precision.gradients, setting.update, setting.gradient_sync
    args.offload = setting.offload
    if not setting.clips:
        args.clip = 0.0


def chosen_options(args: argparse.Namespace) -> str:
    if args.optimizer == "adamw":
        return "--optimizer adamw"
    options = f"--moments {args.moments} --dtype {args.dtype} --gradient-sync {args.gradient_sync}"
    return f"{options} --update backward" if args.update == "backward" else options


# The baseline and the scores


@torch.no_grad()
def baseline(model: Classifier, prepared: Prepared, ranks: Ranks, device: torch.device) -> tuple[Scores, float]:
    """Returns the linear probe's scores and its L2 strength. Collective; all ranks solve the same small problem.

    `model` must be untrained: its adapters are zero then, and its encoder is the pretrained one.
    """
    model.eval()
    training, validation = (
        features(model.encoder, part, prepared, ranks, device) for part in (prepared.training, prepared.validation)
    )
    model.train()
    labels, classes = prepared.training.labels, len(prepared.names)
    with torch.enable_grad():
        predicted, strength = probe(training.cpu(), labels, validation.cpu(), classes)
    return Scores.of(confusion(predicted, prepared.validation.labels, classes)), strength


def features(encoder: nn.Module, part: Part, prepared: Prepared, ranks: Ranks, device: torch.device) -> Tensor:
    """(texts, hidden size) mean-pooled features. Collective: each rank computes some of the rows."""
    result = torch.zeros(len(part.tokens), encoder.config.hidden_size, device=device)
    for indices in own_texts(part, ranks):
        ids, mask, _ = prepared.batch(part, indices, device)
        result[indices.to(device)] = mean_pooled(encoder, ids, mask)
    if dist.is_initialized():
        dist.all_reduce(result)
    return result


@torch.no_grad()
def evaluate(model: Classifier, prepared: Prepared, ranks: Ranks, device: torch.device) -> tuple[float, Scores]:
    """Mean loss and scores on the validation texts. Collective: sums the counts of all ranks."""
    classes = len(prepared.names)
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    for indices in own_texts(prepared.validation, ranks):
        ids, mask, labels = prepared.batch(prepared.validation, indices, device)
        logits = model(ids, mask)
        counts += confusion(logits.argmax(1), labels, classes)
        total += cross_entropy(logits, labels, reduction="sum").double()
    model.train()
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(total)
    return total.item() / len(prepared.validation.tokens), Scores.of(counts.cpu())


def own_texts(part: Part, ranks: Ranks) -> tuple[Tensor, ...]:
    """Indices of this rank's texts, in chunks of similar length. Each text belongs to one rank."""
    order = part.lengths.argsort(stable=True)
    return order[ranks.rank :: ranks.world_size].split(EVALUATED_AT_ONCE)


# Training


@dataclass
class Curves:
    """Losses, equal on all ranks, and the seconds that validations took while training waited."""

    training: list[float]  # the mean over the global batch, by step
    validation: list[tuple[int, float]]  # step and loss
    validating_s: float = 0.0


def train(
    run: Sharded | Replicated,
    model: Classifier,
    prepared: Prepared,
    args: argparse.Namespace,
    ranks: Ranks,
    device: torch.device,
    report: Silence,
) -> tuple[Timings, Curves]:
    """Trains and validates; returns timings and losses. Collective: ranks share each batch."""
    timings, losses, curves = Timings([], []), torch.zeros(args.steps, device=device), Curves([], [])
    lengths = prepared.training.lengths
    torch.manual_seed(args.seed * 1_000_003 + ranks.rank)  # dropout, equal for both optimizers
    step, last_log, seen_tokens = 0, time.perf_counter(), 0
    for epoch in range(args.epochs):
        for batch in batches(lengths, batch=args.batch, seed=args.seed, epoch=epoch):
            step += 1
            started = time.perf_counter()
            own = batch[ranks.rank :: ranks.world_size]
            loss = torch.zeros((), device=device)
            for i, indices in enumerate(own.chunk(args.accumulate)):
                is_last = i + 1 == args.accumulate
                ids, mask, labels = prepared.batch(prepared.training, indices, device)
                # Sharded: reduce in every pass. Under no_sync() each rank would keep whole gradients.
                with nullcontext() if is_last or args.optimizer == "sharded" else run.no_sync():
                    part = cross_entropy(run.model(ids, mask), labels) / args.accumulate
                    part.backward()
                loss += part.detach()
            synchronize(device)
            backward_done = time.perf_counter()
            grad_norm = run.step()
            synchronize(device)
            timings.forward_backward.append(backward_done - started)
            timings.optimizer.append(time.perf_counter() - backward_done)
            losses[step - 1] = loss
            seen_tokens += int(lengths[batch].sum())

            if step in (1, args.steps) or step % args.log_every == 0:
                now = time.perf_counter()
                values = {
                    "loss": average(loss, ranks).item(),
                    "lr": run.schedule.get_last_lr()[0],
                    "tokens_per_s": seen_tokens / (now - last_log),
                }
                if grad_norm is not None:
                    values["grad_norm"] = grad_norm.item()
                report.metrics(step, values, run.state_bytes())
                last_log, seen_tokens = now, 0
            report.step_done(step)
            run.schedule.step()
            if args.validate_every and step % args.validate_every == 0 and step < args.steps:
                started = time.perf_counter()
                curves.validation.append((step, evaluate(model, prepared, ranks, device)[0]))
                report.validation(step, curves.validation[-1][1], unit="nats a text")
                taken = time.perf_counter() - started
                curves.validating_s += taken
                last_log += taken
    curves.training = average(losses, ranks).tolist()
    return timings, curves


def finetune(
    args: argparse.Namespace, task: docstrings.Task, ranks: Ranks, device: torch.device
) -> tuple[dict[str, Any], Classifier]:
    """Checks memory, trains the baseline and the model, and prints the results on rank 0; returns them on all ranks.

    Collective. Raises ModelError, DataError and DoesNotFit, on all ranks.
    """
    check_same_texts(task, device)
    tokenizer, encoder = load_pretrained(args.model or packaged_model())
    prepared = prepare(task, tokenizer, args)
    args.steps = args.epochs * (len(prepared.training.tokens) // args.batch)
    args.warmup = args.steps // 10 if args.warmup is None else args.warmup
    if args.warmup >= args.steps:
        raise DataError(f"--warmup {args.warmup} leaves none of the {args.steps} steps to the schedule; lower it")

    with Report(args.steps, args.log_dir) if ranks.rank == 0 else Silence() as report:
        report.say(
            f"{len(task.training):,} texts to train on, {len(task.validation):,} to validate, "
            f"{len(task.names)} labels: {task.source}"
        )
        model = build(args, encoder, len(task.names), device)
        work = workload(model, prepared, args, ranks, device)
        demand = check_memory(model, work, prepared, args, ranks, device, report)
        probed = None
        if args.probe:
            probed, strength = baseline(model, prepared, ranks, device)
            report.say(
                f"linear probe of the frozen model: accuracy {probed.accuracy:.1%}, macro-F1 {probed.macro_f1:.1%} "
                f"(L2 {strength:g})"
            )
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        report.say(
            f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} {args.dtype} parameters train, "
            f"{args.optimizer} on {ranks.world_size} x {device.type}, {args.steps} steps"
        )
        before = peak_bytes(device)
        forget_peak(device)
        run = (Sharded if args.optimizer == "sharded" else Replicated)(model, args)
        started = time.perf_counter()
        timings, curves = train(run, model, prepared, args, ranks, device, report)
        total_seconds = time.perf_counter() - started - curves.validating_s
        loss, scores = evaluate(model, prepared, ranks, device)
        curves.validation.append((args.steps, loss))
        average_loss, average_scores = None, None
        if (averaged := run.averaged()) is not None:
            with averaged:
                average_loss, average_scores = evaluate(model, prepared, ranks, device)
        peak = peak_bytes(device)
        if args.save_dir and ranks.rank == 0:
            save(Path(args.save_dir), model, tokenizer, task.names)
            report.say(f"saved {args.save_dir}")

    forward_backward, optimizer = timings.medians()
    results = {
        **{name: getattr(args, name) for name in ("tune", "optimizer", "moments", "dtype", "gradient_sync", "seed")},
        **{name: getattr(args, name) for name in ("master", "gradients", "update", "clip", "offload")},
        "world_size": ranks.world_size,
        "device": device.type,
        "steps": args.steps,
        "training_texts": len(task.training),
        "validation_texts": len(task.validation),
        "labels": len(task.names),
        "probe": vars(probed) if probed else None,
        "accuracy": scores.accuracy,
        "macro_f1": scores.macro_f1,
        "validation_loss": loss,
        "average_validation_loss": average_loss,
        "average_accuracy": average_scores and average_scores.accuracy,
        "training_loss": statistics.fmean(curves.training[-(args.steps // args.epochs) :]),
        "training_losses": curves.training,
        "validation_losses": [list(one) for one in curves.validation],
        "trained_parameters": trained,
        "state_bytes": run.state_bytes(),
        "unsharded_state_bytes": work.adamw_demand().need.optimizer,
        "demand_bytes": demand.total,
        "adamw_demand_bytes": work.adamw_demand().total,
        "activation_bytes": demand.activations,
        "peak_bytes": peak,
        "peak_before_training_bytes": before,
        "forward_backward_s": forward_backward,
        "optimizer_s": optimizer,
        "total_s": total_seconds,
    }
    if ranks.rank == 0:
        show(report, results)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return results, model


def check_same_texts(task: docstrings.Task, device: torch.device) -> None:
    """Raises DataError on all ranks if they read different texts. Collective."""
    if not dist.is_initialized():
        return
    checksum = zlib.crc32(repr((task.training, task.validation, task.names)).encode())
    low = torch.tensor([checksum, len(task.training)], device=device)
    high = low.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise DataError(
            f"Ranks read different texts: {len(task.training):,} to train on here, {low[1]:,} to {high[1]:,} over all "
            "ranks. Give every machine the same file, or the same Python version."
        )


def peak_bytes(device: torch.device) -> int:
    """The largest peak of any rank; on the CPU that of its whole process, with shared memory. Collective."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    most = torch.tensor(peak, device=device)
    if dist.is_initialized():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def forget_peak(device: torch.device) -> None:
    """Resets the peak after loading and the probe, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def show(report: Report, results: dict[str, Any]) -> None:
    table = Table()
    for column in ("validation", "linear probe", f"fine-tuned, {results['tune']}"):
        table.add_column(column, justify="left" if column == "validation" else "right")
    for name, title in (("accuracy", "accuracy"), ("macro_f1", "macro-F1")):
        probed = f"{results['probe'][name]:.1%}" if results["probe"] else "not trained"
        table.add_row(title, probed, f"{results[name]:.1%}")
    report.console.print(table)
    state, unsharded = results["state_bytes"], results["unsharded_state_bytes"]
    rows = {
        "validation loss": f"{results['validation_loss']:.4f}",
        "of the averaged weights": f"{results['average_validation_loss'] or 0:.4f}, accuracy "
        f"{results['average_accuracy'] or 0:.1%}",
        "optimizer state a rank": megabytes(state),
        "AdamW would hold": f"{megabytes(unsharded)} ({unsharded / state:.2f} x)",
        "planned a rank": megabytes(results["demand_bytes"]),
        "peak memory of a rank in training, all of its process": megabytes(results["peak_bytes"]),
        "forward and backward, median step": f"{results['forward_backward_s'] * 1e3:.1f} ms",
        "optimizer, median step": f"{results['optimizer_s'] * 1e3:.1f} ms",
        "training, total": f"{results['total_s']:.1f} s",
    }
    if results["average_validation_loss"] is None:
        del rows["of the averaged weights"]
    if results["optimizer"] == "adamw":
        del rows["AdamW would hold"]
    report.summary(rows, b"")


def main() -> None:
    ranks = Ranks.from_environment()
    args, parser, device = parse_arguments(ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(args.threads)
    run(args, parser, ranks, device)


def run(args: argparse.Namespace, parser: Parser, ranks: Ranks, device: torch.device) -> None:
    """Trains; exits with code 2 and one message if the data, the model or the memory is unsuitable."""
    try:
        task = docstrings.load(args.data, classes=args.classes, per_class=args.per_class)
    except DataError as error:
        parser.error(str(error))
    if ranks.launched:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with destroyed_on_success():
        try:
            finetune(args, task, ranks, device)
        except (DataError, ModelError, DoesNotFit) as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
