# SPDX-License-Identifier: Apache-2.0
"""The update by torch's fused Adam(W) kernel, for CPUs and for devices and dtypes without a Triton kernel.

A shard in the dtype of the arithmetic is updated in place. Other formats are decoded to float32, updated and encoded
again, one chunk at a time so that it stays in cache. On CPUs the host may read values: ordinary ones take a short path,
and ``reference`` handles NaNs and infinities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shardadam.chunks import chunks
from shardadam.layout import ALIGNMENT_NUMEL, Bucket
from shardadam.sums.scattered import Parts, Scattered, pieces_of_shard
from shardadam.sums.sources import sum_chunk_
from shardadam.update import reference
from shardadam.update.runs import Run, RunTable, equal_runs
from shardadam.update.shard import Counters, Shard, Sources, StepInputs

_LARGEST_BFLOAT16 = 3.3895e38  # a float32 below this cannot be rounded to infinity


class Scratch:
    """Named buffers that the chunks of one bucket reuse: fresh memory for each chunk would cost page faults."""

    def __init__(self) -> None:
        self._flats: dict[str, Tensor] = {}

    def take(self, flat: Tensor, chunk: slice, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the buffer ``name``, uninitialised, as long as ``chunk``; device and default dtype are ``flat``'s."""
        numel = chunk.stop - chunk.start
        buffer = self._flats.get(name)
        if buffer is None or buffer.numel() < numel:
            buffer = self._flats[name] = torch.empty(numel, dtype=dtype or flat.dtype, device=flat.device)
        return buffer[:numel]


