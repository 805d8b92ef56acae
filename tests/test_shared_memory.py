# SPDX-License-Identifier: Apache-2.0
"""Training over shared memory equals training over Gloo bit for bit, and each rank's parameters stay its own."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import io
import mmap
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardadam import GradScaler, Precision, ShardedAdamW
from shardadam import transport as transports
from shardadam.engine.reduction.staging import StagingPool
from shardadam.transport import SharedMemoryTransport, shared_memory, unix_sockets
from tests import test_hybrid, test_parity
from tests.parity import build_parameters, clones, quadratic
from tests.ranks import on_ranks, rank_and_size

DEADLINE_S = 20.0
BUCKET_MB = 0.001


def build(parameters: Sequence[Tensor] | None = None, **options: Any) -> ShardedAdamW:
    options = {"lr": 1e-2, "bucket_mb": BUCKET_MB, **options}
    return ShardedAdamW(build_parameters() if parameters is None else parameters, **options)


def train(optimizer: ShardedAdamW, steps: Sequence[int]) -> list[Tensor]:
    rank, _ = rank_and_size()
    parameters = optimizer.param_groups[0]["params"]
    for step in steps:
        quadratic(parameters, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return clones(parameters)


def transport_of(optimizer: ShardedAdamW) -> SharedMemoryTransport:
    assert isinstance(optimizer._engine.transport, SharedMemoryTransport)
    return optimizer._engine.transport


# Which transport


@contextmanager
def broken(what: str) -> Iterator[None]:
    """Context manager: make something fail on this rank that shared memory needs."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError("broken on purpose")

    with pytest.MonkeyPatch.context() as patch:
        if what == "host":
            patch.setattr(unix_sockets, "host_identity", lambda: "elsewhere")
        elif what in ("bind", "connect"):
            patch.setattr(socket.socket, what, fail)
        elif what == "map":
            patch.setattr(mmap, "mmap", fail)
        elif what == "memfd":
            patch.delattr(os, "memfd_create")
        elif what == "user":
            patch.setattr(unix_sockets, "_credentials", lambda connection: (os.getpid(), os.geteuid() + 1, 0))
        yield


REASONS = {
    "host": "the ranks are not on one host",
    "bind": "rank 1: broken on purpose",
    "connect": "rank 1 cannot connect: broken on purpose",
    "map": "rank 1: broken on purpose",
    "memfd": "rank 1: this system has no memfd_create",
    "user": f"rank 1 cannot connect: the other end belongs to user {os.geteuid() + 1}, expected {os.geteuid()}",
}


def try_to_build(what: str, transport: str) -> tuple[str, str]:
    rank, _ = rank_and_size()
    with pytest.MonkeyPatch.context() as patch, broken(what) if rank == 1 else nullcontext():
        patch.setattr(unix_sockets, "_CONNECT_TIMEOUT_S", 0.5)  # the others wait so long for rank 1
        try:
            optimizer = build(transport=transport)
            found = (type(optimizer._engine.transport).__name__, "")
            train(optimizer, range(2))
        except RuntimeError as error:
            found = ("RuntimeError", str(error))
    return found


def build_where_it_is_impossible(what: str) -> tuple[str, tuple[str, str], str]:
    found = try_to_build(what, "auto")[0], try_to_build(what, "shared_memory")
    optimizer = build()
    train(optimizer, range(2))  # the failed attempts have left nothing behind
    return (*found, type(optimizer._engine.transport).__name__)


@pytest.mark.parametrize("what", list(REASONS))
def test_all_ranks_fall_back_or_raise_one_reason_if_one_cannot_share(what: str) -> None:
    results = on_ranks(3, build_where_it_is_impossible, what, deadline_s=DEADLINE_S)
    assert len(set(results)) == 1, results
    fallback, (kind, message), later = results[0]
    assert fallback == "GlooTransport" and later == "SharedMemoryTransport"
    assert kind == "RuntimeError" and REASONS[what] in message and '"auto"' in message


def build_collective() -> str:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("connected")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transports, "connect_sockets", refuse)
        optimizer = build(transport="collective")
        train(optimizer, range(2))
        return type(optimizer._engine.transport).__name__


def test_collective_never_connects_sockets() -> None:
    assert on_ranks(2, build_collective) == ["GlooTransport"] * 2


