# SPDX-License-Identifier: Apache-2.0
"""A ShardedAdamW in a LightningModule under Lightning's DDP strategy equals torch's AdamW and saves the whole state."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

lightning = pytest.importorskip("lightning")

from lightning.fabric.utilities.optimizer import _optimizers_to_device  # noqa: E402
from lightning.pytorch.strategies import Strategy  # noqa: E402

from shardadam import ShardedAdamW  # noqa: E402

pytestmark = pytest.mark.scripts
ROOT = Path(__file__).parent.parent


def launch(out: Path, ranks: int) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "tests" / "lightning_run.py"), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(out / f"results-{ranks}.pt")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("lightning")
    return launch(out, 2), out


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_training_equals_torchs_adamw(on_two_ranks: tuple[dict[str, Any], Path]) -> None:
    stock, sharded = on_two_ranks[0]["stock"], on_two_ranks[0]["sharded"]
    assert largest_difference(stock["model"], sharded["model"]) <= 1e-6
    for (loss, norm), (expected_loss, expected_norm) in zip(sharded["seen"], stock["seen"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5) and norm == pytest.approx(expected_norm, rel=1e-5)
    norms = [norm for _, norm in sharded["seen"] if norm > 0]
    assert len(norms) == 9 and min(norms) < 0.5 < max(norms)  # some steps clip, some do not


def test_checkpoints_hold_the_whole_state_and_training_resumes_from_them(
    on_two_ranks: tuple[dict[str, Any], Path],
) -> None:
    results, out = on_two_ranks
    saved = torch.load(out / "epoch=0.ckpt", weights_only=False)["optimizer_states"][0]["state"]
    assert [tuple(entry["exp_avg"].shape) for entry in saved.values()] == [(33, 6), (33,), (2, 33), (2,)]
    assert all(type(value) is torch.Tensor for entry in saved.values() for value in entry.values())
    assert largest_difference(results["sharded"]["model"], results["resumed"]["model"]) == 0.0
    assert results["resumed"]["seen"] == results["sharded"]["seen"][6:]


def test_training_resumes_on_another_number_of_ranks(on_two_ranks: tuple[dict[str, Any], Path]) -> None:
    results, out = on_two_ranks
    assert largest_difference(results["sharded"]["model"], launch(out, 1)["resumed"]["model"]) <= 1e-6


def test_gradients_that_ddp_has_reduced_are_not_reduced_again(on_two_ranks: tuple[dict[str, Any], Path]) -> None:
    assert "Lightning's DDP strategy" in on_two_ranks[0]["refused"] and '"external"' in on_two_ranks[0]["refused"]


def test_lightning_makes_the_calls_that_this_relies_on() -> None:
    assert "optimizer.consolidate_state_dict()" in inspect.getsource(Strategy.optimizer_state)
    assert "optimizer.load_state_dict(opt_state)" in inspect.getsource(Strategy.load_optimizer_state_dict)
    assert "_optimizer_to_device(optimizer, self.root_device)" in inspect.getsource(Strategy.load_optimizer_state_dict)


def test_lightning_moving_the_state_to_its_device_replaces_no_tensor() -> None:
    """Lightning assigns ``tensor.to(device)`` to every entry of ``optimizer.state``: here, the same tensor."""
    layer = torch.nn.Linear(3, 2)
    optimizer = ShardedAdamW(layer.parameters())
    before = {(p, name): value for p in layer.parameters() for name, value in optimizer.state[p].items()}
    _optimizers_to_device([optimizer], torch.device("cpu"))
    assert len(before) == 6
    assert all(optimizer.state[p][name] is value for (p, name), value in before.items())
