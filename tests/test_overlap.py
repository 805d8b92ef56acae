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
from torch.utils.checkpoint import checkpoint

import shardadam
from shardadam import Precision, ShardedAdamW
from shardadam.engine.overlap import find_blocks
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
        self.kept = [self.silent.weight, self.silent.bias]  # used past the module and its attributes
        self.scale = nn.Parameter(torch.ones(24))

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        x = self.embedding(tokens)
        order = list(itertools.permutations(range(4)))[step % 24]
        for index in order[: 3 + step % 2]:
            x = x + self.blocks[index](x)
        x = self.blocks[0](x) + self.attention(x, x, x, need_weights=False)[0]
        x = F.linear(x, *self.kept) * self.scale
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


COMPILED: dict[str, Callable[[nn.Module], Any]] = {
    "wrapped": torch.compile,
    "in place": lambda model: model.compile() or model,
    "a module that has blocks inside": lambda model: model.body.compile() or model,
    "a module that has blocks inside, wrapped": lambda model: (
        setattr(model, "body", torch.compile(model.body)) or model
    ),
}


@pytest.mark.parametrize("compile_", COMPILED.values(), ids=COMPILED)
def test_an_already_compiled_model_is_refused(compile_: Callable[[nn.Module], Any]) -> None:
    model = Transformer()
    optimizer = ShardedAdamW(model.named_parameters())
    compiled = compile_(model)
    with pytest.raises(RuntimeError, match=r"has been compiled.* Call overlap_gather before torch\.compile"):
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
    kept = model[1].weight
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    try:
        F.linear(torch.ones(1, 4), kept).sum().backward()
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
        assert all(type(module._parameters) is dict for module in copied.modules())


def test_the_model_works_after_its_optimizer_is_deleted() -> None:
    model = Net()
    optimizer = ShardedAdamW(model.named_parameters())
    optimizer.overlap_gather(model)
    del optimizer
    model(torch.zeros(1, 3, dtype=torch.int64), 0).sum().backward()
    model.state_dict()


# Blocks


class Layer(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.experts[0](h) * self.experts[1](h) + self.mlp(h)


class Body(nn.Module):
    def __init__(self, layers: nn.Module, width: int = 24) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(width))
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        for layer in self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers:
            x = layer(x)
        return x


class Transformer(nn.Module):
    def __init__(self, layers: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.body = Body(nn.ModuleList(Layer() for _ in range(4)) if layers is None else layers)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 40, bias=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.embedding(tokens)))) * self.scale


def numbered(*modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({str(index): module for index, module in enumerate(modules)})


AROUND = ["embedding", "body", "norm", "head"]
STRUCTURES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "layers in a list": (Transformer, [*AROUND, *(f"body.layers.{i}" for i in range(4))]),
    "one layer": (lambda: Transformer(nn.ModuleList([Layer()])), [*AROUND, "body.layers.0"]),
    "layers in a dict": (
        lambda: Transformer(numbered(Layer(), Layer())),
        [*AROUND, "body.layers.0", "body.layers.1"],
    ),
    "layers in a sequence": (
        lambda: Transformer(nn.Sequential(Layer(), Layer())),
        [*AROUND, "body.layers.0", "body.layers.1"],
    ),
    "all in a dict": (
        lambda: nn.Sequential(numbered(nn.Embedding(4, 24), nn.Embedding(5, 24), nn.ModuleList([Layer(), Layer()]))),
        ["0.0", "0.1", "0.2.0", "0.2.1"],
    ),
    "dicts of modules that are called one by one": (
        lambda: nn.Sequential(nn.ModuleList(numbered(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(2))),
        ["0.0.0", "0.0.1", "0.1.0", "0.1.1"],
    ),
    "stages of layers": (
        lambda: nn.ModuleList(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(Layer(), Layer())) for _ in range(2)),
        ["0", "1"],
    ),
    "a module of two unlike parts": (
        lambda: nn.Sequential(nn.Embedding(4, 24), Body(nn.ModuleList([Layer(), Layer()])), nn.Linear(24, 4)),
        ["0", "1", "1.layers.0", "1.layers.1", "2"],
    ),
    "no stacks": (lambda: Layer().norm, []),
}


