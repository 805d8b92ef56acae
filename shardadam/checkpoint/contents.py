# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint contains, and under which keys.

Keys: ``model.NAME`` as in ``model.state_dict()``; ``optimizer.state.NAME.exp_avg`` and so on, by the parameter's name
in the model (its name in the optimizer if the model does not have it). Names of wrappers are left out. Ranks may have
different parts of a model: other names (pipeline stages, experts), or other boxes of a DTensor.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from shardadam.checkpoint.boxes import BoxSpec
from shardadam.checkpoint.files import CheckpointError, TensorSpec
from shardadam.checkpoint.objects import python_state
from shardadam.engine.storage import ShardedParam
from shardadam.engine.strides import is_dense
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.optimizer import ShardedAdam
from shardadam.state.flat_shard import dimension_order
from shardadam.state.local import SCALARS, local_state
from shardadam.transport.placement import local_tensor, placements_of, runs_of
from shardadam.update import formats

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


@dataclass(frozen=True, slots=True)
class OwnedParameter:
    """A trainable parameter of the optimizer, and its name in the checkpoint."""

    name: str
    param: ShardedParam
    in_model: bool

    @property
    def value_key(self) -> str:
        """The key of the parameter itself. The model may lack some of the optimizer's parameters."""
        return f"model.{self.name}" if self.in_model else f"optimizer.parameter.{self.name}"

    def state_key(self, kind: str) -> str:
        return f"optimizer.state.{self.name}.{kind}"


@dataclass(slots=True)
class Contents:
    """What this process saves, or loads into, by key.

    Args:
        owned: every trainable parameter of the optimizer.
        others: the model's other parameters and its buffers, which are not sharded over the data-parallel ranks.
        aliases: key of the same tensor, for tensors that the model has under several names.
        objects: other entries of ``model.state_dict()``, which the model makes on each call.
        groups: names of all parameters in each param group.
    """

    model: nn.Module | None
    optimizer: ShardedAdam | None
    owned: list[OwnedParameter] = field(default_factory=list)
    others: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)

    @property
    def model_keys(self) -> set[str]:
        in_model = {parameter.value_key for parameter in self.owned if parameter.in_model}
        return in_model | self.others.keys() | self.aliases.keys()


def contents_of(model: nn.Module | None, optimizer: ShardedAdam | None) -> Contents:
    """Returns what to save or load. Local.

    Raises:
        CheckpointError: names are not distinct.
        TypeError: ``optimizer`` is not a ``ShardedAdam``.
    """
    if optimizer is not None and not isinstance(optimizer, ShardedAdam):
        raise TypeError(
            f"optimizer: found {type(optimizer).__name__}, expected a ShardedAdam or ShardedAdamW. Save the state of "
            "other optimizers with torch.save or torch.distributed.checkpoint."
        )
    contents = Contents(model, optimizer)
    names: dict[int, str] = {}
    if model is not None:
        model = _unwrap(model)
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        seen: set[str] = set()
        for key, value in model.state_dict(keep_vars=True).items():
            name = _clean(key)
            if name in seen:
                raise CheckpointError(
                    f"Two entries of model.state_dict() are called {name!r} when names of wrappers are left out."
                )
            seen.add(name)
            if id(value) not in own:
                contents.objects[f"model.{name}"] = value.detach() if isinstance(value, Tensor) else value
            elif id(value) in names:
                contents.aliases[f"model.{name}"] = f"model.{names[id(value)]}"
            else:
                names[id(value)] = name
                contents.others[f"model.{name}"] = value
    if optimizer is None:
        return contents
    params = {id(param.parameter): param for param in optimizer._checkpoint_seam.params}
    given = {id(p): name for group in optimizer.param_groups for p, name in _given_names(group)}
    position = 0
    for group in optimizer.param_groups:
        contents.groups.append([])
        for parameter in group["params"]:
            name = names.get(id(parameter)) or given.get(id(parameter)) or f"parameters.{position}"
            contents.groups[-1].append(name)
            if id(parameter) in params:
                in_model = id(parameter) in names
                contents.owned.append(OwnedParameter(name, params[id(parameter)], in_model))
                if in_model:
                    del contents.others[f"model.{name}"]
            position += 1
    _check_distinct([name for group in contents.groups for name in group])
    return contents


def _given_names(group: dict[str, Any]) -> Iterator[tuple[Tensor, str]]:
    for parameter, name in zip(group["params"], group.get("param_names") or (), strict=False):
        yield parameter, _clean(name)


def _check_distinct(names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise CheckpointError(
            f"Several parameters of the optimizer are called {repeated[0]!r}, expected distinct names. Pass the model "
            "that holds them all, or build the optimizer over model.named_parameters()."
        )


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def load_objects(contents: Contents, objects: dict[str, Any]) -> None:
    """Loads what the model made for ``state_dict`` (``get_extra_state``, hooks), through ``load_state_dict``."""
    if objects:
        assert contents.model is not None
        model = _unwrap(contents.model)
        own_keys = {f"model.{_clean(key)}": key for key in model.state_dict(keep_vars=True)}
        model.load_state_dict({own_keys[key]: value for key, value in objects.items()}, strict=False)


# Tensors as they are stored


def spec_of(key: str, tensor: Tensor) -> tuple[TensorSpec, BoxSpec]:
    """Returns the spec of the whole tensor, and which part of it this rank holds.

    Raises:
        CheckpointError: it is a DTensor of partial sums.
    """
    if any(placement.is_partial() for placement in placements_of(tensor)):
        raise CheckpointError(
            f"{key} cannot be saved or loaded: found a DTensor of partial sums, expected values. Redistribute it to "
            "Shard or Replicate."
        )
    local, shape, runs = local_tensor(tensor), tuple(tensor.shape), runs_of(tensor)
    is_box = all(len(of_dim) == 1 for of_dim in runs)
    offset = tuple(of_dim[0][0] for of_dim in runs)
    box = BoxSpec(offset, tuple(local.shape), _order(local), () if is_box else runs)
    order = box.order if box.shape == shape else _order(tensor)
    return TensorSpec(tensor.dtype, shape, order), box


def _order(tensor: Tensor) -> tuple[int, ...]:
    return dimension_order(tensor) if is_dense(tensor) else tuple(range(tensor.ndim))


def state_specs(param: ShardedParam, of_parameter: TensorSpec) -> dict[str, TensorSpec]:
    """Returns the specs of a parameter's state, by kind. A remainder is stored as the float32 master it encodes."""
    specs = {}
    for kind, tensor in local_state(param).items():
        if kind in formats.SCALES:
            specs[kind] = replace(of_parameter, dtype=tensor.dtype, block_numel=ALIGNMENT_NUMEL)
        elif kind == "remainder":
            specs["master"] = replace(of_parameter, dtype=torch.float32)
        elif kind not in SCALARS:
            specs[kind] = replace(of_parameter, dtype=tensor.dtype)
    return specs


# Random number generators


def random_state() -> dict[str, Any]:
    """Returns the states of torch (CPU and the current CUDA device), Python, and NumPy if it is imported."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    if sys.modules.get("numpy") is not None:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, keys.tolist(), *rest)
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(python_state(state["python"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state and sys.modules.get("numpy") is not None:
        sys.modules["numpy"].random.set_state(tuple(state["numpy"]))
