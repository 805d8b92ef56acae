# SPDX-License-Identifier: Apache-2.0
"""What a manifest may say. Every reader of checkpoints reads through ``manifest_of``, and nothing else of the JSON.

A checksum says that a manifest is what somebody wrote, not that it makes sense. Here every value is checked that a
reader uses: its type, its range, and that it fits the others.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from shardadam.checkpoint.boxes import BoxSpec, whole_box
from shardadam.checkpoint.files import (
    Index,
    Item,
    StoredBox,
    StoredObject,
    StoredTensor,
    TensorSpec,
    check_whole,
    digest,
    file_name,
)
from shardadam.layout import ALIGNMENT_NUMEL, ITEM_BYTES
from shardadam.state.flat_shard import Runs
from shardadam.update import formats

PARAM_GROUPS = "optimizer.param_groups"
SCHEDULER = "scheduler"
MODEL_PREFIX = "model."
STATE_PREFIX = "optimizer.state."
PARAMETER_PREFIX = "optimizer.parameter."

MAX_NUMBER = 2**63 - 1
MAX_DIMENSIONS = 64
MAX_PARTS = 4096
"""How many boxes may lie side by side in the memory of one rank."""
MAX_STEP = 2.0**53
_MASTERS = ("own", "split", "fp32", "none")
_MOMENTS = ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16))
_CODES = (torch.int8, torch.uint8)
_PARAMETERS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class SavedParameter:
    """Numbers of a trained parameter. ``bound``: see ``reference.bound_squared_at``. None if it was not saved."""

    step: float
    bound: float | None
    n_averaged: int | None


@dataclass(frozen=True, slots=True)
class SavedOptimizer:
    """``groups``: names of all parameters in each param group. ``parameters``: those that have state, by name."""

    groups: list[list[str]]
    skipped_steps: int
    parameters: dict[str, SavedParameter]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The checked content of ``checkpoint.json``.

    Args:
        step: number of steps taken.
        world_size: number of ranks that saved; each has a file, an ``extra`` and a random state.
        versions: of shardadam and of torch.
        aliases: key of the same tensor, for tensors that the model has under several names.
        optimizer: None if none was saved.
    """

    step: int
    world_size: int
    versions: dict[str, str]
    aliases: dict[str, str]
    extras: list[Any]
    optimizer: SavedOptimizer | None
    index: Index


def random_state_key(rank: int) -> str:
    return f"rng.{rank}"


def is_random_state(key: str) -> bool:
    return re.fullmatch(r"rng\.[0-9]+", key) is not None


def shown(value: Any) -> str:
    """Returns a short form of any value, for messages."""
    return _Shown().repr(value)


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"


