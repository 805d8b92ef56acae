# SPDX-License-Identifier: Apache-2.0
"""``memory()`` counts what is allocated, state is 1/N, and full gradients never exist all at once."""

from __future__ import annotations

import gc
import io
import itertools
import time
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from shardadam import Memory, Precision, ShardedAdamW
from shardadam.engine.reduction import LocalReducer, StepReducer
from shardadam.engine.reduction.staging import StagingPool
from shardadam.transport import SharedMemoryTransport
from tests.ranks import on_ranks, rank_and_size

DTYPES = {
    "fp32": [torch.float32],
    "bf16": [torch.bfloat16],
    "mixed": [torch.float32, torch.bfloat16, torch.float64, torch.float16],
}
SHAPES = ((300, 40), (129,), (), (0,), (64, 64), (1,), (7, 15))


def build_parameters(kind: str) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for dtype in DTYPES[kind] for shape in SHAPES]


def backward(parameters: list[nn.Parameter]) -> None:
    sum((parameter.float() ** 2).sum() for parameter in parameters).backward()  # type: ignore[union-attr]


def is_tensor(obj: object) -> bool:
    """Whether it is a tensor with memory. torch's caches keep FakeTensors of other tests."""
    return issubclass(type(obj), Tensor) and not isinstance(obj, FakeTensor) and obj.layout == torch.strided


def live_tensors() -> list[Tensor]:
    return [obj for obj in gc.get_objects() if is_tensor(obj)]


