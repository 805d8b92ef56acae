# SPDX-License-Identifier: Apache-2.0
"""``shardadam plan`` with tensor, expert and pipeline parallelism plans what the fullest rank holds."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardadam import Precision, ShardedAdamW
from shardadam.cli import main
from shardadam.cli.comparison import fsdp2
from shardadam.cli.model_source import ModelSource, decoder_of, find_model_source
from shardadam.cli.plan_parallel import ModelParallel, Part, divide
from shardadam.planner import PlannedParameter, Setting, adamw_need, fitting, lay_out, need, plan
from tests.ranks import on_ranks

ROOT = Path(__file__).parent.parent
HERE = "tests.test_plan_parallel"
Shape = tuple[int, ...]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the root of the checkout, where this module can be imported by its name."""
    monkeypatch.chdir(ROOT)


def shapes(part: Part) -> dict[str, Shape]:
    return {name: one.shape for name, one in part.held.parameters}


def source_of(model: nn.Module) -> ModelSource:
    return ModelSource("a model", "function", "", tuple(PlannedParameter.of_model(model).items()))


# Tensor parallelism


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)


class Decoder(nn.Module):
    """Dimensions that no small number of ranks divides."""

    def __init__(self, layers: int = 2, width: int = 20, hidden: int = 31, tokens: int = 43, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(Block(width, hidden, bias=bias) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)


def tied() -> nn.Module:
    model = Decoder(layers=5)
    model.head.weight = model.embedding.weight
    return model


def cut_by_torch(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(
        model,
        mesh,
        {
            "embedding": RowwiseParallel(),
            "layers.*.q_proj": ColwiseParallel(),
            "layers.*.out": RowwiseParallel(),
            "layers.*.up": ColwiseParallel(),
            "layers.*.down": RowwiseParallel(),
            "head": ColwiseParallel(),
        },
    )


def local_shapes(bias: bool) -> dict[str, Shape]:
    """Return what this rank holds of a decoder that torch has cut."""
    model = cut_by_torch(Decoder(bias=bias), init_device_mesh("cpu", (dist.get_world_size(),)))
    return {
        name: tuple(parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape)
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize(("ranks", "bias"), [(2, True), (3, True), (4, False)])
def test_tensors_are_cut_as_torch_cuts_them_and_the_first_rank_is_planned(ranks: int, bias: bool) -> None:
    found = on_ranks(ranks, local_shapes, bias)
    assert shapes(divide(source_of(Decoder(bias=bias)), ModelParallel(tensor=ranks))) == found[0]
    numels = [sum(prod(shape) for shape in of_rank.values()) for of_rank in found]
    assert numels[0] == max(numels) and (ranks != 3 or min(numels) < max(numels))


def test_cut_tensors_are_held_once_and_others_by_every_rank() -> None:
    part = divide(source_of(Decoder()), ModelParallel(tensor=4))
    copies = {name: one.copies for name, one in part.held.parameters}
    assert {name for name, count in copies.items() if count == 4} == {
        name for name in copies if "norm" in name or name.endswith(("out.bias", "down.bias"))
    }
    assert {*copies.values()} == {1, 4}
    assert part.cuts == {
        "vocabulary (dim 0)": ["embedding.weight", "head.weight"],
        "whole": [
            *("layers.*.norm.weight", "layers.*.norm.bias", "layers.*.out.bias", "layers.*.down.bias"),
            *("norm.weight", "norm.bias"),
        ],
        "columns (dim 0)": [
            *("layers.*.q_proj.weight", "layers.*.q_proj.bias", "layers.*.up.weight", "layers.*.up.bias")
        ],
        "rows (dim 1)": ["layers.*.out.weight", "layers.*.down.weight"],
    }


def test_a_model_of_a_given_size_is_cut_but_for_its_norms() -> None:
    source = decoder_of("7B", 7 * 10**9)
    part = divide(source, ModelParallel(tensor=8))
    norms = sum(one.numel for name, one in source.parameters if "norm" in name)
    assert part.held.numel == pytest.approx((source.numel - norms) / 8 + norms, rel=1e-5)
    assert [name for name, _ in part.held.parameters] == [name for name, _ in source.parameters]


def test_nothing_is_divided_without_parallelism() -> None:
    source = source_of(tied())
    part = divide(source, ModelParallel())
    assert part.held == source and part.copied == () and list(part.cuts) == ["whole"]


def gpt2() -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=3, n_embd=48, n_head=4, vocab_size=301))


def test_weights_of_conv1d_are_recognised_by_their_biases() -> None:
    pytest.importorskip("transformers")
    found = shapes(divide(source_of(gpt2()), ModelParallel(tensor=2)))
    layer = {name.removeprefix("transformer.h.1."): shape for name, shape in found.items() if ".h.1." in name}
    assert found["transformer.wte.weight"] == (151, 48) and found["transformer.wpe.weight"] == (1024, 48)
    assert (layer["attn.c_attn.weight"], layer["attn.c_attn.bias"]) == ((48, 72), (72,))
    assert (layer["mlp.c_fc.weight"], layer["mlp.c_fc.bias"]) == ((48, 96), (96,))
    assert (layer["mlp.c_proj.weight"], layer["mlp.c_proj.bias"]) == ((96, 48), (48,))
    assert prod(layer["attn.c_proj.weight"]) == 24 * 48


# Expert parallelism

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
         "num_hidden_layers": 2, "num_local_experts": 8, "vocab_size": 301}  # fmt: skip


