# SPDX-License-Identifier: Apache-2.0
"""Which part of a model one rank holds, with tensor, expert and pipeline parallelism; from names and shapes alone.

The cuts are the usual ones: linear layers by columns and rows, in pairs (Shoeybi et al. 2019, "Megatron-LM",
arXiv:1909.08053), embedding and head over the vocabulary, experts over groups of data-parallel ranks, layers in order
over pipeline stages. Prints nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shardadam.cli.errors import CommandError
from shardadam.cli.model_source import ModelSource
from shardadam.planner import PlannedParameter, adamw_need

COLUMNS = {"query", "key", "value", "qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value",
           "wq", "wk", "wv", "wqkv", "c_attn", "in_proj", "in_proj_weight", "in_proj_bias", "q_b_proj", "kv_b_proj",
           "gate", "up", "gate_proj", "up_proj", "gate_up", "gate_up_proj", "w1", "w3", "wi", "wi_0", "wi_1", "fc1",
           "fc_in", "c_fc", "lin1", "linear1", "q_lin", "k_lin", "v_lin", "dense_h_to_4h",
           "intermediate.dense"}  # fmt: skip
ROWS = {"out", "o", "o_proj", "out_proj", "output", "wo", "down", "down_proj", "w2", "fc2", "fc_out", "c_proj", "lin2",
        "linear2", "out_lin", "dense_4h_to_h", "attention.dense", "self_attention.dense",
        "output.dense"}  # fmt: skip
EMBEDDINGS = {"embedding", "embed", "embed_tokens", "tok_embeddings", "token_embedding", "word_embeddings", "wte",
              "embed_in", "shared"}  # fmt: skip
HEADS = {"head", "lm_head", "output", "embed_out", "unembed"}
EXPERTS = ("experts", "local_experts")
WHOLE = "whole"
_EXPERT_GROUP = 1
"""Param group of the experts, whose ``process_group`` is a part of the data-parallel ranks."""


@dataclass(frozen=True, slots=True)
class ModelParallel:
    """How many parts a model is divided into.

    Args:
        tensor: ranks that split single tensors.
        expert: groups of data-parallel ranks that hold different experts.
        pipeline: stages, each with some of the layers.
    """

    tensor: int = 1
    expert: int = 1
    pipeline: int = 1

    @property
    def ranks(self) -> int:
        """Number of ranks that hold one copy of the model, not counting that experts are spread over more."""
        return self.tensor * self.pipeline

    @property
    def is_used(self) -> bool:
        return self != ModelParallel()


@dataclass(frozen=True, slots=True)
class Part:
    """What the planned rank holds: the one that holds the most.

    Args:
        source: the whole model.
        held: the parameters of the rank, with the shapes that it holds.
        parallel: how the model is divided.
        stage: index of its pipeline stage.
        layers: names of the first and the last layer of the stage; None without layers.
        cuts: names of the parameters, their numbers replaced by "*", by how they are cut: "columns (dim 0)", ...,
            "whole".
        copied: names of tied parameters, which the first and the last stage hold.
    """

    source: ModelSource
    held: ModelSource
    parallel: ModelParallel
    stage: int
    layers: tuple[str, str] | None
    cuts: dict[str, list[str]]
    copied: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a parameter is cut. ``how``: "columns", "rows", "vocabulary" or ``WHOLE``, over ``dim``.

    Args:
        is_placed: whether tensor parallelism makes it a DTensor although it is whole: the bias of rows.
    """

    how: str = WHOLE
    dim: int = 0
    is_expert: bool = False
    is_placed: bool = False

    def label(self, parallel: ModelParallel) -> str:
        parts = ["experts (dim 0)"] if self.is_expert and parallel.expert > 1 else []
        if self.how != WHOLE and parallel.tensor > 1:
            parts.append(f"{self.how} (dim {self.dim})")
        return ", ".join(parts) or WHOLE