class FusedUpdate:
    """An ``Update`` (see there) by torch's fused kernel."""

    needs_host_used = True
    takes_several = False

    def __init__(self, counters: Counters, *, seed: int, rank: int) -> None:
        self._counters = counters
        self._seed = seed
        self._rank = rank
        self._numels: list[int] | None = None  # of each parameter, once they are needed
        self._parts: dict[tuple[int, int, int], Parts] = {}  # by bucket offset, start and stop of a chunk
        self._runs = RunTable(rank, len(counters.steps))
        self._on_cpu = counters.steps.device.type == "cpu"
        self._limits: Tensor | None = None
        self._keys: Tensor | None = None
        # How far averages move towards the weights: those of each parameter, and of all if it is the same, on the host.
        self._rates: Sequence[float | Tensor] = ()
        self._common_rate: float | None = None
        self._version = counters.steps._version

    def begin(self, inputs: StepInputs) -> None:
        counters = self._counters
        if counters.steps._version != self._version:  # written from outside: parameters may differ in steps now
            self.reload()
        if inputs.host_used is not None and not all(inputs.host_used):
            self._runs.advance(inputs.host_used)
            self._parts.clear()
        self._host_used = inputs.host_used
        self._skips_all = None if self._on_cpu else inputs.found_inf
        self._skip = self._on_cpu and bool(inputs.found_inf)
        self._coefficient = inputs.coefficient
        self._hyperparameters = inputs.hyperparameters
        # The moments that this step decodes obey the bounds of the step before: read them before they advance.
        self._limits = counters.bounds.sqrt().float()
        self._keys = None
        taken = inputs.used & (inputs.found_inf == 0)
        counters.steps.add_(taken)
        self._version = counters.steps._version
        after = _bounds_after(counters.bounds, inputs.hyperparameters["betas"])
        counters.bounds.copy_(torch.where(taken, after, counters.bounds))
        if counters.n_averaged is not None:
            assert inputs.ema_decay is not None
            self._begin_averages(counters.n_averaged, 1 - inputs.ema_decay, inputs.found_inf)

    def _begin_averages(self, n_averaged: Tensor, rate: float, found_inf: Tensor) -> None:
        is_first = n_averaged == 0
        self._common_rate = None
        if self._on_cpu:
            rates = [1.0 if first else rate for first in is_first.tolist()]
            self._rates, self._common_rate = rates, rates[0] if len(set(rates)) == 1 else None
        else:
            self._rates = torch.where(is_first, 1.0, torch.full_like(is_first, rate, dtype=torch.float64)).unbind()
        n_averaged.add_(found_inf == 0)

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in (self._limits, self._keys) if flat is not None)

    def reload(self) -> None:
        self._runs.load(zip(self._counters.steps.tolist(), self._counters.bounds.tolist(), strict=True))
        self._parts.clear()

    def step_(
        self,
        shard: Shard,
        bucket: Bucket,
        gradients: Sources | Scattered | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        runs = self._runs.runs(bucket, self._host_used)
        if self._skip or (self._on_cpu and found_inf is not None and bool(found_inf)):
            return
        if not runs and shard.average is None:
            return
        self._found_inf = self._skips_all
        if found_inf is not None and self._skips_all is not None:
            self._found_inf = torch.maximum(self._skips_all, found_inf)
        exact = shard.exact_dtype
        whole = shard.gradient if gradients is None else None
        is_plain = whole is not None and whole.dtype == exact and not shard.is_encoded
        if is_plain and whole is not None and shard.average is None:
            flats = (shard.parameter, whole, shard.exp_avg, shard.exp_avg_sq)
            if runs[0].stop - runs[0].start == shard.parameter.numel():
                lists = [[flat] for flat in flats]
            else:
                lists = [[flat[run.start : run.stop] for run in runs] for flat in flats]
            self._adam_(*lists, runs=runs)
            return
        step = self._step_encoded_ if shard.is_encoded else self._step_plain_
        if self._on_cpu and _is_common(shard):
            step = self._step_bfloat16_
        scratch = Scratch()
        for run in runs:
            for chunk in chunks(run.start, run.stop, shard.parameter.device, is_long=is_plain):
                if whole is not None and whole.dtype == exact:
                    gradient = whole[chunk]
                elif isinstance(gradients, Scattered):
                    gradient = self._joined(gradients, bucket, chunk, exact)
                else:
                    gradient = scratch.take(shard.parameter, chunk, "gradient", exact)
                    if gradients is not None:
                        sum_chunk_(gradient, [source[chunk] for source in gradients.slices], scale=gradients.scale)
                    elif whole is not None:
                        gradient.copy_(whole[chunk])
                weight = step(shard, chunk, run, gradient, scratch)
                if shard.average is not None and self._common_rate is not None:
                    self._average_(shard.average[chunk], weight, self._common_rate)
        if shard.average is not None:
            self._average_others_(shard, bucket)

    def _joined(self, gradients: Scattered, bucket: Bucket, chunk: slice, dtype: torch.dtype) -> Tensor:
        """Return the gradients of a chunk of the shard in ``dtype``, in memory that may be overwritten."""
        key = bucket.offset, chunk.start, chunk.stop
        parts = self._parts.get(key)
        if parts is None:
            pieces = pieces_of_shard(bucket.shard_segments(self._rank), chunk.start, chunk.stop)
            if self._numels is None:
                self._numels = self._counters.numels.tolist()
            parts = self._parts[key] = Parts(pieces, self._numels, self._counters.steps.device, gradients.dtype)
        flat = gradients.flat(parts)
        if flat.dtype != dtype:
            return flat.to(dtype)
        is_shared = len(parts.order) == 1 and self._coefficient is not None  # the kernel scales gradients in place
        return flat.clone() if is_shared else flat

    def _average_others_(self, shard: Shard, bucket: Bucket) -> None:
        """Average the parameters that were not averaged with their update: those that take no part in the step, or all
        if they differ in whether this is their first average.
        """
        assert shard.average is not None
        if self._common_rate is None:
            labels: list[int | None] = [*range(len(self._rates))]
        elif self._host_used is None:
            return
        else:
            labels = [None if is_used else 0 for is_used in self._host_used]
        for run in equal_runs(bucket, self._rank, labels):
            for chunk in chunks(run.start, run.stop, shard.parameter.device):
                kept = (None if flat is None else flat[chunk] for flat in (shard.master, shard.remainder))
                weight = reference.exact_weight(shard.parameter[chunk], *kept)
                self._average_(shard.average[chunk], weight, self._rates[run.parameter])

    def _average_(self, average: Tensor, weight: Tensor, rate: float | Tensor) -> None:
        """Do ``reference.average_``, up to the rounding of torch's lerp, which torch.optim.swa_utils uses, too.

        Args:
            rate: 1 to copy the weight, else 1 - decay. A tensor off the CPU, where the host must not wait.
        """
        if isinstance(rate, Tensor):
            self._store_(average, torch.where(rate == 1, weight, average.lerp(weight, rate.to(weight.dtype))))
        elif rate == 1:
            average.copy_(weight)
        else:
            average.lerp_(weight, rate)

    def _adam_(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        *,
        runs: Sequence[Run],
        is_scaled: bool = False,
    ) -> None:
        group = self._hyperparameters
        beta1, beta2 = group["betas"]
        if self._coefficient is not None and self._coefficient.dtype == torch.float64 and not is_scaled:
            torch._foreach_mul_(gradients, self._coefficient)  # torch's kernel takes a float32 scale only
            is_scaled = True
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
            maximize=bool(group["maximize"]),
            grad_scale=None if is_scaled or self._coefficient is None else 1 / self._coefficient,
            found_inf=self._found_inf,
        )

    def _step_plain_(self, shard: Shard, chunk: slice, run: Run, gradient: Tensor, scratch: Scratch) -> Tensor:
        """Update a chunk that is stored in the dtype of the arithmetic; return the exact weights."""
        flats = (shard.parameter, shard.exp_avg, shard.exp_avg_sq)
        weight, m, v = (flat[chunk] for flat in flats)
        self._adam_([weight], [gradient], [m], [v], runs=[run])
        return weight

    def _step_bfloat16_(self, shard: Shard, chunk: slice, run: Run, gradient: Tensor, scratch: Scratch) -> Tensor:
        """Do ``_step_encoded_`` for the formats of ``_is_common`` in fewer passes, and without temporaries."""
        parameter = shard.parameter[chunk]
        bits = scratch.take(parameter, chunk, "bits", torch.int32)
        if shard.master is not None:
            weight = shard.master[chunk]
            rounded = scratch.take(parameter, chunk, "rounded")
            rounded.copy_(_ties_away(weight, out=bits))
            if not _are_same(rounded, parameter):
                adopt_written_(weight, parameter)
        else:
            assert shard.remainder is not None
            remainder = shard.remainder[chunk]
            weight = scratch.take(parameter, chunk, "weight", torch.float32)
            weight.copy_(parameter).view(torch.int32).add_(remainder)
            if not _is_finite(weight):
                weight.copy_(reference.join(parameter, remainder))
        if self._coefficient is not None:
            gradient = torch.mul(gradient, self._coefficient, out=scratch.take(gradient, chunk, "scaled"))
        self._adam_([weight], [gradient], [shard.exp_avg[chunk]], [shard.exp_avg_sq[chunk]], runs=[run], is_scaled=True)
        if not _is_finite(weight):
            self._write_weight(shard.narrow(chunk, gradient), weight, None)
            return weight
        parameter.copy_(_ties_away(weight, out=bits))
        if shard.remainder is not None:
            remainder.copy_(weight.view(torch.int32))  # the copy keeps the low 16 bits
        return weight

    def _step_encoded_(self, shard: Shard, chunk: slice, run: Run, gradient: Tensor, scratch: Scratch) -> Tensor:
        """Decode a chunk, update it and encode it again; return the exact weights."""
        shard = shard.narrow(chunk, gradient)
        random = self._random_words(shard) if shard.is_random else None
        weight = _read_weight(shard)
        if shard.exp_avg_scale is not None:
            assert self._limits is not None
            m, v = _decode_moments(shard, self._limits[run.parameter])
        else:
            m, v = shard.exp_avg.to(weight.dtype), shard.exp_avg_sq.to(weight.dtype)
        if self._coefficient is not None:
            gradient = gradient * self._coefficient

        self._adam_([weight], [gradient], [m], [v], runs=[run], is_scaled=True)

        self._write_weight(shard, weight, random)
        self._write_moments(shard, m, v, random)
        return weight if shard.has_exact_weight else shard.parameter.to(weight.dtype)

    def _random_words(self, shard: Shard) -> Tensor:
        """Return 32 random bits for each element, int32: those of ``reference.random_bits``."""
        counters = self._counters
        if self._keys is None:
            key = reference.mix((self._seed + reference.GOLDEN_WORD) & 0xFFFFFFFF)
            keys = reference.mix(key + counters.steps.long() & 0xFFFFFFFF)
            self._keys = reference.mix(keys + counters.param_ids & 0xFFFFFFFF).to(torch.int32)  # type: ignore[union-attr]
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
            parameter, remainder = reference.split(weight, dtype)
            self._store_(shard.remainder, remainder)
        elif shard.master is not None:
            parameter = round_half_away(weight, dtype)
        else:
            assert random is not None
            second = _mix_(random + (reference.GOLDEN_WORD - 2**32))
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
    """Return ``reference.bound_squared_after`` of all parameters."""
    beta1, beta2 = betas
    if beta1 == 0:
        kept = torch.zeros_like(bounds)
    elif beta2 == 0:
        kept = torch.where(bounds > 0, math.inf, 0.0)
    else:
        kept = beta1**2 / beta2 * bounds
    return kept + (1 - beta1) ** 2 / (1 - beta2)


