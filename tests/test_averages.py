# SPDX-License-Identifier: Apache-2.0
"""``ema_decay``: averages equal those of torch.optim.swa_utils over a float32 model that torch's AdamW trains, and
``averaged_parameters`` puts the training weights back bit for bit.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardadam
from shardadam import Precision, ShardedAdamW
from shardadam.update.reference import round_half_away
from tests.ranks import on_ranks, rank_and_size

LR, DECAY = 1e-2, 0.9
SHAPES = {"matrix": (40, 17), "image": (4, 3, 5, 2), "scalar": (), "empty": (0, 3), "seldom": (130,)}
STEPS = 6
SKIPPED = 2
"""The step at which a gradient is infinite on rank 0."""


class Net(nn.Module):
    """Parameters that span several buckets, one in channels_last, one empty, one that takes part in some steps."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            value = 1 + torch.rand(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(value.to(torch.bfloat16).to(dtype)))
        self.image.data = self.image.data.to(memory_format=torch.channels_last)

    def forward(self) -> Tensor:
        return sum((p.float().sum() for p in self.parameters()), torch.zeros(()))


def noise(name: str, step: int, rank: int) -> Tensor:
    """Return a gradient that is exact in bfloat16 and float16, and so is its sum over ranks."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + list(SHAPES).index(name))
    return torch.randint(-8, 9, SHAPES[name], generator=generator) / 8


def takes_part(name: str, step: int) -> bool:
    return name != "seldom" or step % 2 == 1


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float32
    sync: Any = "backward"
    precision: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = [str(value) for value in (*self.precision.values(), *self.options.values())]
        return "-".join([str(self.dtype).removeprefix("torch."), self.sync, *given])

    @property
    def skips(self) -> bool:
        """Whether a gradient that is not finite skips the whole step."""
        return self.options.get("update") != "backward"

    def build(self, **changed: Any) -> tuple[Net, ShardedAdamW]:
        model = Net(self.dtype)
        given = {
            "lr": LR,
            "ema_decay": DECAY,
            "bucket_mb": 0.001,
            "gradient_sync": self.sync,
            **self.options,
            **changed,
        }
        precision = Precision(reduce=torch.float32, **self.precision)
        return model, ShardedAdamW(model.named_parameters(), precision=precision, **given)

    def take_step(self, model: Net, optimizer: ShardedAdamW, step: int, *, skips: bool = True) -> None:
        rank, world_size = rank_and_size()
        loss = torch.zeros(())
        for name, p in model.named_parameters():
            if not takes_part(name, step):
                continue
            if self.sync == "external":
                gradient = torch.stack([noise(name, step, other) for other in range(world_size)]).mean(0)
            else:
                gradient = noise(name, step, rank)
            if skips and step == SKIPPED and rank == 0 and name == "matrix":
                gradient[3] = torch.inf
            if self.sync == "backward":
                loss = loss + (p.float() * gradient).sum()
            else:
                p.grad = gradient.to(p.dtype)
        if self.sync == "backward":
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def averages_of(model: nn.Module, optimizer: ShardedAdamW) -> list[Tensor]:
    return [optimizer.full_state(p)["average"] for p in model.parameters()]


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def states(model: nn.Module, optimizer: ShardedAdamW) -> list[Tensor]:
    return [tensor for p in model.parameters() for tensor in optimizer.full_state(p).values()]


def equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Within 1e-6 of the value, or of the learning rate where the value is smaller."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == torch.promote_types(b.dtype, torch.float32)
        assert bool(((a - b).abs() <= 1e-6 * b.abs().clamp(min=LR)).all()), (a - b).abs().max()


def torchs_averages(world_size: int, *, skips: bool = True) -> list[Tensor]:
    """Return the averages of a float32 model that torch's AdamW trains with the mean of all ranks' gradients."""
    model = Net(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for step in range(STEPS):
        if skips and step == SKIPPED:
            continue
        for name, p in model.named_parameters():
            gradients = torch.stack([noise(name, step, rank) for rank in range(world_size)])
            p.grad = gradients.mean(0) if takes_part(name, step) else None
        optimizer.step()
        averaged.update_parameters(model)
    return values(averaged.module)


# The averages

BF16 = torch.bfloat16
MASTERS = [("backward", "split"), ("step", "fp32")]
CASES = [
    Case(),
    Case(sync="step"),
    Case(sync="external"),
    Case(options={"transport": "collective"}),
    Case(sync="step", options={"transport": "collective"}),
    *(Case(dtype, sync, {"master": master}) for dtype in (BF16, torch.float16) for sync, master in MASTERS),
    Case(sync="external", options={"max_grad_norm": 1e9}),
    Case(options={"update": "backward"}),
    Case(BF16, options={"update": "backward", "transport": "collective"}),
]


def run(case: Case) -> tuple[list[Tensor], list[Tensor], bool, list[int]]:
    """Return the averages, the values within the context, whether the weights came back, and numbers of averages."""
    model, optimizer = case.build()
    for step in range(STEPS):
        case.take_step(model, optimizer, step, skips=case.skips)
    averages, before = averages_of(model, optimizer), [*values(model), *states(model, optimizer)]
    with optimizer.averaged_parameters():
        inside = values(model)
    counts = [int(optimizer.full_state(p)["n_averaged"]) for p in model.parameters()]
    return averages, inside, equal([*values(model), *states(model, optimizer)], before), counts


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_averages_equal_those_of_torch_over_exact_weights(case: Case, world_size: int) -> None:
    expected = torchs_averages(world_size, skips=case.skips)
    for averages, inside, is_restored, counts in on_ranks(world_size, run, case):
        assert_close(averages, expected)
        assert equal(inside, [a if case.dtype == torch.float32 else round_half_away(a, case.dtype) for a in averages])
        assert is_restored
        assert counts == [STEPS - case.skips] * len(SHAPES)


def test_averages_on_four_ranks() -> None:
    for averages, _, is_restored, _ in on_ranks(4, run, Case(BF16)):
        assert_close(averages, torchs_averages(4))
        assert is_restored


def test_averages_of_float64_parameters_are_float64() -> None:
    model = Net(torch.float64)
    twin = copy.deepcopy(model)
    optimizer = ShardedAdamW(model.parameters(), lr=LR, ema_decay=DECAY, bucket_mb=0.001)
    torchs = torch.optim.AdamW(twin.parameters(), lr=LR)
    averaged = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for step in range(4):
        for name in SHAPES:
            for one in (model, twin):
                one.get_parameter(name).grad = noise(name, step, 0).double()
        optimizer.step()
        torchs.step()
        averaged.update_parameters(twin)
    for a, b in zip(averages_of(model, optimizer), values(averaged.module), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("moments", ["bf16", "int8"])
@pytest.mark.parametrize("master", ["split", "none"])
def test_averages_of_every_format_are_those_of_its_own_weights(moments: str, master: str) -> None:
    case = Case(BF16, precision={"moments": moments, "master": master})
    model, optimizer = case.build()
    expected: list[Tensor] = []
    for step in range(4):
        case.take_step(model, optimizer, step, skips=False)
        states_ = [optimizer.full_state(p) for p in model.parameters()]
        weights = [s.get("master", p.detach().float()) for s, p in zip(states_, model.parameters(), strict=True)]
        expected = [a + (w - a) * (1 - DECAY) for a, w in zip(expected, weights, strict=True)] if step else weights
        assert_close(averages_of(model, optimizer), expected)


# Before the first step, later parameters, and states from elsewhere


def test_before_the_first_step_the_average_is_the_weight() -> None:
    model, optimizer = Case(BF16).build()
    assert equal(averages_of(model, optimizer), [v.float() for v in values(model)])
    with torch.no_grad():
        model.matrix.fill_(0.3)  # the model is loaded after the optimizer was built
    assert equal(averages_of(model, optimizer), [v.float() for v in values(model)])
    before = values(model)
    with optimizer.averaged_parameters():
        assert equal(values(model), before)


def grow() -> tuple[list[Tensor], list[int], list[Tensor], list[Tensor]]:
    model = Net(BF16)
    model.image.requires_grad_(False)
    late = nn.Parameter(torch.full((7,), 1.5))
    optimizer = ShardedAdamW(
        [p for name, p in model.named_parameters() if name != "scalar"], lr=LR, ema_decay=DECAY, bucket_mb=0.001
    )

    def step(parameters: Sequence[Tensor]) -> None:
        sum((p.float().sum() for p in parameters), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()

    step([model.matrix])
    model.image.requires_grad_(True)
    with torch.no_grad():
        model.image.fill_(0.75)
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    first = [optimizer.full_state(p)["average"] for p in (model.image, late)]
    step([model.matrix, late])
    step([model.matrix, model.image])
    found = [optimizer.full_state(p) for p in (model.matrix, model.image, late)]
    with optimizer.averaged_parameters():
        inside = [p.detach().clone() for p in (model.image, late)]
    return first, [int(s["n_averaged"]) for s in found], [s["average"] for s in found[1:]], inside


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_that_join_later_start_with_their_present_value(world_size: int) -> None:
    for first, counts, averages, inside in on_ranks(world_size, grow):
        assert bool((first[0] == 0.75).all()) and bool((first[1] == 1.5).all())
        assert counts == [3, 2, 2]
        # One step of Adam: by lr against the gradient, and decay; the other step does not have the parameter.
        weight = 0.75 * (1 - LR * 1e-2) - LR
        torch.testing.assert_close(averages[0], torch.full_like(averages[0], 0.75 + (weight - 0.75) * (1 - DECAY)))
        torch.testing.assert_close(averages[1], torch.full_like(averages[1], 1.5 * (1 - 0.5 * 1e-2) - 0.5))
        assert torch.equal(inside[0], round_half_away(averages[0], BF16)) and torch.equal(inside[1], averages[1])


def load_torchs(dtype: torch.dtype) -> bool:
    """Load the state of torch's AdamW, and an own one; return whether the averages are right."""
    case = Case(dtype)
    model, optimizer = case.build()
    twin = copy.deepcopy(model).float()
    torchs = torch.optim.AdamW(twin.parameters(), lr=LR)
    for p in twin.parameters():
        p.grad = torch.ones_like(p)
    torchs.step()
    case.take_step(model, optimizer, 1)
    case.take_step(model, optimizer, 3)
    mine, trained = optimizer.full_state_dict(all_ranks=True), averages_of(model, optimizer)
    weights = [s.get("master", p.detach()) for p in model.parameters() for s in (optimizer.full_state(p),)]
    is_different = not equal(trained, weights)
    optimizer.load_state_dict(torchs.state_dict())
    exact = [s.get("master", p.detach()) for p in model.parameters() for s in (optimizer.full_state(p),)]
    is_weight = equal(averages_of(model, optimizer), exact)
    are_none = all(int(optimizer.full_state(p)["n_averaged"]) == 0 for p in model.parameters())
    optimizer.load_state_dict(mine)
    again, counts = (
        averages_of(model, optimizer),
        [int(optimizer.full_state(p)["n_averaged"]) for p in model.parameters()],
    )
    torchs.load_state_dict(mine)  # keeps what it does not know
    optimizer.load_state_dict(torchs.state_dict())
    kept = equal(averages_of(model, optimizer), trained)
    optimizer.state[model.matrix].clear()
    cleared = optimizer.full_state(model.matrix)
    starts_anew = int(cleared["n_averaged"]) == 0 and torch.equal(
        cleared["average"], cleared.get("master", model.matrix.detach())
    )
    return (
        is_different and is_weight and are_none and equal(again, trained) and counts == [2] * 5 and kept and starts_anew
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_states_of_torchs_adamw_and_own_ones_are_loaded(dtype: torch.dtype, world_size: int) -> None:
    assert on_ranks(world_size, load_torchs, dtype) == [True] * world_size


def test_an_assigned_average_is_kept() -> None:
    model, optimizer = Case().build()
    optimizer.state[model.matrix]["average"] = torch.zeros(SHAPES["matrix"])
    assert not optimizer.full_state(model.matrix)["average"].any()
    Case().take_step(model, optimizer, 1)
    torch.testing.assert_close(optimizer.full_state(model.matrix)["average"], model.matrix.detach() * (1 - DECAY))
    assert torch.equal(optimizer.full_state(model.image)["average"], model.image.detach())


# Within averaged_parameters


@contextmanager
def nothing() -> Iterator[None]:
    yield


def train(case: Case, averages: bool, overlaps: bool, mesh: tuple[int, ...]) -> list[Tensor]:
    options: dict[str, Any] = {}
    if len(mesh) > 1:
        options["process_group"] = init_device_mesh("cpu", mesh)
    model, optimizer = case.build(**options)
    if overlaps:
        optimizer.overlap_gather(model)
    for step in range(4):
        model()
        case.take_step(model, optimizer, step)
        with optimizer.averaged_parameters() if averages else nothing():
            model()
    optimizer.check_in_sync()
    return [*values(model), *states(model, optimizer)]


TRAINED = [
    (Case(), False, ()),
    (Case(BF16), True, ()),
    (Case(BF16, "step", {"master": "fp32"}), True, ()),
    (Case(BF16, precision={"master": "none", "moments": "int8"}), False, ()),
    (Case(BF16, "external"), True, ()),
    (Case(BF16, options={"transport": "collective"}), True, ()),
    (Case(BF16, options={"update": "backward"}), True, ()),
]


@pytest.mark.parametrize(("case", "overlaps", "mesh"), TRAINED, ids=str)
def test_training_goes_on_as_if_there_had_been_no_averages_in_the_model(
    case: Case, overlaps: bool, mesh: tuple[int, ...]
) -> None:
    swapped, plain = (on_ranks(2, train, case, averages, overlaps, mesh) for averages in (True, False))
    assert equal(swapped[0], plain[0]) and equal(swapped[1], plain[1]) and equal(swapped[0], swapped[1])


def test_averages_with_hybrid_sharding() -> None:
    case = Case(BF16, options={"transport": "collective"})
    swapped, plain = (on_ranks(4, train, case, averages, True, (2, 2)) for averages in (True, False))
    assert all(equal(one, plain[0]) for one in swapped)


def leave_by_errors() -> list[bool]:
    rank, _ = rank_and_size()
    model, optimizer = Case(BF16).build()
    Case().take_step(model, optimizer, 1)
    Case().take_step(model, optimizer, 3)
    before, found = [*values(model), *states(model, optimizer)], []
    for error in (ValueError, KeyboardInterrupt):
        try:
            with optimizer.averaged_parameters():
                found.append(not equal(values(model), before[: len(SHAPES)]))
                if rank == 0:
                    raise error("in the body")
        except error:
            found.append(rank == 0)
        found.append(equal([*values(model), *states(model, optimizer)], before))
    Case().take_step(model, optimizer, 5)
    return found if rank == 0 else [*found[:1], True, *found[1:3], True, *found[3:]]


def test_an_error_in_the_body_on_one_rank_leaves_the_training_weights() -> None:
    assert on_ranks(2, leave_by_errors) == [[True] * 6] * 2


REFUSED: dict[str, Callable[[Net, ShardedAdamW, str], Any]] = {
    "step()": lambda model, optimizer, _: optimizer.step(),
    "load_state_dict()": lambda model, optimizer, _: optimizer.load_state_dict({"state": {}, "param_groups": []}),
    "state_dict()": lambda model, optimizer, _: optimizer.state_dict(),
    "full_state_dict()": lambda model, optimizer, _: optimizer.full_state_dict(),
    "consolidate_state_dict()": lambda model, optimizer, _: optimizer.consolidate_state_dict(),
    "full_state()": lambda model, optimizer, _: optimizer.full_state(model.matrix),
    "add_param_group()": lambda model, optimizer, _: optimizer.add_param_group(
        {"params": [nn.Parameter(torch.ones(3))]}
    ),
    "averaged_parameters()": lambda model, optimizer, _: optimizer.averaged_parameters().__enter__(),
    "save": lambda model, optimizer, path: shardadam.save(path, model=model, optimizer=optimizer, step=2),
    "load": lambda model, optimizer, path: shardadam.load(path, model=model, optimizer=optimizer),
}


def try_all(path: str) -> tuple[list[str], bool]:
    model, optimizer = Case(BF16).build()
    Case().take_step(model, optimizer, 1)
    Case().take_step(model, optimizer, 3)
    shardadam.save(path, model=model, optimizer=optimizer, step=1)
    before, messages = [*values(model), *states(model, optimizer)], []
    with optimizer.averaged_parameters():
        inside = values(model)
        for call, attempt in REFUSED.items():
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            try:
                attempt(model, optimizer, path)
                messages.append(f"{call} was not refused")
            except RuntimeError as error:
                messages.append(str(error))
            assert equal(values(model), inside)
        model.zero_grad()
    is_restored = equal([*values(model), *states(model, optimizer)], before) and len(optimizer.param_groups) == 1
    Case().take_step(model, optimizer, 5)
    return messages, is_restored


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_needs_the_training_weights_is_refused_by_name(world_size: int, tmp_path: Any) -> None:
    for messages, is_restored in on_ranks(world_size, try_all, str(tmp_path)):
        for call, message in zip(REFUSED, messages, strict=True):
            assert re.search(rf"{re.escape(call)}: found the averages in the parameters", message), message
            assert "expected the training weights. Leave the context" in message
        assert is_restored


def test_without_ema_decay_there_are_no_averages() -> None:
    model, optimizer = Case().build(ema_decay=None)
    with pytest.raises(RuntimeError, match="found an optimizer without averages, expected one with ema_decay"):
        optimizer.averaged_parameters().__enter__()
    Case().take_step(model, optimizer, 1)
    assert optimizer.memory().average == 0
    assert optimizer.full_state(model.matrix).keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("world_size", [1, 2])
def test_updates_in_backward_wait_for_the_training_weights(world_size: int) -> None:
    assert on_ranks(world_size, train_within) == [True] * world_size


def train_within() -> bool:
    """Run backward within the context, and enter it between backward and step."""
    case = Case(options={"update": "backward"})
    model, optimizer = case.build()
    case.take_step(model, optimizer, 1)
    before = [*values(model), *states(model, optimizer)]
    with optimizer.averaged_parameters():
        model().backward()
    is_unchanged = equal([*values(model), *states(model, optimizer)], before)
    is_kept = all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    optimizer.zero_grad()
    (model.matrix.square().sum()).backward()
    try:
        optimizer.averaged_parameters().__enter__()
    except RuntimeError as error:
        refused = "half-way through a step" in str(error)
    optimizer.step()
    return is_unchanged and is_kept and refused


def test_backward_through_a_graph_from_before_is_refused() -> None:
    model, optimizer = Case().build()
    Case().take_step(model, optimizer, 1)
    loss = (model.matrix * model.matrix).sum()
    with optimizer.averaged_parameters(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with optimizer.averaged_parameters():
        loss = (model.matrix * model.matrix).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), float("inf")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"ema_decay: found .*, expected at least 0 and less than 1"):
        Case().build(ema_decay=decay)


