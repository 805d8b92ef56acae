# SPDX-License-Identifier: Apache-2.0
"""``load``: each rank reads the elements of its own shards, saved on any number of ranks; parameters are then gathered.

Everything that can be checked without reading tensors is checked before anything is changed. ``reading`` reads tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardadam.checkpoint import directory as directories
from shardadam.checkpoint.background import raise_failure, wait_for_background_save
from shardadam.checkpoint.contents import (
    Contents,
    contents_of,
    load_objects,
    set_random_state,
)
from shardadam.checkpoint.disk import disk_time_limit, on_disk
from shardadam.checkpoint.exchange import ARRIVAL, Phase, RankExchange, reported, store_barrier_for
from shardadam.checkpoint.files import CheckpointError, CheckpointRemovedError
from shardadam.checkpoint.objects import check_fits_scheduler
from shardadam.checkpoint.pieces import pieces_of
from shardadam.checkpoint.reader import MAX_CHOICES, Reader
from shardadam.checkpoint.reading import read_tensors
from shardadam.checkpoint.schema import MODEL_PREFIX, PARAM_GROUPS, SCHEDULER, SavedOptimizer, random_state_key
from shardadam.optimizer import ShardedAdam
from shardadam.state.loading import load_groups_
from shardadam.update import formats, reference


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What ``load`` returns.

    Args:
        path: the directory of the checkpoint.
        step: number of steps taken when it was saved.
        world_size: number of ranks that saved it.
        extra: the ``extra`` that this rank passed to ``save``; None on ranks beyond ``world_size``.
        extras: the ``extra`` of all ranks that saved it, in rank order.
    """

    path: Path
    step: int
    world_size: int
    extra: Any
    extras: list[Any]


@reported
def load(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    optimizer: ShardedAdam | None = None,
    scheduler: Any = None,
    random_states: bool = True,
    timeout_s: float = 60.0,
) -> Checkpoint:
    """Loads the newest checkpoint in ``directory``, or ``directory`` itself if it is one, in place.

    Collective: all ranks of the job must call it, as ``save``. Numbers of ranks, meshes and placements of DTensors,
    pipeline stages, the ranks of experts, and ``bucket_mb`` may differ from those of ``save``. State saved in another
    ``Precision`` is converted; in the same one it is loaded bit for bit. Codes of int8 moments are, if their blocks are
    the same: 128 elements that follow each other in the memory of a rank's part of the parameter. Those that are not,
    as on another number of tensor-parallel ranks, are decoded, and encoded again. Never runs code that a checkpoint
    contains.

    Args:
        directory: as given to ``save``, or one checkpoint in it.
        model: as given to ``save``, or another part of it; all ranks together have all of it. None: not loaded.
        optimizer: the same.
        scheduler: the same.
        random_states: restore the random number generators too, on ranks below the number of ranks that saved.
        timeout_s: how long to wait for a rank that does not advance, in seconds. One call to the file system may take
            twice as long.

    If another job removes the checkpoint while it is opened (``save(keep=...)``), all ranks load the next newest one.

    Raises:
        TimeoutError: names ranks that did not call ``load``.
        CheckpointError: there is no checkpoint, it is damaged, or it does not fit. Nothing has changed unless the
            message says so: damage inside a file is found only when it is read.
    """
    directory = Path(directory).absolute()
    store_barrier = store_barrier_for(optimizer)
    exchange = RankExchange(store_barrier, call="load", what=f"load from {directory}", timeout_s=timeout_s)
    with exchange.phase(ARRIVAL) as arrival:
        with store_barrier.heartbeat():
            arrival.value = wait_for_background_save()
        if store_barrier.rank == 0:
            with disk_time_limit(timeout_s) as disk, store_barrier.heartbeat(disk.status):
                arrival.value["path"] = str(on_disk(f"looking into {directory}", directories.newest, directory))
    raise_failure(arrival.values)
    paths, is_begun = [Path(arrival.values[0]["path"])], False
    if isinstance(optimizer, ShardedAdam):
        optimizer.synchronize()
        optimizer._checkpoint_seam.before_load()

    with ExitStack() as opened, ExitStack() as begun:
        disk = begun.enter_context(disk_time_limit(timeout_s))
        while True:
            with exchange.phase("checked") as phase, _removal_in(phase), store_barrier.heartbeat(disk.status):
                reader = opened.enter_context(Reader(paths[-1]))
                contents = contents_of(model, optimizer)
                if optimizer is not None:
                    optimizer._checkpoint_seam.bind_moved()
                names, objects = _compare_names(contents, reader), {}
                if _check_fit(contents, reader, scheduler, names):
                    objects = _read_objects(contents, reader, scheduler, store_barrier.rank)
                phase.value = {"checksum": reader.checksum, "names": names}
            if not any(removals := _removals(phase)):
                _check_same(paths[-1], phase)
                _check_names(reader, [value["names"] for value in phase.values])
                if not is_begun:
                    begun.enter_context(_halfway(paths[-1], optimizer))
                    is_begun = True
                with (
                    exchange.phase("read") as phase,
                    _removal_in(phase),
                    torch.no_grad(),
                    store_barrier.heartbeat(disk.status),
                ):
                    read_tensors(contents, reader)
                if not any(removals := _removals(phase)):
                    break
            opened.close()
            paths.append(_choose_again(exchange, directory, paths, removals))
        if optimizer is not None:
            assert reader.manifest.optimizer is not None
            _set_scalars(contents, reader.manifest.optimizer)
            optimizer._checkpoint_seam.after_load(parameters=model is not None)
        with exchange.phase("done", is_last=True):
            _set_objects(contents, objects, scheduler)
            if random_states and random_state_key(store_barrier.rank) in objects:
                set_random_state(objects[random_state_key(store_barrier.rank)])
        directories.forget(reader.path.parent)
        extras = reader.manifest.extras
        extra = extras[store_barrier.rank] if store_barrier.rank < len(extras) else None
        return Checkpoint(reader.path, reader.manifest.step, reader.manifest.world_size, extra, extras)