# Fast forms of the functions of ``reference`` with the same names. They read values of tensors on CPUs only: on other
# devices the host would have to wait.


def _is_common(shard: Shard) -> bool:
    """Return whether the parameter is bfloat16 with an exact master (float32 or split) and float32 moments."""
    has_master = shard.master is not None or shard.remainder is not None
    return shard.parameter.dtype == torch.bfloat16 and has_master and shard.exp_avg.dtype == torch.float32


def _read_weight(shard: Shard) -> Tensor:
    """Return the exact weight: the stored master or float32 parameter itself, else a new tensor."""
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
    """Replace ``master`` by ``parameter`` where it does not round to it: the user has written the parameter there."""
    rounded = round_half_away(master, parameter.dtype)
    torch.where(rounded != parameter, parameter.to(master.dtype), master, out=master)


def round_half_away(master: Tensor, dtype: torch.dtype) -> Tensor:
    """As in ``reference``."""
    if dtype == torch.bfloat16 and _is_finite(master):
        return _ties_away(master).to(dtype)
    return reference.round_half_away(master, dtype)


def _ties_away(master: Tensor, out: Tensor | None = None) -> Tensor:
    """Move finite ``master`` off the exact ties of bfloat16, so that torch's cast rounds them away from zero.

    Args:
        out: int32; receives the result's bits.
    """
    return torch.bitwise_or(master.view(torch.int32), 1, out=out).view(torch.float32)


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two CPU tensors are equal bit for bit.

    Compares 8-byte words: torch.equal takes 1.2 ns for each bfloat16, but 0.7 ns for each int64, which holds four.
    """
    return torch.equal(one.view(torch.int64), other.view(torch.int64))


def _mix_(words: Tensor) -> Tensor:
    """Do ``reference.mix`` in int32, in place. Products wrap as in uint32; sign bits that a shift copies are masked."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        words ^= (words >> shift).bitwise_and_((1 << 32 - shift) - 1)
        if factor != 1:
            words *= factor
    return words


def _round_stochastically(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """As in ``reference``; ``random`` is int32 and is overwritten."""
    if dtype == torch.bfloat16 and _is_within(value, _LARGEST_BFLOAT16):
        return random.add_(value.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(dtype)
    return reference.round_stochastically(value, dtype, random)


def _encode_root(value: Tensor, largest: int, random: Tensor) -> tuple[Tensor, Tensor]:
    """As in ``reference``, for flat ``value``; the codes are flat, too."""
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
    """Return whether all of ``value`` is finite. Always False off the CPU, where the host must not read it."""
    if value.device.type != "cpu":
        return False
    return math.isfinite(float(value.sum())) or _is_within(value, math.inf)


def _is_within(value: Tensor, limit: float) -> bool:
    """Return whether all of ``value`` is strictly between ``-limit`` and ``limit``. Always False off the CPU."""
    if value.device.type != "cpu":
        return False
    low, high = torch.aminmax(value)
    return -limit < float(low) and float(high) < limit
