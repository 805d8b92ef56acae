# SPDX-License-Identifier: Apache-2.0
"""Training with ShardedTrainer equals transformers' Trainer with DDP and torch's AdamW, and resumes from its
checkpoints; so does a plain Trainer with external gradients and one callback.
"""

from __future__ import annotations

import inspect
import itertools
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from shardadam import GradScaler, Precision, ShardedAdam, ShardedAdamW
from tests.ranks import on_ranks

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments  # noqa: E402
from transformers.trainer_callback import DefaultFlowCallback  # noqa: E402
from transformers.training_args import OptimizerNames  # noqa: E402

from shardadam.integrations import transformers as integration  # noqa: E402
from shardadam.integrations.transformers import (  # noqa: E402
    ConsolidateCallback,
    LogCallback,
    ShardedTrainer,
    ShardedTrainerMixin,
)
from tests import trainer_run  # noqa: E402
from tests.accelerate_run import as_launched  # noqa: E402

pytestmark = pytest.mark.scripts
SAVING = {"save_strategy": "steps", "save_steps": 4}


def run(flavour: str, out: str, options: dict[str, Any]) -> dict[str, Any]:
    return trainer_run.train(flavour, out, **options)


def runs(flavour: str, out: Path, world_size: int = 2, **options: Any) -> list[dict[str, Any]]:
    return on_ranks(world_size, run, flavour, str(out), options)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_equal_runs(ours: list[dict[str, Any]], stock: list[dict[str, Any]], last: int = 0) -> None:
    """Compare the last ``last`` logged steps; with 0, all."""
    for mine, theirs in zip(ours, stock, strict=True):
        assert largest_difference(mine["model"], theirs["model"]) <= 1e-6
        for name in ("losses", "norms", "rates"):
            assert len(mine[name]) > 0
            assert mine[name][-last:] == pytest.approx(theirs[name][-last:], rel=1e-5, abs=1e-6)
        assert mine["evaluations"] == pytest.approx(theirs["evaluations"], rel=1e-5)


