# SPDX-License-Identifier: Apache-2.0
"""The CPU's scenarios on a GPU, and what only a GPU can show: the compiled kernel's bits, a step that never waits
for the device, CUDA graph capture, transfers on their own stream.

Runs over NCCL with one rank, and over Gloo with 2 and 4 ranks on one GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardadam import GradScaler, Precision, ShardedAdamW
from shardadam.planner import Setting, plan
from shardadam.sums import has_kernel
from shardadam.sums.scattered import Scattered
from shardadam.transport import Transport, connect
from shardadam.transport.streams import CommunicationStream
from shardadam.update.shard import Counters, Shard
from tests import kernel_cases, test_triton
from tests import test_checkpoint_reshard as checkpoints
from tests import test_overlap as overlap
from tests import test_parity as parity
from tests import test_precision as precision
from tests import test_step_sync as step_sync
from tests import test_sums as sums
from tests.on_cuda import captured, nccl_of_one, warm_up
from tests.ranks import on_ranks, rank_and_size
from tests.runs import differences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
on_nccl_too = pytest.mark.parametrize("transport", [connect, nccl_of_one], ids=["alone", "nccl"])
of_moments = pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
Connect = Callable[..., Transport]


def connected(transport: Connect) -> Transport:
    return transport(None) if transport is connect else transport()


@pytest.fixture
def slow_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delay every transfer of this process by some milliseconds, so code that does not wait for it reads old values."""
    enter = CommunicationStream.__enter__

    def late(self: Any) -> Any:
        stream = enter(self)
        torch.cuda._sleep(5_000_000)
        return stream

    monkeypatch.setattr(CommunicationStream, "__enter__", late)


# The kernel


@pytest.mark.parametrize("averages", [False, True], ids=["", "averages"])
@test_triton.each_variant
def test_compiled_kernel_equals_reference(variant: kernel_cases.Variant, averages: bool) -> None:
    """Bit for bit, as in the interpreter, with infinities, subnormals, NaNs and stale remainders."""
    assert kernel_cases.differences_from_reference(variant, device=DEVICE, averages=averages) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@test_triton.each_variant
def test_every_form_of_gradients_and_buckets_takes_the_same_step(variant: kernel_cases.Variant, dtype: str) -> None:
    assert kernel_cases.differences_between_forms(variant, dtype, DEVICE) == []


@pytest.mark.parametrize("source", sums.DTYPES)
@pytest.mark.parametrize("shard", sums.DTYPES)
def test_compiled_sums_equal_the_reference(shard: str, source: str) -> None:
    assert sums.differences_of_sums(shard, source, DEVICE) == []


def test_compiled_sums_of_squares_equal_the_reference() -> None:
    assert sums.differences_of_squares(DEVICE) == []
    assert sums.differences_of_scattered_squares(DEVICE) == []


def test_addresses_of_gradients_are_sent_without_a_wait_and_held_by_a_graph() -> None:
    tensors = [torch.ones(n, device=DEVICE) for n in (5, 300)]
    made: list[Tensor] = []

    def send() -> None:
        addresses = Scattered.with_addresses([*tensors, None], torch.float32, torch.device(DEVICE)).addresses
        assert addresses is not None
        made.append(addresses.table)

    send()
    torch.cuda.set_sync_debug_mode("error")
    try:
        send()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    warm_up(send)
    replay = captured(send)
    expected = [*(tensor.data_ptr() for tensor in tensors), 0]
    assert made[1].tolist() == expected
    made[-1].zero_()
    pinned = [torch.full((3,), -1, dtype=torch.int64, pin_memory=True) for _ in range(100)]  # over any freed memory
    replay()
    assert made[-1].tolist() == expected and len(pinned) == 100


def test_this_machine_can_launch_kernels() -> None:
    torch.zeros(1, device=DEVICE)
    assert has_kernel(torch.float32, torch.device(DEVICE))


def test_compiled_positions_are_counted_in_uint32() -> None:
    variant = kernel_cases.Variant("int8", "bfloat16", "none")
    assert kernel_cases.differences_from_reference(variant, 2**32 - 1024, DEVICE) == []


