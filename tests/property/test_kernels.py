"""Rotations over dtype × order × axis × memory layout × where the result goes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import corequant as cq
from corequant.hadamard import hadamard_factors, hadamard_matrix

ORDERS = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 12, 20, 28, 48, 96, 12 * 16, 20 * 32, 172]
DTYPES = [np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]


def by_definition(blocks, inverse, scale):
    """Butterflies, then the core in fours: written again here, a block and a number at a time."""
    size = blocks.shape[1]
    core, power = hadamard_factors(size)
    y = blocks.copy()
    half = 1
    while half < power:
        for i in range(size):
            if not i & half:
                a, b = y[:, i].copy(), y[:, i + half].copy()
                y[:, i], y[:, i + half] = a + b, a - b
        half *= 2
    if core > 1:
        matrix = hadamard_matrix(core).astype(blocks.dtype)
        matrix = matrix.T if inverse else matrix
        x = y.copy()
        for k in range(core):
            for j in range(power):
                total = None
                for m in range(0, core, 4):
                    v = [x[:, (m + i) * power + j] * matrix[m + i, k] for i in range(4)]
                    four = (v[0] + v[1]) + (v[2] + v[3])
                    total = four if total is None else total + four
                y[:, k * power + j] = total
    return y * scale


def laid_out(x, layout):
    match layout:
        case "strided":
            wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
            wide[..., ::2] = x
            return wide[..., ::2]
        case "reversed":
            return x[::-1].copy()[::-1]
        case "fortran":
            return np.asfortranarray(x)
        case "shifted":
            memory = np.zeros(x.nbytes + x.itemsize, np.uint8)[x.itemsize :]
            view = memory.view(x.dtype).reshape(x.shape)
            view[...] = x
            return view
        case "other byte order" if x.dtype.kind == "f":
            return x.astype(x.dtype.newbyteorder())
        case _:
            return x.copy()


LAYOUTS = ["contiguous", "strided", "reversed", "fortran", "shifted", "other byte order"]


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from(ORDERS),
    blocks=st.integers(1, 3),
    rows=st.integers(1, 40),
    axis=st.sampled_from([0, 1]),
    inverse=st.booleans(),
    signed=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    where=st.sampled_from(["fresh", "out", "strided out", "in place"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_bits_are_those_of_the_definition(
    dtype, order, blocks, rows, axis, inverse, signed, layout, where, seed
):
    rng = np.random.default_rng(seed)
    d = order * blocks
    x = rng.normal(size=(min(rows, 4096 // d + 1), d)).astype(dtype)
    signs = rng.choice([-1, 1], d).astype(np.int8) if signed else None

    real = np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)
    wide = x.astype(real)
    if signed and not inverse:
        wide = wide * signs.astype(real)
    turned = by_definition(wide.reshape(-1, order), inverse, real.type(1 / np.sqrt(order)))
    expected = turned.reshape(x.shape)
    if signed and inverse:
        expected = expected * signs.astype(real)
    expected = expected.astype(dtype)
    if axis == 0:
        x, expected = x.T.copy(), expected.T

    given_x = laid_out(x, layout)
    if where == "in place":
        found = cq.block_hadamard(
            given_x, order, axis=axis, inverse=inverse, signs=signs, out=given_x
        )
    else:
        out = None
        if where == "out":
            out = np.empty_like(given_x)
        elif where == "strided out":
            out = np.empty((*x.shape[:-1], 2 * x.shape[-1]), given_x.dtype)[..., ::2]
        found = cq.block_hadamard(given_x, order, axis=axis, inverse=inverse, signs=signs, out=out)
        assert out is None or found is out
        np.testing.assert_array_equal(given_x, x)
    assert found.dtype == given_x.dtype
    np.testing.assert_array_equal(found, expected)