def build_unlike(kinds: Sequence[str]) -> str:
    rank, _ = rank_and_size()
    with pytest.raises(ValueError) as raised:
        build(transport=kinds[rank])
    train(build(), range(2))
    return str(raised.value)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kinds", list(combinations(("auto", "collective", "shared_memory"), 2)), ids="-".join)
@pytest.mark.parametrize("swapped", [False, True])
def test_ranks_with_different_transports_raise(kinds: tuple[str, ...], swapped: bool) -> None:
    one, other = reversed(kinds) if swapped else kinds
    results = on_ranks(3, build_unlike, (one, other, one), deadline_s=DEADLINE_S)
    expected = f"Ranks disagree on the optimizer: transport {one!r} on ranks 0, 2, {other!r} on rank 1."
    assert all(result.startswith(expected) for result in results)


# The same bits


@dataclass(frozen=True)
class Case:
    gradient_sync: str = "backward"
    dtype: str = "float32"
    moments: str = "fp32"
    master: str = "auto"
    clip: str = "none"  # "none" | "option" | "call"
    accumulate: int = 1
    no_sync: bool = False
    unused: str = "none"
    set_to_none: bool = True
    edit: str = "none"  # of p.grad: "none" | "scale" | "replace" | "drop"
    edit_late: bool = False  # edit after clipping, so that gradients are reduced again
    nan: bool = False
    scaler: bool = False
    full_grad: bool = False
    world_size: int = 2

    @property
    def id(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(changed) or "default"


def random_case(generator: random.Random) -> Case:
    choose = generator.choice
    gradient_sync = choose(("backward", "step", "step", "external"))
    dtype = choose(("float32", "float32", "bfloat16", "float16"))
    accumulate = choose((1, 3))
    edits = gradient_sync == "step" and generator.random() < 0.5
    return Case(
        gradient_sync=gradient_sync,
        dtype=dtype,
        moments=choose(("fp32", "int8")),
        master="auto" if dtype == "float32" else choose(("fp32", "split")),
        clip=choose(("none", "option", "call")),
        accumulate=accumulate,
        no_sync=accumulate > 1 and choose((False, True)),
        unused=choose(("none", "everywhere", "some ranks", "changing")) if accumulate == 1 else "some ranks",
        set_to_none=choose((False, True)),
        edit=choose(("scale", "replace", "drop")) if edits else "none",
        edit_late=edits and choose((False, True)),
        nan=choose((False, True)),
        scaler=choose((False, True)),
        full_grad=choose((False, True)),
        # float16 is divided before it is sent, but after the sum in bucket views: by 3 the results round differently.
        world_size=choose((2, 2, 4) if gradient_sync == "step" and dtype == "float16" else (2, 2, 3, 4)),
    )


def edit(case: Case, parameters: Sequence[Tensor], rank: int, step: int) -> None:
    for index, parameter in enumerate(parameters):
        generator = random.Random(100 * step + 10 * rank + index)
        if parameter.grad is None or generator.random() < 0.3:
            continue
        if case.edit == "scale":
            parameter.grad.mul_(generator.random())
        elif case.edit == "replace":
            parameter.grad = torch.full_like(parameter, generator.random())
        elif case.edit == "drop":
            parameter.grad = None


def run_case(case: Case, transport: str) -> dict[str, Any]:
    rank, world_size = rank_and_size()
    parity = test_parity.Case(unused=case.unused, accumulate=case.accumulate)
    dtype = getattr(torch, case.dtype)
    parameters = [nn.Parameter(p.detach().to(dtype)) for p in test_parity.build_parameters(parity)]
    optimizer = build(
        parameters,
        gradient_sync=case.gradient_sync,
        max_grad_norm=2.0 if case.clip == "option" else None,
        precision=Precision(moments=case.moments, master=case.master),  # type: ignore[arg-type]
        transport=transport,
    )
    scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=2, enabled=case.scaler)
    found: dict[str, Any] = {}
    for step in range(4):
        for micro in range(case.accumulate):
            loss = test_parity.loss_of(parity, parameters, rank, step, micro) / case.accumulate  # type: ignore[arg-type]
            if case.nan and step == 2 and rank == 1:
                loss = loss * float("nan")
            if not loss.requires_grad:
                continue
            local = case.no_sync and micro < case.accumulate - 1
            with optimizer.no_sync() if local else nullcontext():
                scaler.scale(loss).backward()
        if case.gradient_sync == "external":
            for parameter in parameters:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(gradient)
                parameter.grad = gradient.div_(world_size)
        if not case.edit_late:
            edit(case, parameters, rank, step)
        if case.clip == "call":
            if case.scaler and (case.gradient_sync == "backward" or dtype != torch.float16):
                scaler.unscale_(optimizer)
            found[f"norm {step}"] = optimizer.clip_grad_norm_(1.5)
        if case.edit_late:
            edit(case, parameters, rank, step)
        if case.full_grad:
            found[f"gradient {step}"] = optimizer.full_grad(parameters[3])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=case.set_to_none)
    found["norm"] = optimizer.grad_norm
    found["skipped"] = optimizer.skipped_steps
    found["scale"] = torch.tensor(scaler.get_scale())
    for index, parameter in enumerate(parameters):
        found[f"parameter {index}"] = parameter.detach().clone()
        found |= {f"{name} {index}": value for name, value in optimizer.full_state(parameter).items()}
    found["kind"] = type(optimizer._engine.transport).__name__
    return found