def test_the_split_of_a_nan_is_a_nan() -> None:
    """The NaN 0x7fffffff must round to a NaN, not to -0.0."""
    variant = kernel_cases.Variant("fp32", "bfloat16", "split")
    shard = kernel_cases.to_device(kernel_cases.build_shard(variant, torch.Generator().manual_seed(0)), DEVICE)
    shard.parameter.view(torch.int16).fill_(0x7FFF)
    shard.remainder.fill_(-1)
    counters = kernel_cases.to_device(kernel_cases.build_counters(), DEVICE)
    take_steps(shard, counters, 1)
    assert bool(shard.parameter.isnan().all())


def take_steps(shard: Shard, counters: Counters, count: int) -> None:
    from shardadam.update.triton import TritonUpdate

    update = TritonUpdate(counters, seed=kernel_cases.SEED)
    for _ in range(count):
        kernel_cases.begin(update, counters, kernel_cases.Step(kernel_cases.adam_step()))
        update.step_(shard, kernel_cases.ONLY_BUCKET)


def build_single_parameter(numel: int, gradient: Tensor) -> tuple[Shard, Counters]:
    """Return a shard of one bfloat16 parameter without a master, with 8-bit moments."""
    make = lambda dtype, count=numel: torch.zeros(count, dtype=dtype, device=DEVICE)  # noqa: E731
    blocks = numel // kernel_cases.BLOCK_NUMEL
    shard = Shard(
        parameter=make(torch.bfloat16),
        gradient=gradient,
        exp_avg=make(torch.int8),
        exp_avg_sq=make(torch.uint8),
        exp_avg_scale=make(torch.float32, blocks),
        exp_avg_sq_scale=make(torch.float32, blocks),
        master=None,
        remainder=None,
        blocks=make(torch.int16, blocks),
        first_block=0,
    )
    none = [make(torch.int64, 1) for _ in range(3)]
    counters = Counters(make(torch.float32, 1), make(torch.float64, 1), *none)
    return shard, counters


def test_stochastic_rounding_is_unbiased_on_the_device() -> None:
    numel = 1 << 22
    shard, counters = build_single_parameter(numel, torch.ones(numel, device=DEVICE))
    shard.parameter.fill_(1.0)
    take_steps(shard, counters, 1)
    below, above = 1.0 - 2.0**-8, 1.0  # 1 - LR lies between them
    assert sorted(shard.parameter.float().unique().tolist()) == [below, above]
    expected = (1.0 - kernel_cases.LR - below) / (above - below)
    share = float((shard.parameter == above).float().mean())
    assert abs(share - expected) < 5 * (expected * (1 - expected) / numel) ** 0.5 + 1e-5