def parsed(text: bytes) -> Any:
    """Parses JSON in which no object has two entries of one name.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(text.decode(), object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("found more levels than Python can read") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"found two entries {shown(next(name for name in names if names.count(name) > 1))}")
    return found


def checksum_of(content: Any) -> str:
    """Raises ValueError if ``content`` has too many levels."""
    try:
        return digest(content)
    except RecursionError:
        raise ValueError("found more levels than Python can read") from None


def manifest_of(content: Any) -> Manifest:
    """Returns the manifest.

    Raises:
        ValueError: names the value that is not what ``save`` writes.
    """
    found = _dict(content, "the content")
    step = _number(_get(found, "step"), "step")
    world_size = _number(_get(found, "world_size"), "world_size")
    extras = _list(_get(found, "extras"), "extras")
    versions = {name: _text(_get(found, name), name) for name in ("shardadam", "torch")}
    index = index_from_json(_get(found, "index"))
    if not world_size == len(index.files) == len(extras):
        raise ValueError(
            f"world_size is {world_size}; found {len(index.files)} files and {len(extras)} entries in extras, expected "
            "as many"
        )
    _check_extents(index)
    aliases = _dict(_get(found, "aliases"), "aliases")
    _check_aliases(aliases, index)
    saved = found.get("optimizer")
    optimizer = None if saved is None else _optimizer_of(_dict(saved, "optimizer"), index)
    _check_objects(index, world_size, has_optimizer=optimizer is not None)
    if optimizer is None:
        optimizers = next((key for key in index.tensors if key.startswith((STATE_PREFIX, PARAMETER_PREFIX))), None)
        if optimizers is not None:
            raise ValueError(f"found {shown(optimizers)}, but no optimizer")
    return Manifest(step, world_size, versions, aliases, extras, optimizer, index)


# Types


def _get(found: Mapping[str, Any], name: str) -> Any:
    if name not in found:
        raise ValueError(f"{name} is missing")
    return found[name]


def _dict(value: Any, what: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{what}: found {shown(value)}, expected an object")
    for name in value:
        _name(name, what)
    return value


def _list(value: Any, what: str) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"{what}: found {shown(value)}, expected a list")
    return value


def _number(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"{what}: found {shown(value)}, expected a whole number of 0 or more")
    return value


def _numbers(value: Any, what: str, length: int | None = None) -> list[int]:
    if type(value) is not list or len(value) != (len(value) if length is None else length):
        expected = "a list of numbers" if length is None else f"{length} numbers"
        raise ValueError(f"{what}: found {shown(value)}, expected {expected}")
    for number in value:
        if type(number) is not int or not 0 <= number <= MAX_NUMBER:
            raise ValueError(f"{what}: found {shown(number)}, expected a whole number of 0 or more")
    return value


def _name(value: Any, what: str) -> str:
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{what}: found {shown(value)}, expected a text")
    return value


def _text(value: Any, what: str) -> str:
    text = _name(value, what)
    if len(text) > 200:
        raise ValueError(f"{what}: found {shown(text)}, expected a short text")
    return text


# Tensors and files


def index_from_json(value: Any) -> Index:
    """Returns what ``index_to_json`` was given, by one rank or by all.

    Raises:
        ValueError: it is something else.
    """
    found = _dict(value, "index")
    files = []
    for entry in _list(_get(found, "files"), "files"):
        if type(entry) is not list or len(entry) != 2:
            raise ValueError(f"files: found {shown(entry)}, expected a name and a number of bytes")
        if type(entry[0]) is not str or not re.fullmatch(r"rank-[0-9]{5,}\.bin", entry[0]):
            raise ValueError(f"found the file name {shown(entry[0])}, expected rank-NNNNN.bin")
        files.append((entry[0], _number(entry[1], entry[0])))
    tensors, objects = (_dict(_get(found, name), name) for name in ("tensors", "objects"))
    return Index(
        files,
        {key: _tensor_of(entry, f"tensor {shown(key)}") for key, entry in tensors.items()},
        {key: StoredObject(*_numbers(entry, f"object {shown(key)}", 4)) for key, entry in objects.items()},
    )


def _tensor_of(value: Any, what: str) -> StoredTensor:
    found = _dict(value, what)
    dtype = _dtype(_get(found, "dtype"), what)
    shape, order = _dense(found, what)
    if math.prod(max(1, size) for size in shape) * dtype.itemsize > MAX_NUMBER:
        raise ValueError(f"{what}: found shape {shown(shape)}, which has more bytes than a file can have")
    block_numel = _number(found.get("block_numel", 1), f"{what}, block_numel")
    spec = TensorSpec(dtype, shape, order, max(1, block_numel))
    if "boxes" not in found:
        return StoredTensor(spec, [_box_of(found, whole_box(shape, order), what)])
    boxes = []
    for entry in _list(found["boxes"], f"{what}, boxes"):
        box = _dict(entry, f"{what}, boxes")
        offset = tuple(_numbers(_get(box, "offset"), f"{what}, offset", len(shape)))
        box_spec = BoxSpec(offset, *_dense(box, what, len(shape)))
        if "runs" in box:
            box_spec = replace(box_spec, runs=_runs_of(box["runs"], box_spec, what))
        boxes.append(_box_of(box, box_spec, what))
    return StoredTensor(spec, boxes)


def _dense(found: Mapping[str, Any], what: str, length: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns a shape and an order of its dimensions."""
    shape, order = (tuple(_numbers(_get(found, name), f"{what}, {name}", length)) for name in ("shape", "order"))
    if len(shape) > MAX_DIMENSIONS or sorted(order) != list(range(len(shape))):
        raise ValueError(f"{what}: found shape {shown(shape)} in the order of dimensions {shown(order)}")
    return shape, order


def _runs_of(value: Any, box: BoxSpec, what: str) -> Runs:
    runs: list[tuple[tuple[int, int], ...]] = []
    for dim, of_dim in enumerate(_list(value, f"{what}, runs")):
        found = [tuple(_numbers(run, f"{what}, runs", 2)) for run in _list(of_dim, f"{what}, runs")]
        if dim >= len(box.shape) or not found or sum(length for _, length in found) != box.shape[dim]:
            raise ValueError(f"{what}: found runs {shown(of_dim)} of a box of shape {shown(box.shape)}")
        runs.append(tuple((at, length) for at, length in found))
    if tuple(of_dim[0][0] for of_dim in runs) != box.offset or math.prod(map(len, runs)) > MAX_PARTS:
        raise ValueError(f"{what}: found runs {shown(value)} of a box at {shown(box.offset)}")
    return tuple(runs)


