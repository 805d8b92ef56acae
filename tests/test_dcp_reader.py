# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint loads checkpoints of shardadam.save into FSDP2 and plain modules, on any ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
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

import shardadam
from shardadam import Precision, ShardedAdamW
from shardadam.checkpoint import DcpReader, files
from tests.parity import build_parameters, quadratic
from tests.ranks import on_ranks, rank_and_size
from tests.runs import differences
from tests.test_checkpoint_safety import Malicious, replace_object

SHAPES = {"matrix": (7, 15), "vector": (129,), "convolution": (4, 3, 5, 2), "large": (45, 101)}
AWKWARD = {**SHAPES, "scalar": (), "empty": (0, 3), "frozen": (5,)}
FORMATS = [
    (torch.float32, "fp32", "auto"),
    (torch.float32, "bf16", "auto"),
    (torch.float32, "int8", "auto"),
    (torch.float64, "fp32", "auto"),
    (torch.bfloat16, "int8", "split"),
]
WAYS = {"by name": StateDictOptions(), "flattened": StateDictOptions(flatten_optimizer_state_dict=True)}


class Net(nn.Module):
    """``tied`` and ``large`` are one parameter; with ``frozen`` in ``shapes``, the convolution is channels_last."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        for (name, shape), value in zip(shapes.items(), build_parameters(list(shapes.values()), seed), strict=True):
            channels_last = len(shape) == 4 and "frozen" in shapes
            memory_format = torch.channels_last if channels_last else torch.preserve_format
            self.register_parameter(name, nn.Parameter(value.detach().to(dtype, memory_format=memory_format)))
            self.get_parameter(name).requires_grad_(name != "frozen")
        if "frozen" in shapes:
            self.tied = self.large
            self.register_buffer("count", torch.tensor(7 - seed))

    def forward(self, rank: int, step: int) -> Tensor:
        return quadratic([p for p in self.parameters() if p.requires_grad], rank, step)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": named[:2]}, {"params": named[2:], "lr": 5e-3, "betas": (0.8, 0.9)}]


def everything(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return everything as whole tensors, with decoded moments. Collective."""
    found = {f"model.{name}": whole(value) for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours = isinstance(optimizer, ShardedAdamW)
            state = optimizer.full_state(parameter) if ours else optimizer.state[parameter]
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                found[f"{name}.{kind}"] = whole(state[kind])
    found["hyperparameters"] = torch.tensor([[g["lr"], *g["betas"], g["weight_decay"]] for g in optimizer.param_groups])
    return found


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def save(directory: str, shapes: Any, format: Any = FORMATS[0], item_bytes: int = 512) -> list[dict[str, Tensor]]:
    """Save after 3 steps; return everything then and after 3 more."""
    dtype, moments, master = format
    model = Net(shapes, dtype)
    precision = Precision(moments=moments, master=master)
    optimizer = ShardedAdamW(groups_of(model), lr=1e-2, weight_decay=0.2, precision=precision, bucket_mb=0.002)
    train(model, optimizer, range(3))
    whole_item, files.ITEM_BYTES = files.ITEM_BYTES, item_bytes  # many items
    try:
        shardadam.save(directory, step=3, model=model, optimizer=optimizer)
    finally:
        files.ITEM_BYTES = whole_item
    before = everything(model, optimizer)
    train(model, optimizer, range(3, 6))
    return [before, everything(model, optimizer)]


def train(model: Any, optimizer: Any, steps: range, *, ranks: int | None = None) -> None:
    """Train on this rank's loss, or, where ``ranks`` is given, on the mean over all."""
    for step in steps:
        for rank in [rank_and_size()[0]] if ranks is None else range(ranks):
            (model(rank, step) / (ranks or 1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def read(model: nn.Module, directory: str, way: str) -> Any:
    """Load into ``model`` and a new AdamW with other hyperparameters; return the AdamW."""
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.5, weight_decay=0.7)
    found = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=WAYS[way]),
    }
    dcp.load(found, storage_reader=DcpReader(directory), no_dist=not dist.is_initialized())
    set_model_state_dict(model, found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"], options=WAYS[way])
    return optimizer


def load_fsdp(directory: str, way: str, ranks_of_training: int) -> list[dict[str, Tensor]]:
    model = Net(SHAPES, seed=4)
    size = rank_and_size()[1]
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizer = read(model, directory, way)
    before = everything(model, optimizer)
    train(model, optimizer, range(3, 6), ranks=None if size == ranks_of_training else ranks_of_training)
    return [before, everything(model, optimizer)]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 2), (1, 2), (2, 3)])
