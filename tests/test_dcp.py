# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint (DCP) without shardadam.save: a state saved on N ranks loads on any M, through every
interface of DCP for optimizers, and to and from torch's AdamW and FSDP2."""

from __future__ import annotations

import itertools
import math
from itertools import product
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardadam import Precision, ShardedAdamW
from shardadam.layout import Span
from shardadam.state import flat_shard
from shardadam.state.flat_shard import FlatShard, boxes
from tests.parity import LR, build_parameters, quadratic
from tests.ranks import on_ranks, rank_and_size
from tests.runs import differences

Everything = dict[str, Tensor]

SHAPES = {
    "scalar": (),
    "empty": (0, 3),
    "matrix": (7, 15),
    "vector": (129,),
    "convolution": (4, 3, 5, 2),
    "large": (45, 101),
    "frozen": (5,),
}
FSDP_SHAPES = {name: SHAPES[name] for name in ("matrix", "vector", "convolution", "large")}
FORMATS = [
    (torch.float32, "fp32", "auto"),
    (torch.float32, "bf16", "auto"),
    (torch.float32, "int8", "auto"),
    (torch.bfloat16, "fp32", "fp32"),
    (torch.bfloat16, "fp32", "split"),
    (torch.bfloat16, "int8", "split"),
]
FP32 = FORMATS[0]
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Net(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        for (name, shape), value in zip(shapes.items(), build_parameters(list(shapes.values()), seed), strict=True):
            layout = torch.channels_last if len(shape) == 4 and shapes is SHAPES else torch.preserve_format
            self.register_parameter(name, nn.Parameter(value.detach().to(dtype, memory_format=layout)))
            self.get_parameter(name).requires_grad_(name != "frozen")

    def forward(self, rank: int, step: int) -> Tensor:
        return quadratic([p for p in self.parameters() if p.requires_grad], rank, step)


class Run:
    """A training run. ``optimizer`` is a class or function that takes a list of param groups."""

    def __init__(self, model: nn.Module, optimizer: Any = torch.optim.AdamW, **options: Any) -> None:
        parameters = list(model.parameters())
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": LR / 2, "betas": (0.8, 0.9)}]
        self.model, self.optimizer = model, optimizer(groups, lr=LR, **options)

    def train(self, steps: range) -> Run:
        for step in steps:
            self.model(rank_and_size()[0], step).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def everything(self) -> Everything:
        """Return whole parameters and state, and hyperparameters. Collective."""
        found = {f"model.{name}": whole(p) for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                is_ours = isinstance(self.optimizer, ShardedAdamW)
                state = self.optimizer.full_state(parameter) if is_ours else self.optimizer.state[parameter]
                found |= {f"{name}.{kind}": whole(value) for kind, value in state.items()}
        found["hyperparameters"] = torch.tensor([[g["lr"], *g["betas"]] for g in self.optimizer.param_groups])
        return found


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def ours(format: Any = FP32, bucket_mb: float = 0.002, shapes: Any = SHAPES, seed: int = 0) -> Run:
    dtype, moments, master = format
    precision = Precision(moments=moments, master=master)
    return Run(Net(shapes, dtype, seed), ShardedAdamW, bucket_mb=bucket_mb, precision=precision)


def with_other_hyperparameters(run: Run) -> Run:
    """Set hyperparameters that loading must replace."""
    for group in run.optimizer.param_groups:
        group.update(lr=0.5, betas=(0.1, 0.2))
    return run


# DCP's interfaces for optimizers


def contents(run: Run, way: str) -> dict[str, Any]:
    if way == "stateful":
        return {"model": run.model, "optimizer": run.optimizer}
    if way in ("by name", "flattened"):
        options = FLAT if way == "flattened" else None
        return {
            "model": get_model_state_dict(run.model),
            "optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=options),
        }
    return {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}


def write(run: Run, directory: str, way: str) -> None:
    dcp.save(contents(run, way), checkpoint_id=directory, no_dist=not dist.is_initialized())


def read(run: Run, directory: str, way: str) -> None:
    found = contents(run, way)
    dcp.load(found, checkpoint_id=directory, no_dist=not dist.is_initialized())
    if way in ("by name", "flattened"):
        options = FLAT if way == "flattened" else None
        set_model_state_dict(run.model, found["model"])
        set_optimizer_state_dict(run.model, run.optimizer, found["optimizer"], options=options)
    elif way != "stateful":
        run.model.load_state_dict(found["model"])
        run.optimizer.load_state_dict(found["optimizer"])


def save(directory: str, way: str, *arguments: Any) -> list[Everything]:
    """Save, and return everything as saved and after one more step."""
    run = ours(*arguments).train(range(3))
    if way == "asynchronous":
        found = [run.everything()]
        future: Any = dcp.async_save(
            contents(run, way), checkpoint_id=directory, process_group=dist.new_group(backend="gloo")
        )
        found.append(run.train(range(3, 4)).everything())  # while it is being written
        future.result()
        return found
    write(run, directory, way)
    return [run.everything(), run.train(range(3, 4)).everything()]


def load(directory: str, way: str, *arguments: Any) -> list[Everything]:
    run = with_other_hyperparameters(ours(*arguments, SHAPES, 4)).train(range(1))
    read(run, directory, way)
    return [run.everything(), run.train(range(3, 4)).everything()]


def assert_loads(directory: Path, way: str, n: int, m: int, saved_as: Any = FP32, loaded_as: Any = FP32) -> None:
    saved = on_ranks(n, save, str(directory), way, saved_as, 0.002)[0]
    assert len(saved[0]) == 7 + 6 * (3 + (saved_as[2] in ("fp32", "split"))) + 1
    for loaded in on_ranks(m, load, str(directory), way, loaded_as, 0.004 if m % 2 else 32.0):
        assert differences(saved[0], loaded[0]) == []
        assert n != m or differences(saved[1], loaded[1]) == []


PAIRS = list(product(range(1, 5), range(1, 5)))


@pytest.mark.sweep(4)
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("n", "m"), PAIRS)
def test_a_state_dict_saved_on_n_ranks_loads_on_m_bit_for_bit(tmp_path: Path, n: int, m: int, format: Any) -> None:
    assert_loads(tmp_path, "state_dict", n, m, format, format)


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("n", "m"), PAIRS)
@pytest.mark.parametrize("way", ["stateful", "by name", "flattened"])
def test_reshards_through_every_dcp_interface(tmp_path: Path, way: str, n: int, m: int) -> None:
    assert_loads(tmp_path, way, n, m)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("way", ["stateful", "by name", "flattened"])
