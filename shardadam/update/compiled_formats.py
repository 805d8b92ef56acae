# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="untyped-decorator,import-untyped,var-annotated"
"""The formats of the stored state as functions that Numba compiles: equal bit for bit to those in ``reference``.

Loops work on tiles of n elements: names that end in ``_at``, and stored formats, are addresses. Imports Numba, as
``compiled`` does.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.sums.native import (
    BFLOAT16,
    carray,
    compiled,
    f32,
    float32_at,
    from_bfloat16,
    from_float16,
    i32,
    inlined,
    int8_at,
    int16_at,
    int32_at,
    load,
    to_float16,
    u32,
    uint8_at,
)
from shardadam.update.reference import GOLDEN_WORD, LARGEST_M, LARGEST_ROOT, LARGEST_V

BLOCK = ALIGNMENT_NUMEL
OWN, MASTER, SPLIT, NONE = range(4)
"""Where the exact weight is: in a float32 parameter, in a master, in parameter and remainder, nowhere."""
IN_FLOAT32, IN_BFLOAT16, IN_INT8 = range(3)
"""How the moments are stored."""
MOST_ROOT = f32(LARGEST_ROOT)

_UNIT_OF_RANDOM = f32(2.0**-16)
_LARGEST_M, _LARGEST_V = i32(LARGEST_M), i32(LARGEST_V)
_UNIT_OF_M, _UNIT_OF_V = f32(1 / LARGEST_M**2), f32(1 / LARGEST_V**2)
_TINY = f32(torch.finfo(torch.float32).tiny)
_MAGNITUDE, _INFINITY, _LARGEST_BFLOAT16 = i32(0x7FFFFFFF), i32(0x7F800000), i32(0x7F7F0000)
_GOLDEN_WORD = u32(GOLDEN_WORD)


# Master weights


@compiled
def decode_weight(w_at, parameter, kept, n, element, weights):
    """Write exact weights; ``reference.exact_weight``. Masters change where the user has written the parameter only."""
    w, bits = carray(float32_at(w_at), n), carray(int16_at(parameter), n)
    if weights == MASTER:
        if element == BFLOAT16:
            for i in range(n):
                value = from_bfloat16(bits[i])
                w[i] = w[i] if from_bfloat16(round_to_bfloat16(w[i])) == value else value
        else:
            for i in range(n):
                value = from_float16(bits[i])
                w[i] = w[i] if from_float16(round_to_float16(w[i])) == value else value
    elif weights == SPLIT:
        remainders = carray(int16_at(kept), n)
        if element == BFLOAT16:
            for i in range(n):
                w[i] = join_bfloat16(bits[i], remainders[i])
        else:
            for i in range(n):
                w[i] = join_float16(bits[i], remainders[i])
    elif weights == NONE:
        load(w_at, parameter, 0, n, element)


@compiled
def encode_weight(w_at, parameter, kept, n, element, weights, random_at):
    """Store weights as parameter and remainder; where these do not keep them exactly, ``w`` receives what they keep."""
    w, bits = carray(float32_at(w_at), n), carray(int16_at(parameter), n)
    if weights == MASTER:
        if element == BFLOAT16:
            for i in range(n):
                bits[i] = round_to_bfloat16(w[i])
        else:
            for i in range(n):
                bits[i] = round_to_float16(w[i])
    elif weights == SPLIT:
        remainders = carray(int16_at(kept), n)
        if element == BFLOAT16:
            for i in range(n):
                bits[i] = round_to_bfloat16(w[i])
                remainders[i] = np.int16(f32(w[i]).view(np.int32))
        else:
            for i in range(n):
                bits[i] = round_to_float16(w[i])
                remainders[i] = remainder_of_float16(w[i])
    elif weights == NONE:
        random = carray(int32_at(random_at), n)
        if element == BFLOAT16:
            for i in range(n):
                bits[i] = round_stochastically_to_bfloat16(w[i], low_half(second_word(random[i])))
        else:
            for i in range(n):
                bits[i] = round_stochastically_to_float16(w[i], low_half(second_word(random[i])))
        load(w_at, parameter, 0, n, element)


@inlined
def round_to_bfloat16(value):
    """Do ``reference.round_half_away``."""
    bits = f32(value).view(np.int32)
    # Infinity has no low bits, and the NaNs that arithmetic makes are NaNs by their high bits alone.
    return np.int16(i32(i32(bits + i32(0x8000) if i32(bits & _MAGNITUDE) < _INFINITY else bits) >> i32(16)))


@inlined
def round_to_float16(value):
    """Do ``reference.round_half_away``: the lowest bit moves an exact tie away from zero and no other value."""
    bits = f32(value).view(np.int32)
    return to_float16(i32(bits | i32(1) if i32(bits & _MAGNITUDE) < _INFINITY else bits).view(np.float32))


@inlined
def join_bfloat16(parameter, remainder):
    """Do ``reference.join``."""
    high = i32(i32(parameter) << i32(16))
    master, value = i32(high + i32(remainder)).view(np.float32), high.view(np.float32)
    of_nan = i32(high | i32(i32(remainder) & i32(0xFFFF))).view(np.float32)
    return (of_nan if value != value else value) if master != master else master


@inlined
def join_float16(parameter, remainder):
    """Do ``reference.join``."""
    value = from_float16(parameter)
    magnitude = abs(value) + f32(remainder) * (float16_ulp(value) * _UNIT_OF_RANDOM)
    master = -magnitude if f32(value).view(np.int32) < i32(0) else magnitude
    return master if round_to_float16(master) == parameter else value


@inlined
def remainder_of_float16(master):
    """Return the remainder of ``reference.split``."""
    value = from_float16(round_to_float16(master))
    units = np.floor((abs(master) - abs(value)) * float16_units(value, i32(16)) + f32(0.5))
    # Half a last place is 32768 units, which int16 lacks. Where the parameter is not finite, neither are the units.
    units = f32(32767.0) if units > f32(32767.0) else units
    return np.int16(i32(units if abs(units) <= f32(32768.0) else f32(0.0)))


@inlined
def float16_exponent(value):
    """Return the biased float32 exponent of the unit in ``value``'s last place in float16."""
    exponent = i32(i32(f32(value).view(np.int32) >> i32(23)) & i32(0xFF))
    return i32((exponent if exponent > i32(113) else i32(113)) - i32(10))