def stretch(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def storages(tensors: list[Tensor]) -> set[tuple[int, int]]:
    """Return the address ranges of the storages of ``tensors``; a range inside another counts once."""
    found: set[tuple[int, int]] = set()
    for start, stop in sorted({stretch(tensor) for tensor in tensors}, key=lambda s: (s[0], -s[1])):
        if start < stop and not any(low <= start and stop <= high for low, high in found):
            found.add((start, stop))
    return found


def size(stretches: set[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in stretches)


def count(optimizer: ShardedAdamW, parameters: list[nn.Parameter], others: list[Tensor]) -> dict[str, int]:
    """Return the bytes by kind of all live storages, without those of ``others`` and ``p.grad``."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    live = storages(live_tensors()) - storages(others) - storages(gradients)
    flat = {
        (low, high)
        for low, high in live
        if any(low <= parameter.data_ptr() < high for parameter in parameters if parameter.numel() > 0)
    }
    states = [optimizer.state[parameter] for parameter in parameters]
    moments = storages([state[name] for state in states for name in ("exp_avg", "exp_avg_sq")])
    master = storages([state["master"] for state in states if "master" in state])
    counters = [arena.counters for arena in optimizer._engine.parameters.arenas]
    scalars = storages([flat for of_arena in counters for flat in (of_arena.steps, of_arena.bounds)])
    tables = storages(
        [flat for of_arena in counters for flat in (of_arena.param_ids, of_arena.first_blocks, of_arena.numels)]
    )
    arenas = optimizer._engine.parameters.arenas
    of_kernels = [table for arena in arenas for table in (arena.blocks, arena.positions, arena.squares)]
    tables |= storages([table for table in of_kernels if table is not None])
    tables |= storages([held for arena in arenas for held in vars(arena.update).values() if is_tensor(held)])
    reducer = optimizer._engine.reducer
    views = storages(list(reducer._bucket_views._flats.values())) if isinstance(reducer, StepReducer) else set()
    all_stats = list(reducer._grad_stats.values())
    if isinstance(reducer, LocalReducer):
        taken = [held for of_arena in reducer._gradients.values() for held in of_arena if held is not None]
        views = storages(taken) - storages(gradients)
        all_stats += reducer._arena_stats.values()
    grad_stats = [t for stats in all_stats for t in (*stats.flags, *stats.sums_of_squares)]
    # memory() does not count skipped_steps, the statistics of each bucket, which parameters took the last step (a byte
    # each), the board of 64 KiB for small all-reduces, and memory of peers.
    known = [flat, views, moments, master, scalars, tables, storages([optimizer.skipped_steps])]
    assert all(kind <= live for kind in known)
    last_steps = [held for last in optimizer._engine.updater.last.values() for held in (last.found_inf, last.used)]
    known.append(storages([*mapped(optimizer), *grad_stats, *last_steps]))
    rest = live - set().union(*known)
    return {
        "parameters": size(flat),
        "gradients": size(views),
        "moments": size(moments),
        "master": size(master),
        "scalars": size(scalars),
        "tables": size(tables),
        "gradient_shard and staging": size(rest),
        **dict.fromkeys(("average", "offload_buffers", "on_host", "on_disk"), 0),
        "adamw": optimizer.memory().adamw,  # see test_adamws_state_is_what_adamw_holds
    }


def mapped(optimizer: ShardedAdamW) -> list[Tensor]:
    """Return the memory of peers that this rank maps, and the board for small all-reduces."""
    transport = optimizer._engine.transport
    if not isinstance(transport, SharedMemoryTransport):
        return []
    shared = [t for buffers in transport._shared.values() for rank, t in buffers.items() if rank != transport.rank]
    board = [] if transport._all_reduce_buffer is None else [transport._all_reduce_buffer]
    return [*shared, *transport._staging.values(), *board]


def reported(optimizer: ShardedAdamW) -> dict[str, int]:
    memory = asdict(optimizer.memory())
    memory["gradient_shard and staging"] = memory.pop("gradient_shard") + memory.pop("staging")
    return memory


def measure(kind: str, gradient_sync: str, bucket_mb: float) -> list[dict[str, Any]]:
    """Return the reported and the counted bytes when built, after backward and after step."""
    gc.collect()
    parameters = build_parameters(kind)
    others = [tensor for tensor in live_tensors() if not any(tensor is parameter for parameter in parameters)]
    optimizer = ShardedAdamW(parameters, bucket_mb=bucket_mb, gradient_sync=gradient_sync)  # type: ignore[arg-type]

    def facts() -> dict[str, Any]:
        # Gloo's threads release buffers a little after the wait has returned.
        for _ in range(100):
            if reported(optimizer) == count(optimizer, parameters, others):
                break
            time.sleep(0.01)
        return {
            "memory": optimizer.memory(),
            "reported": reported(optimizer),
            "counted": count(optimizer, parameters, others),
        }

    result = [facts()]
    backward(parameters)
    result.append(facts())
    optimizer.step()
    result.append(facts())
    return result


@pytest.mark.sweep(5)
@pytest.mark.parametrize(
    ("world_size", "kind", "gradient_sync"),
    [
        *itertools.product([1], DTYPES, ["backward", "step", "external"]),
        *itertools.product([2, 4], DTYPES, ["backward"]),
        *itertools.product([2], ["mixed"], ["step", "external"]),
    ],
)
def test_memory_counts_the_bytes_of_all_live_tensors(kind: str, gradient_sync: str, world_size: int) -> None:
    for moments_in_time in on_ranks(world_size, measure, kind, gradient_sync, 0.01):
        for facts in moments_in_time:
            assert facts["reported"] == facts["counted"]
            memory = facts["memory"]
            # Over shared memory with "step", p.grad is a bucket view in the transport's memory, where that is possible.
            exposes = world_size > 1 and gradient_sync == "step"
            is_local = world_size == 1 or gradient_sync == "external"
            assert (memory.gradients > 0) == (
                exposes or (facts is moments_in_time[1] and gradient_sync == "backward" and is_local)
            )
            assert memory.gradient_shard * 2 == (0 if exposes or is_local else memory.moments)
            assert memory.state == memory.moments + memory.master + memory.scalars
            assert (
                memory.total
                == memory.state
                + memory.parameters
                + memory.gradients
                + memory.gradient_shard
                + memory.staging
                + memory.tables
            )
            assert (memory.master > 0) == (kind != "fp32")
        built, after_backward, after_step = (facts["memory"] for facts in moments_in_time)
        if exposes:
            assert built.gradients == built.parameters
        assert built.staging == after_step.staging <= after_backward.staging
        assert (built.staging > 0) == (not is_local and not exposes)


# State


def state_of_a_model(dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the elements of a decoder-like model, and its bytes of state and of parameters on this rank."""
    width = 192
    matrices = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    layer = [*matrices, (3 * width,), (4 * width,), (width,)]
    shapes = [(256, width), *4 * layer, (width,)]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    memory = ShardedAdamW(parameters).memory()
    return sum(parameter.numel() for parameter in parameters), memory.state, memory.parameters


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 8), (torch.bfloat16, 10), (torch.float64, 16)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_state_is_one_nth_plus_less_than_a_percent_of_padding(
    world_size: int, dtype: torch.dtype, bytes_each: int
) -> None:
    for numel, state, parameters in on_ranks(world_size, state_of_a_model, dtype):
        assert 1_500_000 < numel < 2_500_000
        assert 1.0 <= state / (bytes_each * numel / world_size) < 1.01
        assert 1.0 <= parameters / (dtype.itemsize * numel) < 1.01


# Parameters


@pytest.mark.parametrize("kind", DTYPES)
def test_parameters_alias_the_flat_buffers_but_are_saved_without_them(kind: str) -> None:
    parameters = build_parameters(kind)
    values = [parameter.detach().clone() for parameter in parameters]
    optimizer = ShardedAdamW(parameters)
    flats = storages([parameter for parameter in live_tensors() if parameter.numel() > 0])
    homes = set()
    for parameter, value in zip(parameters, values, strict=True):
        assert torch.equal(parameter, value)
        if parameter.numel() == 0:
            continue
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        (home,) = ((low, high) for low, high in flats if low <= parameter.data_ptr() < high)
        assert home[0] <= parameter.data_ptr() and parameter.data_ptr() + parameter.nbytes <= home[1]
        homes.add(home)
        saved = io.BytesIO()
        torch.save(parameter, saved)
        assert saved.tell() < parameter.nbytes + 4096
    assert len(homes) == len(DTYPES[kind])
    assert size(homes) == optimizer.memory().parameters


# Gradients

LAYERS, WIDTH = 16, 64
LAYER_BYTES = (WIDTH * WIDTH + WIDTH) * 4
BUCKET_MB = 2.2 * LAYER_BYTES / 2**20


def train_and_record_bytes(gradient_sync: str) -> dict[str, Any]:
    """Return the bytes of gradients and staging at every gradient of a second backward, and of gradients after it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)))
    parameters = list(model.parameters())
    recorded: list[tuple[int, int]] = []

    def gradient_bytes() -> int:
        return sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)

    def record(_: Tensor) -> None:
        recorded.append((gradient_bytes(), optimizer.memory().staging))

    for parameter in parameters:  # before the optimizer's hooks, which free gradients
        parameter.register_post_accumulate_grad_hook(record)
    optimizer = ShardedAdamW(parameters, gradient_sync=gradient_sync, bucket_mb=BUCKET_MB)  # type: ignore[arg-type]
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(record)
    for _ in range(2):
        recorded.clear()
        model(torch.randn(4, WIDTH)).square().mean().backward()
        after_backward = gradient_bytes()
        optimizer.step()
        after_step = gradient_bytes()
        optimizer.zero_grad()
    return {
        "gradients": [gradients for gradients, _ in recorded],
        "staging": [staging for _, staging in recorded],
        "after backward": after_backward,
        "after step": after_step,
        "all": sum(parameter.nbytes for parameter in parameters),
    }


def test_gradients_leave_p_grad_one_by_one_on_one_rank() -> None:
    """They are not copied: the optimizer holds them until the step."""
    recorded = train_and_record_bytes("backward")
    assert len(recorded["gradients"]) == 2 * 2 * LAYERS
    assert 0 < max(recorded["gradients"]) <= WIDTH * WIDTH * 4
    assert max(recorded["staging"]) == 0
    assert (recorded["after backward"], recorded["after step"]) == (0, 0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_full_gradients_never_exist_at_once_on_several_ranks(world_size: int) -> None:
    for recorded in on_ranks(world_size, train_and_record_bytes, "backward"):
        assert recorded["all"] >= 8 * 2 * LAYER_BYTES
        # Staging may grow while a peer is late; gradients are freed as soon as their bucket is complete.
        assert 0 < max(recorded["gradients"]) <= 2 * LAYER_BYTES + LAYER_BYTES
        assert (recorded["after backward"], recorded["after step"]) == (0, 0)


@pytest.mark.parametrize("gradient_sync", ["step", "external"])
def test_gradients_stay_in_p_grad_in_the_other_modes(gradient_sync: str) -> None:
    recorded = train_and_record_bytes(gradient_sync)
    assert recorded["after backward"] == recorded["after step"] == max(recorded["gradients"]) == recorded["all"]


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_between_steps_staging_is_at_most_two_buffers(world_size: int, gradient_sync: str) -> None:
    for staging, buffer in on_ranks(world_size, staging_after_steps, gradient_sync):
        assert staging <= 2 * buffer
        assert (staging == 0) == (gradient_sync == "step" or world_size == 1)  # peers read p.grad in place


def staging_after_steps(gradient_sync: str) -> tuple[int, int]:
    parameters = [nn.Parameter(torch.ones(256)) for _ in range(12)]
    optimizer = ShardedAdamW(parameters, gradient_sync=gradient_sync, bucket_mb=1024 / 2**20)  # type: ignore[arg-type]
    for _ in range(3):
        backward(parameters)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.memory().staging, 1024


# A peer that is a little late


def staging_beside_a_late_peer(transport: str, late_s: float) -> int:
    """Return the number of staging buffers at the end of backward, which rank 1 begins ``late_s`` later."""
    rank, _ = rank_and_size()
    parameters = [nn.Parameter(torch.ones(512)) for _ in range(12)]
    optimizer = ShardedAdamW(parameters, bucket_mb=2048 / 2**20, transport=transport)
    loss = sum(p.square().sum() for p in parameters)
    dist.barrier()
    if rank == 1:
        time.sleep(late_s)
    loss.backward()
    room = optimizer._engine.reducer._pool
    buffers = len(list(room.buffers()))
    optimizer.step()
    return buffers


@pytest.mark.parametrize("transport", ["collective", "shared_memory"])
def test_staging_does_not_grow_while_a_peer_is_only_a_little_late(transport: str) -> None:
    assert on_ranks(2, staging_beside_a_late_peer, transport, StagingPool.PATIENCE_S / 2)[0] == 2
    assert on_ranks(2, staging_beside_a_late_peer, transport, StagingPool.PATIENCE_S * 3)[0] > 2


# What it prints


def printed(kind: str) -> tuple[Any, str, int]:
    """``memory()``, its text, and the bytes of the state of torch's AdamW for the same parameters."""
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    precision = Precision(master={"fp32": "auto", "split": "split", "none": "none"}[kind])
    shapes = [(64, 48), (48,), (7, 3)]
    like = [torch.ones(shape, dtype=torch.float32 if kind == "split" else dtype) for shape in shapes]
    theirs = [nn.Parameter(one) for one in like]
    adamw = torch.optim.AdamW(theirs)
    for parameter in theirs:
        parameter.grad = torch.ones_like(parameter)
    adamw.step()
    held = sum(value.nbytes for state in adamw.state.values() for value in state.values())
    copies = sum(parameter.nbytes for parameter in theirs) if kind == "split" else 0
    optimizer = ShardedAdamW([nn.Parameter(one.to(dtype)) for one in like], precision=precision)
    return optimizer.memory(), str(optimizer.memory()), held + copies


@pytest.mark.parametrize("kind", ["fp32", "split", "none"])
def test_adamws_state_is_what_adamw_holds(kind: str) -> None:
    for memory, text, held in on_ranks(2, printed, kind):
        assert memory.adamw == held
        assert memory.saved == held - memory.moments - memory.master - memory.scalars
        lines = dict(line.split("  ", 1) for line in text.splitlines()[1:])
        numbers = {name: int(value.split("(")[0].replace(",", "")) for name, value in lines.items()}
        assert numbers.pop("AdamW's state") == held
        assert numbers.pop("state saved") == memory.saved
        assert numbers.pop("state and its buffers") == memory.state + memory.offload_buffers - memory.average
        assert numbers.pop("total") == memory.total == sum(numbers.values())
        assert all(getattr(memory, name.replace(" ", "_")) == value for name, value in numbers.items())


def test_memory_prints_a_table() -> None:
    memory = Memory(
        parameters=4000, gradients=0, gradient_shard=2000, staging=0, moments=4000, master=0, average=1000,
        offload_buffers=0, scalars=24, tables=112, on_host=0, on_disk=500, adamw=8012,
    )  # fmt: skip
    assert (
        str(memory)
        == """\
bytes on this rank
parameters              4,000
gradient shard          2,000
moments                 4,000
average                 1,000
scalars                    24
tables                    112
total                  11,136
on disk                   500
state and its buffers   4,024
AdamW's state           8,012
state saved             3,988  (49.8%)"""
    )
