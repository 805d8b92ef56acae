# SPDX-License-Identifier: Apache-2.0
"""The README's whole scripts run as they stand there: every Python block after a comment ``torchrun: FRAMEWORK``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- torchrun: (\w+) -->\n\n```python\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
SCRIPTS = dict(BLOCK.findall((ROOT / "README.md").read_text()))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_the_readme_runs_on_two_ranks(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    (tmp_path / "train.py").write_text(SCRIPTS[name])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_has_a_script_for_every_integration() -> None:
    assert set(SCRIPTS) == {"accelerate", "transformers", "lightning"}
