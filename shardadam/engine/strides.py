# SPDX-License-Identifier: Apache-2.0
"""Tensors in the order of their memory, whatever their strides. Imports nothing of the project."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Return True if the elements fill a range of memory without gaps or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def unrepeated(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without dimensions that repeat the same memory (``expand``), which torch does not write to."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor`` in one dimension, in the memory order of ``like``; a view if its strides allow one.

    Its memory holds its values: a lazy negation (``torch.Tensor.is_neg``) is carried out.
    """
    tensor = tensor.resolve_neg()
    if not same_order(tensor.stride(), like.stride(), like.shape):
        ordered = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
        tensor = ordered.copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def same_order(one: tuple[int, ...], other: tuple[int, ...], shape: torch.Size) -> bool:
    """Return True if strides are equal, except in dimensions of size 1, where they mean nothing."""
    return one == other or all(a == b for a, b, size in zip(one, other, shape, strict=True) if size != 1)
