# SPDX-License-Identifier: Apache-2.0
"""The shapes of four decoders, formats to store them in, and a model of a step's time. Measures nothing.

Note: the model of time
    Sending n bytes over a link takes alpha + n beta: a latency, and the inverse of a bandwidth. A reduce-scatter, or
    an all-gather, of n bytes over N ranks in H hosts of G then takes, after Thakur, Rabenseifner and Gropp 2005,
    "Optimization of Collective Communication Operations in MPICH", with an alpha and a beta of each level of links:

        ring     base + (N - H) alpha_intra + (H - 1) alpha_inter + (N - 1)/N n / bandwidth
                 bandwidth: the slowest link's, the smaller of ``intra`` and ``G inter``, as G rings side by side use
                 all G ports of a host (one host: N - 1 steps at ``intra``)
        halving  base + log2(G) alpha_intra + log2(H) alpha_inter
                 + (G - 1)/G n / intra + (H - 1)/H n/G / inter
                 recursive halving (doubling for the all-gather) level by level

    and an all-reduce is a reduce-scatter and an all-gather (the faster of the two forms). A ring uses the faster of
    NCCL's protocols Simple and LL128, as NCCL's own tuning does. Hybrid sharding over groups
    of S: a ring reduce-scatter in the group, then an all-reduce of the shard (1/S of the elements, in
    ``replica_itemsize`` bytes) over the N/S replicas; the all-gather stays in the group.

    A step with compute time C (6 FLOPs a parameter and token, at a share MFU of peak; backward is 2/3 of it) is a
    queue: bucket i's gradients are complete after its share of backward, and its reduce-scatter starts when the one
    before has ended. What ends after backward is exposed. Then a small all-reduce (norm, flag, used-bits); the updates
    one after the other, each ``launch`` plus the bytes it moves at ``memory``; and each bucket's all-gather behind
    its update and the all-gather before. With ``overlap_gather`` the forward of a bucket waits for its all-gather only.
    Contention, stragglers and skew are not in the model.

Note: model parallelism
    The rank of the fullest pipeline stage is predicted, with the shapes that it holds. Ranks are numbered with tensor
    parallelism innermost, then the groups of experts, then data parallelism, and stages outermost: data-parallel ranks
    are T apart, and those that hold the same experts T E apart, so that fewer of them share a host. Each bucket travels
    between the ranks that hold its parameters. A second small all-reduce, of norm and flags, joins the ranks of one
    copy of the model, and one more those that hold the same experts. A rank still computes ``tokens`` of the whole
    model's FLOPs, so that percentages compare with those of plain data parallelism. There are ``microbatches`` for each
    stage; only the backward of the last one hides reductions, and only the forward of the first one hides all-gathers.
    Traffic of model parallelism itself, and the pipeline's bubble, are not in the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from shardadam import Precision
from shardadam.cli.model_source import ModelSource
from shardadam.cli.plan_parallel import ModelParallel, Part, divide
from shardadam.layout import ALIGNMENT_NUMEL, Bucket, Layout
from shardadam.planner import PlannedParameter, Setting, lay_out
from shardadam.update import formats

WHOLE = ModelParallel()


@dataclass(frozen=True)
class Decoder:
    """Shapes of a decoder.

    Args:
        experts: of each layer, in two tensors, with a router; 0: the layer has one MLP.
        active_experts: those that compute a token.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    experts: int = 0
    active_experts: int = 0

    def named_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Return the shapes in the order of registration: embedding, layers, norm, head (not tied)."""
        kv = self.width // self.heads * self.kv_heads
        yield "embedding.weight", (self.vocabulary, self.width)
        for index in range(self.layers):
            layer = f"layers.{index}"
            for name, out in (("query", self.width), ("key", kv), ("value", kv), ("out", self.width)):
                yield f"{layer}.attention.{name}.weight", (out, self.width)
            if self.experts:
                yield f"{layer}.mlp.gate.weight", (self.experts, self.width)
                yield f"{layer}.mlp.experts.gate_up_proj", (self.experts, 2 * self.ffn, self.width)
                yield f"{layer}.mlp.experts.down_proj", (self.experts, self.width, self.ffn)
            else:
                yield f"{layer}.mlp.gate.weight", (self.ffn, self.width)
                yield f"{layer}.mlp.up.weight", (self.ffn, self.width)
                yield f"{layer}.mlp.down.weight", (self.width, self.ffn)
            yield f"{layer}.attention_norm.weight", (self.width,)
            yield f"{layer}.mlp_norm.weight", (self.width,)
        yield "norm.weight", (self.width,)
        yield "head.weight", (self.vocabulary, self.width)

    def shapes(self) -> Iterator[tuple[int, ...]]:
        for _, shape in self.named_shapes():
            yield shape

    @property
    def numels(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes()]

    @property
    def active_numel(self) -> int:
        """Number of parameters that compute a token."""
        idle = self.experts - self.active_experts
        return sum(self.numels) - idle * 3 * self.layers * self.ffn * self.width

    def part(self, parallel: ModelParallel, dtype: torch.dtype = torch.bfloat16) -> Part:
        """Return what the rank of the fullest stage holds."""
        planned = ((name, PlannedParameter(shape, dtype)) for name, shape in self.named_shapes())
        return divide(ModelSource(self.name, "number", "a decoder", tuple(planned)), parallel)

    def layout(
        self,
        ranks: int,
        bucket_mb: float | None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
        parallel: ModelParallel = WHOLE,
    ) -> Layout:
        """Return the layout of what one rank holds, whose state ``ranks`` split."""
        setting = Setting(world_size=ranks, bucket_mb=bucket_mb, device=device)
        return lay_out(self.part(parallel, dtype).held.planned, setting)


DECODERS = (
    Decoder("7B", 32, 4096, 32, 32, 11008, 32000),  # Llama 2
    Decoder("70B", 80, 8192, 64, 8, 28672, 32000),  # Llama 2
    Decoder("405B", 126, 16384, 128, 8, 53248, 128256),  # Llama 3.1
)
EXPERTS = Decoder("8x22B", 56, 6144, 48, 8, 16384, 32768, experts=8, active_experts=2)  # Mixtral


@dataclass(frozen=True)
class Form:
    """Formats of parameters and state."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    precision: Precision = field(default_factory=Precision)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def moved_bytes(self) -> float:
        """Bytes that the update of an element moves on NCCL: state and parameter both ways, the gradient as sent."""
        state = formats.tensors(self.precision.format(self.dtype, torch.device("cuda")), ALIGNMENT_NUMEL)
        state_bytes = sum(length * dtype.itemsize for length, dtype in state.values())
        return 2 * (self.itemsize + state_bytes / ALIGNMENT_NUMEL) + self.itemsize


