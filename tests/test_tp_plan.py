# SPDX-License-Identifier: Apache-2.0
"""Models of transformers, sharded by their own ``tp_plan`` and ``ep_plan``, train as the whole models do in one process
with torch.optim.AdamW.

Their plans make everything that the optimizer may meet: vocabulary-parallel embeddings whose gradients are replicated,
experts cut along a fused dimension (``_StridedShard``) or spread over the ranks, tied heads, plain norms and routers
beside DTensors, and gradients that a hook of transformers sums over the tensor-parallel ranks.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from shardadam import ShardedAdamW
from tests.ranks import on_ranks, rank_and_size

transformers = pytest.importorskip("transformers")
expert_parallel = pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers is too old")
from transformers.distributed import DistributedConfig  # noqa: E402
from transformers.distributed.tensor_parallel import apply_tensor_parallelism  # noqa: E402

STEPS, BATCH, LENGTH, VOCABULARY = 200, 4, 8, 31  # the vocabulary does not divide by 2
OPTIONS: dict[str, Any] = {"lr": 3e-3, "eps": 1e-6, "weight_decay": 0.1}
MAX_NORM = 1.0


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        losses, norms: of each step, over the whole batch and the whole model.
        parameters: the whole ones after the last step.
        placements: of the DTensors, by name.
    """

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]
    placements: dict[str, str]


def build(kind: str) -> nn.Module:
    """Return the same model on all ranks."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": "tied" in kind,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    if "mixtral" in kind:
        config = transformers.MixtralConfig(**options, num_local_experts=8, num_experts_per_tok=2)
        return transformers.MixtralForCausalLM(config)
    if "qwen3" in kind:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**options, head_dim=4))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))


def shard(model: nn.Module, tensor_mesh: DeviceMesh, *, spread_experts: bool) -> None:
    """Shard a whole model over a 1-D mesh, with its own plans. Local."""
    size = tensor_mesh.size()
    plans = model._resolve_parallel_plans(DistributedConfig(tp_size=size, ep_size=size if spread_experts else 1))
    if model.config.tie_word_embeddings:  # plans name both, and a module finds one of them only
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach())
    apply_tensor_parallelism(model, tensor_mesh, plans[0])
    if spread_experts:
        expert_parallel.apply_expert_parallelism(model, tensor_mesh, tensor_mesh, plans[1])
    model.tie_weights()


def batch_of(step: int) -> Tensor:
    """Sequences that count upwards in strides, which can be learned; (BATCH, LENGTH), int64."""
    generator = torch.Generator().manual_seed(step)
    starts, strides = torch.randint(VOCABULARY, (BATCH, 1), generator=generator), torch.tensor([[1], [2], [1], [3]])
    return (starts + strides * torch.arange(LENGTH)) % VOCABULARY


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train_whole(kind: str, steps: int = STEPS) -> Run:
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    losses, norms = [], []
    for step in range(steps):
        tokens = batch_of(step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Run(losses, norms, {name: whole(p) for name, p in model.named_parameters()}, {})


def train_sharded(kind: str, gradient_sync: str, spread_experts: bool, steps: int = STEPS, **options: Any) -> Run:
    """Train with tensor parallelism over 2 ranks and data parallelism over the others."""
    mesh = init_device_mesh("cpu", (rank_and_size()[1] // 2, 2), mesh_dim_names=("dp", "tp"))
    model = build(kind)
    shard(model, mesh["tp"], spread_experts=spread_experts)
    parameters = list(model.named_parameters())
    optimizer = ShardedAdamW(
        parameters, process_group=mesh["dp"], gradient_sync=gradient_sync, max_grad_norm=MAX_NORM, **OPTIONS, **options
    )
    return train_with(model, optimizer, mesh["dp"], steps)


def train_with(model: nn.Module, optimizer: Any, data_mesh: DeviceMesh, steps: int) -> Run:
    losses, norms = [], []
    for step in range(steps):
        tokens = batch_of(step).chunk(data_mesh.size())[data_mesh.get_local_rank()]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_(), group=data_mesh.get_group())
        losses.append(loss.item() / data_mesh.size())
        norms.append(optimizer.grad_norm.item())
    parameters = dict(model.named_parameters())
    placements = {name: repr(p.placements) for name, p in parameters.items() if isinstance(p, DTensor)}
    return Run(losses, norms, {name: whole(p) for name, p in parameters.items()}, placements)


def assert_equal_runs(sharded: list[Run], whole: Run) -> None:
    ...