@pytest.mark.parametrize(("make", "expected"), STRUCTURES.values(), ids=STRUCTURES)
def test_blocks_are_the_elements_of_the_outermost_stacks_and_what_is_beside(
    make: Callable[[], nn.Module], expected: list[str]
) -> None:
    model = make()
    blocks = find_blocks(model)
    assert sorted(name for name, module in model.named_modules() if module in blocks) == sorted(expected)


def pending_at_each_call(chosen: str | None, tied: bool) -> list[tuple[str, list[str]]]:
    """Return for each call of a block, and of the model, which parameters are still being gathered inside it."""
    torch.manual_seed(0)
    model = Transformer()
    if tied:
        model.head.weight = model.embedding.weight
    transport = AdversarialTransport(connect(None, kind="collective"))
    optimizer = ShardedAdamW(model.named_parameters(), bucket_mb=1e-5, transport=transport)
    optimizer.overlap_gather(model, None if chosen is None else [model.get_submodule(name) for name in chosen.split()])
    found: list[tuple[str, list[str]]] = []
    gatherer = optimizer._engine.gatherer
    params = optimizer._engine.parameters.params

    def look(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            late = [one.name for one in params if gatherer.is_any_pending(bucket.index for bucket in one.buckets)]
            found.append((name, late))

        return hook

    for name in ("", "embedding", "body", *(f"body.layers.{i}" for i in range(4)), "norm", "head"):
        model.get_submodule(name).register_forward_pre_hook(look(name))  # runs after the hook that waits
    tokens = torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(rank_and_size()[0]))
    for _ in range(2):
        found.clear()
        model(tokens).square().mean().backward()
        optimizer.step()
    optimizer.synchronize()
    return found


def pending_in(found: list[tuple[str, list[str]]], call: str, block: str) -> bool:
    return any(name.startswith(block) for name in dict(found)[call])


@pytest.mark.parametrize("tied", [False, True])
def test_each_block_waits_for_its_own_parameters_only(tied: bool) -> None:
    for found in on_ranks(2, pending_at_each_call, None, tied):
        assert len(found) == 9
        for call, late in found:
            assert not any(name.startswith(call + ".") for name in late) or call in ("", "body")
        assert "scale" not in dict(found)[""] and "body.position" not in dict(found)["body"]
        assert pending_in(found, "", "embedding") and pending_in(found, "", "body.position")
        assert pending_in(found, "body", "body.layers.0.experts.1")
        for index in range(3):
            assert pending_in(found, f"body.layers.{index}", f"body.layers.{index + 1}.")
        assert dict(found)["norm"] == ([] if tied else ["head.weight"])
        assert dict(found)["head"] == []


def test_the_model_waits_for_parameters_outside_of_chosen_blocks() -> None:
    for found in on_ranks(2, pending_at_each_call, "body.layers.1 body.layers.3", False):
        late = dict(found)[""]
        assert late and all(name.startswith(("body.layers.1.", "body.layers.3.")) for name in late)
        assert pending_in(found, "body.layers.1", "body.layers.3.")
        assert not pending_in(found, "body.layers.1", "body.layers.1.")


def test_blocks_that_are_not_inside_the_model_are_refused() -> None:
    model = Transformer()
    optimizer = ShardedAdamW(model.named_parameters())
    for wrong in (Layer(), model, model.scale):
        with pytest.raises(ValueError, match=r"blocks\[1\] is a \w+ that is not inside the model"):
            optimizer.overlap_gather(model, [model.head, wrong])


class Recomputed(Transformer):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.body.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(self.norm(x)) * self.scale


def compile_blocks(model: nn.Module, **options: Any) -> nn.Module:
    for layer in model.body.layers:
        layer.compile(**options)
    return model


def wrap_blocks(model: nn.Module, **options: Any) -> nn.Module:
    model.body.layers = nn.ModuleList(torch.compile(layer, **options) for layer in model.body.layers)
    return model


COMPILE: dict[str, Callable[..., Any]] = {"blocks": compile_blocks, "wrapped": wrap_blocks, "whole": torch.compile}