def mixtral() -> nn.Module:
    import transformers

    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES))


def gpt_oss() -> nn.Module:
    """Its fused experts are (in, out), and have biases."""
    import transformers

    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES))


class Experts(nn.Module):
    """A module for each expert, beside a router and an expert that all ranks share."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(16, count, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(16, 24), "w2": nn.Linear(24, 16)}) for _ in range(count)
        )
        self.shared_expert = nn.ModuleDict({"w1": nn.Linear(16, 24), "w2": nn.Linear(24, 16)})


def listed_experts() -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(32, 16), "layers": nn.ModuleList(Experts(5) for _ in range(2))})


@pytest.mark.parametrize(("build", "gate_up", "down"), [(mixtral, (192, 64), (64, 96)), (gpt_oss, (64, 192), (96, 64))])
def test_fused_experts_are_spread_and_cut(build: Any, gate_up: Shape, down: Shape) -> None:
    pytest.importorskip("transformers")
    source, prefix = source_of(build()), "model.layers.1.mlp.experts."
    whole = dict(source.parameters)
    assert whole[f"{prefix}gate_up_proj"].shape == (8, *gate_up)  # what this test knows of transformers
    for experts, tensor in itertools.product((1, 3, 4), (1, 2)):
        part = divide(source, ModelParallel(tensor=tensor, expert=experts))
        found, count = shapes(part), -(-8 // experts)
        half = {size: size // tensor for size in (192, 96)}
        assert found[f"{prefix}gate_up_proj"] == (count, *(half.get(size, size) for size in gate_up))
        assert found[f"{prefix}down_proj"] == (count, *(half.get(size, size) for size in down))
        if build is gpt_oss:
            assert found[f"{prefix}gate_up_proj_bias"] == (count, 192 // tensor)
            assert found[f"{prefix}down_proj_bias"] == (count, 64)
        for name, one in part.held.parameters:
            is_spread = ".experts." in name and experts > 1
            assert (one.group, one.expert_parallel) == ((1, experts) if is_spread else (0, 1))
            if "gate.weight" in name or "router" in name:
                assert one.shape == whole[name].shape and one.copies == tensor


@pytest.mark.parametrize(("experts", "kept"), [(2, 3), (3, 2), (5, 1)])
def test_experts_that_are_modules_are_spread(experts: int, kept: int) -> None:
    source = source_of(listed_experts())
    part = divide(source, ModelParallel(expert=experts))
    names = [name for name, _ in source.parameters if ".experts." not in name or int(name.split(".")[3]) < kept]
    assert [name for name, _ in part.held.parameters] == names
    assert {one.expert_parallel for name, one in part.held.parameters if ".experts." in name} == {experts}
    assert {one.expert_parallel for name, one in part.held.parameters if ".experts." not in name} == {1}
    cut = shapes(divide(source, ModelParallel(tensor=4, expert=experts)))
    assert cut["layers.0.experts.0.w1.weight"] == (6, 16) and cut["layers.0.experts.0.w2.weight"] == (16, 6)
    assert cut["layers.0.shared_expert.w1.bias"] == (6,) and cut["layers.0.gate.weight"] == (5, 16)


def test_state_of_experts_is_split_over_the_ranks_that_hold_them() -> None:
    dense, expert = PlannedParameter((1024, 256)), PlannedParameter((512, 256), group=1, expert_parallel=4)
    setting = Setting(world_size=8, device="cuda", bucket_mb=0.1)
    layout = lay_out([dense, expert, dense, expert], setting)
    of_parameter = {segment.parameter: bucket.world_size for bucket in layout.buckets for segment in bucket.segments}
    assert of_parameter == {0: 8, 1: 2, 2: 8, 3: 2}
    assert sorted(len(arena.parameters) for arena in layout.arenas) == [2, 2]
    memory = plan([dense, expert, dense, expert], setting)
    assert memory.moments == 2 * 8 * (dense.numel // 8 + expert.numel // 2)
    assert memory.parameters == 2 * (dense.nbytes + expert.nbytes)
    alone = plan([dense, dense], setting)
    assert memory.gradient_shard - alone.gradient_shard == 2 * expert.nbytes // 2
    for other in (Setting(world_size=6), Setting(world_size=8, replicas=2)):
        with pytest.raises(ValueError, match=f"expert_parallel: found 4 with {other.world_size} ranks"):
            plan([expert], other)


def test_only_numbers_of_ranks_that_experts_can_be_spread_over_are_proposed() -> None:
    parameters = [PlannedParameter((300, 256), group=1, expert_parallel=3)] * 8
    asked = Setting(world_size=3, precision=Precision(moments="int8", gradients="bf16"), update="backward")
    found = fitting(parameters, asked, need(parameters, asked).total - 1, most_ranks=64)
    assert found.nearest is not None and found.changes == ("world_size",) and found.nearest.world_size == 6
    assert found.nearest_need == need(parameters, found.nearest)


def test_parameters_with_different_numbers_of_copies_never_share_a_bucket() -> None:
    parameters = [PlannedParameter((64, 2)), PlannedParameter((128,), copies=2), PlannedParameter((64, 2))]
    layout = lay_out(parameters, Setting(world_size=2))
    assert sorted(arena.parameters for arena in layout.arenas) == [(1,), (2, 0)]


# Pipeline parallelism


@pytest.mark.parametrize("stages", [2, 3, 4, 5])
@pytest.mark.parametrize("build", [tied, lambda: Decoder(layers=5), lambda: Decoder(layers=5, tokens=4000)])
def test_the_fullest_stage_is_planned(build: Any, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(build())
    part = divide(source, ModelParallel(pipeline=stages))
    layers = [name.split(".")[1] for name, _ in part.held.parameters if name.startswith("layers")]
    counts = [5 // stages + (index < 5 % stages) for index in range(stages)]
    assert len({*layers}) == counts[part.stage]
    first = sum(counts[: part.stage])
    assert part.layers == (f"layers.{first}", f"layers.{first + counts[part.stage] - 1}")
    outer = {name for name, _ in part.held.parameters if not name.startswith("layers")}
    is_tied = "head.weight" not in dict(source.parameters)
    expected: set[str] = set()
    if part.stage == 0:
        expected |= {"embedding.weight"}
    if part.stage == stages - 1:
        expected |= {"norm.weight", "norm.bias", "embedding.weight" if is_tied else "head.weight"}
    assert outer == expected
    assert part.copied == (("embedding.weight",) if is_tied else ())
    assert not any(one.is_tied for one in part.held.planned)
    block = sum(one.numel for name, one in source.parameters if name.startswith("layers.0."))
    vocabulary = dict(source.parameters)["embedding.weight"].numel
    totals = [block * count for count in counts]
    totals[0] += vocabulary
    totals[-1] += vocabulary + 40
    assert part.held.numel == totals[part.stage] == max(totals)


def test_a_stage_that_is_mostly_frozen_is_not_the_fullest() -> None:
    model = Decoder(layers=4)
    model.embedding.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    model.layers[1].requires_grad_(False)
    assert divide(source_of(model), ModelParallel(pipeline=2)).stage == 1
    model.requires_grad_(True)
    model.head.requires_grad_(False)
    assert divide(source_of(model), ModelParallel(pipeline=2)).stage == 0


# The command


def planned_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return " ".join(printed.err.split())


def test_the_command_plans_the_part_of_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ranks", "48", "--tensor-parallel", "2", "--expert-parallel", "4", "--pipeline-parallel", "2"]
    found = planned_json(capsys, f"{HERE}:listed_experts", *options, "--clip", "--memory", "1GB")
    part = divide(source_of(listed_experts()), ModelParallel(2, 4, 2))
    assert found["what"]["parameters"] == sum(one.numel() for one in listed_experts().parameters())
    assert found["asked"]["ranks"] == 48
    assert found["parallel"] == {
        "tensor": 2,
        "expert": 4,
        "pipeline": 2,
        "data": 12,
        "stage": 1,
        "layers": ["layers.0", "layers.0"],
        "tensors": len(part.held.parameters),
        "parameters": part.held.numel,
        "trainable": part.held.numel,
        "cuts": part.cuts,
    }
    for row in found["formats"]:
        setting = Setting(
            world_size=12,
            device="cuda",
            clips=True,
            gradient_sync=row["gradient_sync"],
            precision=Precision(moments=row["moments"], master=row["master"]),
        )
        assert row["bytes"]["total"] == need(part.held.planned, setting).total
        assert row["built"]["total"] == plan(part.held.planned, setting).total
        assert row["fits_from"] == 4 * 4  # one rank for each part of tensors, stages and experts
    rows = {row["name"]: row["bytes"] for row in found["comparison"]}
    assert rows["adamw"]["total"] == adamw_need(part.held.planned).total
    assert rows["fsdp2"]["total"] == fsdp2(part.held, 12, keeps_masters=True).total


def memories(rows: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Return ``optimizer.memory()`` and its total for the format of each row, of a decoder that torch has cut."""
    mesh, found = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), []
    for row in rows:
        optimizer = ShardedAdamW(
            cut_by_torch(Decoder(), mesh["tp"]).parameters(),
            process_group=mesh["dp"],
            precision=Precision(moments=row["moments"], master=row["master"]),
            gradient_sync=row["gradient_sync"],
            bucket_mb=0.004,
        )
        memory = optimizer.memory()
        found.append({**asdict(memory), "total": memory.total})
    return found