def compare_transports(case: Case) -> list[str]:
    """Return the names of the results that are not equal bit for bit."""
    ours, reference = (run_case(case, transport) for transport in ("shared_memory", "collective"))
    assert (ours.pop("kind"), reference.pop("kind")) == ("SharedMemoryTransport", "GlooTransport")
    assert ours.keys() == reference.keys()
    return [name for name, value in ours.items() if not is_same(value, reference[name])]


def is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.dtype != other.dtype or not torch.equal(one.isnan(), other.isnan()):
        return False
    return torch.equal(as_bytes(one), as_bytes(other))


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of ``tensor``, with NaNs replaced, as a NaN's sign depends on the order of a sum."""
    return tensor.detach().nan_to_num(0.0).contiguous().reshape(-1).view(torch.uint8)


FEATURES = [
    Case(),
    Case(gradient_sync="step"),
    Case(gradient_sync="step", clip="option", world_size=3),
    Case(gradient_sync="step", edit="drop", clip="call", edit_late=True, unused="changing"),
    Case(gradient_sync="step", nan=True, scaler=True, dtype="float16", master="split", accumulate=3),
    Case(gradient_sync="step", full_grad=True, clip="call", set_to_none=False, edit="replace"),
    Case(accumulate=3, no_sync=True, unused="some ranks", clip="call", full_grad=True, world_size=4),
    Case(dtype="bfloat16", master="split", moments="int8", unused="changing", world_size=3),
    Case(gradient_sync="external", clip="option"),
]
CASES = [random_case(random.Random(seed)) for seed in range(300)]


@pytest.mark.filterwarnings("ignore:.*this rank has had no gradient")  # of edit="drop"
@pytest.mark.parametrize("case", FEATURES, ids=lambda case: case.id)
def test_equals_collective_bit_for_bit_in_every_feature(case: Case) -> None:
    assert on_ranks(case.world_size, compare_transports, case, deadline_s=DEADLINE_S) == [[]] * case.world_size


@pytest.mark.sweep(4)
@pytest.mark.parametrize("seed", range(len(CASES)))
def test_equals_collective_bit_for_bit(seed: int) -> None:
    case = CASES[seed]
    assert on_ranks(case.world_size, compare_transports, case, deadline_s=DEADLINE_S) == [[]] * case.world_size, case


@pytest.mark.sweep(1)
@pytest.mark.parametrize("case", [test_hybrid.CASES[0], test_hybrid.CASES[4]], ids=lambda case: case.id)
def test_hybrid_equals_collective_bit_for_bit(case: test_parity.Case) -> None:
    ours, reference = (on_ranks(4, test_hybrid.train, case, (2, 2), kind) for kind in ("shared_memory", "collective"))
    for one, other in zip(ours, reference, strict=True):
        assert one["norms"] == other["norms"]
        assert all(torch.equal(a, b) for a, b in zip(one["parameters"], other["parameters"], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one["shard"][1], other["shard"][1], strict=True))


# Each rank's memory is its own


