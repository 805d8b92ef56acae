# SPDX-License-Identifier: Apache-2.0
"""The examples with trl train as trl's own trainers do with DDP and torch's AdamW; so do trainers that are adopted."""

from __future__ import annotations

import contextlib
import io
import runpy
from collections.abc import Iterator
from functools import partial, partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.ranks import on_ranks

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from shardadam import Precision, ShardedAdamW
from shardadam.integrations.transformers import ConsolidateCallback, ShardedTrainer
from tests.accelerate_run import as_launched

pytestmark = [pytest.mark.scripts, pytest.mark.timeout(240), pytest.mark.filterwarnings("ignore::FutureWarning")]
EXAMPLES = Path(__file__).parent.parent / "examples"
DEADLINE_S = 200.0
FIGURES = {"trl_sft": ["loss"], "trl_dpo": ["loss", "rewards/margins"], "trl_grpo": ["reward", "entropy"]}


def result_of(trainer: Any) -> dict[str, Any]:
    optimizer = trainer.optimizer.optimizer
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "optimizer": type(optimizer).__name__,
        "state": optimizer.memory().state if hasattr(optimizer, "memory") else sum(value.nbytes for value in states),
        "numel": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "history": [entry for entry in trainer.state.log_history if "learning_rate" in entry],
        "model": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "reference": [p.detach().clone() for p in trainer.ref_model.parameters()]
        if getattr(trainer, "ref_model", None) is not None
        else [],
    }


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Trainers of trl's own classes are adopted when they begin to train, and gather under the next forward."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(ShardedTrainer, "overlap_gather", True))
        for kind in (SFTTrainer, DPOTrainer, GRPOTrainer):
            stack.enter_context(patch.object(kind, "train", lambda self: Trainer.train(ShardedTrainer.adopt(self))))
        yield


@contextlib.contextmanager
def aligning_to(reference: str | None) -> Iterator[None]:
    """GRPO has a reference: the model of a directory, which follows the trained one, or None: what LoRA adapts."""
    options: dict[str, Any] = {"beta": 0.5}
    with contextlib.ExitStack() as stack:
        if reference is None:
            lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
            init = partialmethod(GRPOTrainer.__init__, peft_config=lora)
            stack.enter_context(patch.object(GRPOTrainer, "__init__", init))
        else:
            options |= {"sync_ref_model": True, "ref_model_sync_steps": 8}
            stack.enter_context(patch("transformers.GPT2Config", partial(GPT2Config, name_or_path=reference)))
        stack.enter_context(patch("trl.GRPOConfig", partial(GRPOConfig, **options)))
        yield


def example(name: str, optim: str, flavour: str, *reference: str | None) -> dict[str, Any]:
    """Run an example as it is, with ``--stock``, or with ``--stock`` and trainers that are adopted."""
    printed = io.StringIO()
    adopted_or_not = adopting() if flavour == "adopted" else contextlib.nullcontext()
    with_reference = aligning_to(*reference) if reference else contextlib.nullcontext()
    with as_launched(), contextlib.redirect_stdout(printed), adopted_or_not, with_reference:
        main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
        return {
            **result_of(main(optim, flavour != "sharded")),
            "printed": [line for line in printed.getvalue().splitlines() if " to " in line],
        }


def figures(run: dict[str, Any], name: str) -> list[float]:
    found = [float(entry[name]) for entry in run["history"]]
    assert len(found) > 1
    return found


def largest_difference(run: dict[str, Any], other: dict[str, Any]) -> float:
    """Over all parameters but the biases of attention's keys: their gradients are rounding errors."""
    assert run["model"].keys() == other["model"].keys()
    names = [name for name in run["model"] if not name.endswith("c_attn.bias")]
    return max(float((run["model"][name] - other["model"][name]).abs().max()) for name in names)


@pytest.mark.parametrize("name", FIGURES)
def test_examples_equal_their_stock_twins(name: str) -> None:
    """With 8 bits, a few of GRPO's samples may differ: the average reward is compared."""
    stock = on_ranks(2, example, name, "adamw_torch", "stock", deadline_s=DEADLINE_S)
    exact = on_ranks(2, example, name, "adamw_torch", "sharded", deadline_s=DEADLINE_S)
    int8 = on_ranks(2, example, name, "adamw_8bit", "sharded", deadline_s=DEADLINE_S)
    adopted = on_ranks(2, example, name, "adamw_8bit", "adopted", deadline_s=DEADLINE_S)
    assert (stock[0]["wrapped"], stock[0]["optimizer"]) == ("DistributedDataParallel", "AdamW")
    for runs in (exact, int8, adopted):
        assert (runs[0]["wrapped"], runs[0]["optimizer"]) == ("GPT2LMHeadModel", "ShardedAdamW")
        assert largest_difference(*runs) == 0.0
    assert largest_difference(adopted[0], int8[0]) == 0.0
    assert largest_difference(exact[0], stock[0]) <= 1e-5
    for runs in (exact, int8, adopted):
        assert all(map(torch.equal, runs[0]["reference"], stock[0]["reference"]))
    assert 0.0 < largest_difference(int8[0], stock[0]) <= 2e-2
    for figure in FIGURES[name]:
        assert figures(exact[0], figure) == pytest.approx(figures(stock[0], figure), rel=2e-5, abs=1e-6)
        if name == "trl_grpo":
            rough, whole = (sum(figures(runs[0], figure)) / 20 for runs in (int8, stock))
            assert rough == pytest.approx(whole, abs=0.05)
        else:
            assert figures(int8[0], figure) == pytest.approx(figures(stock[0], figure), rel=2e-3, abs=1e-3)
    assert stock[0]["printed"] and not stock[1]["printed"]
    assert 8.0 <= stock[0]["state"] / stock[0]["numel"] < 8.1
    assert 4.0 <= exact[0]["state"] / exact[0]["numel"] < 4.3
    assert 1.0 <= int8[0]["state"] / int8[0]["numel"] < 1.2


