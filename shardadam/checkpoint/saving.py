# SPDX-License-Identifier: Apache-2.0
"""``save``: every rank writes its own shards to a file of its own, and rank 0 publishes them together."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from shardadam.checkpoint.contents import (
    PARAM_GROUPS,
    SCHEDULER,
    Contents,
    contents_of,
    random_state,
    spec_of,
    state_specs,
)
from shardadam.checkpoint.directory import (
    create_unpublished,
    discard_unpublished,
    publish,
    remove_older,
    unpublished_path,
)
from shardadam.checkpoint.files import (
    MANIFEST,
    CheckpointError,
    PartWriter,
    TensorSpec,
    index_from_json,
    index_to_json,
    manifest_text,
    merge,
    safely_pickled,
    write_durably,
)
from shardadam.engine.storage import ShardedParam, is_dense, memory_order
from shardadam.layout import ALIGNMENT_NUMEL, ITEM_BYTES, cut
from shardadam.optimizer import ShardedAdam
from shardadam.ranks.store_barrier import StoreBarrier
from shardadam.state.local import local_state, spans_of
from shardadam.transport.groups import store_barrier_of
from shardadam.update import formats, reference
from shardadam.version import __version__


@dataclass(frozen=True, slots=True)
class PendingWrite:
    """Elements from ``start`` on of a stored tensor; ``read`` gives them, 1-D and in memory order, where they lie."""

    key: str
    spec: TensorSpec
    start: int
    read: Callable[[], Tensor]


@dataclass(slots=True)
class Part:
    """What one rank writes, with all there is to know of the checkpoint as a whole."""

    specs: dict[str, TensorSpec] = field(default_factory=dict)
    writes: list[PendingWrite] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    extra: Any = None
    description: dict[str, Any] = field(default_factory=dict)


@overload
def save(
    directory: str | os.PathLike[str],
    *,
    step: int,
    model: nn.Module | None = None,
    optimizer: ShardedAdam | None = None,
    scheduler: Any = None,
    extra: Any = None,
    keep: int | None = None,
    asynchronous: Literal[False] = False,
    timeout_s: float = 60.0,
) -> Path: ...


@overload
def save(
    directory: str | os.PathLike[str],
    *,
    step: int,
    model: nn.Module | None = None,
    optimizer: ShardedAdam | None = None,
    scheduler: Any = None,
    extra: Any = None,
    keep: int | None = None,
    asynchronous: Literal[True],
    timeout_s: float = 60.0,
) -> Future[Path]: ...


def save(
    directory: str | os.PathLike[str],
    *,
    step: int,
    model: nn.Module | None = None,
    optimizer: ShardedAdam | None = None,
    scheduler: Any = None,
    extra: Any = None,
    keep: int | None = None,
    asynchronous: bool = False,
    timeout_s: float = 60.0,
) -> Path | Future[Path]:
    """Writes a checkpoint of step ``step`` into ``directory``, from which ``load`` resumes on any number of ranks.

    Collective: all ranks of the optimizer's process group (without an optimizer: of the default group) must call it.
    The checkpoint appears at once and whole, or not at all; a crash at any moment leaves the ones before. Each rank
    writes its 1/N of everything that is sharded or equal on all ranks; of the model's buffers, rank 0's are saved.
    Gradients are not saved: save between steps.

    Args:
        directory: made if need be; all ranks must see the same one (a shared file system).
        step: how many steps have been taken; names the checkpoint.
        model: its ``state_dict()`` is saved.
        optimizer: moments, masters, steps and hyperparameters.
        scheduler: anything with ``state_dict()``, the same on all ranks.
        extra: of this rank, anything ``json.dumps`` takes: its position in the data, for example.
        keep: how many checkpoints stay in ``directory``; None: all.
        asynchronous: return as soon as everything has been copied into memory of the CPU, and write while training goes
            on. The next call of ``save`` or ``load`` waits for it, and raises what it failed with. The copy is as
            large as this rank's part, and its memory is kept for the next time.
        timeout_s: how long to wait, in seconds, for ranks that give no sign of life.

    Returns:
        The directory of the checkpoint, or a future of it.

    Raises:
        TimeoutError: names ranks that have not called it, or that died in it.
        CheckpointError: it could not be written, on any rank; the checkpoints before it are as they were.
        RuntimeError: a step has been broken off on a rank while it wrote.

    The states of torch's, Python's and NumPy's random number generators are saved on each rank, too.
    """
    wait_for_background_save()
    directory = Path(directory).absolute()
    store_barrier = store_barrier_for(optimizer)
    part: Part | None = None
    name = ""
    failure: Exception | None = None
    try:
        _check_arguments(step, keep)
        if isinstance(optimizer, ShardedAdam):
            optimizer._checkpoint_seam.before_save()
        part = _collect(contents_of(model, optimizer), store_barrier, scheduler, extra, step)
        if store_barrier.rank == 0:
            with store_barrier.heartbeat():  # it may have much to remove that a crash has left
                name = create_unpublished(directory, step)
    except Exception as error:
        failure = error
    what = f"save to {directory}"
    try:
        arrival = {"step": step, "name": name}
        answers = exchange(store_barrier, failure, arrival, call="save", phase=ARRIVAL, what=what, timeout_s=timeout_s)
        steps = sorted({answer["step"] for answer in answers})
        if len(steps) > 1:
            raise CheckpointError(f"{what}: ranks disagree on the step, found {steps}.")
    except BaseException:
        if name:
            discard_unpublished(directory, name)
        raise
    name = answers[0]["name"]
    assert part is not None
    if not asynchronous:
        return _write(directory, name, part, store_barrier, keep=keep, timeout_s=timeout_s)
    staged: Part | Exception
    try:
        staged = _staged(part)
    except Exception as error:  # no memory, probably; the others learn it from the thread
        staged = error
    return _in_background(lambda: _write(directory, name, staged, store_barrier, keep=keep, timeout_s=timeout_s))


def store_barrier_for(optimizer: ShardedAdam | None) -> StoreBarrier:
    if isinstance(optimizer, ShardedAdam):
        return optimizer._checkpoint_seam.store_barrier
    return store_barrier_of(None) or StoreBarrier(None, 0, [0])


def _check_arguments(step: int, keep: int | None) -> None:
    if type(step) is not int or step < 0:
        raise ValueError(f"step: found {step!r}, expected a whole number of 0 or more")
    if keep is not None and (type(keep) is not int or keep < 1):
        raise ValueError(f"keep: found {keep!r}, expected None or a whole number of 1 or more")


ARRIVAL = "arrival"
"""The phase that a call begins with."""


def exchange(
    store_barrier: StoreBarrier,
    failure: Exception | None,
    value: Any = None,
    *,
    call: str,
    phase: str,
    what: str,
    timeout_s: float,
    is_last: bool = False,
) -> list[Any]:
    """The values of all ranks. Raises on all of them if any brings a failure: its own there, a CheckpointError on the
    others.

    Note: late ranks
        A rank that was given up as missing may come after all, with its word on a call that the others have left, and
        meet them at the beginning of another. It is told so and leaves; they go on waiting.

    Args:
        call, phase: what ranks are in the middle of; equal on all of them, or somebody is lost.
    """
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    mine = {"call": call, "phase": phase, "failure": message, "value": value}
    while True:
        texts = store_barrier.exchange(json.dumps(mine), what=what, timeout_s=timeout_s, linger=is_last)
        answers = [json.loads(text) for text in texts]
        phases = {answer["phase"] for answer in answers}
        calls = sorted({answer["call"] for answer in answers})
        if len(phases) == len(calls) == 1:
            break
        if phase != ARRIVAL:
            raise CheckpointError(f"{what}: this rank came so late that the others have given it up; call it again.")
        if phases == {ARRIVAL}:
            raise CheckpointError(f"{what}: ranks make different calls, found {' and '.join(calls)}.")
    if failure is not None:
        if isinstance(failure, OSError):
            raise CheckpointError(f"{what}: {failure}.") from failure
        raise failure
    for rank, answer in zip(store_barrier.ranks, answers, strict=True):
        if answer["failure"] is not None:
            raise CheckpointError(f"{what}: rank {rank} failed, so no rank goes on. There: {answer['failure']}")
    return [answer["value"] for answer in answers]


# What goes in


def _collect(contents: Contents, store_barrier: StoreBarrier, scheduler: Any, extra: Any, step: int) -> Part:
    try:
        extra = json.loads(json.dumps(extra))  # as it is now
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"extra: found something that JSON cannot hold ({error}).") from error
    rank, world_size = store_barrier.rank, len(store_barrier.ranks)
    part = Part(extra=extra)
    objects: dict[str, Any] = {f"rng.{rank}": random_state()}
    part.description = {
        "step": step,
        "world_size": world_size,
        "shardadam": __version__,
        "torch": torch.__version__,
        "aliases": contents.aliases,
    }
    optimizer = contents.optimizer
    # Replicas hold the same shards: the first of them writes.
    written = contents.owned if optimizer is None or optimizer._checkpoint_seam.is_writer else []
    for parameter in written:
        if contents.model is not None:
            _add_shards(part, parameter.value_key, spec_of(parameter.param.parameter), parameter.param)
    _add_replicated(part, contents.replicated, rank, world_size)
    for parameter in written:
        for kind, spec in state_specs(parameter.param).items():
            _add_shards(part, parameter.state_key(kind), spec, parameter.param, kind)
    if rank == 0:
        objects |= contents.objects
    if rank == 0 and scheduler is not None:
        objects[SCHEDULER] = scheduler.state_dict()
    if rank == 0 and optimizer is not None:
        objects[PARAM_GROUPS] = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in optimizer.param_groups
        ]
        part.description["optimizer"] = {
            "groups": contents.groups,
            "skipped_steps": int(optimizer.skipped_steps),
            **optimizer._checkpoint_seam.description(),
            "parameters": {parameter.name: _scalars(local_state(parameter.param)) for parameter in contents.owned},
        }
    part.objects = {key: safely_pickled(key, value) for key, value in objects.items()}  # as they are now
    return part


def _scalars(state: Mapping[str, Tensor]) -> dict[str, float | str]:
    """JSON has no infinity; a bound may be."""
    return {
        kind: float(state[kind]) if kind == "step" else float(state[kind]).hex()
        for kind in ("step", "bound")
        if kind in state
    }


def _add_shards(part: Part, key: str, spec: TensorSpec, param: ShardedParam, kind: str | None = None) -> None:
    """This rank's spans of the parameter (kind None) or of a tensor of its state."""
    part.specs[key] = spec
    unit = ALIGNMENT_NUMEL if kind in formats.SCALES else 1
    begin = 0
    for span in spans_of(param):
        # Several at a time bounds what is made anew where a remainder becomes a master, or leaves a GPU.
        for low, high in cut(span.start, span.stop, 4 * ITEM_BYTES):
            elements = slice(low - span.start + begin, high - span.start + begin)
            part.writes.append(PendingWrite(key, spec, low // unit, _reading(param, kind, low, high, elements)))
        begin += span.numel


def _reading(param: ShardedParam, kind: str | None, low: int, high: int, elements: slice) -> Callable[[], Tensor]:
    """Reads ``low : high`` of the parameter, which are ``elements`` of this rank's part of it."""

    def read() -> Tensor:
        parameter = memory_order(param.parameter.detach(), param.parameter)[low:high]
        if kind is None:
            return parameter
        state = local_state(param)
        if kind in formats.SCALES:
            return state[kind][elements.start // ALIGNMENT_NUMEL : -(-elements.stop // ALIGNMENT_NUMEL)]
        if kind == "master" and "remainder" in state:
            return reference.join(parameter, state["remainder"][elements])
        return state[kind][elements]

    return read


def _add_replicated(part: Part, tensors: Mapping[str, Tensor], rank: int, world_size: int) -> None:
    """Ranks take turns at parameters, which are the same on all of them. Buffers may differ: rank 0's are saved."""
    turn = 0
    for key, tensor in tensors.items():
        is_parameter = isinstance(tensor, nn.Parameter)
        if rank != 0 and not is_parameter:
            continue
        repeats = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        if tensor.layout != torch.strided or tensor.device.type == "meta" or repeats:
            found = "an expanded tensor" if repeats else f"{tensor.layout} on {tensor.device}"
            raise CheckpointError(
                f"{key} cannot be saved: found {found}, expected an ordinary tensor. Give the module one of its own "
                "(clone()), or register the buffer with persistent=False."
            )
        spec = part.specs[key] = spec_of(tensor)
        every = 4 * (ITEM_BYTES // spec.dtype.itemsize) if is_dense(tensor) else max(1, spec.numel)
        for low, high in cut(0, spec.numel, every):
            if rank == (turn % world_size if is_parameter else 0):
                part.writes.append(PendingWrite(key, spec, low, _reading_whole(tensor, spec, low, high)))
            turn += int(is_parameter)


def _reading_whole(tensor: Tensor, spec: TensorSpec, low: int, high: int) -> Callable[[], Tensor]:
    return lambda: tensor.detach().permute(spec.order).reshape(-1)[low:high].resolve_conj().resolve_neg()


_staging: dict[tuple[str, int], Tensor] = {}
"""What the last asynchronous save was copied into: memory that is mapped already takes a copy twice as fast."""


@torch.no_grad()
def _staged(part: Part) -> Part:
    """The same with everything copied into memory of its own on the CPU. One at a time."""
    writes, used = [], set()
    for write in part.writes:
        flat, key = write.read(), (write.key, write.start)
        copied = _staging.get(key)
        if copied is None or (copied.dtype, copied.shape) != (flat.dtype, flat.shape):
            copied = _staging[key] = torch.empty_like(flat, device="cpu")
        copied.copy_(flat)
        used.add(key)
        writes.append(replace(write, read=partial(_itself, copied)))
    for key in _staging.keys() - used:
        del _staging[key]
    return replace(part, writes=writes)


def _itself(flat: Tensor) -> Tensor:
    return flat


# Writing


@torch.no_grad()
def _write(
    directory: Path,
    name: str,
    part: Part | Exception,
    store_barrier: StoreBarrier,
    *,
    keep: int | None,
    timeout_s: float,
) -> Path:
    """Collective, in whatever thread."""
    unpublished = unpublished_path(directory, name)

    def agree(failure: Exception | None, phase: str, *, is_last: bool = False) -> None:
        what = f"save to {directory / name}"
        exchange(store_barrier, failure, call=name, phase=phase, what=what, timeout_s=timeout_s, is_last=is_last)

    try:
        failure: Exception | None = None
        try:
            if isinstance(part, Exception):
                raise part
            with store_barrier.heartbeat():
                _write_part(unpublished, part, store_barrier.rank)
        except Exception as error:
            failure = error
        agree(failure, "written")
        try:
            if store_barrier.rank == 0:
                assert isinstance(part, Part)
                with store_barrier.heartbeat():
                    _write_manifest(unpublished, part, len(store_barrier.ranks))
                    publish(directory, name)
        except Exception as error:
            failure = error
        agree(failure, "published", is_last=True)
    except BaseException:
        if store_barrier.rank == 0:
            discard_unpublished(directory, name)
        raise
    if store_barrier.rank == 0 and keep is not None:
        try:
            remove_older(directory, keep)
        except OSError as error:
            warnings.warn(f"Older checkpoints than {directory / name} could not be removed: {error}", stacklevel=1)
    return directory / name


def _part_name(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _write_part(unpublished: Path, part: Part, rank: int) -> None:
    writer = PartWriter(unpublished, rank)
    try:
        for key, spec in part.specs.items():
            writer.add_tensor(key, spec)
        for write in part.writes:
            writer.write(write.key, write.spec, write.start, write.read().cpu().contiguous())
        for key, value in part.objects.items():
            writer.write_object(key, value)
        index = writer.close()
    finally:
        writer.abandon()
    content = {"index": index_to_json(index), "extra": part.extra}
    (unpublished / _part_name(rank)).write_text(json.dumps(content, separators=(",", ":")))


def _write_manifest(unpublished: Path, part: Part, world_size: int) -> None:
    indices, extras = [], []
    for rank in range(world_size):
        path = unpublished / _part_name(rank)
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise CheckpointError(
                f"Rank 0 does not see {path}, which rank {rank} has written. Save to a directory that all hosts share."
            ) from error
        indices.append(index_from_json(found["index"]))
        extras.append(found["extra"])
    content = {**part.description, "extras": extras, "index": index_to_json(merge(indices))}
    write_durably(unpublished / MANIFEST, manifest_text(content))
    for rank in range(world_size):
        (unpublished / _part_name(rank)).unlink()


# In the background


_running: tuple[threading.Thread, Future[Path]] | None = None


def _in_background(work: Callable[[], Path]) -> Future[Path]:
    global _running
    future: Future[Path] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="shardadam.save")
    _running = (thread, future)
    thread.start()
    return future


def wait_for_background_save() -> None:
    """Waits for a save in the background, and raises what it failed with, once."""
    global _running
    if _running is not None:
        thread, future = _running
        thread.join()
        _running = None
        error = future.exception()
        if error is not None:
            raise CheckpointError(f"The save in the background before this call has failed: {error}") from error
