# SPDX-License-Identifier: Apache-2.0
"""``shardadam plan`` prints the bytes that ``optimizer.memory()`` counts, for every kind of model, and what fits."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardadam import Precision, ShardedAdamW, sums
from shardadam.cli import main
from shardadam.cli.comparison import KINDS, adamw, fsdp2
from shardadam.cli.model_source import decoder_of, find_model_source, parse_count
from shardadam.cli.plan import parse_size
from shardadam.planner import PlannedParameter, Setting, adamw_need, fitting, need
from tests.ranks import on_ranks

ROOT = Path(__file__).parent.parent
Parameters = list[tuple[tuple[int, ...], torch.dtype, bool]]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the root of the checkout, where ``tests.test_plan:...`` can be imported."""
    monkeypatch.chdir(ROOT)


def planned_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the message of a refused plan, in one line; it has no traceback."""
    assert main(["plan", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("shardadam: ") and "Traceback" not in printed.err
    return " ".join(printed.err.split())


# Five models


def launch_decoder() -> nn.Module:
    """A decoder whose head and embedding are tied."""
    spec = importlib.util.spec_from_file_location("launch_model", ROOT / "launch" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["launch_model"] = module  # dataclasses look the module up there
    spec.loader.exec_module(module)
    decoder: nn.Module = module.Decoder(module.ModelConfig(layers=2, width=64, heads=2, context=32))
    return decoder


def convolutions() -> nn.Module:
    return nn.Sequential(
        *[nn.Sequential(nn.Conv2d(size, 2 * size, 3), nn.BatchNorm2d(2 * size), nn.ReLU()) for size in (3, 6, 12)],
        nn.Flatten(),
        nn.Linear(24, 10),
    )


class Odd(nn.Module):
    """Parameters of mixed dtypes, frozen, scalar, empty, and of odd shapes."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((300, 40), (129,), (), (0,), (64, 64), (1,), (7, 15))
        for dtype in (torch.float32, torch.bfloat16):
            for index, shape in enumerate(shapes):
                parameter = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=index != 4)
                self.register_parameter(f"{str(dtype)[6:]}_{index}", parameter)


GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_embd": 48, "n_head": 4,
        "vocab_size": 301, "n_positions": 33, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
MINILM = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 96, "intermediate_size": 384,
          "num_attention_heads": 12, "num_hidden_layers": 2, "vocab_size": 305, "dtype": "float16"}  # fmt: skip
CONFIGS = {"gpt2": GPT2, "minilm": MINILM}
FUNCTIONS = {"decoder": launch_decoder, "convolutions": convolutions, "odd": Odd}
MODELS = [*FUNCTIONS, *CONFIGS]


def write_config(name: str, directory: Path) -> str:
    (directory / "config.json").write_text(json.dumps(CONFIGS[name]))
    return str(directory)