@pytest.mark.parametrize("is_lora", [False, True])
def test_grpo_with_a_reference_model_equals_its_stock_twin_when_it_is_adopted(is_lora: bool, tmp_path: Path) -> None:
    """The divergence from it counts; where it follows the trained model, it finds gathered parameters."""
    if not is_lora:
        torch.manual_seed(1)
        GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=64, n_layer=2, n_head=2)).save_pretrained(
            tmp_path
        )
    reference = None if is_lora else str(tmp_path)
    stock, adopted = (
        on_ranks(2, example, "trl_grpo", "adamw_torch", flavour, reference, deadline_s=DEADLINE_S)
        for flavour in ("stock", "adopted")
    )
    assert [runs[0]["optimizer"] for runs in (stock, adopted)] == ["AdamW", "ShardedAdamW"]
    assert largest_difference(*adopted) == 0.0 and largest_difference(adopted[0], stock[0]) <= 1e-5
    for figure in ("reward", "loss", "kl"):
        assert figures(adopted[0], figure) == pytest.approx(figures(stock[0], figure), rel=1e-4, abs=1e-6)
    assert figures(adopted[0], "kl")[-1] > 1e-3
    assert bool(stock[0]["reference"]) == (not is_lora)
    for runs in zip(adopted[0]["reference"], stock[0]["reference"], strict=True):
        torch.testing.assert_close(*runs, rtol=0, atol=1e-5)


FLAVOURS = ("stock", "adopted", "external")


def adopted(out: str, flavour: str) -> dict[str, Any]:
    """Train with LoRA in trl's own class: "stock", "adopted" after it is built, or with DDP and "external" int8."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=64, n_layer=2, n_head=2, eos_token_id=0))
    words = Tokenizer(models.WordLevel({"<end>": 0}, "<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<end>", eos_token="<end>")
    texts = [{"input_ids": [(i + j) % 31 + 1 for j in range(8)]} for i in range(64)]
    with as_launched(), contextlib.redirect_stdout(io.StringIO()):
        optim = "adamw_torch" if flavour == "stock" else "adamw_8bit"
        arguments = SFTConfig(
            out, optim=optim, max_steps=8, learning_rate=1e-2, logging_steps=1, use_cpu=True, bf16=False
        )
        given: dict[str, Any] = {}
        if flavour == "external":
            precision = Precision(moments="int8")
            options = {"lr": 1e-2, "gradient_sync": "external", "precision": precision}
            given = {"optimizer_cls_and_kwargs": (ShardedAdamW, options), "callbacks": [ConsolidateCallback()]}
        lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
            peft_config=lora,
            **given,
        )
        if flavour == "adopted":
            trainer = ShardedTrainer.adopt(trainer)
        trainer.train()
        return result_of(trainer)


def test_a_trainer_of_trls_own_class_has_int8_state_adopted_or_external(tmp_path: Path) -> None:
    stock, *others = (on_ranks(2, adopted, str(tmp_path / one), one, deadline_s=DEADLINE_S) for one in FLAVOURS)
    wrapped = [runs[0]["wrapped"] for runs in (stock, *others)]
    assert wrapped == ["DistributedDataParallel", "PeftModelForCausalLM", "DistributedDataParallel"]
    for runs in others:
        assert runs[0]["optimizer"] == "ShardedAdamW"
        assert 0.0 < largest_difference(runs[0], stock[0]) <= 1e-2 and largest_difference(*runs) == 0.0
        assert figures(runs[0], "loss") == pytest.approx(figures(stock[0], "loss"), rel=2e-3)
        assert runs[0]["state"] < 0.2 * stock[0]["state"]
    assert (tmp_path / "adopted" / "checkpoint-8" / "shardadam").is_dir()
    assert (tmp_path / "external" / "checkpoint-8" / "optimizer.pt").is_file()
