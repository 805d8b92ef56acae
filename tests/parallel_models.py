# SPDX-License-Identifier: Apache-2.0
"""Models for tensor, sequence, expert and pipeline parallelism, and their twins: the same models whole, in one process.

A parallel model has the parameters of its twin under the same names, with the same first values; a rank holds parts of
them, or some of them. Batches are a function of the step, so that each rank takes its own part of the twin's.

No parameter has gradients that are zero but for rounding errors, as Adam would turn those into steps: keys have no
bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


@cache
def mesh_of(names: str, *sizes: int) -> DeviceMesh:
    """Return the mesh over all ranks with these dimensions, such as ``mesh_of("dp tp", 2, 2)``. Collective, once."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=tuple(names.split()))


# A transformer


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model. Neither the vocabulary nor ``hidden`` need divide by the ranks that split them."""

    vocabulary: int = 37
    width: int = 16
    heads: int = 4
    hidden: int = 27
    blocks: int = 2
    length: int = 8
    batch: int = 8


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_width = sizes.width // sizes.heads
        self.query = nn.Linear(sizes.width, sizes.width)
        self.key = nn.Linear(sizes.width, sizes.width, bias=False)
        self.value = nn.Linear(sizes.width, sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(sizes.width)
        self.attention = Attention(sizes)
        self.feed_forward_norm = nn.LayerNorm(sizes.width)
        self.feed_forward = FeedForward(sizes.width, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A small decoder. No parallel style touches ``logit_scale``: tensor parallelism keeps it plain.

    Args:
        tied: the head uses the embedding's weight.
    """

    def __init__(self, sizes: Sizes = Sizes(), tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding: nn.Module | None = nn.Embedding(sizes.vocabulary, sizes.width)
            self.blocks = nn.ModuleDict({str(i): Block(sizes) for i in range(sizes.blocks)})
            self.norm: nn.Module | None = nn.LayerNorm(sizes.width)
            self.head: nn.Module | None = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
            self.logit_scale: nn.Parameter | None = nn.Parameter(torch.rand(sizes.vocabulary) + 0.5)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens to logits; a stage maps what the stage before it returns."""
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x)
        if self.head is None or self.norm is None or self.logit_scale is None:
            return x
        return self.head(self.norm(x)) * self.logit_scale  # type: ignore[no-any-return]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch_of(sizes: Sizes, step: int) -> tuple[Tensor, Tensor]:
    """Return tokens and targets, both int64 (batch, length)."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(sizes.vocabulary, (sizes.batch, sizes.length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def part_of(batch: Sequence[Tensor], index: int, count: int) -> list[Tensor]:
    return [tensor.chunk(count)[index] for tensor in batch]


# Tensor and sequence parallelism


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh, *, sequence_parallel: bool = False) -> Transformer:
    """Split the transformer, or a stage of it, over a 1-D mesh, in place. Collective over the mesh.

    Args:
        sequence_parallel: activations between blocks are split along the sequence, and norms work on parts of them:
            their weights' gradients are partial sums. Without it, norms stay plain modules.
    """
    tied = model.head is not None and model.embedding is not None and model.head.weight is model.embedding.weight
    plan: dict[str, ParallelStyle] = {}
    between = Shard(1) if sequence_parallel else Replicate()
    if model.embedding is not None:
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    for i in model.blocks:
        for name in ("query", "key", "value"):
            plan[f"blocks.{i}.attention.{name}"] = ColwiseParallel()
        plan[f"blocks.{i}.attention.out"] = RowwiseParallel(output_layouts=between)
        # DTensors between the two: from local tensors of unequal sizes, torch would infer a wrong global shape.
        plan[f"blocks.{i}.feed_forward.up"] = ColwiseParallel(use_local_output=False)
        plan[f"blocks.{i}.feed_forward.down"] = RowwiseParallel(output_layouts=between)
        if sequence_parallel:
            for name in ("attention", "feed_forward"):
                plan[f"blocks.{i}.{name}_norm"] = SequenceParallel()
                plan[f"blocks.{i}.{name}"] = PrepareModuleInput(
                    input_layouts=Shard(1), desired_input_layouts=Replicate()
                )
    if model.head is not None:
        if sequence_parallel:
            plan["norm"] = SequenceParallel()
        plan["head"] = ColwiseParallel(input_layouts=between, output_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    if tied:
        assert model.head is not None and model.embedding is not None
        model.head.weight = model.embedding.weight
    return model


# A model mesh of two dimensions

GRID_PLACEMENTS: dict[str, tuple[Placement, Placement]] = {
    "first.weight": (Shard(0), Shard(1)),
    "first.bias": (Shard(0), Replicate()),
    "second.weight": (Shard(0), Shard(0)),
    "second.bias": (Replicate(), Replicate()),
    "third.weight": (Replicate(), Shard(1)),
    "third.bias": (Replicate(), Shard(0)),
}


class Grid(nn.Module):
    """Linear layers, placed on a mesh of two dimensions in every way; ``scale`` stays plain."""

    def __init__(self, width: int = 11, hidden: int = 14, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(width, hidden)
            self.second = nn.Linear(hidden, width)
            self.third = nn.Linear(width, hidden)
            self.scale = nn.Parameter(torch.rand(hidden) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, width) to (batch, hidden); plain tensors, equal on all ranks of the mesh."""
        mesh = self.first.weight.device_mesh if isinstance(self.first.weight, DTensor) else None
        if mesh is not None:
            x = DTensor.from_local(x, mesh, [Replicate()] * 2)
        x = self.third(F.silu(self.second(F.silu(self.first(x)))))
        if isinstance(x, DTensor):
            x = x.full_tensor()
        return x * self.scale


def place_grid(model: Grid, mesh: DeviceMesh) -> Grid:
    """Turn parameters into DTensors on a 2-D mesh, in place. Collective over the mesh."""
    for name, placements in GRID_PLACEMENTS.items():
        module, _, attribute = name.rpartition(".")
        value = distribute_tensor(model.get_parameter(name).detach(), mesh, placements)
        model.get_submodule(module).register_parameter(attribute, nn.Parameter(value))
    return model


def grid_batch_of(step: int, width: int = 11, hidden: int = 14, batch: int = 8) -> tuple[Tensor, Tensor]:
    """Return inputs (batch, width) and targets (batch, hidden)."""
    generator = torch.Generator().manual_seed(2000 + step)
    return torch.randn(batch, width, generator=generator), torch.randn(batch, hidden, generator=generator)


# Gradients with placements of their own

TENSOR_PLACEMENTS: dict[str, Placement] = {
    "rows": Shard(0),
    "columns": Shard(1),
    "replicate": Replicate(),
    "partial": Partial(),
}


class _PlaceGradient(torch.autograd.Function):
    """Return a DTensor of a 1-D mesh as it is; backward gives its gradient a placement."""

    @staticmethod
    def forward(ctx, tensor, placement):  # type: ignore[no-untyped-def]
        ctx.placement = placement
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        mesh, whole = gradient.device_mesh, gradient.full_tensor()
        if ctx.placement.is_partial():
            return DTensor.from_local(
                whole * (0.75 if mesh.get_local_rank() == 0 else 0.25 / (mesh.size() - 1)), mesh, [ctx.placement]
            ), None
        return DTensor.from_local(whole, mesh, [Replicate()]).redistribute(placements=[ctx.placement]), None


class Quadratics(nn.Module):
    """Parameters with a quadratic loss each: their gradients have no rounding errors that depend on the mesh.

    Args:
        names: "placement" or "placement of the parameter, placement of its gradient", of ``TENSOR_PLACEMENTS``.
    """

    def __init__(self, names: Sequence[str], shape: tuple[int, int], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, step: int, index: int) -> Tensor:
        """Return the loss of batch ``index`` of a step, equal on all ranks of the mesh."""
        total = torch.zeros(())
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(3000 + 10 * step + index)
            target = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if not isinstance(parameter, DTensor):
                total = total + (parameter - target).square().sum()
                continue
            _, _, of_gradient = name.partition(",")
            value = _PlaceGradient.apply(parameter, TENSOR_PLACEMENTS[of_gradient]) if of_gradient else parameter
            target = distribute_tensor(target, parameter.device_mesh, parameter.placements, src_data_rank=None)
            total = total + (value - target).square().sum().full_tensor()
        return total


def place_quadratics(model: Quadratics, mesh: DeviceMesh) -> Quadratics:
    """Turn parameters into DTensors on a 1-D mesh, in place. Collective over the mesh."""
    for name, parameter in list(model.named_parameters()):
        placement = TENSOR_PLACEMENTS[name.partition(",")[0]]
        model.register_parameter(name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))
    return model


# Experts


class _AllToAll(torch.autograd.Function):
    """Exchange rows; backward sends their gradients back."""

    @staticmethod
    def forward(ctx, rows, sent, received, group):  # type: ignore[no-untyped-def]
        ctx.splits, ctx.group = (sent, received), group
        output = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
        return output

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        sent, received = ctx.splits
        output = gradient.new_empty(sum(sent), *gradient.shape[1:])
        dist.all_to_all_single(output, gradient.contiguous(), sent, received, group=ctx.group)
        return output, None, None, None


class Experts(nn.Module):
    """Feed-forward experts, each for the tokens that a fixed table sends to it, weighted by a trained gate.

    The table makes the choice of experts exact: with a trained choice, rounding errors could send a token elsewhere.
    The layer has all ``count`` experts, or after ``keep_experts`` those of this rank.

    Args:
        stacked: keep the weights of all experts in one tensor (experts, out, in) for each matrix.
    """

    def __init__(self, sizes: Sizes, count: int, expert_of_token: Tensor, stacked: bool) -> None:
        super().__init__()
        self.count = count
        self.gate = nn.Linear(sizes.width, count, bias=False)
        self.experts: nn.ModuleDict | nn.ParameterDict
        if stacked:
            self.experts = nn.ParameterDict(
                {
                    "up": torch.randn(count, sizes.hidden, sizes.width) / sizes.width**0.5,
                    "down": torch.randn(count, sizes.width, sizes.hidden) / sizes.hidden**0.5,
                }
            )
        else:
            self.experts = nn.ModuleDict({str(i): FeedForward(sizes.width, sizes.hidden) for i in range(count)})
        self.expert_of_token = expert_of_token
        self.group: dist.ProcessGroup | None = None

    def keep_experts(self, mesh: DeviceMesh) -> None:
        """Keep this rank's experts only: a run of them, equally long on all ranks of a 1-D mesh. Stacked weights become
        DTensors.
        """
        if isinstance(self.experts, nn.ParameterDict):
            for name, weight in list(self.experts.items()):
                self.experts[name] = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
        else:
            share = self.count // mesh.size()
            first = mesh.get_local_rank() * share
            self.experts = nn.ModuleDict({str(i): self.experts[str(i)] for i in range(first, first + share)})
        self.group = mesh.get_group()

    def held(self) -> list[Callable[[Tensor], Tensor]]:
        """Return the experts of this rank as functions."""
        if not isinstance(self.experts, nn.ParameterDict):
            return list(self.experts.values())
        weights = (self.experts["up"], self.experts["down"])
        up, down = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights)
        return [
            lambda rows, up=up, down=down: F.linear(F.silu(F.linear(rows, up)), down)  # type: ignore[misc]
            for up, down in zip(up, down, strict=True)
        ]

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = self.expert_of_token[tokens.flatten()]
        weight = F.softmax(self.gate(rows), -1).gather(1, chosen[:, None])
        order = chosen.argsort(stable=True)
        outputs = self._run(rows[order], chosen.bincount(minlength=self.count).tolist())
        return x + (weight * torch.empty_like(outputs).index_copy(0, order, outputs)).view_as(x)

    def _run(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Run each expert on its rows; ``rows`` come ordered by expert, ``counts`` of them for each."""
        if self.group is None:
            return self._run_held(rows, [counts])
        size = dist.get_world_size(self.group)
        theirs = torch.empty(self.count, dtype=torch.int64)
        dist.all_to_all_single(theirs, torch.tensor(counts), group=self.group)
        sent = torch.tensor(counts).view(size, -1).sum(1).tolist()
        received = theirs.view(size, -1).sum(1).tolist()
        outputs = self._run_held(_AllToAll.apply(rows, sent, received, self.group), theirs.view(size, -1).tolist())
        return _AllToAll.apply(outputs, received, sent, self.group)  # type: ignore[no-any-return]

    def _run_held(self, rows: Tensor, counts: list[list[int]]) -> Tensor:
        """``counts[source][expert]``: rows come ordered by source, then by expert. Experts without rows are idle."""
        parts = [list(part.split(c)) for part, c in zip(rows.split([sum(c) for c in counts]), counts, strict=True)]
        for index, expert in enumerate(self.held()):
            mine = [of_source[index] for of_source in parts]
            if any(len(part) for part in mine):
                outputs = expert(torch.cat(mine)).split([len(part) for part in mine])
                for of_source, output in zip(parts, outputs, strict=True):
                    of_source[index] = output
        # Rows of no expert keep the graph connected: all ranks of the group run the backward of the exchange.
        return torch.cat([rows[:0], *(part for of_source in parts for part in of_source)])


class ExpertModel(nn.Module):
    """An embedding, layers of experts and a head.

    Args:
        tables: for each layer, the expert of each token of the vocabulary, int64.
        stacked: as for ``Experts``.
    """

    def __init__(
        self, tables: Sequence[Tensor], sizes: Sizes, count: int = 4, stacked: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
            self.layers = nn.ModuleList(Experts(sizes, count, table, stacked) for table in tables)
            self.norm = nn.LayerNorm(sizes.width)
            self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, tokens)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def apply_expert_parallel(model: ExpertModel, mesh: DeviceMesh) -> ExpertModel:
    """Spread the experts of each layer over a 1-D mesh, in place. Collective over the mesh."""
    for layer in model.layers:
        assert isinstance(layer, Experts)
        layer.keep_experts(mesh)
    return model


# Stages of a pipeline


def stage_of(model: Transformer, index: int, count: int) -> Transformer:
    """Keep one of ``count`` stages, in place: the first has the embedding, the last has norm and head."""
    share = math.ceil(len(model.blocks) / count)
    model.blocks = nn.ModuleDict({i: b for i, b in model.blocks.items() if int(i) // share == index})
    if index > 0:
        model.embedding = None
    if index < count - 1:
        model.norm = model.head = None
        model.logit_scale = None
    return model
