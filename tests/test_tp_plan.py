# SPDX-License-Identifier: Apache-2.0
"""Models of transformers, sharded by their own ``tp_plan`` and ``ep_plan``, train as the whole models do in one process
with torch.optim.AdamW.

Their plans make everything that the optimizer may meet: vocabulary-parallel embeddings whose gradients are replicated,
experts cut along a fused dimension (``_StridedShard``) or spread over the ranks, tied heads, plain norms and routers
beside DTensors, and gradients that a hook of transformers sums over the tensor-parallel ranks.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from shardadam import ShardedAdamW
from tests.ranks import on_ranks, rank_and_size

transformers = pytest.importorskip("transformers")
expert_parallel = pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers is too old")
from transformers.distributed import DistributedConfig  # noqa: E402
from transformers.distributed.tensor_parallel import apply_tensor_parallelism  # noqa: E402

from shardadam.integrations.accelerate import ShardedAccelerator  # noqa: E402
from shardadam.integrations.transformers import ShardedTrainer  # noqa: E402
from tests.accelerate_run import as_launched  # noqa: E402

pytestmark = [pytest.mark.scripts, pytest.mark.timeout(300)]
STEPS, BATCH, LENGTH, VOCABULARY = 200, 4, 8, 31  # the vocabulary does not divide by 2
OPTIONS: dict[str, Any] = {"lr": 3e-3, "eps": 1e-6, "weight_decay": 0.1}
MAX_NORM = 1.0


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        losses, norms: of each step, over the whole batch and the whole model.
        parameters: the whole ones after the last step.
        placements: of the DTensors, by name.
    """

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]
    placements: dict[str, str]


