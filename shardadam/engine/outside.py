# SPDX-License-Identifier: Apache-2.0
"""Averages gradients of parameters that another optimizer trains, as DistributedDataParallel would.

``ShardedAdam`` averages the gradients of its own parameters only. Without DDP, those of all other parameters (of Muon,
of an adapter, of torch.optim.SparseAdam) are each rank's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakTensorKeyDictionary

from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.sums.to_device import send
from shardadam.transport import ReduceScatter, Transport, placement
from shardadam.transport.base import own_slice, scale_for_mean_

_CHUNK_NUMEL = 1 << 21
_averaged: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def is_averaged(parameter: Tensor) -> bool:
    """Return whether ``average_gradients`` has been called with the parameter."""
    return parameter in _averaged


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], transport: Transport) -> None:
    """Average ``p.grad`` of the parameters over all ranks, in place. Collective.

    Args:
        parameters: the same on all ranks. Where only some ranks have a gradient, the others count as zeros and get one.
    """
    for parameter in parameters:
        _averaged[parameter] = True
    ranks = transport.world_size * transport.replicas
    if ranks == 1 or not parameters:
        return
    dense: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter, sparse_dim in zip(parameters, _agree(parameters, transport), strict=True):
        if sparse_dim is None:
            continue  # no rank has a gradient
        if parameter.grad is None:
            parameter.grad = _zeros(parameter, sparse_dim)
        if sparse_dim:
            _average_sparse(parameter, transport)
        else:
            gradient = placement.local_gradient(parameter)
            assert gradient is not None
            dense.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for gradients in dense.values():
        for chunk in _chunks(gradients):
            _average(chunk, transport)


def square_of(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the squared norm of gradients, those of DTensors whole: 0-dim float64. Collective over their meshes."""
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(placement.mesh_of(gradient), []).append(gradient)
    square = torch.zeros((), dtype=torch.float64, device=device)
    for some in by_mesh.values():
        square += placement.whole(torch.nn.utils.get_total_norm(some)).double().square().to(device)
    return square


def _agree(parameters: Sequence[Tensor], transport: Transport) -> list[int | None]:
    """Return the number of sparse dimensions of each gradient, 0 if it is dense; None if no rank has one. Collective.

    Waits for the device only if this rank lacks a gradient.
    """
    mine = [None if p.grad is None else p.grad.sparse_dim() if p.grad.is_sparse else 0 for p in parameters]
    values = [value for dim in mine for value in (dim is not None, dim or 0)]
    block = send(values, torch.float64, parameters[0].device)
    transport.all_reduce(block).wait()
    if None not in mine:
        return list(mine)
    return [round(total / count) if count else None for count, total in block.view(-1, 2).tolist()]


def _zeros(parameter: Tensor, sparse_dim: int) -> Tensor:
    """Return a gradient of zeros, as peers have one."""
    if sparse_dim == 0:
        return torch.zeros_like(parameter)
    indices = torch.empty(sparse_dim, 0, dtype=torch.int64, device=parameter.device)
    values = parameter.new_empty(0, *parameter.shape[sparse_dim:])
    return torch.sparse_coo_tensor(
        indices, values, parameter.shape, device=values.device, is_coalesced=True, check_invariants=False
    )


def _chunks(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the gradients in lists of about ``_CHUNK_NUMEL`` elements."""
    chunk: list[Tensor] = []
    numel = 0
    for gradient in gradients:
        chunk.append(gradient)
        numel += gradient.numel()
        if numel >= _CHUNK_NUMEL:
            yield chunk
            chunk, numel = [], 0
    if chunk:
        yield chunk


def _average(gradients: Sequence[Tensor], transport: Transport) -> None:
    """Replace gradients of one dtype and device by their means: summed in float32, or in float64 for float64."""
    first = gradients[0]
    numel = sum(gradient.numel() for gradient in gradients)
    numel = math.ceil(numel / (transport.world_size * ALIGNMENT_NUMEL)) * transport.world_size * ALIGNMENT_NUMEL
    if numel == 0:
        return
    sums = torch.empty(numel, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
    staging = transport.allocate_staging(numel, first.dtype, first.device)
    _copy(gradients, staging.send, to_flat=True)
    scale = scale_for_mean_(staging.send, transport.world_size * transport.replicas)
    shard = torch.empty_like(own_slice(sums, transport.rank, transport.world_size))
    request = ReduceScatter(staging, numel, shard, scale=scale, accumulate=False)
    reduced = transport.reduce_scatter(request)
    reduced.wait()
    own_slice(sums, transport.rank, transport.world_size).copy_(shard)
    gathered = transport.all_gather(sums)
    gathered.wait()
    _copy(gradients, sums, to_flat=False)
    reduced.await_release()
    gathered.await_release()
    transport.free_staging(staging)


def _copy(gradients: Sequence[Tensor], flat: Tensor, *, to_flat: bool) -> None:
    start = 0
    for gradient in gradients:
        part = flat[start : start + gradient.numel()].view(gradient.shape)
        if to_flat:
            part.copy_(gradient)
        else:
            gradient.copy_(part)
        start += gradient.numel()
    if to_flat:
        flat[start:].zero_()


def _average_sparse(parameter: Tensor, transport: Transport) -> None:
    """Average a sparse COO gradient, with one dense tensor of the parameter's size as scratch memory. Collective."""
    gradient = parameter.grad
    assert gradient is not None
    gradient = gradient.coalesce()
    dense = gradient.to_dense()
    rows = torch.zeros(gradient.shape[: gradient.sparse_dim()], dtype=dense.dtype, device=dense.device)
    rows[tuple(gradient.indices())] = 1
    _average([dense], transport)
    _average([rows], transport)
    indices = rows.nonzero().t()
    parameter.grad = torch.sparse_coo_tensor(
        indices,
        dense[tuple(indices)],
        gradient.shape,
        device=dense.device,
        is_coalesced=True,
        check_invariants=False,
    )
