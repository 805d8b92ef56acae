# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the compiled kernel gives the reference's bits, a step never waits for the device, and can be captured."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardadam import Precision, ShardedAdamW
from shardadam.update.shard import Counters, Shard
from tests import test_triton as interpreted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def moved(thing: Any, device: str) -> Any:
    """A Shard or Counters with its tensors on another device."""
    flats = {f.name: getattr(thing, f.name) for f in fields(thing)}
    return replace(thing, **{name: flat.to(device) for name, flat in flats.items() if isinstance(flat, Tensor)})


@interpreted.each_variant
def test_compiled_kernel_equals_reference(variant: interpreted.Variant) -> None:
    """Bit for bit, 0x7fffffff in a parameter's and its remainder's bits included, as the interpreter does."""
    from shardadam.update.triton import TritonUpdate

    random = torch.Generator().manual_seed(interpreted.VARIANTS.index(variant))
    truth, true_counters = interpreted.build_shard(variant, random), interpreted.build_counters()
    counters: Counters = moved(interpreted.clone_counters(true_counters), "cuda")
    update = TritonUpdate(counters, seed=interpreted.SEED)
    for step in interpreted.STEPS:
        truth.gradient.copy_(interpreted.awkward_values(truth.gradient.numel(), random))
        ours: Shard = moved(interpreted.clone(truth), "cuda")
        used = torch.ones(len(counters.steps), dtype=torch.bool)
        used[list(step.unused)] = False
        update.begin(
            found_inf=torch.zeros((), device="cuda"),
            used=used.cuda(),
            host_used=None,
            coefficient=None if step.coefficient is None else torch.tensor(step.coefficient, device="cuda"),
            hyperparameters=step.hyperparameters,
        )
        update.update_(ours, interpreted.ONLY_BUCKET)
        interpreted.step_reference(truth, true_counters, step)
        found = interpreted.differences(moved(ours, "cpu"), truth, moved(counters, "cpu"), true_counters)
        assert found == []
        interpreted.write_some(truth, random)


def build(moments: Any, lr: Any = 1e-2) -> tuple[nn.Module, ShardedAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).cuda().bfloat16()
    return model, ShardedAdamW(model.parameters(), lr=lr, max_grad_norm=1.0, precision=Precision(moments=moments))


@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
def test_a_step_does_not_wait_for_the_device(moments: str) -> None:
    model, optimizer = build(moments)
    batch = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    for step in range(3):
        model(batch).float().square().mean().backward()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # kernels are compiled in the first
        try:
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(optimizer.skipped_steps) == 0


@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
def test_a_captured_step_replays_as_steps(moments: str) -> None:
    """Forward, backward and step in one CUDA graph, with a learning rate that is changed between replays."""
    batch = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for captured in (False, True):
        lr = torch.tensor(1e-2, device="cuda")
        model, optimizer = build(moments, lr)

        def step(model: nn.Module = model, optimizer: ShardedAdamW = optimizer) -> None:
            model(batch).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        run = step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
            run = graph.replay
        for rate in (1e-2, 3e-3, 1e-3):
            lr.fill_(rate)
            run()
        torch.cuda.synchronize()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
