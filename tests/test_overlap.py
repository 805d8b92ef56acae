# SPDX-License-Identifier: Apache-2.0
"""All-gathers that overlap the next forward change no result: every reader of parameters waits for what it reads."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardadam
from shardadam import Precision, ShardedAdamW
from shardadam.transport import Transport, connect
from tests.adversarial import AdversarialTransport
from tests.on_cuda import nccl_of_one
from tests.ranks import on_ranks, rank_and_size

TRANSPORTS: dict[str, Callable[[], Transport]] = {
    "collective": lambda: connect(None, kind="collective"),
    "nccl": nccl_of_one,
    "shared memory": lambda: connect(None, kind="shared_memory"),
    "adversarial": lambda: AdversarialTransport(connect(None, kind="collective")),
    "adversarial, shared memory": lambda: AdversarialTransport(connect(None, kind="shared_memory")),
}
BUCKET_MB = 0.004


class Net(nn.Module):
    """Modules in an order that changes from step to step; some are skipped, called twice, tied, or used without being
    called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 24)) for _ in range(4))
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)  # uses out_proj.weight without calling out_proj
        self.silent = nn.Linear(24, 24)
        self.scale = nn.Parameter(torch.ones(24))

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        x = self.embedding(tokens)
        order = list(itertools.permutations(range(4)))[step % 24]
        for index in order[: 3 + step % 2]:
            x = x + self.blocks[index](x)
        x = self.blocks[0](x) + self.attention(x, x, x, need_weights=False)[0]
        x = F.linear(x, self.silent.weight, self.silent.bias) * self.scale
        return F.linear(x, self.embedding.weight)


def train(
    transport: str,
    gradient_sync: str,
    dtype: torch.dtype,
    overlap: bool,
    compiled: bool = False,
    steps: int = 12,
    device: str = "cpu",
) -> dict[str, Any]:
    rank, _ = rank_and_size()
    torch.manual_seed(0)
    model = Net().to(device, dtype)
    optimizer = ShardedAdamW(
        model.named_parameters(),
        lr=1e-2,
        bucket_mb=BUCKET_MB,
        gradient_sync=gradient_sync,  # type: ignore[arg-type]
        transport=TRANSPORTS[transport](),
        precision=Precision(),
    )
    if overlap:
        optimizer.overlap_gather(model)
    called: Any = torch.compile(model, backend="eager") if compiled else model
    losses, pending = [], []
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + rank)
        tokens = torch.randint(40, (2, 7), generator=generator).to(device)
        if step == 7:  # another forward on one rank only
            with torch.no_grad():
                if rank == 0:
                    model.blocks[1](torch.ones(1, 24, dtype=dtype, device=device))
        logits = called(tokens[:, :-1], step)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        pending.append(len(optimizer._engine.gatherer._pending))
        optimizer.zero_grad()
        losses.append(loss.detach())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [optimizer.full_state(p)["exp_avg_sq"] for p in model.parameters()]
    return {"tensors": [whole.cpu() for whole in (*losses, *state.values(), *moments)], "pending": pending}


