# SPDX-License-Identifier: Apache-2.0
"""``launch/pretrain.py`` under torchrun: sharded training ends where DDP with torch's AdamW does, on less memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {"steps": 25, "layers": 2, "width": 64, "heads": 2, "context": 64, "validation-windows": 16, "sample-bytes": 20}


def pretrain(directory: Path, *arguments: str, ranks: int = 2) -> tuple[dict[str, Any], str]:
    results = directory / f"{len(list(directory.iterdir()))}.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    script = [str(ROOT / "launch" / "pretrain.py"), *options, "--json", str(results), *arguments]
    run = subprocess.run(
        [*(launcher if ranks > 1 else [sys.executable]), *script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(results.read_text()), run.stdout


@pytest.mark.parametrize(
    "extra",
    [[], pytest.param(["--accumulate", "2", "--gradient-sync", "step"], marks=pytest.mark.long)],
    ids=["plain", "accumulate"],
)
def test_sharded_training_ends_where_torchs_adamw_does(extra: list[str], tmp_path: Path) -> None:
    """With clipping in force, which is what the sharded norm has to get right."""
    sharded, output = pretrain(tmp_path, *extra)
    replicated, _ = pretrain(tmp_path, "--optimizer", "adamw", *extra)
    assert sharded["validation_loss"] == pytest.approx(replicated["validation_loss"], abs=1e-4)
    assert sharded["validation_loss"] < 5.0
    assert sharded["state_bytes"] < 0.51 * replicated["state_bytes"]
    assert "optimizer state a rank" in output and "validation loss" in output


@pytest.mark.long
def test_low_precision_and_other_world_sizes_train(tmp_path: Path) -> None:
    fp32, _ = pretrain(tmp_path, ranks=1)
    for arguments, ranks in ((["--dtype", "bf16"], 2), ([], 2), ([], 4)):
        result, _ = pretrain(tmp_path, *arguments, ranks=ranks)
        assert result["validation_loss"] == pytest.approx(fp32["validation_loss"], abs=5e-2)


def test_metrics_go_to_tensorboard(tmp_path: Path) -> None:
    pretrain(tmp_path, "--steps", "3", "--log-dir", str(tmp_path / "log"), ranks=1)
    assert any(path.name.startswith("events.out") for path in (tmp_path / "log").rglob("*"))


def test_a_wrong_argument_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"no-such-file"):
        pretrain(tmp_path, "--data", str(tmp_path / "no-such-file"), ranks=1)