@pytest.mark.parametrize("format", FORMATS[2:], ids=str)
def test_every_format_round_trips_through_every_dcp_interface(tmp_path: Path, format: Any, way: str) -> None:
    assert_loads(tmp_path, way, 2, 2, format, format)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 2)])
def test_async_save_saves_the_state_at_the_time_of_the_call(tmp_path: Path, n: int, m: int) -> None:
    assert_loads(tmp_path, "asynchronous", n, m)


@pytest.mark.parametrize("way", ["state_dict", "by name", "flattened"])
@pytest.mark.parametrize(("saved_as", "loaded_as"), [FORMATS[3:5], FORMATS[4:2:-1]], ids=str)
def test_split_and_fp32_masters_load_from_each_others_files(
    tmp_path: Path, saved_as: Any, loaded_as: Any, way: str
) -> None:
    assert_loads(tmp_path, way, 2, 2, saved_as, loaded_as)


def test_moments_in_bf16_are_read_as_fp32(tmp_path: Path) -> None:
    assert_loads(tmp_path, "state_dict", 2, 3, FORMATS[1], FP32)


def refuse(directory: str, way: str, format: Any) -> tuple[str, bool]:
    run = ours(format)
    before = run.everything()
    try:
        read(run, directory, way)
    except dcp.api.CheckpointException as error:
        return str(error), differences(before, run.everything()) == []
    return "", False


