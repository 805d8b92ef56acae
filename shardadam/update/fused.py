# SPDX-License-Identifier: Apache-2.0
"""torch's own fused Adam(W) on the runs of one shard, for the CPU and for any device without a kernel of ours.

Where moments and weights are stored as they are, it works on them in place. Other formats are decoded into float32,
updated and encoded again, a stretch at a time that stays in cache. On the CPU the host may look at values: the common
case is then done in few passes, and ``reference`` does the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardadam.chunks import chunks, sum_chunk_
from shardadam.layout import ALIGNMENT_NUMEL, Bucket, Run
from shardadam.update import reference
from shardadam.update.runs import RunTable
from shardadam.update.shard import Counters, Shard, Sources

_LARGEST_BFLOAT16 = 3.3895e38


class FusedUpdate:
    """An ``Update`` by way of torch's kernel."""

    needs_host_used = True

    def __init__(self, counters: Counters, *, seed: int, rank: int) -> None:
        self._counters = counters
        self._seed = seed
        self._runs = RunTable(rank, len(counters.steps))
        self._on_cpu = counters.steps.device.type == "cpu"
        self._limits: Tensor | None = None
        self._keys: Tensor | None = None

    def begin(
        self,
        *,
        found_inf: Tensor,
        used: Tensor,
        host_used: Sequence[bool] | None,
        coefficient: Tensor | None,
        hyperparameters: Mapping[str, Any],
    ) -> None:
        counters = self._counters
        if host_used is not None and not all(host_used):
            self._runs.advance(host_used)
        self._host_used = host_used
        self._found_inf = None if self._on_cpu else found_inf
        self._skip = self._on_cpu and bool(found_inf)
        self._coefficient = coefficient
        self._hyperparameters = hyperparameters
        # What the step needs of the counters as they were, before they advance.
        self._limits = counters.bounds.sqrt().float()
        self._keys = None
        taken = used & (found_inf == 0)
        counters.steps.add_(taken)
        after = _bounds_after(counters.bounds, hyperparameters["betas"])
        counters.bounds.copy_(torch.where(taken, after, counters.bounds))

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in (self._limits, self._keys) if flat is not None)

    def reload(self) -> None:
        self._runs.load(zip(self._counters.steps.tolist(), self._counters.bounds.tolist(), strict=True))

    def update_(self, shard: Shard, bucket: Bucket, sources: Sources | None = None) -> None:
        runs = self._runs.runs(bucket, self._host_used)
        if not runs or self._skip:
            return
        if sources is not None:
            self._update_from_(sources, shard, runs)
            return
        if not shard.is_coded:
            flats = (shard.parameter, shard.gradient, shard.exp_avg, shard.exp_avg_sq)
            lists = ([flat[run.start : run.stop] for run in runs] for flat in flats)
            self._adam_(*lists, runs=runs, grad_scale=None if self._coefficient is None else 1 / self._coefficient)
            return
        for run in runs:
            for chunk in chunks(run.start, run.stop, shard.parameter.device):
                self._step_coded_(shard.part(chunk), run)

    def _update_from_(self, sources: Sources, shard: Shard, runs: Sequence[Run]) -> None:
        """Sums and steps a stretch at a time: the sum never leaves the cache."""
        scale = None if self._coefficient is None else 1 / self._coefficient
        scratch = shard.exp_avg.new_empty(0)
        for run in runs:
            for chunk in chunks(run.start, run.stop, shard.parameter.device):
                numel = chunk.stop - chunk.start
                if scratch.numel() < numel:
                    scratch = torch.empty(numel, dtype=shard.gradient.dtype, device=shard.gradient.device)
                gradient = scratch[:numel]
                sum_chunk_(gradient, [source[chunk] for source in sources.slices], scale=sources.scale)
                if shard.is_coded:
                    self._step_coded_(shard.part(chunk, gradient), run)
                else:
                    flats = (shard.parameter, shard.exp_avg, shard.exp_avg_sq)
                    weight, m, v = (flat[chunk] for flat in flats)
                    self._adam_([weight], [gradient], [m], [v], runs=[run], grad_scale=scale)

    def _adam_(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        *,
        runs: Sequence[Run],
        grad_scale: Tensor | None = None,
    ) -> None:
        group = self._hyperparameters
        beta1, beta2 = group["betas"]
        kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        kernel(
            weights,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            [self._counters.steps[run.parameter] for run in runs],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
            grad_scale=grad_scale,
            found_inf=self._found_inf,
        )

    def _step_coded_(self, shard: Shard, run: Run) -> None:
        """One step on a stretch that is not stored as it is worked on."""
        random = self._random_words(shard) if shard.is_random else None
        weight = _read_weight(shard)
        if shard.exp_avg_scale is not None:
            assert self._limits is not None
            m, v = _decode_moments(shard, self._limits[run.parameter])
        else:
            m, v = shard.exp_avg.to(weight.dtype), shard.exp_avg_sq.to(weight.dtype)
        gradient = shard.gradient if self._coefficient is None else shard.gradient * self._coefficient

        self._adam_([weight], [gradient], [m], [v], runs=[run])

        self._write_weight(shard, weight, random)
        self._write_moments(shard, m, v, random)

    def _random_words(self, shard: Shard) -> Tensor:
        """32 random bits an element, int32, as ``reference.random_bits`` has them."""
        counters = self._counters
        if self._keys is None:
            key = reference.mix((self._seed + 0x9E3779B9) & 0xFFFFFFFF)
            keys = reference.mix(key + counters.steps.long() & 0xFFFFFFFF)
            self._keys = reference.mix(keys + counters.places & 0xFFFFFFFF).to(torch.int32)  # type: ignore[union-attr]
        owners = shard.blocks.long()
        blocks = torch.arange(shard.first_block, shard.first_block + len(owners), device=owners.device)
        starts = ((blocks - counters.first_blocks[owners]) * ALIGNMENT_NUMEL).to(torch.int32)
        lanes = torch.arange(ALIGNMENT_NUMEL, dtype=torch.int32, device=owners.device)
        words = starts[:, None] + lanes
        words ^= self._keys[owners][:, None]
        return _mix_(words.flatten())

    def _write_weight(self, shard: Shard, weight: Tensor, random: Tensor | None) -> None:
        dtype = shard.parameter.dtype
        if dtype == weight.dtype:
            return
        if shard.remainder is not None:
            if self._found_inf is None and dtype == torch.bfloat16 and _is_finite(weight):
                shard.parameter.copy_(_ties_away(weight))
                shard.remainder.copy_(weight.view(torch.int32))
                return
            parameter, remainder = reference.split(weight, dtype)
            self._store_(shard.remainder, remainder)
        elif shard.master is not None:
            parameter = round_half_away(weight, dtype)
        else:
            assert random is not None
            second = _mix_(random + (0x9E3779B9 - 2**32))
            parameter = _round_stochastically(weight, dtype, second.bitwise_and_(0xFFFF))
        self._store_(shard.parameter, parameter)

    def _write_moments(self, shard: Shard, m: Tensor, v: Tensor, random: Tensor | None) -> None:
        if m is shard.exp_avg:
            return
        assert random is not None
        low, high = random & 0xFFFF, random.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        if shard.exp_avg_scale is None or shard.exp_avg_sq_scale is None:
            self._store_(shard.exp_avg, _round_stochastically(m, shard.exp_avg.dtype, low))
            self._store_(shard.exp_avg_sq, _round_stochastically(v, shard.exp_avg_sq.dtype, high))
            return
        codes, scale = _encode_root(m.abs(), reference.LARGEST_M, low)
        self._store_(shard.exp_avg, codes.copysign_(m))
        self._store_(shard.exp_avg_scale, scale)
        root = v.sqrt_().clamp_(max=reference.LARGEST_ROOT)
        codes, scale = _encode_root(root, reference.LARGEST_V, high)
        self._store_(shard.exp_avg_sq, torch.maximum(codes, root.sign_()))
        self._store_(shard.exp_avg_sq_scale, scale)

    def _store_(self, target: Tensor, value: Tensor) -> None:
        if self._found_inf is None:
            target.copy_(value)
        else:
            target.copy_(torch.where(self._found_inf > 0, target, value.to(target.dtype)))


