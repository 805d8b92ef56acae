# SPDX-License-Identifier: Apache-2.0
"""``check_in_sync`` finds any changed bit of a replicated tensor, names it and the ranks, and changes nothing."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from shardadam import Precision, ShardedAdamW
from shardadam.checks.replicas import checksum
from tests.ranks import on_ranks, rank_and_size

FORMATS: dict[str, tuple[torch.dtype, Precision]] = {
    "fp32": (torch.float32, Precision()),
    "fp64": (torch.float64, Precision()),
    "fp32, int8": (torch.float32, Precision(moments="int8")),
    "bf16": (torch.bfloat16, Precision()),
    "bf16, fp32 master, bf16 moments": (torch.bfloat16, Precision(master="fp32", moments="bf16")),
    "bf16, none, int8": (torch.bfloat16, Precision(moments="int8", master="none")),
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(7, 3).requires_grad_(False)
        self.head = nn.Linear(5, 301)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3))).float().square().mean() * self.scale.float() + self.empty.sum()


def build(format: str, *, hybrid: bool = False, **options: Any) -> tuple[Net, ShardedAdamW]:
    dtype, precision = FORMATS[format]
    model = Net(dtype)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")) if hybrid else None
    named = model.named_parameters()
    return model, ShardedAdamW(named, lr=1e-2, bucket_mb=0.002, precision=precision, process_group=mesh, **options)


def train(model: Net, optimizer: ShardedAdamW, steps: int) -> None:
    rank, _ = rank_and_size()
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * step + rank)
        model(torch.randn(2, 3, 5, 5, generator=generator).to(model.scale.dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()


def flip(tensor: Tensor, element: int, bit: int) -> None:
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).view(BITS[tensor.element_size()])
    flat[element] ^= torch.tensor(1, dtype=flat.dtype) << bit


def error_message(optimizer: ShardedAdamW) -> str:
    try:
        optimizer.check_in_sync()
        return ""
    except (RuntimeError, ValueError) as error:
        return str(error)


# Equal ranks


def train_equal(format: str, gradient_sync: str, transport: str, overlap: bool, hybrid: bool) -> tuple[list[str], bool]:
    def run(check: bool) -> tuple[list[str], list[Tensor]]:
        options: dict[str, Any] = {"gradient_sync": gradient_sync, "transport": transport, "hybrid": hybrid}
        model, optimizer = build(format, **options)
        if overlap:
            optimizer.overlap_gather(model)
        messages = [error_message(optimizer)] if check else []
        for _ in range(3):
            train(model, optimizer, 1)
            versions = [p._version for p in model.parameters()]
            random_state = torch.get_rng_state()
            messages += [error_message(optimizer)] if check else []
            assert versions == [p._version for p in model.parameters()] or overlap
            assert torch.equal(random_state, torch.get_rng_state())
        optimizer.synchronize()
        return messages, [p.detach().clone() for p in model.parameters()]

    messages, checked = run(True)
    _, unchecked = run(False)
    return messages, all(torch.equal(a, b) for a, b in zip(checked, unchecked, strict=True))


@pytest.mark.parametrize(
    ("format", "gradient_sync", "transport", "overlap", "world_size", "hybrid"),
    [
        ("fp32", "backward", "auto", False, 1, False),
        ("fp32", "backward", "auto", False, 2, False),
        ("fp64", "step", "collective", False, 3, False),
        ("fp32, int8", "step", "auto", True, 2, False),
        ("bf16", "backward", "collective", True, 2, False),
        ("bf16, fp32 master, bf16 moments", "backward", "auto", False, 4, True),
        ("bf16, none, int8", "backward", "auto", False, 4, True),
    ],
)
def test_ranks_that_train_together_agree_and_checks_change_nothing(
    format: str, gradient_sync: str, transport: str, overlap: bool, world_size: int, hybrid: bool
) -> None:
    for messages, unchanged in on_ranks(world_size, train_equal, format, gradient_sync, transport, overlap, hybrid):
        assert messages == [""] * 4 and unchanged


# Ranks that differ


def flip_bits(format: str, seed: int, count: int) -> list[tuple[str, list[str]]]:
    """Flip one random bit at a time; return each message with the texts that it must contain."""
    rank, world_size = rank_and_size()
    model, optimizer = build(format)
    train(model, optimizer, 2)
    choose = random.Random(seed)
    named = [(name, p) for name, p in model.named_parameters() if p.numel()]
    found = []
    for turn in range(count):
        name, parameter = choose.choice(named)
        element = parameter.numel() - 1 if turn == 0 else choose.randrange(parameter.numel())
        victim, bit = choose.randrange(world_size), choose.randrange(8 * parameter.element_size() - 1)
        if rank == victim:
            flip(parameter, element, bit)
        expected = [f"parameter {name!r}", "Load the last checkpoint"]
        if world_size > 2:
            expected.append(f"rank {victim} differs from rank")
        else:
            expected += ["differs from rank", "which is right is not known"]
        found.append((error_message(optimizer), expected))
        if rank == victim:
            flip(parameter, element, bit)
        found.append((error_message(optimizer), []))
    return found


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_any_flipped_bit_of_a_parameter_is_found_and_named(format: str, world_size: int, seed: int) -> None:
    results = on_ranks(world_size, flip_bits, format, seed, 6)
    assert all(result == results[0] for result in results)
    for message, expected in results[0]:
        assert bool(message) == bool(expected) and all(text in message for text in expected), (message, expected)


def corrupt_state(kind: str, element: int) -> tuple[str, str]:
    model, optimizer = build("fp32, int8", hybrid=True)
    train(model, optimizer, 2)
    rank, _ = rank_and_size()
    if rank == 3:
        flip(optimizer.state[model.head.weight][kind], element, 3)
    other_model, without_replicas = build("fp32")
    train(other_model, without_replicas, 1)
    if rank == 3:
        flip(without_replicas.state[other_model.head.weight]["exp_avg"], 1, 3)
    return error_message(optimizer), error_message(without_replicas)


@pytest.mark.parametrize("kind", ["exp_avg_code", "exp_avg_sq_code", "exp_avg_scale"])
@pytest.mark.parametrize("element", [1, -1])
def test_a_replica_that_has_changed_is_found(kind: str, element: int) -> None:
    """Without a replica, no other rank holds the shard, and nothing is found."""
    shown = kind.removesuffix("_code")
    for message, alone in on_ranks(4, corrupt_state, kind, element):
        assert message.startswith(
            f"Ranks hold different values of {shown} of parameter 'head.weight': rank 3 differs from rank 1."
        )
        assert "which is right is not known" in message and alone == ""


def differ(what: str) -> str:
    model, optimizer = build("fp32")
    train(model, optimizer, 2)
    if rank_and_size()[0] == 1:
        if what == "lr":
            optimizer.param_groups[0]["lr"] = 0.5
        elif what == "step":
            optimizer.state[model.scale]["step"] += 1
        else:
            optimizer.skipped_steps += 1
    return error_message(optimizer)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("lr", "param group 0: lr 0.01 on ranks 0, 2, 0.5 on rank 1"),
        ("step", "the step of parameter 'scale': rank 1 differs from ranks 0, 2."),
        ("skipped_steps", "skipped_steps: rank 1 differs from ranks 0, 2."),
    ],
)
def test_counters_and_hyperparameters_that_differ_are_named(what: str, expected: str) -> None:
    for message in on_ranks(3, differ, what):
        assert expected in message


# The checksum


@pytest.mark.parametrize("numel", [1, 3, 8, 1 << 17, (1 << 18) + 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_the_checksum_sees_every_bit_and_every_place(dtype: torch.dtype, numel: int) -> None:
    torch.manual_seed(numel)
    tensor = torch.randint(0, 255, (numel * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    whole = checksum(tensor)
    assert checksum(tensor.clone()) == whole
    choose = random.Random(numel)
    for element in {0, numel - 1, *(choose.randrange(numel) for _ in range(20))}:
        bit = choose.randrange(8 * dtype.itemsize - 1)
        flip(tensor, element, bit)
        assert checksum(tensor) != whole
        flip(tensor, element, bit)
    if numel > 1:
        assert checksum(tensor[1:]) != checksum(tensor[:-1]) and checksum(tensor[:-1]) != whole
        swapped = tensor.flip(0)
        assert checksum(swapped) != whole


def test_the_checksum_sees_stretches_that_have_changed_places() -> None:
    torch.manual_seed(0)
    words = torch.randint(-(2**62), 2**62, (3, 1 << 17))
    assert len({checksum(words[list(order)]) for order in itertools.permutations(range(3))}) == 6


def flip_a_bit_of_a_large_parameter() -> str:
    parameter = nn.Parameter(torch.ones(700_000))
    optimizer = ShardedAdamW([("large", parameter)])
    if rank_and_size()[0] == 0:
        flip(parameter, 600_001, 3)
    return error_message(optimizer)


def test_a_flipped_bit_is_found_in_a_large_parameter() -> None:
    for message in on_ranks(3, flip_a_bit_of_a_large_parameter):
        assert "parameter 'large': rank 0 differs from ranks 1-2." in message
        assert "is not known" not in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_checksum_sees_signs_that_have_changed_in_pairs(dtype: torch.dtype) -> None:
    """The changes of two highest bits cancelled each other: a negated float64 parameter was not found."""
    values = torch.arange(1, 41).to(dtype)
    sums = {checksum(values), checksum(-values), checksum(torch.cat([values[:20], -values[20:]]))}
    for one in range(40):
        for other in range(one):
            negated = values.clone()
            negated[[one, other]] *= -1
            sums.add(checksum(negated))
    assert len(sums) == 3 + 40 * 39 // 2


def test_the_checksum_sees_a_word_and_its_complement() -> None:
    for value in (0, 5, -77, 2**40 + 3):
        words = torch.tensor([value, ~value])
        assert checksum(words[:1]) != checksum(words[1:].clone())


# Parameters that the user has changed


def change_parameters(what: str) -> str:
    model, optimizer = build("fp32")
    gaps = nn.Parameter(torch.ones(4, 6)[:, ::2], requires_grad=False)
    optimizer.add_param_group({"params": [("gaps", gaps)]})
    if rank_and_size()[0] == 1:
        if what == "gaps":
            gaps.data[3, 2] = 2.0
        elif what == "dtype":
            model.head.weight.data = model.head.weight.detach().double()
        elif what == "unfrozen":
            model.frozen.bias.requires_grad_(True)
        else:
            model.scale.data.view(torch.int32).fill_(0x7FC00001)
    elif what == "nan":
        model.scale.data.view(torch.int32).fill_(0x7FC00002)
    return error_message(optimizer)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("gaps", ["parameter 'gaps': rank 1 differs from ranks 0, 2."]),
        ("dtype", ["parameter 'head.weight': dtype", "torch.float64 on rank 1"]),
        ("unfrozen", ["parameter 'frozen.bias': requires_grad", "True on rank 1"]),
        ("nan", ["parameter 'scale': rank 1 differs from ranks 0, 2."]),
    ],
)
def test_parameters_that_the_user_has_changed_are_named_on_every_rank(what: str, expected: list[str]) -> None:
    for message in on_ranks(3, change_parameters, what):
        assert all(text in message for text in expected), message
