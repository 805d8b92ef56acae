# SPDX-License-Identifier: Apache-2.0
"""Checks of constructor arguments, param groups and parameters. Local."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardadam.engine.storage import NamedParameter
from shardadam.engine.strides import is_dense
from shardadam.offload import Offload
from shardadam.precision import Precision
from shardadam.ranks.agreement import Claim
from shardadam.transport import Job, Transport, placement
from shardadam.transport.groups import ranks_of
from shardadam.transport.job import ranks_of_transport

_CPU_BUCKET_BYTES = 8 * 2**20  # fits into caches, from which ranks of one host read each other's buckets
# Of a small model, two staging buffers should not hold more gradients than a plain optimizer would.
_CPU_LEAST_BUCKETS, _CPU_SMALL_BUCKET_BYTES = 4, 2**18
# On GPUs: large, for few launches, and as NCCL needs megabytes of each rank for its full bandwidth; but not larger than
# a share of the parameters, as transfers overlap with backward bucket by bucket. benchmarks/scale.py compares sizes.
_GPU_BUCKET_BYTES, _GPU_BUCKET_BYTES_OF_RANK, _GPU_MOST_BUCKET_BYTES = 128 * 2**20, 2 * 2**20, 2**30
_GPU_LEAST_BUCKETS, _GPU_SMALL_BUCKET_BYTES = 16, 32 * 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of an optimizer that no param group can override. ``transport`` is the name of one."""

    gradient_sync: str
    max_grad_norm: float | None
    precision: Precision
    bucket_mb: float | None
    transport: str
    update: str = "step"
    ema_decay: float | None = None
    offload: Offload | None = None

    def bucket_bytes(self, device_types: Iterable[str], nbytes: int, world_size: int) -> int:
        """Return the size of a bucket, in bytes, for parameters of ``nbytes`` that ``world_size`` ranks split."""
        if self.bucket_mb is not None:
            return round(self.bucket_mb * 2**20)
        if set(device_types) <= {"cpu"}:
            return min(_CPU_BUCKET_BYTES, max(nbytes // _CPU_LEAST_BUCKETS, _CPU_SMALL_BUCKET_BYTES))
        share = max(nbytes // _GPU_LEAST_BUCKETS, _GPU_SMALL_BUCKET_BYTES)
        return min(max(_GPU_BUCKET_BYTES, _GPU_BUCKET_BYTES_OF_RANK * world_size), _GPU_MOST_BUCKET_BYTES, share)

    def check(self) -> None:
        """Raise ValueError or TypeError if an option is not one of those that ``ShardedAdam`` documents."""
        if self.gradient_sync not in ("backward", "step", "external"):
            raise ValueError(f"gradient_sync: found {self.gradient_sync!r}, expected 'backward', 'step' or 'external'")
        for name in ("max_grad_norm", "bucket_mb"):
            if (number := getattr(self, name)) is not None:
                _check_kind(name, number)
        if self.max_grad_norm is not None and not self.max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm: found {self.max_grad_norm!r}, expected None or a number of 0 or more")
        if not isinstance(self.precision, Precision):
            found = f"{self.precision!r}, a {type(self.precision).__name__}"
            raise TypeError(f'precision: found {found}, expected a Precision, such as Precision(moments="int8")')
        size = self.bucket_mb
        if size is not None and not (size > 0 and math.isfinite(size) and round(size * 2**20) > 0):
            raise ValueError(f"bucket_mb: found {size!r}, expected None or a positive number of MiB, a byte at least")
        if self.update not in ("step", "backward"):
            raise ValueError(f"update: found {self.update!r}, expected 'step' or 'backward'")
        if self.update == "backward" and self.gradient_sync != "backward":
            raise ValueError(
                f'update="backward": found gradient_sync={self.gradient_sync!r}, expected "backward": other code reads '
                'p.grad after backward. Choose update="step", or gradient_sync="backward".'
            )
        if self.update == "backward" and self.max_grad_norm is not None:
            raise ValueError(
                f'update="backward": found max_grad_norm={self.max_grad_norm!r}, expected None: the norm is known only '
                'after backward. Choose update="step", or do not clip.'
            )
        if self.transport not in ("auto", "collective", "shared_memory"):
            raise ValueError(
                f"transport: found {self.transport!r}, expected 'auto', 'collective', 'shared_memory' or a Transport"
            )
        if self.ema_decay is not None:
            if isinstance(self.ema_decay, (bool, Tensor)):
                found = f"{self.ema_decay!r}, a {type(self.ema_decay).__name__}"
                raise TypeError(f"ema_decay: found {found}, expected None or a float, such as 0.999")
            _check_number("ema_decay", self.ema_decay, 0, 1)

    def claims(self) -> list[Claim]:
        """Return the options, which must be equal on all ranks, except for the directory of ``DiskOffload``."""
        return [Claim("the optimizer", field.name, repr(getattr(self, field.name))) for field in fields(self)]


def read_once(params: Any) -> Any:
    """Return ``params``, an iterator such as ``model.parameters()`` as a list.

    Raises:
        ValueError: the iterator yields nothing.
    """
    if not isinstance(params, Iterator):
        return params
    listed = list(params)
    if not listed:
        raise ValueError(
            "params: found an iterator that yields nothing, expected parameters. It may have been read before: "
            "model.parameters() and model.named_parameters() can be read once. Call them again, or keep a list."
        )
    return listed


def check_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError if a hyperparameter of a param group is invalid, or a parameter appears twice.

    Args:
        group: a param group; ``params`` may be missing.
        defaults: the optimizer's defaults, for hyperparameters that ``group`` does not have.
    """
    values = {**defaults, **group}
    lr = values["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: found a tensor of {lr.numel()} elements, expected a float or a tensor of one element")
    _check_number("lr", lr, 0)
    _check_number("eps", values["eps"], 0)
    _check_number("weight_decay", values["weight_decay"], 0)
    betas = values["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or any(isinstance(beta, Tensor) for beta in betas):
        raise ValueError(f"betas: found {betas!r}, expected two floats")
    for index, beta in enumerate(betas):
        _check_number(f"betas[{index}]", beta, 0, 1)
    if values["amsgrad"]:
        raise ValueError("amsgrad: found True, expected False: its third moment is not supported. Leave it False.")
    if values["differentiable"]:
        raise ValueError(
            "differentiable: found True, expected False: not supported, as the update runs in place. Leave it False."
        )
    parameters = group.get("params")
    if isinstance(parameters, (list, tuple)):
        _check_repeated(parameters)


def check_before_step(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise TypeError or ValueError if a hyperparameter has become something that would write NaN, or fail, in a step.

    Reads no tensor on a device: the host would wait. Does not check the sign of a learning rate, as schedulers may
    round below 0.
    """
    for index, group in enumerate(groups):
        try:
            for name in ("lr", "eps", "weight_decay"):
                _check_finite(name, group[name])
            betas = group["betas"]
            if not isinstance(betas, (tuple, list)) or len(betas) != 2:
                raise TypeError(f"betas: found {betas!r}, expected two floats")
            for position, beta in enumerate(betas):
                _check_number(f"betas[{position}]", beta, 0, 1)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"step(): param group {index}, {error}. Nothing has been written. Look for what has set it, such as a "
                "scheduler."
            ) from None


def check_limit(name: str, limit: Any) -> None:
    """Raise TypeError or ValueError unless ``limit`` is a number of 0 or more. Reads no tensor on a device."""
    _check_kind(name, limit)
    if not (isinstance(limit, Tensor) and limit.device.type != "cpu") and not bool(limit >= 0):
        raise ValueError(f"{name}: found {limit!r}, expected a number of 0 or more")


def _check_kind(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a real number: Python's, NumPy's, or a tensor of one element."""
    is_tensor = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if not (isinstance(value, (int, float)) or is_tensor or (isinstance(value, Real) and hasattr(value, "dtype"))):
        if isinstance(value, Tensor):
            found = f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
            raise TypeError(f"{name}: found {found}, expected a number, or a tensor of one")
        raise TypeError(f"{name}: found {value!r}, a {type(value).__name__}, expected a number")


def _check_finite(name: str, value: Any) -> None:
    _check_kind(name, value)
    if not (isinstance(value, Tensor) and value.device.type != "cpu") and not math.isfinite(value):
        raise ValueError(f"{name}: found {value!r}, expected a finite number")


def _check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raise TypeError unless ``value`` is a number, and ValueError unless ``low <= value < high``."""
    _check_kind(name, value)
    if not bool(low <= value) or not bool(value < high):
        expected = f"a finite number of {low} or more" if high == math.inf else f"at least {low} and less than {high}"
        raise ValueError(f"{name}: found {value!r}, expected {expected}")


def _check_repeated(parameters: Iterable[Any]) -> None:
    seen: dict[int, int] = {}
    for index, entry in enumerate(parameters):
        parameter = entry[1] if isinstance(entry, tuple) else entry
        if id(parameter) in seen:
            raise ValueError(
                f"A parameter appears twice in one param group, at positions {seen[id(parameter)]} and {index}. Give "
                "every parameter once; model.parameters() lists tied parameters once."
            )
        seen[id(parameter)] = index


def check_parameters(
    parameters: Sequence[NamedParameter],
    options: Options,
    transport: Transport,
    own_ranks: Mapping[int, frozenset[int]],
    taken: Sequence[Tensor] = (),
) -> None:
    """Raise if a trainable parameter cannot become a view of a flat buffer, or a frozen one cannot be broadcast.

    Args:
        parameters: new ones, trainable or frozen.
        options: say which dtypes are supported, and who averages gradients.
        transport: of the optimizer.
        own_ranks: by the index of a param group: the ranks of its own process group.
        taken: trainable parameters that the optimizer already has.

    Raises:
        ValueError, TypeError: names the parameter.
        RuntimeError: inference mode is enabled.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Found torch.inference_mode enabled, expected it disabled: tensors that are made under it cannot be "
            "trained. Build the optimizer outside of it."
        )
    common = ranks_of_transport(transport)
    checked: set[tuple[Any, ...]] = set()  # kinds of ordinary parameters that are valid
    for named in parameters:
        parameter, name = named.parameter, named.name
        kind = None  # of an ordinary parameter
        if parameter.requires_grad and type(parameter) is torch.nn.Parameter:
            kind = parameter.device, parameter.dtype, parameter.layout, parameter.is_inference()
            if kind in checked and parameter.is_contiguous():
                continue
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"Parameter {name!r} is not initialised yet, expected one with values. Run a forward of its lazy "
                "module before building the optimizer."
            )
        if parameter.device.type == "meta":
            raise ValueError(
                f"Parameter {name!r} is on the meta device, expected one with values. Materialise it first "
                '(module.to_empty(device="...")), and initialise it.'
            )
        if isinstance(parameter, FakeTensor):
            raise ValueError(
                f"Parameter {name!r} is a FakeTensor, expected one with values. Build the model outside of "
                "FakeTensorMode; shardadam plan computes memory without values."
            )
        check_device(f"Parameter {name!r}", parameter, transport, trains=parameter.requires_grad)
        ranks = own_ranks.get(named.group_index, common)
        if not parameter.requires_grad:
            _check_frozen(parameter, name, is_alone=transport.control is None)
            if placement.mesh_of(parameter) is not None:
                _check_placement(parameter, name, ranks, is_external=options.gradient_sync == "external")
            continue
        if parameter.is_inference():
            raise ValueError(
                f"Parameter {name!r} was made under torch.inference_mode, expected an ordinary tensor: autograd cannot "
                "train it. Build or load the model outside of it (torch.no_grad does not have this effect), or give "
                "the module a copy: nn.Parameter(p.detach().clone())."
            )
        _check_placement(parameter, name, ranks, is_external=options.gradient_sync == "external")
        if parameter.layout != torch.strided:
            raise TypeError(
                f"Parameter {name!r} has layout {parameter.layout}, expected a dense tensor (torch.strided). Do not "
                "pass it to the optimizer, or give the module a dense parameter."
            )
        options.precision.check_parameter(parameter.dtype, name)
        if not is_dense(named.local):
            raise ValueError(
                f"Parameter {name!r} has gaps or overlaps in memory (shape {tuple(named.local.shape)}, strides "
                f"{named.local.stride()}), expected a dense tensor. Give the module a parameter of its own: "
                "nn.Parameter(p.detach().clone())."
            )
        if kind is not None:
            checked.add(kind)
    parts_of([*(named.parameter for named in parameters), *taken], transport)
    _check_overlaps([*parameters, *(NamedParameter(p, "already in the optimizer", 0, 0) for p in taken)])


def _check_placement(parameter: Tensor, name: str, ranks: frozenset[int], *, is_external: bool) -> None:
    """Raise unless the parameter is an ordinary tensor, or a DTensor of which this rank can train its local tensor.

    Args:
        ranks: of the process group that reduces its gradients and splits its state.
    """
    mesh = placement.mesh_of(parameter)
    if mesh is None:
        if type(parameter) is not torch.nn.Parameter and is_traceable_wrapper_subclass(parameter):
            raise TypeError(
                f"Parameter {name!r} is a {type(parameter).__name__}, expected an ordinary tensor or a DTensor. Use "
                "torch.optim.AdamW for it."
            )
        return
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"Parameter {name!r} is on the mesh {mesh.mesh.tolist()}, which rank {dist.get_rank()} is not in, expected "
            "a mesh with this rank. Give the parameter only to the ranks that hold a part of it."
        )
    placements = placement.placements_of(parameter)
    if any(one.is_partial() for one in placements):
        raise ValueError(
            f"Parameter {name!r} has placements {tuple(placements)}, expected Shard and Replicate only: nobody holds "
            "its values. Redistribute it first."
        )
    if overlaps(parameter, ranks) and not (is_external and is_stored_elsewhere(parameter, ranks)):
        raise ValueError(
            f"Parameter {name!r} is a DTensor on ranks {sorted(placement.mesh_ranks(parameter))}, and process_group "
            f"has ranks {sorted(ranks)}, expected groups that share this rank only: the parts of a parameter are not "
            'copies of each other. Pass the data-parallel dimension of your mesh (process_group=mesh["dp"]). For '
            'parameters of fully_shard, which averages their gradients, also pass gradient_sync="external".'
        )


def overlaps(parameter: Tensor, ranks: frozenset[int]) -> bool:
    """Return whether other ranks of a group hold another part of a DTensor, or another copy of one."""
    return len(placement.mesh_ranks(parameter) & ranks) > 1


def is_stored_elsewhere(parameter: Tensor, ranks: frozenset[int]) -> bool:
    """Return whether a DTensor lies along the data-parallel ``ranks``: ``fully_shard`` stores its local tensor then."""
    mesh = placement.mesh_of(parameter)
    if mesh is None:
        return False
    along = [placement.ranks_along(mesh, dim) for dim in range(mesh.ndim)]
    # A dimension of one rank lies along every group: it is data-parallel only if the group is that rank.
    return any(one <= ranks and len(one) >= min(2, len(ranks)) for one in along)


def parts_of(parameters: Iterable[Tensor], transport: Transport) -> frozenset[int]:
    """Return the ranks, with this one, that hold different parts of DTensors for the same data; empty if none do.

    Raises:
        ValueError: they are not the same for all DTensors.
    """
    data_parallel = ranks_of_transport(transport)
    found = {placement.ranks_outside(mesh, data_parallel) for mesh in map(placement.mesh_of, parameters) if mesh}
    largest = max(found, key=len, default=frozenset())
    if any(not one <= largest for one in found):
        raise ValueError(
            f"Found DTensors on meshes of the ranks {sorted(map(sorted, found))}, expected one mesh of all model-"
            "parallel ranks, or parts of it. Build all meshes from one DeviceMesh."
        )
    return largest if len(largest) > 1 else frozenset()


def model_parallel_ranks(
    group: dist.ProcessGroup | DeviceMesh | None, parameters: Sequence[NamedParameter], transport: Transport
) -> list[int]:
    """Return the ranks of ``model_parallel_group``, ascending; without one, those along the meshes of DTensors. Local.

    Raises:
        ValueError: they are not those of the DTensors, or share other ranks than this one with the data-parallel group.
    """
    parts = parts_of([named.parameter for named in parameters], transport)
    if group is None:
        return sorted(parts)
    ranks = ranks_of("model_parallel_group", group)
    data_parallel = ranks_of_transport(transport)
    if len(data_parallel.intersection(ranks)) > 1:
        raise ValueError(
            f"model_parallel_group: found ranks {ranks}, and process_group has ranks {sorted(data_parallel)}, "
            "expected groups that share this rank only: data-parallel ranks hold copies of one part of the model, "
            "model-parallel ranks hold different parts of one copy. Pass other dimensions of your mesh."
        )
    if not parts.issubset(ranks):
        raise ValueError(
            f"model_parallel_group: found ranks {ranks}, expected also those that hold other parts of DTensor "
            f"parameters (ranks {sorted(parts)})."
        )
    return ranks


def check_parts(parameters: Sequence[Tensor], job: Job, transport: Transport) -> None:
    """Raise ValueError if new DTensors have parts on ranks that are not model-parallel ranks of the optimizer."""
    parts = parts_of(parameters, transport)
    known = frozenset() if job.model_parallel is None else ranks_of_transport(job.model_parallel)
    if not parts <= known:
        raise ValueError(
            f"add_param_group: found DTensors on the model-parallel ranks {sorted(parts)}, expected them among "
            f"those that the optimizer was built with ({sorted(known) or 'none'}). Pass model_parallel_group to its "
            "constructor."
        )


def check_own_group(
    index: int, ranks: Sequence[int] | None, divisor: Any, options: Options, transport: Transport
) -> None:
    """Raise ValueError or TypeError if a param group's own process group or gradient divisor is invalid. Local.

    Args:
        index: of the param group.
        ranks: of its process group; None if it has none.
        divisor: of its gradients; None if it has none.
    """
    common = ranks_of_transport(transport)
    if ranks is not None and not common.issuperset(ranks):
        raise ValueError(
            f"Param group {index}, process_group: found ranks {list(ranks)}, expected some of the optimizer's process "
            f"group (ranks {sorted(common)}): the ranks that hold the same experts."
        )
    if divisor is None:
        return
    _check_kind("gradient_divisor", divisor)
    if options.gradient_sync == "external":
        raise ValueError(
            f'Param group {index}, gradient_divisor: found {divisor!r}, expected none with gradient_sync="external": '
            "other code averages the gradients."
        )
    if not (divisor > 0 and math.isfinite(divisor)):
        raise ValueError(f"Param group {index}, gradient_divisor: found {divisor!r}, expected a positive number")


def check_partition(index: int, groups: Sequence[Sequence[int] | None], ranks: Sequence[int]) -> None:
    """Raise ValueError unless every member of a param group's process groups names the same ranks. On all ranks alike.

    Args:
        index: of the param group.
        groups: by position in ``ranks``: the ranks of the process group that this rank gives.
    """
    for rank, group in zip(ranks, groups, strict=True):
        for other in () if group is None else group:
            theirs = groups[list(ranks).index(other)]
            if theirs != group:
                raise ValueError(
                    f"Param group {index}, process_group: rank {rank} gives the ranks {group}, rank {other} gives "
                    f"{theirs}, expected the same from both: ranks that share an expert hold the same ones, and each "
                    "expert is in one group. Build the groups from one DeviceMesh."
                )


def check_device(what: str, tensor: Tensor, transport: Transport, *, trains: bool = False) -> None:
    """Raise ValueError if the process group cannot move ``tensor``, or ``trains`` and it has no backend for gradients.

    Without a backend for the CPU, what does not train there is sent over Gloo.
    """
    devices = transport.devices
    if trains and transport.trainable_devices is not None:
        devices = transport.trainable_devices
    if devices is None or tensor.device.type in devices:
        return
    remedy = 'or give the process group a backend for both, such as init_process_group("cpu:gloo,cuda:nccl")'
    if not dist.is_gloo_available():
        remedy = "or install a build of PyTorch that has Gloo, which sends tensors on the CPU"
    raise ValueError(
        f"{what} is on {tensor.device}, expected a device that the process group has a backend for: "
        f"{', '.join(sorted(devices))}. Move it there, {remedy}."
    )


def _check_frozen(parameter: Tensor, name: str, *, is_alone: bool) -> None:
    """Raise TypeError if rank 0's values of a frozen parameter cannot be broadcast."""
    if parameter.layout != torch.strided:
        kind = f"layout {parameter.layout}"
    elif is_alone:
        return
    elif is_traceable_wrapper_subclass(parameter) and placement.mesh_of(parameter) is None:
        kind = f"type {type(parameter).__name__}"
    elif parameter.is_quantized:
        kind = f"dtype {parameter.dtype}"
    else:
        return
    raise TypeError(
        f"Parameter {name!r} is frozen and has {kind}, expected a dense, ordinary tensor: rank 0's values of all "
        "parameters are broadcast. Do not pass it to the optimizer: [p for p in model.parameters() if p.requires_grad]."
    )


def _check_overlaps(parameters: Sequence[NamedParameter]) -> None:
    """Raise ValueError if a trainable parameter shares memory with another one.

    Only one of them would move into the flat buffer, and the other would keep its old values.
    """
    extents: dict[torch.device, list[tuple[int, int, int]]] = {}  # start, stop, and position among the parameters
    for position, named in enumerate(parameters):
        local = named.local
        if local.numel() > 0:
            start = local.data_ptr()
            extents.setdefault(local.device, []).append((start, start + local.nbytes, position))
    for on_device in extents.values():
        on_device.sort()
        for (_, stop, position), (start, _, next_position) in pairwise(on_device):
            if start >= stop:
                continue
            one, other = parameters[position], parameters[next_position]
            if one.parameter.requires_grad or other.parameter.requires_grad:
                raise ValueError(
                    f"Parameters {one.name!r} and {other.name!r} are different tensors over the same memory, expected "
                    "one tensor or separate memory. To tie them, assign one nn.Parameter to both modules."
                )