def _box_of(found: Mapping[str, Any], spec: BoxSpec, what: str) -> StoredBox:
    items = [Item(*_numbers(item, f"{what}, items", 5)) for item in _list(_get(found, "items"), f"{what}, items")]
    return StoredBox(spec, items, [item.start for item in items])


def _dtype(name: Any, what: str) -> torch.dtype:
    dtype = getattr(torch, name, None) if type(name) is str else None
    if not isinstance(dtype, torch.dtype) or str(dtype).startswith("torch.q"):  # what quantizes is not stored
        raise ValueError(f"{what}: found dtype {shown(name)}, expected one of torch's")
    return dtype


def _check_extents(index: Index) -> None:
    """Checks that tensors are whole, with boxes in ascending order, and that everything has bytes of its own in a file.

    So a checkpoint has at most as much data as its files have bytes, and nothing larger than an item is read at once.
    """
    for rank, (name, _) in enumerate(index.files):
        if name != file_name(rank):
            raise ValueError(f"found {name} as file number {rank}, expected {file_name(rank)}")
    extents: list[tuple[int, int, int, str]] = []
    for key, tensor in index.tensors.items():
        if tensor.spec.block_numel != 1:
            raise ValueError(f"{key}: found blocks of {tensor.spec.block_numel} elements, expected single ones")
        check_whole(key, tensor)
        offsets = [box.spec.offset for box in tensor.boxes]
        if offsets != sorted(offsets):
            raise ValueError(f"{key}: found boxes in another order than that of their offsets")
        itemsize = tensor.spec.dtype.itemsize
        for item in tensor.items:
            nbytes = item.numel * itemsize
            if nbytes > ITEM_BYTES:
                raise ValueError(f"{key}: found an item of {nbytes} bytes, expected at most {ITEM_BYTES}")
            extents.append((item.file, item.offset, item.offset + nbytes, key))
    for key, stored in index.objects.items():
        extents.append((stored.file, stored.offset, stored.offset + stored.nbytes, key))
    extents.sort()
    file, end = -1, 0
    for file_number, start, stop, key in extents:
        if file_number >= len(index.files) or stop > index.files[file_number][1]:
            raise ValueError(f"{key} ends beyond its file")
        if file_number == file and start < end:
            raise ValueError(f"{key} lies over something else in file {index.files[file][0]}")
        file, end = file_number, stop


def _check_aliases(aliases: Mapping[str, Any], index: Index) -> None:
    for alias, key in aliases.items():
        if not alias.startswith(MODEL_PREFIX) or alias in index.tensors or alias in index.objects:
            raise ValueError(f"aliases: found {shown(alias)}, expected another name for a tensor of the model")
        if type(key) is not str or not key.startswith(MODEL_PREFIX) or key not in index.tensors:
            raise ValueError(f"aliases: found {shown(key)} as {shown(alias)}, expected a tensor of the model")


def _check_objects(index: Index, world_size: int, *, has_optimizer: bool) -> None:
    both = index.tensors.keys() & index.objects.keys()
    if both:
        raise ValueError(f"found {shown(min(both))} as a tensor and as an object")
    if (PARAM_GROUPS in index.objects) != has_optimizer:
        found, other = ("no ", "an") if has_optimizer else ("", "no")
        raise ValueError(f"found {found}{PARAM_GROUPS}, but {other} optimizer")
    for rank in range(world_size):
        if random_state_key(rank) not in index.objects:
            raise ValueError(f"{random_state_key(rank)} is missing, expected the random states of {world_size} ranks")


# The optimizer


def _optimizer_of(found: Mapping[str, Any], index: Index) -> SavedOptimizer:
    groups = [
        [_name(name, "groups") for name in _list(group, "groups")] for group in _list(_get(found, "groups"), "groups")
    ]
    names = {name for group in groups for name in group}
    if len(names) < sum(map(len, groups)):
        raise ValueError("groups: found a name twice, expected distinct names")
    parameters = {}
    for name, entry in _dict(_get(found, "parameters"), "parameters").items():
        if name not in names:
            raise ValueError(f"parameters: found {shown(name)}, which is in no param group")
        parameters[name] = _parameter_of(_dict(entry, f"parameter {shown(name)}"), f"parameter {shown(name)}")
    masters = _list(_get(found, "masters"), "masters")
    if any(type(kind) is not str or kind not in _MASTERS for kind in masters):
        raise ValueError(f"masters: found {shown(masters)}, expected some of {_MASTERS}")
    _check_state(parameters, set(masters), index)
    return SavedOptimizer(groups, _number(_get(found, "skipped_steps"), "skipped_steps"), parameters)


