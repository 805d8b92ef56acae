# SPDX-License-Identifier: Apache-2.0
"""The library needs torch and nothing else: all of it works where no other package can be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys

for name in ("numpy", "safetensors", "rich", "numba", "psutil", "yaml", "triton", "accelerate", "transformers"):
    sys.modules[name] = None

import torch
import torch.distributed as dist

import shardadam

dist.init_process_group("gloo")
try:
    torch.ones(1).numpy()
    raise AssertionError("NumPy is there")
except RuntimeError:
    pass
for transport in ("shared_memory", "collective"):
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 8)
    precision = shardadam.Precision(moments="int8")
    optimizer = shardadam.ShardedAdamW(
        model.named_parameters(), transport=transport, max_grad_norm=1.0, precision=precision, bucket_mb=1e-3
    )
    scaler = shardadam.GradScaler("cpu")
    for _ in range(3):
        scaler.scale(model(torch.randn(4, 16)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    optimizer.check_in_sync()
    whole = optimizer.full_state_dict()
    shardadam.save(transport, step=3, model=model, optimizer=optimizer)
    shardadam.load(transport, model=model, optimizer=optimizer)
    model(torch.randn(4, 16)).square().mean().backward()
    assert optimizer.full_grad(model.weight).shape == model.weight.shape
    optimizer.step()
print("done")
dist.destroy_process_group()
"""


def test_torch_alone_is_enough(tmp_path: Path) -> None:
    """Without NumPy, building an optimizer on two ranks failed, because all_gather_object needs it."""
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stdout + done.stderr
    exported = subprocess.run(
        [sys.executable, "-m", "shardadam.cli", "inspect", str(tmp_path / "collective")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert exported.returncode == 0, exported.stderr