@cache
def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def build(kind: str) -> nn.Module:
    """Return the same model on all ranks."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": "tied" in kind,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    if "mixtral" in kind:
        config = transformers.MixtralConfig(**options, num_local_experts=8, num_experts_per_tok=2)
        return transformers.MixtralForCausalLM(config)
    if "qwen3" in kind:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**options, head_dim=4))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))


def shard(model: nn.Module, tensor_mesh: DeviceMesh, *, spread_experts: bool) -> None:
    """Shard a whole model over a 1-D mesh, with its own plans. Local."""
    size = tensor_mesh.size()
    plans = model._resolve_parallel_plans(DistributedConfig(tp_size=size, ep_size=size if spread_experts else 1))
    if model.config.tie_word_embeddings:  # plans name both, and a module finds one of them only
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach())
    apply_tensor_parallelism(model, tensor_mesh, plans[0])
    if spread_experts:
        expert_parallel.apply_expert_parallelism(model, tensor_mesh, tensor_mesh, plans[1])
    model.tie_weights()


def batch_of(step: int) -> Tensor:
    """Sequences that count upwards in strides, which can be learned; (BATCH, LENGTH), int64."""
    generator = torch.Generator().manual_seed(step)
    starts, strides = torch.randint(VOCABULARY, (BATCH, 1), generator=generator), torch.tensor([[1], [2], [1], [3]])
    return (starts + strides * torch.arange(LENGTH)) % VOCABULARY


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train_whole(kind: str, steps: int = STEPS, **options: Any) -> Run:
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), **{**OPTIONS, **options})
    losses, norms = [], []
    for step in range(steps):
        tokens = batch_of(step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Run(losses, norms, {name: whole(p) for name, p in model.named_parameters()}, {})


def train_sharded(kind: str, gradient_sync: str, spread_experts: bool, steps: int = STEPS, **options: Any) -> Run:
    """Train with tensor parallelism over 2 ranks and data parallelism over the others."""
    mesh = mesh_of((rank_and_size()[1] // 2, 2), ("dp", "tp"))
    model = build(kind)
    shard(model, mesh["tp"], spread_experts=spread_experts)
    parameters = list(model.named_parameters())
    optimizer = ShardedAdamW(
        parameters, process_group=mesh["dp"], gradient_sync=gradient_sync, max_grad_norm=MAX_NORM, **OPTIONS, **options
    )
    return train_with(model, optimizer, mesh["dp"], steps)


def train_with(model: nn.Module, optimizer: Any, data_mesh: DeviceMesh, steps: int, micro_batches: int = 1) -> Run:
    losses, norms = [], []
    for step in range(steps):
        total = torch.zeros(())
        for tokens in batch_of(step).chunk(data_mesh.size())[data_mesh.get_local_rank()].chunk(micro_batches):
            loss = model(input_ids=tokens, labels=tokens).loss / micro_batches
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total, group=data_mesh.get_group())
        losses.append(total.item() / data_mesh.size())
        norms.append(optimizer.grad_norm.item())
    parameters = dict(model.named_parameters())
    placements = {name: repr(p.placements) for name, p in parameters.items() if isinstance(p, DTensor)}
    return Run(losses, norms, {name: whole(p) for name, p in parameters.items()}, placements)


def on_four(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    return on_ranks(4, function, *arguments, deadline_s=250)  # the first call imports transformers on four ranks


def assert_equal_runs(sharded: list[Run], whole: Run, *, tolerance: float = 2e-5) -> None:
    for run in sharded:
        assert run.losses == pytest.approx(whole.losses, rel=tolerance)
        assert run.norms == pytest.approx(whole.norms, rel=tolerance)
        assert run.parameters.keys() == whole.parameters.keys()
        for name, value in whole.parameters.items():
            assert (run.parameters[name] - value).abs().max() < tolerance, name
    assert max(whole.norms) > MAX_NORM  # some steps clip


@pytest.mark.parametrize(
    ("kind", "spread_experts"), [("llama", False), pytest.param("mixtral", True, marks=pytest.mark.long)]
)
def test_200_steps_equal_those_of_the_whole_model_in_one_process(kind: str, spread_experts: bool) -> None:
    runs = on_four(train_sharded, kind, "backward", spread_experts)
    whole = train_whole(kind)
    assert_equal_runs(runs, whole, tolerance=1e-4)
    assert whole.losses[-1] < 0.4 * whole.losses[0]


CASES = [
    (kind, gradient_sync, spread_experts)
    for kind, spread_experts in (("llama tied", False), ("mixtral", False), ("mixtral", True), ("qwen3", False))
    for gradient_sync in ("backward", "step")
]


@pytest.mark.parametrize(("kind", "gradient_sync", "spread_experts"), CASES)
def test_every_plan_and_mode(kind: str, gradient_sync: str, spread_experts: bool) -> None:
    assert_equal_runs(on_four(train_sharded, kind, gradient_sync, spread_experts, 8), train_whole(kind, 8))


def test_plans_make_the_placements_that_these_tests_are_about() -> None:
    llama, cut, spread = (
        on_four(train_sharded, kind, "step", spread_experts, 1)[0].placements
        for kind, spread_experts in (("llama", False), ("mixtral", False), ("mixtral", True))
    )
    assert "Shard(dim=0)" in llama["model.embed_tokens.weight"] and "model.norm.weight" not in llama
    assert "_StridedShard(dim=1, sf=2)" in cut["model.layers.0.mlp.experts.gate_up_proj"]
    assert "(Shard(dim=0)" in spread["model.layers.0.mlp.experts.gate_up_proj"]


# Hooks of transformers


def train_with_small_buckets(forward_first: bool, micro_batches: int) -> Run:
    mesh = mesh_of((2, 2), ("dp", "tp"))
    model = build("qwen3")
    shard(model, mesh["tp"], spread_experts=False)
    if forward_first:
        model(input_ids=batch_of(0))  # registers the hooks that sum the gradients of q_norm and k_norm over "tp"
    parameters = list(model.named_parameters())
    optimizer = ShardedAdamW(parameters, process_group=mesh["dp"], max_grad_norm=MAX_NORM, bucket_mb=1e-4, **OPTIONS)
    return train_with(model, optimizer, mesh["dp"], 4, micro_batches)


@pytest.mark.parametrize(("forward_first", "micro_batches"), [(False, 1), (True, 1), (False, 2)])
def test_hooks_that_are_registered_in_the_first_forward(forward_first: bool, micro_batches: int) -> None:
    """The gradients of q_norm and k_norm are summed over "tp" by hooks, which must run before the optimizer's, even if
    they are registered after them. The optimizer once took these gradients first, and the hooks found none.
    """
    assert_equal_runs(on_four(train_with_small_buckets, forward_first, micro_batches), train_whole("qwen3", 4))


# Experts spread over data-parallel ranks


def train_expert_parallel(gradient_sync: str, steps: int) -> Run:
    """Train on 4 data-parallel ranks. Experts are spread over 2 of them, and tokens travel to their experts."""
    dense, sparse = mesh_of((4, 1), ("dp", "tp")), mesh_of((2, 2), ("edp", "ep"))
    model = build("mixtral")
    _, plan, _ = model._resolve_parallel_plans(DistributedConfig(fsdp_size=4, ep_size=2))
    expert_parallel.apply_expert_parallelism(model, sparse["ep"], dense["tp"], plan)
    named = list(model.named_parameters())
    groups = [
        {"params": [(name, p) for name, p in named if ".experts." not in name]},
        {"params": [(name, p) for name, p in named if ".experts." in name], "process_group": sparse["edp"]},
    ]
    optimizer = ShardedAdamW(
        groups, process_group=dense["dp"], gradient_sync=gradient_sync, max_grad_norm=MAX_NORM, **OPTIONS
    )
    return train_with(model, optimizer, dense["dp"], steps)


@pytest.mark.parametrize(("gradient_sync", "steps"), [("backward", STEPS), ("step", 8)])
def test_experts_that_get_tokens_from_other_ranks(gradient_sync: str, steps: int) -> None:
    runs = on_four(train_expert_parallel, gradient_sync, steps)
    assert_equal_runs(runs, train_whole("mixtral", steps), tolerance=1e-4 if steps == STEPS else 2e-5)
    assert "Shard(dim=0)" in runs[0].placements["model.layers.0.mlp.experts.down_proj"]


# FSDP2 with tensor and expert parallelism, as from_pretrained makes it


def train_fully_sharded(directory: str, kind: str, sizes: dict[str, int], steps: int) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of FSDP2, about views
        model = getattr(transformers, type(build(kind)).__name__).from_pretrained(
            directory, distributed_config=DistributedConfig(**sizes)
        )
        mesh = model._mesh_manager.get_mesh("fsdp")
        optimizer = ShardedAdamW(
            model.named_parameters(), process_group=mesh, gradient_sync="external", max_grad_norm=MAX_NORM, **OPTIONS
        )
        return train_with(model, optimizer, mesh, steps)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {"tp_size": 2, "fsdp_size": 2}),
        ("mixtral", {"tp_size": 2, "fsdp_size": 2}),
        ("mixtral", {"tp_size": 2, "fsdp_size": 2, "ep_size": 2}),
        ("mixtral", {"tp_size": 1, "fsdp_size": 4, "ep_size": 2}),
    ],
    ids=["llama", "experts cut", "experts spread", "experts over data-parallel ranks"],
)
def test_from_pretrained_with_fully_shard(kind: str, sizes: dict[str, int], tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path)
    runs = on_four(train_fully_sharded, str(tmp_path), kind, sizes, 6)
    assert_equal_runs(runs, train_whole(kind, 6))


# Trainers


def train_with_accelerator(directory: str, steps: int) -> tuple[Run, str]:
    """Return also what ``save_state`` raises."""
    with as_launched():
        accelerator = ShardedAccelerator(cpu=True)
        mesh = mesh_of((2, 2), ("dp", "tp"))
        model = build("llama")
        shard(model, mesh["tp"], spread_experts=False)
        optimizer = ShardedAdamW(model.named_parameters(), process_group=mesh["dp"], **OPTIONS)
        model, optimizer = accelerator.prepare(model, optimizer)
        losses, norms = [], []
        for step in range(steps):
            tokens = batch_of(step).chunk(2)[mesh["dp"].get_local_rank()]
            with accelerator.accumulate(model):
                loss = model(input_ids=tokens, labels=tokens).loss
                accelerator.backward(loss)
                norms.append(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM).item())
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        run = Run(losses, norms, {name: whole(p) for name, p in model.named_parameters()}, {})
        return run, error_of(accelerator.save_state, directory)


def error_of(function: Callable[..., Any], *arguments: Any) -> str:
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_sharded_accelerator_trains_and_refuses_to_save_a_part(tmp_path: Path) -> None:
    runs, messages = zip(*on_four(train_with_accelerator, str(tmp_path), 6), strict=True)
    assert_equal_runs(list(runs), train_whole("llama", 6))
    for message in messages:
        assert re.search("save_state: found a model that is cut .* shardadam.save", message), message


def prepare_a_loader(loader_first: bool) -> str:
    with as_launched():
        accelerator = ShardedAccelerator(cpu=True)
        mesh = mesh_of((2, 2), ("dp", "tp"))
        model = build("llama")
        shard(model, mesh["tp"], spread_experts=False)
        optimizer = ShardedAdamW(model.named_parameters(), process_group=mesh["dp"], **OPTIONS)
        loader = DataLoader(batch_of(0), batch_size=1)
        calls = [[loader], [model, optimizer]]
        accelerator.prepare(*calls[not loader_first])
        return error_of(accelerator.prepare, *calls[loader_first])


@pytest.mark.parametrize("loader_first", [False, True])
def test_a_loader_that_would_give_parts_of_the_model_different_batches_is_refused(loader_first: bool) -> None:
    for message in on_four(prepare_a_loader, loader_first):
        assert re.search("prepare: found a data loader .* DistributedSampler", message), message


class Texts(Dataset):
    """The texts of this data-parallel rank, in order."""

    def __init__(self, data_mesh: DeviceMesh, steps: int) -> None:
        parts = [batch_of(step).chunk(data_mesh.size())[data_mesh.get_local_rank()] for step in range(steps)]
        self.texts = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.texts[index], "labels": self.texts[index]}


class OwnBatches(ShardedTrainer):
    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=self.args.train_batch_size)


def train_with_trainer(directory: str, steps: int, own_batches: bool, save_strategy: str) -> Run | str:
    with as_launched(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        mesh = mesh_of((2, 2), ("dp", "tp"))
        model = build("llama")
        shard(model, mesh["tp"], spread_experts=False)
        arguments = transformers.TrainingArguments(
            directory,
            max_steps=steps,
            per_device_train_batch_size=BATCH // 2,
            max_grad_norm=MAX_NORM,
            lr_scheduler_type="constant",
            save_strategy=save_strategy,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        options = {"process_group": mesh["dp"], **OPTIONS, "weight_decay": 0.0}
        trainer = (OwnBatches if own_batches else ShardedTrainer)(
            model, arguments, train_dataset=Texts(mesh["dp"], steps), optimizer_cls_and_kwargs=(ShardedAdamW, options)
        )
        message = error_of(trainer.train)
        if message != "nothing":
            return message
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        parameters = {name: whole(p) for name, p in model.named_parameters()}
        return Run([entry["loss"] for entry in logged], [entry["grad_norm"] for entry in logged], parameters, {})


def test_a_sharded_trainer_trains(tmp_path: Path) -> None:
    runs = on_four(train_with_trainer, str(tmp_path), 6, True, "no")
    assert_equal_runs(runs, train_whole("llama", 6, weight_decay=0.0))


@pytest.mark.parametrize(
    ("own_batches", "save_strategy", "expected"),
    [
        (False, "no", "prepare: found a data loader .* override get_train_dataloader"),
        (True, "steps", 'save_strategy: found "steps" .* expected "no".* shardadam.save'),
    ],
)
def test_a_sharded_trainer_refuses_what_would_be_wrong(
    own_batches: bool, save_strategy: str, expected: str, tmp_path: Path
) -> None:
    for message in on_four(train_with_trainer, str(tmp_path), 3, own_batches, save_strategy):
        assert isinstance(message, str) and re.search(expected, message), message