def swap_between_steps(gradient_sync: str, swaps: bool) -> list[Tensor]:
    """Train; rank 0 evaluates with averaged parameters after every step, and the other ranks read slowly."""
    rank, _ = rank_and_size()
    generator = random.Random(rank)
    parameters = build_parameters()
    optimizer = build(parameters, gradient_sync=gradient_sync)
    averages = clones(parameters)
    wait = shared_memory._PeerRead.wait

    def wait_slowly(transfer: Any) -> None:
        if rank > 0 and generator.random() < 0.3:
            time.sleep(0.001)
        wait(transfer)

    seen = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(shared_memory._PeerRead, "wait", wait_slowly)
        for step in range(20):
            with torch.enable_grad():
                quadratic(parameters, rank, step).backward()
            optimizer.step()
            if rank == 0 and swaps:
                backup = clones(parameters)
                torch._foreach_lerp_(averages, parameters, 0.1)
                torch._foreach_copy_(parameters, averages)
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad.fill_(1e9)
                time.sleep(generator.choice((0, 0, 0.002)))
                quadratic(parameters, 7, step)
                torch._foreach_copy_(parameters, backup)
            elif generator.random() < 0.3:
                time.sleep(0.002)
            seen += clones(parameters)
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    return seen


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_one_rank_writes_between_steps_stays_its_own(gradient_sync: str, world_size: int) -> None:
    expected = on_ranks(world_size, swap_between_steps, gradient_sync, False)[0]
    for seen in on_ranks(world_size, swap_between_steps, gradient_sync, True):
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def try_to_write() -> list[str]:
    """Try to write a peer's memory, and to resize it; return the ways that have worked."""
    received: list[tuple[int, int]] = []
    map_memory = shared_memory._map

    def keep(descriptor: int, nbytes: int, *, writable: bool) -> Tensor:
        if not writable:
            received.append((os.dup(descriptor), nbytes))
        return map_memory(descriptor, nbytes, writable=writable)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "_map", keep)
        optimizer = build(gradient_sync="step")
    before = train(optimizer, range(2))
    transport = transport_of(optimizer)
    succeeded = []

    def attempt(what: str, act: Any) -> None:
        try:
            act()
            succeeded.append(what)
        except (OSError, ValueError):
            pass

    def map_writable(descriptor: int, nbytes: int) -> None:
        mmap.mmap(descriptor, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    for descriptor, nbytes in received:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        reopened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)  # the seals still hold
        for fd in (descriptor, reopened):
            attempt("map", lambda fd=fd, nbytes=nbytes: map_writable(fd, nbytes))
            attempt("shrink", lambda fd=fd: os.ftruncate(fd, 0))
            attempt("grow", lambda fd=fd: os.ftruncate(fd, 1 << 20))
            attempt("write", lambda fd=fd: os.pwrite(fd, b"x", 0))
            os.close(fd)
    libc = ctypes.CDLL(None, use_errno=True)
    for buffers in transport._shared.values():
        for rank, memory in buffers.items():
            if rank != transport.rank:
                address, length = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes)
                if libc.mprotect(address, length, mmap.PROT_READ | mmap.PROT_WRITE) == 0:
                    succeeded.append("mprotect")
    assert received and transport._shared
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))
    return succeeded


def test_peers_memory_cannot_be_written_nor_resized() -> None:
    assert on_ranks(2, try_to_write) == [[], []]


# Tensors that outlive the optimizer, and forked children


def outlive(directory: str) -> bool:
    rank, _ = rank_and_size()
    parameters = build_parameters()
    optimizer = build(parameters, gradient_sync="step")
    train(optimizer, range(3))
    expected = clones(parameters)
    optimizer._engine.transport.close(clean=True)
    del optimizer
    gc.collect()
    dist.barrier()
    with torch.no_grad():
        for parameter in parameters:
            parameter += rank + 1
    file = io.BytesIO()
    torch.save(parameters, file)
    file.seek(0)
    loaded = torch.load(file)
    quadratic(parameters, rank, 0).backward()
    return all(torch.equal(a, b + rank + 1) for a, b in zip(loaded, expected, strict=True))


def test_parameters_live_on_without_their_optimizer() -> None:
    assert on_ranks(2, outlive, "") == [True, True]


