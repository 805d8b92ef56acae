# SPDX-License-Identifier: Apache-2.0
"""The objects of a checkpoint: pickles of plain data.

torch.load reads them with ``weights_only=True``, which imports nothing. What a pickle claims must be bounded by its
bytes; param groups, schedulers and random states must be such.
"""

from __future__ import annotations

import io
import math
import numbers
import pickle
import random
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint.files import CheckpointError
from shardadam.checkpoint.schema import PARAM_GROUPS, SCHEDULER, is_random_state, shown

MAX_DEPTH = 100
"""Levels of lists, tuples and dicts inside each other; Python's own limit would end the process of some."""

ARCHIVE_START = b"PK\x03\x04"
"""The first bytes of what torch.save writes."""

_SPARE_BYTES = 64 * 2**20
_SPARE_VALUES = 2**17
"""How much more than its bytes an object may claim: expanded tensors, and lists that appear several times."""


def safely_pickled(key: str, value: Any, *, groups: int) -> bytes:
    """Pickles what ``unpickled`` reads without importing anything: tensors, numbers, texts, and lists, tuples, sets and
    dicts of them.

    Args:
        groups: number of param groups, as for ``check_object``.

    Raises:
        CheckpointError: ``value`` contains something else, or ``load`` would refuse it.
    """
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise CheckpointError(_not_saved(key, error)) from error
    content = buffer.getvalue()
    try:
        check_object(key, _load(content), groups=groups)
    except ValueError as error:
        raise CheckpointError(
            f"{key} could not be loaded again, so it is not saved: {error}. Correct the value; clone tensors that are "
            "expanded or overlap, and lists that appear many times."
        ) from error
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise CheckpointError(_not_saved(key, error)) from error
    return content


def with_plain_numbers(value: Any) -> Any:
    """Returns ``value`` with NumPy's numbers replaced by Python's: hyperparameters are often made by NumPy."""
    if type(value) is dict:
        return {key: with_plain_numbers(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_plain_numbers(each) for each in value)
    # NumPy registers its numbers as such; only they have the method.
    if isinstance(value, numbers.Number) and not isinstance(value, Tensor) and hasattr(value, "item"):
        return value.item()
    return value


def _not_saved(key: str, error: BaseException) -> str:
    return (
        f"{key} contains something that could only be loaded by running code, so it is not saved: "
        f"{_reason(error)}. Expected only tensors, numbers, texts, lists, tuples and dicts."
    )


def unpickled(key: str, content: bytes | bytearray) -> Any:
    """Returns the object, with tensors on the CPU.

    Raises:
        CheckpointError: it could only be loaded by running code, or is not what ``safely_pickled`` writes.
    """
    try:
        return _load(content)
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{key} contains something that could only be loaded by running code: {_reason(error)}. It is not loaded. "
            "Do not load it by other means unless you trust its author."
        ) from error


def _load(content: bytes | bytearray) -> Any:
    """Raises ValueError for what claims more than its own bytes, else whatever torch.load raises."""
    buffer = io.BytesIO(content)
    if zipfile.is_zipfile(buffer):
        with zipfile.ZipFile(buffer) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("found a compressed archive, expected one that torch.save wrote")
        if sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("found an archive whose entries overlap, expected one that torch.save wrote")
    elif len(content) > _SPARE_BYTES:
        raise ValueError("found no archive, expected one that torch.save wrote")
    buffer.seek(0)
    value = torch.load(buffer, map_location="cpu", weights_only=True)
    _check_bounded(value, len(content))
    return value


def _check_bounded(value: Any, nbytes: int) -> None:
    """Raises ValueError if walking through ``value``, or copying it, would take far more than ``nbytes``."""
    values, claimed = nbytes + _SPARE_VALUES, nbytes + _SPARE_BYTES
    for depth, each in _walk(value):
        values -= 1
        if isinstance(each, Tensor) and each.layout == torch.strided:
            claimed -= each.numel() * each.element_size()
        if depth > MAX_DEPTH or values < 0 or claimed < 0:
            what = "levels" if depth > MAX_DEPTH else "values" if values < 0 else "bytes of tensors"
            raise ValueError(f"found more {what} than its {nbytes} bytes can hold, expected plain data")


def _walk(value: Any) -> Iterator[tuple[int, Any]]:
    """Yields everything in ``value``, itself included, with its depth; what appears twice, twice."""
    waiting = [iter([value])]
    while waiting:
        try:
            each = next(waiting[-1])
        except StopIteration:
            waiting.pop()
            continue
        yield len(waiting), each
        if isinstance(each, Mapping):
            waiting += [iter(each.values()), iter(each.keys())]
        elif isinstance(each, (list, tuple, set, frozenset)):
            waiting.append(iter(each))


def _reason(error: BaseException) -> str:
    """Returns why torch.load refused it, without its advice to unpickle without restrictions."""
    text = str(error)
    found = re.search(
        r"Unsupported (?:global|class|operand)[^.\n]*\S*|GLOBAL \S+|[A-Z_]+ \S+ was not an allowed[^.\n]*", text
    )
    return found.group(0) if found else next((line for line in text.splitlines() if line.strip()), repr(error))


