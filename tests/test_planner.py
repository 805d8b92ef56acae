# SPDX-License-Identifier: Apache-2.0
"""A plan equals ``optimizer.memory()`` byte for byte, and the proposed setting is the nearest one that fits."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardadam import Precision, ShardedAdamW, sums
from shardadam.cli.model_source import find_model_source
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.optimizer import GradientSync
from shardadam.planner import (
    Fit,
    Need,
    PlannedParameter,
    Setting,
    adamw_bytes,
    adamw_need,
    fitting,
    lay_out,
    need,
    plan,
)
from shardadam.planner.planning import When
from shardadam.precision import Master, Moments
from shardadam.state.memory import Memory
from tests.ranks import on_ranks

SHAPES = ((300, 40), (129,), (), (0,), (64, 64), (1,), (7, 15))
DTYPES = {
    "fp32": [torch.float32],
    "bf16": [torch.bfloat16],
    "fp16": [torch.float16],
    "fp64": [torch.float64],
    "mixed": [torch.float32, torch.bfloat16, torch.float16],
    "mixed with fp64": [torch.bfloat16, torch.float64],
}
BUCKET_MB = (0.0001, 0.01, None)
MODES: tuple[tuple[GradientSync, When], ...] = (
    ("backward", "step"),
    ("backward", "backward"),
    ("step", "step"),
    ("external", "step"),
)


def build_groups(kind: str, device: str = "cpu") -> list[list[nn.Parameter]]:
    """Return two param groups, each with one frozen parameter of every dtype."""
    return [
        [
            nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=index != frozen)
            for dtype in DTYPES[kind]
            for index, shape in enumerate(SHAPES)
        ]
        for frozen in (0, 4)
    ]


def planned(kind: str, device: str = "cpu") -> list[PlannedParameter]:
    groups = build_groups(kind, device)
    return [PlannedParameter.of(parameter, index) for index, group in enumerate(groups) for parameter in group]


def settings(world_size: int, kind: str) -> list[Setting]:
    """Return settings of every format, mode, transport and bucket size."""
    all_moments: tuple[Moments, ...] = ("fp32",) if "fp64" in kind else ("fp32", "bf16", "int8")
    all_masters: tuple[Master, ...] = ("auto", "split", "fp32", "none") if "fp32" != kind != "fp64" else ("auto",)
    precisions = [Precision(moments=m, master=w) for m, w in itertools.product(all_moments, all_masters)]
    precisions += [Precision(reduce=torch.float32), Precision(accumulate="fp32"), Precision(gradients="fp32")]
    precisions += [] if "fp64" in kind else [Precision(gradients="bf16", moments=m) for m in all_moments]
    return [
        Setting(
            world_size=world_size,
            precision=precision,
            gradient_sync=gradient_sync,
            update=update,
            bucket_mb=bucket_mb,
            transport=transport,  # type: ignore[arg-type]
        )
        for precision, (gradient_sync, update), bucket_mb, transport in itertools.product(
            precisions, MODES, BUCKET_MB, ("auto", "collective")
        )
    ]


def build(kind: str, setting: Setting) -> tuple[ShardedAdamW, list[nn.Parameter]]:
    groups = build_groups(kind)
    optimizer = ShardedAdamW(
        [{"params": group} for group in groups],
        precision=setting.precision,
        gradient_sync=setting.gradient_sync,
        bucket_mb=setting.bucket_mb,
        transport=setting.transport,
        update=setting.update,
        ema_decay=0.9 if setting.ema else None,
    )
    return optimizer, [parameter for group in groups for parameter in group if parameter.requires_grad]


def memories(kind: str, some: list[Setting]) -> list[Memory]:
    """Return ``memory()`` of new optimizers."""
    return [build(kind, setting)[0].memory() for setting in some]


PARTS = 31  # odd, so every part has all modes and transports


@pytest.mark.sweep(6)
@pytest.mark.parametrize(("world_size", "kind", "part"), [*itertools.product((1, 2, 3, 4), DTYPES, range(PARTS))])
def test_a_plan_equals_optimizer_memory(world_size: int, kind: str, part: int) -> None:
    some = settings(world_size, kind)[part::PARTS]
    expected = [plan(planned(kind), setting) for setting in some]
    for found in on_ranks(world_size, memories, kind, some):
        for setting, memory, one in zip(some, found, expected, strict=True):
            assert memory == one, setting


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["mixed", "mixed with fp64"])
def test_a_plan_with_averages_equals_optimizer_memory(world_size: int, kind: str) -> None:
    some = [replace(setting, ema=True) for setting in settings(world_size, kind)[::17]]
    expected = [plan(planned(kind), setting) for setting in some]
    for found in on_ranks(world_size, memories, kind, some):
        assert found == expected
        assert all(memory.average > 0 for memory in found)


def backward(parameters: list[nn.Parameter]) -> None:
    sum((parameter.float() ** 2).sum() for parameter in parameters).backward()  # type: ignore[union-attr]


def staging_after_backward(kind: str, setting: Setting) -> tuple[int, int]:
    """Return the bytes of staging before the step, and of gradient shards after clipping."""
    optimizer, parameters = build(kind, setting)
    backward(parameters)
    optimizer.clip_grad_norm_(1.0)
    memory = optimizer.memory()
    return memory.staging, memory.gradient_shard


@pytest.mark.parametrize("transport", ["auto", "collective"])
@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
@pytest.mark.parametrize(
    "precision", [Precision(), Precision(reduce=torch.float32), Precision(gradients="bf16")], ids=("", "reduce", "bf16")
)
def test_the_peak_of_staging_is_two_buffers(gradient_sync: str, transport: str, precision: Precision) -> None:
    setting = Setting(
        world_size=2,
        precision=precision,
        gradient_sync=gradient_sync,  # type: ignore[arg-type]
        bucket_mb=0.01,
        transport=transport,  # type: ignore[arg-type]
        clips=True,
    )
    expected = plan(planned("bf16"), setting, peak=True)
    for staging, gradient_shard in on_ranks(2, staging_after_backward, "bf16", setting):
        # One buffer if the peer was never late; more than two while it is late.
        assert staging % max(1, expected.staging // 2) == 0
        assert (staging > 0) == (expected.staging > 0)
        assert gradient_shard == expected.gradient_shard
        assert (gradient_shard > 0) == (gradient_sync != "external")


def after_updates_in_backward(kind: str, some: list[Setting]) -> list[Memory]:
    """Return what optimizers hold when all buckets have been updated in backward, and after the step."""
    found = []
    for setting in some:
        optimizer, parameters = build(kind, setting)
        backward(parameters)
        optimizer._engine.reducer.wait_all()
        found.append(optimizer.memory())
        optimizer.step()
        optimizer.zero_grad()
        found.append(optimizer.memory())
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_updates_in_backward_keep_two_shards_of_the_largest_bucket(world_size: int) -> None:
    some = [
        Setting(world_size=world_size, precision=precision, bucket_mb=bucket_mb, update="backward")
        for precision, bucket_mb in itertools.product((Precision(), Precision(accumulate="fp32")), (0.01, None))
    ]
    for found in on_ranks(world_size, after_updates_in_backward, "mixed", some):
        for index, memory in enumerate(found):
            setting = some[index // 2]
            expected = plan(planned("mixed"), setting, peak=True)
            if index % 2:
                assert memory.gradient_shard == expected.gradient_shard, setting
            else:  # more where a peer was late
                assert memory.gradient_shard >= expected.gradient_shard, setting
            assert (memory.gradient_shard > 0) == (world_size > 1)
            assert memory.gradients == expected.gradients == 0
            assert memory.state == expected.state
            if world_size > 1:
                assert expected.gradient_shard < plan(planned("mixed"), replace(setting, update="step")).gradient_shard


def test_one_bucket_needs_one_staging_buffer() -> None:
    setting = Setting(world_size=2, bucket_mb=64)
    for staging, _ in on_ranks(2, staging_after_backward, "bf16", setting):
        assert plan(planned("bf16"), setting).staging == staging > 0


@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
def test_one_rank_needs_neither_staging_nor_a_gradient_shard(gradient_sync: str) -> None:
    setting = Setting(gradient_sync=gradient_sync, bucket_mb=0.01)  # type: ignore[arg-type]
    assert staging_after_backward("bf16", setting) == (0, 0)
    assert plan(planned("bf16"), setting, peak=True).total == plan(planned("bf16"), setting).total


@pytest.mark.parametrize(("numel", "count", "buckets"), [(2**20, 12, 6), (2**20, 5, 5), (2**16, 8, 4), (2**14, 8, 2)])
def test_the_default_bucket_size_is_the_optimizers(numel: int, count: int, buckets: int) -> None:
    """8 MiB; a quarter of a small model; 256 KiB of a tiny one."""
    parameters = [nn.Parameter(torch.zeros(numel)) for _ in range(count)]
    optimizer = ShardedAdamW(parameters)
    assert len(lay_out(parameters, Setting()).buckets) == len(optimizer._engine.parameters.buckets) == buckets


@pytest.mark.parametrize(
    ("gib", "ranks", "mib"),
    [
        (13, 8, 128),
        (13, 128, 256),
        (13, 1024, 832),  # a sixteenth of the parameters
        (130, 1024, 1024),
        (1, 8, 64),  # a sixteenth
        (0.1, 8, 32),
    ],
)
def test_the_default_bucket_on_gpus_grows_with_ranks_up_to_a_share_of_the_parameters(
    gib: float, ranks: int, mib: int
) -> None:
    parameters = [PlannedParameter((2**20,), torch.bfloat16)] * round(gib * 2**9)
    found = lay_out(parameters, Setting(device="cuda", world_size=ranks))
    assert found == lay_out(parameters, Setting(device="cuda", world_size=ranks, bucket_mb=mib))


@pytest.mark.parametrize("kind", DTYPES)
def test_parameters_on_the_meta_device_give_the_same_plan(kind: str) -> None:
    for setting in settings(2, kind)[::5]:
        assert plan(planned(kind, "meta"), setting) == plan(planned(kind), setting)
    tensors: list[Tensor] = [torch.empty(shape, device="meta").requires_grad_() for shape in SHAPES]
    described = [PlannedParameter(shape) for shape in SHAPES]
    assert plan(tensors, Setting(world_size=3)) == plan(described, Setting(world_size=3))


def test_planning_a_huge_model_is_fast() -> None:
    layer = [(16384, 16384)] * 4 + [(53248, 16384)] * 3
    parameters = [PlannedParameter(shape, torch.bfloat16) for shape in layer * 126]
    memory = plan(parameters, Setting(world_size=1024, device="cuda"))
    numel = sum(parameter.numel for parameter in parameters)
    assert 1.0 <= memory.state / (10 * numel / 1024) < 1.01
    assert memory.parameters >= 2 * numel


def test_the_plan_includes_the_kernels_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(sums, "KERNEL_DEVICES", {"cpu"})
    for kind in ("fp32", "mixed", "mixed with fp64"):
        setting = Setting()
        assert plan(planned(kind), setting) == build(kind, setting)[0].memory()
    with_kernel = plan(planned("fp32"), setting).tables
    monkeypatch.setattr(sums, "KERNEL_DEVICES", set())
    assert plan(planned("fp32"), setting).tables < with_kernel


def test_replicas_and_other_reduce_dtypes_have_no_bucket_views() -> None:
    setting = Setting(world_size=2, gradient_sync="step")
    assert plan(planned("bf16"), setting).gradients > 0
    assert plan(planned("bf16"), replace(setting, replicas=2)).gradients == 0
    assert plan(planned("bf16"), replace(setting, device="cuda")).gradients == 0
    assert plan(planned("bf16"), replace(setting, precision=Precision(reduce=torch.float32))).gradients == 0


@pytest.mark.parametrize(
    ("kind", "device", "auto"), [("fp32", "cpu", 4), ("bf16", "cpu", 4), ("fp32", "cuda", 4), ("bf16", "cuda", 2)]
)
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_plan_counts_gradient_shards_in_their_dtype(kind: str, device: str, auto: int, replicas: int) -> None:
    sizes = {"auto": auto if replicas == 1 else 4, "fp32": 4, "bf16": 2}
    for gradients, size in sizes.items():
        precision = Precision(gradients=gradients)  # type: ignore[arg-type]
        setting = Setting(world_size=2, replicas=replicas, device=device, precision=precision)
        found = plan(planned(kind), setting)
        assert found.gradient_shard / size == found.moments / 8 > 0


def test_nccl_needs_receive_buffers_for_exact_sums_only() -> None:
    setting = Setting(world_size=4, device="cuda")
    native = plan(planned("fp32"), setting, peak=True).staging
    exact = plan(planned("fp32"), replace(setting, precision=Precision(accumulate="fp32")), peak=True).staging
    assert 0 < 2 * native == exact


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        (Setting(world_size=0), "fp32"),
        (Setting(bucket_mb=0), "fp32"),
        (Setting(gradient_sync="never"), "fp32"),  # type: ignore[arg-type]
        (Setting(precision=Precision(moments="int8")), "fp64"),
        (Setting(precision=Precision(gradients="bf16")), "fp64"),
        (Setting(update="now"), "fp32"),  # type: ignore[arg-type]
        (Setting(update="backward", gradient_sync="step"), "fp32"),
        (Setting(update="backward", gradient_sync="external"), "fp32"),
        (Setting(update="backward", clips=True), "fp32"),
        (Setting(offload="host"), "fp32"),
    ],
)
def test_the_planner_refuses_what_the_optimizer_refuses(setting: Setting, kind: str) -> None:
    with pytest.raises((ValueError, TypeError), match=r"found|is float64"):
        plan(planned(kind), setting)


# Bytes that a rank needs


@pytest.mark.parametrize("kind", DTYPES)
def test_adamw_bytes_are_those_of_torch(kind: str) -> None:
    parameters = [p for group in build_groups(kind) for p in group]
    optimizer = torch.optim.AdamW(parameters)
    backward([p for p in parameters if p.requires_grad])
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert adamw_bytes(parameters) == adamw_bytes(planned(kind, "meta")) == held
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert adamw_need(parameters) == Need(sum(p.nbytes for p in parameters), gradients, held)


MATRICES = [PlannedParameter((128, 128))] * 16
TIED = PlannedParameter((128, 128), is_tied=True)
MATRIX_BYTES = 128 * 128 * 4
BUCKET = 2 * MATRIX_BYTES / 2**20


@pytest.mark.parametrize(
    ("gradient_sync", "transport", "gradients", "optimizer"),
    [
        ("backward", "auto", 2, 2 * 2 + 16 / 2),  # a bucket of two; two staging buffers and the gradient shard
        ("backward", "collective", 2, 2 * 3 + 16 / 2),  # and half a buffer to receive
        ("step", "auto", 16 + 1, 0),
        ("step", "collective", 16, 2 * 3 + 16 / 2),
        ("external", "auto", 16, 0),
    ],
)
def test_need_counts_parameters_gradients_and_optimizer(
    monkeypatch: pytest.MonkeyPatch, gradient_sync: str, transport: str, gradients: int, optimizer: float
) -> None:
    monkeypatch.setenv("SHARDADAM_NUMBA", "0")  # its tables are some bytes more
    setting = Setting(world_size=2, gradient_sync=gradient_sync, bucket_mb=BUCKET, transport=transport)  # type: ignore[arg-type]
    frozen = PlannedParameter((128, 128), trainable=False)
    small = 16 * (12 + 24)  # scalars and tables
    found = need([*MATRICES, frozen], setting)
    moments = 2 * 16 / 2
    assert found == Need(
        parameters=17 * MATRIX_BYTES,
        gradients=gradients * MATRIX_BYTES,
        optimizer=int((optimizer + moments) * MATRIX_BYTES) + small,
    )
    assert found.total == found.parameters + found.gradients + found.optimizer


@pytest.mark.parametrize(
    ("gradient_sync", "transport", "gradients"),
    [
        ("backward", "auto", 1 + 2),  # alone in its bucket; two gradients at the end of backward, and their sum
        ("step", "collective", 17 + 2),
        ("step", "auto", 17 + 3),
        ("external", "auto", 17 + 2),
    ],
)
def test_two_gradients_of_a_tied_parameter_exist_at_once(gradient_sync: str, transport: str, gradients: int) -> None:
    setting = Setting(world_size=2, gradient_sync=gradient_sync, bucket_mb=BUCKET, transport=transport)  # type: ignore[arg-type]
    assert need([TIED, *MATRICES], setting).gradients == gradients * MATRIX_BYTES
    assert adamw_need([TIED, *MATRICES]).gradients == 19 * MATRIX_BYTES


def test_a_tied_gradient_is_kept_while_other_buckets_are_reduced() -> None:
    large = PlannedParameter((1024, 128))
    setting = Setting(world_size=2, bucket_mb=BUCKET)
    assert need([large, TIED], setting).gradients == large.nbytes + TIED.nbytes


SPLIT = [(64, 64), (300, 40), (7,), (500, 64), (3, 3), (64, 64)]
"""The second and the fourth are larger than a bucket of 0.01 MiB."""


@pytest.mark.parametrize("bucket_mb", [0.01, 0.05, None])
def test_one_rank_keeps_the_gradients_of_one_bucket_with_updates_in_backward(bucket_mb: float | None) -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SPLIT]
    setting = Setting(bucket_mb=bucket_mb, update="backward")
    optimizer = ShardedAdamW(parameters, bucket_mb=bucket_mb, update="backward")
    reducer: Any = optimizer._engine.reducer
    take, found = reducer._pass, []

    def recorded(*arguments: Any) -> bool:
        found.append(optimizer.memory().gradients)
        done: bool = take(*arguments)
        return done

    reducer._pass = recorded
    x = torch.zeros(())
    for parameter in parameters:  # each one's gradient is there before the next one's
        x = x + (parameter + x).sum()
    x.backward()
    assert len(found) == len(lay_out(parameters, setting).buckets)
    assert max(found) == need(parameters, setting).gradients
    assert optimizer.memory().gradients == 0
    if bucket_mb is not None:
        whole = sum(parameter.nbytes for parameter in parameters)
        assert max(found) < whole == need(parameters, replace(setting, update="step")).gradients


@pytest.mark.parametrize("world_size", [1, 2])
def test_updates_in_backward_keep_tied_gradients_until_their_last_use(world_size: int) -> None:
    setting = Setting(world_size=world_size, bucket_mb=BUCKET, update="backward")
    large = PlannedParameter((1024, 128))
    assert need([TIED, *MATRICES], setting).gradients == 3 * MATRIX_BYTES
    assert need([large, TIED], setting).gradients == large.nbytes + TIED.nbytes


def test_7b_in_8_bits_without_masters_trains_in_30_gb_on_one_gpu() -> None:
    parameters = find_model_source("7B").planned
    setting = Setting(device="cuda", precision=Precision(moments="int8", master="none"), update="backward")
    assert 28.5e9 < need(parameters, setting).total <= 30e9
    assert need(parameters, replace(setting, update="step")).total > 40e9


def test_tied_parameters_of_a_model_are_recognised() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8)})
    model["head"].weight = model["embedding"].weight
    found = PlannedParameter.of_model(model)
    assert {name: one.is_tied for name, one in found.items()} == {"embedding.weight": True, "head.bias": False}


def test_clipping_needs_the_whole_gradient_shard() -> None:
    setting = Setting(world_size=2, gradient_sync="step", bucket_mb=BUCKET)
    more = need(MATRICES, replace(setting, clips=True)).total - need(MATRICES, setting).total
    assert more == 16 // 2 * MATRIX_BYTES


# The nearest setting that fits

LOW = [PlannedParameter((128, 128), torch.bfloat16)] * 16
ASKED = Setting(world_size=2, bucket_mb=BUCKET)
LEAN = replace(ASKED, precision=Precision(gradients="bf16", moments="int8"))
FORMATS = ("gradients", "moments", "master")


def total(parameters: list[PlannedParameter], asked: Setting = ASKED, **changes: Any) -> int:
    precision = {name: changes.pop(name) for name in FORMATS if name in changes}
    return need(parameters, replace(asked, precision=replace(asked.precision, **precision), **changes)).total


def check(fit: Fit, parameters: list[PlannedParameter], **changes: Any) -> None:
    """Check that the nearest setting differs from the requested one only in ``changes``, and its bytes."""
    assert fit.nearest is not None and fit.nearest_need is not None
    precision = {name: changes[name] for name in FORMATS if name in changes}
    others = {name: value for name, value in changes.items() if name not in precision}
    assert fit.nearest == replace(fit.asked, precision=replace(fit.asked.precision, **precision), **others)
    assert fit.changes == tuple(changes)
    assert fit.nearest_need == need(parameters, fit.nearest)
    assert fit.need == need(parameters, fit.asked)
    assert fit.fits == (not changes)


def test_settings_that_fit_are_not_changed() -> None:
    check(fitting(MATRICES, ASKED, total(MATRICES)), MATRICES)


def test_gradient_shards_are_narrowed_first() -> None:
    check(fitting(MATRICES, ASKED, total(MATRICES) - 1), MATRICES, gradients="bf16")
    exact = replace(ASKED, precision=Precision(gradients="fp32"), device="cuda")
    check(fitting(LOW, exact, total(LOW, exact) - 1), LOW, gradients="auto")


def test_moments_are_reduced_second_and_no_further_than_needed() -> None:
    check(fitting(MATRICES, ASKED, total(MATRICES, gradients="bf16") - 1), MATRICES, moments="bf16")
    check(fitting(MATRICES, ASKED, total(MATRICES, moments="bf16") - 1), MATRICES, moments="int8")


def test_the_update_moves_into_backward_third() -> None:
    check(fitting(MATRICES, LEAN, total(MATRICES, LEAN) - 1), MATRICES, update="backward")
    asked = replace(ASKED, world_size=1, precision=Precision(moments="int8"))  # without gradient shards
    check(fitting(MATRICES, asked, total(MATRICES, asked) - 1, most_ranks=1), MATRICES, update="backward")


def test_the_update_moves_into_backward_only_where_nothing_clips_or_reads_gradients() -> None:
    asked = replace(LEAN, clips=True)
    check(fitting(MATRICES, asked, total(MATRICES, asked) - 1), MATRICES, world_size=4)  # one change instead of two
    fit = fitting(MATRICES, asked, total(MATRICES, asked) - 1, most_ranks=2)
    check(fit, MATRICES, update="backward", clips=False)
    asked = replace(LEAN, gradient_sync="step", transport="collective")
    available = total(MATRICES, asked, gradient_sync="backward") - 1
    check(fitting(MATRICES, asked, available, most_ranks=2), MATRICES, update="backward", gradient_sync="backward")
    assert total(MATRICES, LEAN) > total(MATRICES, LEAN, update="backward")


def test_clipping_is_given_up_for_updates_in_backward_only() -> None:
    asked = replace(LEAN, gradient_sync="step", clips=True)
    available = total(MATRICES, asked, clips=False)
    assert available < total(MATRICES, asked)
    nearest = fitting(MATRICES, asked, available, most_ranks=2).nearest
    assert nearest is not None and (nearest.clips or nearest.update == "backward")


def test_gradient_sync_becomes_backward_fourth() -> None:
    asked = replace(ASKED, gradient_sync="step", transport="collective")
    available = total(MATRICES, asked, moments="int8") - 1
    check(fitting(MATRICES, asked, available, most_ranks=2), MATRICES, gradient_sync="backward")


def test_the_master_is_reduced_before_ranks_are_added() -> None:
    precision = replace(LEAN.precision, master="fp32")
    asked = replace(LEAN, precision=precision, update="backward", transport="collective")
    check(fitting(LOW, asked, total(LOW, asked) - 1), LOW, master="split")
    check(fitting(LOW, asked, total(LOW, asked, master="split") - 1), LOW, master="none")


def test_ranks_are_added_last_and_no_more_than_needed() -> None:
    asked = replace(LEAN, update="backward")
    check(fitting(MATRICES, asked, total(MATRICES, asked) - 1), MATRICES, world_size=4)
    available = total(MATRICES, asked, world_size=4) - 1
    check(fitting(MATRICES, asked, available), MATRICES, world_size=8)


def test_bucket_views_may_take_less_than_float32_gradient_shards() -> None:
    asked = replace(ASKED, precision=Precision(moments="int8", master="none"))
    assert total(LOW, asked, gradient_sync="step") < total(LOW, asked)


def test_state_goes_to_disk_last() -> None:
    asked = replace(LEAN, update="backward")
    available = total(MATRICES, asked, offload="disk")
    assert available < total(MATRICES, asked, world_size=1)
    check(fitting(MATRICES, asked, available, most_ranks=2), MATRICES, offload="disk")
    plain = replace(ASKED, world_size=1)  # disk alone would do, but so do two changes that cost less
    available = total(MATRICES, plain, offload="disk")
    check(fitting(MATRICES, plain, available, most_ranks=1), MATRICES, moments="bf16", update="backward")
    assert total(MATRICES, asked, world_size=4) < total(MATRICES, asked)
    check(fitting(MATRICES, asked, total(MATRICES, asked) - 1, most_ranks=4), MATRICES, world_size=4)
    kept = replace(asked, offload="host", device="cuda")
    nearest = fitting(MATRICES, kept, total(MATRICES, kept) - 1, most_ranks=4).nearest
    assert nearest is None or nearest.offload == "host"


def test_two_changes_are_made_where_one_is_not_enough_by_the_fewest_steps() -> None:
    asked = replace(ASKED, precision=Precision(gradients="bf16"), update="backward")
    available = total(MATRICES, asked, moments="bf16", world_size=4)
    one = [total(MATRICES, asked, moments="int8"), total(MATRICES, asked, world_size=4)]
    assert available < min(one)
    check(fitting(MATRICES, asked, available, most_ranks=4), MATRICES, moments="bf16", world_size=4)


def test_nothing_fits_where_parameters_do_not() -> None:
    parameter_bytes = 16 * MATRIX_BYTES
    fit = fitting(MATRICES, ASKED, parameter_bytes)
    assert (fit.nearest, fit.nearest_need, fit.changes, fit.fits) == (None, None, (), False)
    assert (fit.available, fit.need) == (parameter_bytes, need(MATRICES, ASKED))


def test_fewer_ranks_are_proposed_where_they_share_the_memory_of_a_host() -> None:
    asked = replace(LEAN, world_size=4, update="backward")
    host_bytes = 2 * total(MATRICES, asked, world_size=2)
    assert host_bytes // 4 < total(MATRICES, asked)
    fit = fitting(MATRICES, asked, lambda ranks: host_bytes // ranks, most_ranks=4)
    check(fit, MATRICES, world_size=2)
    assert fit.available == host_bytes // 4


def test_moments_of_float64_and_masters_of_float32_are_not_changed() -> None:
    doubles = [PlannedParameter((128, 128), torch.float64)] * 4
    asked = replace(ASKED, update="backward")
    check(fitting(doubles, asked, total(doubles, asked) - 1), doubles, world_size=4)
    asked = replace(LEAN, world_size=1, update="backward")
    assert fitting(MATRICES, asked, total(MATRICES, asked) - 1, most_ranks=1, keep=["offload"]).nearest is None


def test_external_gradients_are_never_proposed() -> None:
    """They need no staging, but other code that averages them."""
    asked = replace(ASKED, precision=Precision(moments="int8"))
    available = total(MATRICES[:1], asked, gradient_sync="external")
    assert available < total(MATRICES[:1], asked)
    nearest = fitting(MATRICES[:1], asked, available, most_ranks=2).nearest
    assert nearest is None or nearest.gradient_sync != "external"


def test_parameters_are_padded_to_blocks_of_128_elements() -> None:
    """Less than a block takes a whole block on every rank."""
    memory = plan([PlannedParameter(())], Setting(world_size=4))
    assert memory.parameters == 4 * ALIGNMENT_NUMEL * 4
    assert memory.moments == 2 * ALIGNMENT_NUMEL * 4