@pytest.mark.parametrize("decay", ["0.9", True, torch.tensor(0.9), (0.9,)])
def test_a_decay_that_is_no_number_is_refused(decay: Any) -> None:
    with pytest.raises(TypeError, match="ema_decay: found "):
        Case().build(ema_decay=decay)


def build_differently() -> str:
    try:
        Case().build(ema_decay=0.9 if rank_and_size()[0] else 0.99)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_different_decays_are_refused() -> None:
    for message in on_ranks(2, build_differently):
        assert "ema_decay" in message and "0.99" in message


def train_offloaded(directory: str) -> list[bool]:
    """Compare averages in files with resident ones, before the first step and after some, and within the context."""
    case, same = Case(BF16), []
    (one, resident), (other, offloaded) = case.build(), case.build(offload=shardadam.DiskOffload(directory))
    for steps in (range(0), range(4)):
        for step in steps:
            for model, optimizer in ((one, resident), (other, offloaded)):
                case.take_step(model, optimizer, step)
        same.append(equal(states(one, resident), states(other, offloaded)))
        with resident.averaged_parameters(), offloaded.averaged_parameters():
            same.append(equal(values(one), values(other)))
        same.append(equal(values(one), values(other)))
    return [*same, offloaded.memory().average == 0 < offloaded.memory().on_disk]


