# SPDX-License-Identifier: Apache-2.0
"""Importing an integration whose framework is missing or broken tells what failed first, why, and the remedy."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.scripts  # each imports torch and frameworks
ROOT = Path(__file__).parent.parent
BROKEN = """
import torch


def register():
    raise RuntimeError("operator torchvision::nms does not exist")


register()
"""


def last_line(module: str, path: Path, before: str = "") -> str:
    """Return the message of the error that importing ``module`` ends with."""
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\nimport {module}"],
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    return done.stderr.strip().splitlines()[-1]


def install(path: Path, name: str, text: str) -> None:
    """Put a package that looks installed on ``path``."""
    (path / name).mkdir()
    (path / name / "__init__.py").write_text(text)
    information = path / f"{name}-0.28.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.28.0\n")


def test_a_broken_torchvision_is_named(tmp_path: Path) -> None:
    """transformers says "Could not import module 'Trainer'", and hides the error."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("not installed: transformers")
    install(tmp_path, "torchvision", BROKEN)
    assert last_line("shardadam.integrations.transformers", tmp_path) == (
        "ImportError: shardadam.integrations.transformers could not import transformers: torchvision failed with "
        "RuntimeError: operator torchvision::nms does not exist. Reproduce it with: python -c 'import torchvision'. "
        "Install a torchvision that fits the installed torch, or uninstall torchvision if you do not need it."
    )


@pytest.mark.parametrize("name", ["accelerate", "transformers"])
def test_a_broken_framework_is_named(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("not installed: accelerate")
    install(tmp_path, name, "from torch import a_name_that_torch_has_lost")
    message = last_line(f"shardadam.integrations.{name}", tmp_path)
    assert f"could not import {name}: {name} failed with ImportError: cannot import name 'a_name_that" in message
    assert f"Install a {name} that fits the installed torch." in message


def test_an_error_that_the_script_was_handling_is_not_the_cause(tmp_path: Path) -> None:
    install(tmp_path, "accelerate", "raise RuntimeError('broken')")
    nested = "try:\n    import no_such_package\nexcept ImportError:\n    import shardadam.integrations.accelerate\n"
    message = last_line("shardadam", tmp_path, before=nested)
    assert "could not import accelerate: accelerate failed with RuntimeError: broken" in message


@pytest.mark.parametrize(
    ("name", "package"),
    [("accelerate", "'shardadam[accelerate]'"), ("transformers", "'shardadam[transformers]'"), ("axolotl", "axolotl")],
)
def test_a_missing_framework_names_what_installs_it(name: str, package: str, tmp_path: Path) -> None:
    if name != "accelerate" and importlib.util.find_spec("accelerate") is None:
        pytest.skip("not installed: accelerate")
    if name == "axolotl" and importlib.util.find_spec(name) is not None:
        pytest.skip("installed: axolotl")
    hidden = "" if name == "axolotl" else f"import sys\nsys.modules['{name}'] = None"
    message = last_line(f"shardadam.integrations.{name}", tmp_path, before=hidden)
    assert message.endswith(f"could not import {name}, which is not installed. pip install {package}.")