def build_real_model(name: str, directory: Path) -> nn.Module:
    """Build the model with its weights, without the planner."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]()
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    model: nn.Module = getattr(transformers, CONFIGS[name]["architectures"][0])(config)  # type: ignore[index]
    return model.half() if CONFIGS[name].get("dtype") == "float16" else model


def built(parameters: Parameters, rows: list[dict[str, Any]], bucket_mb: float) -> list[dict[str, int]]:
    """Return ``optimizer.memory()`` and its total for the format of each row."""
    found = []
    for row in rows:
        optimizer = ShardedAdamW(
            [
                nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=trains)
                for shape, dtype, trains in parameters
            ],
            precision=Precision(moments=row["moments"], master=row["master"], gradients=row["gradients"]),
            gradient_sync=row["gradient_sync"],
            update=row["update"],
            bucket_mb=bucket_mb,
        )
        memory = optimizer.memory()
        found.append({**asdict(memory), "total": memory.total})
    return found


@pytest.mark.sweep(4)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "asked", [["--gradient-sync", "external"], ["--update", "backward", "--gradients", "bf16"]], ids=["", "low"]
)
def test_planned_bytes_equal_optimizer_memory(
    name: str, ranks: int, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = write_config(name, tmp_path) if name in CONFIGS else f"tests.test_plan:{FUNCTIONS[name].__name__}"
    options = ["--ranks", str(ranks), "--device", "cpu", "--bucket-mb", "0.02", *asked]
    found = planned_json(capsys, what, *options)
    model = build_real_model(name, tmp_path)
    parameters = [(tuple(one.shape), one.dtype, one.requires_grad) for one in model.parameters()]
    assert found["what"]["parameters"] == sum(one.numel() for one in model.parameters())
    rows = found["formats"]
    has_low = any(dtype != torch.float32 for _, dtype, _ in parameters)
    assert len(rows) == (3 if "external" in asked else 2) * 3 * (3 if has_low else 1)
    assert [row["update"] for row in rows] == [
        "backward" if "--update" in asked and row["gradient_sync"] == "backward" else "step" for row in rows
    ]
    assert {row["gradients"] for row in rows} == {"bf16" if "--gradients" in asked else "auto"}
    for of_rank in on_ranks(ranks, built, parameters, rows, 0.02):
        assert of_rank == [row["built"] for row in rows]


def test_averages_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["tests.test_plan:Odd", "--ranks", "4", "--device", "cpu"]
    without, found = planned_json(capsys, *options), planned_json(capsys, *options, "--ema")
    assert (without["asked"]["ema"], found["asked"]["ema"]) == (False, True)
    for one, other in zip(without["formats"], found["formats"], strict=True):
        assert one["built"]["average"] == 0 < other["built"]["average"]
        assert other["bytes"]["total"] - one["bytes"]["total"] == (
            sum(other["built"][kind] - one["built"][kind] for kind in ("average", "scalars", "tables"))
        )
    main(["plan", *options])
    assert "average " not in capsys.readouterr().out
    main(["plan", *options, "--ema"])
    text = capsys.readouterr().out
    assert "average " in text and "ema_decay=" in text


def test_the_bytes_of_training_add_up_to_the_planners_need(capsys: pytest.CaptureFixture[str]) -> None:
    what = "tests.test_plan:Odd"
    options = ["--ranks", "4", "--device", "cpu", "--bucket-mb", "0.01", "--clip"]
    found = planned_json(capsys, what, *options)
    parameters = [PlannedParameter.of(one) for one in Odd().parameters()]
    assert {(row["moments"], row["master"], row["gradient_sync"]) for row in found["formats"]} == {
        (moments, master, sync)
        for moments in ("fp32", "bf16", "int8")
        for master in ("split", "fp32", "none")
        for sync in ("backward", "step")
    }
    for row in found["formats"]:
        precision = Precision(moments=row["moments"], master=row["master"])
        expected = need(parameters, Setting(world_size=4, precision=precision, gradient_sync=row["gradient_sync"],
                                            bucket_mb=0.01, device="cpu", clips=True))  # fmt: skip
        assert row["bytes"]["total"] == expected.total == sum(row["bytes"][kind] for kind in KINDS)
        assert (row["bytes"]["parameters"], row["bytes"]["gradients"]) == (expected.parameters, expected.gradients)
        assert (row["fits"], row["fits_from"]) == (None, None)
    asked = [row for row in found["formats"] if row["asked"]]
    assert [(row["moments"], row["master"], row["gradient_sync"]) for row in asked] == [("fp32", "split", "backward")]
    frozen = sum(one.nbytes for one in parameters if not one.trainable)
    assert asked[0]["bytes"]["parameters"] - asked[0]["built"]["parameters"] == frozen > 0
    assert found["choice"] is None and found["memory"] is None


def test_the_json_repeats_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ranks", "8", "--hosts", "2", "--replicas", "2", "--moments", "int8", "--master", "fp32"]
    found = planned_json(capsys, "1M", *options, "--gradient-sync", "step", "--bucket-mb", "0.5", "--device", "cpu")
    assert found["version"] == 1
    assert found["what"]["source"] == "number" and found["what"]["dtypes"] == {"bf16": 10**6}
    assert found["asked"] == {
        "ranks": 8,
        "hosts": 2,
        "replicas": 2,
        "device": "cpu",
        "gradient_sync": "step",
        "update": "step",
        "gradients": "auto",
        "moments": "int8",
        "master": "fp32",
        "bucket_bytes": 2**19,
        "clip": False,
        "ema": False,
        "offload": None,
        "transport": "auto",
    }
    spanning = planned_json(capsys, "1M", "--ranks", "8", "--hosts", "4", "--replicas", "2", "--device", "cpu")
    assert spanning["asked"]["transport"] == "collective"  # shard groups of four ranks span hosts of two
    # In float32, as NCCL leaves sums of bfloat16 gradients in bfloat16, but replicas add them up in float32.
    quarter = planned_json(capsys, "1M", "--dtype", "fp32", "--ranks", "4")["formats"][0]["built"]
    twice = planned_json(capsys, "1M", "--dtype", "fp32", "--ranks", "8", "--replicas", "2")["formats"][0]["built"]
    assert twice == quarter


# Model sources


@pytest.mark.parametrize(
    ("text", "count"),
    [("7B", 7 * 10**9), ("350M", 350 * 10**6), ("1.3e9", 13 * 10**8), ("1.5b", 15 * 10**8), ("12k", 12000), ("1", 1),
     ("1,000", 1000), ("2T", 2 * 10**12), ("7X", None), ("B", None), ("gpt2", None), ("-7B", None), ("7e", None)],
)  # fmt: skip
def test_numbers_of_parameters_are_parsed(text: str, count: int | None) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("numel", [1, 17, 1000, 12345, 10**6, 124_439_808, 7 * 10**9, 405 * 10**9])
def test_a_number_becomes_a_decoder_of_exactly_that_size(numel: int) -> None:
    source = decoder_of("n", numel)
    assert source.numel == source.trainable_numel == numel
    assert all(min(one.shape) > 0 for one in source.planned)
    if numel > 10**8:
        largest = max(one.numel for one in source.planned)
        assert largest < numel / 3  # no tensor dwarfs the buckets
        width = dict(source.parameters)["layers.0.mlp_norm.weight"].numel
        assert 32 <= width / sum(name.endswith("gate.weight") for name, _ in source.parameters) <= 200


def test_a_decoder_of_7b_has_the_shape_of_llama_2() -> None:
    names = dict(decoder_of("n", 6_738_415_616).parameters)
    assert names["layers.31.mlp.down.weight"].shape[0] == 4096 and "layers.33.mlp.down.weight" not in names


def test_the_dtype_is_the_models_own_unless_given(tmp_path: Path) -> None:
    def dtypes(what: str, dtype: torch.dtype | None = None) -> set[str]:
        return set(find_model_source(what, dtype).dtypes)

    assert dtypes("1M") == {"bf16"} and dtypes("1M", torch.float16) == {"fp16"}
    assert dtypes("tests.test_plan:Odd") == {"fp32", "bf16"}
    assert dtypes("tests.test_plan:Odd", torch.float32) == {"fp32"}
    pytest.importorskip("transformers")
    assert dtypes(write_config("minilm", tmp_path)) == {"fp16"}
    assert dtypes(str(tmp_path / "config.json"), torch.bfloat16) == {"bf16"}
    assert dtypes(write_config("gpt2", tmp_path)) == {"fp32"}


def test_the_class_that_a_config_names_is_built_with_its_head(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for name, config in CONFIGS.items():
        assert find_model_source(write_config(name, tmp_path)).description == config["architectures"][0]  # type: ignore[index]


def test_a_config_without_architectures_is_a_bare_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {key: value for key, value in GPT2.items() if key != "architectures"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_model_source(str(tmp_path / "config.json")).description == "GPT2Model"


def test_nothing_is_allocated_and_the_network_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    devices: set[str] = set()
    of = PlannedParameter.of

    def watched(parameter: Tensor) -> PlannedParameter:
        devices.add(parameter.device.type)
        return of(parameter)

    def shut(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(PlannedParameter, "of", watched)
    monkeypatch.setattr("socket.socket.connect", shut)
    monkeypatch.setattr("socket.getaddrinfo", shut)
    for what in (write_config("gpt2", tmp_path), "tests.test_plan:launch_decoder"):
        assert find_model_source(what).numel > 0
    assert devices == {"meta"}


def test_the_current_directory_is_searched_for_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planned_module.py").write_text(
        "import torch\nclass A:\n    make = staticmethod(lambda: torch.nn.Linear(3, 2))"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert find_model_source("planned_module:A.make").numel == 8
    assert sys.path == before


# Errors


def no_module() -> list[int]:
    return [1]


def raises() -> nn.Module:
    raise RuntimeError("no such\nlayer")


def raises_from_a_cause() -> nn.Module:
    try:
        try:
            {}["the root"]
        except KeyError as error:
            raise ValueError("between") from error
    except ValueError:
        raise RuntimeError("the last")  # noqa: B904


def frozen() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


def complex_numbers() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    return module


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("tests.test_plan:no_module", "returned a list, expected an nn.Module"),
        ("tests.test_plan:raises", "RuntimeError: no such layer"),
        ("tests.test_plan:raises_from_a_cause", "caused by KeyError: 'the root'"),
        ("tests.test_plan:frozen", "without trainable parameters"),
        ("tests.test_plan:complex_numbers", "torch.complex64"),
        ("tests.test_plan:MODELS", "found a list, expected a function"),
        ("tests.test_plan:missing", "has no 'missing'"),
        ("tests.no_such_module:make", "no module 'tests.no_such_module'"),
        ("no_such_module:make", "no module 'no_such_module'"),
        ("./none/config.json", "no such file"),
        ("tests", "without config.json"),
        ("0", "expected a number of 1 to"),
        ("1e99", "expected a number of 1 to"),
    ],
)
def test_a_source_that_cannot_be_planned_is_one_message(
    what: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in refused(capsys, what)


def test_a_module_that_fails_to_import_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing_module.py").write_text("\nimport no_such_dependency\n")
    (tmp_path / "dividing_module.py").write_text("\n\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    text = refused(capsys, "failing_module:make")
    assert "importing failing_module failed" in text and "no_such_dependency" in text
    text = refused(capsys, "dividing_module:make")
    assert "ZeroDivisionError" in text and "dividing_module.py:3" in text


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no such"}', "{}"])
def test_an_invalid_config_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(content)
    assert "transformers can" in refused(capsys, str(tmp_path))


def test_code_of_a_configs_author_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers asked on the terminal, and ran it when the answer was yes."""
    pytest.importorskip("transformers")
    trap = tmp_path / "it ran"
    (tmp_path / "code.py").write_text(f"open({str(trap)!r}, 'w')")
    auto_map = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for content in ({"model_type": "unheard-of", "auto_map": auto_map}, {**GPT2, "auto_map": auto_map}):
        (tmp_path / "config.json").write_text(json.dumps({**content, "architectures": None}))
        if content["model_type"] == "gpt2":  # transformers' own class needs no other code
            assert main(["plan", str(tmp_path)]) == 0
        else:
            text = refused(capsys, str(tmp_path))
            assert "does not run" in text and "module:function" in text and "trust_remote_code" not in text
        assert not trap.exists()


