# SPDX-License-Identifier: Apache-2.0
"""Averages of the weights in checkpoints: saved, resharded, converted, exported, and read by DCP, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import shardadam
from shardadam import CheckpointError, ShardedAdamW
from shardadam.checkpoint import DcpReader
from shardadam.checkpoint.export import export
from shardadam.checkpoint.files import MANIFEST
from shardadam.checkpoint.schema import manifest_of
from shardadam.cli import main
from tests.ranks import on_ranks, rank_and_size
from tests.runs import FORMATS, build, differences

DECAY = 0.9
FP32, SPLIT, NONE = FORMATS[0], (torch.bfloat16, "int8", "split"), (torch.bfloat16, "bf16", "none")
Everything = dict[str, Tensor]


def save_run(directory: str, format: Any = FP32, decay: float | None = DECAY, width: int = 40) -> list[Everything]:
    """Save after three steps; return the state then, and two steps later."""
    run = build(format, width=width, ema_decay=decay, bucket_mb=0.003)
    run.train(range(3))
    shardadam.save(directory, step=3, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    found = [run.everything()]
    run.train(range(3, 5))
    return [*found, run.everything()]


def load_run(directory: str, format: Any = FP32, decay: float | None = DECAY, width: int = 40) -> list[Everything]:
    """Load into a run that has taken other steps."""
    run = build(format, width=width, seed=4, ema_decay=decay, bucket_mb=0.01)
    run.train(range(7, 9))
    shardadam.load(directory, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    found = [run.everything()]
    run.train(range(3, 5))
    return [*found, run.everything()]


def averages_in(everything: Everything) -> Everything:
    return {key: value for key, value in everything.items() if key.endswith(".average")}


def exact_weights(everything: Everything) -> Everything:
    """Return the exact weights by the keys of their averages."""
    names = [key.removesuffix(".exp_avg") for key in everything if key.endswith(".exp_avg")]
    return {f"{name}.average": everything.get(f"{name}.master", everything[f"model.{name}"]).float() for name in names}


@pytest.mark.parametrize("format", [FP32, SPLIT, NONE, (torch.float64, "fp32", "auto")], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 1)])
def test_averages_are_resharded_bit_for_bit(tmp_path: Path, n: int, m: int, format: Any) -> None:
    saved = on_ranks(n, save_run, str(tmp_path), format)[0][0]
    assert differences(averages_in(saved), exact_weights(saved)) != []
    for loaded in on_ranks(m, load_run, str(tmp_path), format):
        assert differences(saved, loaded[0]) == []


def test_training_with_averages_resumes_bit_for_bit(tmp_path: Path) -> None:
    saved = on_ranks(2, save_run, str(tmp_path), SPLIT)
    for before, after in zip(saved, on_ranks(2, load_run, str(tmp_path), SPLIT), strict=True):
        assert set(differences(before[1], after[1])) <= {
            "model.norm.running_mean",
            "model.norm.running_var",
        }  # rank 0's


@pytest.mark.parametrize(("one", "other"), [(FP32, SPLIT), (SPLIT, FP32), (NONE, SPLIT)], ids=str)
def test_averages_do_not_change_with_the_format(tmp_path: Path, one: Any, other: Any) -> None:
    saved = save_run(str(tmp_path), one)[0]
    assert differences(averages_in(saved), averages_in(load_run(str(tmp_path), other)[0])) == []


@pytest.mark.parametrize("format", [FP32, SPLIT], ids=str)
def test_a_checkpoint_without_averages_makes_the_weights_the_averages(tmp_path: Path, format: Any) -> None:
    on_ranks(2, save_run, str(tmp_path), format, None)
    for loaded, later in on_ranks(2, load_run, str(tmp_path), format):
        assert differences(averages_in(loaded), exact_weights(loaded)) == []
        assert all(int(value) == 0 for key, value in loaded.items() if key.endswith(".n_averaged"))
        assert all(int(value) == 2 for key, value in later.items() if key.endswith(".n_averaged"))


def test_an_optimizer_without_ema_decay_ignores_averages(tmp_path: Path) -> None:
    saved = on_ranks(2, save_run, str(tmp_path))[0][0]
    for loaded, _ in on_ranks(2, load_run, str(tmp_path), FP32, None):
        kept = {key: value for key, value in saved.items() if not key.endswith(("average", "n_averaged"))}
        assert differences(kept, loaded) == []


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no number of averages": lambda c: c["optimizer"]["parameters"]["first.bias"].pop("n_averaged"),
    "a fraction": lambda c: c["optimizer"]["parameters"]["first.bias"].update(n_averaged=1.5),
    "a negative number": lambda c: c["optimizer"]["parameters"]["first.bias"].update(n_averaged=-1),
    "no average": lambda c: c["index"]["tensors"].pop("optimizer.state.first.bias.average"),
    "another dtype": lambda c: c["index"]["tensors"]["optimizer.state.first.bias.average"].update(dtype="int32"),
    "another shape": lambda c: c["index"]["tensors"]["optimizer.state.first.bias.average"].update(shape=[2, 20]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_averages_that_do_not_fit_the_rest_are_refused(tmp_path: Path, change: str) -> None:
    save_run(str(tmp_path))
    (path,) = tmp_path.glob(f"*/{MANIFEST}")
    content = json.loads(path.read_text())["content"]
    manifest_of(content)
    CHANGES[change](content)
    with pytest.raises(ValueError, match=r"first\.bias"):
        manifest_of(content)


# Parts of DTensors


class Parted(nn.Module):
    def __init__(self, dim: int | None, seed: int) -> None:
        super().__init__()
        value = torch.randn(12, 34, generator=torch.Generator().manual_seed(seed))
        if dim is not None:
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
            value = distribute_tensor(value, mesh, [Shard(dim)])
        self.weight = nn.Parameter(value)


def save_or_load_parts(directory: str, dim: int | None, loads: bool) -> Tensor:
    model = Parted(dim, seed=int(loads))
    options: dict[str, Any] = {"gradient_sync": "step", "ema_decay": DECAY, "bucket_mb": 0.001}
    if dim is not None:
        options["process_group"] = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "dp"))["dp"]
    optimizer = ShardedAdamW(model.parameters(), lr=0.1, **options)
    if loads:
        shardadam.load(directory, model=model, optimizer=optimizer)
    else:
        for step in range(3):
            gradient = torch.randn(12, 34, generator=torch.Generator().manual_seed(step + 5))
            if isinstance(model.weight, DTensor):
                gradient = distribute_tensor(gradient, model.weight.device_mesh, model.weight.placements)
            model.weight.grad = gradient
            optimizer.step()
        shardadam.save(directory, step=3, model=model, optimizer=optimizer)
    average = optimizer.full_state(model.weight)["average"]
    return average.redistribute(placements=[Replicate()]).to_local() if isinstance(average, DTensor) else average


@pytest.mark.parametrize(("dims", "ranks"), [((0, 1), (2, 2)), ((1, None), (2, 1)), ((None, 0), (1, 2))], ids=str)
def test_averages_of_parts_load_in_other_parts(tmp_path: Path, dims: Any, ranks: Any) -> None:
    saved = on_ranks(ranks[0], save_or_load_parts, str(tmp_path), dims[0], False)
    loaded = on_ranks(ranks[1], save_or_load_parts, str(tmp_path), dims[1], True)
    assert all(torch.equal(one, saved[0]) for one in (*saved, *loaded))


# Exports


def export_ema(directory: str, format: str) -> tuple[Everything, Everything]:
    run = build((torch.bfloat16, "fp32", "split"), width=40, ema_decay=DECAY, bucket_mb=0.003)
    run.train(range(3))
    shardadam.save(directory, step=3, model=run.model, optimizer=run.optimizer)
    trained = {name: value.clone() for name, value in run.model.state_dict().items()}
    with run.optimizer.averaged_parameters():
        averaged = {name: value.clone() for name, value in run.model.state_dict().items()}
    return trained, averaged


@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_averages_are_exported_as_the_model(tmp_path: Path, format: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    trained, averaged = on_ranks(2, export_ema, str(tmp_path), format)[0]
    output = tmp_path / "ema"
    assert main(["export", str(tmp_path), "--format", format, "--output", str(output), "--weights", "ema"]) == 0
    suffix = "pt" if format == "torch" else "safetensors"
    assert [path.name for path in output.iterdir()] == [f"model.{suffix}"]
    found = torch.load(output / "model.pt") if suffix == "pt" else safetensors.load_file(output / "model.safetensors")
    expected = dict(averaged)
    if suffix == "pt":
        assert found["tied.weight"].data_ptr() == found["again.weight"].data_ptr()
    else:
        del expected["again.weight"], trained["again.weight"]  # an alias
    assert differences(expected, found) == []
    different = set(differences(trained, found))
    assert {"first.weight", "tied.weight", "scale"} <= different
    assert not different & {"frozen.weight", "norm.running_mean", "norm.num_batches_tracked"}


def test_the_state_of_averages_is_exported_for_adamw(tmp_path: Path) -> None:
    saved = on_ranks(2, save_run, str(tmp_path), SPLIT)[0][0]
    export(tmp_path, format="torch", output=tmp_path / "exported")
    state = torch.load(tmp_path / "exported/optimizer.pt")["state"]
    averages = list(averages_in(saved).values())
    found = [entry["average"] for entry in state.values()]
    assert sum(any(torch.equal(a, b) for b in averages) for a in found) == len(found) == len(averages)
    assert all(int(entry["n_averaged"]) == 3 for entry in state.values())
    run = build(SPLIT, width=40, seed=4, ema_decay=DECAY, bucket_mb=0.003)
    run.model.load_state_dict(torch.load(tmp_path / "exported/model.pt"))
    run.optimizer.load_state_dict(torch.load(tmp_path / "exported/optimizer.pt"))
    loaded = run.everything()
    assert differences(averages_in(saved), averages_in(loaded)) == []


def test_a_checkpoint_without_averages_has_none_to_export(tmp_path: Path) -> None:
    save_run(str(tmp_path), FP32, None)
    with pytest.raises(CheckpointError, match=r"no average of '.*', expected those of all trained parameters"):
        export(tmp_path, format="torch", output=tmp_path / "ema", weights="ema")
    assert not (tmp_path / "ema").exists()
    with pytest.raises(ValueError, match="weights: found 'best'"):
        export(tmp_path, format="torch", output=tmp_path / "ema", weights="best")  # type: ignore[arg-type]


def test_inspect_lists_averages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(str(tmp_path))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    kinds = {entry["kind"]: entry for entry in json.loads(capsys.readouterr().out)["tensors"]}
    assert kinds["average"]["elements"] == kinds["exp_avg"]["elements"] and kinds["average"]["dtype"] == "float32"


# torch.distributed.checkpoint


def save_by_dcp(directory: str, format: Any, flat: bool) -> Everything:
    run = build(format, width=40, ema_decay=DECAY, bucket_mb=0.003)
    run.train(range(3))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer = get_optimizer_state_dict(run.model, run.optimizer, options=options)
    state = {"model": run.model.state_dict(), "optimizer": optimizer}
    dcp.save(state, checkpoint_id=directory, no_dist=rank_and_size()[1] == 1)
    return run.everything()


def load_by_dcp(directory: str, format: Any, flat: bool) -> Everything:
    run = build(format, width=40, seed=4, ema_decay=DECAY, bucket_mb=0.01)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer = get_optimizer_state_dict(run.model, run.optimizer, options=options)
    state = {"model": run.model.state_dict(), "optimizer": optimizer}
    dcp.load(state, checkpoint_id=directory, no_dist=rank_and_size()[1] == 1)
    run.model.load_state_dict(state["model"])
    set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=options)
    return run.everything()


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 1)])
def test_averages_go_through_dcp(tmp_path: Path, n: int, m: int, flat: bool) -> None:
    format = (torch.bfloat16, "fp32", "split")
    saved = on_ranks(n, save_by_dcp, str(tmp_path), format, flat)[0]
    for loaded in on_ranks(m, load_by_dcp, str(tmp_path), format, flat):
        pairs = [{k: v for k, v in one.items() if "averag" in k} for one in (saved, loaded)]
        assert len(pairs[0]) > 10
        assert differences(*pairs) == []


def test_dcp_reads_single_averages_of_a_checkpoint(tmp_path: Path) -> None:
    saved = on_ranks(2, save_run, str(tmp_path), SPLIT)[0][0]
    average = torch.zeros_like(saved["tied.weight.average"])
    entry = {"average": average, "n_averaged": torch.tensor(0)}
    wanted: Any = {"optimizer": {"state": {"tied.weight": entry}}}
    dcp.load(wanted, storage_reader=DcpReader(tmp_path), no_dist=True)
    assert torch.equal(average, saved["tied.weight.average"])
    assert int(entry["n_averaged"]) == 3
