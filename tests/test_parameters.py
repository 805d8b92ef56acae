# SPDX-License-Identifier: Apache-2.0
"""Parameters of every kind train as with torch: added, frozen, unfrozen, tied, of mixed dtypes and memory formats, over
subgroups, saved, copied and overwritten."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardadam import Precision, ShardedAdamW
from shardadam.update.reference import round_half_away
from tests.parity import (
    LR,
    SHAPES,
    Implementation,
    assert_close,
    assert_equals_torch,
    build_parameters,
    clones,
    quadratic,
    run_torch,
)
from tests.ranks import on_ranks, rank_and_size

STEPS = 10
WORLD_SIZES = [1, 2, 4]


def one_step(impl: Implementation, optimizer: Any, parameters: list[nn.Parameter], step: int) -> None:
    impl.backward(lambda rank: quadratic(parameters, rank, step))
    optimizer.step()
    optimizer.zero_grad()


# Added


def add_groups(impl: Implementation, when: str, named: bool, gradient_sync: str) -> list[Tensor]:
    parameters = build_parameters()
    late, later = build_parameters(SHAPES, seed=1), build_parameters([(40, 3), ()], seed=2)

    def give(chosen: list[nn.Parameter], prefix: str) -> list[Any]:
        return [(f"{prefix}.{i}", p) for i, p in enumerate(chosen)] if named else chosen

    optimizer = impl.adamw(give(parameters, "first"), sharded_options={"gradient_sync": gradient_sync})

    def add() -> None:
        optimizer.add_param_group({"params": give(late, "late"), "lr": LR / 2})
        optimizer.add_param_group({"params": give(later, "later"), "betas": (0.7, 0.8), "weight_decay": 0.2})

    if when == "before the first step":
        add()
    for step in range(STEPS):
        if step == 4 and when == "between steps":
            add()
        for micro in range(3):

            def loss(rank: int, seed: int = 100 * step + micro) -> Tensor:
                return quadratic([*parameters, *late, *later], rank, seed) / 3

            if step == 4 and when == "between forward and backward" and micro == 1:
                losses = {rank: loss(rank) for rank in impl.ranks}
                add()
                impl.backward(losses.__getitem__)
                continue
            if step == 4 and when == "in mid accumulation" and micro == 1:
                add()
            impl.backward(loss)
        if not impl.sharded and len(optimizer.param_groups) == 1:
            assert late[0].grad is not None
        optimizer.step()
        optimizer.zero_grad()
        for parameter in (*late, *later):  # not in the optimizer yet
            parameter.grad = None
    if named:
        assert optimizer.param_groups[1]["param_names"] == [f"late.{i}" for i in range(len(late))]
    return clones([*parameters, *late, *later])


WHEN = ["before the first step", "between steps", "in mid accumulation", "between forward and backward"]


@pytest.mark.sweep(6)
@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("when", WHEN)
def test_param_groups_may_be_added_at_any_time(when: str, world_size: int, gradient_sync: str) -> None:
    assert_equals_torch(add_groups, world_size, when, gradient_sync == "step", gradient_sync)


def add_between_clipping_and_step(impl: Implementation, how: str) -> list[Tensor]:
    parameters, late = build_parameters(), build_parameters([(5,), (6, 7)], seed=1)
    for parameter in late:
        parameter.requires_grad_(False)
    optimizer = impl.adamw([*parameters, *late] if how == "unfrozen" else parameters)
    for step in range(4):
        impl.backward(lambda rank, step=step: quadratic([*parameters, *late], rank, step))
        if impl.sharded:
            optimizer.clip_grad_norm_(0.5)
        else:
            nn.utils.clip_grad_norm_([*parameters, *late], 0.5)
        if step == 1:
            for parameter in late:
                parameter.requires_grad_(True)
            if how == "added":
                optimizer.add_param_group({"params": late})
        optimizer.step()
        optimizer.zero_grad()
    return clones([*parameters, *late])


def build_with_expanded() -> list[float]:
    rank, _ = rank_and_size()
    trained = nn.Parameter(torch.ones(3))
    expanded = nn.Parameter(torch.full((1, 4), 1.0 + rank).expand(5, 4), requires_grad=False)
    optimizer = ShardedAdamW([trained, expanded])
    optimizer.check_in_sync()
    return expanded.unique().tolist()


def test_frozen_parameters_that_repeat_the_same_memory_are_broadcast() -> None:
    """All ranks but rank 0 raised as they wrote an expanded tensor, and rank 0 hung in the broadcast."""
    assert on_ranks(2, build_with_expanded) == [[1.0], [1.0]]


@pytest.mark.parametrize("how", ["added", "unfrozen"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_may_be_added_between_clipping_and_step(world_size: int, how: str) -> None:
    assert_equals_torch(add_between_clipping_and_step, world_size, how)


# Frozen


def toggle(impl: Implementation, gradient_sync: str, frozen_first: bool) -> list[Tensor]:
    """Freeze and unfreeze each parameter at different steps; return all values after every step."""
    parameters = build_parameters()
    if frozen_first:
        for parameter in parameters[::2]:
            parameter.requires_grad_(False)
    half = len(parameters) // 2
    optimizer = impl.adamw(
        [{"params": parameters[:half]}, {"params": parameters[half:], "lr": LR / 2}],
        weight_decay=0.1,
        sharded_options={"gradient_sync": gradient_sync},
    )
    history: list[Tensor] = []
    for step in range(STEPS + 4):
        for index, parameter in enumerate(parameters):
            if frozen_first and index % 2 == 0 and step < index + 1:
                continue
            if step > 0:
                parameter.requires_grad_((step + index) % 5 != 0)
        one_step(impl, optimizer, parameters, step)
        history += clones(parameters)
    return history


@pytest.mark.sweep(4)
@pytest.mark.parametrize("frozen_first", [False, True])
@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_parameters_freeze_and_unfreeze_between_steps(world_size: int, gradient_sync: str, frozen_first: bool) -> None:
    assert_equals_torch(toggle, world_size, gradient_sync, frozen_first)


def unfreeze(gradient_sync: str) -> list[Any]:
    rank, _ = rank_and_size()
    trained, frozen = build_parameters([(129,), (7, 15)])
    frozen.requires_grad_(False)
    optimizer = ShardedAdamW([trained, frozen], lr=LR, gradient_sync=gradient_sync)  # type: ignore[arg-type]
    before = optimizer.memory().moments, frozen in optimizer.state
    for step in range(5):
        frozen.requires_grad_(step >= 3)
        quadratic([trained, frozen], rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [before, optimizer.memory().moments, [float(optimizer.state[p]["step"]) for p in (trained, frozen)]]


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_frozen_parameter_has_no_state_and_starts_at_step_one_when_unfrozen(
    world_size: int, gradient_sync: str
) -> None:
    for (moments_before, had_state), moments, steps in on_ranks(world_size, unfreeze, gradient_sync):
        assert not had_state
        assert moments_before == 2 * 4 * 256 // world_size
        assert moments == moments_before + 2 * 4 * (128 if world_size == 1 else 256 // world_size)
        assert steps == [5.0, 2.0]


def refreeze_beside_a_trained_one() -> list[bool]:
    """Return for each step whether the late layer's gradient was reduced before the early layer's was computed."""
    early, frozen, late = build_parameters([(200,), (100,), (100,)])
    optimizer = ShardedAdamW([early, frozen, late], bucket_mb=256 * 4 / 2**20)
    was_reduced: list[bool] = []
    early.register_hook(lambda gradient: was_reduced.append(late.grad is None))
    for step in range(4):
        frozen.requires_grad_(step % 2 == 0)
        (late * torch.tanh(early[:100]) * frozen).sum().backward()
        optimizer.step()
    return was_reduced


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_refrozen_parameter_does_not_delay_its_bucket(world_size: int) -> None:
    for was_reduced in on_ranks(world_size, refreeze_beside_a_trained_one):
        assert was_reduced == [True] * 4


def train_all_frozen(impl: Implementation) -> list[Tensor]:
    parameters = build_parameters()
    for parameter in parameters:
        parameter.requires_grad_(False)
    optimizer = impl.adamw(parameters)
    history: list[Tensor] = []
    for step in range(6):
        if step == 3:
            for parameter in parameters:
                parameter.requires_grad_(True)
        if step >= 3:
            impl.backward(lambda rank, step=step: quadratic(parameters, rank, step))
        optimizer.step()
        optimizer.zero_grad()
        history += clones(parameters)
    return history


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_with_all_parameters_frozen_steps_and_may_be_unfrozen(world_size: int) -> None:
    assert_equals_torch(train_all_frozen, world_size)


# Tied


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.body(self.embedding(tokens))))
        return output


def train_tied(impl: Implementation, gradient_sync: str) -> list[Tensor]:
    torch.manual_seed(0)
    model = TiedModel()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.sign())
    optimizer = impl.adamw(model.parameters(), sharded_options={"gradient_sync": gradient_sync})

    def loss(rank: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * step + rank)
        tokens, targets = (torch.randint(11, (32,), generator=generator) for _ in range(2))
        return nn.functional.cross_entropy(model(tokens), targets)

    for step in range(STEPS):
        impl.backward(lambda rank, step=step: loss(rank, step))
        optimizer.step()
        optimizer.zero_grad()
    assert model.head.weight is model.embedding.weight
    return clones(list(model.parameters()))


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_tied_weights_train_once_and_stay_tied(world_size: int, gradient_sync: str) -> None:
    assert_equals_torch(train_tied, world_size, gradient_sync)


# Mixed dtypes

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
MIXED_SHAPES = ((7, 15), (), (300,), (129,))


def build_mixed() -> list[nn.Parameter]:
    return [
        nn.Parameter(p.detach().to(dtype))
        for index, dtype in enumerate(DTYPES)
        for p in build_parameters(MIXED_SHAPES, seed=index)
    ]


def train_mixed(gradient_sync: str, bucket_mb: float) -> list[Tensor]:
    rank, _ = rank_and_size()
    parameters = build_mixed()
    optimizer = ShardedAdamW(
        parameters,
        lr=LR,
        weight_decay=0.1,
        bucket_mb=bucket_mb,
        gradient_sync=gradient_sync,  # type: ignore[arg-type]
    )
    for step in range(STEPS):
        quadratic(parameters, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return clones(parameters)


def train_masters(world_size: int) -> list[Tensor]:
    """Train exact masters with torch's fused AdamW; gradients are computed at the rounded masters.

    Every tensor is padded to 128 elements: the kernel's vector and scalar loops round differently.
    """
    parameters = build_mixed()
    exact = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in parameters]

    def padded(values: Tensor, dtype: torch.dtype) -> Tensor:
        flat = torch.zeros(-(-values.numel() // 128) * 128, dtype=dtype)
        flat[: values.numel()] = values.detach().flatten()
        return flat

    masters = [padded(p, dtype) for p, dtype in zip(parameters, exact, strict=True)]
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(m) for m in masters] for _ in range(2))
    steps = [torch.zeros(()) for _ in masters]
    for step in range(STEPS):
        losses = [quadratic(parameters, rank, step) for rank in range(world_size)]
        of_ranks = [torch.autograd.grad(loss, parameters) for loss in losses]
        gradients = [
            padded(sum(g.to(dtype) for g in of_parameter) / world_size, dtype)
            for dtype, *of_parameter in zip(exact, *of_ranks, strict=True)
        ]
        for count in steps:
            count += 1
        for dtype in set(exact):
            chosen = [i for i, d in enumerate(exact) if d == dtype]
            lists = [[tensors[i] for i in chosen] for tensors in (masters, gradients, exp_avgs, exp_avg_sqs)]
            torch._fused_adamw_(
                *lists,
                [],
                [steps[i] for i in chosen],
                lr=LR,
                beta1=0.9,
                beta2=0.999,
                weight_decay=0.1,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )
        for p, master in zip(parameters, masters, strict=True):
            values = master[: p.numel()].view(p.shape)
            p.data.copy_(round_half_away(values, p.dtype) if p.dtype in (torch.bfloat16, torch.float16) else values)
    return clones(parameters)


@pytest.mark.parametrize("bucket_mb", [0.001, 32])
@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_mixed_dtypes_equal_the_fused_kernel_on_exact_values_bit_for_bit(
    world_size: int, gradient_sync: str, bucket_mb: float
) -> None:
    expected = train_masters(world_size)
    for result in on_ranks(world_size, train_mixed, gradient_sync, bucket_mb):
        for a, b, start in zip(result, expected, build_mixed(), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), f"{a.dtype}: {(a.double() - b.double()).abs().max()}"
            assert not torch.equal(a, start)


# Memory formats


def build_strided() -> list[nn.Parameter]:
    conv, matrix, cube = build_parameters([(6, 5, 3, 3), (9, 20), (2, 3, 4, 5, 6)])
    return [
        nn.Parameter(conv.detach().to(memory_format=torch.channels_last)),
        nn.Parameter(matrix.detach().t()),
        nn.Parameter(cube.detach().to(memory_format=torch.channels_last_3d)),
        nn.Parameter(cube.detach()[:, :, 0].permute(2, 0, 3, 1).clone(memory_format=torch.preserve_format)),
        nn.Parameter(build_parameters([(4, 1, 3)])[0].detach().transpose(1, 2)),
    ]


def train_strided(impl: Implementation, gradient_sync: str) -> list[Tensor]:
    parameters = build_strided()
    before = [(id(p), p.stride(), p.shape, p.data_ptr() % 16) for p in parameters]
    optimizer = impl.adamw(parameters, sharded_options={"gradient_sync": gradient_sync})
    for step in range(STEPS):
        assert [(id(p), p.stride(), p.shape, p.data_ptr() % 16) for p in parameters] == before
        assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], parameters, strict=True))
        one_step(impl, optimizer, parameters, step)
    assert [(id(p), p.stride(), p.shape, p.data_ptr() % 16) for p in parameters] == before
    return clones(parameters)


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_construction_and_training_keep_strides_and_identity(world_size: int, gradient_sync: str) -> None:
    assert any(not p.is_contiguous() for p in build_strided())
    assert_equals_torch(train_strided, world_size, gradient_sync)


# Subgroups


def train_in_pairs(by_mesh: bool) -> list[Any]:
    """Ranks 0, 1 and ranks 2, 3 train one model each; then ranks 2, 3 train another."""
    rank, _ = rank_and_size()
    pairs = [[0, 1], [2, 3]]
    pair = rank // 2
    if by_mesh:
        group: Any = DeviceMesh("cpu", pairs, mesh_dim_names=("replica", "shard"))["shard"]
    else:
        groups = [dist.new_group(ranks) for ranks in pairs]
        group = groups[pair]
    parameters = build_parameters(seed=pair)
    optimizer = ShardedAdamW(parameters, lr=LR, process_group=group, bucket_mb=0.001)
    for step in range(STEPS + 3 * pair):  # the pairs take different numbers of steps
        quadratic(parameters, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    if not by_mesh:
        dist.barrier()
        for group in groups:
            if group != dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
    return [optimizer.memory().moments, clones(parameters)]


def expect_pair(pair: int) -> list[Tensor]:
    parameters = build_parameters(seed=pair)
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    for step in range(STEPS + 3 * pair):
        for rank in (2 * pair, 2 * pair + 1):
            (quadratic(parameters, rank, step) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return clones(parameters)


@pytest.mark.parametrize("by_mesh", [False, True])
def test_two_subgroups_train_two_models_independently(by_mesh: bool) -> None:
    results = on_ranks(4, train_in_pairs, by_mesh)
    for pair in range(2):
        assert_close([tensors for _, tensors in results[2 * pair : 2 * pair + 2]], expect_pair(pair))
    assert len({moments for moments, _ in results}) == 1


def train_a_subgroup_then_all() -> list[Tensor]:
    rank, _ = rank_and_size()
    group = dist.new_group([2, 3])
    parameters = build_parameters()
    if rank >= 2:
        optimizer = ShardedAdamW(parameters, lr=LR, process_group=group)
        quadratic(parameters, rank, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = build_parameters()
    optimizer = ShardedAdamW(parameters, lr=LR)
    for step in range(STEPS):
        quadratic(parameters, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    if rank >= 2:
        dist.destroy_process_group(group)
    return clones(parameters)


def train_plainly(impl: Implementation) -> list[Tensor]:
    parameters = build_parameters()
    optimizer = impl.adamw(parameters)
    for step in range(STEPS):
        one_step(impl, optimizer, parameters, step)
    return clones(parameters)


def test_an_optimizer_of_all_ranks_may_follow_one_of_a_subgroup() -> None:
    assert_close(on_ranks(4, train_a_subgroup_then_all), run_torch(train_plainly, 4))


def rebuild_on_a_subgroup() -> list[Tensor]:
    """Build a second optimizer while rank 0 has not garbage-collected the first."""
    rank, _ = rank_and_size()
    group = dist.new_group([0, 1])
    if rank > 1:
        return []
    first = ShardedAdamW(build_parameters(), lr=LR, process_group=group)
    kept = first if rank == 0 else None
    del first
    gc.collect()
    parameters = build_parameters()
    optimizer = ShardedAdamW(parameters, lr=LR, process_group=group)
    for step in range(STEPS):
        quadratic(parameters, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    del kept
    return clones(parameters)


def test_a_subgroups_optimizer_may_be_replaced_whenever_garbage_is_collected() -> None:
    """torch names a group that only its members build after the number of groups of the process. Ranks that had
    garbage-collected different groups waited for each other under different names.
    """
    results = on_ranks(4, rebuild_on_a_subgroup, deadline_s=25.0)
    assert_close(results[:2], run_torch(train_plainly, 2))


def train_on_a_mesh() -> list[Tensor]:
    rank, world_size = rank_and_size()
    parameters = build_parameters()
    mesh = DeviceMesh("cpu", list(range(world_size)))
    optimizer = ShardedAdamW(parameters, lr=LR, process_group=mesh)
    assert optimizer.memory().moments < 2 * 4 * (sum(p.numel() for p in parameters))
    for step in range(STEPS):
        quadratic(parameters, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return clones(parameters)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_mesh_of_one_dimension_is_a_process_group(world_size: int) -> None:
    assert_close(on_ranks(world_size, train_on_a_mesh), run_torch(train_plainly, world_size))


def test_a_single_process_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    assert_equals_torch(train_plainly, 1)


# Broadcast from rank 0


class Module(nn.Module):
    """Parameters and buffers of every kind, with different values on each rank."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.trained = nn.Parameter(random(5, 7))
        self.trained_scalar = nn.Parameter(random().bfloat16())
        self.frozen = nn.Parameter(random(9, 4).t(), requires_grad=False)
        self.frozen_half = nn.Parameter(random(33).half(), requires_grad=False)
        self.frozen_ints = nn.Parameter((random(6) * 50).to(torch.int8), requires_grad=False)
        self.gapped = nn.Parameter(random(4, 6)[:, ::2], requires_grad=False)
        self.not_given = nn.Parameter(random(130))
        self.not_given_frozen = nn.Parameter(random(3), requires_grad=False)
        for name, buffer in {
            "count": (random() * 1000).long(),
            "mask": random(7) > 0,
            "running": random(4, 5, 2, 2).to(memory_format=torch.channels_last),
            "empty": random(0),
            "complex": torch.complex(random(3), random(3)),
            "gapped_buffer": random(8)[::2],
        }.items():
            self.register_buffer(name, buffer)