def test_planned_bytes_equal_the_memory_of_an_optimizer_over_what_torch_has_cut(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--ranks", "4", "--tensor-parallel", "2", "--device", "cpu", "--bucket-mb", "0.004"]
    found = planned_json(capsys, f"{HERE}:Decoder", *options, "--gradient-sync", "external")
    rows = found["formats"]
    assert {row["gradient_sync"] for row in rows} == {"step", "backward", "external"}
    assert on_ranks(4, memories, rows)[0] == [row["built"] for row in rows]


def test_fsdp2_shards_experts_over_the_ranks_that_hold_them() -> None:
    planned = PlannedParameter((64, 8), group=1, expert_parallel=4)
    source = ModelSource("", "", "", (("experts.w1", planned),))
    assert fsdp2(source, 16, keeps_masters=False).kinds["gradient_shard"] == planned.nbytes // 4


def test_proposed_ranks_count_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtype", "fp32", "--tensor-parallel", "2", "--pipeline-parallel", "2", "--bucket-mb", "1"]
    options += ["--gradients", "bf16", "--update", "backward"]
    part = divide(find_model_source("10M", torch.float32), ModelParallel(tensor=2, pipeline=2)).held.planned
    precision = Precision(moments="int8", gradients="bf16")
    asked = Setting(world_size=2, precision=precision, update="backward", bucket_mb=1, device="cuda")
    available = need(part, asked).total - 1
    options += ["--moments", "int8", "--memory", str(available)]
    choice = planned_json(capsys, "10M", "--ranks", "8", *options, code=1)["choice"]
    expected = fitting(part, asked, available).nearest
    assert expected is not None and choice["changes"] == ["ranks"]
    assert choice["ranks"] == 4 * expected.world_size == 16
    assert main(["plan", "10M", "--ranks", "8", *options]) == 1
    assert "hoose 16 ranks instead" in capsys.readouterr().out.replace("\n", " ")


def test_without_parallelism_the_json_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned_json(capsys, "1M")["parallel"] is None


def test_the_text_says_how_tensors_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ranks", "32", "--tensor-parallel", "4", "--pipeline-parallel", "2", "--memory", "20GB"]
    assert main(["plan", "7B", *options]) == 0
    text = capsys.readouterr().out
    for fact in ("tensor 4 x pipeline 2 x data 4", "the fullest, 1 of 2: layers.0 to layers.16", "7,000,000,000 in",
                 "rows (dim 1) layers.*.attention.out.weight, layers.*.mlp.down.weight",
                 "vocabulary (dim 0) embedding.weight", "a power of two times 8 ranks of one copy",
                 "32 ranks on 1 host", "run over the 4 data-parallel ranks"):  # fmt: skip
        assert fact in " ".join(text.split()), fact
    assert max(len(line) for line in text.splitlines()) <= 80
    assert main(["plan", f"{HERE}:tied", *options]) == 0
    assert "on both ends        embedding.weight, as it is tied" in capsys.readouterr().out
    assert main(["plan", f"{HERE}:listed_experts", "--expert-parallel", "2"]) == 0
    assert "experts over 2 groups of 4 data-parallel ranks" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", "7B"]) == 0
    assert "What a rank holds" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["7B", "--ranks", "12", "--tensor-parallel", "4", "--pipeline-parallel", "2"],
         "--ranks: found 12 with --tensor-parallel 4 and --pipeline-parallel 2, expected a multiple of 8: their "
         "product is one copy of the model. Give --ranks 16"),
        ([f"{HERE}:listed_experts", "--ranks", "8", "--tensor-parallel", "2", "--expert-parallel", "3"],
         "--expert-parallel: found 3 with 4 data-parallel ranks (ranks / tensor / pipeline), expected a divisor of it"),
        ([f"{HERE}:listed_experts", "--expert-parallel", "8"], "found 8 with 5 experts in a layer, expected at most"),
        (["7B", "--expert-parallel", "2"], "in 7B no experts; expected 1. Leave it out"),
        (["7B", "--ranks", "64", "--pipeline-parallel", "64"],
         "--pipeline-parallel: found 64 with a model of 33 layers (numbered modules), expected at most as many. Give "
         "--pipeline-parallel 33"),
        (["17", "--tensor-parallel", "2"], "in 17 no tensor whose name says how to cut it"),
        (["17", "--pipeline-parallel", "2"], "a model of 0 layers"),
        (["7B", "--tensor-parallel", "2", "--replicas", "8"], "--replicas: found 8 with 4 data-parallel ranks"),
        ([f"{HERE}:listed_experts", "--expert-parallel", "2", "--replicas", "2"], "expected 1: experts are not"),
    ],
)  # fmt: skip
def test_parts_that_do_not_divide_are_refused(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in refused(capsys, *arguments)