def _bounds_after(bounds: Tensor, betas: tuple[float, float]) -> Tensor:
    """``reference.bound_squared_after`` of many parameters."""
    beta1, beta2 = betas
    if beta1 == 0:
        kept = torch.zeros_like(bounds)
    elif beta2 == 0:
        kept = torch.where(bounds > 0, math.inf, 0.0)
    else:
        kept = beta1**2 / beta2 * bounds
    return kept + (1 - beta1) ** 2 / (1 - beta2)


# Each of these equals what ``reference`` has under its name.


def _read_weight(shard: Shard) -> Tensor:
    """The exact weight: in place where it is stored as such."""
    parameter = shard.parameter
    if shard.master is not None:
        adopt_written_(shard.master, parameter)
        return shard.master
    if shard.remainder is None:
        return parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    if parameter.dtype == torch.bfloat16:
        master = parameter.float().view(torch.int32).add_(shard.remainder).view(torch.float32)
        if _is_finite(master):
            return master
    return reference.join(parameter, shard.remainder)


def adopt_written_(master: Tensor, parameter: Tensor) -> None:
    """Where ``master`` does not round to ``parameter``, somebody has written the parameter: the parameter counts."""
    rounded = round_half_away(master, parameter.dtype)
    # As whole words: torch.equal takes 1.2 ns an element of bfloat16, and 0.7 ns one of int64.
    if parameter.device.type == "cpu" and torch.equal(rounded.view(torch.int64), parameter.view(torch.int64)):
        return
    torch.where(rounded != parameter, parameter.to(master.dtype), master, out=master)


