# SPDX-License-Identifier: Apache-2.0
"""How many bytes per rank, and how much overhead of a step, on up to 16,384 ranks? Mostly computed, not measured.

    python benchmarks/scale.py paper [--plots DIR] [--bucket-mb 32] [--inter-gbs 45] ...   computed
    python benchmarks/scale.py paper --tensor-parallel 8 --expert-parallel 8 ...           computed, of a rank's part
    python benchmarks/scale.py step --ledger FILE                                          computed, 7B on 8 and 512
    python benchmarks/scale.py check                                                       computed against memory()
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/scale.py measure measured

``paper`` plans three decoders with the library's planner and applies the model of time in ``scale_model.py``, whose
constants are all arguments; with model parallelism it does so for what a rank holds, and counts what a rank sends.
``step`` predicts the overhead of a step from what ``ledger.py --json FILE`` has counted,
beside what was counted before copies and launches were reduced. ``check`` builds real optimizers as rank 0 of N over
torch's ``fake`` process group, whose collectives move nothing, and fails if a byte differs from the plan. ``measure``
fits latency and bandwidth between the ranks that run it to the fastest rounds, and compares predictions for other
bucket sizes with measurements.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from fake_world import rank_0_of
from scale_model import (
    DECODERS,
    EXPERTS,
    FORMS,
    UNSHARDED_BYTES,
    Counts,
    Decoder,
    Form,
    Machine,
    predict,
    traffic,
)
from torch import Tensor, nn

from shardadam import Precision, ShardedAdamW, update
from shardadam.cli.plan_parallel import ModelParallel
from shardadam.layout import Layout
from shardadam.planner import Setting, memory_of
from shardadam.state.memory import Memory
from shardadam.transport import ReduceScatter, Transport, connect

RANKS = [2**power for power in range(15)]
PARALLEL_RANKS = (64, 512, 4096, 16384)
SMALL = Decoder("28M", 4, 512, 8, 4, 1408, 16000)
CHECKED = (
    *FORMS,
    Form("fp32, own, fp32", torch.float32),
    Form("fp32, own, int8", torch.float32, Precision(moments="int8")),
)
KINDS = ("parameters", "gradient_shard", "staging", "moments", "master", "scalars", "tables")

# On paper


def on_cuda(layout: Layout, form: Form) -> Memory:
    setting = Setting(world_size=layout.world_size, precision=form.precision, device="cuda", transport="collective")
    return memory_of(layout, setting, peak=True)


def print_bytes(layouts: dict[tuple[str, int], Layout], seconds: float) -> None:
    print(f"\nGB per rank (10^9 bytes), as on CUDA; {len(layouts)} layouts computed in {seconds:.1f} s\n")
    print("| model | N | parameters | gradient shard | staging | state fp32 | bf16 | int8 | total fp32 | bf16 | int8 |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for decoder in DECODERS:
        for ranks in (1, 8, 64, 512, 4096, 16384):
            planned = [on_cuda(layouts[decoder.name, ranks], form) for form in FORMS]
            common = [planned[0].parameters, planned[0].gradient_shard, planned[0].staging]
            state = [memory.state for memory in planned]
            total = [memory.total for memory in planned]
            cells = " | ".join(f"{value / 1e9:.3f}" for value in (*common, *state, *total))
            print(f"| {decoder.name} | {ranks:,} | {cells} |")
    print("\n| model | parameters | buckets at N = 1 | at 16,384 | padding at 16,384 | fp32 AdamW on every rank, GB |")
    print("|---|---|---|---|---|---|")
    for decoder in DECODERS:
        one, last = layouts[decoder.name, 1], layouts[decoder.name, 16384]
        numel = sum(decoder.numels)
        padding = 100 * (sum(arena.numel for arena in last.arenas) / numel - 1)
        print(
            f"| {decoder.name} | {numel:,} | {len(one.buckets):,} | {len(last.buckets):,} | {padding:.2f}% | "
            f"{UNSHARDED_BYTES * numel / 1e9:,.1f} |"
        )


Curves = dict[str, dict[str, list[float]]]


def predict_all(layouts: dict[tuple[str, int], Layout], machine: Machine, args: argparse.Namespace) -> Curves:
    """Return the overhead in per cent of compute, by decoder and scheme, for each of ``RANKS``. With at most one shard
    group of ranks, hybrid is the same as ring.
    """
    curves: Curves = {}
    for decoder in DECODERS:
        curves[decoder.name] = {scheme: [] for scheme in ("ring", "halving", "hybrid", "ddp")}
        for scheme, values in curves[decoder.name].items():
            for ranks in RANKS:
                group = min(ranks, args.shard_group) if scheme == "hybrid" else ranks
                layout = layouts[decoder.name, 1 if scheme == "ddp" else group]
                values.append(predict(decoder, layout, ranks, scheme, machine, args.overlap_gather).percent)
    return curves


def print_times(
    curves: Curves, layouts: dict[tuple[str, int], Layout], machine: Machine, args: argparse.Namespace
) -> None:
    print(
        f"\n{machine}\n\nStep overhead in per cent of forward + backward; hybrid: shard groups of {args.shard_group}\n"
    )
    print("| model | N | flat, ring | flat, halving | hybrid | DDP, not sharded |")
    print("|---|---|---|---|---|---|")
    for name, schemes in curves.items():
        for index, ranks in enumerate(RANKS):
            if ranks in (8, 64, 512, 2048, 4096, 16384):
                cells = " | ".join(f"{values[index]:,.1f}" for values in schemes.values())
                print(f"| {name} | {ranks:,} | {cells} |")
    print("\nWhere it comes from, N = 16,384, seconds exposed\n")
    print("| model | scheme | compute | reduce | norm and flags | update | gather |\n|---|---|---|---|---|---|---|")
    for decoder in DECODERS:
        for scheme, group in (("ring", 16384), ("halving", 16384), ("hybrid", args.shard_group), ("ddp", 1)):
            some = predict(decoder, layouts[decoder.name, group], 16384, scheme, machine, args.overlap_gather)
            parts = (some.compute, some.reduce, some.step_sync, some.update, some.gather)
            print(f"| {decoder.name} | {scheme} | {' | '.join(f'{value:,.3f}' for value in parts)} |")
    print("\nThe same by bucket_mb, 70B, per cent\n")
    sizes = (32, 128, 512, 2048)
    print(f"| N | scheme | {' | '.join(map(str, sizes))} |\n|---|---|{'---|' * len(sizes)}")
    decoder = DECODERS[1]
    for ranks in (512, 4096, 16384):
        for scheme in ("ring", "halving", "hybrid"):
            group = min(ranks, args.shard_group) if scheme == "hybrid" else ranks
            values = [
                predict(decoder, decoder.layout(group, size), ranks, scheme, machine, args.overlap_gather).percent
                for size in sizes
            ]
            print(f"| {ranks:,} | {scheme} | {' | '.join(f'{value:,.1f}' for value in values)} |")


def plot(curves: Curves, layouts: dict[tuple[str, int], Layout], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    blue, orange, green, grey = "#0072B2", "#D55E00", "#009E73", "#666666"  # Okabe and Ito
    ticks = [1, 8, 64, 512, 16384]

    def panels(y_label: str, y_ticks: dict[float, str]):
        figure, axes = pyplot.subplots(1, 3, figsize=(14, 5.2), sharey=True, layout="constrained")
        for axis, decoder in zip(axes, DECODERS, strict=True):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.set_yticks(list(y_ticks), list(y_ticks.values()))
            axis.minorticks_off()
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.set_title(f"{decoder.name} parameters")
            axis.set_xlabel("data-parallel ranks")
        axes[0].set_ylabel(y_label)
        return figure, axes

    gigabytes = {float(10**power): f"{10**power:,}" for power in range(-3, 5)}
    figure, axes = panels("GB per rank", gigabytes)
    for axis, decoder in zip(axes, DECODERS, strict=True):
        axis.axhline(
            UNSHARDED_BYTES * sum(decoder.numels) / 1e9, color=grey, linestyle="--", label="AdamW, fp32, not sharded"
        )
        planned = {form.name: [on_cuda(layouts[decoder.name, n], form) for n in RANKS] for form in FORMS}
        names = {"fp32": "fp32 moments", "int8": "int8 moments"}
        for form, colour in ((FORMS[0], blue), (FORMS[2], orange)):
            moments = form.precision.moments
            state = [(memory.moments + memory.master) / 1e9 for memory in planned[form.name]]
            total = [memory.total / 1e9 for memory in planned[form.name]]
            axis.plot(RANKS, total, color=colour, linewidth=2.4, label=f"all, {names[moments]}")
            axis.plot(RANKS, state, color=colour, linestyle=":", linewidth=2, label=f"state, {names[moments]}")
        parameters = [memory.parameters / 1e9 for memory in planned[FORMS[0].name]]
        axis.plot(RANKS, parameters, color=green, linewidth=1.6, linestyle="-.", label="parameters, bf16, whole")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(args.plots / "scale-bytes.png", dpi=110)

    percent = {0.1: "0.1%", 1.0: "1%", 3.0: "3%", 5.0: "5%", 10.0: "10%", 30.0: "30%", 100.0: "100%", 1000.0: "1,000%"}
    figure, axes = panels("predicted overhead, share of compute", percent)
    styles = {
        "ring": ("flat, ring", orange, "-", "o"),
        "halving": ("flat, recursive halving", blue, "-", "s"),
        "hybrid": (f"hybrid, shard groups of {args.shard_group}", green, "-", "^"),
        "ddp": ("DDP, update not sharded", grey, "--", None),
    }
    for axis, schemes in zip(axes, curves.values(), strict=True):
        for scheme, (label, colour, line, marker) in styles.items():
            axis.plot(
                RANKS, schemes[scheme], color=colour, linestyle=line, marker=marker, markersize=5, lw=2, label=label
            )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(args.plots / "scale-overhead.png", dpi=110)


def machine_of(args: argparse.Namespace) -> Machine:
    return Machine(**{field.name: getattr(args, field.name) for field in fields(Machine)})


def print_parallel(parallel: ModelParallel, machine: Machine, args: argparse.Namespace) -> None:
    """Print what a rank of the fullest stage holds and sends. Experts are spread in the decoder that has some."""
    print(
        f"{machine}\n\nPREDICTED: tensor {parallel.tensor} x pipeline {parallel.pipeline}, experts over "
        f"{parallel.expert} groups; a rank of the fullest stage; bf16, split masters, fp32 moments\n"
    )
    heads = ("model", "N", "data", "M parameters", "GB parameters", "state", "total", "GB sent", "of experts")
    heads += ("small, bytes", "us", "overhead, %", "overlap_gather, %")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for decoder in (*DECODERS, EXPERTS):
        divided = parallel if decoder.experts else replace(parallel, expert=1)
        for ranks in PARALLEL_RANKS:
            data = ranks // divided.ranks
            if ranks % divided.ranks or data % divided.expert:
                continue
            layout = decoder.layout(data, args.bucket_mb, parallel=divided)
            memory, sent = on_cuda(layout, FORMS[0]), traffic(layout, divided)
            held = sum(segment.numel for bucket in layout.buckets for segment in bucket.segments)
            ways = [
                predict(decoder, layout, ranks, "ring", machine, overlap, parallel=divided) for overlap in (False, True)
            ]
            cells = [
                *(decoder.name, f"{ranks:,}", f"{data:,}", f"{held / 1e6:,.0f}"),
                *(f"{value / 1e9:.3f}" for value in (memory.parameters, memory.state, memory.total)),
                f"{(sent.reduce_scatter + sent.all_gather) / 1e9:.3f}",
                f"{100 * sent.experts:.0f}%",
                f"{sent.data_sync:,} + {sum(nbytes for _, nbytes in sent.expert_sync):,} + {sent.model_sync}",
                f"{1e6 * ways[0].step_sync:.0f}",
                *(f"{some.percent:.1f}" for some in ways),
            ]
            print(f"| {' | '.join(cells)} |")


def paper(args: argparse.Namespace) -> None:
    machine = machine_of(args)
    parallel = ModelParallel(args.tensor_parallel, args.expert_parallel, args.pipeline_parallel)
    if parallel.is_used:
        print_parallel(parallel, machine, args)
        return
    start = time.perf_counter()
    layouts = {(decoder.name, ranks): decoder.layout(ranks, args.bucket_mb) for decoder in DECODERS for ranks in RANKS}
    print_bytes(layouts, time.perf_counter() - start)
    curves = predict_all(layouts, machine, args)
    print_times(curves, layouts, machine, args)
    if args.plots is not None:
        plot(curves, layouts, args)


# One step, from counts

BEFORE = Counts(((8, 10.2917), (64, 4.787)), launches=5133, events=3243, buckets=463)
"""As ``ledger.py`` counted them at commit aa563c5, before copies and launches were reduced, with buckets of 32 MiB."""
PLACES = ((8, 8, "flat"), (512, 512, "flat"), (512, 64, "hybrid, S = 64"), (512, 8, "hybrid, S = 8"))


def step(args: argparse.Namespace) -> None:
    machine = machine_of(args)
    after = Counts.read(args.ledger)
    ways = (
        ("before", BEFORE, 32.0, False),
        ("before, overlap_gather", BEFORE, 32.0, True),
        ("after", after, args.bucket_mb, False),
        ("after, overlap_gather", after, args.bucket_mb, True),
    )
    decoder = DECODERS[0]
    print(f"{machine}\n\n{decoder.name}, bf16, split masters, fp32 moments, clipping: PREDICTED, ms a step\n")
    print("| GPUs | sharding | version | buckets | HBM | launches | reduce | gather | all | of forward + backward |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for ranks, group, name in PLACES:
        for way, counts, bucket_mb, overlap in ways:
            layout = decoder.layout(group, bucket_mb)
            scheme = "hybrid" if group < ranks else "ring"
            some = predict(decoder, layout, ranks, scheme, machine, overlap, counts)
            parts = (some.copy_in + some.update, some.launches, some.reduce + some.step_sync, some.gather)
            cells = " | ".join(f"{1e3 * value:.1f}" for value in (*parts, sum(parts)))
            print(f"| {ranks} | {name} | {way} | {len(layout.buckets)} | {cells} | {some.percent:.1f}% |")


# Compared with real optimizers


def check_one(ranks: int, form: Form, kernel: bool, bucket_mb: float) -> Memory:
    """Compare plan and ``memory()`` in every kind; return the bytes, with staging as after backward. With the kernel,
    which cannot run here, no backward runs.

    Raises:
        RuntimeError: they differ.
    """
    parameters = [nn.Parameter(torch.zeros(shape, dtype=form.dtype)) for shape in SMALL.shapes()]
    setting = Setting(world_size=ranks, precision=form.precision, bucket_mb=bucket_mb, transport="collective")
    layout = SMALL.layout(ranks, bucket_mb, form.dtype, "cpu")
    update.KERNEL_DEVICES.update({"cpu"} if kernel else set())
    try:
        optimizer = ShardedAdamW(parameters, precision=form.precision, bucket_mb=bucket_mb, transport="collective")
        planned, at_peak = memory_of(layout, setting), memory_of(layout, setting, peak=True)
    finally:
        update.KERNEL_DEVICES.discard("cpu")
    built = optimizer.memory()
    if kernel:
        if built != planned:
            raise RuntimeError(f"N = {ranks}, {form.name}: memory() has {built}, planned {planned}")
        return built
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.clip_grad_norm_(1.0)  # waits for all reductions
    found = replace(built, staging=optimizer.memory().staging)
    if 2 * found.staging == at_peak.staging:  # the fake peers are never late, so one of the two buffers is not used
        at_peak = replace(at_peak, staging=found.staging)
    if (built, found) != (planned, at_peak):
        raise RuntimeError(f"N = {ranks}, {form.name}: memory() has {built}, {found}, planned {planned}, {at_peak}")
    return found


def check(args: argparse.Namespace) -> None:
    start, count = time.perf_counter(), 0
    print(f"torch {torch.__version__}; {sum(SMALL.numels):,} parameters, rank 0 of N; bytes, plan = memory()\n")
    print(f"| N | form | {' | '.join(KINDS)} |\n|---|---|{'---|' * len(KINDS)}")
    for ranks in args.ranks:
        with rank_0_of(ranks):
            for form in CHECKED:
                trained = check_one(ranks, form, False, args.bucket_mb)
                found = asdict(replace(check_one(ranks, form, True, args.bucket_mb), staging=trained.staging))
                count += 2
                if form in (FORMS[0], FORMS[2]):
                    print(f"| {ranks:,} | {form.name} | {' | '.join(f'{found[kind]:,}' for kind in KINDS)} |")
    print(f"\n{count} optimizers, every kind equal; {time.perf_counter() - start:.0f} s")


# Compared with measured time

FITTED_KB = (16, 64, 256, 1024, 2048, 4096, 8192, 16384)
PREDICTED_MB = (0.5, 3, 6, 12, 24)


def seconds(work: Callable[[], None], rounds: int) -> list[float]:
    """Return the seconds of the slowest rank in each round, sorted, after one round to warm up."""
    times = []
    for _ in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        work()
        taken = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        times.append(float(taken))
    return sorted(times[1:])


def transfers(transport: Transport, numels: Sequence[int]) -> dict[str, Callable[[], None]]:
    """Return functions that transfer all buckets. The buckets share one staging buffer, and are in one flat buffer."""
    cpu = torch.device("cpu")
    staging = transport.allocate_staging(max(numels), torch.float32, cpu)
    staging.send.fill_(1.0)
    flat = transport.allocate_parameters(sum(numels), torch.float32, cpu)
    buckets: list[Tensor] = list(flat.split(list(numels)))
    shards = [torch.zeros(numel // transport.world_size) for numel in numels]

    def reduce_scatter() -> None:
        for numel, shard in zip(numels, shards, strict=True):
            transport.reduce_scatter(ReduceScatter(staging, numel, shard, scale=1.0, accumulate=False)).wait()

    def all_gather() -> None:
        for bucket in buckets:
            transport.all_gather(bucket).wait()

    def gather_as_step_does() -> None:
        for pending in [transport.all_gather(bucket) for bucket in buckets]:
            pending.wait()

    return {"reduce-scatter": reduce_scatter, "all-gather": all_gather, "all-gather, all at once": gather_as_step_does}


def fit(nbytes: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """Fit times = alpha + beta bytes by least squares of relative errors; neither is below 0."""
    weights = torch.tensor(times, dtype=torch.float64).reciprocal()
    columns = torch.stack([weights, weights * torch.tensor(nbytes, dtype=torch.float64)], dim=1)
    alpha, beta = torch.linalg.lstsq(columns, torch.ones(len(times), 1, dtype=torch.float64)).solution.flatten()
    return max(0.0, float(alpha)), max(0.0, float(beta))


def measure(args: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    transport = connect(None)
    ranks, say = transport.world_size, print if dist.get_rank() == 0 else lambda *_: None
    say(f"torch {torch.__version__}, Python {platform.python_version()}, {ranks} ranks, {type(transport).__name__}")
    share = (ranks - 1) / ranks
    times: dict[str, list[float]] = {"reduce-scatter": [], "all-gather": []}
    for kilobytes in FITTED_KB:
        forms = transfers(transport, [kilobytes * 256 // ranks * ranks])
        for name, some in times.items():
            some.append(seconds(forms[name], args.rounds)[0])
    travelled = [int(share * kilobytes * 1024) for kilobytes in FITTED_KB]
    constants = {name: fit(travelled, some) for name, some in times.items()}
    say("\n| transfer | latency, us | bandwidth, GB/s | error within the fit, per cent |\n|---|---|---|---|")
    for name, (alpha, beta) in constants.items():
        errors = [100 * ((alpha + beta * n) / t - 1) for n, t in zip(travelled, times[name], strict=True)]
        say(f"| {name} | {1e6 * alpha:.0f} | {1e-9 / beta:.2f} | {', '.join(f'{error:+.0f}' for error in errors)} |")
    say(f"\nA model of {sum(SMALL.numels):,} float32 parameters, all buckets, ms\n")
    say("| bucket_mb | buckets | transfer | predicted | fastest | median | error |\n|---|---|---|---|---|---|---|")
    for bucket_mb in PREDICTED_MB:
        numels = [bucket.numel for bucket in SMALL.layout(ranks, bucket_mb, torch.float32, "cpu").buckets]
        for name, work in transfers(transport, numels).items():
            alpha, beta = constants[name.split(",")[0]]
            predicted = sum(alpha + beta * share * 4 * numel for numel in numels)
            found = seconds(work, args.rounds)
            middle = statistics.median(found)
            error = 100 * (predicted / found[0] - 1)
            cells = " | ".join(f"{1e3 * value:.1f}" for value in (predicted, found[0], middle))
            say(f"| {bucket_mb} | {len(numels)} | {name} | {cells} | {error:+.0f}% |")
    transport.close(clean=True)
    dist.barrier()
    dist.destroy_process_group()


def add_machine(command: argparse.ArgumentParser) -> None:
    for field in fields(Machine):
        option = "--" + field.name.replace("_", "-")
        command.add_argument(option, type=type(field.default), default=field.default, help="of scale_model.Machine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("paper", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--plots", type=Path, help="directory for scale-bytes.png and scale-overhead.png")
    command.add_argument("--bucket-mb", type=float, default=None, help="None: the library's default")
    command.add_argument("--shard-group", type=int, default=64, help="ranks that split one copy, hybrid sharding")
    command.add_argument("--overlap-gather", action="store_true", help="all-gathers run under the next forward")
    for name, metavar in (("tensor", "T"), ("expert", "E"), ("pipeline", "P")):
        command.add_argument(f"--{name}-parallel", metavar=metavar, type=int, default=1, help="as in shardadam plan")
    add_machine(command)
    command.set_defaults(run=paper)
    command = commands.add_parser("step", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--ledger", type=Path, required=True, help="what benchmarks/ledger.py --json has written")
    command.add_argument("--bucket-mb", type=float, default=None, help="None: the library's default")
    add_machine(command)
    command.set_defaults(run=step)
    command = commands.add_parser("check")
    command.add_argument("--ranks", type=int, nargs="+", default=[1, 3, 8, 64, 1024, 16384])
    command.add_argument("--bucket-mb", type=float, default=8)
    command.set_defaults(run=check)
    command = commands.add_parser("measure")
    command.add_argument("--rounds", type=int, default=15)
    command.set_defaults(run=measure)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