@pytest.mark.parametrize("world_size", [1, 2])
def test_averages_in_files_equal_resident_ones(world_size: int, tmp_path: Any) -> None:
    assert on_ranks(world_size, train_offloaded, str(tmp_path)) == [[True] * 7] * world_size


# Other placements


def train_under_fully_shard() -> tuple[list[Tensor], list[Tensor], bool, bool]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 30), nn.Linear(30, 3))
    twin = copy.deepcopy(model)
    for layer in (*model, model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = ShardedAdamW(model.parameters(), lr=LR, gradient_sync="external", ema_decay=DECAY, bucket_mb=0.001)
    torchs = torch.optim.AdamW(twin.parameters(), lr=LR)
    averaged = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    probe, same = torch.ones(2, 10), []
    for step in range(4):
        batch = torch.randn(4, 10, generator=torch.Generator().manual_seed(step))
        for one, its in ((model, optimizer), (twin, torchs)):
            one(batch).square().sum().backward()
            its.step()
            its.zero_grad()
        averaged.update_parameters(twin)
        before = [p.to_local().clone() for p in model.parameters()]
        with torch.no_grad(), optimizer.averaged_parameters():
            same.append(torch.allclose(model(probe), averaged(probe), rtol=1e-5, atol=1e-5))
            model.reshard()
        same.append(equal([p.to_local() for p in model.parameters()], before))
    whole = [optimizer.full_state(p)["average"].full_tensor() for p in model.parameters()]
    trained = [p.full_tensor().detach() for p in model.parameters()]
    is_equal = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(trained, twin.parameters(), strict=True))
    return whole, values(averaged.module), all(same), is_equal