def round_half_away(master: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16 and _is_finite(master):
        return _ties_away(master).to(dtype)
    return reference.round_half_away(master, dtype)


def _ties_away(master: Tensor) -> Tensor:
    """Finite ``master``, moved off the exact ties of bfloat16 such that torch's cast rounds them away from zero."""
    return (master.view(torch.int32) | 1).view(torch.float32)


def _mix_(words: Tensor) -> Tensor:
    """In int32, whose products wrap as they should and whose right shifts need their copies of the sign cut off."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        words ^= (words >> shift).bitwise_and_((1 << 32 - shift) - 1)
        if factor != 1:
            words *= factor
    return words


def _round_stochastically(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """``random``: int32, overwritten."""
    if dtype == torch.bfloat16 and _is_within(value, _LARGEST_BFLOAT16):
        return random.add_(value.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(dtype)
    return reference.round_stochastically(value, dtype, random)


def _encode_root(value: Tensor, largest: int, random: Tensor) -> tuple[Tensor, Tensor]:
    """Codes are flat."""
    rows = value.view(-1, ALIGNMENT_NUMEL)
    scale = rows.amax(dim=1).mul_(1 / largest**2)
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 0.0)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    units = (rows * inverse[:, None]).flatten()
    code = units.sqrt().floor_().clamp_(max=largest)
    chance = units.sub_(code * code)
    threshold = (code * 2).add_(1).mul_(random.float().mul_(2.0**-16))
    return code.add_(chance.gt_(threshold)).clamp_(max=largest), scale


def _decode_moments(shard: Shard, limit: Tensor) -> tuple[Tensor, Tensor]:
    assert shard.exp_avg_scale is not None and shard.exp_avg_sq_scale is not None
    m, root = shard.exp_avg.float(), shard.exp_avg_sq.float()
    m.mul_(m.abs()).view(-1, ALIGNMENT_NUMEL).mul_(shard.exp_avg_scale[:, None])
    root.mul_(root).view(-1, ALIGNMENT_NUMEL).mul_(shard.exp_avg_sq_scale[:, None])
    if m.device.type != "cpu":
        most = torch.where(limit.isfinite(), root * limit, math.inf)
        m.clamp_(-most, most)
    elif bool(limit.isfinite()):
        most = root * limit
        m.clamp_(-most, most)
    return m, root.square_()


def _is_finite(value: Tensor) -> bool:
    """Whether the host knows that all of ``value`` is finite."""
    if value.device.type != "cpu":
        return False
    return math.isfinite(float(value.sum())) or _is_within(value, math.inf)


def _is_within(value: Tensor, limit: float) -> bool:
    """Whether the host knows that all of ``value`` lies between plus and minus ``limit``, and no NaN among it."""
    if value.device.type != "cpu":
        return False
    low, high = torch.aminmax(value)
    return -limit < float(low) and float(high) < limit