@inlined
def float16_ulp(value):
    return i32(float16_exponent(value) << i32(23)).view(np.float32)


@inlined
def float16_units(value, bits):
    """Return 2^bits / ``float16_ulp(value)``. Multiplying by it is exact, as dividing by the power of two would be."""
    return i32(i32(bits + i32(254) - float16_exponent(value)) << i32(23)).view(np.float32)


# Stochastic rounding


@inlined
def mixed(word):
    """Return ``reference.mix`` of uint32, whose products wrap."""
    word = u32(word ^ (word >> u32(16)))
    word = u32(word * u32(0x7FEB352D))
    word = u32(word ^ (word >> u32(15)))
    word = u32(word * u32(0x846CA68B))
    return u32(word ^ (word >> u32(16)))


@compiled
def hash_positions(random_at, first, key, n):
    """Write ``reference.random_bits`` of positions ``first : first + n``, int32."""
    random = carray(int32_at(random_at), n)
    for i in range(n):
        random[i] = i32(mixed(u32(u32(first + u32(i)) ^ key)))


@inlined
def second_word(random):
    return i32(mixed(u32(u32(random) + _GOLDEN_WORD)))


@inlined
def low_half(random):
    return i32(random & i32(0xFFFF))


@inlined
def high_half(random):
    return i32(i32(random >> i32(16)) & i32(0xFFFF))


@inlined
def round_stochastically_to_bfloat16(value, chance):
    """Do ``reference.round_stochastically``."""
    bits = f32(value).view(np.int32)
    return np.int16(i32(i32(bits + chance if i32(bits & _MAGNITUDE) < _LARGEST_BFLOAT16 else bits) >> i32(16)))


@inlined
def round_stochastically_to_float16(value, chance):
    """Do ``reference.round_stochastically``."""
    bits = f32(value).view(np.int32)
    units = abs(value) * float16_units(value, i32(0))
    whole = np.floor(units)
    up = f32(chance) * _UNIT_OF_RANDOM < units - whole
    magnitude = (whole + f32(1.0) if up else whole) * float16_ulp(value)
    rounded = i32(f32(magnitude).view(np.int32) | i32(bits & ~_MAGNITUDE))
    return to_float16(i32(rounded if i32(bits & _MAGNITUDE) < _INFINITY else bits).view(np.float32))


