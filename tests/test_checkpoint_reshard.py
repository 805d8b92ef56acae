# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of N ranks loads on any M, at any bucket size, in any format; each rank reads only its part."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardadam
from shardadam import CheckpointError, Precision, ShardedAdamW
from shardadam.checkpoint import loading
from shardadam.checkpoint.reader import Reader
from shardadam.layout import ITEM_BYTES
from shardadam.transport import connect
from shardadam.update import formats
from tests.adversarial import AdversarialTransport
from tests.ranks import on_ranks, rank_and_size
from tests.runs import FORMATS, build, differences

Everything = dict[str, Tensor]


def save_run(
    directory: str, format: Any, bucket_mb: float, width: int, adversarial: bool = False, device: str = "cpu"
) -> Everything:
    options = {"transport": AdversarialTransport(connect(None))} if adversarial else {}
    run = build(format, bucket_mb=bucket_mb, width=width, device=device, **options)
    run.train(range(3))
    shardadam.save(directory, step=3, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    return run.everything()


def load_run(directory: str, format: Any, bucket_mb: float, width: int, device: str = "cpu") -> Everything:
    run = build(format, bucket_mb=bucket_mb, width=width, seed=4, device=device)
    shardadam.load(directory, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    return run.everything()


@pytest.mark.sweep(4)
@pytest.mark.parametrize("buckets", [(0.05, 0.01), (0.002, 32)])
@pytest.mark.parametrize("format", [FORMATS[0], FORMATS[2], (torch.bfloat16, "int8", "split")], ids=str)
@pytest.mark.parametrize(("n", "m"), list(product(range(1, 7), range(1, 7))))
def test_reshards_from_any_n_to_any_m_bit_for_bit(tmp_path: Path, n: int, m: int, format: Any, buckets: Any) -> None:
    saved = on_ranks(n, save_run, str(tmp_path), format, buckets[0], 257)[0]
    for loaded in on_ranks(m, load_run, str(tmp_path), format, buckets[1], 257):
        assert differences(saved, loaded) == []


def test_a_checkpoint_does_not_know_the_transport(tmp_path: Path) -> None:
    saved = on_ranks(2, save_run, str(tmp_path), FORMATS[0], 0.05, 40, True)[0]
    for loaded in on_ranks(3, load_run, str(tmp_path), FORMATS[0], 0.05, 40):
        assert differences(saved, loaded) == []


CONVERSIONS = [(one, other) for one in FORMATS for other in FORMATS if one != other]


@pytest.mark.sweep(5)
@pytest.mark.parametrize(("saved_as", "loaded_as"), CONVERSIONS, ids=lambda f: "-".join(map(str, f)))
def test_another_format_is_converted_on_load(tmp_path: Path, saved_as: Any, loaded_as: Any) -> None:
    """To the value of the new format that is nearest to the exact weight or moment."""
    saved = on_ranks(2, save_run, str(tmp_path), saved_as, 0.01, 40)[0]
    loaded = on_ranks(1, load_run, str(tmp_path), loaded_as, 0.05, 40)[0]
    names = [name.removesuffix(".exp_avg") for name in saved if name.endswith(".exp_avg")]
    assert len(names) == 10
    for name in names:
        assert loaded[f"{name}.step"] == saved[f"{name}.step"]
        for index, kind in enumerate(formats.MOMENTS):
            value, found = saved[f"{name}.{kind}"].float(), loaded[f"{name}.{kind}"].float()
            if loaded_as[1] == "fp32":
                assert torch.equal(value, found)
            elif value.numel():
                scale = value.abs().max() if loaded_as[1] == "int8" else value.abs()
                assert ((value - found).abs() <= (0.02, 0.03)[index] * scale + 1e-38).all()
        exact = saved.get(f"{name}.master", saved[f"model.{name}"]).to(torch.float64)
        weight = loaded[f"model.{name}"].to(torch.float64)
        if loaded_as[0] in (torch.float32, torch.float64):
            assert torch.equal(weight, exact.to(loaded_as[0]).double())
        elif f"{name}.master" in loaded and saved_as[0] != torch.float64:
            is_exact = loaded_as[2] == "fp32" or loaded_as[0] == torch.bfloat16
            near = torch.finfo(loaded_as[0]).eps * 2**-16 if not is_exact else 0
            assert ((loaded[f"{name}.master"].double() - exact).abs() <= near * exact.abs() + (near > 0) * 1e-12).all()
        assert ((weight - exact).abs() <= torch.finfo(loaded_as[0]).eps * exact.abs() / 2 + 3e-8).all()


class Big(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(torch.ones(shape)) for shape in ((1500, 1111), (2049, 1024))])
        self.vector = nn.Parameter(torch.ones(777))


def save_big(directory: str, bucket_mb: float) -> None:
    model = Big()
    shardadam.save(directory, step=0, model=model, optimizer=ShardedAdamW(model.parameters(), bucket_mb=bucket_mb))


def count_bytes(directory: str, moments: Any, bucket_mb: float) -> tuple[int, int, int]:
    """Returns the bytes that this rank reads, the bytes that it needs, and the number of boundaries of its spans."""
    readers: list[Reader] = []

    class Counting(Reader):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            readers.append(self)

    model = Big()
    optimizer = ShardedAdamW(model.parameters(), bucket_mb=bucket_mb, precision=Precision(moments=moments))
    loading.Reader = Counting  # type: ignore[misc]
    try:
        shardadam.load(directory, model=model, optimizer=optimizer)
    finally:
        loading.Reader = Reader  # type: ignore[misc]
    spans = [span for param in optimizer._engine.parameters.params for span in param.shard_segments]
    return readers[0].bytes_read, 12 * sum(span.numel for span in spans), 2 * len(spans)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 1), (2, 3), (3, 2), (1, 6)])
