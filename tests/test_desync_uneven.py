# SPDX-License-Identifier: Apache-2.0
"""A rank that waits for one that has run out of batches says so, and names Join; calls are counted by optimizer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.scripts import run_script

SCRIPT = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from shardadam import ShardedAdamW
dist.init_process_group("gloo", timeout=timedelta(seconds=4))
rank = dist.get_rank()
models = [torch.nn.Linear(8, 4) for _ in range(2)]
generator, critic = (ShardedAdamW(one.named_parameters()) for one in models)
for batch in range(4 - rank):  # rank 1 has one batch less
    models[1](torch.randn(2, 8)).sum().backward()
    try:
        critic.step()
    except Exception as error:
        print(f"rank {rank}: {error}", flush=True)
        sys.exit()
    if batch < 2:  # the generator steps less often than the critic
        models[0](torch.randn(2, 8)).sum().backward()
        generator.step()
if sys.argv[1] == "destroys":
    dist.destroy_process_group()
    time.sleep(8)
elif sys.argv[1] == "waits":
    time.sleep(8)
elif sys.argv[1] == "meets":
    try:
        dist.barrier()
    except RuntimeError:
        pass
"""


@pytest.mark.parametrize("then", ["ends", "destroys", "waits", "meets"])
def test_a_rank_that_has_run_out_of_batches_is_named_with_the_remedy(then: str, tmp_path: Path) -> None:
    """The report said "call 6 of step()", of two optimizers together, and not what the cause may be."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    said = run_script(script, [then], output=tmp_path / "out")
    assert re.search(r"rank 0 \(this one\): in call 4 of step\(\) of optimizer 2 of 2 for", said), said
    assert re.search(r"rank 1: .* after call 3 of step\(\) of optimizer 2 of 2", said), said
    assert "If rank 1 raised no error but had fewer batches" in said
    assert "drop_last=True" in said and "Join([optimizer])" in said