@contextmanager
def _removal_in(phase: Phase) -> Iterator[None]:
    """If the block finds that the checkpoint has been removed, says so to all ranks as the phase's value."""
    try:
        yield
    except CheckpointRemovedError as error:
        phase.value = {"removed": str(error)}


def _removals(phase: Phase) -> list[str | None]:
    """Returns the message of each rank that found the checkpoint removed."""
    return [(value or {}).get("removed") for value in phase.values]


def _check_same(path: Path, phase: Phase) -> None:
    """Raises CheckpointError on all ranks unless all have read the same manifest."""
    if len({value["checksum"] for value in phase.values}) > 1:
        raise CheckpointError(
            f"{path} has been replaced while ranks opened it, or is not the same on all hosts. Load it again, from a "
            "directory that all hosts share."
        )


def _choose_again(
    exchange: RankExchange, directory: Path, tried: Sequence[Path], removals: Sequence[str | None]
) -> Path:
    """Returns the checkpoint that is the newest now, the same on all ranks. Collective.

    Args:
        removals: of each rank, the message about a checkpoint that it did not find.

    Raises:
        CheckpointError: there is none, or it is one of ``tried``, or too many have been.
    """
    with exchange.phase("chosen again") as phase:
        if exchange.store_barrier.rank == 0:
            path = on_disk(f"looking into {directory}", directories.newest, directory)
            if path.is_dir() and path in tried:
                lacking = [
                    rank for rank, removed in zip(exchange.store_barrier.ranks, removals, strict=True) if removed
                ]
                raise CheckpointError(
                    f"{path} exists on rank {exchange.store_barrier.ranks[0]}, but not on ranks {lacking}. Load from a "
                    "directory that all hosts share."
                )
            if path in tried or len(tried) >= MAX_CHOICES:
                raise CheckpointRemovedError(next(filter(None, removals)))
            phase.value = str(path)
    return Path(phase.values[0])


@contextmanager
def _halfway(path: Path, optimizer: ShardedAdam | None) -> Iterator[None]:
    """If the block fails, poisons the optimizer, because it and the model then hold a part of the checkpoint."""
    try:
        yield
    except BaseException as error:
        if optimizer is not None:
            optimizer._checkpoint_seam.poison(f"loading {path} failed halfway")
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"{error} Model and optimizer now hold a part of the checkpoint: load a whole one before training."
        ) from error


# Checks


