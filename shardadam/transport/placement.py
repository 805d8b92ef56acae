# SPDX-License-Identifier: Apache-2.0
"""Where a parameter lies on the ranks of a model-parallel mesh. Everything behind ``ShardedParam`` sees local tensors.

A DTensor (tensor parallelism, ``fully_shard``) holds a part of a parameter on each rank: its local tensor, which is one
box of the whole. A plain tensor is its own local tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from shardadam.state.flat_shard import Runs, runs_of_whole


class Box(NamedTuple):
    """The elements ``whole[offset[0] : offset[0] + shape[0], ...]`` of a tensor of ``global_shape``."""

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        return self.shape == self.global_shape


def local_tensor(tensor: Tensor) -> Tensor:
    """Return what this rank holds of ``tensor``: itself, or the local tensor of a DTensor. Writes change ``tensor``."""
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor._local_tensor
    wait = getattr(local, "wait", None)  # an AsyncCollectiveTensor, which a collective is still writing
    return local if wait is None else wait()


def local_gradient(parameter: Tensor) -> Tensor | None:
    """Return what this rank holds of ``parameter.grad``, placed as the parameter is.

    A gradient with other placements (Partial under SequenceParallel) is redistributed first, in ``parameter.grad``:
    collective then, over the mesh of the parameter.
    """
    gradient = parameter.grad
    if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
        return gradient
    if gradient.placements != parameter.placements:
        with torch.no_grad():
            gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
    return local_tensor(gradient)


def like(parameter: Tensor, local: Tensor) -> Tensor:
    """Return ``local``, of the shape of the local tensor, as a tensor that is placed like ``parameter``."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def whole(tensor: Tensor) -> Tensor:
    """Return all elements of a DTensor on every rank of its mesh (collective over it); a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def box_of(tensor: Tensor) -> Box:
    """Return where the local tensor lies in the whole.

    Raises:
        ValueError: it is not one box.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Box(shape, (0,) * len(shape), shape)
    return _box_at(shape, _runs_at(*_where(tensor)), tuple(tensor.placements))


def runs_of(tensor: Tensor) -> Runs:
    """Return where the local tensor lies in the whole. It is one box if it has one run in each dimension.

    Several are placed by ``_StridedShard``, as in the columns of fused projections.
    """
    if not isinstance(tensor, DTensor):
        return runs_of_whole(tensor.shape)
    return _runs_at(*_where(tensor))


def runs_of_mesh(tensor: Tensor) -> list[Runs]:
    """Return the different results of ``runs_of``, but no empty ones, on all ranks of a DTensor's mesh, ascending."""
    if not isinstance(tensor, DTensor):
        return [runs_of(tensor)]
    shape, placements, mesh_shape, _ = _where(tensor)
    found = {_runs_at(shape, placements, mesh_shape, one) for one in product(*map(range, mesh_shape))}
    return sorted(runs for runs in found if all(of_dim[0][1] > 0 for of_dim in runs))


def _where(tensor: DTensor) -> tuple[tuple[int, ...], tuple[Placement, ...], tuple[int, ...], tuple[int, ...]]:
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return tuple(tensor.shape), tuple(tensor.placements), tuple(tensor.device_mesh.shape), tuple(coordinate)


@lru_cache(maxsize=4096)
def _runs_at(
    shape: tuple[int, ...], placements: tuple[Placement, ...], mesh_shape: tuple[int, ...], coordinate: tuple[int, ...]
) -> Runs:
    indices = [_along(dim, torch.arange(size, device="cpu"), len(shape)) for dim, size in enumerate(shape)]
    for mesh_dim, one in enumerate(placements):
        dim = getattr(one, "dim", None)
        if dim is not None:
            parts, _ = one._split_tensor(  # type: ignore[attr-defined]
                indices[dim], mesh_shape[mesh_dim], with_padding=False, contiguous=False
            )
            indices[dim] = parts[coordinate[mesh_dim]]
    return tuple(_runs(part.flatten()) for part in indices)


def _runs(indices: Tensor) -> tuple[tuple[int, int], ...]:
    """Return offset and length of the runs of successive ``indices``; an empty one if there are no indices."""
    if len(indices) == 0:
        return ((0, 0),)
    ends = (indices.diff() != 1).nonzero().flatten().add(1).tolist()
    return tuple((int(indices[start]), stop - start) for start, stop in pairwise([0, *ends, len(indices)]))


def _box_at(shape: tuple[int, ...], runs: Runs, placements: Sequence[Placement]) -> Box:
    if any(len(of_dim) > 1 for of_dim in runs):
        raise ValueError(
            f"found a local tensor of separate parts of the whole (placements {placements}), expected one part"
        )
    return Box(shape, tuple(offset for ((offset, _),) in runs), tuple(size for ((_, size),) in runs))


def _along(dim: int, values: Tensor, ndim: int) -> Tensor:
    """Return ``values`` along ``dim`` of a tensor of ``ndim`` dimensions."""
    return values.view([-1 if other == dim else 1 for other in range(ndim)])


def part_of(tensor: Tensor) -> str:
    """Return which part of a DTensor this rank holds, as text: its coordinates in the mesh, and the mesh's shape."""
    mesh = mesh_of(tensor)
    return "the whole" if mesh is None else f"{mesh.get_coordinate()} of a mesh of {tuple(mesh.shape)}"


def placements_of(tensor: Tensor) -> Sequence[Placement]:
    """Return the placements of a DTensor, and none of a plain tensor."""
    return tensor.placements if isinstance(tensor, DTensor) else ()


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def mesh_ranks(tensor: Tensor) -> frozenset[int]:
    """Return the ranks of the default group that hold parts of a DTensor; none of a plain tensor."""
    mesh = mesh_of(tensor)
    return frozenset() if mesh is None else frozenset(mesh.mesh.flatten().tolist())


def copies_of(tensor: Tensor) -> int:
    """Return how many ranks of its mesh hold each element; 1 for a plain tensor."""
    copies = 1
    for dim, placement in enumerate(placements_of(tensor)):
        if placement.is_replicate():
            mesh = mesh_of(tensor)
            assert mesh is not None
            copies *= mesh.size(dim)
    return copies


def is_first_copy(tensor: Tensor) -> bool:
    """Return whether this rank is the first of those of its mesh that hold the same elements."""
    mesh = mesh_of(tensor)
    if mesh is None:
        return True
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return all(coordinate[dim] == 0 for dim, placement in enumerate(placements_of(tensor)) if placement.is_replicate())


def ranks_outside(mesh: DeviceMesh, ranks: frozenset[int]) -> frozenset[int]:
    """Return the ranks of ``mesh`` that differ from this one along its dimensions outside of ``ranks``."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    outside = [dim for dim in range(mesh.ndim) if not ranks_along(mesh, dim) <= ranks]
    index = tuple(slice(None) if dim in outside else position for dim, position in enumerate(coordinate))
    return frozenset(mesh.mesh[index].flatten().tolist())


def ranks_along(mesh: DeviceMesh, dim: int) -> frozenset[int]:
    """Return the ranks of ``mesh`` that differ from this one along ``dim`` at most."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    index = tuple(slice(None) if other == dim else position for other, position in enumerate(coordinate))
    return frozenset(mesh.mesh[index].tolist())