NOT_GIVEN = {"not_given", "not_given_frozen"}


def build_and_sync() -> dict[str, Any]:
    rank, _ = rank_and_size()
    module = Module(seed=rank)
    given = [(name, p) for name, p in module.named_parameters() if name not in NOT_GIVEN]
    optimizer = ShardedAdamW(given)
    built = {name: t.clone() for name, t in module.state_dict().items()}
    identities = {name: id(t) for name, t in [*module.named_parameters(), *module.named_buffers()]}
    optimizer.sync_module(module)
    return {
        "own": {name: t.clone() for name, t in Module(seed=rank).state_dict().items()},
        "built": built,
        "synced": {name: t.clone() for name, t in module.state_dict().items()},
        "same": {name: id(t) for name, t in [*module.named_parameters(), *module.named_buffers()]} == identities,
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_construction_and_sync_module_broadcast_rank_0s_values(world_size: int) -> None:
    results = on_ranks(world_size, build_and_sync)
    of_rank_0 = results[0]["own"]
    for rank, result in enumerate(results):
        assert result["same"]
        for name, value in of_rank_0.items():
            if not name.startswith(("trained", "frozen", "gapped")) or name == "gapped_buffer":
                assert torch.equal(result["built"][name], result["own"][name]), name
            else:
                assert torch.equal(result["built"][name], value), name
            assert torch.equal(result["synced"][name], value), name
            if rank > 0 and value.numel() > 1:
                assert not torch.equal(result["own"][name], value), f"{name} is a bad example"


# Saved, copied, overwritten


@contextmanager
def trained_model(dtype: torch.dtype = torch.float32) -> Iterator[tuple[nn.Module, ShardedAdamW]]:
    torch.manual_seed(0)
    model = nn.Sequential(TiedModel(), nn.Linear(100, 50), nn.BatchNorm1d(5)).to(dtype)
    optimizer = ShardedAdamW(model.parameters(), lr=LR)
    for step in range(2):
        quadratic(list(model.parameters()), 0, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    yield model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_saved_tensor_holds_only_its_own_bytes(dtype: torch.dtype) -> None:
    with trained_model(dtype) as (model, _):
        for name, tensor in model.state_dict().items():
            assert tensor.storage_offset() == 0
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        for name, parameter in model.named_parameters():
            alone = io.BytesIO()
            torch.save(parameter, alone)
            assert alone.tell() < parameter.nbytes + 2000, name
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert list(loaded) == list(model.state_dict())
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
        tied = [loaded[name].untyped_storage().data_ptr() for name in ("0.embedding.weight", "0.head.weight")]
        assert tied[0] == tied[1]


def test_adjacent_parameters_have_separate_storages() -> None:
    """safetensors refuses tensors that share a storage, and accelerate ties them."""
    with trained_model() as (model, _):
        storages = [p.untyped_storage() for p in model.parameters()]
        stretches = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages)
        assert len({s.data_ptr() for s in storages}) == len(storages)
        assert all(a[1] <= b[0] for a, b in pairwise(stretches))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deep_copy_of_the_model_is_independent(dtype: torch.dtype) -> None:
    with trained_model(dtype) as (model, optimizer):
        copied = copy.deepcopy(model)
        ours, theirs = list(model.parameters()), list(copied.parameters())
        kept = clones(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        quadratic(ours, 0, 5).backward()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(theirs, kept, strict=True))
        moved = clones(ours)
        assert not any(torch.equal(a, b) for a, b in zip(moved, kept, strict=True))
        quadratic(theirs, 0, 6).backward()
        assert all(p.grad is not None for p in theirs), "the copy's gradients went into the optimizer"
        optimizer.zero_grad()
        ShardedAdamW(theirs, lr=LR).step()
        assert all(torch.equal(a, b) for a, b in zip(ours, moved, strict=True))


def overwrite(impl: Implementation, how: str) -> list[Tensor]:
    parameters = build_parameters()
    optimizer = impl.adamw(parameters)
    model = nn.ParameterList(parameters)
    new = nn.ParameterList(build_parameters(seed=7)).state_dict()
    for step in range(8):
        if step in (0, 4):
            if how == "load_state_dict":
                model.load_state_dict(new)
            elif how == "data":
                for parameter, value in zip(parameters, new.values(), strict=True):
                    parameter.data = value.clone()
            elif how == "zeros":
                with torch.no_grad():
                    parameters[4][::2].zero_()
        one_step(impl, optimizer, parameters, step)
    return clones(parameters)


@pytest.mark.parametrize("how", ["load_state_dict", "data"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_values_written_to_parameters_from_outside_are_trained_on(world_size: int, how: str) -> None:
    assert_equals_torch(overwrite, world_size, how)


def overwrite_low_precision(master: str) -> list[Tensor]:
    """Overwrite half of the elements, then take a step with lr 0, which must change nothing."""
    rank, _ = rank_and_size()
    parameters = build_mixed()
    precision = Precision(master=master)  # type: ignore[arg-type]
    optimizer = ShardedAdamW(parameters, lr=LR, weight_decay=0.0, precision=precision)
    for step in range(3):
        quadratic(parameters, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for parameter in parameters:
            parameter.view(-1)[::2] = -3.0
    masters = {i: optimizer.full_state(p).get("master") for i, p in enumerate(parameters)}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    written = clones(parameters)
    quadratic(parameters, rank, 3).backward()
    optimizer.step()
    kept = all(torch.equal(p, w) for p, w in zip(parameters, written, strict=True))
    result = [torch.tensor(kept)]
    for i, p in enumerate(parameters):
        before = masters[i]
        if before is not None:
            after = optimizer.full_state(p)["master"].view(-1)
            result += [after[::2], after[1::2], before.view(-1)[1::2]]
    return result


@pytest.mark.parametrize("master", ["fp32", "split"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_writes_to_low_precision_parameters_reach_only_their_elements_of_the_master(
    world_size: int, master: str
) -> None:
    within = {"fp32": 0.0, "split": 2.0**-7}[master]  # half a unit of bfloat16 at 3
    for kept, *masters in on_ranks(world_size, overwrite_low_precision, master):
        assert kept
        assert len(masters) == 3 * 2 * len(MIXED_SHAPES)
        for written, others, before in zip(masters[::3], masters[1::3], masters[2::3], strict=True):
            assert ((written + 3.0).abs() <= within).all()
            assert torch.equal(others, before)