# What known objects must be


def check_object(key: str, value: Any, *, groups: int) -> None:
    """Checks an object that ``save`` has given a meaning.

    Args:
        groups: number of param groups in the manifest.

    Raises:
        ValueError: it is something else, such as a learning rate that is no number.
    """
    if key == PARAM_GROUPS:
        if not isinstance(value, list) or len(value) != groups:
            raise ValueError(f"found {shown(value)}, expected a list of {groups} param groups")
        for index, group in enumerate(value):
            _check_param_group(f"param group {index}", group)
    elif key == SCHEDULER:
        _check_learning_rates(value)
    elif is_random_state(key):
        _check_random_state(value)


def _check_param_group(what: str, group: Any) -> None:
    if not isinstance(group, dict) or not all(isinstance(name, str) for name in group):
        raise ValueError(f"{what}: found {shown(group)}, expected a dict of hyperparameters")
    for name in ("lr", "betas", "eps", "weight_decay", "maximize"):
        if name not in group:
            raise ValueError(f"{what}: {name} is missing")
    for name in ("lr", "eps", "weight_decay"):
        if not _is_finite(group[name]):
            raise ValueError(f"{what}: {name} is {shown(group[name])}, expected a finite number")
    # A learning rate or weight decay may be below 0: some schedules end at a rounding error.
    if float(group["eps"]) < 0:
        raise ValueError(f"{what}: eps is {shown(group['eps'])}, expected 0 or more")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(_is_beta(beta) for beta in betas):
        raise ValueError(f"{what}: betas is {shown(betas)}, expected two numbers from 0 to less than 1")
    for name in ("maximize", "amsgrad", "differentiable"):
        allowed = (False, True) if name == "maximize" else (False,)
        if not isinstance(group.get(name, False), bool) or group.get(name, False) not in allowed:
            raise ValueError(f"{what}: {name} is {shown(group[name])}, expected {' or '.join(map(str, allowed))}")


def _is_finite(value: Any) -> bool:
    """Whether it is a finite number that float32 can hold, or a tensor of one."""
    if isinstance(value, Tensor):
        is_number = value.numel() == 1 and value.device.type == "cpu" and value.layout == torch.strided
        if not is_number or value.is_complex() or value.is_quantized or value.dtype == torch.bool:
            return False
        value = value.item()
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max


def _is_beta(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _check_learning_rates(state: Any) -> None:
    """Checks the learning rates in the state of a scheduler of torch, which may contain other schedulers."""
    for _, each in _walk(state):
        if not isinstance(each, Mapping):
            continue
        for name in ("base_lrs", "_last_lr", "max_lrs", "min_lrs"):
            found = each.get(name)
            numbers = found if isinstance(found, (list, tuple)) else []
            if any(isinstance(number, (bool, str)) or not _is_finite(number) for number in numbers):
                raise ValueError(f"{name} is {shown(found)}, expected finite numbers")


def _check_random_state(state: Any) -> None:
    """Sets generators that nothing uses to the states; all that they raise means that a state is none."""
    if not isinstance(state, dict):
        raise ValueError(f"found {shown(state)}, expected a dict of states")
    try:
        torch.Generator().set_state(state["torch"])
        random.Random().setstate(python_state(state["python"]))
        cuda = state.get("cuda", torch.zeros(0, dtype=torch.uint8, device="cpu"))
        if not isinstance(cuda, Tensor) or cuda.dtype != torch.uint8 or cuda.ndim != 1:
            raise ValueError(f"cuda is {shown(cuda)}, expected a tensor of bytes")
        if "numpy" in state and sys.modules.get("numpy") is not None:
            sys.modules["numpy"].random.RandomState().set_state(tuple(state["numpy"]))
    except Exception as error:
        raise ValueError(f"found no state of random number generators ({type(error).__name__}: {error})") from error


def python_state(state: Any) -> tuple[Any, ...]:
    """Returns a state for ``random.setstate``, with the types that it expects."""
    version, words, gauss = state
    if gauss is not None and not (type(gauss) is float and math.isfinite(gauss)):
        raise ValueError(f"python is {shown(state)}, expected a state of the module random")
    return version, tuple(words), gauss


def check_fits_scheduler(scheduler: Any, state: Any) -> None:
    """Raises ValueError if ``scheduler.load_state_dict(state)`` would break the scheduler."""
    own = scheduler.state_dict()
    if isinstance(own, Mapping) and not isinstance(state, Mapping):
        raise ValueError(f"found {shown(state)}, expected a dict")
    if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) and isinstance(state, Mapping):
        # It writes all entries to its attributes.
        for name in state:
            if not isinstance(name, str) or name == "optimizer" or callable(getattr(type(scheduler), name, None)):
                raise ValueError(f"found an entry {shown(name)}, expected only values")
        for name in ("base_lrs", "_last_lr"):
            if name in own and name in state and type(state[name]) is not list:
                raise ValueError(f"{name} is {shown(state[name])}, expected a list of numbers")