def test_a_rank_reads_what_it_needs_and_an_item_at_each_boundary(tmp_path: Path, n: int, m: int) -> None:
    on_ranks(n, save_big, str(tmp_path), 32.0)
    for read, needed, boundaries in on_ranks(m, count_bytes, str(tmp_path), "fp32", 32.0):
        assert needed <= read <= 1.1 * needed + 3 * boundaries * ITEM_BYTES  # parameter, exp_avg and exp_avg_sq
        if m <= n:
            assert read <= 2.1 * needed


# Names and shapes


def save_adamw(directory: str) -> None:
    model = Big()
    optimizer = ShardedAdamW([{"params": [model.vector]}, {"params": [*model.matrices], "lr": 1.0}])
    shardadam.save(directory, step=0, model=model, optimizer=optimizer, extra=math.pi)


class Other(Big):
    def __init__(self, how: str) -> None:
        super().__init__()
        if how == "a shape":
            self.vector = nn.Parameter(torch.ones(778))
        if how == "names":
            self.more = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(5)])
            del self.vector


def load_other(directory: str, how: str) -> tuple[str, bool]:
    model = Other(how)
    groups: Any = [{"params": [model.vector]}, {"params": [*model.matrices]}] if how != "names" else model.parameters()
    if how == "groups":
        groups = [{"params": [model.vector, model.matrices[0]]}, {"params": [model.matrices[1]]}]
    optimizer = ShardedAdamW(groups)
    loss: Any = sum(p.sum() for p in model.parameters())
    loss.backward()
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    try:
        shardadam.load(directory, model=model, optimizer=optimizer)
    except CheckpointError as error:
        return str(error), all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return "", False


REFUSALS = {
    "a shape": ["model.vector has shape (777,), expected (778,)"],
    "names": ["model.more.0, model.more.1, model.more.2 and 2 more", "Only in the checkpoint: model.vector"],
    "groups": ["[1, 2]", "[2, 1]"],
}


