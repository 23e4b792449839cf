"""Dividing by multiplying: no code may differ."""

import numpy as np
import pytest
from llvmlite import ir

from corequant._cpu.codegen.compiler import build, fuses
from corequant._cpu.codegen.row_steps import corrected, inverse, usual
from corequant._cpu.codegen.vectors import VECTOR_BYTES, Vectors, counted

pytestmark = pytest.mark.skipif(not fuses(), reason="without fused products it is divided")

WORD = ir.IntType(64)
CHUNK = 1 << 13
"""Numbers at once: what is made of them stays in the cache."""


def kernel(dtype):
    """Build ``(x, scales, out, vectors)``: what stands in for x / scales."""

    def emit(b, given):
        v = Vectors(b, dtype)
        x, scales, out = (b.inttoptr(a, ir.IntType(8).as_pointer()) for a in given[:3])
        with counted(b, given[3]) as i:
            at = b.mul(i, ir.Constant(WORD, VECTOR_BYTES))
            scale = v.load(v.address(scales, at))
            found = corrected(v, v.load(v.address(x, at)), scale, inverse(v, scale))
            v.store(found, v.address(out, at))

    made = build(f"quotients of a test, {dtype}", "iiii", emit)

    def run(x, scales):
        out = np.empty_like(x)
        addresses = (a.ctypes.data for a in (x, scales, out))
        made(*addresses, x.nbytes // VECTOR_BYTES)
        return out

    return run


def beside(middle, scales, reach):
    """Yield numbers around those whose quotient is ``middle``, up to so many steps to each side."""
    nearest = (np.float32(middle) * scales).view(np.int32)
    for k in range(-reach, reach + 1):
        yield (nearest + k).view(np.float32)


def test_every_float32_scale_and_code(request):
    """Scaling both by a power of two changes no bit: scales from 1 to 2 stand for all.

    Every scale meets an eighth of the codes, and with ``--exhaustive`` all of them.
    """
    divide = kernel("float32")
    step = 1 if request.config.getoption("--exhaustive") else 8
    first = np.float32(1).view(np.int32)
    for start in range(0, 1 << 23, CHUNK):
        scales = (np.arange(start, start + CHUNK, dtype=np.int32) + first).view(np.float32)
        for middle in np.arange(0.5 + start // CHUNK % step, 256, step):
            for x in beside(middle, scales, 2):
                assert (np.rint(divide(x, scales)) == np.rint(x / scales)).all()


def test_products_with_the_reciprocal_would_not_do(rng):
    scales = rng.uniform(1, 2, 64 * CHUNK).astype(np.float32)
    found = [np.rint(x * (1 / scales)) != np.rint(x / scales) for x in beside(7.5, scales, 2)]
    assert np.any(found)


def test_small_and_large_scales_give_the_same_quotients(rng):
    divide = kernel("float32")
    scales = rng.uniform(1, 2, CHUNK).astype(np.float32)
    x = (scales * rng.uniform(-256, 256, CHUNK)).astype(np.float32)
    expected = divide(x, scales)
    for power in (-74, -30, 1, 30, 73):
        factor = np.float32(2.0**power)
        np.testing.assert_array_equal(divide(x * factor, scales * factor), expected)


def test_float64_is_the_quotient_itself(rng):
    divide = kernel("float64")
    scales = rng.uniform(1, 2, 16 * CHUNK)
    x = (rng.integers(-256, 256, scales.size) + 0.5) * scales
    x = (x.view(np.int64) + rng.integers(-3, 4, x.size)).view(np.float64)
    np.testing.assert_array_equal(divide(x, scales), x / scales)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_usual(dtype):
    def emit(b, given):
        v = Vectors(b, dtype)
        out = b.inttoptr(given[1], WORD.as_pointer())
        b.store(b.zext(usual(v, given[0]), WORD), out)

    made = build(f"usual scales of a test, {dtype}", "fi" if dtype == "float32" else "di", emit)
    info = np.finfo(dtype)
    found = []
    for scale in (info.tiny, 1e-7, 1.0, 1e7, info.max, np.inf, np.nan):
        out = np.zeros(1, np.int64)
        made(float(scale), out.ctypes.data)
        found.append(int(out[0]))
    assert found == [0, 1, 1, 1, 0, 0, 0]
