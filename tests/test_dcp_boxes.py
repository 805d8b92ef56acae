# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint (DCP) on DTensor parameters: the state goes from any mesh to any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from shardadam.checkpoint import DcpReader
from shardadam.state.flat_shard import FlatShard
from tests.ranks import on_ranks
from tests.runs import differences
from tests.test_checkpoint_meshes import EXACT, INT8, Everything, PlacedRun, save_placed
from tests.test_checkpoint_meshes import SHAPES as ALL_SHAPES

SHAPES = {name: where for name, where in ALL_SHAPES.items() if name != "fused"}
"""DCP does not know where the values of a DTensor with ``_StridedShard`` lie, the model's own among them."""

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
WAYS = ["state_dict", "by name", "flattened"]


def contents(run: PlacedRun, way: str) -> dict[str, Any]:
    if way == "state_dict":
        return {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    options = FLAT if way == "flattened" else None
    return {
        "model": get_model_state_dict(run.model),
        "optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=options),
    }


def read(run: PlacedRun, way: str, reader: Any) -> None:
    found = contents(run, way)
    dcp.load(found, storage_reader=reader, no_dist=not dist.is_initialized())
    if way == "state_dict":
        run.model.load_state_dict(found["model"])
        run.optimizer.load_state_dict(found["optimizer"])
    else:
        options = FLAT if way == "flattened" else None
        set_model_state_dict(run.model, found["model"])
        set_optimizer_state_dict(run.model, run.optimizer, found["optimizer"], options=options)


def save(directory: str, way: str, tp: int, format: Any, load: str | None) -> Everything:
    run = PlacedRun(tp, format, seed=1 if load is None else 2, shapes=SHAPES).train(range(3 if load is None else 1))
    if load is not None:
        read(run, way, dcp.FileSystemReader(load))
    dcp.save(contents(run, way), checkpoint_id=directory, no_dist=not dist.is_initialized())
    return run.everything()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("format", EXACT, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_state_goes_from_any_mesh_to_any_other_and_back(tmp_path: Path, way: str, format: Any) -> None:
    expected, load = None, None
    for number, (ranks, tp) in enumerate([(4, 2), (3, 1), (2, 2), (4, 2)]):
        directory = str(tmp_path / str(number))
        for found in on_ranks(ranks, save, directory, way, tp, format, load):
            expected = expected or found
            assert differences(expected, found) == []
        load = directory


def test_codes_go_to_the_same_boxes_on_other_data_parallel_ranks(tmp_path: Path) -> None:
    """Their scales have as many blocks as there are in all boxes, so boxes of other sizes do not fit."""
    saved = on_ranks(4, save, str(tmp_path / "4"), "state_dict", 2, INT8, None)[0]
    for found in on_ranks(2, save, str(tmp_path / "2"), "state_dict", 2, INT8, str(tmp_path / "4")):
        assert differences(saved, found) == []


def load_by_reader(directory: str, tp: int, format: Any) -> Everything:
    run = PlacedRun(tp, format, seed=2, shapes=SHAPES).train(range(1))
    read(run, "by name", DcpReader(directory))
    return run.everything()


def test_dcp_reads_checkpoints_of_save_into_any_mesh(tmp_path: Path) -> None:
    saved = on_ranks(4, save_placed, str(tmp_path), 2, EXACT[0], None, SHAPES)[0]
    for ranks, tp in ((2, 2), (3, 1)):
        for found in on_ranks(ranks, load_by_reader, str(tmp_path), tp, EXACT[0]):
            assert differences(saved, found) == []


def test_dcp_decodes_codes_of_boxes(tmp_path: Path) -> None:
    saved = on_ranks(4, save_placed, str(tmp_path), 2, INT8, None, SHAPES)[0]
    for found in on_ranks(2, load_by_reader, str(tmp_path), 2, (torch.bfloat16, "fp32", "split")):
        assert differences(saved, found) == []


def kinds(tp: int) -> tuple[set[str], tuple[bool, bool]]:
    run = PlacedRun(tp).train(range(1))
    state = run.optimizer.state_dict()["state"]
    names = [name for name, _ in run.model.named_parameters()]
    tensors = {name: state[index]["exp_avg"] for index, name in enumerate(names) if index in state}
    for name, tensor in tensors.items():
        assert tensor.shape == run.model.get_parameter(name).shape
    loaded = run.optimizer.full_state(run.model.rows)
    run.optimizer.load_state_dict(run.optimizer.state_dict())  # its own
    again = run.optimizer.full_state(run.model.rows)
    same = all(torch.equal(loaded[kind].full_tensor(), again[kind].full_tensor()) for kind in ("exp_avg", "exp_avg_sq"))
    placements_fit = all(
        not isinstance(tensor, DTensor) or tensor.placements == run.model.get_parameter(name).placements
        for name, tensor in tensors.items()
    )
    found = {type(tensors[name]).__name__ for name in ("rows", "columns", "norm")}
    return found, (same, placements_fit)


def test_on_one_data_parallel_rank_the_state_is_placed_like_the_parameter() -> None:
    for found, checks in on_ranks(2, kinds, 2):
        assert found == {"DTensor"} and all(checks)
    for found, checks in on_ranks(4, kinds, 2):
        assert found == {FlatShard.__name__} and all(checks)


def load_whole(directory: str) -> Everything:
    """A whole state dict of torch's form into sharded parameters."""
    run = PlacedRun(2, seed=2).train(range(1))
    whole = torch.load(Path(directory) / "whole.pt", weights_only=True)
    run.optimizer.load_state_dict(whole)
    return {name: value for name, value in run.everything().items() if "exp_avg" in name}


def test_each_rank_takes_its_box_of_whole_tensors(tmp_path: Path) -> None:
    run = PlacedRun(1, seed=1).train(range(3))
    torch.save(run.optimizer.full_state_dict(), tmp_path / "whole.pt")
    expected = {name: value for name, value in run.everything().items() if "exp_avg" in name}
    for found in on_ranks(4, load_whole, str(tmp_path)):
        assert differences(expected, found) == []