def test_offsets_beyond_two_to_the_31_elements() -> None:
    """The last elements of a huge shard equal those of a small one with the same gradients and positions."""
    numel, last = 2**31 + 8 * 1024, 1024
    if torch.cuda.mem_get_info()[0] < 10 * numel:
        pytest.skip("needs 20 GB of memory on the device")
    random = torch.Generator(DEVICE).manual_seed(0)
    gradient = torch.zeros(numel, device=DEVICE)
    gradient[-last:] = torch.randn(last, device=DEVICE, generator=random)
    shard, counters = build_single_parameter(numel, gradient)
    small, its_counters = build_single_parameter(last, gradient[-last:].clone())
    its_counters.first_blocks.sub_((numel - last) // kernel_cases.BLOCK_NUMEL)
    take_steps(shard, counters, 2)
    take_steps(small, its_counters, 2)
    assert torch.equal(shard.parameter[-last:], small.parameter) and bool(small.parameter.any())
    assert torch.equal(shard.exp_avg[-last:], small.exp_avg) and torch.equal(shard.exp_avg_sq[-last:], small.exp_avg_sq)
    assert not bool(shard.parameter[:-last].any())


# The step


in_both_places = pytest.mark.parametrize("update", ["step", "backward"])


def build(moments: Any, lr: Any, transport: Connect, update: str) -> tuple[nn.Module, ShardedAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).to(DEVICE).bfloat16()
    options: Any = dict(lr=lr, precision=Precision(moments=moments), bucket_mb=0.005, update=update)
    options["max_grad_norm"] = 1.0 if update == "step" else None
    return model, ShardedAdamW(model.parameters(), transport=connected(transport), **options)


@on_nccl_too
@of_moments
@in_both_places
def test_a_step_does_not_wait_for_the_device(moments: str, transport: Connect, update: str) -> None:
    model, optimizer = build(moments, 1e-2, transport, update)
    batch = torch.randn(16, 64, device=DEVICE, dtype=torch.bfloat16)
    for step in range(3):
        # The first step compiles kernels and agrees on the order of buckets.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            model(batch).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(optimizer.skipped_steps) == 0


@on_nccl_too
@of_moments
@in_both_places
def test_replays_of_a_captured_step_equal_steps(moments: str, transport: Connect, update: str) -> None:
    """Forward, backward and step are one CUDA graph; the learning rate changes between replays."""
    batch = torch.randn(16, 64, device=DEVICE, dtype=torch.bfloat16)
    results = []
    for is_captured in (False, True):
        lr = torch.tensor(1e-2, device=DEVICE)
        model, optimizer = build(moments, lr, transport, update)

        def step(model: nn.Module = model, optimizer: ShardedAdamW = optimizer) -> None:
            model(batch).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        warm_up(step)
        run = captured(step) if is_captured else step
        for rate in (1e-2, 3e-3, 1e-3):
            lr.fill_(rate)
            run()
        torch.cuda.synchronize()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def train_on_streams(transport: Connect, streams: int, update: Any = "step") -> list[Tensor]:
    """Train branches of a model on different streams, where autograd also runs their backward and the hooks."""
    torch.manual_seed(0)
    branches = nn.ModuleList(nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256)) for _ in range(6))
    branches.to(DEVICE)
    options: Any = dict(transport=connected(transport), update=update)
    optimizer = ShardedAdamW(branches.parameters(), lr=1e-2, bucket_mb=0.3, **options)
    sides = [torch.cuda.Stream() for _ in range(streams)]
    batch = torch.randn(64, 256, device=DEVICE)
    for _ in range(6):
        main, outputs = torch.cuda.current_stream(), []
        for index, branch in enumerate(branches):
            side = sides[index % streams] if sides else main
            side.wait_stream(main)
            with torch.cuda.stream(side):
                outputs.append(branch(batch))
            main.wait_stream(side)
        torch.stack(outputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().cpu() for p in branches.parameters()]