def test_loads_into_fsdp2_bit_for_bit_and_continues_training(tmp_path: Path, n: int, m: int, way: str) -> None:
    saved = on_ranks(n, save, str(tmp_path), SHAPES)[0]
    for loaded in on_ranks(m, load_fsdp, str(tmp_path), way, n):
        assert differences(saved[0], loaded[0]) == []
        assert_close(saved[1], loaded[1])


def assert_close(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_loads_into_plain_modules_and_adamw(tmp_path: Path, world_size: int, format: Any, way: str) -> None:
    """8-bit moments are decoded; torch's AdamW keeps its state in the parameter's dtype."""
    saved = on_ranks(world_size, save, str(tmp_path), AWKWARD, format)[0]
    model = Net(AWKWARD, format[0], seed=4)
    optimizer = read(model, str(tmp_path), way)
    loaded = everything(model, optimizer)
    if format[0] == torch.bfloat16:
        saved[0] = {
            k: v.to(torch.bfloat16) if k.partition(".")[2].startswith("exp") else v for k, v in saved[0].items()
        }
    assert differences(saved[0], loaded) == []
    if format == FORMATS[0]:
        train(model, optimizer, range(3, 6), ranks=world_size)
        assert_close(saved[1], everything(model, optimizer))


def test_single_entries_can_be_loaded_masters_included(tmp_path: Path) -> None:
    on_ranks(2, save, str(tmp_path), AWKWARD, FORMATS[-1])
    wanted: Any = {
        "model": {"tied": torch.zeros(45, 101), "convolution": torch.zeros(4, 3, 5, 2)},
        "optimizer": {"state": {"convolution": {"master": torch.zeros(4, 3, 5, 2), "step": torch.zeros(())}}},
    }
    dcp.load(wanted, storage_reader=DcpReader(tmp_path / "step-00000003"), no_dist=True)
    state = wanted["optimizer"]["state"]["convolution"]
    assert state["step"] == 3
    torch.testing.assert_close(state["master"], wanted["model"]["convolution"], rtol=2**-8, atol=0)
    assert not torch.equal(state["master"], wanted["model"]["convolution"])
    with pytest.raises(dcp.CheckpointException, match=r"shardadam\.load"):
        dcp.load(
            {"optimizer.state.large.exp_avg": torch.zeros(45, 101, dtype=torch.int8)},
            storage_reader=DcpReader(tmp_path),
            no_dist=True,
        )


# Before torch 2.13 dcp.load hides why metadata could not be read.
NAMES_THE_CAUSE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def load_damaged(directory: str) -> str:
    try:
        load_fsdp(directory, "by name", 2)
    except dcp.CheckpointException as error:
        return str(error)
    return "nothing"


def test_all_ranks_name_a_damaged_file(tmp_path: Path) -> None:
    on_ranks(2, save, str(tmp_path), SHAPES)
    path = tmp_path / "step-00000003" / "rank-00001.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    for message in on_ranks(2, load_damaged, str(tmp_path)):
        assert "rank-00001.bin is damaged" in message
    path.unlink()
    for message in on_ranks(2, load_damaged, str(tmp_path)):
        assert ("rank-00001.bin cannot be read" if NAMES_THE_CAUSE else "metadata is None") in message


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    save(str(tmp_path), SHAPES)
    trap = tmp_path / "it ran"
    torch.save([{"lr": Malicious(trap)}], tmp_path / "payload")
    replace_object(tmp_path / "step-00000003", "optimizer.param_groups", (tmp_path / "payload").read_bytes())
    with pytest.raises(dcp.CheckpointException, match="running code" if NAMES_THE_CAUSE else "metadata is None"):
        read(Net(SHAPES), str(tmp_path), "by name")
    assert not trap.exists()
