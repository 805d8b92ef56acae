# SPDX-License-Identifier: Apache-2.0
"""``launch/pretrain.py`` under torchrun: sharded training ends at the same loss as DDP with torch's AdamW, with less
memory, and also if it is stopped and resumed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

import shardadam

pytestmark = pytest.mark.scripts
ROOT = Path(__file__).parent.parent
SMALL = {"steps": 25, "layers": 2, "width": 64, "heads": 2, "context": 64, "validation-windows": 16, "sample-bytes": 20}


def pretrain(directory: Path, *arguments: str, ranks: int = 2) -> tuple[dict[str, Any], str]:
    results = directory / f"{len(list(directory.iterdir()))}.json"
    run = launch("--json", str(results), *arguments, ranks=ranks)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(results.read_text()), run.stdout


def launch(*arguments: str, ranks: int) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    script = [str(ROOT / "launch" / "pretrain.py"), *options, *arguments]
    return subprocess.run(
        [*(launcher if ranks > 1 else [sys.executable]), *script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize(
    "extra",
    [["--overlap-gather"], pytest.param(["--micro-batch", "2", "--gradient-sync", "step"], marks=pytest.mark.long)],
    ids=["overlapping all-gathers", "micro-batches"],
)
def test_sharded_training_ends_at_the_same_loss_as_ddp_with_torchs_adamw(extra: list[str], tmp_path: Path) -> None:
    """Clipping is on, so a wrong global norm would change the loss."""
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
    """Norms of parameters add up to those of their groups and of all, and to the one that clips."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(tmp_path, "--steps=3", "--log-every=2", "--log-dir", str(tmp_path / "log"))
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    for index in range(3):
        at = {tag: of_tag[index] for tag, of_tag in values.items() if len(of_tag) == 3}
        of_params = [value for tag, value in at.items() if tag.startswith("gradient_norm/")]
        of_groups = [at["gradient_norm_of_group/0"], at["gradient_norm_of_group/1"]]
        for parts in (of_params, of_groups):
            assert math.hypot(*parts) == pytest.approx(at["gradient_norm_of_all"], rel=1e-5)
        assert at["grad_norm"] == pytest.approx(at["gradient_norm_of_all"], rel=1e-5)
        ratios = [value for tag, value in at.items() if tag.startswith("update_ratio/")]
        assert len(ratios) == len(of_params) > 10 and min(ratios) > 0
        assert at["memory/total"] > at["memory/moments"] > 0 == at["skipped_steps"]


def test_a_wrong_argument_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"no-such-file"):
        pretrain(tmp_path, "--data", str(tmp_path / "no-such-file"), ranks=1)


def test_torchrun_leaves_every_option_to_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Python 3.11, argparse took ``--master`` after the script for an ambiguous option of torchrun's."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import arguments
    import finetune_arguments

    alone = arguments.Ranks.from_environment()
    for parser in (arguments.make_parser(alone), finetune_arguments.make_parser(alone)):
        options = [option for action in parser._actions for option in action.option_strings]
        assert len(options) > 20
        for option in options:
            parsed = get_args_parser().parse_args(["--standalone", "script.py", option, "1"])
            assert parsed.training_script_args == [option, "1"]


# Checkpoints

