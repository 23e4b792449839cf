from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import corequant as cq

ORDERS = st.sampled_from([1, 2, 4, 8, 12, 16, 20, 28, 32, 36, 40, 52, 64, 92, 128, 172])


@settings(deadline=None, max_examples=60)
@given(ORDERS, st.integers(1, 4), st.integers(0, 5), st.integers(0, 2**32 - 1), st.booleans())
def test_norms_are_kept_and_the_inverse_undoes(b, blocks, rows, seed, signed):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, b * blocks))
    signs = cq.random_signs(b * blocks, seed) if signed else None
    y = cq.block_hadamard(x, b, signs=signs)
    np.testing.assert_allclose(np.square(y).sum(-1), np.square(x).sum(-1), rtol=1e-12)
    back = cq.block_hadamard(y, b, signs=signs, inverse=True)
    np.testing.assert_allclose(back, x, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(ORDERS, st.integers(0, 2**32 - 1))
def test_linear(b, seed):
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(2, 3, b))
    np.testing.assert_allclose(
        cq.block_hadamard(2 * x - y, b),
        2 * cq.block_hadamard(x, b) - cq.block_hadamard(y, b),
        atol=1e-12,
    )