@pytest.mark.sweep(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
@pytest.mark.parametrize("transport", [name for name in TRANSPORTS if name != "nccl"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_overlap_changes_no_bit(world_size: int, transport: str, gradient_sync: str, dtype: torch.dtype) -> None:
    without = on_ranks(world_size, train, transport, gradient_sync, dtype, False)
    overlapped = on_ranks(world_size, train, transport, gradient_sync, dtype, True)
    for one, other in zip(without, overlapped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one["tensors"], other["tensors"], strict=True))
        assert max(one["pending"]) == 0
        assert min(other["pending"]) > 5


def test_hooks_registered_before_compiling_still_run() -> None:
    eager = on_ranks(2, train, "adversarial", "backward", torch.float32, False, False, 4)
    compiled = on_ranks(2, train, "adversarial", "backward", torch.float32, True, True, 4)
    for one, other in zip(eager, compiled, strict=True):
        assert min(other["pending"]) > 5
        for a, b in zip(one["tensors"], other["tensors"], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compile_", [torch.compile, lambda model: model.compile() or model])
def test_an_already_compiled_model_is_refused(compile_: Callable[[nn.Module], Any]) -> None:
    model = Net()
    optimizer = ShardedAdamW(model.named_parameters())
    compiled = compile_(model)
    with pytest.raises(RuntimeError, match=r"Call overlap_gather before torch\.compile"):
        optimizer.overlap_gather(compiled)


def test_a_model_without_the_optimizers_parameters_is_refused() -> None:
    optimizer = ShardedAdamW(Net().named_parameters())
    with pytest.raises(ValueError, match="none of the optimizer's parameters"):
        optimizer.overlap_gather(Net())


def use_a_parameter_past_the_hooks() -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    transport = AdversarialTransport(connect(None, kind="collective"))
    optimizer = ShardedAdamW(model.named_parameters(), bucket_mb=1e-5, transport=transport)
    optimizer.overlap_gather(model)
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    try:
        F.linear(torch.ones(1, 4), model[1].weight).sum().backward()
    except RuntimeError as error:
        optimizer.synchronize()
        return str(error)
    return "no error"


def test_a_parameter_used_before_its_all_gather_is_named_in_backward() -> None:
    for message in on_ranks(2, use_a_parameter_past_the_hooks):
        assert "Parameter '1.weight' has been used before its all-gather was over" in message
        assert "optimizer.synchronize()" in message


def read_everything_after_a_step(directory: Path) -> list[bool]:
    """Return for each way to read parameters whether it waits for the pending all-gathers of the last step."""
    rank, _ = rank_and_size()
    torch.manual_seed(0)
    model = Net()
    transport = AdversarialTransport(connect(None, kind="shared_memory"))
    optimizer = ShardedAdamW(model.named_parameters(), bucket_mb=BUCKET_MB, transport=transport)
    optimizer.overlap_gather(model)
    seen = []

    def step() -> None:
        tokens = torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(rank))
        model(tokens, 0).float().square().mean().backward()
        optimizer.step()
        assert optimizer._engine.gatherer.has_pending

    def whole(tensors: Any) -> bool:
        return all(bool(t.isfinite().all()) for t in tensors)

    step()
    step()
    seen.append(whole(model.state_dict().values()))
    step()
    seen.append(whole(model.blocks[2].state_dict().values()) and whole(model.state_dict().values()))
    step()
    with torch.no_grad():
        seen.append(whole([model(torch.zeros(1, 3, dtype=torch.int64), 1)]))
    step()
    optimizer.synchronize()
    seen.append(whole(model.parameters()))
    step()
    shardadam.save(directory, model=model, optimizer=optimizer, step=1)
    saved = [p.detach().clone() for p in model.parameters()]
    step()
    shardadam.load(directory, model=model, optimizer=optimizer)
    seen.append(all(torch.equal(a, b) for a, b in zip(saved, model.parameters(), strict=True)))
    step()
    kept = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    step()
    model.load_state_dict(kept)
    seen.append(all(bool((p == 0.5).all()) for p in model.parameters()))
    step()
    seen.append(whole(optimizer.full_state(p)["exp_avg"] for p in model.parameters()))
    step()
    optimizer.sync_module(model)
    seen.append(whole(model.parameters()))
    return seen


def test_every_way_to_read_parameters_waits_for_all_gathers(tmp_path: Path) -> None:
    for seen in on_ranks(2, read_everything_after_a_step, tmp_path):
        assert seen == [True] * 8


def test_copies_and_pickles_of_the_model_have_no_active_hooks() -> None:
    model = Net()
    optimizer = ShardedAdamW(model.named_parameters())
    optimizer.overlap_gather(model)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    expected = model(tokens, 0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(tokens, 0), expected)
        hooks = [hook for module in copied.modules() for hook in module._forward_pre_hooks.values()]
        assert all(hook._call.__name__ == "_nothing" for hook in hooks)


def test_the_model_works_after_its_optimizer_is_deleted() -> None:
    model = Net()
    optimizer = ShardedAdamW(model.named_parameters())
    optimizer.overlap_gather(model)
    del optimizer
    model(torch.zeros(1, 3, dtype=torch.int64), 0).sum().backward()
    model.state_dict()


# Reads between steps

READERS: dict[str, Callable[[nn.Module], Tensor]] = {
    "named_parameters": lambda model: torch.cat([p.detach().flatten() for _, p in model.named_parameters()]),
    "parameters_to_vector": lambda model: torch.nn.utils.parameters_to_vector(model.parameters()).detach(),
    "of a submodule": lambda model: torch.cat([p.detach().flatten() for p in model[2].parameters()]),
    "deepcopy": lambda model: torch.cat([p.detach().flatten() for p in copy.deepcopy(model).parameters()]),
    "pickle": lambda model: torch.cat([p.detach().flatten() for p in pickle.loads(pickle.dumps(model)).parameters()]),
    "state_dict": lambda model: torch.cat([p.flatten() for p in model.state_dict().values()]),
}


def read_between_steps(reader: str | None, overlap: bool) -> tuple[list[Tensor], bool]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    transport = AdversarialTransport(connect(None, kind="collective"))
    optimizer = ShardedAdamW(model.named_parameters(), lr=1e-2, bucket_mb=BUCKET_MB, transport=transport)
    if overlap:
        optimizer.overlap_gather(model)
    read, stayed_pending = [], True
    for step in range(4):
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(10 * step + rank_and_size()[0]))
        model(x).square().mean().backward()
        optimizer.step()
        model.zero_grad()  # must not wait
        stayed_pending &= optimizer._engine.gatherer.has_pending
        if reader is None:
            average.update_parameters(model)
            read += [p.detach().clone() for p in average.module.parameters()]
        else:
            read.append(READERS[reader](model).clone())
    optimizer.synchronize()
    return read, stayed_pending


@pytest.mark.parametrize("reader", [None, *READERS])
def test_reads_between_steps_wait(reader: str | None) -> None:
    plain = on_ranks(2, read_between_steps, reader, False)[0][0]
    for read, stayed_pending in on_ranks(2, read_between_steps, reader, True):
        assert stayed_pending
        for a, b in zip(read, plain, strict=True):
            assert torch.equal(a, b)