def use_in_a_child(gradient_sync: str, forks: bool) -> tuple[str, list[Tensor]]:
    parameters = build_parameters()
    optimizer = build(parameters, gradient_sync=gradient_sync)
    train(optimizer, range(2))
    message = ""
    buffer = transport_of(optimizer)._all_reduce_buffer
    assert buffer is not None
    before = buffer.clone()
    if forks:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            message = "no error"
            try:
                optimizer.step()
            except BaseException as error:
                message = f"{type(error).__name__}: {error}"
            os.write(write_end, message.encode())
            os._exit(0)
        os.close(write_end)
        message = os.read(read_end, 4096).decode()
        os.close(read_end)
        os.waitpid(child, 0)
        assert torch.equal(buffer, before)  # the child shares its memory
    return message, train(optimizer, range(2, 5))


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
def test_step_raises_in_a_forked_child_and_its_parent_trains_on(gradient_sync: str) -> None:
    expected = on_ranks(2, use_in_a_child, gradient_sync, False)
    for (message, trained), (_, reference) in zip(
        on_ranks(2, use_in_a_child, gradient_sync, True, deadline_s=DEADLINE_S), expected, strict=True
    ):
        assert message.startswith("RuntimeError") and "not in a forked child" in message
        assert all(torch.equal(a, b) for a, b in zip(trained, reference, strict=True))


# Staging


def mappings() -> int:
    with open("/proc/self/maps") as file:
        return sum("memfd:shardadam" in line for line in file)


LATE_S = StagingPool.PATIENCE_S + 0.75


