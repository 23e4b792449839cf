"""Levels of least squared error: against all partitions, Lloyd's iterations and integrals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import corequant as cq
from corequant.errors import NonFiniteError, ShapeError, SpecError


def best_of_all(x, w, k):
    """Return the least error of any cut of the sorted values into k runs."""
    order = np.argsort(x)
    x, w = x[order], w[order]
    best = math.inf
    for cuts in itertools.combinations(range(1, len(x)), k - 1):
        loss = 0.0
        for a, b in itertools.pairwise([0, *cuts, len(x)]):
            mean = np.average(x[a:b], weights=w[a:b])
            loss += (w[a:b] * (x[a:b] - mean) ** 2).sum()
        best = min(best, loss)
    return best


def error_of(x, w, levels):
    return (w * np.square(x[:, None] - levels).min(1)).sum()


def lloyd(rng, x, w, k):
    """Return the error after Lloyd's iterations from k of the values."""
    levels = np.sort(rng.choice(x, k, replace=False))
    for _ in range(100):
        label = np.abs(x[:, None] - levels).argmin(1)
        mass = np.bincount(label, w, k)
        moved = np.where(mass > 0, np.bincount(label, w * x, k) / np.maximum(mass, 1e-300), levels)
        if np.array_equal(moved, levels):
            break
        levels = moved
    return error_of(x, w, levels)


@pytest.mark.parametrize("n", [1, 2, 5, 9, 12])
def test_levels_are_the_best_of_all_partitions(rng, n):
    for _ in range(4):
        x, w = rng.standard_t(3, n), rng.gamma(0.5, size=n) + 1e-3
        table = cq.kmeans_table(x, w, range(1, 5))
        for k in range(1, min(4, n) + 1):
            best = best_of_all(x, w, k)
            assert table.losses[k - 1] == pytest.approx(best, rel=1e-9, abs=1e-15)
            assert error_of(x, w, table.levels(k)) == pytest.approx(best, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("k", [2, 5, 8, 16])
def test_levels_are_never_worse_than_lloyds_best_of_20(rng, k):
    x, w = rng.standard_t(4, 300), rng.random(300)
    found = cq.kmeans_table(x, w, (k,)).losses[0]
    tried = [lloyd(rng, x, w, k) for _ in range(20)]
    assert found <= min(tried) * (1 + 1e-12)
    assert found < np.median(tried) or k == 2


def test_integer_weights_are_repeated_values(rng):
    x, w = rng.normal(size=40), rng.integers(0, 4, 40).astype(np.float64)
    weighted = cq.kmeans_table(x, w, (2, 3, 7))
    repeated = cq.kmeans_table(np.repeat(x, w.astype(int)), None, (2, 3, 7))
    np.testing.assert_allclose(weighted.losses, repeated.losses, rtol=1e-10)
    np.testing.assert_allclose(weighted.levels(7), repeated.levels(7), rtol=1e-10)


def test_fewer_distinct_values_than_levels_are_levels(rng):
    x = rng.choice([-1.5, 0.25, 3.0], 50)
    table = cq.kmeans_table(x, rng.random(50), (3, 4, 8))
    assert (table.losses == 0).all()
    assert set(table.levels(8)) == {-1.5, 0.25, 3.0}
    assert (np.diff(table.levels(8)) >= 0).all()
    np.testing.assert_array_equal(cq.kmeans_levels(np.full(9, -2.5), levels=4), np.full(4, -2.5))


def test_evenly_spaced_values_give_their_grid():
    grid = np.arange(8) / 4
    x = np.concatenate([np.repeat(grid, 5), grid + 0.01, grid - 0.01])
    np.testing.assert_allclose(cq.kmeans_levels(x, levels=8), grid, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("weighted", [None, "one", "each"])
def test_rows_are_independent(rng, dtype, weighted):
    x = rng.normal(size=(70, 33)).astype(dtype)
    w = {None: None, "one": rng.random(33), "each": rng.random((70, 33))}[weighted]
    table = cq.kmeans_table(x, w, (2, 6))
    for r in (0, 63, 64, 69):
        own = w[r] if weighted == "each" else w
        alone = cq.kmeans_table(x[r], own, (6,))
        np.testing.assert_allclose(table.levels(6)[r], alone.levels(6), rtol=1e-12)
        assert table.losses[r, 1] == pytest.approx(alone.losses[0], rel=1e-9)
    assert (table.losses[:, 1] <= table.losses[:, 0]).all()


def test_values_without_weight_do_not_count(rng):
    x, w = rng.normal(size=30), np.zeros(30)
    w[:4] = 1
    np.testing.assert_allclose(cq.kmeans_levels(x, w, 4), np.sort(x[:4]), rtol=1e-12)
    # Where none has any, all count the same.
    np.testing.assert_array_equal(
        cq.kmeans_levels(x, np.zeros(30), 4), cq.kmeans_levels(x, levels=4)
    )


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e200])
def test_magnitudes_do_not_matter(rng, size):
    x, w = rng.normal(size=50), rng.random(50)
    plain, scaled = cq.kmeans_table(x, w, (5,)), cq.kmeans_table(x * size, w, (5,))
    np.testing.assert_allclose(scaled.levels(5) / size, plain.levels(5), rtol=1e-9)