@pytest.mark.parametrize("name", ["pipeline", "logging", "GPT2Config", 7])
def test_a_config_cannot_name_anything_but_a_model(name: Any, tmp_path: Path) -> None:
    """``transformers.pipeline`` was called, for example."""
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({**GPT2, "architectures": [name]}))
    assert find_model_source(str(tmp_path)).description == "GPT2Model"


def test_a_dtype_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    for dtype in ("int8", "qint8"):
        (tmp_path / "config.json").write_text(json.dumps({**GPT2, "dtype": dtype}))
        text = refused(capsys, str(tmp_path))
        assert dtype in text and "Traceback" not in text


@pytest.mark.parametrize("name", ["7X", "no-such/model"])
def test_the_message_of_an_unknown_name_lists_what_is_accepted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    text = refused(capsys, name)
    assert "7B" in text and "module:function" in text and "--download" in text


def test_missing_packages_are_named_with_their_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("transformers", "matplotlib") else find_spec(name)
    )
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    assert "pip install 'shardadam[transformers]'" in refused(capsys, str(tmp_path))
    assert "pip install 'shardadam[benchmark]'" in refused(capsys, "1M", "--plot", str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "arguments",
    [["--ranks", "0"], ["--ranks", "2.5"], ["--ranks", "-1"], ["--memory", "80XB"],
     ["--memory", "0"],
     ["--memory", "much"], ["--bucket-mb", "0"], ["--bucket-mb", "nan"], ["--dtype", "fp8"], ["--moments", "int4"],
     ["--device", "tpu"], ["--gradient-sync", "never"], ["--hosts", "0"], ["--gradients", "fp8"],
     ["--offload", "tape"], ["--disk-bandwidth", "fast"], ["--step-time", "0"],
     ["--update", "later"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_options_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["plan", "1M", *arguments])
    assert exit.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_contradicting_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--hosts: found 3 with --ranks 8" in refused(capsys, "1M", "--hosts", "3")
    assert "--replicas: found 16 with --ranks 8" in refused(capsys, "1M", "--replicas", "16")
    assert 'offload: found "host" with device="cpu"' in refused(capsys, "1M", "--device", "cpu", "--offload", "host")
    assert "--step-time: needs --measure-disk" in refused(capsys, "1M", "--step-time", "1")
    both = ["--measure-disk", ".", "--disk-bandwidth", "1GB"]
    assert "--disk-bandwidth with --measure-disk" in refused(capsys, "1M", *both)
    assert "--measure-disk no/such" in refused(capsys, "1M", "--measure-disk", "no/such")
    assert "--update: found backward with --clip" in refused(capsys, "1M", "--update", "backward", "--clip")
    for sync in ("step", "external"):
        text = refused(capsys, "1M", "--update", "backward", "--gradient-sync", sync)
        assert f"--update: found backward with --gradient-sync {sync}" in text
    assert "float64" in refused(capsys, "1M", "--dtype", "fp64", "--moments", "int8")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("80GB", 80 * 10**9), ("80 GB", 80 * 10**9), ("80g", 80 * 10**9), ("79.6GiB", round(79.6 * 2**30)), ("1024", 1024),
     ("512MB", 512 * 10**6), ("1tib", 2**40)],
)  # fmt: skip
def test_sizes_are_parsed(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


# Fitting into memory


def test_fits_and_choice_equal_those_of_the_planner(capsys: pytest.CaptureFixture[str]) -> None:
    source = find_model_source("10M")
    parameters = source.planned
    asked = Setting(world_size=2, precision=Precision(master="split"), device="cuda")
    for available in (200 * 10**6, 140 * 10**6, 100 * 10**6, 70 * 10**6, 40 * 10**6, 19 * 10**6):
        fit = fitting(parameters, asked, available)
        found = planned_json(capsys, "10M", "--ranks", "2", "--memory", str(available), code=0 if fit.fits else 1)
        choice = found["choice"]
        names = {row["name"]: row for row in found["comparison"]}
        # A choice that differs in more than moments, master, gradient_sync and ranks has a row of its own.
        assert ("choice" in names) == bool({"gradients", "update", "clips", "offload"} & set(fit.changes))
        if "choice" in names:
            assert names["choice"]["bytes"]["total"] == choice["bytes"]["total"] and names["choice"]["fits"]
        assert choice["fits"] == fit.fits
        assert choice["changes"] == ["ranks" if change == "world_size" else change for change in fit.changes]
        if fit.nearest is None or fit.nearest_need is None:
            assert {value for key, value in choice.items() if key not in ("fits", "changes")} == {None}
        else:
            assert choice["ranks"] == fit.nearest.world_size and choice["moments"] == fit.nearest.precision.moments
            assert choice["bytes"] == {**asdict(fit.nearest_need), "total": fit.nearest_need.total}
        for row in found["formats"]:
            precision = Precision(moments=row["moments"], master=row["master"])

            def fits_on(ranks: int, row: dict[str, Any] = row, precision: Precision = precision) -> bool:
                setting = Setting(
                    world_size=ranks, precision=precision, gradient_sync=row["gradient_sync"], device="cuda"
                )
                return need(parameters, setting).total <= available  # noqa: B023

            assert row["fits"] == fits_on(2)
            if row["fits_from"] is None:
                assert not any(fits_on(2**power) for power in range(11))
            else:
                assert fits_on(row["fits_from"])
                assert row["fits_from"] == 1 or not fits_on(row["fits_from"] // 2)


def test_ranks_that_fit_are_counted_over_all_replicas(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--dtype", "fp32", "--memory", "75MB", "--bucket-mb", "4")
    alone = planned_json(capsys, "10M", "--ranks", "8", *options)
    twice = planned_json(capsys, "10M", "--ranks", "16", "--replicas", "2", *options)
    froms = [
        (row["fits_from"], other["fits_from"])
        for row, other in zip(alone["formats"], twice["formats"], strict=True)
        if row["gradient_sync"] == "backward"
    ]
    assert all(other == 2 * one for one, other in froms) and {one for one, _ in froms} >= {4, 8}


def test_the_comparison_includes_adamw_and_fsdp2(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned_json(capsys, "10M", "--ranks", "4", "--moments", "bf16")
    rows = {row["name"]: row for row in found["comparison"]}
    assert list(rows) == ["adamw", "adamw_fp32_master", "step", "backward", "fsdp2"]
    assert [name for name, row in rows.items() if row["estimate"]] == ["fsdp2"]
    for sync in ("step", "backward"):
        (row,) = [
            row
            for row in found["formats"]
            if (row["gradient_sync"], row["moments"], row["master"]) == (sync, "bf16", "split")
        ]
        assert rows[sync]["bytes"] == row["bytes"]
    planned = find_model_source("10M").planned
    assert rows["adamw"]["bytes"]["total"] == adamw_need(planned).total == adamw(planned).total
    assert rows["adamw_fp32_master"]["bytes"]["total"] == 16 * 10**7 + 4 * len(planned)
    single = planned_json(capsys, "10M", "--dtype", "fp32")["comparison"]
    assert [row["name"] for row in single] == ["adamw", "step", "backward", "fsdp2"]


def small_blocks() -> nn.Module:
    return nn.ModuleDict({"embed": nn.Linear(8, 6, bias=False), "blocks": nn.Sequential(*[nn.Linear(16, 16)] * 1)})


def test_fsdp2_shards_along_the_first_dimension() -> None:
    source = find_model_source("tests.test_plan:small_blocks", torch.bfloat16)
    assert {name: len(unit) for name, unit in source.units().items()} == {"": 1, "blocks.0": 2}
    numel = 48 + 16 * 17
    found = fsdp2(source, 2, keeps_masters=True)
    assert found.kinds["moments"] == 8 * numel // 2
    in_bf16 = fsdp2(source, 4, keeps_masters=False)  # six rows over four ranks: two rows on rank 0
    assert in_bf16.kinds["moments"] == 2 * 2 * (2 * 8 + 4 * 16 + 4)
    assert in_bf16.is_estimate and in_bf16.setting is None


SAVINGS: dict[str, dict[str, Any]] = {
    'Precision(gradients="bf16")': {"precision": Precision(gradients="bf16")},
    'Precision(moments="int8")': {"precision": Precision(moments="int8")},
    'update="backward"': {"update": "backward"},
    'Precision(master="none")': {"precision": Precision(master="none")},
    "all of them": {"precision": Precision(gradients="bf16", moments="int8", master="none"), "update": "backward"},
    "offload=DiskOffload(...)": {"offload": "disk"},
    "ema_decay=0.999": {"ema": True},
}


def test_the_table_of_savings_in_the_docs_is_the_planners() -> None:
    text = (ROOT / "docs" / "precision.md").read_text()
    for column, (dtype, ranks) in enumerate(itertools.product((torch.bfloat16, torch.float32), (1, 8)), 1):
        source, plain = find_model_source("7B", dtype), Setting(world_size=ranks, device="cuda")
        whole = need(source.planned, plain).total
        expected = {"the defaults take": whole}
        for name, changes in SAVINGS.items():
            expected[name] = abs(whole - need(source.planned, replace(plain, **changes)).total)
        for name, nbytes in expected.items():
            (row,) = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and name in line[:40]]
            assert row[column] == f"{nbytes / source.numel:.2f}", (name, dtype, ranks)


# State on disk


def test_offloaded_state_is_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    resident, offloaded = (
        next(row for row in found["formats"] if row["asked"])
        for found in (planned_json(capsys, "10M", "--ranks", "2"),
                      planned_json(capsys, "10M", "--ranks", "2", "--offload", "disk"))
    )  # fmt: skip
    state = resident["built"]["moments"] + resident["built"]["master"]
    assert offloaded["built"]["on_disk"] == state and offloaded["bytes"]["moments"] == 0
    assert offloaded["bytes"]["total"] - resident["bytes"]["total"] == offloaded["built"]["offload_buffers"] - state
    text = printed(capsys, "10M", "--ranks", "4", "--hosts", "2", "--offload", "host")
    assert "offload=HostOffload()" in text and "in pinned memory of the host" in text
    total = planned_json(capsys, "10M", "--ranks", "4", "--hosts", "2", "--offload", "host")["formats"]
    on_host = next(row["built"]["on_host"] for row in total if row["asked"])
    assert f"{2 * on_host / 1e6:.2f} MB on each host" in text.replace("\n", " ")


def test_the_time_to_move_the_state_follows_from_the_bandwidth(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["10M", "--ranks", "4", "--hosts", "2", "--disk-bandwidth", "100MB"]
    for offload in ([], ["--offload", "disk"]):
        found = planned_json(capsys, *options, *offload, "--step-time", "0.5")["disk"]
        assert found["state"] == pytest.approx(10 * 10**7 / 4, rel=0.01)
        assert found["sharing"] == 2 and found["directory"] is None
        assert found["seconds"] == pytest.approx(2 * 2 * found["state"] / 100e6)
        assert found["slowdown_at_least"] == pytest.approx(found["seconds"] / 0.5)
        assert found["slowdown_at_most"] == pytest.approx(1 + found["seconds"] / 0.5)
    assert planned_json(capsys, *options, "--step-time", "50")["disk"]["slowdown_at_least"] == 1
    text = printed(capsys, *options, "--step-time", "0.5").replace("\n", " ")
    assert "takes 1.00 s in every step" in text and "2.00 times as long" in text
    assert "Give --step-time" in printed(capsys, *options)
    assert planned_json(capsys, "10M")["disk"] is None


def test_a_disk_is_measured_and_left_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardadam.cli.disk_speed.MOST_BYTES", 2**24)
    monkeypatch.setattr("shardadam.cli.disk_speed._SECONDS", 0.05)
    allocated: list[int] = []
    allocate = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda *a: (allocated.append(a[2]), allocate(*a)))
    found = planned_json(capsys, "1M", "--measure-disk", str(tmp_path))["disk"]
    assert found["directory"] == str(tmp_path) and list(tmp_path.iterdir()) == []
    assert 0 < sum(allocated) <= 2**24
    assert all(found[name] > 1e5 for name in ("read", "write", "both"))


# Text


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["plan", *arguments]) == code
    return capsys.readouterr().out


def test_gpus_are_planned_alike_without_triton(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine that plans may have torch's CPU build; that with the GPUs has Triton."""
    with_triton = printed(capsys, "1B", "--ranks", "8", "--moments", "int8")
    monkeypatch.setattr(sums, "find_spec", lambda _: None)
    assert printed(capsys, "1B", "--ranks", "8", "--moments", "int8") == with_triton


def test_the_text_has_the_decisive_facts(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "7B", "--ranks", "8", "--memory", "80GB")
    for fact in ("7,000,000,000 in ", "8 ranks on 1 host, cuda", "80.00 GB per rank", "Not counted: activations",
                 "an estimate", "FSDP2, estimated", "AdamW on every rank",
                 "Your settings fit: training takes",
                 'precision=Precision(moments="fp32", master="split")'):  # fmt: skip
        assert fact in text, fact
    found = planned_json(capsys, "7B", "--ranks", "8", "--memory", "80GB")
    asked = next(row for row in found["formats"] if row["asked"])
    kinds = asked["bytes"]
    expected = [kinds["parameters"], kinds["gradients"], kinds["gradient_shard"], kinds["staging"], kinds["moments"],
                kinds["master"], kinds["scalars"] + kinds["tables"], kinds["total"]]  # fmt: skip
    table = text[text.index("moments in") : text.index("\n\nGB per rank, compared")]
    first = [line[11:].split()[0] for line in table.splitlines()]
    assert first == [
        ">fp32",
        "split",
        *[f"{value / 1e9:.2f}" for value in expected],
        "yes",
        str(asked["fits_from"]),
    ]
    (row,) = [line for line in text.splitlines() if line.startswith(">")]
    assert f"{expected[-1] / 1e9:.2f}" in row


@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ("--ranks 2 --memory 11MB", "1 alone"),
        ("--ranks 4 --tensor-parallel 2 --memory 6MB", "2 alone"),
        ("--ranks 1 --memory 11MB", ""),
        ("--ranks 1 --memory 9MB", ""),
        ("--ranks 2 --memory 20MB", ""),
    ],
)
def test_the_table_says_that_fewer_ranks_fit_only_because_one_alone_takes_no_staging(
    options: str, alone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks did not fit "from 1"."""
    main(["plan", "1M", "--dtype", "fp32", "--moments", "int8", *options.split()])
    text = capsys.readouterr().out
    (row,) = [line.split() for line in text.splitlines() if line.startswith(">  shardadam")]
    fits, *start = row[row.index("yes" if "yes" in row else "no") :]
    assert (fits, " ".join(start)) == ("no", alone) if alone else "alone" not in text
    if alone:
        assert f'"{alone}": state on one rank alone takes no staging, so that it fits there' in " ".join(text.split())


NARROW = [
    "1M --ranks 2 --memory 9MB",
    "7B --memory 80GB",
    "7B",
    "70B --ranks 64 --tensor-parallel 8 --pipeline-parallel 2 --memory 80GB",
    "70B --ranks 8 --memory 80GB --hosts 2",
    "7B --ranks 1 --memory 40GB",
    "30B --ranks 4 --offload host --memory 90GB --ema",
    "7B --update backward --gradients bf16 --disk-bandwidth 1GB --step-time 1",
    "7B --ranks 8 --replicas 4 --gradient-sync external --clip",
    "400B --ranks 64 --replicas 64 --memory 80GB --ema --offload disk",
    "1M --ranks 65536 --replicas 512 --tensor-parallel 16 --memory 80GB",
    "17 --ranks 2 --memory 1KB --device cpu",
    "tests.test_plan:Odd --ranks 3 --memory 1MB --ema --device cpu --offload disk",
    "--help",
]


@pytest.mark.parametrize("columns", [None, 80, 120])
@pytest.mark.parametrize("command", NARROW)
def test_no_line_is_wider_than_80_columns(
    command: str, columns: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without COLUMNS, output is no terminal here. Help uses what COLUMNS gives it; errors are one line."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    with suppress(SystemExit):
        main(["plan", *command.split()])
    limit = columns if columns and command == "--help" else 80
    assert not [line for line in capsys.readouterr().out.splitlines() if len(line) > limit]


def test_the_text_says_what_to_choose_instead(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "10M", "--ranks", "4", "--memory", "75MB", code=1).replace("\n", " ")
    assert "takes 90.12 MB and does not fit. On 4 ranks, choose" in text
    assert "Or choose 16 ranks instead, the smallest change that fits" in text
    text = printed(capsys, "70B", "--memory", "80GB", "--ranks", "64", code=1).replace("\n", " ")
    assert (
        "Nothing fits in 80.00 GB: parameters alone take 140" in text and "FSDP2, which shards parameters too" in text
    )
    text = printed(capsys, "10M", "--memory", "1KB", code=1).replace("\n", " ")
    assert "Nothing fits" in text and "ranks with more memory" in text and "never" in text
    assert "Give --memory" in printed(capsys, "10M")
    text = printed(capsys, "7B", "--ranks", "1", "--memory", "40GB", code=1).replace("\n", " ")
    here = (
        'On 1 rank, choose moments="int8", update="backward" and master="none": it takes 28.90 GB and leaves 11.10 GB'
    )
    assert text.index(here) < text.index("Or choose 4 ranks instead") and "the choice for as many ranks" in text


def test_a_choice_for_as_many_ranks_is_given_beside_one_with_more(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = find_model_source("7B").planned
    found = planned_json(capsys, "7B", "--ranks", "1", "--memory", "40GB", code=1)
    choice, here = found["choice"], found["here"]
    assert choice["ranks"] == 4 and choice["changes"] == ["ranks"]
    assert here["ranks"] == 1 and here["changes"] == ["moments", "update", "master"] and not here["clip"]
    precision = Precision(moments="int8", master="none")
    least = need(parameters, Setting(precision=precision, update="backward", device="cuda")).total
    assert here["bytes"]["total"] == least <= 30e9
    row = next(row for row in found["comparison"] if row["name"] == "here")
    assert row["bytes"]["total"] == least and row["fits"] and row["fits_from"] == 1
    assert planned_json(capsys, "7B", "--ranks", "1", "--memory", "400GB")["here"] is None


def test_the_text_shows_when_parameters_are_updated(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "10M", "--ranks", "2", "--update", "backward", "--gradients", "fp32")
    assert 'gradient_sync="backward", update="backward", precision=Precision(' in " ".join(text.split())
    assert 'gradients="fp32"' in text
    assert '>  shardadam, update="backward"' in text and 'shardadam "backward" (ZeRO-2)' not in text


def test_float32_has_no_column_of_masters(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "tests.test_plan:convolutions", "--device", "cpu", "--ranks", "2")
    assert "master" not in text and "KB per rank" in text and "of one host take" in text


def test_help_gives_the_default_buckets_of_the_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    """It said 32 MiB (8 on CPUs) for parameters of any size."""
    with suppress(SystemExit):
        main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "on CPUs a quarter of it, 0.25 to 8; on GPUs a sixteenth of it, 32 to 128, or to 2 for each rank" in text
    mib = 2**20

    def size(device: str, parameters: float, ranks: int) -> float:
        return Setting(world_size=ranks, device=device).bucket_bytes(round(parameters * mib)) / mib

    assert [size("cpu", total, 2) for total in (0.5, 4, 400)] == [0.25, 1, 8]
    assert [size("cuda", total, ranks) for total, ranks in ((64, 8), (800, 8), (9e4, 8), (9e4, 128), (9e4, 999))] == [
        32, 50, 128, 256, 1024,
    ]  # fmt: skip


def test_help_documents_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned_json(capsys, "1M", "--memory", "1GB")
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    for key in (
        *found,
        *found["what"],
        *found["asked"],
        *found["formats"][0],
        *found["comparison"][0],
        *found["choice"],
        "here",
    ):
        assert key in text, key


def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    printed(capsys, "10M", "--memory", "200MB", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "--plot" in refused(capsys, "10M", "--plot", str(tmp_path / "plan.nonsense"))


def test_planning_a_number_imports_neither_transformers_nor_matplotlib() -> None:
    program = (
        "import sys; from shardadam.cli import main; main(['plan', '1M', '--json']);"
        "print({'transformers', 'matplotlib', 'torch._dynamo'} & set(sys.modules), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert process.stderr.strip() == "set()" and json.loads(process.stdout)["what"]["parameters"] == 10**6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--ranks 2 --device cpu", 'AdamW on every rank: for a model this small, .* gradient_sync="step" takes less'),
        ("--ranks 2", "AdamW on every rank: for a model this small, .* takes less"),
        ("--ranks 1 --device cpu", "AdamW on every rank: there is no other rank"),
    ],
)
def test_a_plan_that_takes_more_than_adamw_says_so(
    arguments: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A newcomer's small model took more with the defaults, and no line said so."""
    main(["plan", "10K", "--dtype", "fp32", *arguments.split()])
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(expected, printed)
    main(["plan", "2M", "--dtype", "fp32", "--ranks", "4", "--device", "cpu"])
    assert "which is more than" not in capsys.readouterr().out


def test_a_script_that_parses_the_command_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its argparse read the arguments of ``shardadam plan``: "error: unrecognized arguments: plan ddp:LM"."""
    (tmp_path / "ddp_script.py").write_text(
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('x')\np.parse_args()"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "ddp_script:LM"]) == 1
    message = " ".join(capsys.readouterr().err.split())  # after what the script itself prints
    assert "importing ddp_script ended the process" in message and '`if __name__ == "__main__":`' in message
    assert "Give ddp_script:FUNCTION" in refused(capsys, "ddp_script.py")