def _check_fit(contents: Contents, reader: Reader, scheduler: Any, compared: Sequence[Mapping[str, Any]]) -> bool:
    """Raises CheckpointError unless the shapes of everything to be loaded are those of the checkpoint.

    Args:
        compared: what ``_compare_names`` returned.

    Returns:
        False if names are missing in the checkpoint: ``_check_names`` will raise on all ranks.
    """
    aliases = reader.manifest.aliases
    of_tensors, of_objects, of_optimizer = (bool(one["missing"]) for one in compared)
    if contents.model is not None:
        tensors, objects, _ = _names_in(reader)
        if not tensors | objects and contents.model_keys:
            raise CheckpointError(f"{reader.path} was saved without a model. Call load without model.")
        if of_tensors or of_objects:
            return False
        shapes = {key: tuple(tensor.shape) for key, tensor in contents.others.items()}
        shapes |= {p.value_key: tuple(p.param.parameter.shape) for p in contents.owned}
        _check_shapes(reader, {aliases.get(key, key): shape for key, shape in shapes.items()})
        _check_dtypes(contents, reader)
    if contents.optimizer is not None:
        saved = reader.manifest.optimizer
        if saved is None:
            raise CheckpointError(f"{reader.path} was saved without an optimizer. Call load without optimizer.")
        if of_optimizer:
            return False
        _check_groups(contents, reader, saved.groups)
        mine = {name for group in contents.groups for name in group}
        frozen = sorted(mine & set(saved.parameters) - {parameter.name for parameter in contents.owned})
        if frozen:
            raise CheckpointError(
                f"{reader.path} has state of parameters that are frozen here: {_some(frozen)}. Set requires_grad on "
                "them before loading. You may freeze them again afterwards; their state stays."
            )
        kinds = (*formats.MOMENTS, "master", formats.AVERAGE)
        _check_shapes(reader, {p.state_key(k): tuple(p.param.parameter.shape) for p in contents.owned for k in kinds})
    if scheduler is not None and SCHEDULER not in reader.index.objects:
        raise CheckpointError(f"{reader.path} was saved without a scheduler. Call load without scheduler.")
    return True


def _names_in(reader: Reader) -> tuple[set[str], set[str], set[str]]:
    """Returns the names of the model's tensors and of its objects, and those of the optimizer's parameters."""
    tensors, objects = (
        {key for key in found if key.startswith(MODEL_PREFIX)} for found in (reader.index.tensors, reader.index.objects)
    )
    saved = reader.manifest.optimizer
    return (
        tensors | reader.manifest.aliases.keys(),
        objects,
        {name for group in saved.groups for name in group} if saved else set(),
    )


def _compare_names(contents: Contents, reader: Reader) -> list[dict[str, Any]]:
    """Returns which names this rank needs and the checkpoint lacks, and which of the checkpoint's it needs, as a number
    with a bit for each: other ranks may need the others.
    """
    needed = (
        (contents.model is not None, contents.model_keys),
        (contents.model is not None, contents.objects.keys()),
        (contents.optimizer is not None, {name for group in contents.groups for name in group}),
    )
    compared = []
    for (is_loaded, mine), found in zip(needed, _names_in(reader), strict=True):
        bits = "".join("1" if name in mine or not is_loaded else "0" for name in sorted(found))
        compared.append({"missing": sorted(mine - found), "needed": f"{int(bits or '0', 2):x}"})
    return compared