def divide(source: ModelSource, parallel: ModelParallel) -> Part:
    """Return what the rank that holds the most of ``source`` holds. Uneven parts are cut as ``torch.chunk`` does.

    Raises:
        CommandError: ``source`` has no experts, no tensor that can be cut, or fewer layers or experts than parts.
    """
    shapes = {name: one.shape for name, one in source.parameters}
    cuts = {name: _cut_of(name, shapes) for name in shapes}
    counts = _expert_counts(source.parameters)
    _check(source, parallel, cuts, counts)
    held = [
        (name, _local(name, one, cuts[name], parallel))
        for name, one in source.parameters
        if not _is_of_other_rank(name, counts, parallel.expert)
    ]
    stages = _stages(held, parallel.pipeline)
    stage = max(range(parallel.pipeline), key=lambda index: adamw_need([one for _, one in stages[index]]).total)
    layers = _layers(stages[stage])
    labels: dict[str, list[str]] = {}
    for name, _ in stages[stage]:
        patterns = labels.setdefault(cuts[name].label(parallel), [])
        pattern = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)
        if pattern not in patterns:
            patterns.append(pattern)
    copied = tuple(name for name, one in held if _is_copied(name, one)) if parallel.pipeline > 1 else ()
    return Part(
        source=source,
        held=replace(source, parameters=tuple(stages[stage])),
        parallel=parallel,
        stage=stage,
        layers=(layers[0], layers[-1]) if layers else None,
        cuts=labels,
        copied=copied,
    )


def _check(source: ModelSource, parallel: ModelParallel, cuts: dict[str, _Cut], counts: dict[str, int]) -> None:
    if parallel.tensor > 1 and all(cut.how == WHOLE for cut in cuts.values()):
        raise CommandError(
            f"--tensor-parallel: found {parallel.tensor}, and in {source.what} no tensor whose name says how to cut "
            "it, such as q_proj.weight; expected 1. Leave it out."
        )
    if parallel.expert > 1:
        if not counts:
            raise CommandError(
                f"--expert-parallel: found {parallel.expert}, and in {source.what} no experts; expected 1. Leave it "
                'out, or give a model that has modules or tensors in "experts".'
            )
        fewest = min(counts.values())
        if fewest < parallel.expert:
            raise CommandError(
                f"--expert-parallel: found {parallel.expert} with {fewest} experts in a layer, expected at most as "
                f"many. Give --expert-parallel {fewest} or less."
            )
    layers = _layers(source.parameters)
    if parallel.pipeline > max(1, len(layers)):
        raise CommandError(
            f"--pipeline-parallel: found {parallel.pipeline} with a model of {len(layers)} layers (numbered modules), "
            f"expected at most as many. Give --pipeline-parallel {max(1, len(layers))} or less."
        )


# Tensors


def _cut_of(name: str, shapes: dict[str, tuple[int, ...]]) -> _Cut:
    """Return the usual cut of a parameter. Weights are (out, in), with a dimension of experts before where one tensor
    has them all; or (in, out) where the shapes of bias or neighbour show that.
    """
    shape, first = shapes[name], int(_is_fused(name))
    is_expert = _expert_index(name) is not None
    is_weight, is_bias = len(shape) == first + 2, len(shape) == first + 1 and name.endswith("bias")
    modules = _modules(name)
    last, lasts = modules[-1], ".".join(modules[-2:])
    if not (is_weight or is_bias) or _is_router(modules, shapes):
        return _Cut(is_expert=is_expert)
    if last in EMBEDDINGS or (last in HEADS and _layer_of(name) is None):
        return _Cut("vocabulary")
    is_transposed = is_weight and _is_transposed(name, shapes, first)
    if {last, lasts} & COLUMNS:
        return _Cut("columns", first + is_transposed, is_expert)
    if {last, lasts} & ROWS:
        dim = first + 1 - is_transposed
        return _Cut("rows", dim, is_expert) if is_weight else _Cut(is_expert=is_expert, is_placed=True)
    return _Cut(is_expert=is_expert)


def _modules(name: str) -> list[str]:
    """Return the names of the modules on the way to a parameter. A tensor of all experts counts as a module."""
    *modules, last = name.split(".")
    if last in ("weight", "bias") and modules:
        return modules
    return [*modules, re.sub("_(weight|bias)$", "", last) if _is_fused(name) else last]


def _expert_index(name: str) -> int | None:
    """Return the position after "experts" in the name of a parameter of experts, else None."""
    parts = name.split(".")
    return next((index + 1 for index, part in enumerate(parts[:-1]) if part in EXPERTS), None)


def _is_fused(name: str) -> bool:
    """Return whether one tensor has a dimension for the experts of a layer, instead of a module for each."""
    index = _expert_index(name)
    return index is not None and not name.split(".")[index].isdigit()


def _is_router(modules: Sequence[str], shapes: Iterable[str]) -> bool:
    """Return whether a module chooses experts: a "gate" beside "experts"."""
    beside = tuple(".".join([*modules[:-1], name, ""]) for name in EXPERTS)
    return modules[-1] == "gate" and any(name.startswith(beside) for name in shapes)