@pytest.mark.parametrize("density", ["normal", "laplace"])
@pytest.mark.parametrize("size", [2, 3, 4, 7, 16, 256])
def test_lloyd_max_levels_are_means_of_their_cells(density, size):
    from scipy import integrate, stats

    levels = cq.lloyd_max(density, size)
    shape = stats.norm() if density == "normal" else stats.laplace(scale=1 / math.sqrt(2))
    np.testing.assert_allclose(levels, -levels[::-1], atol=1e-15)
    edges = np.concatenate([[-40], (levels[1:] + levels[:-1]) / 2, [40]])
    for k in sorted({0, size // 2, size - 1}):
        # At 0 the density of Laplace has a kink.
        cuts = [c for c in (0.0, levels[k]) if edges[k] < c < edges[k + 1]]
        given = {"points": cuts, "limit": 200}
        mass = integrate.quad(shape.pdf, edges[k], edges[k + 1], **given)[0]
        mean = integrate.quad(lambda x: x * shape.pdf(x), edges[k], edges[k + 1], **given)[0] / mass
        assert levels[k] == pytest.approx(mean, rel=1e-7, abs=1e-9)


def test_lloyd_max_agrees_with_published_tables():
    # Max, "Quantizing for minimum distortion", IRE Transactions on Information Theory 6 (1960).
    np.testing.assert_allclose(cq.lloyd_max("normal", 4)[2:], [0.4528, 1.510], atol=5e-4)
    np.testing.assert_allclose(
        cq.lloyd_max("normal", 8)[4:], [0.2451, 0.7560, 1.344, 2.152], atol=5e-4
    )


def test_lloyd_max_levels_are_those_of_many_samples(rng):
    x = np.sort(rng.normal(size=20001))[::4]
    np.testing.assert_allclose(cq.kmeans_levels(x, levels=4), cq.lloyd_max("normal", 4), atol=0.06)


def test_bad_input_is_refused(rng):
    x = rng.normal(size=8)
    for bad in (np.nan, np.inf):
        with pytest.raises(NonFiniteError, match="values"):
            cq.kmeans_levels(np.array([1.0, bad]))
        with pytest.raises(NonFiniteError, match="weights"):
            cq.kmeans_levels(x, np.full(8, bad))
    with pytest.raises(ValueError, match="weights must not be negative, got -1"):
        cq.kmeans_levels(x, np.full(8, -1.0))
    with pytest.raises(ShapeError, match="weights must have values' shape"):
        cq.kmeans_levels(x, np.ones(7))
    with pytest.raises(ShapeError, match="values must be"):
        cq.kmeans_levels(np.empty((3, 0)))
    with pytest.raises(TypeError, match="values must be a numpy.ndarray"):
        cq.kmeans_levels([1.0, 2.0])
    with pytest.raises(TypeError, match="real floating dtype"):
        cq.kmeans_levels(np.arange(5))
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        cq.kmeans_levels(x, levels=0)
    with pytest.raises(ValueError, match="sizes must be numbers from 1 to 4096"):
        cq.kmeans_levels(x, levels=5000)
    with pytest.raises(ValueError, match="size must be one of"):
        cq.kmeans_table(x, sizes=(2, 4)).levels(3)
    with pytest.raises(SpecError, match="distribution must be laplace or normal, got 'uniform'"):
        cq.lloyd_max("uniform", 4)
    with pytest.raises(ValueError, match="levels must be at most 4096"):
        cq.lloyd_max("normal", 5000)
