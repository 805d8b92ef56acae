# SPDX-License-Identifier: Apache-2.0
"""The plan's row of FSDP2 is what torch's ``fully_shard`` allocates, within 0.5%: the bytes of all live storages, on
the rank that allocates the most. Activations make the difference.

On CPUs with Gloo, on one token, so that activations are negligible. Gloo's reduce-scatter makes a copy of its input
that NCCL does not make; it is left out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardadam.cli.fsdp2 import fsdp2_bytes
from shardadam.cli.model_source import ModelSource
from shardadam.planner import PlannedParameter
from tests.ranks import on_ranks

WIDTH = 64


class LiveBytes(TorchDispatchMode):
    """Keeps the largest sum of bytes of all storages that an operation has seen and that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}
        self.peak = 0
        self._copies: set[int] = set()  # of Gloo

    def now(self) -> int:
        total = 0
        for key, reference in list(self._storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._storages[key]
                self._copies.discard(key)
            elif key not in self._copies:
                total += storage.nbytes()
        return total

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.now()  # forgets storages that are no more, whose keys may be used again
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor):
                local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
                storage = local.untyped_storage()
                if storage._cdata not in self._storages:
                    self._storages[storage._cdata] = StorageWeakRef(storage)
                    if function is torch.ops.aten.split.Tensor:  # nothing else splits what no operation has made
                        self._copies.add(storage._cdata)
        self.peak = max(self.peak, self.now())
        return out


class Layer(nn.Module):
    """Attention's shapes, and a dense MLP or fused experts that all see the token."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        for name in ("query", "key", "value", "out"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False))
        lead = (experts,) if experts else ()
        self.up = nn.Parameter(torch.randn(*lead, hidden, WIDTH) / 10)
        self.down = nn.Parameter(torch.randn(*lead, WIDTH, hidden) / 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.out(self.query(y) + self.key(y) * self.value(y))
        if self.up.dim() == 2:
            return x + self.down @ (self.up @ x).relu()
        hidden = torch.bmm(self.up, x.expand(len(self.up), WIDTH).unsqueeze(-1)).relu()
        return x + torch.bmm(self.down, hidden).squeeze(-1).sum(0)


class Decoder(nn.Module):
    def __init__(self, vocabulary: int, layers: int, hidden: int, experts: int, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(Layer(hidden, experts) for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, token: Tensor) -> Tensor:
        x: Tensor = self.embed(token)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


MODELS: dict[str, dict[str, Any]] = {
    "untied": {"vocabulary": 2000, "layers": 3, "hidden": 1024, "experts": 0, "tied": False},
    "tied": {"vocabulary": 4000, "layers": 4, "hidden": 256, "experts": 0, "tied": True},
    "deep": {"vocabulary": 100, "layers": 6, "hidden": 512, "experts": 0, "tied": False},
    "experts": {"vocabulary": 100, "layers": 3, "hidden": 128, "experts": 8, "tied": False},
    "uneven experts": {"vocabulary": 101, "layers": 2, "hidden": 256, "experts": 3, "tied": False},
}


def peak_of_second_step(sizes: dict[str, Any], in_bf16: bool) -> int:
    """Return the largest bytes of forward and backward on this rank, once the moments exist."""
    torch.manual_seed(0)
    model = Decoder(**sizes)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if in_bf16 else MixedPrecisionPolicy()
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters())
    token = torch.zeros((), dtype=torch.long)
    live = LiveBytes()
    for _ in range(2):
        with live:
            live.peak = 0
            model(token).float().logsumexp(-1).backward()
        optimizer.step()
        optimizer.zero_grad()
        with live:  # register what the optimizer has made
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.detach()
    return live.peak


CASES = [(2, name) for name in MODELS] + [(4, "tied"), (4, "uneven experts")]


@pytest.mark.parametrize("in_bf16", [False, True], ids=["fp32", "bf16 over fp32"])
@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_the_row_of_fsdp2_is_what_torch_allocates(ranks: int, name: str, in_bf16: bool) -> None:
    """Embedding and head were counted as a module that is freed after forward, and no unsharded gradients. The buffer
    of an all-gather in backward was not counted, which is larger than gradients where shards are padded.
    """
    measured = on_ranks(ranks, peak_of_second_step, MODELS[name], in_bf16)
    with torch.device("meta"):
        model = Decoder(**MODELS[name])
    if in_bf16:
        model.bfloat16()
    source = ModelSource(name, "function", "", tuple(PlannedParameter.of_model(model).items()))
    found = fsdp2_bytes(source, ranks, keeps_masters=in_bf16)
    planned = sum(getattr(found, kind) for kind in found.__slots__)
    assert planned == pytest.approx(max(measured), rel=0.005)