def _is_transposed(name: str, shapes: dict[str, tuple[int, ...]], first: int) -> bool:
    """Return whether a weight is (in, out), as in transformers' Conv1D and in some fused experts."""
    rows, columns = shapes[name][first:]
    bias = shapes.get(re.sub("weight$", "bias", name) if name.endswith("weight") else f"{name}_bias")
    if bias is not None and rows != columns:
        return bias[-1] == columns
    prefix, _, last = name.rpartition(".")
    pair = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}.get(last)
    other = shapes.get(f"{prefix}.{pair}", ())[first:]
    if len(other) != 2:
        return False
    up, down = ((rows, columns), other) if last == "gate_up_proj" else (other, (rows, columns))
    return up[0] == down[1] and up[1] == 2 * down[0]  # (width, 2 hidden) and (hidden, width)


def _local(name: str, one: PlannedParameter, cut: _Cut, parallel: ModelParallel) -> PlannedParameter:
    """Return what the first rank, whose part is the largest, holds of a parameter."""
    shape, is_cut = list(one.shape), cut.how != WHOLE and parallel.tensor > 1
    if is_cut:
        shape[cut.dim] = _chunk(shape[cut.dim], parallel.tensor)
    is_dtensor = is_cut or (cut.is_placed and parallel.tensor > 1)
    one = replace(one, copies=1 if is_cut else parallel.tensor, is_dtensor=is_dtensor)
    if cut.is_expert and parallel.expert > 1:
        if _is_fused(name) and shape:
            shape[0] = _chunk(shape[0], parallel.expert)
        one = replace(one, group=_EXPERT_GROUP, expert_parallel=parallel.expert)
    return replace(one, shape=tuple(shape))


def _chunk(length: int, parts: int) -> int:
    """Return the length of the first and longest chunk, as torch cuts."""
    return -(-length // parts)


# Experts


def _expert_counts(parameters: Iterable[tuple[str, PlannedParameter]]) -> dict[str, int]:
    """Return the number of experts by the name of what holds them: a list of modules, or one tensor."""
    counts: dict[str, int] = {}
    for name, one in parameters:
        index = _expert_index(name)
        if index is None:
            continue
        parts = name.split(".")
        if _is_fused(name):
            counts[name] = one.shape[0] if one.shape else 0
        else:
            listed = ".".join(parts[:index])
            counts[listed] = max(counts.get(listed, 0), int(parts[index]) + 1)
    return counts


def _is_of_other_rank(name: str, counts: dict[str, int], groups: int) -> bool:
    """Return whether a parameter belongs to an expert, a module of a list, that the first rank does not hold."""
    index = _expert_index(name)
    if index is None or _is_fused(name):
        return False
    parts = name.split(".")
    return int(parts[index]) >= _chunk(counts[".".join(parts[:index])], groups)


# Pipeline stages


def _layer_of(name: str) -> str | None:
    """Return the layer of a parameter: the outermost numbered module, other than an expert; None outside of layers."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit() and not (index and parts[index - 1] in EXPERTS):
            return ".".join(parts[: index + 1])
    return None


def _layers(parameters: Iterable[tuple[str, PlannedParameter]]) -> list[str]:
    """Return the names of all layers, in order."""
    return list(dict.fromkeys(layer for name, _ in parameters if (layer := _layer_of(name)) is not None))


def _stages(parameters: Sequence[tuple[str, PlannedParameter]], count: int) -> list[list[tuple[str, PlannedParameter]]]:
    """Divide layers in order and as evenly as possible, the first stages getting one more. What is outside of layers
    is on the stage of the layer before it; embeddings are on the first stage, and heads on the last.
    """
    layers = _layers(parameters)
    least, more = divmod(len(layers), count)
    starts = [index * least + min(index, more) for index in range(count)]
    stage_of = {layer: max(s for s in range(count) if starts[s] <= index) for index, layer in enumerate(layers)}
    left = set(layers)
    stages: list[list[tuple[str, PlannedParameter]]] = [[] for _ in range(count)]
    current = 0
    for name, one in parameters:
        layer = _layer_of(name)
        if layer is not None:
            current = stage_of[layer]
            left.discard(layer)
            stages[current].append((name, one))
        elif count > 1 and _is_copied(name, one):
            for stage in (0, count - 1):
                stages[stage].append((name, replace(one, is_tied=False)))
        elif _modules(name)[-1] in EMBEDDINGS:
            stages[0].append((name, one))
        elif _modules(name)[-1] in HEADS or not left:
            stages[-1].append((name, one))
        else:
            stages[current].append((name, one))
    return stages


def _is_copied(name: str, one: PlannedParameter) -> bool:
    """Return whether a parameter outside of layers is embedding and head at once."""
    return one.is_tied and _layer_of(name) is None and _modules(name)[-1] in EMBEDDINGS | HEADS