def train_compiled(how: str, when: str, overlap: bool) -> tuple[list[Tensor], list[int]]:
    """Return losses, and for each graph that was compiled how many matrix products it has."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Recomputed() if how == "recomputed" else Transformer()
    transport = AdversarialTransport(connect(None, kind="collective"))
    optimizer = ShardedAdamW(model.named_parameters(), lr=1e-2, bucket_mb=BUCKET_MB, transport=transport)
    products: list[int] = []
    tokens = torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(rank_and_size()[0]))

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        products.append(sum(node.target is F.linear for node in graph.graph.nodes))
        return graph.forward

    wait_for, traced = optimizer._engine.gatherer.wait_for, []

    def watched_wait_for(indices: Any) -> None:
        traced.append(torch.compiler.is_compiling())
        wait_for(indices)

    optimizer._engine.gatherer.wait_for = watched_wait_for  # type: ignore[method-assign]
    called: Any = model
    if when == "before" and overlap:
        optimizer.overlap_gather(model)
    if how in COMPILE:
        called = COMPILE[how](model, backend=backend, **({} if how == "whole" else {"fullgraph": True}))
    if when == "called":
        called(tokens)
    if when != "before" and overlap:
        optimizer.overlap_gather(model)
    losses = []
    for _ in range(3):
        loss = called(tokens).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert overlap == optimizer._engine.gatherer.has_pending
        losses.append(loss.detach())
    optimizer.synchronize()
    assert not any(traced), "compiled code waits"
    return losses, products


@pytest.mark.parametrize("when", ["before", "after", "called"])
@pytest.mark.parametrize("how", ["blocks", "wrapped"])
def test_compiled_blocks_have_no_break_and_wait(how: str, when: str) -> None:
    """``overlap_gather`` comes before the blocks are compiled, after, or after their first call."""
    plain = on_ranks(2, train_compiled, "eager", "before", False)
    for (losses, products), (expected, _) in zip(on_ranks(2, train_compiled, how, when, True), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
        assert products and set(products) == {4}  # all of a layer's


def test_a_compiled_model_breaks_its_graph_at_most_once_a_block() -> None:
    plain = on_ranks(2, train_compiled, "eager", "before", False)
    for (losses, products), (expected, _) in zip(
        on_ranks(2, train_compiled, "whole", "before", True), plain, strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
        assert 4 in products and len(products) <= len(find_blocks(Transformer())) + 1


def test_blocks_that_are_recomputed_in_backward_change_no_bit() -> None:
    plain = on_ranks(2, train_compiled, "recomputed", "before", False)
    overlapped = on_ranks(2, train_compiled, "recomputed", "before", True)
    for (losses, _), (expected, _) in zip(overlapped, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))


# Reads between steps

READERS: dict[str, Callable[[nn.Module], Tensor]] = {
    "named_parameters": lambda model: torch.cat([p.detach().flatten() for _, p in model.named_parameters()]),
    "parameters_to_vector": lambda model: torch.nn.utils.parameters_to_vector(model.parameters()).detach(),
    "of a submodule": lambda model: torch.cat([p.detach().flatten() for p in model[2].parameters()]),
    "deepcopy": lambda model: torch.cat([p.detach().flatten() for p in copy.deepcopy(model).parameters()]),
    "pickle": lambda model: torch.cat([p.detach().flatten() for p in pickle.loads(pickle.dumps(model)).parameters()]),
    "state_dict": lambda model: torch.cat([p.flatten() for p in model.state_dict().values()]),
    "attributes": lambda model: torch.cat(
        [p.detach().flatten() for layer in model[::2] for p in (layer.weight, layer.bias)]
    ),
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


def convert_after_a_step(convert: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 2))
    transport = AdversarialTransport(connect(None, kind="collective"))
    optimizer = ShardedAdamW(model.named_parameters(), bucket_mb=BUCKET_MB, transport=transport)
    optimizer.overlap_gather(model)
    for _ in range(2):  # the first step also broadcasts the order of buckets, behind its all-gathers
        model(torch.ones(1, 8)).square().mean().backward()
        optimizer.step()
    converted = [value.clone() for value in convert(model).state_dict().values()]
    optimizer.synchronize()
    return converted


def to_double(model: nn.Module) -> nn.Module:
    return model.double()


def test_a_converted_model_has_the_gathered_weights() -> None:
    """``model.to`` copies parameters to other memory, which no all-gather would fill later."""
    one, other = on_ranks(2, convert_after_a_step, to_double)
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(one, other, strict=True))
