# SPDX-License-Identifier: Apache-2.0
"""``save``: each rank writes its part to a file of its own, then rank 0 publishes all of them together."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from shardadam.checkpoint.background import copied_to_cpu, start_background_save, wait_for_background_save
from shardadam.checkpoint.directory import (
    create_unpublished,
    discard_unpublished,
    publish,
    remove_older,
    unpublished_path,
)
from shardadam.checkpoint.exchange import ARRIVAL, RankExchange, store_barrier_for
from shardadam.checkpoint.files import (
    MANIFEST,
    CheckpointError,
    PartWriter,
    index_to_json,
    manifest_text,
    merge,
    write_durably,
)
from shardadam.checkpoint.part import Part, collect_part
from shardadam.checkpoint.schema import index_from_json
from shardadam.optimizer import ShardedAdam
from shardadam.ranks.store_barrier import StoreBarrier


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
    The checkpoint appears at once and whole, or not at all; a crash at any moment leaves the earlier ones intact. Each
    rank writes 1/N of all tensors that are sharded or equal on all ranks. Buffers of the model are saved from rank 0.
    The states of the random number generators of torch, Python and NumPy are saved from each rank. Gradients are not
    saved: save between steps.

    Args:
        directory: created if missing; all ranks must see the same one (a shared file system).
        step: number of steps taken; names the checkpoint.
        model: its ``state_dict()`` is saved.
        optimizer: its moments, masters, steps and hyperparameters are saved.
        scheduler: any object with ``state_dict()``, equal on all ranks.
        extra: of this rank, anything ``json.dumps`` takes; its position in the data, for example.
        keep: number of checkpoints to keep in ``directory``; None: all.
        asynchronous: return when everything has been copied into memory of the CPU, and write while training continues.
            The next ``save`` or ``load`` waits for it, and raises its error. The copy is as large as this rank's part;
            its memory is kept for the next save.
        timeout_s: how long to wait for a rank that shows no sign of life, in seconds.

    Returns:
        The directory of the checkpoint, or a future of it.

    Raises:
        TimeoutError: names ranks that did not call ``save``, or died in it.
        CheckpointError: a rank could not write; earlier checkpoints are unchanged.
        RuntimeError: a step was interrupted on a rank while it wrote.
    """
    wait_for_background_save()
    directory = Path(directory).absolute()
    store_barrier = store_barrier_for(optimizer)
    exchange = RankExchange(store_barrier, call="save", what=f"save to {directory}", timeout_s=timeout_s)
    name = ""
    try:
        with exchange.phase(ARRIVAL) as arrival:
            _check_arguments(step, keep)
            if isinstance(optimizer, ShardedAdam):
                optimizer._checkpoint_seam.before_save()
            collected = collect_part(
                model,
                optimizer,
                scheduler=scheduler,
                extra=extra,
                step=step,
                rank=store_barrier.rank,
                world_size=len(store_barrier.ranks),
            )
            if store_barrier.rank == 0:
                with store_barrier.heartbeat():  # removing what crashed saves left behind may take long
                    name = create_unpublished(directory, step)
            arrival.value = {"step": step, "name": name}
        steps = sorted({answer["step"] for answer in arrival.values})
        if len(steps) > 1:
            raise CheckpointError(
                f"{exchange.what}: ranks disagree on the step, found {steps}. Pass the same step on all ranks."
            )
    except BaseException:
        if name:
            discard_unpublished(directory, name)
        raise
    name = arrival.values[0]["name"]
    if not asynchronous:
        return _write(directory, name, collected, store_barrier, keep=keep, timeout_s=timeout_s)
    part: Part | Exception
    try:
        part = copied_to_cpu(collected)
    except Exception as error:  # out of memory, for example; the thread tells the other ranks
        part = error
    return start_background_save(lambda: _write(directory, name, part, store_barrier, keep=keep, timeout_s=timeout_s))


def _check_arguments(step: int, keep: int | None) -> None:
    if type(step) is not int or step < 0:
        raise ValueError(f"step: found {step!r}, expected a whole number of 0 or more")
    if keep is not None and (type(keep) is not int or keep < 1):
        raise ValueError(f"keep: found {keep!r}, expected None or a whole number of 1 or more")


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
    """Writes and publishes a checkpoint. Collective, in any thread.

    Args:
        part: an error where this rank could not copy its part; all ranks raise then.
    """
    path, unpublished = directory / name, unpublished_path(directory, name)
    is_first, world_size = store_barrier.rank == 0, len(store_barrier.ranks)
    exchange = RankExchange(store_barrier, call=name, what=f"save to {path}", timeout_s=timeout_s)
    try:
        with exchange.phase("written"), store_barrier.heartbeat():
            if isinstance(part, Exception):
                raise part
            _write_part(unpublished, part, store_barrier.rank)
        with exchange.phase("published", is_last=True):
            if is_first:
                with store_barrier.heartbeat():
                    _write_manifest(unpublished, part.description, world_size)
                    publish(directory, name)
    except BaseException:
        if is_first:
            discard_unpublished(directory, name)
        raise
    if is_first and keep is not None:
        try:
            remove_older(directory, keep)
        except OSError as error:
            warnings.warn(f"Checkpoints older than {path} could not be removed: {error}", stacklevel=1)
    return path


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


def _write_manifest(unpublished: Path, description: Mapping[str, Any], world_size: int) -> None:
    indices, extras = [], []
    for rank in range(world_size):
        path = unpublished / _part_name(rank)
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise CheckpointError(
                f"Rank 0 does not see {path}, which rank {rank} wrote. Save to a directory that all hosts share."
            ) from error
        indices.append(index_from_json(found["index"]))
        extras.append(found["extra"])
    content = {**description, "extras": extras, "index": index_to_json(merge(indices))}
    write_durably(unpublished / MANIFEST, manifest_text(content))
    for rank in range(world_size):
        (unpublished / _part_name(rank)).unlink()