@pytest.mark.parametrize("how", REFUSALS)
def test_what_does_not_fit_is_refused_with_nothing_changed(tmp_path: Path, how: str) -> None:
    on_ranks(2, save_adamw, str(tmp_path))
    for said, unchanged in on_ranks(2, load_other, str(tmp_path), how):
        assert unchanged
        assert all(words in said for words in REFUSALS[how]), said


def unfreeze_and_save(directory: str) -> Everything:
    rank, _ = rank_and_size()
    model = Big()
    model.matrices[0].requires_grad_(False)
    optimizer = ShardedAdamW(model.named_parameters())

    def step() -> None:
        loss: Any = sum((p * (rank + 1)).sum() for p in model.parameters() if p.requires_grad)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    model.matrices[0].requires_grad_(True)
    step()
    model.matrices[1].requires_grad_(False)
    shardadam.save(directory, step=2, model=model, optimizer=optimizer)
    return {
        f"{name}.{kind}": value
        for name, p in model.named_parameters()
        for kind, value in optimizer.full_state(p).items()
    }


def load_trainable(directory: str) -> Everything:
    model = Big()
    optimizer = ShardedAdamW(model.named_parameters())
    shardadam.load(directory, model=model, optimizer=optimizer)
    return {
        f"{name}.{kind}": value
        for name, p in model.named_parameters()
        for kind, value in optimizer.full_state(p).items()
    }


def test_parameters_that_joined_late_load_where_all_are_there_from_the_start(tmp_path: Path) -> None:
    """Positions in the parameter are saved, not its bucket."""
    saved = on_ranks(2, unfreeze_and_save, str(tmp_path))[0]
    for loaded in on_ranks(3, load_trainable, str(tmp_path)):
        assert differences(saved, loaded) == []


def save_frozen(directory: str) -> None:
    model = Big()
    model.vector.requires_grad_(False)
    shardadam.save(directory, step=0, model=model, optimizer=ShardedAdamW(model.named_parameters()))


def test_what_was_frozen_then_starts_anew(tmp_path: Path) -> None:
    save_frozen(str(tmp_path))
    model = Big()
    optimizer = ShardedAdamW(model.named_parameters())
    model.vector.sum().backward()
    optimizer.step()
    shardadam.load(tmp_path, model=model, optimizer=optimizer)
    state = optimizer.full_state(model.vector)
    assert not any(value.any() for value in state.values())
    assert torch.equal(model.vector, torch.ones(777))


def test_another_memory_format_is_turned(tmp_path: Path) -> None:
    def make(memory_format: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        convolution = nn.Conv2d(5, 7, 3).to(memory_format=memory_format)
        return convolution, ShardedAdamW(convolution.parameters(), precision=Precision(moments="bf16"))

    one, saved = make(torch.channels_last)
    one(torch.randn(2, 5, 4, 4)).square().sum().backward()
    saved.step()
    shardadam.save(tmp_path, step=1, model=one, optimizer=saved)
    other, loaded = make(torch.contiguous_format)
    shardadam.load(tmp_path, model=other, optimizer=loaded)
    assert torch.equal(one.weight, other.weight) and one.weight.stride() != other.weight.stride()
    for kind, value in saved.full_state(one.weight).items():
        assert torch.equal(value, loaded.full_state(other.weight)[kind])


def test_exact_ties_round_away_from_zero_as_the_update_rounds_them(tmp_path: Path) -> None:
    """If they were rounded to even, masters would not round to their parameters, and would be dropped."""
    tie = torch.tensor([1 + 2.0**-8, -1 - 2.0**-8, 1 + 3 * 2.0**-8])
    exact = nn.Linear(3, 1, bias=False)
    exact.weight.detach().copy_(tie)
    shardadam.save(tmp_path, step=0, model=exact, optimizer=ShardedAdamW(exact.parameters()))
    narrow = nn.Linear(3, 1, bias=False).bfloat16()
    optimizer = ShardedAdamW(narrow.parameters(), precision=Precision(master="split"))
    shardadam.load(tmp_path, model=narrow, optimizer=optimizer)
    assert torch.equal(optimizer.full_state(narrow.weight)["master"].flatten(), tie)
