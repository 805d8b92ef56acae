# SPDX-License-Identifier: Apache-2.0
"""Training with ShardedAccelerator equals stock accelerate with DDP and torch's AdamW, and resumes."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join

from shardadam import GradScaler, ShardedAdamW
from tests.ranks import on_ranks

accelerate = pytest.importorskip("accelerate")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402

from shardadam.integrations import accelerate as integration  # noqa: E402
from shardadam.integrations.accelerate import ShardedAccelerator  # noqa: E402
from tests import accelerate_run  # noqa: E402
from tests.accelerate_run import as_launched  # noqa: E402

pytestmark = pytest.mark.scripts
SCRIPT = Path(accelerate_run.__file__)
ROOT = SCRIPT.parent.parent


def run(flavour: str, directory: str, options: dict[str, Any]) -> dict[str, Any]:
    with as_launched():
        return accelerate_run.train(flavour, Path(directory), **options)


def runs(flavour: str, directory: Path, world_size: int = 2, **options: Any) -> list[dict[str, Any]]:
    return on_ranks(world_size, run, flavour, str(directory), options)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_equal_runs(ours: list[dict[str, Any]], stock: list[dict[str, Any]], tolerance: float = 1e-6) -> None:
    for mine, theirs in zip(ours, stock, strict=True):
        assert (mine["type"], theirs["type"]) == ("Net", "DistributedDataParallel")
        assert largest_difference(mine["model"], theirs["model"]) <= tolerance
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=tolerance, abs=tolerance)
        assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-5, abs=tolerance)
        assert mine["lr"] == theirs["lr"]
        half = len(mine["losses"]) // 2
        assert 0 < sum(mine["losses"][half:]) < sum(mine["losses"][:half])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"accumulate": 2, "sync_each_batch": True},
        {"accumulate": 4, "gradient_sync": "step"},
        {"mixed_precision": "bf16"},
        {"clip": 0.0, "dropout": 0.3},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()) or "plain",
)
def test_training_equals_ddp(options: dict[str, Any], tmp_path: Path) -> None:
    stock_options = {name: value for name, value in options.items() if name != "gradient_sync"}
    ours, stock = runs("sharded", tmp_path, **options), runs("stock", tmp_path, **stock_options)
    assert_equal_runs(ours, stock)
    assert largest_difference(ours[0]["model"], ours[1]["model"]) == 0.0
    steps = len(ours[0]["losses"]) // options.get("accumulate", 1)
    assert ours[0]["rounds"] == (len(ours[0]["losses"]) if "sync_each_batch" in options else steps)
    if options.get("clip", 2.0):
        assert len(ours[0]["norms"]) == steps
        assert min(ours[0]["norms"]) < 2.0 < max(ours[0]["norms"])  # some steps clip, some do not


def test_training_in_one_process_equals_stock_accelerate(tmp_path: Path) -> None:
    ours, stock = runs("sharded", tmp_path, 1)[0], runs("stock", tmp_path, 1)[0]
    assert largest_difference(ours["model"], stock["model"]) <= 1e-6


# Checkpoints


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.3}, {"naming": True, "moments": "int8"}, {"mixed_precision": "bf16", "accumulate": 2}],
    ids=["dropout", "int8", "bf16"],
)
def test_save_state_and_load_state_restore_every_bit(options: dict[str, Any], tmp_path: Path) -> None:
    straight = runs("sharded", tmp_path, save=1, **options)
    resumed = runs("sharded", tmp_path, resume=1, **options)
    for one, other in zip(straight, resumed, strict=True):
        assert largest_difference(one["model"], other["model"]) == 0.0
        assert one["losses"][len(one["losses"]) // 2 :] == other["losses"]
        assert one["lr"] == other["lr"]
    for index, entry in straight[0]["state"].items():
        assert all(torch.equal(value, resumed[0]["state"][index][name]) for name, value in entry.items())


@pytest.mark.parametrize("world_size", [1, 4])
def test_training_resumes_on_another_number_of_ranks(world_size: int, tmp_path: Path) -> None:
    # accelerate's schedulers step once per process, so runs on other numbers of ranks compare only without a schedule
    straight = runs("sharded", tmp_path, save=1, gamma=1.0)
    resumed = runs("sharded", tmp_path, world_size, resume=1, gamma=1.0, accumulate={1: 2, 4: 1}[world_size])
    for one in resumed:
        assert largest_difference(straight[0]["model"], one["model"]) <= 1e-6
        assert one["norms"] == pytest.approx(straight[0]["norms"][len(straight[0]["norms"]) // 2 :], rel=1e-5)


def test_saving_twice_into_a_directory_keeps_the_newer_state(tmp_path: Path) -> None:
    runs("sharded", tmp_path, epochs=1, save=1)
    runs("sharded", tmp_path, epochs=2, save=2, resume=1)
    assert len(list((tmp_path / "checkpoint" / "shardadam_0").glob("step-*"))) == 1
    straight = runs("sharded", tmp_path / "straight", epochs=3)
    resumed = runs("sharded", tmp_path, epochs=3, resume=2)
    assert largest_difference(straight[0]["model"], resumed[0]["model"]) == 0.0


# Loss scaling. accelerate refuses fp16 without a GPU; the scaler itself works on the CPU.


def training_with_an_overflow(scaled: bool) -> dict[str, Any]:
    with as_launched():
        plain = accelerate.Accelerator(cpu=True)
        if scaled:
            plain.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
            plain.scaler_handler = accelerate.utils.GradScalerKwargs(init_scale=2.0**10, growth_interval=3)
            plain.state._mixed_precision = "fp16"
        accelerator = ShardedAccelerator.adopt(plain)
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        optimizer = ShardedAdamW(model.named_parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        accelerator.native_amp = scaled  # no autocast; gradients are unscaled before clipping
        found: dict[str, Any] = {"skipped": [], "lr": [], "norms": []}
        for step in range(6):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + accelerator.process_index))
            loss = model(x).pow(2).mean()
            if step == 2 and accelerator.is_main_process:
                loss = loss * float("inf")
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            found["skipped"].append(accelerator.optimizer_step_was_skipped)
            found["lr"].append(scheduler.get_last_lr()[0])
            found["norms"].append(float(norm))
        return found | {"model": dict(model.state_dict()), "scaler": type(accelerator.scaler).__module__}


def test_an_overflow_on_one_rank_skips_optimizer_and_scheduler_on_all_ranks() -> None:
    one, other = on_ranks(2, training_with_an_overflow, True)
    assert one["skipped"] == other["skipped"] == [False, False, True, False, False, False]
    assert one["lr"] == other["lr"] and one["lr"][2] == one["lr"][1] > one["lr"][3]
    assert largest_difference(one["model"], other["model"]) == 0.0
    assert one["scaler"] == GradScaler.__module__


def test_norms_under_loss_scaling_equal_those_without() -> None:
    scaled, plain = on_ranks(2, training_with_an_overflow, True)[0], on_ranks(2, training_with_an_overflow, False)[0]
    assert scaled["norms"][:2] == pytest.approx(plain["norms"][:2], rel=1e-5)
    assert plain["norms"][0] > 0.1


# Steps that are skipped without loss scaling


def training_with_nan(steps: int, nan_at: int, accumulate: int, is_late: bool, two_optimizers: bool) -> dict[str, Any]:
    """Train with a NaN in the loss of one rank; return what accelerate was told after each step."""
    late = mock.patch.object(integration, "host_runs_ahead", lambda device: True) if is_late else nullcontext()
    with as_launched(), late:
        accelerator = ShardedAccelerator(cpu=True, gradient_accumulation_steps=accumulate)
        torch.manual_seed(0)
        models = [nn.Linear(6, 2) for _ in range(1 + two_optimizers)]
        optimizers = [ShardedAdamW(model.named_parameters(), lr=1.0 / (1 + i)) for i, model in enumerate(models)]
        schedulers = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 0.5**step) for one in optimizers]
        prepared = accelerator.prepare(*models, *optimizers, *schedulers)
        count = len(models)
        models, optimizers, schedulers = prepared[:count], prepared[count : 2 * count], prepared[2 * count :]
        told, rates, skipped = [], [], []
        for step in range(steps * accumulate):
            with accelerator.accumulate(*models):
                loss = sum(model(torch.ones(4, 6)).square().mean() for model in models[1:])
                first = models[0](torch.ones(4, 6)).square().mean()
                if step == nan_at and accelerator.is_main_process:
                    first = first * float("nan")
                accelerator.backward(loss + first)
                for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            if accelerator.sync_gradients:
                told.append(accelerator.optimizer_step_was_skipped)
                skipped.append([one.step_was_skipped for one in optimizers])
                rates.append([scheduler.get_last_lr()[0] for scheduler in schedulers])
        return {"told": told, "rates": rates, "skipped": skipped}


def moves_of(rates: list[list[float]]) -> list[list[bool]]:
    """Return, for each step after the first, whether each schedule has moved."""
    return [[b < a for a, b in zip(one, other, strict=True)] for one, other in itertools.pairwise(rates)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_skipped_step_without_a_scaler_reaches_accelerate_and_its_schedulers(
    world_size: int, accumulate: int
) -> None:
    """A NaN made all ranks skip the step, but the schedule moved on."""
    for found in on_ranks(world_size, training_with_nan, 4, 2 * accumulate, accumulate, False, False):
        assert found["told"] == [False, False, True, False]
        assert moves_of(found["rates"]) == [[True], [False], [True]]


def test_of_two_optimizers_only_the_skipped_ones_schedule_stays() -> None:
    for found in on_ranks(2, training_with_nan, 4, 2, 1, False, True):
        assert found["told"] == [False, False, True, False]
        assert found["skipped"] == [[False, False], [False, False], [True, False], [False, False]]
        assert moves_of(found["rates"]) == [[True, True], [False, True], [True, True]]


def test_a_host_that_must_not_wait_is_told_one_step_later() -> None:
    for found in on_ranks(2, training_with_nan, 5, 2, 1, True, False):
        assert found["told"] == [False, False, False, True, False]
        assert moves_of(found["rates"]) == [[True], [True], [False], [True]]


# What the prepared optimizer offers


def asked_of_the_prepared() -> list[str]:
    """Ask the prepared optimizer for what only a ShardedAdamW has; return which answers are wrong."""
    with as_launched():
        accelerator = ShardedAccelerator(cpu=True)
        model = nn.Linear(6, 2)
        inner = ShardedAdamW(model.named_parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, inner)
        found = {}
        accelerator.backward(model(torch.ones(4, 6)).pow(2).mean())
        found["gradient_norms"] = optimizer.gradient_norms() == inner.gradient_norms()
        found["clip_grad_norm_"] = optimizer.clip_grad_norm_(0.1) > 0.1
        optimizer.step()
        found["update_ratios"] = optimizer.update_ratios() == inner.update_ratios()
        found["memory"] = optimizer.memory() == inner.memory()
        found["skipped_steps"] = optimizer.skipped_steps is inner.skipped_steps
        found["full_state_dict"] = optimizer.full_state_dict().keys() == inner.full_state_dict().keys()
        hook = optimizer.register_step_post_hook(print)
        found["register_step_post_hook"] = hook.id in inner._optimizer_step_post_hooks
        found["another name"] = not hasattr(optimizer, "no_such_name")
        found["one half built"] = not hasattr(type(optimizer).__new__(type(optimizer)), "memory")
        return [name for name, is_right in found.items() if not is_right]


def test_the_prepared_optimizer_has_the_methods_of_the_one_inside() -> None:
    """``trainer.optimizer.memory()`` raised AttributeError: only ``trainer.optimizer.optimizer`` had it."""
    assert on_ranks(2, asked_of_the_prepared) == [[], []]


def trained_within_join() -> torch.Tensor:
    with as_launched():
        accelerator = ShardedAccelerator(cpu=True)
        model = nn.Linear(6, 2)
        model.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()})
        model, optimizer = accelerator.prepare(model, ShardedAdamW(model.named_parameters(), lr=1e-2))
        with Join([optimizer]):
            for _ in range(2 + accelerator.process_index):
                accelerator.backward(model(torch.ones(4, 6)).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
        return model.weight.detach().clone()


def test_the_prepared_optimizer_trains_within_join() -> None:
    """Join configured the prepared optimizer, and ranks with batches waited until the timeout for those without."""
    first, second = on_ranks(2, trained_within_join)
    assert torch.equal(first, second) and torch.allclose(first, torch.full_like(first, 0.97), atol=1e-3)


# Refused setups


def refused(what: str) -> str:
    with as_launched():
        model = nn.Linear(3, 2)
        if what == "plain accelerate":
            accelerator = accelerate.Accelerator(cpu=True)
            model, optimizer = accelerator.prepare(model, ShardedAdamW(model.parameters()))
            accelerator.backward(model(torch.ones(1, 3)).sum())
            call: Any = optimizer.step
        else:
            accelerator = ShardedAccelerator(cpu=True)
            sharded = ShardedAdamW(model.parameters(), gradient_sync="external" if what == "external" else "backward")
            if what == "clip":
                accelerator.prepare(model, sharded)
                call = lambda: accelerator.clip_grad_norm_([model.weight, torch.nn.Parameter(torch.ones(1))], 1.0)  # noqa: E731
            elif what == "device":
                accelerator.state.device = torch.device("meta")
                call = lambda: accelerator.prepare(model, sharded)  # noqa: E731
            else:
                other = sharded if what == "external" else torch.optim.AdamW(model.parameters())
                call = lambda: accelerator.prepare(model, other)  # noqa: E731
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("plain accelerate", ["RuntimeError", "DistributedDataParallel", "ShardedAccelerator", '"external"']),
        ("external", ["TypeError", 'gradient_sync="external"', "accelerate.Accelerator"]),
        ("another optimizer", ["TypeError", "AdamW", "expected a ShardedAdam"]),
        ("clip", ["ValueError", "found 2 parameters of 1 optimizers", "Call it once for each optimizer"]),
        ("device", ["ValueError", "meta", "model.to(accelerator.device) before"]),
    ],
)
def test_setups_that_cannot_work_are_refused_on_all_ranks(what: str, expected: list[str]) -> None:
    for message in on_ranks(2, refused, what):
        assert all(text in message for text in expected), message


def built_without_cpu() -> list[str]:
    """Build accelerators as a script does under torchrun that forgets ``cpu=True``, on a machine without GPUs."""
    messages = []
    with as_launched():
        os.environ.pop("ACCELERATE_USE_CPU")
        os.environ["WORLD_SIZE"] = "2"
        for build in (ShardedAccelerator, lambda: ShardedAccelerator.adopt(accelerate.Accelerator())):
            with pytest.raises(ValueError) as error:
                build()
            messages.append(str(error.value))
    return messages


@pytest.mark.skipif(torch.accelerator.is_available(), reason="accelerate uses the GPU")
@pytest.mark.parametrize("world_size", [1, 2])
def test_processes_that_accelerate_does_not_count_are_refused(world_size: int) -> None:
    """On CPUs without ``cpu=True``, every process that torchrun starts is the only one for accelerate. With one rank,
    this process, accelerate has joined nothing; with two, it has initialised torch.distributed all the same.
    """
    for messages in on_ranks(world_size, built_without_cpu):
        for message in messages:
            assert message.startswith("ShardedAccelerator: found num_processes 1, but 2 processes have been started")
            assert "cpu=True" in message and "use_cpu=True" in message and "unset WORLD_SIZE" in message


def test_an_accelerator_that_cannot_be_adopted_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with as_launched():
        plain = accelerate.Accelerator(cpu=True)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="found num_processes 1, but 2 processes"):
            ShardedAccelerator.adopt(plain)
        assert type(plain) is accelerate.Accelerator
        assert not plain._load_model_state_pre_hook


def external_under_plain_accelerate() -> tuple[float, str]:
    with as_launched():
        results = []
        for flavour in ("stock", "sharded"):
            torch.manual_seed(0)
            model: Any = nn.Linear(6, 2)
            optimizer: Any = (
                ShardedAdamW(model.parameters(), lr=1e-2, gradient_sync="external")
                if flavour == "sharded"
                else torch.optim.AdamW(model.parameters(), lr=1e-2)
            )
            accelerator = accelerate.Accelerator(cpu=True)
            model, optimizer = accelerator.prepare(model, optimizer)
            for step in range(5):
                x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + accelerator.process_index))
                accelerator.backward(model(x).pow(2).mean())
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            results.append({name: value.clone() for name, value in model.module.state_dict().items()})
        return largest_difference(*results), type(model).__name__


def test_stock_accelerate_with_external_gradients_equals_adamw() -> None:
    for difference, kind in on_ranks(2, external_under_plain_accelerate):
        assert difference <= 1e-6 and kind == "DistributedDataParallel"


# Launchers


def test_accelerate_launch_trains(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
    ]  # --cpu wants MPI
    command += [
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        str(SCRIPT),
        str(tmp_path),
        "sharded",
        "epochs=1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    launched = [torch.load(tmp_path / f"sharded-{rank}.pt") for rank in range(2)]
    here = runs("sharded", tmp_path, epochs=1)
    assert all(largest_difference(one["model"], here[0]["model"]) == 0.0 for one in launched)


def test_notebook_launcher_trains(tmp_path: Path) -> None:
    notebook = (
        "import sys\n"
        "from accelerate import notebook_launcher\n"
        "def cell():\n"
        "    sys.argv = ['accelerate_run.py', sys.argv[1], 'sharded', 'epochs=1']\n"
        "    from tests.accelerate_run import main\n"
        "    main()\n"
        "notebook_launcher(cell, num_processes=2)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", notebook, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    launched = [torch.load(tmp_path / f"sharded-{rank}.pt") for rank in range(2)]
    here = runs("sharded", tmp_path, epochs=1)
    assert all(largest_difference(one["model"], here[0]["model"]) == 0.0 for one in launched)


# What the integration relies on in accelerate


def test_accelerate_has_the_methods_that_the_integration_overrides() -> None:
    def parameters(method: str) -> list[str]:
        return list(inspect.signature(getattr(accelerate.Accelerator, method)).parameters)

    assert parameters("prepare_model") == ["self", "model", "device_placement", "evaluation_mode"]
    assert parameters("prepare_optimizer") == ["self", "optimizer", "device_placement"]
    assert parameters("clip_grad_norm_") == ["self", "parameters", "max_norm", "norm_type"]
    assert parameters("no_sync") == ["self", "model"]
    assert parameters("save_state")[:2] == ["self", "output_dir"]
    assert parameters("load_state")[:2] == ["self", "input_dir"]
    assert parameters("register_load_state_pre_hook") == ["self", "hook"]
    wrapped = list(inspect.signature(AcceleratedOptimizer).parameters)
    assert wrapped == ["optimizer", "device_placement", "scaler"]
    assert "self.no_sync(" in inspect.getsource(accelerate.Accelerator.accumulate)
    assert "step_was_skipped" in inspect.getsource(accelerate.Accelerator.optimizer_step_was_skipped.fget)