@pytest.mark.usefixtures("slow_transfers")
@in_both_places
def test_a_step_waits_for_gradients_of_all_streams(update: str) -> None:
    expected = train_on_streams(connect, 0)
    for transport, streams in ((nccl_of_one, 0), (nccl_of_one, 3), (connect, 3)):
        for a, b in zip(train_on_streams(transport, streams, update), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def train_in_half_precision() -> tuple[float, int]:
    rank, _ = rank_and_size()
    torch.manual_seed(0)
    model = nn.Linear(64, 64).to(DEVICE)
    optimizer = ShardedAdamW(model.parameters(), lr=1e-2)
    scaler = GradScaler(DEVICE, init_scale=2.0**15, growth_interval=4)
    for step in range(8):
        batch = torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + rank)).to(DEVICE)
        with torch.autocast(DEVICE, torch.float16):
            loss = (model(batch) - batch).float().square().mean()
        scaler.scale(loss * (float("inf") if (step, rank) == (3, 0) else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    optimizer.check_in_sync()
    return scaler.get_scale(), int(optimizer.skipped_steps)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_overflow_under_autocast_is_skipped_on_all_ranks(world_size: int) -> None:
    assert set(on_ranks(world_size, train_in_half_precision)) == {(2.0**15, 1)}


def test_the_plan_equals_the_allocated_bytes() -> None:
    torch.cuda.synchronize()
    parameters = [nn.Parameter(torch.zeros(3000, 1000, device=DEVICE, dtype=torch.bfloat16)) for _ in range(8)]
    setting = Setting(precision=Precision(moments="int8"), device=DEVICE)
    before = torch.cuda.memory_allocated()
    optimizer = ShardedAdamW(parameters, precision=setting.precision)
    memory = optimizer.memory()
    assert memory == plan(parameters, setting)
    taken = torch.cuda.memory_allocated() - before
    old = sum(p.nbytes for p in parameters)  # freed
    assert taken == pytest.approx(memory.total - old, rel=0.01)


# The scenarios of the CPU's tests


@pytest.fixture(params=[(1, "collective"), (1, "nccl"), (2, "collective"), (4, "collective")], ids=str)
def ranks_and_transport(request: pytest.FixtureRequest) -> Iterator[tuple[int, str]]:
    return request.param


@pytest.mark.sweep(32)
@pytest.mark.parametrize("case", parity.FEATURES, ids=lambda case: case.id)
def test_equals_torch_in_every_feature(case: parity.Case, ranks_and_transport: tuple[int, str]) -> None:
    """torch runs on the CPU, whose results differ only by rounding."""
    world_size, transport = ranks_and_transport
    results = on_ranks(world_size, parity.train_sharded, replace(case, device=DEVICE), transport)
    expected = parity.train_torch(case, world_size)
    for result in results:
        for a, b, first in zip(result, expected, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * case.lr)
            assert torch.equal(a, first)


@pytest.mark.parametrize("master", ["split", "fp32", "none"])
@of_moments
def test_results_are_the_same_on_any_number_of_ranks(moments: str, master: str) -> None:
    dtypes = ("fp32", "bf16", "fp16")
    expected = precision.train(dtypes, moments, master, 32.0, device=DEVICE)
    for world_size in (2, 4):
        for result in on_ranks(world_size, precision.train, dtypes, moments, master, 0.003, 0, None, DEVICE):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_split_masters_equal_fp32_masters_bit_for_bit() -> None:
    split, whole = (precision.train(("bf16",), "fp32", m, 32.0, device=DEVICE) for m in ("split", "fp32"))
    assert all(torch.equal(a, b) for a, b in zip(split, whole, strict=True))


@pytest.mark.parametrize("format", [(torch.float32, "fp32", "auto"), (torch.bfloat16, "int8", "split")], ids=str)
@pytest.mark.parametrize(
    ("n", "m", "devices"), [(1, 2, (DEVICE, DEVICE)), (4, 1, (DEVICE, "cpu")), (2, 4, ("cpu", DEVICE))]
)
def test_checkpoints_reshard_and_change_devices(
    tmp_path: Path, n: int, m: int, devices: tuple[str, str], format: Any
) -> None:
    saved = on_ranks(n, checkpoints.save_run, str(tmp_path), format, 0.05, 257, False, devices[0])[0]
    for loaded in on_ranks(m, checkpoints.load_run, str(tmp_path), format, 0.01, 257, devices[1]):
        assert differences(saved, loaded) == []


@pytest.mark.usefixtures("slow_transfers")
@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
@pytest.mark.parametrize(("world_size", "transport"), [(1, "nccl"), (2, "collective"), (4, "collective")])
def test_overlap_changes_nothing(world_size: int, transport: str, gradient_sync: str) -> None:
    def run(overlapped: bool) -> list[Any]:
        options = (False, 12, DEVICE)
        return on_ranks(world_size, overlap.train, transport, gradient_sync, torch.float32, overlapped, *options)

    for one, other in zip(run(False), run(True), strict=True):
        assert max(one["pending"]) == 0 and min(other["pending"]) > 5
        for a, b in zip(one["tensors"], other["tensors"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def find_a_changed_bit() -> list[str]:
    rank, _ = rank_and_size()
    torch.manual_seed(0)
    model = nn.Linear(300, 100).to(DEVICE)
    optimizer = ShardedAdamW(model.named_parameters())
    optimizer.check_in_sync()
    if rank == 1:
        with torch.no_grad():
            model.weight.view(torch.int32)[7, 9] ^= 1
    try:
        optimizer.check_in_sync()
    except RuntimeError as error:
        return [str(error)]
    return []


def test_a_changed_bit_is_found() -> None:
    for (message,) in on_ranks(2, find_a_changed_bit):
        assert "parameter 'weight': rank 1 differs from rank 0." in message


@pytest.mark.parametrize("what", step_sync.DISAGREEMENTS)
def test_a_step_on_which_ranks_disagree_is_not_taken_and_raises_at_the_next(what: str, tmp_path: Path) -> None:
    for found in on_ranks(2, step_sync.disagree, what, "backward", str(tmp_path), "step", DEVICE):
        assert found["unchanged"] and found["skipped"] == 1 and found["went on"]
        assert found["first"].startswith(step_sync.DISAGREEMENTS[what].format(others="rank 0"))