def _check_names(reader: Reader, compared: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Raises CheckpointError on all ranks unless the checkpoint has what each rank needs, and nothing that none needs.

    Args:
        compared: what ``_compare_names`` returned on all ranks.
    """
    for whose, found, of_ranks in zip(
        ("the model", "the model", "the optimizer"), _names_in(reader), zip(*compared, strict=True), strict=True
    ):
        names = sorted(found)
        needed = 0
        for one in of_ranks:
            needed |= int(one["needed"], 16)
        bits = f"{needed:0{len(names)}b}" if names else ""
        unexpected = [name for name, bit in zip(names, bits, strict=True) if bit == "0"]
        missing = sorted({name for one in of_ranks for name in one["missing"]})
        if missing or unexpected:
            raise CheckpointError(
                f"{reader.path} does not fit {whose}. Missing in the checkpoint: {_some(missing)}. Only in the "
                f"checkpoint: {_some(unexpected)}. Build the model that was saved."
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"


def _check_shapes(reader: Reader, expected: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [
        f"{key} has shape {reader.index.tensors[key].spec.shape}, expected {shape}"
        for key, shape in expected.items()
        if key in reader.index.tensors and reader.index.tensors[key].spec.shape != shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{reader.path} does not fit: {'; '.join(wrong[:3])}{more}. Build the model that was saved."
        )


def _check_dtypes(contents: Contents, reader: Reader) -> None:
    """Raises CheckpointError unless torch converts what is stored to the dtypes of the model's tensors."""
    aliases = reader.manifest.aliases
    targets = {key: tensor.dtype for key, tensor in contents.others.items()}
    targets |= {p.value_key: p.param.parameter.dtype for p in contents.owned}
    for key, dtype in targets.items():
        stored = reader.index.tensors.get(aliases.get(key, key))
        if stored is not None and not _is_converted(stored.spec.dtype, dtype):
            raise CheckpointError(
                f"{reader.path} does not fit: {key} is {stored.spec.dtype}, which is not converted to {dtype}. Build "
                "the model that was saved."
            )


@cache
def _is_converted(stored: torch.dtype, dtype: torch.dtype) -> bool:
    if stored == dtype:
        return True
    if stored.is_complex and not dtype.is_complex:  # torch would drop the imaginary parts
        return False
    try:
        torch.zeros(1, dtype=dtype, device="cpu").copy_(
            torch.zeros(stored.itemsize, dtype=torch.uint8, device="cpu").view(stored)
        )
    except (RuntimeError, TypeError):
        return False
    return True


def _check_groups(contents: Contents, reader: Reader, saved: Sequence[Sequence[str]]) -> None:
    """Raises CheckpointError unless each param group has the parameters that it had, as far as this rank has them."""
    mine = {name for group in contents.groups for name in group}
    here = [{name for name in group if name in mine} for group in saved]
    if len(contents.groups) != len(saved) or here != [set(group) for group in contents.groups]:
        sizes, saved_sizes = [len(group) for group in contents.groups], [len(group) for group in saved]
        raise CheckpointError(
            f"{reader.path} does not fit the optimizer: found param groups of {saved_sizes} parameters, expected "
            f"{sizes}, with the same ones in each. Build the optimizer over the same groups."
        )


# Reading


def _read_objects(contents: Contents, reader: Reader, scheduler: Any, rank: int) -> dict[str, Any]:
    wanted = [random_state_key(rank)]
    if contents.model is not None:
        wanted += contents.objects
    if contents.optimizer is not None:
        wanted.append(PARAM_GROUPS)
    if scheduler is not None:
        wanted.append(SCHEDULER)
    objects = {key: reader.read_object(key) for key in wanted if key in reader.index.objects}
    if scheduler is not None:
        try:
            check_fits_scheduler(scheduler, objects[SCHEDULER])
        except ValueError as error:
            raise CheckpointError(f"{reader.path} does not fit the scheduler: {error}.") from error
    return objects


# Objects and scalars


def _set_objects(contents: Contents, objects: Mapping[str, Any], scheduler: Any) -> None:
    if contents.optimizer is not None:
        load_groups_(contents.optimizer.param_groups, objects[PARAM_GROUPS])
    load_objects(contents, {key: value for key, value in objects.items() if key in contents.objects})
    if scheduler is not None:
        scheduler.load_state_dict(objects[SCHEDULER])


@torch.no_grad()
def _set_scalars(contents: Contents, saved: SavedOptimizer) -> None:
    assert contents.optimizer is not None
    contents.optimizer.skipped_steps.fill_(saved.skipped_steps)
    groups = contents.optimizer.param_groups
    for parameter in contents.owned:
        param, entry = parameter.param, saved.parameters.get(parameter.name)
        counters = param.arena.counters
        if entry is None:  # it was frozen when it was saved, so its Adam restarts
            for piece in pieces_of(param):
                state = piece.state()
                for kind in (*formats.MOMENTS, *formats.SCALES):
                    if kind in state:
                        state[kind].zero_()
                formats.write_master_(state, piece.parameter(), piece.parameter())
        steps = 0.0 if entry is None else entry.step
        counters.steps[param.arena_index] = steps
        if counters.n_averaged is not None:  # with 0, the weight becomes the average in after_load
            counters.n_averaged[param.arena_index] = (entry.n_averaged or 0) if entry is not None else 0
        betas = groups[param.arena.group_index]["betas"]
        bound = None if entry is None else entry.bound
        counters.bounds[param.arena_index] = reference.bound_squared_at(steps, betas) if bound is None else bound