# Moments


@compiled
def store_bfloat16(values_at, address, n, random_at, takes_high):
    """Store float32 values as bfloat16, rounded stochastically by the low or the high half of random words."""
    values, random, bits = (
        carray(float32_at(values_at), n),
        carray(int32_at(random_at), n),
        carray(int16_at(address), n),
    )
    if takes_high:
        for i in range(n):
            bits[i] = round_stochastically_to_bfloat16(values[i], high_half(random[i]))
    else:
        for i in range(n):
            bits[i] = round_stochastically_to_bfloat16(values[i], low_half(random[i]))


@compiled
def decode_moments(m_at, v_at, m_codes_at, v_codes_at, m_scales_at, v_scales_at, n, bound):
    """Do ``reference.decode_moments``."""
    # An infinite bound times 0 would be NaN.
    factor, more = (bound, f32(0.0)) if bound < math.inf else (f32(0.0), f32(math.inf))
    for block in range(n // BLOCK):
        at = block * BLOCK
        m, v = carray(float32_at(m_at + 4 * at), BLOCK), carray(float32_at(v_at + 4 * at), BLOCK)
        m_codes, v_codes = carray(int8_at(m_codes_at + at), BLOCK), carray(uint8_at(v_codes_at + at), BLOCK)
        m_scale, v_scale = carray(float32_at(m_scales_at), n)[block], carray(float32_at(v_scales_at), n)[block]
        for i in range(BLOCK):
            value, code = f32(m_codes[i]), f32(v_codes[i])
            value = value * abs(value) * m_scale
            root = code * code * v_scale
            limit = root * factor + more
            value = value if value > -limit or value != value else -limit
            value = value if value < limit or value != value else limit
            m[i] = value
            v[i] = root * root


@compiled
def encode_moments(m_at, root_at, m_codes_at, v_codes_at, m_scales_at, v_scales_at, n, random_at):
    """Do ``reference.encode_moments``."""
    for block in range(n // BLOCK):
        at = block * BLOCK
        m, root = carray(float32_at(m_at + 4 * at), BLOCK), carray(float32_at(root_at + 4 * at), BLOCK)
        m_codes, v_codes = carray(int8_at(m_codes_at + at), BLOCK), carray(uint8_at(v_codes_at + at), BLOCK)
        random = carray(int32_at(random_at + 4 * at), BLOCK)
        m_scale, v_scale = scale_of(m_at + 4 * at, _UNIT_OF_M), scale_of(root_at + 4 * at, _UNIT_OF_V)
        carray(float32_at(m_scales_at), n)[block], carray(float32_at(v_scales_at), n)[block] = m_scale, v_scale
        m_inverse = f32(1.0) / m_scale if m_scale > f32(0.0) else f32(0.0)
        v_inverse = f32(1.0) / v_scale if v_scale > f32(0.0) else f32(0.0)
        for i in range(BLOCK):
            code = code_of(abs(m[i]) * m_inverse, low_half(random[i]), _LARGEST_M)
            m_codes[i] = np.int8(i32(-code) if m[i] < f32(0.0) else code)
        for i in range(BLOCK):
            code = code_of(root[i] * v_inverse, high_half(random[i]), _LARGEST_V)
            v_codes[i] = np.uint8(max(code, i32(root[i] > f32(0.0))))


@inlined
def scale_of(values_at, unit):
    """Return the scale of a block."""
    # Compared by their bits, so that a NaN is the largest of all and spreads to its block.
    bits = carray(int32_at(values_at), BLOCK)
    largest = i32(0)
    for i in range(BLOCK):
        largest = max(largest, i32(bits[i] & _MAGNITUDE))
    scale = i32(largest).view(np.float32) * unit
    return scale if scale >= _TINY else f32(0.0)


@inlined
def code_of(units, chance, largest):
    """Return the code of ``reference.encode_root``."""
    floor = i32(f32(math.sqrt(units)))
    code = f32(floor)
    width = code * (f32(2.0) * _UNIT_OF_RANDOM) + _UNIT_OF_RANDOM  # exact
    up = f32(chance) * width < units - code * code
    return min(i32(floor + i32(up)), largest)
