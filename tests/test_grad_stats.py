# SPDX-License-Identifier: Apache-2.0
"""Statistics of gradients that lie in pieces of any length: finite or not, and their sum of squares."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from shardadam.sums.stats import GradStats, are_finite, is_within, sum_of_squares

CPU = torch.device("cpu")
LENGTHS = [(5,), (0, 300, 7, 1), (40_000,), (129, 70_003, 0, 600_001)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pieces_of(lengths: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(length, generator=random).to(dtype) for length in lengths]


def measured(pieces: list[torch.Tensor], *, with_squares: bool, scale: float = 1.0) -> GradStats:
    stats = GradStats(with_squares=with_squares, scale=scale)
    stats.update_pieces(pieces)
    return stats


@pytest.mark.parametrize(("lengths", "dtype"), [*itertools.product(LENGTHS, DTYPES)], ids=str)
def test_sums_of_squares_of_pieces_are_those_of_all(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    pieces = pieces_of(lengths, dtype)
    expected = torch.cat(pieces).double().square().sum() / 9
    found = sum_of_squares([measured(pieces, with_squares=True, scale=1 / 3)], CPU)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    assert bool(are_finite([measured(pieces, with_squares=False)], CPU))


@pytest.mark.parametrize("with_squares", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_element_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, value: float, with_squares: bool) -> None:
    for lengths in LENGTHS:
        for index, length in enumerate(lengths):
            for position in {0, length // 2, length - 1} if length else ():
                pieces = pieces_of(lengths, dtype)
                pieces[index][position] = value
                assert not bool(are_finite([measured(pieces, with_squares=with_squares)], CPU)), (lengths, position)


@pytest.mark.parametrize("with_squares", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_large_numbers_whose_squares_overflow_are_finite(dtype: torch.dtype, with_squares: bool) -> None:
    for length in (7, 40_000):
        pieces = [torch.full((length,), 0.9 * torch.finfo(dtype).max, dtype=dtype)]
        assert bool(are_finite([measured(pieces, with_squares=with_squares)], CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_element_must_be_within_the_limit(dtype: torch.dtype) -> None:
    """The norm tells of small gradients; where it does not, as of many elements near the limit, their extremes do."""
    many = torch.full((300,), 4.0, dtype=dtype)
    assert is_within(many, 4.0) and is_within(-many, 4.0) and is_within(many / 1024, 4.0)
    for wrong in (4.5, -4.5, 1e4, torch.inf, -torch.inf, torch.nan):
        one = many.clone()
        one[7] = wrong
        assert not is_within(one, 4.0)
    largest = torch.full((2,), torch.finfo(dtype).max, dtype=dtype)  # its squares overflow
    assert is_within(largest, torch.finfo(dtype).max) and not is_within(largest, torch.finfo(dtype).max / 4)
