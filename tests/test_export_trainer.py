# SPDX-License-Identifier: Apache-2.0
"""``shardadam export --format trainer``: a plain Trainer with DDP and torch's AdamW goes on where a ShardedTrainer
stopped.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shardadam import CheckpointError, Precision, ShardedAdamW
from shardadam.checkpoint.export import export
from shardadam.cli import main
from tests.ranks import on_ranks

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from tests.test_transformers import largest_difference, runs

pytestmark = pytest.mark.scripts
OPTIONS: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup", "dropout": 0.1}
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 6}
MOMENTS = ("exp_avg", "exp_avg_sq")


def stopped(out: Path, **options: Any) -> tuple[list[dict[str, Any]], Path]:
    return runs("sharded", out, **OPTIONS, **SAVING, **options), out / "checkpoint-6"


def test_a_plain_trainer_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, checkpoint = stopped(tmp_path / "a")
    assert main(["export", str(checkpoint), "--format", "trainer"]) == 0
    assert str(checkpoint / "optimizer.pt") in capsys.readouterr().out
    shutil.rmtree(checkpoint / "shardadam")  # nothing of ours is needed
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    decayed, rest = (group["params"] for group in saved["param_groups"])
    assert [*decayed, *rest] == list(range(len(saved["state"]))) and len(rest) > len(decayed) > 0
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.1, 0.0]
    resumed = runs("stock", tmp_path / "a", max_steps=12, resume="checkpoint-6", **OPTIONS)
    straight = runs("stock", tmp_path / "b", max_steps=12, **OPTIONS)
    for mine, theirs in zip(resumed, straight, strict=True):
        assert mine["wrapped"] == "DistributedDataParallel"
        assert largest_difference(mine["model"], theirs["model"]) <= 1e-6
        assert mine["losses"][6:] == pytest.approx(theirs["losses"][6:], rel=1e-5)
        assert mine["rates"][6:] == theirs["rates"][6:]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"optim": "adamw_8bit"}),
        (
            torch.bfloat16,
            {"optimizer_class": (ShardedAdamW, {"lr": 1e-3, "eps": 1e-6, "precision": Precision(master="split")})},
        ),
    ],
    ids=["int8", "bf16 split"],
)
def test_other_formats_are_decoded(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    """A resumed ShardedTrainer and a plain one start with the same state, and take about the same next steps."""
    ours, checkpoint = stopped(tmp_path, dtype=dtype, whole_state=True, **options)
    export(checkpoint, format="trainer")
    saved, whole = torch.load(checkpoint / "optimizer.pt", weights_only=True), ours[0]["state"]
    assert saved["state"].keys() == whole["state"].keys()
    for index, state in saved["state"].items():
        assert set(state) == {"step", *MOMENTS} and float(state["step"]) == 6.0
        for kind in MOMENTS:
            assert state[kind].dtype == torch.float32 and bool(state[kind].any())
            assert torch.equal(state[kind], whole["state"][index][kind])
    again = {**OPTIONS, "max_steps": 9, "resume": "checkpoint-6", "dtype": dtype}
    sharded = runs("sharded", tmp_path, **again, **options)
    plain = runs("stock", tmp_path, **again)
    assert plain[0]["losses"][6:] == pytest.approx(sharded[0]["losses"][6:], rel=5e-3)


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint of a ShardedTrainer"):
        export(tmp_path / "empty", format="trainer")
    _, checkpoint = stopped(tmp_path / "out")
    with pytest.raises(ValueError, match="which exports no model"):
        export(checkpoint, format="trainer", weights="ema")
    model = load_file(checkpoint / "model.safetensors")
    for changed, message in (
        ({name: model[name] for name in list(model)[:5]}, r"has 5 tensors, but the optimizer has \d\d parameters"),
        ({**model, "transformer.ln_f.weight": torch.ones(5)}, r"found 'transformer.ln_f.weight' of shape \(5,\)"),
    ):
        save_file(changed, checkpoint / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            export(checkpoint, format="trainer")
        assert not (checkpoint / "optimizer.pt").exists()
    save_file(model, checkpoint / "model.safetensors", metadata={"format": "pt"})
    export(checkpoint, format="trainer")
    with pytest.raises(CheckpointError, match="exists already"):
        export(checkpoint, format="trainer")
    for message in on_ranks(2, refused, str(tmp_path / "out")):
        assert "doesn't match the size of optimizer's group" in message


def refused(out: str) -> str:
    """Resume with fewer trained parameters."""
    from tests import trainer_run

    with pytest.raises(ValueError) as caught:
        trainer_run.train("stock", out, resume="checkpoint-6", frozen="h.1.", max_steps=8)
    return str(caught.value)
