# SPDX-License-Identifier: Apache-2.0
"""User mistakes raise errors that say what was found, what is expected, and what to do."""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardadam
from shardadam import Precision, ShardedAdam, ShardedAdamW
from shardadam.transport import SingleProcessTransport
from tests.ranks import on_ranks

GRADIENT_SYNCS = pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def refuse(kind: type[Exception], *words: str) -> Any:
    """Expect an error of exactly this kind whose message contains the words in this order."""
    pattern = "(?s)" + ".*".join(re.escape(word) for word in words)
    return pytest.raises(kind, match=pattern, check=lambda error: type(error) is kind)


def raised(function: Callable[[], object]) -> tuple[str, str]:
    """Return the type and message of the error that ``function`` raises, for rank functions to return."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


# The params argument


def test_refuses_a_tensor_for_params() -> None:
    with refuse(TypeError, "params argument", "should be an iterable of Tensors"):
        ShardedAdamW(parameter(3))  # type: ignore[arg-type]


def test_refuses_an_element_that_is_no_tensor() -> None:
    with refuse(TypeError, "can only optimize Tensors", "int"):
        ShardedAdamW([parameter(3), 3])  # type: ignore[list-item]


def test_refuses_a_tensor_that_is_not_a_leaf() -> None:
    with refuse(ValueError, "non-leaf"):
        ShardedAdamW([parameter(3) * 2])


def test_refuses_a_parameter_twice_in_one_group() -> None:
    twice = parameter(3)
    with refuse(ValueError, "appears twice in one param group", "positions 0 and 2", "Give every parameter once"):
        ShardedAdamW([twice, parameter(3), twice])


def test_refuses_a_named_parameter_twice_in_one_group() -> None:
    twice = parameter(3)
    with refuse(ValueError, "appears twice in one param group", "positions 0 and 1"):
        ShardedAdamW([("one", twice), ("other", twice)])


def test_refuses_a_parameter_in_two_groups() -> None:
    twice = parameter(3)
    with refuse(ValueError, "more than one parameter group"):
        ShardedAdamW([{"params": [twice]}, {"params": [twice]}])


def test_refuses_to_add_a_parameter_that_it_has() -> None:
    twice = parameter(3)
    optimizer = ShardedAdamW([twice])
    with refuse(ValueError, "more than one parameter group"):
        optimizer.add_param_group({"params": [twice]})
    assert len(optimizer.param_groups) == 1


def test_refuses_an_empty_list() -> None:
    with refuse(ValueError, "empty parameter list"):
        ShardedAdamW([])


def test_refuses_an_iterator_that_was_read_before() -> None:
    parameters = nn.Linear(3, 1).parameters()
    assert len(ShardedAdamW(parameters).param_groups[0]["params"]) == 2
    with refuse(ValueError, "params: found an iterator that yields nothing", "Call them again"):
        ShardedAdamW(parameters)


# Hyperparameters


@pytest.mark.parametrize("field", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf])
def test_refuses_negative_hyperparameters(field: str, value: float) -> None:
    with refuse(ValueError, f"{field}: found {value}", "expected a finite number of 0 or more"):
        ShardedAdamW([parameter(3)], **{field: value})


@pytest.mark.parametrize("field", ["lr", "eps", "weight_decay"])
def test_refuses_negative_hyperparameters_of_a_param_group(field: str) -> None:
    with refuse(ValueError, f"{field}: found -1.0, expected a finite number of 0 or more"):
        ShardedAdamW([{"params": [parameter(3)]}, {"params": [parameter(3)], field: -1.0}])


@pytest.mark.parametrize(
    ("betas", "index", "value"),
    [
        ((-0.1, 0.9), 0, -0.1),
        ((1.0, 0.9), 0, 1.0),
        ((0.9, 1.0), 1, 1.0),
        ((0.9, -1.0), 1, -1.0),
        ((0.9, math.nan), 1, math.nan),
    ],
)
def test_refuses_betas_out_of_range(betas: tuple[float, float], index: int, value: float) -> None:
    with refuse(ValueError, f"betas[{index}]: found {value}, expected at least 0 and less than 1"):
        ShardedAdam([parameter(3)], betas=betas)


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999)])
def test_refuses_other_than_two_betas(betas: Any) -> None:
    with refuse(ValueError, "betas: found", "expected two floats"):
        ShardedAdamW([parameter(3)], betas=betas)


def test_refuses_tensor_betas() -> None:
    with refuse(ValueError, "betas: found", "tensor", "expected two floats"):
        ShardedAdamW([parameter(3)], betas=(torch.tensor(0.9), torch.tensor(0.999)))  # type: ignore[arg-type]


def test_refuses_an_lr_of_two_elements() -> None:
    with refuse(ValueError, "lr: found a tensor of 2 elements", "a tensor of one"):
        ShardedAdamW([parameter(3)], lr=torch.tensor([0.1, 0.2]))


def test_refuses_an_unknown_keyword() -> None:
    with refuse(TypeError, "unexpected keyword argument", "momentum"):
        ShardedAdamW([parameter(3)], momentum=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize("optimizer_class", [ShardedAdam, ShardedAdamW])
def test_refuses_positional_arguments_after_weight_decay(optimizer_class: type) -> None:
    with refuse(TypeError, "positional arguments"):
        optimizer_class([parameter(3)], 1e-3, (0.9, 0.999), 1e-8, 0.0, False)


@pytest.mark.parametrize("field", ["amsgrad", "differentiable"])
def test_refuses_what_it_does_not_support(field: str) -> None:
    with refuse(ValueError, f"{field}: found True", "not supported", "Leave it False"):
        ShardedAdamW([parameter(3)], **{field: True})
    with refuse(ValueError, f"{field}: found True", "not supported", "Leave it False"):
        ShardedAdamW([{"params": [parameter(3)], field: True}])
    optimizer = ShardedAdamW([parameter(3)])
    with refuse(ValueError, f"{field}: found True", "not supported", "Leave it False"):
        optimizer.add_param_group({"params": [parameter(3)], field: True})
    assert len(optimizer.param_groups) == 1


# Options


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("gradient_sync", "forward", "expected 'backward', 'step' or 'external'"),
        ("gradient_sync", None, "expected 'backward', 'step' or 'external'"),
        ("transport", "infiniband", "expected 'auto', 'collective'"),
        ("transport", None, "expected 'auto', 'collective'"),
        ("transport", "given", "expected 'auto', 'collective'"),
        ("max_grad_norm", -1.0, "expected None or a number of 0 or more"),
        ("max_grad_norm", math.nan, "expected None or a number of 0 or more"),
        ("bucket_mb", 0, "expected None or a positive number of MiB"),
        ("bucket_mb", -32, "expected None or a positive number of MiB"),
        ("bucket_mb", math.inf, "expected None or a positive number of MiB"),
        ("bucket_mb", math.nan, "expected None or a positive number of MiB"),
    ],
)
def test_refuses_wrong_options(field: str, value: Any, expected: str) -> None:
    with refuse(ValueError, f"{field}: found {value!r}", expected):
        ShardedAdamW([parameter(3)], **{field: value})


@pytest.mark.parametrize("field", ["max_grad_norm", "bucket_mb", "ema_decay"])
def test_refuses_text_for_a_number(field: str) -> None:
    """As a file of settings may have it; max_grad_norm and bucket_mb only said that >= does not take a str."""
    with refuse(TypeError, f"{field}: found '1', a str, expected a number"):
        ShardedAdamW([parameter(3)], **{field: "1"})  # type: ignore[arg-type]


def test_refuses_a_bucket_smaller_than_a_byte_by_the_name_that_the_user_knows() -> None:
    with refuse(ValueError, "bucket_mb: found 1e-09"):
        ShardedAdamW([parameter(3)], bucket_mb=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"moments": "int4"}, ("Precision.moments: found 'int4'", "expected one of", "fp32")),
        ({"master": "maybe"}, ("Precision.master: found 'maybe'", "expected one of", "auto")),
        ({"reduce": torch.int32}, ("Precision.reduce: found torch.int32", "expected None or one of", "torch.bfloat16")),
        ({"reduce": "bf16"}, ("Precision.reduce: found 'bf16'", "expected None or one of")),
    ],
)
def test_refuses_wrong_precisions(options: Any, words: tuple[str, ...]) -> None:
    with refuse(ValueError, *words):
        Precision(**options)


def test_refuses_a_precision_that_is_none() -> None:
    with refuse(TypeError, "precision: found 'bf16', a str, expected a Precision", "moments="):
        ShardedAdamW([parameter(3)], precision="bf16")  # type: ignore[arg-type]
    with refuse(TypeError, "positional argument"):
        Precision("fp32")  # type: ignore[misc]


# Parameters that cannot be views of a flat buffer


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn], ids=str)
def test_refuses_other_dtypes_unless_frozen(dtype: torch.dtype) -> None:
    odd = nn.Parameter(torch.zeros(3).to(dtype))
    with refuse(TypeError, "Parameter 'odd'", f"found dtype {dtype}", "expected one of", "Freeze it"):
        ShardedAdamW([("odd", odd)])
    assert ShardedAdamW([("odd", odd.requires_grad_(False)), ("even", parameter(3))]).memory().parameters == 128 * 4


def test_takes_frozen_integers() -> None:
    integers = nn.Parameter(torch.arange(3), requires_grad=False)
    assert ShardedAdamW([integers, parameter(3)]).memory().parameters == 128 * 4


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(1, 4).expand(3, 4),
        torch.ones(4, 8)[:, ::2],
        torch.ones(6, 4)[::2],
        torch.ones(9).as_strided((4, 4), (1, 1)),
    ],
    ids=["expanded", "every other column", "every other row", "overlapping"],
)
def test_refuses_parameters_with_gaps_or_overlaps(value: Tensor) -> None:
    with refuse(ValueError, "Parameter 'odd' has gaps or overlaps in memory", str(value.stride()), "detach().clone()"):
        ShardedAdamW([("odd", nn.Parameter(value))])


@pytest.mark.parametrize("others", [slice(0, 10), slice(3, 5), slice(9, 20)], ids=["same", "inside", "last element"])
def test_refuses_two_parameters_over_the_same_memory(others: slice) -> None:
    memory = torch.ones(20)
    one, other = nn.Parameter(memory[:10]), nn.Parameter(memory[others])
    with refuse(ValueError, "different tensors over the same memory", "assign one nn.Parameter to both modules"):
        ShardedAdamW([("one", one), ("between", parameter(3)), ("other", other)])


def test_refuses_a_frozen_parameter_over_the_memory_of_a_trainable_one() -> None:
    """The frozen one kept its old values while the trainable one changed in the flat buffer."""
    memory = torch.ones(20)
    frozen = nn.Parameter(memory, requires_grad=False)
    with refuse(ValueError, "different tensors over the same memory"):
        ShardedAdamW([("frozen", frozen), ("trained", nn.Parameter(memory[5:]))])
    both_frozen = nn.Parameter(memory, requires_grad=False)
    assert len(ShardedAdamW([frozen, both_frozen, parameter(3)]).state) == 1


def test_takes_parameters_next_to_each_other_in_memory() -> None:
    memory = torch.ones(20)
    peers = [nn.Parameter(memory[:10]), nn.Parameter(memory[10:])]
    assert len(ShardedAdamW(peers).state) == 2


def test_refuses_to_add_a_parameter_over_the_memory_of_one_it_has() -> None:
    taken = parameter(300)
    optimizer = ShardedAdamW([taken])
    with refuse(ValueError, "different tensors over the same memory"):
        optimizer.add_param_group({"params": [nn.Parameter(taken.detach()[:5])]})
    assert len(optimizer.param_groups) == 1


def test_refuses_meta_parameters() -> None:
    with refuse(ValueError, "Parameter 'weight' is on the meta device", "Materialise it first"):
        ShardedAdamW(nn.Linear(3, 4, device="meta").named_parameters())


def test_refuses_uninitialised_lazy_parameters() -> None:
    with refuse(ValueError, "Parameter 'weight' is not initialised yet", "Run a forward"):
        ShardedAdamW(nn.LazyLinear(4).named_parameters())


def test_refuses_sparse_parameters() -> None:
    with refuse(TypeError, "Parameter 'odd' has layout torch.sparse_coo", "expected a dense tensor"):
        ShardedAdamW([("odd", nn.Parameter(torch.eye(3).to_sparse()))])


def test_refuses_dtensors_over_the_data_parallel_ranks() -> None:
    for kind, message in on_ranks(2, build_over_dtensor):
        assert kind == "ValueError"
        assert message.startswith("Parameter 'sharded' is a DTensor on ranks [0, 1], and process_group has ranks")
        assert 'gradient_sync="external"' in message


def build_over_dtensor() -> tuple[str, str]:
    mesh = init_device_mesh("cpu", (2,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    return raised(lambda: ShardedAdamW([("sharded", sharded)]))


# Process groups


def test_refuses_a_process_group_where_nothing_is_initialised() -> None:
    with refuse(ValueError, "process_group: given, but torch.distributed is not initialised", "torchrun"):
        ShardedAdamW([parameter(3)], process_group=object())  # type: ignore[arg-type]


def test_refuses_to_train_alone_where_torchrun_has_started_several_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each process trained a model of its own, and nothing said so."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = ("found WORLD_SIZE=2", "each of the 2 processes would train a model of its own", "init_process_group")
    with refuse(RuntimeError, *expected, "create the Accelerator first", "unset WORLD_SIZE"):
        ShardedAdamW([parameter(3)])
    with refuse(RuntimeError, *expected):
        shardadam.save(tmp_path, step=0, model=nn.Linear(2, 2))
    ShardedAdamW([parameter(3)], transport=SingleProcessTransport())
    for alone in ("1", "", "auto"):
        monkeypatch.setenv("WORLD_SIZE", alone)
        ShardedAdamW([parameter(3)])
    monkeypatch.delenv("WORLD_SIZE")
    ShardedAdamW([parameter(3)])


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_warns_where_another_launcher_may_have_started_several_processes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "4")
    with pytest.warns(UserWarning, match=f"Found {name}=4 in the environment.*init_process_group.*unset {name}"):
        ShardedAdamW([parameter(3)])
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # also set in a batch script that starts one process
    ShardedAdamW([parameter(3)])


def test_takes_a_group_of_one_rank_where_torchrun_has_started_several_processes() -> None:
    assert on_ranks(2, build_in_a_world_of_two) == [("nothing", "")] * 2


def build_in_a_world_of_two() -> tuple[str, str]:
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    with mock.patch.dict(os.environ, WORLD_SIZE="2"):
        return raised(lambda: [ShardedAdamW([parameter(3)], process_group=group) for group in (alone, None)])


def test_refuses_a_process_group_that_this_rank_is_not_in() -> None:
    member, outsider = on_ranks(2, build_on_a_group_of_rank_0)
    assert member == ("nothing", "")
    assert outsider[0] == "ValueError"
    assert "rank 1 is not in it. Build the optimizer only on the ranks that are" in outsider[1]


def build_on_a_group_of_rank_0() -> tuple[str, str]:
    group = dist.new_group([0])
    return raised(lambda: ShardedAdamW([parameter(3)], process_group=group))


def test_refuses_a_device_mesh_that_this_rank_is_not_in() -> None:
    member, outsider = on_ranks(2, build_on_a_mesh_of_rank_0)
    assert member == ("nothing", "")
    assert outsider[0] == "ValueError"
    assert "rank 1 is not in it" in outsider[1]


def build_on_a_mesh_of_rank_0() -> tuple[str, str]:
    mesh = DeviceMesh("cpu", [0])
    return raised(lambda: ShardedAdamW([parameter(3)], process_group=mesh))


def test_refuses_a_mesh_of_three_dimensions_and_takes_one_or_two_of_them() -> None:
    for refused, *taken in on_ranks(2, build_on_a_mesh_of_three_dimensions):
        assert refused[0] == "ValueError"
        assert "found a DeviceMesh of 3 dimensions, expected 1 or 2" in refused[1]
        assert "mesh['name']" in refused[1]
        assert taken == [("nothing", "")] * 2


def build_on_a_mesh_of_three_dimensions() -> list[tuple[str, str]]:
    mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("replica", "shard", "tensor"))
    return [
        raised(lambda: ShardedAdamW([parameter(3)], process_group=mesh)),
        raised(lambda: ShardedAdamW([parameter(3)], process_group=mesh["shard"])),
        raised(lambda: ShardedAdamW([parameter(3)], process_group=mesh["replica", "shard"])),
    ]


def test_refuses_a_mesh_whose_replicas_would_hold_other_shards() -> None:
    for kind, message in on_ranks(2, build_on_a_descending_mesh):
        assert kind == "ValueError"
        assert "found a DeviceMesh of ranks [[1, 0]], expected ranks in ascending order" in message


def build_on_a_descending_mesh() -> tuple[str, str]:
    mesh = DeviceMesh("cpu", [[1, 0]])
    return raised(lambda: ShardedAdamW([parameter(3)], process_group=mesh))


def test_refuses_something_else_for_a_process_group() -> None:
    for kind, message in on_ranks(2, build_on_a_name):
        assert kind == "TypeError"
        assert message == "process_group: found str, expected a ProcessGroup, a 1-D or 2-D DeviceMesh or None."


def build_on_a_name() -> tuple[str, str]:
    return raised(lambda: ShardedAdamW([parameter(3)], process_group="world"))  # type: ignore[arg-type]


# Gradients


@GRADIENT_SYNCS
def test_refuses_sparse_gradients_and_trains_after_they_are_gone(gradient_sync: Any) -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = ShardedAdamW(embedding.named_parameters(), gradient_sync=gradient_sync)
    with refuse(RuntimeError, "Parameter 'weight' has a sparse gradient", "sparse_coo", "sparse=False", "SparseAdam"):
        embedding(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    assert torch.equal(embedding.weight, before)
    embedding.sparse = False
    optimizer.zero_grad()
    embedding.weight.grad = None
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert not torch.equal(embedding.weight, before)


def test_refuses_sparse_gradients_at_once_where_nothing_is_reduced_yet() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = ShardedAdamW(embedding.named_parameters())
    with optimizer.no_sync(), refuse(RuntimeError, "Parameter 'weight' has a sparse gradient"):
        embedding(torch.tensor([1, 2])).sum().backward()


# Parameters that are replaced after the optimizer was built


def build_convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weight = next(model.parameters())
    for step in range(3):
        images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step)).to(weight.dtype)
        model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@GRADIENT_SYNCS
def test_refuses_a_change_of_dtype_after_it_was_built(gradient_sync: Any) -> None:
    model = build_convolutions()
    optimizer = ShardedAdamW(model.named_parameters(), gradient_sync=gradient_sync)
    model.to(torch.float64)
    with refuse(
        RuntimeError, "Parameter", "found torch.float64", "expected torch.float32", "Call model.to(...) before building"
    ):
        train(model, optimizer)


@GRADIENT_SYNCS
def test_refuses_a_change_of_memory_format_after_it_was_built(gradient_sync: Any) -> None:
    model = build_convolutions()
    optimizer = ShardedAdamW(model.named_parameters(), gradient_sync=gradient_sync)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with refuse(RuntimeError, "Parameter '0.weight'", "strides", "Call model.to(...) before building the optimizer"):
        train(model, optimizer)


@GRADIENT_SYNCS
def test_takes_back_parameters_after_a_move_to_the_same_device(gradient_sync: Any) -> None:
    """``model.to("cpu:0")``, which accelerate calls, replaces ``p.data``: training would silently have no effect."""
    model, theirs = build_convolutions(), build_convolutions()
    optimizer = ShardedAdamW(model.parameters(), lr=0.1, gradient_sync=gradient_sync)
    addresses = [p.data_ptr() for p in model.parameters()]
    model.to("cpu:0")
    assert addresses != [p.data_ptr() for p in model.parameters()], "torch no longer replaces p.data: test otherwise"
    train(model, optimizer)
    assert addresses == [p.data_ptr() for p in model.parameters()]
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.1))
    for ours, expected in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


# The optimizer itself


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])
def test_refuses_to_be_copied(copied: Callable[[Any], Any]) -> None:
    optimizer = ShardedAdamW([parameter(3)])
    with refuse(TypeError, "A ShardedAdamW", "cannot be copied or pickled", "load state_dict()"):
        copied(optimizer)


@pytest.mark.parametrize("method", ["full_grad", "full_state"])
def test_refuses_to_gather_for_a_tensor_that_it_does_not_have(method: str) -> None:
    frozen = parameter(3).requires_grad_(False)
    optimizer = ShardedAdamW([parameter(3), frozen])
    with refuse(ValueError, "Parameter \"param_groups[0]['params'][1]\" is frozen", "Set requires_grad on it first"):
        getattr(optimizer, method)(frozen)
    for foreign in (parameter(3), torch.ones(3)):
        with refuse(ValueError, "not a trainable parameter of the optimizer", "Pass one of its param_groups' params"):
            getattr(optimizer, method)(foreign)


# Hyperparameters that change after it was built

NOT_NUMBERS = {
    "NaN": (math.nan, ValueError),
    "infinity": (math.inf, ValueError),
    "None": (None, TypeError),
    "text": ("1e-3", TypeError),
    "complex": (1e-3 + 0j, TypeError),
    "tensor of NaN": (torch.tensor(math.nan), ValueError),
    "complex tensor": (torch.tensor(1e-3 + 0j), TypeError),
    "two elements": (torch.tensor([0.1, 0.2]), TypeError),
}


def step_with(field: str, value: Any) -> list[Any]:
    """Return the error of a step with ``value``, whether it changed nothing, and whether a right value steps after."""
    layer = nn.Linear(3, 2)
    optimizer = ShardedAdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    before = [p.detach().clone() for p in layer.parameters()]
    group = optimizer.param_groups[0]
    right, group[field] = group[field], value
    answer = raised(optimizer.step)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    unchanged &= all(not tensor.any() for entry in optimizer.state.values() for tensor in entry.values())
    group[field] = right
    optimizer.step()
    moved = all(not torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    return [*answer, unchanged, moved]


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize(("world_size", "field"), [(1, "lr"), (1, "weight_decay"), (1, "eps"), (2, "lr")])
def test_a_step_refuses_a_hyperparameter_that_is_no_number_and_writes_nothing(
    world_size: int, field: str, value: str
) -> None:
    """A scheduler that divides by zero once wrote NaN into every parameter, or failed in the middle of the update."""
    for kind, message, unchanged, moved in on_ranks(world_size, step_with, field, NOT_NUMBERS[value][0]):
        assert kind == NOT_NUMBERS[value][1].__name__ and unchanged and moved
        assert f"step(): param group 0, {field}: found " in message and "Nothing has been written" in message


@pytest.mark.parametrize("betas", [(math.nan, 0.9), (0.9, 1.0), (0.9, None), (0.9, torch.tensor([0.9, 0.9]))])
def test_a_step_refuses_such_betas(betas: Any) -> None:
    kind, message, unchanged, moved = step_with("betas", betas)
    assert kind in ("ValueError", "TypeError") and "param group 0, betas[" in message and unchanged and moved


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999), None, 0.9])
def test_a_step_refuses_what_are_not_two_betas(betas: Any) -> None:
    kind, message, unchanged, moved = step_with("betas", betas)
    assert kind == "TypeError" and f"param group 0, betas: found {betas!r}" in message and unchanged and moved


def test_maximize_may_be_any_truth_value_as_in_torch() -> None:
    layer = nn.Linear(3, 2)
    optimizer = ShardedAdamW(layer.parameters())
    optimizer.param_groups[0]["maximize"] = 1
    before = layer.bias.detach().clone()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert bool((layer.bias > before).all())


def step_with_nan_on_rank_1() -> tuple[str, str]:
    layer = nn.Linear(3, 2)
    optimizer = ShardedAdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["lr"] = math.nan
    return raised(optimizer.step)


def test_a_number_on_one_rank_alone_that_is_none_raises_on_all() -> None:
    for kind, message in on_ranks(2, step_with_nan_on_rank_1):
        assert kind == "ValueError" and "lr 0.1 on rank 0, nan on rank 1" in message


@pytest.mark.parametrize("value", [-1e-20, 0, True, torch.tensor(0.1), torch.tensor([0.1])])
def test_a_step_takes_what_torch_takes(value: Any) -> None:
    layer = nn.Linear(3, 2)
    optimizer = ShardedAdamW(layer.parameters())
    optimizer.param_groups[0]["lr"] = value
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in layer.parameters())


@pytest.mark.parametrize("max_norm", [math.nan, -1.0, None, "1", 1j, torch.tensor(math.nan), torch.ones(2)])
def test_refuses_to_clip_to_what_is_no_norm(max_norm: Any) -> None:
    """NaN once went into every parameter."""
    layer = nn.Linear(3, 2)
    optimizer = ShardedAdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    with pytest.raises((TypeError, ValueError), match=r"max_norm: found .*expected a number"):
        optimizer.clip_grad_norm_(max_norm)
    with pytest.raises((TypeError, ValueError), match=r"clip_value: found .*expected a number"):
        optimizer.clip_grad_value_(max_norm)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in layer.parameters())
