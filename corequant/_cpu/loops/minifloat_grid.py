"""Rounding to minifloats by bit patterns: nearest, ties to the even code, saturating.

The exponent comes from the bits, so it is right next to every power of two. Below the smallest
normal number the step is constant, and adding ``magic``, whose last place is that step, rounds;
above it, a carry out of the mantissa moves to the next exponent by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from corequant._cpu.loops.bits import like, to_bits, to_float
from corequant._cpu.loops.jit import jit

__all__ = [
    "Rounder",
    "decode",
    "encode",
    "fake",
    "losses",
    "nearest_code",
    "nearest_value",
    "value_of",
]


class Rounder(NamedTuple):
    """Constants of a minifloat in the working type: float32 and uint32, or float64 and uint64."""

    least_normal: np.float32
    largest: np.float32
    magic: np.float32
    magic_bits: np.uint32
    origin: np.uint32
    """Bits to subtract so that the exponent field starts where the minifloat's does."""
    shift: np.uint32
    half: np.uint32
    """Half a step of the shifted-out bits, less one: adding the last kept bit makes ties even."""
    magnitude_mask: np.uint32
    sign_shift: np.uint32
    sign_bit: np.uint32
    keep: np.uint32
    """1 where -0.0 has a code of its own, otherwise 0."""
    one: np.uint32
    tiny: np.float32
    """The smallest positive number."""
    plus: np.float32
    """What turns -0.0 into 0.0 where it has no code (0.0), or changes nothing (-0.0)."""


@jit
def nearest_code(v, r):  # type: ignore[no-untyped-def]
    """Return the code nearest to ``v``; -0.0 keeps its sign where there is a code for it."""
    bits = to_bits(v)
    a = to_float(like(bits & r.magnitude_mask, r.shift))
    a = r.largest if a > r.largest else a
    normal = a if a > r.least_normal else r.least_normal
    t = like(to_bits(normal) - r.origin, r.shift)
    t = like((t + r.half + ((t >> r.shift) & r.one)) >> r.shift, r.shift)
    small = like(to_bits(a + r.magic) - r.magic_bits, r.shift)
    code = small if a < r.least_normal else t
    sign = like((bits >> r.sign_shift) & r.sign_bit, r.shift)
    return like(code | sign, r.shift) if r.keep or code > 0 else code


@jit
def nearest_value(v, r):  # type: ignore[no-untyped-def]
    """Return the number nearest to ``v``, ties to the even code."""
    bits = to_bits(v)
    a = to_float(like(bits & r.magnitude_mask, r.shift))
    a = r.largest if a > r.largest else a
    normal = a if a > r.least_normal else r.least_normal
    t = like(to_bits(normal) - r.origin, r.shift)
    t = like((t + r.half + ((t >> r.shift) & r.one)) >> r.shift, r.shift)
    large = to_float(like((t << r.shift) + r.origin, r.shift))
    small = (a + r.magic) - r.magic
    value = small if a < r.least_normal else large
    sign = like(bits & like(~r.magnitude_mask, r.shift), r.shift)
    return to_float(like(to_bits(value) | sign, r.shift)) + r.plus


@jit
def value_of(code, r):  # type: ignore[no-untyped-def]
    """Return what a code stands for, in a format whose codes are all finite numbers."""
    magnitude = like(code & (r.sign_bit - r.one), r.one)
    large = to_float(like((magnitude << r.shift) + r.origin, r.one))
    value = like(np.int32(magnitude), r.tiny) * r.tiny if large < r.least_normal else large
    sign = like((code & r.sign_bit) << r.sign_shift, r.one)
    return to_float(like(to_bits(value) | sign, r.one))


@jit
def decode(codes, scales, r, out):  # type: ignore[no-untyped-def]
    """Numbers that codes stand for; by arithmetic, which is twice as fast as a table."""
    for g in range(codes.shape[0]):
        scale = scales[g]
        for i in range(codes.shape[1]):
            out[g, i] = value_of(like(codes[g, i], r.one), r) * scale


@jit
def encode(x, scales, r, codes):  # type: ignore[no-untyped-def]
    """Codes of ``x`` (groups, size) divided by its groups' scales."""
    for g in range(x.shape[0]):
        scale = scales[g]
        for i in range(x.shape[1]):
            codes[g, i] = nearest_code(x[g, i] / scale, r)


@jit
def fake(x, scales, r, out):  # type: ignore[no-untyped-def]
    """Divide, round and multiply back each group of ``x``."""
    for g in range(x.shape[0]):
        scale = scales[g]
        for i in range(x.shape[1]):
            out[g, i] = nearest_value(x[g, i] / scale, r) * scale


@jit
def losses(x, scales, r, lanes, out):  # type: ignore[no-untyped-def]
    """Write the squared error of each group with each trial; see ``integer_grid.losses``."""
    width = lanes.shape[0]
    for g in range(x.shape[0]):
        for k in range(scales.shape[1]):
            scale = scales[g, k]
            lanes[:] = 0
            for start in range(0, x.shape[1], width):
                for j in range(width):
                    value = x[g, start + j]
                    error = np.float64(value - nearest_value(value / scale, r) * scale)
                    lanes[j] += error * error
            total = 0.0
            for j in range(width):
                total += lanes[j]
            out[g, k] = total