FORMS = (
    Form("bf16, split, fp32"),
    Form("bf16, split, bf16", precision=Precision(moments="bf16")),
    Form("bf16, split, int8", precision=Precision(moments="int8")),
)
UNSHARDED_BYTES = 16  # torch.optim.AdamW in float32: parameter, gradient and two moments


@dataclass(frozen=True)
class Machine:
    """Constants of a machine, none of them measured by us. Defaults: a host of eight H100 SXM.

    Bandwidths are 0.8 of 450 GB/s (NVLink 4, one direction), 0.9 of 400 Gb/s (a port for each GPU), and 0.8 of 3.35
    TB/s (HBM3). Latencies, and LL128's share of the bandwidth, are those of ``src/graph/tuning.cc`` in NCCL, which
    chooses by them: ring, NVLink and network. Launches and events: assumed for eager PyTorch, in round numbers.
    """

    host_ranks: int = 8
    intra_gbs: float = 360.0  # GB/s of a rank inside its host, one direction
    inter_gbs: float = 45.0  # GB/s of a rank's own port between hosts
    intra_us: float = 3.4
    inter_us: float = 14.0
    base_us: float = 8.4  # of each collective
    ll128_intra_us: float = 1.9
    ll128_inter_us: float = 4.0
    ll128_base_us: float = 14.0
    ll128_share: float = 0.92  # of the bandwidth
    peak_tflops: float = 989.0
    mfu: float = 0.4
    memory_gbs: float = 2700.0  # GB/s that kernels reach
    launch_us: float = 5.0
    event_us: float = 1.0  # recorded, or waited for by a stream
    tokens: int = 8192  # a rank and step
    replica_itemsize: int = 4  # of the shard that hybrid sharding all-reduces
    microbatches: int = 4  # for each pipeline stage, if there are several

    def compute_s(self, parameters: int) -> float:
        return 6 * parameters * self.tokens / (self.peak_tflops * 1e12 * self.mfu)

    def apart(self, stride: int) -> Machine:
        """Return this machine for groups of ranks that are ``stride`` apart, of which fewer share a host."""
        return replace(self, host_ranks=max(1, self.host_ranks // stride))

    def within(self, ranks: int) -> Machine:
        """Return this machine for groups of which ``ranks`` are together in a host."""
        return replace(self, host_ranks=min(ranks, self.host_ranks))

    def _levels(self, ranks: int) -> tuple[int, int]:
        inside = min(self.host_ranks, ranks)
        return inside, ranks // inside

    def ring_s(self, nbytes: float, ranks: int) -> float:
        """Return the seconds of a reduce-scatter or an all-gather over ``ranks`` that fill their hosts."""
        if ranks == 1:
            return 0.0
        inside, hosts = self._levels(ranks)
        inner_steps = ranks - 1 if hosts == 1 else ranks - hosts
        bandwidth = self.intra_gbs if hosts == 1 else min(self.intra_gbs, inside * self.inter_gbs)
        simple = self.base_us + inner_steps * self.intra_us + (hosts - 1) * self.inter_us
        ll128 = self.ll128_base_us + inner_steps * self.ll128_intra_us + (hosts - 1) * self.ll128_inter_us
        travel = (ranks - 1) / ranks * nbytes / (bandwidth * 1e9)
        return min(simple * 1e-6 + travel, ll128 * 1e-6 + travel / self.ll128_share)

    def halving_s(self, nbytes: float, ranks: int) -> float:
        if ranks == 1:
            return 0.0
        inside, hosts = self._levels(ranks)
        latency = self.base_us + math.log2(inside) * self.intra_us + math.log2(hosts) * self.inter_us
        inner = (inside - 1) / inside * nbytes / self.intra_gbs
        outer = (hosts - 1) / hosts * nbytes / inside / self.inter_gbs
        return latency * 1e-6 + (inner + outer) * 1e-9

    def all_reduce_s(self, nbytes: float, ranks: int) -> float:
        return 2 * min(self.ring_s(nbytes, ranks), self.halving_s(nbytes, ranks))

    def replica_reduce_s(self, nbytes: float, replicas: int) -> float:
        """Return the seconds of an all-reduce over ranks on different hosts."""
        if replicas == 1:
            return 0.0
        steps = 2 * min(replicas - 1, math.log2(replicas))
        travel = 2 * (replicas - 1) / replicas * nbytes / (self.inter_gbs * 1e9)
        return (self.base_us + steps * self.inter_us) * 1e-6 + travel


@dataclass(frozen=True)
class Counts:
    """What a step of the 7B decoder costs a rank, without NCCL's own traffic; bf16, split masters, fp32 moments.

    Attributes:
        bytes_per_parameter: through device memory, for two sizes of a shard group.
        launches, events, buckets: on 8 ranks. The first two grow with the third.
    """

    bytes_per_parameter: tuple[tuple[int, float], tuple[int, float]]
    launches: int
    events: int
    buckets: int

    @classmethod
    def read(cls, path: Path) -> Counts:
        """Read what ``ledger.py --json`` has written."""
        found = json.loads(path.read_text())
        of_ranks = {ranks: float(found["bytes_per_parameter"][f"bf16 split {ranks}"]) for ranks in (8, 64)}
        return cls(
            ((8, of_ranks[8]), (64, of_ranks[64])), found["launches_7b"], found["events_7b"], found["buckets_7b"]
        )

    def nbytes(self, parameters: int, ranks: int) -> float:
        """Return the bytes on each of ``ranks`` that split the state. A part is the same for any number of them."""
        (one, first), (other, second) = self.bytes_per_parameter
        split = (first - second) / (1 / one - 1 / other)
        return parameters * (first + split * (1 / ranks - 1 / one))

    def host_s(self, buckets: int, machine: Machine) -> float:
        microseconds = self.launches * machine.launch_us + self.events * machine.event_us
        return microseconds * 1e-6 * buckets / self.buckets


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in one step, of gradients in ``reduce_scatter`` and of parameters in ``all_gather``.

    Attributes:
        experts: share of both that travels between the ranks that hold the same experts.
        data_sync: block of the small all-reduce over the data-parallel ranks.
        expert_sync: blocks over the ranks that hold the same experts, of which of them had a gradient; by number of
            ranks.
        model_sync: block of the last small all-reduce, over the ranks of one copy of the model; 0 if there is one rank.
    """

    reduce_scatter: float
    all_gather: float
    experts: float
    data_sync: int
    expert_sync: tuple[tuple[int, int], ...]
    model_sync: int


# Of blocks of float64, as in shardadam/engine/step_sync.py: norm^2, non-finite, sums of f and f^2; whether they differ.
HEADER_BYTES, MODEL_HEADER_BYTES = 8 * 4, 8 * 5


def traffic(layout: Layout, parallel: ModelParallel = WHOLE, itemsize: int = 2) -> Traffic:
    """Count the bytes of a step, with flat sharding, from a layout of what a rank holds."""

    def sent(bucket: Bucket) -> float:
        return (bucket.world_size - 1) / bucket.world_size * bucket.numel * itemsize

    total = sum(map(sent, layout.buckets))
    experts = sum(sent(bucket) for bucket in layout.buckets if bucket.world_size < layout.world_size)
    parameters = sum(len(arena.parameters) for arena in layout.arenas)
    ranks_of = {bucket.arena: bucket.world_size for bucket in layout.buckets}
    return Traffic(
        reduce_scatter=total,
        all_gather=total,
        experts=experts / total if total else 0.0,
        data_sync=HEADER_BYTES + 8 * parameters if layout.world_size > 1 else 0,
        expert_sync=tuple(
            (ranks_of[index], 8 * len(arena.parameters))
            for index, arena in enumerate(layout.arenas)
            if 1 < ranks_of[index] < layout.world_size
        ),
        model_sync=MODEL_HEADER_BYTES if parallel.ranks > 1 else 0,
    )


@dataclass(frozen=True)
class Overhead:
    """Seconds of a step beyond forward and backward.

    Attributes:
        copy_in, launches: 0 without counts; the update's launches are then in ``update``.
    """

    reduce: float
    step_sync: float
    update: float
    gather: float
    compute: float
    copy_in: float = 0.0
    launches: float = 0.0

    @property
    def percent(self) -> float:
        parts = (self.copy_in, self.reduce, self.step_sync, self.update, self.launches, self.gather)
        return 100 * sum(parts) / self.compute


def exposed_reduce(numels: Sequence[int], times: Sequence[float], backward: float) -> float:
    """Return the seconds that the reduce-scatters, queued during backward, take after its end."""
    done, ready, total = 0.0, 0.0, sum(numels)
    for numel, seconds in zip(numels, times, strict=True):
        ready += backward * numel / total
        done = max(done, ready) + seconds
    return max(0.0, done - backward)


def exposed_gather(
    numels: Sequence[int], updates: Sequence[float], times: Sequence[float], forward: float, overlap: bool
) -> float:
    """Return the seconds that the all-gathers add to the updates and, with ``overlap``, to the next forward."""
    updated, done, total, computed = 0.0, 0.0, sum(numels), sum(updates)
    for numel, update, seconds in zip(numels, updates, times, strict=True):
        updated += update
        done = max(done, updated) + seconds
        computed = max(computed, done) + forward * numel / total
    return max(0.0, computed - sum(updates) - forward if overlap else done - sum(updates))


def predict(
    decoder: Decoder,
    layout: Layout,
    ranks: int,
    scheme: str,
    machine: Machine,
    overlap: bool,
    counts: Counts | None = None,
    parallel: ModelParallel = WHOLE,
) -> Overhead:
    """Predict one step of ``decoder`` on ``ranks``.

    Args:
        layout: over all data-parallel ranks, or over a shard group for hybrid sharding; of what a rank holds.
        ranks: number of all ranks.
        scheme: "ring", "halving", "hybrid" or "ddp": all-reduces and an update that is not sharded.
        counts: of the step; None: count the update's bytes only, and a launch for each bucket.
        parallel: how the model is divided, as in the layout.
    """
    group, form, data = layout.world_size, FORMS[0], ranks // parallel.ranks
    kinds = {(bucket.numel, bucket.world_size) for bucket in layout.buckets}
    reduce_of: dict[tuple[int, int], float] = {}
    gather_of: dict[tuple[int, int], float] = {}
    for numel, sharers in kinds:
        near = machine.apart(parallel.tensor * (group // sharers))
        collective = near.halving_s if scheme == "halving" else near.ring_s
        nbytes = numel * form.itemsize
        if scheme == "ddp":
            reduce_of[numel, sharers], gather_of[numel, sharers] = near.all_reduce_s(nbytes, data), 0.0
            continue
        replicas = near.replica_reduce_s(numel / sharers * near.replica_itemsize, data // group)
        reduce_of[numel, sharers] = collective(nbytes, sharers) + replicas
        gather_of[numel, sharers] = collective(nbytes, sharers)
    sizes = [(bucket.numel, bucket.world_size) for bucket in layout.buckets]
    numels = [numel for numel, _ in sizes]
    launch = 0.0 if scheme == "ddp" else machine.launch_us * 1e-6
    shares = [numel / (1 if scheme == "ddp" else sharers) for numel, sharers in sizes]
    updates = [launch + share * form.moved_bytes / (machine.memory_gbs * 1e9) for share in shares]
    parameters, copy_in, launches = sum(decoder.numels), 0.0, 0.0
    compute = machine.compute_s(decoder.active_numel)
    if counts is not None:
        copied = 2 * form.itemsize * parameters if group > 1 else 0.0  # read from the gradients, written to staging
        copy_in, launches = copied / (machine.memory_gbs * 1e9), counts.host_s(len(numels), machine)
        rest = counts.nbytes(parameters, group) - copied
        updates = [numel / sum(numels) * rest / (machine.memory_gbs * 1e9) for numel in numels]
    hiding = compute if parallel.pipeline == 1 else compute / (parallel.pipeline * machine.microbatches)
    blocks = traffic(layout, parallel)
    sync = machine.apart(parallel.tensor).all_reduce_s(blocks.data_sync, data)
    for sharers, nbytes in blocks.expert_sync:
        sync += machine.apart(parallel.tensor * (group // sharers)).all_reduce_s(nbytes, sharers)
    sync += machine.within(parallel.tensor).all_reduce_s(blocks.model_sync, parallel.ranks)
    return Overhead(
        reduce=exposed_reduce(numels, [reduce_of[size] for size in sizes], hiding * 2 / 3),
        step_sync=0.0 if scheme == "ddp" else sync,
        update=sum(updates),
        gather=exposed_gather(
            numels[::-1],
            updates[::-1],
            [gather_of[size] for size in sizes[::-1]],
            hiding / 3,
            overlap and scheme != "ddp",
        ),
        compute=compute,
        copy_in=copy_in,
        launches=launches,
    )
