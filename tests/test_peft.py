# SPDX-License-Identifier: Apache-2.0
"""LoRA and DoRA adapters train as with DDP and torch's AdamW: in a plain loop, with the Trainer and with trl's."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from shardadam import Precision, ShardedAdamW, load, save
from tests.ranks import on_ranks, rank_and_size

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from shardadam.integrations.transformers import ShardedTrainer
from tests.accelerate_run import as_launched
from tests.trainer_run import Texts

pytestmark = [pytest.mark.scripts, pytest.mark.filterwarnings("ignore::FutureWarning")]
KINDS = pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
EPS = 1e-6


def base_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=12, n_embd=32, n_layer=2, n_head=2, **dropout))


def adapted(dora: bool) -> PeftModel:
    config = LoraConfig(
        r=4, target_modules=["c_attn", "c_proj"], use_dora=dora, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base_model(), config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zeros, whose gradients alone would not be zero at first
            torch.nn.init.normal_(p, std=0.02)
    return model


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys() and len(one) > 0
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def loop(stock: bool, dora: bool, overlap: bool, moments: Any = "fp32") -> dict[str, Any]:
    """Train in a plain loop; merge the adapter right after the last step."""
    model = adapted(dora)
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if stock:
        optimizer: Any = torch.optim.AdamW(adapter.values(), lr=1e-2, eps=EPS)
    else:
        precision = Precision(moments=moments)
        optimizer = ShardedAdamW(adapter.items(), lr=1e-2, eps=EPS, precision=precision, bucket_mb=0.01)
        if overlap:
            optimizer.overlap_gather(model)
    called = DistributedDataParallel(model) if stock else model
    rank, world_size = rank_and_size()
    tokens = Texts(2).tokens[rank::world_size]
    losses = []
    for step in range(6):
        batch = tokens[4 * step : 4 * step + 4]
        loss = called(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    merged = model.merge_and_unload()  # all-gathers of the last step may be under way
    batch = tokens[:4]
    with torch.no_grad():
        after = merged(input_ids=batch).logits
    weight = merged.transformer.h[0].attn.c_attn.weight.detach().clone()
    return {"losses": losses, "logits": after, "weight": weight}


@KINDS
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlapped"])
def test_a_plain_loop_equals_ddp_and_merges(dora: bool, overlap: bool) -> None:
    stock, ours = on_ranks(2, loop, True, dora, False), on_ranks(2, loop, False, dora, overlap)
    start = base_model().transformer.h[0].attn.c_attn.weight.detach()
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        torch.testing.assert_close(mine["weight"], theirs["weight"], rtol=0.0, atol=2e-6)
        torch.testing.assert_close(mine["logits"], theirs["logits"], rtol=0.0, atol=2e-5)
    assert torch.equal(ours[0]["weight"], ours[1]["weight"])
    assert float((ours[0]["weight"] - start).abs().max()) > 1e-3


def with_trainer(out: str, stock: bool, dora: bool, optim: str, resume: bool, **options: Any) -> dict[str, Any]:
    with as_launched(), contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            out,
            optim=optim,
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            adam_epsilon=EPS,
            logging_steps=1,
            save_steps=4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        kind = Trainer if stock else ShardedTrainer
        trainer = kind(adapted(dora), arguments, train_dataset=Texts(2))
        trainer.train(resume_from_checkpoint=f"{out}/checkpoint-4" if resume else None)
        loaded = PeftModel.from_pretrained(base_model(), f"{out}/checkpoint-8").eval()
        merged = loaded.merge_and_unload()
        optimizer = trainer.optimizer.optimizer
        return {
            "wrapped": type(trainer.model_wrapped).__name__,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "adapter": trained(trainer.model),
            "weight": merged.transformer.h[0].attn.c_attn.weight.detach().clone(),
            "state": None if stock else optimizer.memory().state,
        }


@KINDS
def test_the_trainer_equals_its_stock_twin_and_resumes(dora: bool, tmp_path: Path) -> None:
    def run(name: str, stock: bool, optim: str, resume: bool = False) -> list[dict[str, Any]]:
        return on_ranks(2, with_trainer, str(tmp_path / name), stock, dora, optim, resume)

    stock, ours = run("stock", True, "adamw_torch"), run("ours", False, "adamw_torch")
    resumed = run("ours", False, "adamw_torch", resume=True)
    int8 = run("int8", False, "adamw_8bit")
    assert (stock[0]["wrapped"], ours[0]["wrapped"]) == ("DistributedDataParallel", "PeftModelForCausalLM")
    for runs in (ours, resumed):
        assert largest_difference(runs[0]["adapter"], stock[0]["adapter"]) <= 2e-6
        assert runs[0]["losses"] == pytest.approx(stock[0]["losses"], rel=1e-5)
        torch.testing.assert_close(runs[0]["weight"], stock[0]["weight"], rtol=0.0, atol=2e-6)
    assert 0.0 < largest_difference(int8[0]["adapter"], stock[0]["adapter"]) <= 5e-3
    assert int8[0]["losses"] == pytest.approx(stock[0]["losses"], rel=2e-3)
    assert int8[0]["state"] < 0.35 * ours[0]["state"]


def saved_and_loaded(directory: str, dora: bool) -> dict[str, Any]:
    """Save optimizer and adapter with ``save``; a fresh model with another adapter loads them."""
    results = []
    for seed in (0, 1):
        model = adapted(dora)
        adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = ShardedAdamW(adapter.items(), lr=1e-2, eps=EPS, precision=Precision(moments="int8"))
        if seed == 1:
            torch.nn.init.ones_(next(iter(adapter.values())).data)
            load(directory, model=model, optimizer=optimizer)
        tokens = Texts(2).tokens[:4]
        for step in range(4):
            if step == 2 and seed == 0:
                save(directory, step=2, model=model, optimizer=optimizer)
            if step < 2 and seed == 1:
                continue
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(trained(model))
    return {"straight": results[0], "resumed": results[1]}


@KINDS
def test_save_and_load_continue_to_the_bit(dora: bool, tmp_path: Path) -> None:
    for results in on_ranks(2, saved_and_loaded, str(tmp_path), dora):
        assert largest_difference(results["straight"], results["resumed"]) == 0.0
