# SPDX-License-Identifier: Apache-2.0
"""``save``: each rank writes its part to a file of its own, then rank 0 publishes all of them together."""

from __future__ import annotations

import json
import os
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from shardadam.checkpoint.background import (
    copied_to_cpu,
    raise_failure,
    start_background_save,
    wait_for_background_save,
)
from shardadam.checkpoint.contents import contents_of
from shardadam.checkpoint.directory import create_unpublished, publish, remove_older
from shardadam.checkpoint.disk import disk_time_limit, on_disk
from shardadam.checkpoint.exchange import ARRIVAL, RankExchange, reported, store_barrier_for
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
from shardadam.checkpoint.shares import digest_of, listing_of, merged_description, share
from shardadam.checkpoint.unpublished import Unpublished
from shardadam.engine.snapshot import Snapshot
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


@reported
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

    Collective: all ranks of the job must call it: those of the optimizer's process group and of its model-parallel
    groups (without an optimizer: of the default group). The checkpoint appears at once and whole, or not at all; a
    crash at any moment leaves the earlier ones intact. Each of N ranks that have the same tensors writes 1/N of those
    that are sharded or equal on all of them. Buffers of the model are saved from the first rank that has them. The
    states of the random number generators of torch, Python and NumPy are saved from each rank. Gradients are not
    saved: save between steps.

    Args:
        directory: created if missing; all ranks must see the same one (a shared file system). No other job may save
            into it.
        step: number of steps taken; names the checkpoint.
        model: its ``state_dict()`` is saved. This rank may have a part of the whole: DTensors, a pipeline stage, some
            experts. Different tensors must have different names on all ranks.
        optimizer: its moments, masters, averages, steps and hyperparameters are saved.
        scheduler: any object with ``state_dict()``, equal on all ranks.
        extra: of this rank, anything ``json.dumps`` takes; its position in the data, for example.
        keep: number of checkpoints to keep in ``directory``; None: all.
        asynchronous: return when parameters, buffers and whatever else the user may write have been copied into memory
            of the CPU, and write while training continues. State on the CPU that only the optimizer writes is copied by
            the thread that writes it, or by the next update or access to the state, if that comes first. The next
            ``save`` or ``load`` waits for it; if it failed and no rank has asked its future, that call raises the error
            on all ranks. If there is no next one, the program says so at its end, with exit status 120. The copy is as
            large as this rank's part; its memory is kept for the next save.
        timeout_s: how long to wait for a rank that does not advance, in seconds. One call to the file system (at most
            64 MiB are written in one) may take twice as long.

    Returns:
        The directory of the checkpoint, or a future of it.

    Raises:
        TimeoutError: names ranks that did not call ``save``, or died in it.
        CheckpointError: a rank could not write, another job saves into ``directory``, or ranks have different tensors
            of one name; earlier checkpoints are unchanged.
        RuntimeError: a step was interrupted on a rank while it wrote.
    """
    directory = Path(directory).absolute()
    store_barrier = store_barrier_for(optimizer)
    exchange = RankExchange(store_barrier, call="save", what=f"save to {directory}", timeout_s=timeout_s)
    unpublished: Unpublished | None = None
    try:
        with exchange.phase(ARRIVAL) as arrival:
            with store_barrier.heartbeat():
                previous = wait_for_background_save()
            _check_arguments(step, keep)
            if isinstance(optimizer, ShardedAdam):
                optimizer._checkpoint_seam.before_save()
            contents = contents_of(model, optimizer)
            collected = collect_part(
                contents,
                scheduler=scheduler,
                extra=extra,
                step=step,
                rank=store_barrier.rank,
                world_size=len(store_barrier.ranks),
            )
            listing = listing_of(contents, collected)
            if store_barrier.rank == 0:
                with disk_time_limit(timeout_s) as disk, store_barrier.heartbeat(disk.status):
                    unpublished = create_unpublished(directory, step)
            arrival.value = {"step": step, "contents": digest_of(listing), **previous}
            if unpublished is not None:
                arrival.value |= unpublished.to_json()
        raise_failure(arrival.values)
        steps = sorted({answer["step"] for answer in arrival.values})
        if len(steps) > 1:
            raise CheckpointError(
                f"{exchange.what}: ranks disagree on the step, found {steps}. Pass the same step on all ranks."
            )
        share(exchange, contents, collected, listing, [answer["contents"] for answer in arrival.values])
        if unpublished is None:
            unpublished = Unpublished(directory, arrival.values[0]["name"], arrival.values[0]["token"])
        part: Part | Exception = collected
        if asynchronous:
            snapshot = Snapshot()
            try:
                part, snapshot = copied_to_cpu(collected)
            except Exception as error:  # out of memory, for example; the thread tells the other ranks
                part = error

            def write() -> Path:
                snapshot.finish()
                return _write(unpublished, snapshot.error or part, store_barrier, keep=keep, timeout_s=timeout_s)

            return start_background_save(write)
    except BaseException:
        if unpublished is not None and store_barrier.rank == 0:
            with disk_time_limit(timeout_s):
                unpublished.discard()
        raise
    return _write(unpublished, part, store_barrier, keep=keep, timeout_s=timeout_s)


def _check_arguments(step: int, keep: int | None) -> None:
    if type(step) is not int or step < 0:
        raise ValueError(f"step: found {step!r}, expected a whole number of 0 or more")
    if keep is not None and (type(keep) is not int or keep < 1):
        raise ValueError(f"keep: found {keep!r}, expected None or a whole number of 1 or more")


@torch.no_grad()
def _write(
    unpublished: Unpublished,
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
    path = unpublished.directory / unpublished.name
    is_first, world_size = store_barrier.rank == 0, len(store_barrier.ranks)
    exchange = RankExchange(store_barrier, call=unpublished.token, what=f"save to {path}", timeout_s=timeout_s)
    with disk_time_limit(timeout_s) as disk:
        listed: list[str] = []
        try:
            with exchange.phase("written"), store_barrier.heartbeat(disk.status):
                if isinstance(part, Exception):
                    raise part
                _write_part(unpublished, part, store_barrier.rank)
            with exchange.phase("published", is_last=True):
                if is_first:
                    with store_barrier.heartbeat(disk.status):
                        _write_manifest(unpublished, world_size)
                        listed = publish(unpublished)
        except BaseException:
            if is_first:
                unpublished.discard()
            raise
        if is_first and keep is not None:
            try:
                remove_older(unpublished.directory, listed, keep)
            except OSError as error:
                warnings.warn(f"Checkpoints older than {path} could not be removed: {error}", stacklevel=1)
    return path


def _part_name(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _write_part(unpublished: Unpublished, part: Part, rank: int) -> None:
    try:
        writer = PartWriter(unpublished.path, rank)
        try:
            for key, (spec, box) in part.boxes.items():
                writer.add_box(key, spec, box)
            for write in part.writes:
                writer.write(write.key, write.spec, write.box, write.start, write.read().cpu().contiguous())
            for key, value in part.objects.items():
                writer.write_object(key, value)
            index = writer.close()
        finally:
            writer.abandon()
        content = {"token": unpublished.token, "index": index_to_json(index), "extra": part.extra}
        content["description"] = part.description
        path = unpublished.path / _part_name(rank)
        on_disk(f"writing {path}", _write_new, path, json.dumps(content, separators=(",", ":")))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"found no directory {unpublished.path}, which rank 0 has created. Save to a directory that all hosts "
            "share. If they do, another job has removed it: give each job a directory of its own."
        ) from error


def _write_new(path: Path, text: str) -> None:
    with path.open("x") as file:
        file.write(text)


def _write_manifest(unpublished: Unpublished, world_size: int) -> None:
    indices, extras, descriptions = [], [], []
    for rank in range(world_size):
        path = unpublished.path / _part_name(rank)
        try:
            found = json.loads(on_disk(f"reading {path}", path.read_text))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"Rank 0 does not see {path}, which rank {rank} wrote. Save to a directory that all hosts share. If "
                "they do, another job has removed it: give each job a directory of its own."
            ) from error
        if found["token"] != unpublished.token:
            raise CheckpointError(
                f"another job saves into {unpublished.directory}: it has written {path}. Two jobs must not save into "
                "one directory. End one of them, or give each a directory of its own."
            )
        indices.append(index_from_json(found["index"]))
        extras.append(found["extra"])
        descriptions.append(found["description"])
    index = merge(indices)
    content = {**merged_description(list(filter(None, descriptions))), "extras": extras, "index": index_to_json(index)}
    # Tied on one rank, but not on another
    content["aliases"] = {alias: key for alias, key in content["aliases"].items() if alias not in index.tensors}
    write_durably(unpublished.path / MANIFEST, manifest_text(content), through=unpublished.path / f".{MANIFEST}.saving")
    for rank in range(world_size):
        path = unpublished.path / _part_name(rank)
        on_disk(f"removing {path}", path.unlink)
