# SPDX-License-Identifier: Apache-2.0
"""A manifest or object with a right checksum and wrong content is refused by everything that reads it, or harmless."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import random
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import shardadam
from shardadam import CheckpointError, Precision, ShardedAdamW
from shardadam.checkpoint import DcpReader
from shardadam.checkpoint.export import export
from shardadam.checkpoint.files import MANIFEST, VERSIONS, manifest_text
from shardadam.checkpoint.reader import Reader
from shardadam.cli import main
from shardadam.cli.text import show
from tests.runs import differences
from tests.test_checkpoint_safety import replace_object, rewrite_manifest

SAMPLE = 400
NAME = "step-00000002"


class Small(nn.Module):
    """A few elements of every kind: float32 and bfloat16, with scales and masters, tied, frozen, and an object."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.linspace(-1, 1, 130))
        self.narrow = nn.Parameter(torch.linspace(0, 1, 6).view(2, 3).bfloat16())
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.tied = self.narrow
        self.register_buffer("count", torch.tensor(3))
        self.extra: Any = {"seen": [1, 2]}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Run:
    def __init__(self, *, seed: int = 0) -> None:
        self.model = Small()
        for parameter in self.model.parameters():
            parameter.detach().add_(seed)
        self.optimizer = ShardedAdamW(
            [{"params": [("wide", self.model.wide)]}, {"params": [("narrow", self.model.narrow)], "lr": 0.5}],
            precision=Precision(moments="int8"),
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5)

    def step(self) -> None:
        (self.model.wide.square().sum() + self.model.narrow.float().square().sum()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def arguments(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def everything(self) -> dict[str, Tensor]:
        found = {name: value.clone() for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}
        for name in ("wide", "narrow"):
            state = self.optimizer.full_state(self.model.get_parameter(name))
            found |= {f"{name}.{kind}": value.clone() for kind, value in state.items()}
        numbers = [[g["lr"], *g["betas"], g["eps"], g["weight_decay"]] for g in self.optimizer.param_groups]
        found["numbers"] = torch.tensor(numbers, dtype=torch.float64)
        found["skipped"] = self.optimizer.skipped_steps.clone()
        found["epoch"] = torch.tensor([self.scheduler.last_epoch, *self.scheduler.base_lrs])
        return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    directory = tmp_path_factory.mktemp("saved")
    run = Run()
    for _ in range(2):
        run.step()
    shardadam.save(directory, step=2, extra={"position": 7}, **run.arguments())
    yield directory, run.everything()


@pytest.fixture
def checkpoint(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy" / NAME


# What reads


def load(directory: Path, expected: dict[str, Tensor] | None) -> str | None:
    """Return the message of an error; otherwise what was loaded must be ``expected``."""
    run = Run(seed=1)
    before = run.everything()
    try:
        shardadam.load(directory, random_states=False, **run.arguments())
    except CheckpointError as error:
        if "now hold a part" not in str(error):
            assert differences(before, run.everything()) == [], "changed before the refusal"
        return str(error)
    assert expected is not None and differences(expected, run.everything()) == []
    return None


def load_by_dcp(directory: Path) -> str | None:
    model = {"wide": torch.zeros(130), "narrow": torch.zeros(2, 3), "count": torch.tensor(0)}
    state = {name: {"exp_avg": torch.zeros_like(model[name]), "step": torch.zeros(())} for name in ("wide", "narrow")}
    found = {"model": model, "optimizer": {"state": state}}
    try:
        DcpReader(directory).read_metadata()  # dcp.load wraps what this raises, or hides it
        dcp.load(found, storage_reader=DcpReader(directory), no_dist=True)
    except dcp.CheckpointException as error:
        (failure,) = error.failures.values()
        assert isinstance(failure[0], CheckpointError) or "Missing key" in str(failure[0]), failure
        return str(failure[0])
    except CheckpointError as error:
        return str(error)
    return None


def run_command(*arguments: str) -> str | None:
    """Run a command; nothing that it prints may control a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        code = main(arguments)
    for printed in (out.getvalue(), err.getvalue()):
        assert printed.replace("\n", "").isprintable(), ascii(printed)
        assert "Traceback" not in printed
    assert code == bool(err.getvalue()) and code in (0, 1)
    return err.getvalue() or None


def by_all(directory: Path, expected: dict[str, Tensor] | None = None) -> list[str | None]:
    """Read in every way; return the error of each."""
    found = [load(directory, expected), load_by_dcp(directory), run_command("inspect", str(directory))]
    for format in ("torch", "safetensors"):
        output = directory / "exported" / format
        found.append(run_command("export", str(directory), "--format", format, "--output", str(output)))
    shutil.rmtree(directory / "exported", ignore_errors=True)
    return found


def refused_by_all(directory: Path) -> str:
    found = by_all(directory)
    for message in found:
        assert message is not None and (str(directory) in message or "is no tensor; safetensors" in message), found
        assert message.strip().replace("\n", "").isprintable() and len(message) < 2000
    return str(found[0])


# Manifests

DEEP: Any = 0
for _ in range(400):
    DEEP = [DEEP]
WRONG = [
    None, True, False, -1, 1.5, math.nan, math.inf, -math.inf, 2**63, 10**400, "", "x", "7", "\x1b[2Jyes\n", "\ud800",
    "../../x", "/etc/passwd", [], [7], [[]], [None], {}, {"x": 7}, {"\x1b[31m": []}, DEEP,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a manifest that readers use."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        if (*path, key) == ("optimizer", "moments"):  # for people
            continue
        yield (*path, key)
        if isinstance(each, (dict, list)) and key != "extras":
            yield from places(each, (*path, key))


def mutations(content: dict[str, Any]) -> list[tuple[str, Callable[[dict[str, Any]], None]]]:
    def at(path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Callable[[dict[str, Any]], None]:
        def apply(content: Any) -> None:
            for key in path[:-1]:
                content = content[key]
            change(content, path[-1])

        return apply

    def replace(value: Any) -> Callable[[Any, Any], None]:
        return lambda holder, key: holder.__setitem__(key, copy.copy(value))

    def delete(holder: Any, key: Any) -> None:
        del holder[key]

    def double(holder: Any, key: Any) -> None:
        holder.insert(key, copy.deepcopy(holder[key])) if isinstance(holder, list) else holder.update(
            {f"{key}\x1b": copy.deepcopy(holder[key])}
        )

    def rename(holder: Any, key: Any) -> None:
        if isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        else:
            holder.append(holder.pop(key))

    found = []
    for path in places(content):
        for value in WRONG:
            found.append((f"{path} = {ascii(value)[:30]}", at(path, replace(value))))
        for change in (delete, double, rename):
            found.append((f"{change.__name__} {path}", at(path, change)))
    return found


@pytest.mark.timeout(1200)  # with --long
def test_any_wrong_value_in_a_manifest_is_refused_or_harmless(
    saved: tuple[Path, dict[str, Tensor]], checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    """Replaces, deletes, doubles and renames everything in a real manifest, with right checksums."""
    content = json.loads((checkpoint / MANIFEST).read_text())["content"]
    cases = mutations(content)
    assert len(cases) > 4000
    if not request.config.getoption("--long"):
        cases = random.Random(0).sample(cases, SAMPLE)
    refused, failures = 0, []
    for index, (what, change) in enumerate(cases):
        changed = copy.deepcopy(content)
        change(changed)
        try:
            (checkpoint / MANIFEST).write_text(manifest_text(changed))
        except RecursionError:
            continue
        try:
            Reader(checkpoint).close()
        except CheckpointError as error:
            assert str(checkpoint) in str(error) and str(error).isprintable() and len(str(error)) < 2000, what
            refused += 1
            if index % 20 == 0:  # all readers read through Reader
                refused_by_all(checkpoint)
        else:
            try:
                by_all(checkpoint, saved[1])
            except Exception as error:
                failures.append(f"{what}: {type(error).__name__}: {str(error)[:500]}")
    assert failures == []
    assert refused > len(cases) * 0.7


def set_tensor(key: str, **entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["index"]["tensors"][key].update(entries)


WRONG_TOGETHER: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a version is missing": lambda c: c.pop("torch"),
    "a state is missing": lambda c: c["index"]["tensors"].pop("optimizer.state.wide.exp_avg"),
    "a scale is missing": lambda c: c["index"]["tensors"].pop("optimizer.state.wide.exp_avg_sq_scale"),
    "a master is missing": lambda c: c["index"]["tensors"].pop("optimizer.state.narrow.master"),
    "a value is missing": lambda c: c["index"]["tensors"].pop("model.wide"),
    "a parameter is missing": lambda c: c["optimizer"]["parameters"].pop("wide"),
    "no random state": lambda c: c["index"]["objects"].pop("rng.0"),
    "no param groups": lambda c: c["index"]["objects"].pop("optimizer.param_groups"),
    "no optimizer": lambda c: c.pop("optimizer"),
    "one rank more": lambda c: c.update(world_size=2),
    "one extra more": lambda c: c["extras"].append(None),
    "groups of numbers": lambda c: c["optimizer"].update(groups=[7]),
    "a name in two groups": lambda c: c["optimizer"].update(groups=[["wide", "narrow"], ["wide"]]),
    "a step of NaN": lambda c: c["optimizer"]["parameters"]["wide"].update(step=math.nan),
    "a bound of NaN": lambda c: c["optimizer"]["parameters"]["wide"].update(bound="nan"),
    "a bound too large": lambda c: c["optimizer"]["parameters"]["wide"].update(bound="0x1p99999"),
    "an alias of an alias": lambda c: c["aliases"].update({"model.more": "model.tied"}),
    "an alias elsewhere": lambda c: c["aliases"].update({"model.tied": "optimizer.state.narrow.master"}),
    "a file twice": lambda c: c["index"]["files"].append(c["index"]["files"][0]),
    "an overflowing shape": set_tensor("model.frozen", shape=[2**40, 2**40], order=[0, 1]),
    "an overflowing empty shape": set_tensor("model.frozen", shape=[0, 2**62, 2**62], order=[0, 1, 2], items=[]),
    "a thousand dimensions": set_tensor("model.frozen", shape=[1] * 1000, order=list(range(1000))),
    "another shape than the state": set_tensor("model.narrow", shape=[3, 2]),
    "a quantized dtype": set_tensor("model.frozen", dtype="qint32"),
    "a trained parameter of integers": set_tensor("model.wide", dtype="int32"),
    "moments of another dtype": set_tensor("optimizer.state.wide.exp_avg", dtype="uint8"),
    "a module's name as dtype": set_tensor("model.frozen", dtype="distributed"),
}


@pytest.mark.parametrize("how", WRONG_TOGETHER)
def test_what_does_not_fit_the_rest_of_a_manifest_is_refused(checkpoint: Path, how: str) -> None:
    rewrite_manifest(checkpoint, WRONG_TOGETHER[how])
    assert "is damaged" in refused_by_all(checkpoint)


def test_a_checkpoint_has_no_more_data_than_its_files(checkpoint: Path) -> None:
    """Many tensors over the same bytes, with right checksums: a small file would export to terabytes."""

    def change(content: dict[str, Any]) -> None:
        tensors = content["index"]["tensors"]
        tensors |= {f"model.copy{i}": copy.deepcopy(tensors["model.frozen"]) for i in range(10)}

    rewrite_manifest(checkpoint, change)
    assert "lies over something else" in refused_by_all(checkpoint)


def test_an_item_is_never_larger_than_what_save_writes(checkpoint: Path) -> None:
    """A sparse file of 32 GiB: reading its only item would take as much memory."""
    size = 2**35
    os.truncate(checkpoint / "rank-00000.bin", size)

    def change(content: dict[str, Any]) -> None:
        start = content["index"]["files"][0][1]
        content["index"]["files"][0][1] = size
        entry = {"dtype": "uint8", "shape": [size - start], "order": [0], "items": [[0, size - start, 0, start, 0]]}
        content["index"]["tensors"]["model.z"] = entry

    rewrite_manifest(checkpoint, change)
    assert "found an item of" in refused_by_all(checkpoint)


@pytest.mark.parametrize("key", ["optimizer.param_groups", "scheduler", "rng.0", "model._extra_state"])
def test_an_object_is_never_larger_than_what_save_writes(checkpoint: Path, key: str) -> None:
    size = 2**35
    os.truncate(checkpoint / "rank-00000.bin", size)

    def change(content: dict[str, Any]) -> None:
        start = content["index"]["files"][0][1]
        content["index"]["files"][0][1] = size
        content["index"]["objects"][key] = [0, start, size - start, 0]

    rewrite_manifest(checkpoint, change)
    for message in (load(checkpoint, None), run_command("inspect", str(checkpoint))):
        assert message is not None and f"{key} has {size - json_start(checkpoint, key)} bytes" in message


def json_start(checkpoint: Path, key: str) -> int:
    content = json.loads((checkpoint / MANIFEST).read_text())["content"]
    return int(content["index"]["objects"][key][1])


JSON: dict[str, Callable[[str], str]] = {
    "a name twice": lambda text: text.replace('"step":2', '"step":2,"step":2', 1),
    "deep nesting": lambda text: "[" * 100_000,
    "deep content": lambda text: '{"format":"shardadam checkpoint","content":' + "[" * 50_000 + "]" * 50_000 + "}",
    "a huge number": lambda text: text.replace('"step":2', '"step":' + "9" * 10_000, 1),
    "a list": lambda text: "[1]",
    "a number": lambda text: "7",
    "nothing": lambda text: "",
    "zeros": lambda text: "\0" * 100,
    "no version": lambda text: text.replace(f'"version":{VERSIONS[-1]},', ""),
    "a version that controls a terminal": lambda text: text.replace(
        f'"version":{VERSIONS[-1]},', '"version":"\\u001b[2J",'
    ),
    "a checksum that is none": lambda text: text.replace('"sha256":"', '"sha256":7,"x":"'),
}


@pytest.mark.parametrize("how", JSON)
def test_json_that_is_no_manifest_is_refused(checkpoint: Path, how: str) -> None:
    path = checkpoint / MANIFEST
    path.write_text(JSON[how](path.read_text()))
    refused_by_all(checkpoint)


def test_what_a_manifest_says_does_not_control_a_terminal(checkpoint: Path) -> None:
    control = "\x1b[2J\x1b[31m\x9b\u202ewhole        yes\nwhole        yes"

    def change(content: dict[str, Any]) -> None:
        content["torch"] = control
        content["index"]["tensors"][f"optimizer.{control}"] = content["index"]["tensors"].pop("model.count")

    rewrite_manifest(checkpoint, change)
    (checkpoint.parent / f"\x1b[2J{control.replace('/', '')}").mkdir()
    (checkpoint.parent / f"\x1b[2J{control.replace('/', '')}" / MANIFEST).touch()
    run_command("inspect", str(checkpoint))
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        main(["inspect", str(checkpoint)])
    assert [line for line in out.getvalue().splitlines() if line.startswith("whole")] == ["whole        yes"]
    assert "\\x1b[2J" in out.getvalue() and "\\u202e" in out.getvalue()
    message = load(checkpoint, None)
    assert message is not None and "model.count" in message
    shutil.rmtree(checkpoint)
    message = load(checkpoint.parent / f"\x1b[2J{control}", None)
    assert message is not None and "\x1b" not in message and "\\x1b[2J" in message


def test_what_commands_print_does_not_control_a_terminal(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "\x1b[2Jout"
    assert run_command("export", str(checkpoint), "--format", "torch", "--output", str(output)) is None
    assert (output / "model.pt").exists()
    message = run_command("plan", "./\x1b[2Jmodel.json")
    assert message is not None and "\\x1b[2Jmodel.json: no such file" in message


def test_what_a_terminals_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="ascii", write_through=True))
    show("größe")
    assert printed.getvalue() == b"gr\\xf6\\xdfe\n"


# Objects


def expanded() -> Any:
    return {"lr": 1e-3, "x": torch.zeros(1).expand(2**40)}


def in_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def doubled(levels: int) -> Any:
    value: Any = [0]
    for _ in range(levels):
        value = [value, value]
    return value


GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "maximize": False}
WRONG_GROUPS: dict[str, Any] = {
    "a number": 7,
    "no list": {"0": GROUP, "1": GROUP},
    "one group": [GROUP],
    "numbers": [7, 7],
    "no hyperparameters": [{}, {}],
    "names that are none": [{7: 7, **GROUP}, GROUP],
    **{
        f"{name} {index}": [{**GROUP, name: value}, GROUP]
        for name, values in {
            "lr": (math.nan, math.inf, -math.inf, "x", None, True, 10**400, 1e300, 1j, [1e-3], torch.tensor(math.nan),
                   torch.ones(3), torch.tensor(1j), torch.tensor(True), torch.ones(1).to_sparse(), torch.ones(0)),
            "betas": (7, "ab", (0.9,), (0.9, 0.9, 0.9), (math.nan, 0.9), (0.9, 1.0), (-0.1, 0.9), (True, 0.9), None),
            "eps": (math.nan, -1.0, "x", None, True),
            "weight_decay": (math.nan, math.inf, "x", None),
            "maximize": ("yes", 1, None),
            "amsgrad": (True, "no"),
            "differentiable": (True,),
            "other": (doubled(40), in_itself(), expanded()),
        }.items()
        for index, value in enumerate(values)
    },
}  # fmt: skip


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("how", WRONG_GROUPS)
def test_wrong_param_groups_are_refused(checkpoint: Path, how: str) -> None:
    replace_object(checkpoint, "optimizer.param_groups", pickled(WRONG_GROUPS[how]))
    assert "optimizer.param_groups" in refused_by_all(checkpoint)


def test_a_learning_rate_may_end_below_zero(saved: tuple[Path, Any], checkpoint: Path) -> None:
    """Schedules such as LinearLR to 0 end at a rounding error; the last checkpoint must load."""
    replace_object(checkpoint, "optimizer.param_groups", pickled([{**GROUP, "lr": -1e-19}, {**GROUP, "lr": 0}]))
    run = Run()
    shardadam.load(checkpoint, **run.arguments())
    assert [group["lr"] for group in run.optimizer.param_groups] == [-1e-19, 0]


WRONG_OBJECTS: dict[str, tuple[str, Any]] = {
    "a scheduler that is a number": ("scheduler", 7),
    "a scheduler of NaN": ("scheduler", {"base_lrs": [math.nan, 0.1], "last_epoch": 2}),
    "a scheduler without a list": ("scheduler", {"_last_lr": 7, "last_epoch": 2}),
    "a scheduler in a scheduler": ("scheduler", {"_schedulers": [{"_last_lr": [math.nan]}]}),
    "a scheduler without its method": ("scheduler", {"step": 7}),
    "a scheduler of another optimizer": ("scheduler", {"optimizer": 7}),
    "a random state that is a number": ("rng.0", 7),
    "a random state without torch's": ("rng.0", {"python": random.getstate()}),
    "a random state that is short": ("rng.0", {"torch": torch.zeros(3, dtype=torch.uint8), "python": (3, (), None)}),
    "a random state of floats": ("rng.0", {"torch": torch.zeros(5056), "python": random.getstate()}),
    "a random state of NaN": (
        "rng.0",
        {"torch": torch.get_rng_state(), "python": (*random.getstate()[:2], math.nan)},
    ),
    "a model's object in itself": ("model._extra_state", in_itself()),
    "a model's object of terabytes": ("model._extra_state", torch.zeros(1).expand(2**40)),
}


@pytest.mark.parametrize("how", WRONG_OBJECTS)
def test_wrong_objects_are_refused_before_anything_changes(checkpoint: Path, how: str) -> None:
    key, value = WRONG_OBJECTS[how]
    replace_object(checkpoint, key, pickled(value))
    message = load(checkpoint, None)
    assert message is not None and key.partition(".")[0] in message and "now hold a part" not in message
    by_all_but_load = [load_by_dcp(checkpoint), run_command("inspect", str(checkpoint))]
    for found in by_all_but_load:
        assert found is None or key in found


def test_a_compressed_archive_is_refused(checkpoint: Path) -> None:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(pickled([GROUP, {**GROUP, "x": torch.zeros(2**22)}]))) as plain,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    replace_object(checkpoint, "optimizer.param_groups", buffer.getvalue())
    assert "found a compressed archive" in refused_by_all(checkpoint)


def test_what_save_accepts_load_accepts(tmp_path: Path) -> None:
    """An expanded tensor of a terabyte could be pickled, and never loaded."""
    run = Run()
    run.model.extra = torch.zeros(1).expand(2**40)
    with pytest.raises(CheckpointError, match=r"model\._extra_state"):
        shardadam.save(tmp_path, step=1, **run.arguments())
    run.model.extra = {
        "small": torch.zeros(1).expand(2**10),
        "many": doubled(5),
        "text": "\x1b",
        "sparse": torch.eye(2).to_sparse(),
    }
    shardadam.save(tmp_path, step=1, **run.arguments())
    assert shardadam.load(tmp_path, **Run().arguments()).step == 1
    with pytest.raises(CheckpointError, match="cannot be exported"):
        export(tmp_path, format="torch", output=tmp_path / "out")


def test_save_refuses_what_load_would_refuse(tmp_path: Path) -> None:
    """Such a checkpoint was published, and nobody could resume from it."""
    wrong_entries: list[Any] = [{7: "x"}, {"lr": math.inf}, {"eps": math.nan}]
    for wrong in wrong_entries:
        run = Run()
        run.optimizer.param_groups[0].update(wrong)
        with pytest.raises(CheckpointError, match=r"optimizer\.param_groups could not be loaded again, so it is not"):
            shardadam.save(tmp_path, step=1, **run.arguments())
    run = Run()
    run.model.extra = doubled(40)
    with pytest.raises(CheckpointError, match=r"model\._extra_state could not be loaded again.*found more"):
        shardadam.save(tmp_path, step=1, **run.arguments())
    deep: list[Any] = []
    for _ in range(50_000):
        deep = [deep]
    with pytest.raises(CheckpointError, match="extra: found a value that JSON cannot represent"):
        shardadam.save(tmp_path, step=1, extra=deep, **Run().arguments())
    assert not list(tmp_path.iterdir())


def test_hyperparameters_that_numpy_made_are_saved_as_numbers(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    run = Run()
    run.optimizer.param_groups[0].update(
        lr=numpy.float64(0.1), weight_decay=numpy.float32(0.5), betas=(numpy.float64(0.8), 0.9)
    )
    run.scheduler.base_lrs = [numpy.float64(0.1)]
    shardadam.save(tmp_path, step=1, **run.arguments())
    other = Run()
    shardadam.load(tmp_path, **other.arguments())
    group = other.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.1, 0.5, (0.8, 0.9))
    assert other.scheduler.base_lrs == [0.1]
    assert {type(value) for value in (group["lr"], group["weight_decay"], *group["betas"])} == {float}


# Files


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)
        os.close(here)


def folder(path: Path) -> None:
    path.mkdir()


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def unreadably_large(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**35)


ODD_FILES = [fifo, bound_socket, folder, link_to_a_device, link_to_itself, link_to_nothing, unreadably_large]


@pytest.mark.parametrize("plant", ODD_FILES)
@pytest.mark.parametrize("name", [MANIFEST, "rank-00000.bin"])
def test_only_regular_files_of_bounded_size_are_read(
    checkpoint: Path, name: str, plant: Callable[[Path], None]
) -> None:
    (checkpoint / name).unlink()
    plant(checkpoint / name)
    assert name in refused_by_all(checkpoint)


def test_a_fifo_is_not_even_opened(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening one wakes a writer, and opening a device may do anything."""
    (checkpoint / MANIFEST).unlink()
    fifo(checkpoint / MANIFEST)
    opened, real = [], os.open

    def record(path: Any, *arguments: Any, **options: Any) -> int:
        opened.append(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", record)
    with pytest.raises(CheckpointError, match="expected a regular file"):
        Reader(checkpoint)
    assert opened == []


@pytest.mark.parametrize("plant", ODD_FILES)
def test_a_latest_that_is_no_file_is_as_good_as_none(
    saved: tuple[Path, dict[str, Tensor]], checkpoint: Path, plant: Callable[[Path], None]
) -> None:
    latest = checkpoint.parent / "latest"
    latest.unlink()
    plant(latest)
    assert shardadam.has_checkpoint(checkpoint.parent)
    assert load(checkpoint.parent, saved[1]) is None


def test_a_file_that_changes_while_it_is_read_is_noticed(checkpoint: Path) -> None:
    file = checkpoint / "rank-00000.bin"
    with Reader(checkpoint) as reader:
        os.truncate(file, 10)
        with pytest.raises(CheckpointError, match="it ends within"):
            list(reader.verify())


# Files that are written


def test_export_writes_through_no_link(checkpoint: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in (".model.pt.exporting", "model.pt"):
        output = tmp_path / name.strip(".")
        output.mkdir()
        for target in (precious, tmp_path / "new"):
            (output / name).symlink_to(target)
            with pytest.raises(CheckpointError, match="exists already"):
                export(checkpoint, format="torch", output=output)
            assert (output / name).is_symlink() and len(list(output.iterdir())) == 1
            (output / name).unlink()
    assert precious.read_text() == "precious" and not (tmp_path / "new").exists()


def test_save_writes_through_no_link(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    sync = shardadam.checkpoint.directory.sync_directory

    def plant(path: Path) -> None:
        (checkpoint.parent / ".latest.saving").unlink(missing_ok=True)
        (checkpoint.parent / ".latest.saving").symlink_to(precious)
        sync(path)

    monkeypatch.setattr("shardadam.checkpoint.directory.sync_directory", plant)
    shardadam.save(checkpoint.parent, step=3, **Run().arguments())
    assert precious.read_text() == "precious" and not (checkpoint.parent / "latest").is_symlink()