OVERLAPPED = {"max_steps": 4, "gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 3}
IS_OVERLAPPED = [False, False, True, False, True, False, False, False]  # two forwards a step; saving waits


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("callbacks", [False, True])
def test_overlapped_gathers_change_no_bit_and_wait_for_callbacks(callbacks: bool, tmp_path: Path) -> None:
    """The callback keeps a list of parameters from before the step, and reads it after the step."""
    options = {**OVERLAPPED, "callbacks": callbacks}
    plain = runs("sharded", tmp_path / "plain", overlap=False, **options)
    overlapped = runs("sharded", tmp_path / "overlapped", overlap=True, **options)
    for mine, theirs in zip(overlapped, plain, strict=True):
        assert not any(theirs["pending"])
        assert mine["pending"][: len(IS_OVERLAPPED)] == [one and not callbacks for one in IS_OVERLAPPED]
        assert largest_difference(mine["model"], theirs["model"]) == 0.0
        assert mine["losses"] == theirs["losses"] and mine["moves"] == theirs["moves"]
        assert mine["evaluated_after"] == theirs["evaluated_after"]
    one, other = (load_file(tmp_path / name / "checkpoint-3" / "model.safetensors") for name in ("plain", "overlapped"))
    assert largest_difference(one, other) == 0.0


@pytest.mark.parametrize(
    ("device", "ranks", "compiles", "wanted", "overlaps"),
    [
        ("cuda", 2, False, None, True),
        ("cuda", 2, False, False, False),
        ("cuda", 1, False, None, False),
        ("cuda", 2, True, None, False),
        ("cpu", 2, False, None, False),
        ("cpu", 2, True, True, True),
    ],
)
def test_all_gathers_overlap_by_default_on_gpus_only(
    device: str, ranks: int, compiles: bool, wanted: bool | None, overlaps: bool, tmp_path: Path
) -> None:
    trainer = ShardedTrainer(torch.nn.Linear(2, 2), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    trainer.create_optimizer()
    trainer.args = mock.Mock(device=torch.device(device), world_size=ranks, torch_compile=compiles)
    trainer.overlap_gather = wanted
    with mock.patch.object(ShardedAdam, "overlap_gather") as overlap_gather:
        trainer._overlap_gather(trainer.model)
        trainer._overlap_gather(trainer.model)
    assert overlap_gather.call_count == overlaps


def test_a_compiled_model_does_not_overlap_by_default(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.compile()
    trainer = ShardedTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    trainer.create_optimizer()
    trainer.args = mock.Mock(device=torch.device("cuda"), world_size=2, torch_compile=False)
    trainer._overlap_gather(model)
    assert not trainer.optimizer._engine._overlaps
    trainer.overlap_gather = True
    with pytest.raises(RuntimeError, match="the model has been compiled"):
        trainer._overlap_gather(model)


class OwnTrainer(transformers.Trainer):
    pass


@pytest.mark.parametrize(
    ("kind", "name"), [(transformers.Trainer, "ShardedTrainer"), (OwnTrainer, "ShardedOwnTrainer")]
)
def test_an_adopted_trainer_is_of_a_class_of_the_integration_and_can_be_pickled(
    kind: type[Trainer], name: str, tmp_path: Path
) -> None:
    """Its class said that it was in the module of the trainer's own, where nobody finds it; pickling failed."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = ShardedTrainer.adopt(kind(torch.nn.Linear(2, 2), arguments))
    assert f"{type(trainer).__module__}.{type(trainer).__qualname__}" == f"{ShardedTrainer.__module__}.{name}"
    assert issubclass(type(trainer), ShardedTrainer) and isinstance(trainer, kind)
    again = pickle.loads(pickle.dumps(trainer))
    assert isinstance(again, ShardedTrainer) and isinstance(again, kind)
    assert torch.equal(again.model.weight, trainer.model.weight)


def test_what_cannot_be_adopted_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"found a Linear, expected a transformers\.Trainer"):
        ShardedTrainer.adopt(model)
    stock = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"an optimizer of its own \(AdamW\), expected none yet"):
        ShardedTrainer.adopt(transformers.Trainer(model, arguments, optimizers=(stock, None)))
    used = transformers.Trainer(model, arguments)
    used.model_wrapped = torch.nn.Sequential(model)
    with pytest.raises(ValueError, match=r"prepared already \(Sequential\)"):
        ShardedTrainer.adopt(used)
    ours = ShardedTrainer(model, arguments)
    assert ShardedTrainer.adopt(ours) is ours


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 5e-4, "adam_beta1": 0.8, "adam_beta2": 0.99},
        {"gradient_accumulation_steps": 1, "gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 3},
        {"bf16": True, "max_grad_norm": 0.0},
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            marks=pytest.mark.long,
        ),
    ],
    ids=["accumulation", "checkpointing, evaluation", "bf16, no clipping", "reentrant checkpointing"],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # its new name is newer than some versions
def test_training_equals_the_stock_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    ours, stock = runs("sharded", tmp_path / "ours", **options), runs("stock", tmp_path / "stock", **options)
    assert (ours[0]["wrapped"], stock[0]["wrapped"]) == ("GPT2LMHeadModel", "DistributedDataParallel")
    assert (ours[0]["optimizer"], stock[0]["optimizer"]) == ("ShardedAdamW", "AdamW")
    assert_equal_runs(ours, stock)
    assert largest_difference(ours[0]["model"], ours[1]["model"]) == 0.0
    assert ours[0]["losses"][-1] < ours[0]["losses"][0]
    assert max(ours[0]["norms"]) > 1.0  # some steps clip


@pytest.mark.parametrize(
    ("optim", "moments", "optim_args"),
    [
        ("adamw_torch", "fp32", None),
        ("adamw_torch_fused", "fp32", None),
        ("paged_adamw_32bit", "fp32", None),
        ("adamw_8bit", "int8", None),
        ("adamw_bnb_8bit", "int8", None),
        ("adamw_torch_8bit", "int8", None),
        ("paged_adamw_8bit", "int8", None),
        ("adamw_anyprecision", "fp32", None),
        ("adamw_anyprecision", "bf16", "use_kahan_summation=True, momentum_dtype=bfloat16, variance_dtype=bfloat16"),
    ],
)
def test_names_of_adamw_choose_the_precision(optim: str, moments: Any, optim_args: str | None, tmp_path: Path) -> None:
    """The Trainer would ask for bitsandbytes, torchao or torchdistx."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, optim=optim, optim_args=optim_args, learning_rate=3e-4)
    cls, options = ShardedTrainer.get_optimizer_cls_and_kwargs(arguments)
    assert cls is ShardedAdamW and options["lr"] == 3e-4 and options["betas"] == (0.9, 0.999)
    assert options["precision"] == Precision(moments=moments)


def test_training_by_the_name_of_an_8_bit_adamw(tmp_path: Path) -> None:
    named = runs("sharded", tmp_path / "named", max_steps=3, optim="adamw_bnb_8bit")
    options = {"lr": 1e-3, "eps": trainer_run.EPS, "precision": Precision(moments="int8")}
    passed = runs("sharded", tmp_path / "passed", max_steps=3, optimizer_class=(ShardedAdamW, options))
    exact = runs("sharded", tmp_path / "exact", max_steps=3)
    assert largest_difference(named[0]["model"], passed[0]["model"]) == 0.0
    assert largest_difference(named[0]["model"], exact[0]["model"]) > 0.0


@pytest.mark.parametrize(
    "optim", sorted({one.value for one in OptimizerNames} - {*integration._MOMENTS, "adamw_anyprecision"})
)
def test_names_of_other_optimizers_are_refused(optim: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, optim=optim)
    with pytest.raises(ValueError, match=rf'optim: found "{optim}", expected one of "adamw_torch", .*Leave optim out'):
        ShardedTrainer.get_optimizer_cls_and_kwargs(arguments)


@pytest.mark.parametrize("optim_args", ["momentum_dtype=bfloat16", "momentum_dtype=float16, variance_dtype=float16"])
def test_moments_of_other_dtypes_are_refused(optim_args: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, optim="adamw_anyprecision", optim_args=optim_args)
    with pytest.raises(ValueError, match=r"optim_args: found .*expected momentum_dtype and variance_dtype equal"):
        ShardedTrainer.get_optimizer_cls_and_kwargs(arguments)


ONE_GROUP: dict[str, Any] = {"weight_decay": 0.01, "warmup_steps": 0}  # for a passed optimizer


@pytest.fixture(scope="module")
def stock_with_one_group(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return runs("stock", tmp_path_factory.mktemp("stock"), optimizer={"fused": True}, **ONE_GROUP)


@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
def test_training_with_a_passed_optimizer(
    gradient_sync: str, stock_with_one_group: list[dict[str, Any]], tmp_path: Path
) -> None:
    flavour = "external" if gradient_sync == "external" else "sharded"
    ours = runs(flavour, tmp_path, optimizer={"gradient_sync": gradient_sync}, **ONE_GROUP)
    assert ours[0]["optimizer"] == "ShardedAdamW"
    assert_equal_runs(ours, stock_with_one_group)


def test_training_with_a_passed_optimizer_class(tmp_path: Path) -> None:
    options = {"lr": 2e-3, "betas": (0.8, 0.99), "eps": trainer_run.EPS}
    ours = runs("sharded", tmp_path, optimizer_class=(ShardedAdam, options))
    assert ours[0]["optimizer"] == "ShardedAdam"
    assert_equal_runs(ours, runs("stock", tmp_path, optimizer_class=(torch.optim.Adam, options)))


@pytest.mark.parametrize("gradient_sync", ["backward", "external", pytest.param("step", marks=pytest.mark.long)])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_on_all_ranks(gradient_sync: str, tmp_path: Path) -> None:
    options = {"optimizer": {"gradient_sync": gradient_sync}, "warmup_steps": 0, "max_steps": 5}
    results = runs("external" if gradient_sync == "external" else "sharded", tmp_path, **options, poisoned=2)
    for result in results:
        assert [move > 0 for move in result["moves"]] == [True, True, False, True, True]
        assert [math.isfinite(norm) for norm in result["norms"]] == [True, True, False, True, True]
        rates = result["rates"]  # of each step; the skipped one does not move the schedule
        assert [later < rate for rate, later in itertools.pairwise(rates)] == [True, True, False, True]
    assert largest_difference(results[0]["model"], results[1]["model"]) == 0.0


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """Train, saving halfway and at the end."""
    out = tmp_path_factory.mktemp("straight")
    return runs("sharded", out, dropout=0.1, **SAVING), out


def test_training_resumes_bit_for_bit(straight: tuple[list[dict[str, Any]], Path]) -> None:
    results, out = straight
    assert {path.name for path in (out / "checkpoint-4").iterdir()} >= {
        "shardadam",
        "scheduler.pt",
        "model.safetensors",
    }
    assert not (out / "checkpoint-4" / "optimizer.pt").exists()
    resumed = runs("sharded", out, dropout=0.1, resume="checkpoint-4", **SAVING)  # writes checkpoint-8 again
    for one, other in zip(results, resumed, strict=True):
        assert largest_difference(one["model"], other["model"]) == 0.0
        assert one["losses"][4:] == other["losses"][4:] and one["norms"][4:] == other["norms"][4:]


def test_a_resumed_run_draws_the_same_order_of_data(tmp_path: Path) -> None:
    """The Trainer restores random number generators after it begins to iterate; we must not restore them earlier."""
    options = {"stream": True, "dropout": 0.1, "gradient_accumulation_steps": 1, "max_steps": 5}
    results = runs("sharded", tmp_path, **options, save_strategy="steps", save_steps=3)
    resumed = runs("sharded", tmp_path, **options, resume="checkpoint-3")
    assert resumed[0]["losses"] == results[0]["losses"]
    assert largest_difference(results[0]["model"], resumed[0]["model"]) == 0.0


@pytest.mark.parametrize("world_size", [1, pytest.param(4, marks=pytest.mark.long)])
def test_training_resumes_on_another_number_of_ranks(world_size: int, tmp_path: Path) -> None:
    on_two = runs("sharded", tmp_path, **SAVING)
    accumulate = {1: 4, 4: 1}[world_size]
    resumed = runs("sharded", tmp_path, world_size, resume="checkpoint-4", gradient_accumulation_steps=accumulate)
    assert largest_difference(on_two[0]["model"], resumed[0]["model"]) <= 1e-6
    assert resumed[0]["losses"][4:] == pytest.approx(on_two[0]["losses"][4:], rel=1e-5)
    assert resumed[0]["norms"][4:] == pytest.approx(on_two[0]["norms"][4:], rel=1e-4)


def test_a_stock_run_resumes_sharded(tmp_path: Path) -> None:
    stock = runs("stock", tmp_path, **SAVING)
    assert_equal_runs(runs("sharded", tmp_path, resume="checkpoint-4"), stock, last=4)


def test_load_best_model_at_end_works(tmp_path: Path) -> None:
    """The loss falls during warm-up and then rises, because the learning rate is far too high."""
    options = {**SAVING, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    options |= {"learning_rate": 0.5, "warmup_steps": 8, "max_steps": 8, "metric_for_best_model": "loss"}
    for result in runs("sharded", tmp_path, **options):
        best = min(result["evaluations"])
        assert best < result["evaluations"][-1]
        assert result["evaluated_after"] == pytest.approx(best, rel=1e-6)
        assert result["best"] == str(tmp_path / f"checkpoint-{2 * (1 + result['evaluations'].index(best))}")


@pytest.mark.parametrize("interrupted", [None, 1])
def test_train_can_be_called_again_after_an_interruption(interrupted: int | None, tmp_path: Path) -> None:
    """Gradients reduced before an interruption were once added to the first step of the next training, because the
    Trainer calls the model's zero_grad, which does not clear them.
    """
    options = {"trainings": 2, "interrupted": interrupted, "max_steps": 3}
    ours, stock = runs("sharded", tmp_path / "ours", **options), runs("stock", tmp_path / "stock", **options)
    assert_equal_runs(ours, stock)


# The plain Trainer


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_a_plain_trainer_with_the_callback_saves_whole_and_resumes_anywhere(strategy: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weight_decay": 0.01, "gradient_accumulation_steps": 1}  # an epoch has six steps
    saving = {"save_strategy": strategy, "save_steps": 4}
    if strategy == "best":
        saving |= {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "loss"}
    checkpoint = "checkpoint-6" if strategy == "epoch" else "checkpoint-4"
    straight = runs("external", tmp_path, **options, **saving)
    assert straight[0]["wrapped"] == "DistributedDataParallel"
    saved = torch.load(tmp_path / checkpoint / "optimizer.pt", weights_only=True)
    assert all(type(value) is torch.Tensor for entry in saved["state"].values() for value in entry.values())
    assert sum(entry["exp_avg"].numel() for entry in saved["state"].values()) > 20_000
    if strategy == "steps":
        for world_size, accumulate in ((2, 1), (1, 2)):
            again = {**options, "gradient_accumulation_steps": accumulate}
            resumed = runs("external", tmp_path, world_size, resume=checkpoint, **again)
            assert largest_difference(straight[0]["model"], resumed[0]["model"]) <= 1e-6


def test_saving_without_the_callback_raises_and_names_it(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"transformers\.Trainer, use ShardedTrainer.*ConsolidateCallback\(\)"):
        runs("external", tmp_path, callback=False, **SAVING)  # rank 0 raises, and then the others


def test_save_only_model_does_not_gather_the_state(tmp_path: Path) -> None:
    optimizer = ShardedAdamW([torch.nn.Parameter(torch.zeros(2))], gradient_sync="external")
    with mock.patch.object(optimizer, "consolidate_state_dict") as gather:
        for alone, calls in ((True, 0), (False, 1)):
            arguments = TrainingArguments(str(tmp_path), use_cpu=True, save_only_model=alone)
            control = TrainerControl(should_save=True)
            ConsolidateCallback().on_step_end(arguments, TrainerState(), control, optimizer=optimizer)
            assert gather.call_count == calls


# Refused setups


def refused(out: str, options: dict[str, Any]) -> str:
    try:
        trainer_run.train("sharded", out, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optim": "adafactor"}, ["ValueError", "adafactor", "adamw_torch"]),
        ({"optimizer": {"gradient_sync": "external"}}, ["TypeError", 'gradient_sync="external"']),
        ({"optimizer_class": (torch.optim.SGD, {"lr": 0.1})}, ["TypeError", "SGD", "expected a ShardedAdam"]),
    ],
    ids=["optim", "external", "class"],
)
def test_setups_that_cannot_work_are_refused_on_all_ranks(
    options: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    for message in on_ranks(2, refused, str(tmp_path), options):
        assert all(text in message for text in expected), message


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the Trainer uses the GPU")
def test_processes_that_the_trainer_does_not_count_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs without ``use_cpu=True``, every process that torchrun starts is the only one for a Trainer."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    model, expected = torch.nn.Linear(2, 2), "found num_processes 1, but 2 processes have been started .*use_cpu=True"
    arguments = TrainingArguments(str(tmp_path), report_to=[])
    with pytest.raises(ValueError, match=f"ShardedAccelerator: {expected}"):
        ShardedTrainer(model, arguments)
    with pytest.raises(ValueError, match=f"ConsolidateCallback: {expected}"):
        ConsolidateCallback().on_train_begin(arguments, TrainerState(), TrainerControl())


def test_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """Checkpoints once identified parameters by position, so the state of one layer was loaded into another."""
    runs("sharded", tmp_path, frozen="h.0.", max_steps=1, save_strategy="steps", save_steps=1)
    for message in on_ranks(2, refused, str(tmp_path), {"frozen": "h.1.", "resume": "checkpoint-1"}):
        assert "CheckpointError" in message and "transformer.h.0.attn.c_attn.weight" in message, message


# What the integration relies on in transformers


def test_transformers_has_the_methods_that_the_integration_overrides() -> None:
    trainer = transformers.Trainer
    for method in (
        "create_accelerator_and_postprocess",
        "create_optimizer",
        "get_optimizer_cls_and_kwargs",
        "_save_optimizer_and_scheduler",
        "_load_optimizer_and_scheduler",
    ):
        ours, theirs = getattr(ShardedTrainerMixin, method), getattr(trainer, method)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
        assert f"self.{method}(" in inspect.getsource(trainer)
    assert ShardedTrainer.__mro__.index(ShardedTrainerMixin) < ShardedTrainer.__mro__.index(trainer)
    cls, options = ShardedTrainer.get_optimizer_cls_and_kwargs(TrainingArguments("out", use_cpu=True))
    assert cls is ShardedAdamW and options.keys() >= {"lr", "betas", "eps"}
    assert "model.zero_grad()" in inspect.getsource(trainer._run_epoch)
    saving = inspect.getsource(trainer._maybe_log_save_evaluate)
    assert saving.index("self.control.should_save = is_new_best_metric") < saving.index("self._save_checkpoint")
    assert "control.should_save = True" in inspect.getsource(DefaultFlowCallback.on_step_end)
    assert "control.should_save = True" in inspect.getsource(DefaultFlowCallback.on_epoch_end)


# Logging


def log_and_train(out: str, gradient_sync: str) -> tuple[list[Any], list[dict[str, Any]], set[str]]:
    """What ``LogCallback`` has seen by step, and the Trainer's own log."""
    seen: list[tuple[int, dict[str, float]]] = []
    with as_launched():
        torch.manual_seed(0)
        model = trainer_run.GPT2LMHeadModel(
            trainer_run.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=trainer_run.VOCABULARY, n_positions=16)
        )
        args = TrainingArguments(out, max_steps=4, logging_steps=2, use_cpu=True, report_to=[], save_strategy="no")
        kind, optimizers = ShardedTrainer, (None, None)
        if gradient_sync == "external":
            kind, optimizers = Trainer, (ShardedAdamW(model.named_parameters(), gradient_sync="external"), None)
        callback = LogCallback(lambda values, step: seen.append((step, values)))
        trainer = kind(model, args, train_dataset=trainer_run.Texts(0), callbacks=[callback], optimizers=optimizers)
        trainer.train()
        return seen, trainer.state.log_history, {name for name, _ in model.named_parameters()}


def test_logged_norms_are_without_the_loss_scale() -> None:
    """With max_grad_norm=0 the Trainer leaves it in the gradients."""
    model = torch.nn.Linear(3, 2)
    optimizer, scaler = ShardedAdamW(model.named_parameters()), GradScaler("cpu", init_scale=1024.0)
    prepared = SimpleNamespace(optimizer=optimizer, scaler=scaler)
    args = TrainingArguments("out", logging_steps=1, use_cpu=True, report_to=[])
    state, control = TrainerState(logging_steps=1, is_world_process_zero=True), TrainerControl()
    seen: list[dict[str, float]] = []
    callback = LogCallback(lambda values, step: seen.append(values))
    for _ in range(2):
        scaler.scale(model(torch.ones(1, 3)).sum()).backward()
        for _ in range(2):  # the second time, the gradients are unscaled already
            callback.on_pre_optimizer_step(args, state, control, optimizer=prepared)
        scaler.step(optimizer)
        callback.on_optimizer_step(args, state, control, optimizer=prepared)
        scaler.update()
        optimizer.zero_grad()
    assert [values["gradient_norm/bias"] for values in seen] == pytest.approx([math.sqrt(2)] * 2)


@pytest.mark.parametrize("gradient_sync", ["backward", "external"])
def test_norms_and_ratios_are_logged_at_the_trainers_own_steps(gradient_sync: str, tmp_path: Path) -> None:
    (seen, history, names), (seen_elsewhere, *_) = on_ranks(2, log_and_train, str(tmp_path), gradient_sync)
    assert seen_elsewhere == []
    assert [step for step, _ in seen] == [2, 4]
    for step, values in seen:
        own = next(one["grad_norm"] for one in history if one["step"] == step and "grad_norm" in one)
        own = min(own, 1.0) if gradient_sync == "external" else own  # clipped in p.grad before anyone can look
        assert values["gradient_norm_of_all"] == pytest.approx(own, rel=1e-4)
        assert {name for name in names if values[f"update_ratio/{name}"] > 0} == names
        assert math.hypot(*(values[f"gradient_norm/{name}"] for name in names)) == pytest.approx(own, rel=1e-4)
