# SPDX-License-Identifier: Apache-2.0
"""Runs of models that ranks divide go from any mesh to any other, bit for bit, through checkpoints of boxes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import shardadam
from shardadam import CheckpointError, Precision, ShardedAdamW
from shardadam.checkpoint.export import export
from shardadam.checkpoint.reader import open_newest
from shardadam.transport.placement import like, local_tensor, runs_of
from shardadam.update import formats
from tests.ranks import on_ranks, rank_and_size
from tests.runs import differences, digest

Everything = dict[str, Tensor]

# Whole runs

Shapes = dict[str, tuple[tuple[int, ...], int | None]]
SHAPES: Shapes = {
    "columns": ((24, 40), 0),
    "rows": ((40, 24), 1),
    "blocks": ((6, 512), 1),
    "uneven": ((5, 7), 0),
    "single": ((1, 3), 0),
    "convolution": ((4, 6, 3, 5), 1),
    "fused": ((16, 9), 0),
    "norm": ((33,), None),
    "plain": ((19,), None),
    "frozen": ((6, 10), 1),
    "empty": ((0, 4), 0),
}
"""Shape and sharded dimension of each parameter; None: equal on all ranks of the mesh, plain if so named. The rows of
``fused`` are those of two projections, some of each on each rank.
"""

EXACT = [
    (torch.float32, "fp32", "auto"),
    (torch.bfloat16, "fp32", "split"),
    (torch.bfloat16, "bf16", "split"),
    (torch.bfloat16, "bf16", "fp32"),
]


class Placed(nn.Module):
    """Parameters as DTensors of a mesh of one dimension, or whole."""

    def __init__(self, mesh: DeviceMesh | None, dtype: torch.dtype, seed: int, shapes: Shapes = SHAPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, (shape, dim) in shapes.items():
            value = torch.randn(shape, generator=generator).to(dtype)
            if name == "convolution":
                value = value.to(memory_format=torch.channels_last)
            if mesh is not None and name != "plain":
                placement = Replicate() if dim is None else Shard(dim)
                value = distribute_tensor(
                    value, mesh, [_StridedShard(0, split_factor=2) if name == "fused" else placement]
                )
            self.register_parameter(name, nn.Parameter(value, requires_grad=name != "frozen"))
        buffer = torch.randn(8, 3, generator=generator)
        self.register_buffer("table", buffer if mesh is None else distribute_tensor(buffer, mesh, [Shard(0)]))
        self.register_buffer("count", torch.tensor(seed))
        self.tied = self.rows


def whole_of(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class PlacedRun:
    def __init__(self, tp: int, format: Any = EXACT[0], *, seed: int = 0, shapes: Shapes = SHAPES) -> None:
        dtype, moments, master = format
        self.rank, size = rank_and_size()
        self.mesh = init_device_mesh("cpu", (size // tp, tp), mesh_dim_names=("dp", "tp")) if size > 1 else None
        self.model = Placed(self.mesh["tp"] if self.mesh is not None and tp > 1 else None, dtype, seed, shapes)
        self.optimizer = ShardedAdamW(
            self.model.named_parameters(),
            lr=0.01,
            process_group=None if self.mesh is None else self.mesh["dp"],
            gradient_sync="step",
            precision=Precision(moments=moments, master=master),
            bucket_mb=0.002,
        )

    def train(self, steps: range) -> PlacedRun:
        coordinate = 0 if self.mesh is None else self.mesh["dp"].get_local_rank()
        for step in steps:
            generator = torch.Generator().manual_seed(100 * step + coordinate)
            for parameter in self.model.parameters():
                gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                if parameter.requires_grad:
                    for dim, runs in enumerate(runs_of(parameter)):
                        gradient = torch.cat([gradient.narrow(dim, at, length) for at, length in runs], dim)
                    local = torch.empty_like(local_tensor(parameter)).copy_(gradient)
                    parameter.grad = like(parameter, local)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def everything(self) -> dict[str, Tensor]:
        found = {f"model.{name}": whole_of(value) for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                found |= {f"{name}.{k}": whole_of(v) for k, v in self.optimizer.full_state(parameter).items()}
        return found


def save_model(directory: str, tp: int, load: str | None) -> Everything:
    _, size = rank_and_size()
    mesh = init_device_mesh("cpu", (size // tp, tp), mesh_dim_names=("dp", "tp")) if tp > 1 else None
    model = Placed(None if mesh is None else mesh["tp"], torch.float32, seed=1 if load is None else 2)
    if load is not None:
        shardadam.load(load, model=model)
    shardadam.save(directory, step=3, model=model)
    return {name: whole_of(value) for name, value in model.state_dict().items()}


def test_the_tensors_of_a_model_go_from_any_mesh_to_any_other(tmp_path: Path) -> None:
    expected, load = None, None
    for number, (ranks, tp) in enumerate([(4, 2), (3, 1), (4, 4), (1, 1), (2, 2)]):
        directory = str(tmp_path / str(number))
        for found in on_ranks(ranks, save_model, directory, tp, load):
            expected = expected or found
            assert differences(expected, found) == []
        load = directory
        assert_written_once(directory)


def assert_written_once(directory: str) -> None:
    with open_newest(Path(directory)) as reader:
        tensors = sum(tensor.nbytes for tensor in reader.index.tensors.values())
        objects = sum(stored.nbytes for stored in reader.index.objects.values())
        assert sum(nbytes for _, nbytes in reader.index.files) == tensors + objects


def save_placed(directory: str, tp: int, format: Any, load: str | None, shapes: Shapes = SHAPES) -> Everything:
    run = PlacedRun(tp, format, seed=1 if load is None else 2, shapes=shapes).train(range(3 if load is None else 1))
    if load is not None:
        shardadam.load(load, model=run.model, optimizer=run.optimizer)
    shardadam.save(directory, step=3, model=run.model, optimizer=run.optimizer)
    return run.everything()


ROUND = [(4, 2), (3, 1), (4, 2), (4, 4), (1, 1), (2, 2)]
"""Ranks, and tensor-parallel ones among them."""


@pytest.mark.sweep(2)
@pytest.mark.parametrize("format", EXACT, ids=str)
def test_a_run_goes_from_any_mesh_to_any_other_and_back_bit_for_bit(tmp_path: Path, format: Any) -> None:
    expected, load = None, None
    for number, (ranks, tp) in enumerate(ROUND):
        directory = str(tmp_path / str(number))
        for found in on_ranks(ranks, save_placed, directory, tp, format, load):
            expected = expected or found
            assert differences(expected, found) == []
        assert_written_once(directory)
        load = directory


INT8 = (torch.bfloat16, "int8", "split")
SAME_BLOCKS = ("blocks", "norm", "plain", "single")
"""Parameters of which each block of 128 elements here is one there, on 1 and on 2 tensor-parallel ranks."""


def test_codes_move_bit_for_bit_where_blocks_are_the_same(tmp_path: Path) -> None:
    """Elsewhere they are decoded, and encoded again."""
    saved = on_ranks(4, save_placed, str(tmp_path / "0"), 2, INT8, None)[0]
    (again,) = {digest(found) for found in on_ranks(4, save_placed, str(tmp_path / "1"), 2, INT8, str(tmp_path / "0"))}
    assert again == digest(saved)
    whole = on_ranks(1, save_placed, str(tmp_path / "2"), 1, INT8, str(tmp_path / "1"))[0]
    back = on_ranks(4, save_placed, str(tmp_path / "3"), 2, INT8, str(tmp_path / "2"))[0]
    for found in (whole, back):
        for name in differences(saved, found):
            parameter, _, kind = name.rpartition(".")
            assert kind in formats.MOMENTS and parameter not in SAME_BLOCKS, name
            assert torch.allclose(found[name], saved[name], rtol=0.05, atol=0.02 * float(saved[name].abs().max()))
        assert differences(saved, found), "some blocks are others"


# Ranks with other names: pipeline stages, experts


class Layer(nn.Module):
    """With a frozen parameter, a buffer and an object."""

    def __init__(self, index: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(10 * seed + index)
        self.weight = nn.Parameter(torch.randn(5 + index, 30, generator=generator))
        self.bias = nn.Parameter(torch.randn(5 + index, generator=generator))
        self.frozen = nn.Parameter(torch.randn(3, generator=generator), requires_grad=False)
        self.register_buffer("count", torch.tensor(index + 100 * seed))
        self.extra = [index, seed]

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Stage(nn.Module):
    def __init__(self, names: dict[str, int], seed: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: Layer(index, seed) for name, index in names.items()})


def stage_run(stages: list[dict[str, int]], seed: int) -> tuple[Stage, ShardedAdamW]:
    """Stages on consecutive ranks, as often as there are ranks."""
    _, size = rank_and_size()
    shape = (size // len(stages), len(stages))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "pp")) if size > 1 else None
    model = Stage(stages[0 if mesh is None else mesh["pp"].get_local_rank()], seed)
    named = list(model.named_parameters())
    groups = [
        {"params": [(name, p) for name, p in named if p.ndim > 1]},
        {"params": [(name, p) for name, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = ShardedAdamW(
        groups,
        lr=0.01 if seed else 0.02,
        process_group=None if mesh is None else mesh["dp"],
        model_parallel_group=mesh["pp"] if mesh is not None and len(stages) > 1 else None,
        gradient_sync="step",
        bucket_mb=0.001,
    )
    for step in range(2):
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            generator = torch.Generator().manual_seed(1000 * seed + 10 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model, optimizer


def everything_of(model: nn.Module, optimizer: ShardedAdamW) -> Everything:
    found = {}
    for name, value in model.state_dict().items():
        found[name] = whole_of(value) if isinstance(value, Tensor) else torch.tensor(value)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found |= {f"{name}.{kind}": whole_of(v) for kind, v in optimizer.full_state(parameter).items()}
    found["lr"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    return found


def save_stages(directory: str, stages: list[dict[str, int]], load: str | None) -> Everything:
    model, optimizer = stage_run(stages, seed=1 if load is None else 2)
    if load is not None:
        shardadam.load(load, model=model, optimizer=optimizer)
    shardadam.save(directory, step=2, model=model, optimizer=optimizer)
    return everything_of(model, optimizer)


def stages_of(*sizes: int) -> list[dict[str, int]]:
    ends = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
    return [{str(index): index for index in range(*pair)} for pair in pairwise(ends)]


def test_pipeline_stages_move_between_ranks(tmp_path: Path) -> None:
    expected: Everything = {}
    load = None
    for number, (ranks, sizes) in enumerate([(4, (2, 2)), (2, (4,)), (4, (1, 1, 1, 1)), (4, (3, 1)), (1, (4,))]):
        directory = str(tmp_path / str(number))
        whole: Everything = {}
        for found in on_ranks(ranks, save_stages, directory, stages_of(*sizes), load):
            whole |= found
        expected = expected or whole
        assert len(whole) == 4 * (5 + 2 * 3) + 1
        assert differences(expected, whole) == []
        assert_written_once(directory)
        load = directory


def refusal(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except CheckpointError as error:
        return str(error)
    return ""


SAME_NAMES: dict[str, tuple[list[dict[str, int]], str]] = {
    "equal shapes": ([{"0": 0}, {"0": 0}], "written by ranks"),
    "other shapes": ([{"0": 0}, {"0": 1}], "found a tensor of shape (5, 30)"),
}


@pytest.mark.parametrize("how", SAME_NAMES)
def test_stages_that_call_different_layers_the_same_are_refused_on_all_ranks(tmp_path: Path, how: str) -> None:
    stages, words = SAME_NAMES[how]
    for message in on_ranks(4, refusal, save_stages, str(tmp_path), stages, None):
        assert words in message and "names in the whole model" in message, message
    assert not shardadam.has_checkpoint(tmp_path)


def test_a_stage_that_nobody_needs_is_named_on_all_ranks(tmp_path: Path) -> None:
    on_ranks(4, save_stages, str(tmp_path / "saved"), stages_of(2, 2), None)
    lacking = [{"0": 0, "1": 1}, {"2": 2}]
    for message in on_ranks(4, refusal, save_stages, str(tmp_path / "new"), lacking, str(tmp_path / "saved")):
        assert "Only in the checkpoint: model.layers.3.bias" in message
    more = [{"0": 0, "1": 1}, {"2": 2, "3": 3, "4": 4}]
    for message in on_ranks(4, refusal, save_stages, str(tmp_path / "new"), more, str(tmp_path / "saved")):
        assert "Missing in the checkpoint: model.layers.4.bias" in message


def save_unlike_groups(directory: str) -> None:
    model, optimizer = stage_run(stages_of(2, 2), seed=1)
    if rank_and_size()[0] % 2:
        optimizer.param_groups[1]["lr"] = 0.5
    shardadam.save(directory, step=2, model=model, optimizer=optimizer)


def test_stages_with_other_hyperparameters_are_refused_on_all_ranks(tmp_path: Path) -> None:
    """A checkpoint has one list of param groups."""
    for message in on_ranks(4, refusal, save_unlike_groups, str(tmp_path)):
        assert "lr of param group 1 is 0.01 on rank 0 and 0.5 on rank 1" in message


class Experts(nn.Module):
    """Of each expert a matrix of its own name, and a fused tensor of all."""

    def __init__(self, mesh: DeviceMesh, seed: int) -> None:
        super().__init__()
        ep, number = mesh["ep"].size(), mesh["ep"].get_local_rank()
        generator = torch.Generator().manual_seed(seed)
        self.router = nn.Parameter(torch.randn(4, 33, generator=generator))
        fused = torch.randn(4, 6, 5, generator=generator)
        if ep > 1:
            fused = distribute_tensor(fused, mesh["ep"], [Shard(0)])
        self.fused = nn.Parameter(fused)
        own = range(number * 4 // ep, (number + 1) * 4 // ep)
        matrices = [torch.randn(7, 20, generator=generator) for _ in range(4)]
        self.experts = nn.ParameterDict({str(index): nn.Parameter(matrices[index]) for index in own})


def save_experts(directory: str, ep: int, load: str | None) -> Everything:
    seed = 1 if load is None else 2
    _, size = rank_and_size()
    mesh = init_device_mesh("cpu", (size // ep, ep), mesh_dim_names=("edp", "ep"))
    model = Experts(mesh, seed)
    experts = [("fused", model.fused), *((f"experts.{index}", p) for index, p in model.experts.items())]
    groups: list[dict[str, Any]] = [{"params": [("router", model.router)]}, {"params": experts}]
    if ep > 1:
        groups[1]["process_group"] = mesh["edp"]
    optimizer = ShardedAdamW(groups, lr=0.01, gradient_sync="step", bucket_mb=0.001)
    for step in range(2):
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(1000 * seed + 10 * step + index)
            parameter.grad = like(parameter, torch.randn(local_tensor(parameter).shape, generator=generator))
        optimizer.step()
    if load is not None:
        shardadam.load(load, model=model, optimizer=optimizer)
    shardadam.save(directory, step=2, model=model, optimizer=optimizer)
    return everything_of(model, optimizer)


def test_experts_move_between_ranks(tmp_path: Path) -> None:
    expected: Everything = {}
    load = None
    for number, (ranks, ep) in enumerate([(4, 2), (4, 1), (4, 4), (2, 1), (2, 2)]):
        directory = str(tmp_path / str(number))
        whole: Everything = {}
        for found in on_ranks(ranks, save_experts, directory, ep, load):
            assert all(torch.equal(whole[name], found[name]) for name in whole.keys() & found.keys())
            whole |= found
        expected = expected or whole
        assert len(whole) == 6 * 4 + 1
        assert differences(expected, whole) == []
        assert_written_once(directory)
        load = directory


# Meshes of several dimensions


class ParallelStage(nn.Module):
    """Layers of a pipeline stage, tensor-parallel, with a parameter that all tensor-parallel ranks have alike."""

    def __init__(self, indices: range, mesh: DeviceMesh | None, seed: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for index in indices:
            generator = torch.Generator().manual_seed(10 * seed + index)
            layer = self.layers[str(index)] = nn.Module()
            for name, dim in (("up", 0), ("down", 1), ("norm", None)):
                value = torch.randn(6, 4 + index, generator=generator)
                if mesh is not None and dim is not None:
                    value = distribute_tensor(value, mesh, [Shard(dim)])
                layer.register_parameter(name, nn.Parameter(value))


def save_parallel_stages(directory: str, pp: int, tp: int, load: str | None) -> Everything:
    _, size = rank_and_size()
    seed = 1 if load is None else 2
    shape = (size // pp // tp, pp, tp)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "pp", "tp"))
    stage = mesh["pp"].get_local_rank()
    indices = range(stage * 4 // pp, (stage + 1) * 4 // pp)
    model = ParallelStage(indices, mesh["tp"] if tp > 1 else None, seed)
    optimizer = ShardedAdamW(
        model.named_parameters(),
        lr=0.01,
        process_group=mesh["dp"],
        model_parallel_group=mesh["pp", "tp"] if pp * tp > 1 else None,
        gradient_sync="step",
    )
    for step in range(2):
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(seed + step)
            parameter.grad = like(parameter, torch.randn(local_tensor(parameter).shape, generator=generator))
        optimizer.step()
    if load is not None:
        shardadam.load(load, model=model, optimizer=optimizer)
    shardadam.save(directory, step=2, model=model, optimizer=optimizer)
    return everything_of(model, optimizer)


def test_tensor_parallel_pipeline_stages_become_data_parallel_ranks_and_back(tmp_path: Path) -> None:
    expected: Everything = {}
    load = None
    for number, (ranks, pp, tp) in enumerate([(4, 2, 2), (2, 1, 1), (4, 1, 2), (4, 4, 1), (4, 2, 2)]):
        directory = str(tmp_path / str(number))
        whole: Everything = {}
        for found in on_ranks(ranks, save_parallel_stages, directory, pp, tp, load):
            assert all(torch.equal(whole[name], found[name]) for name in whole.keys() & found.keys())
            whole |= found
        expected = expected or whole
        assert differences(expected, whole) == []
        assert_written_once(directory)
        load = directory


def save_fully_sharded(directory: str, ranks: int, load: str | None) -> Everything:
    """With ``fully_shard``, where FSDP stores the parameters, on several ranks."""
    seed = 1 if load is None else 2
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 5, bias=False))
    for parameter in model.parameters():
        parameter.detach().copy_(torch.randn(parameter.shape, generator=generator))
    if ranks > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = ShardedAdamW(model.named_parameters(), lr=0.01, gradient_sync="external" if ranks > 1 else "backward")
    for step in range(2):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed + step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if load is not None:
        shardadam.load(load, model=model, optimizer=optimizer)
    shardadam.save(directory, step=2, model=model, optimizer=optimizer)
    return everything_of(model, optimizer)


def test_fully_sharded_models_go_to_other_numbers_of_ranks(tmp_path: Path) -> None:
    expected, load = None, None
    for number, ranks in enumerate([2, 1, 3, 2]):
        directory = str(tmp_path / str(number))
        for found in on_ranks(ranks, save_fully_sharded, directory, ranks, load):
            expected = expected or found
            assert differences(expected, found) == []
        assert_written_once(directory)
        load = directory


# Export


def test_export_writes_whole_tensors(tmp_path: Path) -> None:
    saved = on_ranks(4, save_placed, str(tmp_path), 2, INT8, None)[0]
    paths = export(tmp_path, format="torch", output=tmp_path / "torch")
    model, optimizer = (torch.load(path, weights_only=True) for path in paths)
    assert model.keys() == {name.removeprefix("model.") for name in saved if name.startswith("model.")}
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in model.items())
    run = PlacedRun(1, INT8)
    names = [name for name, _ in run.model.named_parameters()]
    for index, state in optimizer["state"].items():
        for kind, value in state.items():
            assert torch.equal(saved[f"{names[index]}.{kind}"], value), (names[index], kind)
    assert len(optimizer["state"]) == len(names) - 1
    torch.optim.AdamW(run.model.parameters()).load_state_dict(optimizer)
    assert len(export(tmp_path, format="safetensors", output=tmp_path / "safetensors")) == 2