def test_averages_of_fully_shard_parameters() -> None:
    for found, expected, same, is_equal in on_ranks(2, train_under_fully_shard):
        assert same and is_equal
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def train_in_parallel() -> tuple[list[Tensor], list[Tensor], list[Tensor], bool]:
    """Train a tensor-parallel matrix, a bias, and an expert that only this data-parallel rank holds."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    own = [dist.new_group([rank]) for rank in range(4)][dist.get_rank()]
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator).sign() for shape in ((7, 20), (9,), (11,))]
    matrix = nn.Parameter(distribute_tensor(whole[0].clone(), mesh["tp"], [Shard(0)]))
    bias, expert = nn.Parameter(whole[1].clone()), nn.Parameter(whole[2].clone())
    groups = [{"params": [matrix, bias]}, {"params": [expert], "process_group": own}]
    optimizer = ShardedAdamW(
        groups, lr=LR, ema_decay=DECAY, process_group=mesh["dp"], gradient_sync="step", bucket_mb=0.001
    )
    twin = nn.ParameterList([nn.Parameter(w.clone()) for w in whole])
    torchs = torch.optim.AdamW(twin.parameters(), lr=LR)
    averaged = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for step in range(4):
        gradients = [torch.randn(w.shape, generator=torch.Generator().manual_seed(step)) for w in whole]
        matrix.grad = distribute_tensor(gradients[0], mesh["tp"], [Shard(0)])
        bias.grad, expert.grad = gradients[1].clone(), 2 * gradients[2]  # divided by the data-parallel ranks
        for p, gradient in zip(twin, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        torchs.step()
        averaged.update_parameters(twin)

    def now() -> list[Tensor]:
        return [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in (matrix, bias, expert)]

    states_ = [optimizer.full_state(p)["average"] for p in (matrix, bias, expert)]
    before = now()
    with torch.no_grad(), optimizer.averaged_parameters():
        inside = now()
    averages = [a.full_tensor() if isinstance(a, DTensor) else a for a in states_]
    return averages, inside, values(averaged.module), equal(now(), before)


def test_averages_of_tensor_parallel_parameters_and_experts() -> None:
    for averages, inside, expected, is_restored in on_ranks(4, train_in_parallel):
        assert_close(averages, expected)
        assert equal(inside, averages)
        assert is_restored
