# SPDX-License-Identifier: Apache-2.0
"""Copies a bucket's gradients into staging, converting them to its dtype."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from shardadam.engine.profiling import record
from shardadam.engine.reduction.base import gradient_error
from shardadam.engine.storage import FlatBucket
from shardadam.engine.strides import memory_order

_LONG_BYTES = 1 << 16
_NOTHING: dict[int, Tensor | None] = {}


def copy_in(
    bucket: FlatBucket, send: Tensor, used: list[bool], instead: Mapping[int, Tensor | None] = _NOTHING
) -> str | None:
    """Write the bucket's gradients to ``send``, and zeros for absent gradients and padding.

    Args:
        send: 1-D, at least ``bucket.numel`` long.
        used: by param index; set to True where there is a gradient.
        instead: by param index: gradients to take in place of those in ``p.grad``.

    Returns:
        An error if a gradient is sparse or has another shape than its parameter; it counts as absent.
    """
    error = None
    with record("copy_in"):
        targets: list[Tensor] = []
        gradients: list[Tensor] = []
        zeros = [send[start:stop] for start, stop in bucket.plan.gaps]
        for param, segment in bucket.segments:
            target = send[segment.offset : segment.offset + segment.numel]
            if param.index in instead:
                gradient = instead[param.index]
            elif (found := gradient_error(param)) is not None:
                error, gradient = error or found, None
            else:
                gradient = param.gradient
            if gradient is None:
                zeros.append(target)
                continue
            used[param.index] = True
            targets.append(target)
            gradients.append(memory_order(gradient, param.local)[segment.start : segment.start + segment.numel])
        has_all = len(zeros) == len(bucket.plan.gaps)
        if send.is_cuda and has_all and all(gradient.dtype == send.dtype for gradient in gradients):
            _concatenate(targets, gradients, zeros, out=send[: bucket.numel])
            return error
        if send.device.type == "cpu":
            targets, gradients = _copy_long(targets, gradients)
        if targets:
            torch._foreach_copy_(targets, gradients)
        if zeros:
            torch._foreach_zero_(zeros)
    return error


def _copy_long(targets: list[Tensor], gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Copy the long ones of one dtype by memmove, which unlike torch does not read targets first; return the others."""
    left: tuple[list[Tensor], list[Tensor]] = ([], [])
    for target, gradient in zip(targets, gradients, strict=True):
        if gradient.dtype == target.dtype and target.nbytes >= _LONG_BYTES and gradient.is_contiguous():
            ctypes.memmove(target.data_ptr(), gradient.data_ptr(), target.nbytes)
        else:
            left[0].append(target)
            left[1].append(gradient)
    return left


def _concatenate(targets: list[Tensor], gradients: list[Tensor], zeros: list[Tensor], *, out: Tensor) -> None:
    """Copy gradients to their targets, and write zeros, in one launch: the targets and ``zeros`` make up ``out``.

    A foreach copy makes a launch for every 21 million elements, and another one for the zeros.
    """
    pieces = [(target.storage_offset(), gradient) for target, gradient in zip(targets, gradients, strict=True)]
    if zeros:
        padding = torch.zeros(max(zero.numel() for zero in zeros), dtype=out.dtype, device=out.device)
        pieces += [(zero.storage_offset(), padding[: zero.numel()]) for zero in zeros]
    ordered = sorted((offset, index) for index, (offset, piece) in enumerate(pieces) if piece.numel() > 0)
    torch.cat([pieces[index][1] for _, index in ordered], out=out)


@contextmanager
def joined_streams(streams: set[torch.cuda.Stream] | None, device: torch.device) -> Iterator[None]:
    """Context manager: make the current stream of ``device`` wait for ``streams``, and at the end, them for it.

    Gradients may have been computed on several streams, and the copy must wait for all of them. They must wait for the
    copy: memory that is freed after it belongs again to the stream that allocated it, which may reuse it at once.
    """
    if streams is None:
        yield
        return
    current = torch.cuda.current_stream(device)
    others = streams - {current}
    for stream in others:
        current.wait_stream(stream)
    yield
    for stream in others:
        stream.wait_stream(current)