def _parameter_of(found: Mapping[str, Any], what: str) -> SavedParameter:
    step = _get(found, "step")
    if type(step) not in (int, float) or not 0 <= step <= MAX_STEP or step != int(step):
        raise ValueError(f"{what}: found step {shown(step)}, expected a whole number of 0 or more")
    bound = None
    if "bound" in found:
        try:
            bound = float.fromhex(found["bound"])
        except (TypeError, ValueError, OverflowError):
            bound = math.nan
        if not bound >= 0:
            raise ValueError(f"{what}: found bound {shown(found['bound'])}, expected a hexadecimal number of 0 or more")
    n_averaged = _number(found["n_averaged"], f"{what}, n_averaged") if "n_averaged" in found else None
    return SavedParameter(float(step), bound, n_averaged)


def _check_state(parameters: Mapping[str, SavedParameter], masters: set[str], index: Index) -> None:
    """Checks that each parameter has the state that its format needs, in its own shape, and nothing else has state."""
    tensors = index.tensors
    states: dict[str, dict[str, StoredTensor]] = {name: {} for name in parameters}
    for key, tensor in tensors.items():
        if key.startswith(STATE_PREFIX):
            name, _, kind = key.removeprefix(STATE_PREFIX).rpartition(".")
            if name not in states or kind not in (*formats.MOMENTS, *formats.SCALES, "master", formats.AVERAGE):
                raise ValueError(f"found {shown(key)}, expected the state of a parameter that the manifest lists")
            states[name][kind] = tensor
    # The model may have another tensor of the same name, which is not the optimizer's.
    values = {name: tensors.get(PARAMETER_PREFIX + name) or tensors.get(MODEL_PREFIX + name) for name in states}
    if None in values.values() and any(values.values()):
        lacking = next(name for name, value in values.items() if value is None)
        raise ValueError(f"found the values of some parameters, but not of {shown(lacking)}")
    for name, state in states.items():
        value = values[name]
        _check_moments(f"parameter {shown(name)}", state, value)
        if (formats.AVERAGE in state) != (parameters[name].n_averaged is not None):
            raise ValueError(f"parameter {shown(name)}: found one of average and n_averaged, expected both or none")
        if value is not None:
            own = value.spec.dtype in (torch.float32, torch.float64)
        else:
            own = "own" in masters and len(masters) == 1
        needs_master = not own and "none" not in masters
        is_known = value is not None or len(masters) == 1 or "own" not in masters
        if is_known and needs_master != ("master" in state):
            raise ValueError(
                f"found {'no' if needs_master else 'a'} master of parameter {shown(name)}, but masters are "
                f"{shown(sorted(masters))}"
            )


def _check_moments(what: str, state: Mapping[str, StoredTensor], value: StoredTensor | None) -> None:
    for kind in formats.MOMENTS:
        if kind not in state:
            raise ValueError(f"{what}: {kind} is missing")
    first = state[formats.MOMENTS[0]]
    shape = first.spec.shape
    boxes = [box.spec for box in first.boxes]
    counts = [-(-box.numel // ALIGNMENT_NUMEL) for box in boxes]
    ends = accumulate(counts, initial=0)
    blocks = [BoxSpec((start,), (count,), (0,)) for start, count in zip(ends, counts, strict=False)]
    dtypes = tuple(state[kind].spec.dtype for kind in formats.MOMENTS)
    if dtypes not in (*_MOMENTS, _CODES):
        raise ValueError(f"{what}: found moments of {_names(dtypes)}")
    if {kind for kind in formats.SCALES if kind in state} != set(formats.SCALES if dtypes == _CODES else ()):
        raise ValueError(f"{what}: found moments of {_names(dtypes)}, and not the scales that these have")
    for kind, tensor in state.items():
        spec, expected, expected_boxes = tensor.spec, first.spec, boxes
        if kind in formats.SCALES:
            expected, expected_boxes = TensorSpec(spec.dtype, (sum(counts),), (0,)), blocks
        if (spec.shape, spec.order) != (expected.shape, expected.order):
            raise ValueError(f"{what}: found {kind} of shape {shown(spec.shape)}, expected {shown(expected.shape)}")
        if [box.spec for box in tensor.boxes] != expected_boxes:
            raise ValueError(f"{what}: found {kind} in other boxes than {formats.MOMENTS[0]}")
        exact = torch.float64 if kind == formats.AVERAGE and torch.float64 in dtypes else torch.float32
        if kind not in formats.MOMENTS and spec.dtype != exact:
            raise ValueError(f"{what}: found {kind} of {_names([spec.dtype])}, expected {_names([exact])}")
    if value is None:
        return
    if value.spec.dtype not in _PARAMETERS or (value.spec.shape, value.spec.order) != (shape, first.spec.order):
        raise ValueError(
            f"{what}: found a {_names([value.spec.dtype])} tensor of shape {shown(value.spec.shape)}, and moments of "
            f"shape {shown(shape)}"
        )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
