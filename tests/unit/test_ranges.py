from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from tests.conftest import heavy_tailed


def cost(x, b, symmetric, p=None, signs=None):
    """Mean squared range over squared norm, straight from the definition."""
    x = x if p is None else x[:, p]
    x = x if signs is None else x * signs
    y = cq.block_hadamard(x, b)
    span = 2 * np.abs(y).max(1) if symmetric else y.max(1) - y.min(1)
    return float((np.square(span) / np.square(x).sum(1)).mean())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("d", "b"), [(64, 8), (96, 12), (64, 32)])
def test_the_search_lowers_its_objective(rng, symmetric, d, b):
    x = heavy_tailed(rng, 100, d)
    p = cq.rangediff(x, b, symmetric=symmetric, proposals=2000)
    assert sorted(p.tolist()) == list(range(d))
    assert cost(x, b, symmetric, p) < 0.97 * cost(x, b, symmetric)
    start = cq.massdiff(np.abs(x).mean(0), b)
    better = cq.rangediff(x, b, start=start, symmetric=symmetric, proposals=2000)
    assert cost(x, b, symmetric, better) <= cost(x, b, symmetric, start)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("d", "b"), [(64, 8), (96, 12), (64, 64)])
def test_sign_descent_lowers_its_objective(rng, symmetric, d, b):
    x = heavy_tailed(rng, 100, d) + 0.5
    signs = cq.sign_descent(x, b, symmetric=symmetric)
    assert set(signs.tolist()) <= {-1, 1}
    assert cost(x, b, symmetric, signs=signs) < cost(x, b, symmetric)
    start = cq.random_signs(d, 1)
    found = cq.sign_descent(x, b, start=start, symmetric=symmetric)
    assert cost(x, b, symmetric, signs=found) <= cost(x, b, symmetric, signs=start)


def test_a_single_flip_that_helps_is_not_missed(rng):
    x = heavy_tailed(rng, 60, 16)
    signs = cq.sign_descent(x, 4, sweeps=30)
    best = cost(x, 4, False, signs=signs)
    for i in range(16):
        other = signs.copy()
        other[i] = -other[i]
        assert cost(x, 4, False, signs=other) > best * (1 - 1e-5)


def test_deterministic_and_unmutated(rng):
    x = heavy_tailed(rng, 50, 32)
    before, start = x.copy(), np.arange(32)
    a, b = (cq.rangediff(x, 8, start=start, seed=3, proposals=500) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(start, np.arange(32))
    cq.sign_descent(x, 8)
    np.testing.assert_array_equal(x, before)


def test_zero_tokens_one_block_and_none(rng):
    x = np.zeros((5, 16))
    np.testing.assert_array_equal(cq.rangediff(x, 4), np.arange(16))
    np.testing.assert_array_equal(cq.sign_descent(x, 4), np.ones(16))
    y = rng.normal(size=(5, 16))
    np.testing.assert_array_equal(cq.rangediff(y, 16), np.arange(16))
    np.testing.assert_array_equal(cq.rangediff(y, 4, proposals=0), np.arange(16))
    np.testing.assert_array_equal(cq.sign_descent(y, 4, sweeps=0), np.ones(16))
    assert cq.rangediff(np.empty((0, 8)), 2).tolist() == list(range(8))


def test_huge_and_tiny_tokens(rng):
    x = heavy_tailed(rng, 40, 32)
    scaled = x * np.geomspace(1e-300, 1e300, 40)[:, None] / np.abs(x).max(1, keepdims=True)
    p = cq.rangediff(scaled, 8, proposals=300)
    assert sorted(p.tolist()) == list(range(32))


@pytest.mark.parametrize("function", [cq.rangediff, cq.sign_descent])
@pytest.mark.parametrize(
    ("x", "b", "options", "error"),
    [
        (np.ones((3, 8)), 3, {}, cq.BlockSizeError),
        (np.ones((3, 12)), 6, {}, cq.HadamardOrderError),
        (np.ones(8), 2, {}, cq.ShapeError),
        (np.ones((3, 8), int), 2, {}, TypeError),
        (np.full((3, 8), np.nan), 2, {}, cq.NonFiniteError),
        ([[1.0]], 1, {}, TypeError),
        (np.ones((3, 8)), 2, {"start": np.zeros(8, int)}, ValueError),
        (np.ones((3, 8)), 2, {"start": np.ones(3, np.int8)}, ValueError),
    ],
)
def test_bad_input(function, x, b, options, error):
    with pytest.raises(error):
        function(x, b, **options)
