"""Rotations against other implementations, and the accuracy contract against exact sums."""

from __future__ import annotations

from decimal import Decimal

import ml_dtypes
import numpy as np
import pytest
import scipy.linalg

import corequant as cq

decimals = np.vectorize(Decimal, otypes=[object])


def oracle(x, inverse=False):
    """Multiply by the matrix, to 20 digits on every platform: long double may be float64.

    Sums of multiples of 2^-20 are exact in float64, and those of what is left err below 2^-60.
    """
    matrix = cq.hadamard_matrix(x.shape[-1])
    matrix = (matrix.T if inverse else matrix).astype(np.float64)
    wide = x.astype(np.float64)
    coarse = np.ldexp(np.rint(np.ldexp(wide, 20)), -20)
    sums = decimals(coarse @ matrix) + decimals((wide - coarse) @ matrix)
    return sums / Decimal(x.shape[-1]).sqrt()


def butterflies(x):
    """The textbook's radix 2 in the dtype of ``x``, without the scale."""
    y = x.copy()
    half = 1
    while half < y.shape[-1]:
        pairs = y.reshape(len(y), -1, 2, half)
        a, b = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
        pairs[:, :, 0], pairs[:, :, 1] = a + b, a - b
        half *= 2
    return y


def relative_error(found, exact):
    wide = decimals(found.astype(np.float64))
    return float((np.square(wide - exact).sum() / np.square(exact).sum()).sqrt())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", [2, 16, 64, 512, 2048])
def test_error_is_at_most_that_of_plain_butterflies(dtype, order):
    x = np.random.default_rng(order).normal(size=(16, order)).astype(dtype)
    exact = oracle(x)
    found = relative_error(cq.block_hadamard(x), exact)
    assert found <= relative_error(butterflies(x) * dtype(1 / np.sqrt(order)), exact)
    assert found < 1.5 * np.log2(2 * order) * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", [12, 12 * 16, 20 * 32, 28 * 16, 92 * 16, 172 * 8])
@pytest.mark.parametrize("inverse", [False, True])
def test_error_with_a_core_is_at_most_that_of_sums_from_left_to_right(dtype, order, inverse):
    # So many numbers that chance doesn't decide where the two are close.
    rows = max(8, 2**14 // order)
    x = np.random.default_rng(order).normal(size=(rows, order)).astype(dtype)
    core, power = cq.hadamard_factors(order)
    matrix = cq.hadamard_matrix(core)
    matrix = (matrix.T if inverse else matrix).astype(dtype)
    parts = butterflies(x.reshape(-1, power)).reshape(len(x), core, power)
    naive = np.zeros_like(parts)
    for k in range(core):
        for m in range(core):
            naive[:, k] += parts[:, m] * matrix[m, k]
    naive = naive.reshape(x.shape) * dtype(1 / np.sqrt(order))
    exact = oracle(x, inverse)
    found = relative_error(cq.block_hadamard(x, inverse=inverse), exact)
    assert found <= relative_error(naive, exact)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("order", [2, 64, 1024, 12 * 16])
def test_halves_are_the_float32_result_rounded_once(dtype, order):
    x = np.random.default_rng(order).normal(size=(8, order)).astype(dtype)
    expected = cq.block_hadamard(x.astype(np.float32)).astype(dtype)
    np.testing.assert_array_equal(cq.block_hadamard(x), expected)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_half_goes_through_the_conversion(name):
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else np.float16)
    x = np.zeros((1 << 16, 2), dtype)
    x[:, 0] = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    expected = x[:, :1].astype(np.float32) * np.float32(np.sqrt(0.5))
    expected = np.broadcast_to(expected, x.shape).astype(dtype)
    found = cq.block_hadamard(x, 2)
    np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))


@pytest.mark.parametrize("order", [2, 32, 256, 1024])
def test_powers_of_two_equal_scipys_matrix(order):
    x = np.random.default_rng(0).integers(-8, 9, (4, order)).astype(np.float64)
    expected = x @ scipy.linalg.hadamard(order) / np.sqrt(order)
    np.testing.assert_allclose(cq.block_hadamard(x), expected, rtol=1e-13, atol=1e-13)