@pytest.mark.sweep(3)
@pytest.mark.parametrize("way", ["state_dict", "flattened"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("saved_as", "loaded_as"), [(FORMATS[2], FP32), (FP32, FORMATS[2])], ids=str)
def test_int8_codes_are_not_loaded_as_moments(
    tmp_path: Path, saved_as: Any, loaded_as: Any, world_size: int, way: str
) -> None:
    """DCP silently copies between dtypes, so int8 codes were once loaded as moments."""
    on_ranks(world_size, save, str(tmp_path), way, saved_as)
    for words, is_unchanged in on_ranks(world_size, refuse, str(tmp_path), way, loaded_as):
        assert "Missing key in checkpoint state_dict" in words and "exp_avg" in words
        assert is_unchanged


# torch's AdamW, FSDP2, and one file


@pytest.mark.sweep(3)
@pytest.mark.parametrize("way", ["state_dict", "by name", "flattened"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_torchs_adamw_loads_our_checkpoint_and_we_load_its(tmp_path: Path, world_size: int, way: str) -> None:
    saved = on_ranks(world_size, save, str(tmp_path / "ours"), way)[0][0]
    plain = with_other_hyperparameters(Run(Net(seed=4))).train(range(1))
    read(plain, str(tmp_path / "ours"), way)
    assert differences(saved, plain.everything()) == []

    plain.train(range(3, 5))
    write(plain, str(tmp_path / "plain"), way)
    expected = plain.everything()
    for loaded in on_ranks(world_size, load, str(tmp_path / "plain"), way, FP32, 0.002):
        assert differences(expected, loaded[0]) == []


def fsdp(seed: int) -> Run:
    model = Net(FSDP_SHAPES, seed=seed)
    fully_shard(model, mesh=init_device_mesh("cpu", (rank_and_size()[1],)))
    return Run(model)


def save_fsdp(directory: str, way: str) -> Everything:
    run = fsdp(0).train(range(3))
    write(run, directory, way)
    return run.everything()


def load_fsdp(directory: str, way: str) -> Everything:
    run = with_other_hyperparameters(fsdp(4)).train(range(1))
    read(run, directory, way)
    return run.everything()


@pytest.mark.sweep(3)
@pytest.mark.parametrize("way", ["by name", "flattened"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_fsdp2_loads_our_checkpoint_and_we_load_its(tmp_path: Path, world_size: int, way: str) -> None:
    saved = on_ranks(world_size, save, str(tmp_path / "ours"), way, FP32, 0.002, FSDP_SHAPES)[0][0]
    for loaded in on_ranks(2, load_fsdp, str(tmp_path / "ours"), way):
        assert differences(saved, loaded) == []
    saved = on_ranks(2, save_fsdp, str(tmp_path / "fsdp"), way)[0]
    for loaded in on_ranks(world_size, load_shapes_of_fsdp, str(tmp_path / "fsdp"), way):
        assert differences(saved, loaded) == []


def load_shapes_of_fsdp(directory: str, way: str) -> Everything:
    run = with_other_hyperparameters(ours(FP32, 0.002, FSDP_SHAPES, 4)).train(range(1))
    read(run, directory, way)
    return run.everything()


def test_dcp_to_torch_save_gives_whole_tensors(tmp_path: Path) -> None:
    saved = on_ranks(2, save, str(tmp_path / "shards"), "by name")[0][0]
    dcp_to_torch_save(tmp_path / "shards", tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt", weights_only=True)["optimizer"]["state"]
    assert (
        differences(
            {key: value for key, value in saved.items() if not key.startswith(("model.", "hyper"))},
            {f"{name}.{kind}": value for name, state in found.items() for kind, value in state.items()},
        )
        == []
    )


# Boxes

shapes = st.lists(st.integers(1, 5), max_size=5)


@given(shapes, st.data())
def test_the_boxes_of_a_span_cover_it_once_in_order(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    positions = torch.arange(numel).view(shape)
    found = list(boxes(Span(start, stop - start), shape, range(len(shape))))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    inside = [tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True)) for box in found]
    assert [place for box in inside for place in positions[box].flatten().tolist()] == list(range(start, stop))


@given(shapes, st.integers(1, 40), st.data())
def test_the_parts_of_a_flat_shard_are_views_at_the_right_offsets(
    shape: list[int], item_numel: int, data: st.DataObject
) -> None:
    """For any order of dimensions, and any place in a larger tensor, cut at the boundaries of items.

    In each dimension, the part may have two runs of the whole.
    """
    numel = math.prod(shape)
    runs = []
    for size in shape:
        first, at, gap = data.draw(st.integers(1, size)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2))
        second = ((at + first + gap, size - first),) if first < size else ()
        runs.append(((at, first), *second))
    whole = [sum(of_dim[-1]) + data.draw(st.integers(0, 3)) for of_dim in runs]
    order = data.draw(st.permutations(range(len(shape))))
    ends = sorted(data.draw(st.sets(st.integers(0, numel), max_size=6)))
    spans = [Span(start, stop - start) for start, stop in itertools.pairwise(ends)][::2]
    flat = torch.arange(numel)
    in_memory = flat.view([shape[dim] for dim in order])
    positions = in_memory.permute([order.index(dim) for dim in range(len(shape))])
    local = torch.cat([flat[:0], *(flat[span.start :][: span.numel] for span in spans)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat_shard, "ITEM_BYTES", item_numel * flat.itemsize)
        shard = FlatShard(local, spans, whole, order, tuple(runs))
        assert list(shard.shape) == whole
        in_whole = torch.full(whole, -1)
        indices = [[i for at, length in of_dim for i in range(at, at + length)] for of_dim in runs]
        in_whole[tuple(torch.meshgrid(*map(torch.tensor, indices), indexing="ij")) if shape else ...] = positions
        for item in shard.__create_write_items__("p", shard):
            chunk = item.tensor_data.chunk  # type: ignore[union-attr]
            place = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            part = shard.__get_tensor_shard__(item.index)
            assert torch.equal(part, in_whole[place]) and chunk.sizes.numel() <= item_numel
            part.fill_(-1)
    assert (local == -1).all()
