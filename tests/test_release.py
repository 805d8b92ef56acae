# SPDX-License-Identifier: Apache-2.0
"""``del optimizer`` frees its memory at once, as torch's does, without waiting for the cyclic garbage collector."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from shardadam import Precision, ShardedAdamW
from tests.ranks import on_ranks


def names_still_alive(gradient_sync: Any, transport: Any, moments: Any) -> list[str]:
    """Return the names of objects still alive after the last reference to the optimizer is dropped, with gc off."""
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5, bias=False))
    gc.collect()
    gc.disable()
    try:
        optimizer = ShardedAdamW(
            model.named_parameters(),
            gradient_sync=gradient_sync,
            max_grad_norm=1.0,
            bucket_mb=0.001,
            transport=transport,
            precision=Precision(moments=moments),
        )
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for _ in range(2):
            model(torch.ones(4, 30)).sum().backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        engine = optimizer._engine
        objects: dict[str, Any] = {"optimizer": optimizer, "engine": engine, "reducer": engine.reducer}
        objects |= {"transport": engine.transport, "gatherer": engine.gatherer}
        for number, arena in enumerate(engine.parameters.arenas):
            objects |= {f"{name} {number}": flat for name, flat in arena.state.items()}
            objects |= {f"parameters {number}": arena.parameters, f"gradient shard {number}": arena.gradient_shard}
        refs = {name: weakref.ref(obj) for name, obj in objects.items() if obj is not None}
        del engine, objects, arena, scheduler, optimizer
        return [name for name, ref in refs.items() if ref() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
@pytest.mark.parametrize("moments", ["fp32", "int8"])
@pytest.mark.parametrize(("world_size", "transport"), [(1, "auto"), (2, "collective"), (2, "shared_memory")])
def test_nothing_outlives_the_optimizer(gradient_sync: str, moments: str, world_size: int, transport: str) -> None:
    arguments = (gradient_sync, transport, moments)
    on_ranks(world_size, names_still_alive, *arguments)  # the first use imports modules, whose frames keep it alive
    assert on_ranks(world_size, names_still_alive, *arguments) == [[]] * world_size