RESUMED = ["--steps=12", "--batch=12", "--save-every=4"]  # 12 divides by 1, 2 and 3 ranks


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of asynchronous checkpoints of a run on 2 ranks that was stopped halfway."""
    directory = tmp_path_factory.mktemp("stopped")
    options = ["--save-dir", str(directory / "saved"), "--save-async", "--keep=1", "--stop-after=6", "--resume"]
    result, output = pretrain(directory, *RESUMED, *options)
    assert result["last_step"] == 6 and result["saves"] == 2
    assert f"starting at step 1: {directory / 'saved'} holds no checkpoint" in output
    assert {path.name for path in (directory / "saved").iterdir()} == {"latest", "step-00000006"}
    return directory / "saved"


def test_a_stopped_run_resumes_on_any_number_of_ranks_to_the_same_loss(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, output = pretrain(tmp_path, *RESUMED, "--save-dir", str(tmp_path / "straight"))
    assert f"step 12: saved {tmp_path / 'straight' / 'step-00000012'}" in output
    assert straight["saves"] == 3
    for ranks in (1, 2, 3):
        saved = tmp_path / f"on-{ranks}"
        shutil.copytree(stopped, saved)
        resumed, output = pretrain(tmp_path, *RESUMED, "--save-dir", str(saved), "--resume", ranks=ranks)
        assert f"resumed from step 6 of {saved / 'step-00000006'}, saved on 2 ranks" in output
        assert (resumed["first_step"], resumed["last_step"], resumed["saves"]) == (7, 12, 2)
        assert resumed["validation_loss"] == pytest.approx(straight["validation_loss"], abs=1e-4)
        if ranks == 2:
            assert resumed["validation_loss"] == straight["validation_loss"]

    again, _ = pretrain(tmp_path, *RESUMED, "--save-dir", str(tmp_path / "on-1"), "--resume", ranks=1)
    assert (again["first_step"], again["last_step"], again["saves"]) == (13, 12, 0)  # all steps are done
    assert again["validation_loss"] == pytest.approx(straight["validation_loss"], abs=1e-4)

    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    uninterrupted, interrupted = parameters(tmp_path / "straight"), parameters(tmp_path / "on-2")
    assert all(torch.equal(uninterrupted[name], interrupted[name]) for name in uninterrupted)
    before = parameters(stopped)
    assert not any(torch.equal(uninterrupted[name], before[name]) for name in uninterrupted)


def parameters(directory: Path) -> dict[str, torch.Tensor]:
    from model import Decoder, ModelConfig

    decoder = Decoder(ModelConfig(SMALL["layers"], SMALL["width"], SMALL["heads"], SMALL["context"]))
    shardadam.load(directory, model=decoder)
    return decoder.state_dict()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--resume", "--steps=20", "--width=32"],
            ["has --steps 20 --width 32 --warmup 2", "give --steps 12 --width 64"],
        ),
        (["--resume", "--data", str(ROOT / "launch")], ["the same --data"]),
        ([], ["checkpoints of an earlier run", "--resume"]),
    ],
    ids=["options", "text", "begin"],
)
def test_checkpoints_of_another_run_are_refused(stopped: Path, options: list[str], expected: list[str]) -> None:
    run = launch(*RESUMED, "--save-dir", str(stopped), *options, ranks=1)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert all(text in run.stderr for text in expected), run.stderr
    assert {path.name for path in stopped.iterdir()} == {"latest", "step-00000006"}


def test_a_damaged_checkpoint_ends_in_one_message(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "saved")
    file = tmp_path / "saved" / "step-00000006" / "rank-00001.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run = launch(*RESUMED, "--save-dir", str(tmp_path / "saved"), "--resume", ranks=2)
    assert run.returncode != 0
    assert run.stderr.count("rank-00001.bin is damaged") == 1, run.stderr
    assert 'pretrain.py", line' not in run.stderr  # only torchrun's own traceback may be there


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--save-every=5"], "--save-dir DIR"),
        (["--resume"], "--save-dir DIR"),
        (["--save-dir=saved"], "add --save-every N"),
        (["--save-dir=saved", "--save-every=5", "--optimizer=adamw"], "only --optimizer sharded"),
        (["--save-dir=saved", "--resume", "--optimizer=adamw"], "only --optimizer sharded"),
        (["--check-every=5", "--optimizer=adamw"], "only --optimizer sharded can check"),
        (["--save-on-sigterm"], "--save-dir DIR"),
        (["--save-dir", __file__, "--save-every=5"], "expected a directory"),
    ],
)
def test_options_that_cannot_work_together_are_refused(
    options: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    from arguments import Ranks, parse_arguments

    monkeypatch.setattr(sys, "argv", ["pretrain.py", *options])
    with pytest.raises(SystemExit) as exit:
        parse_arguments(Ranks(0, 1, 0, 1, launched=False))
    assert exit.value.code == 2
    assert expected in capsys.readouterr().err