def run_late(late: int) -> dict[str, Any]:
    rank, _ = rank_and_size()
    parameters = [nn.Parameter(torch.ones(512)) for _ in range(12)]
    optimizer = build(parameters, bucket_mb=2048 / 2**20)
    transport = transport_of(optimizer)
    found: dict[str, Any] = {}
    for step in range(3):
        if step == 1 and rank == late:
            time.sleep(LATE_S)
        if step == 1:
            start = time.monotonic()
            quadratic(parameters, rank, step).backward()
            found["seconds"] = time.monotonic() - start
            found["grown"] = optimizer.memory().staging // optimizer._engine.parameters.buckets[0].parameters.nbytes
        else:
            quadratic(parameters, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        found[f"staging {step}"] = (
            optimizer.memory().staging // optimizer._engine.parameters.buckets[0].parameters.nbytes
        )
    dist.barrier()
    transport._sockets.poll()
    gc.collect()
    found["peers"] = len(transport._staging)
    found["mappings"] = mappings() - sum(len(buffers) for buffers in transport._shared.values())
    return found


@pytest.mark.parametrize("late", [0, 1])
def test_staging_grows_while_a_peer_is_late_and_shrinks_everywhere(late: int) -> None:
    before = on_ranks(2, mappings_after_collection)
    results = on_ranks(2, run_late, late, deadline_s=DEADLINE_S)
    early = results[1 - late]
    assert early["grown"] > 6 and early["seconds"] < LATE_S - 0.1, results  # it has waited for the pool's patience once
    for result, mappings_before in zip(results, before, strict=True):
        assert result["staging 1"] == 2 and result["staging 2"] == 2
        assert result["peers"] == 2
        assert result["mappings"] - mappings_before == 4  # two of this rank's own, two of the peer's


def mappings_after_collection() -> int:
    gc.collect()
    return mappings()


# Who may connect


def connect_among_strangers() -> tuple[str, list[str]]:
    connect_peers = unix_sockets._connect_peers
    strangers: list[socket.socket] = []

    def connect_after_strangers(own: int, listener: socket.socket, endpoints: Any, *rest: Any) -> Any:
        secret = endpoints[own].secret
        hellos = [None, b"", b"x", struct.pack("=I", 2) + b"0" * 16, struct.pack("=I", 99) + secret]
        for hello in [*hellos, struct.pack("=I", own) + secret] if own < 2 else []:
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stranger.connect(endpoints[own].address)
            if hello:
                stranger.send(hello)
            elif hello is None:
                stranger.close()
                continue
            strangers.append(stranger)
        time.sleep(0.2 * own)  # the strangers are first
        return connect_peers(own, listener, endpoints, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unix_sockets, "_connect_peers", connect_after_strangers)
        patch.setattr(unix_sockets, "_HELLO_TIMEOUT_S", 0.1)  # one of them sends nothing
        optimizer = build()
    train(optimizer, range(2))
    received = []
    for stranger in strangers:
        stranger.settimeout(1.0)
        try:
            received.append("" if stranger.recv(4096) == b"" else "records")
        except ConnectionResetError:
            received.append("")
        except OSError as error:
            received.append(str(error))
        stranger.close()
    return type(optimizer._engine.transport).__name__, received


def test_connections_of_strangers_are_closed_and_ranks_connect() -> None:
    for rank, (kind, received) in enumerate(on_ranks(3, connect_among_strangers, deadline_s=DEADLINE_S)):
        assert kind == "SharedMemoryTransport"
        assert received == ([""] * 5 if rank < 2 else [])


@pytest.mark.parametrize("uid", [os.geteuid(), os.geteuid() + 1])
def test_the_secret_does_not_let_another_user_connect(uid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(struct.pack("=I", 3) + b"s" * 16)
    monkeypatch.setattr(unix_sockets, "_credentials", lambda connection: (os.getpid(), uid, 0))
    with ours, theirs:
        assert unix_sockets._receive_hello(ours, b"s" * 16) == (3 if uid == os.geteuid() else None)


def names_in_use() -> dict[str, Any]:
    before = sorted(os.listdir("/dev/shm"))
    optimizer = build(gradient_sync="step")
    train(optimizer, range(2))
    with open("/proc/net/unix") as file:
        sockets = [line.split()[-1] for line in file if "shardadam" in line]
    with open("/proc/self/maps") as file:
        memory = {line.split(maxsplit=5)[-1].strip() for line in file if "shardadam" in line and ".so" not in line}
    after = sorted(os.listdir("/dev/shm"))
    dist.barrier()
    new = [name for name in after if name not in before]
    return {"sockets": sockets, "memory": memory, "new": [name for name in new if "shardadam" in name]}


def test_nothing_has_a_name_in_the_file_system() -> None:
    for found in on_ranks(2, names_in_use):
        assert found["new"] == []
        assert found["sockets"] and all(name.startswith("@shardadam-") for name in found["sockets"])
        assert found["memory"] == {"/memfd:shardadam (deleted)"}


# Different transfers


def start_different_transfers(first: str, second: str) -> str:
    optimizer = build([nn.Parameter(torch.ones(512))])
    transport = transport_of(optimizer)
    transport.all_reduce(torch.ones(1)).wait()  # allocates the buffer of all-reduces
    block = torch.full((3,), 7.0)
    starts: dict[str, Callable[[], Any]] = {
        "fence": transport.fence,
        "all-reduce": lambda: transport.all_reduce(block).wait(),
        "larger all-reduce": lambda: transport.all_reduce(torch.ones(5)).wait(),
        "all-gather": lambda: transport.all_gather(optimizer._engine.parameters.buckets[0].parameters).wait(),
    }
    try:
        starts[first if rank_and_size()[0] == 0 else second]()
        return "no error"
    except RuntimeError as error:
        assert block.tolist() == [7.0] * 3  # nothing has been read
        return str(error).partition(":")[0]


@pytest.mark.parametrize(
    ("first", "second", "descriptions"),
    [
        ("all-reduce", "fence", ("an all-reduce of 12 bytes", "a fence")),
        ("all-gather", "all-reduce", ("an all-gather of 1,024 bytes", "an all-reduce of 12 bytes")),
        ("larger all-reduce", "all-reduce", ("an all-reduce of 20 bytes", "an all-reduce of 12 bytes")),
    ],
)
def test_ranks_that_start_different_transfers_read_nothing(
    first: str, second: str, descriptions: tuple[str, str]
) -> None:
    zero, one = descriptions
    messages = on_ranks(2, start_different_transfers, first, second)
    assert messages[0] == f"Rank 1 has started {one}, but rank 0 has started {zero}"
    assert messages[1] in (
        f"Rank 0 has started {zero}, but rank 1 has started {one}",
        "In " + one.partition(" of")[0],  # rank 0 has closed its sockets first
    )


def wait_again() -> list[str]:
    """Rank 1 gathers, rank 0 trains on; return the errors of that and of the calls after it."""
    parameters = [nn.Parameter(torch.ones(512))]
    optimizer = build(parameters)
    train(optimizer, range(2))
    errors = []

    def proceed() -> None:
        parameters[0].sum().backward()
        optimizer.step()

    first = proceed if rank_and_size()[0] == 0 else optimizer.full_state_dict
    for call in (first, optimizer.zero_grad, optimizer.step):
        try:
            call()
        except Exception as error:
            errors.append(type(error).__name__)
    return errors


def test_calls_after_different_transfers_raise_the_same_error() -> None:
    """They raised KeyError where they waited for the same transfer once more."""
    assert on_ranks(2, wait_again) == [["RankDesyncError"] * 3] * 2
