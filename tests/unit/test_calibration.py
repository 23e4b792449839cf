from __future__ import annotations

import copy

import numpy as np
import pytest

import corequant as cq
from tests.conftest import heavy_tailed


def test_against_the_formulas(rng):
    x = heavy_tailed(rng, 4, 25, 12)
    rows = x.reshape(-1, 12)
    stats = cq.ActivationStats(12, gram=True, dtype=np.float64).update(x)
    assert stats.count == 100
    np.testing.assert_allclose(stats.mean_abs, np.abs(rows).mean(0), rtol=1e-13)
    np.testing.assert_allclose(stats.mean_square, np.square(rows).mean(0), rtol=1e-13)
    np.testing.assert_array_equal(stats.absmax, np.abs(rows).max(0))
    np.testing.assert_allclose(stats.gram, rows.T @ rows / 100, rtol=1e-12)


def test_batching_and_merging_do_not_matter(rng):
    x = heavy_tailed(rng, 90, 16)
    whole = cq.ActivationStats(16, gram=True, dtype=np.float64).update(x)
    parts = cq.ActivationStats(16, gram=True, dtype=np.float64)
    for part in np.split(x, [1, 7, 7, 60]):
        parts.update(part)
    halves = [
        cq.ActivationStats(16, gram=True, dtype=np.float64).update(h) for h in (x[:31], x[31:])
    ]
    before = halves[0].mean_abs
    merged = halves[0].merge(halves[1])
    np.testing.assert_array_equal(halves[0].mean_abs, before)
    for other in (parts, merged):
        assert other.count == whole.count
        np.testing.assert_allclose(other.mean_abs, whole.mean_abs, rtol=1e-13)
        np.testing.assert_allclose(other.mean_square, whole.mean_square, rtol=1e-13)
        np.testing.assert_array_equal(other.absmax, whole.absmax)
        np.testing.assert_allclose(other.gram, whole.gram, rtol=1e-12)


def test_token_normalisation_gives_every_token_the_same_energy(rng):
    x = rng.normal(size=(10, 8))
    x[3] *= 1e6
    x[5] = 0
    stats = cq.ActivationStats(8, token_normalize=True).update(x)
    assert stats.mean_square.sum() == pytest.approx(8 * 9 / 10)
    root = np.sqrt(np.square(x).mean(1, keepdims=True))
    expected = np.abs(np.divide(x, root, where=root > 0, out=np.zeros_like(x))).mean(0)
    np.testing.assert_allclose(stats.mean_abs, expected, rtol=1e-12)


def test_means_accumulate_in_float64():
    # Ten million times 0.1 in float32 drifts by more than a thousandth.
    x = np.full((10_000, 1), 0.1, np.float32)
    stats = cq.ActivationStats(1)
    for _ in range(100):
        stats.update(x)
    assert stats.mean_abs[0] == pytest.approx(np.float64(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f8"])
def test_dtypes_strides_and_unmutated_input(rng, dtype):
    x = np.asfortranarray(rng.normal(size=(20, 6)).astype(dtype))
    before = x.copy()
    stats = cq.ActivationStats(6).update(x)
    np.testing.assert_allclose(stats.mean_abs, np.abs(x.astype(np.float64)).mean(0), rtol=1e-6)
    np.testing.assert_array_equal(x, before)


def test_nan_is_refused_with_its_place_and_nothing_is_added(rng):
    stats = cq.ActivationStats(4, gram=True).update(np.ones((2, 4)))
    bad = np.ones((3, 4))
    bad[2, 1] = np.nan
    bad[2, 3] = np.inf
    with pytest.raises(cq.NonFiniteError, match=r"2 non-finite values.*\(2, 1\)"):
        stats.update(bad)
    assert stats.count == 2
    np.testing.assert_array_equal(stats.gram, np.ones((4, 4)))


def test_bad_use(rng):
    with pytest.raises(cq.ShapeError, match="d=4"):
        cq.ActivationStats(4).update(np.ones((2, 3)))
    with pytest.raises(TypeError):
        cq.ActivationStats(4).update(np.ones((2, 4), int))
    with pytest.raises(cq.CalibrationError, match="no tokens"):
        _ = cq.ActivationStats(4).mean_abs
    with pytest.raises(ValueError, match="gram=True"):
        _ = cq.ActivationStats(4).update(np.ones(4)).gram
    with pytest.raises(ValueError, match="same statistics"):
        cq.ActivationStats(4).merge(cq.ActivationStats(5))
    with pytest.raises(TypeError):
        cq.ActivationStats(4).merge(3)
    with pytest.raises(ValueError, match="float32 or float64"):
        cq.ActivationStats(4, dtype=np.float16)
    with pytest.raises(ValueError, match="at least 1"):
        cq.ActivationStats(0)
    assert cq.ActivationStats(4).update(np.empty((0, 4))).count == 0


def sampled(seed, start):
    stats = cq.ActivationStats(1, reservoir=64, seed=seed)
    return stats.update(start + np.arange(1000.0)[:, None])


def test_a_merged_sample_goes_on_at_other_places():
    merged = sampled(0, 0).merge(sampled(1, 1000))
    again = sampled(0, 0).merge(sampled(1, 1000))
    for stats in (merged, again):
        stats.update(2000 + np.arange(1000.0)[:, None])
    np.testing.assert_array_equal(merged.tokens, again.tokens)
    kept = merged.tokens[:, 0].astype(int)
    first, last = {k for k in kept if k < 1000}, {k - 2000 for k in kept if k >= 2000}
    assert len(first) > 8
    assert len(last) > 8
    assert len(first & last) < min(len(first), len(last)) / 2
    with pytest.raises(ValueError, match="a different seed, got 1 in both"):
        merged.merge(sampled(1, 0))


def test_statistics_of_another_kind_are_not_taken_over(rng):
    x = rng.normal(size=(8, 16))
    stats = cq.ActivationStats(16, gram=True, reservoir=4).update(x)
    before = stats.to_arrays()
    other = cq.ActivationStats(32, gram=True, reservoir=4).update(rng.normal(size=(8, 32)))
    missing = {name: array for name, array in before.items() if name != "absmax"}
    for arrays, error in ((other.to_arrays(), cq.ShapeError), (missing, ValueError)):
        with pytest.raises(error):
            stats.restore(arrays)
    after = stats.to_arrays()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_a_copy_has_sums_of_its_own(rng):
    stats = cq.ActivationStats(16).update(rng.normal(size=(8, 16)))
    mean = stats.mean_abs
    copy.copy(stats).update(100 * np.ones((1, 16)))
    np.testing.assert_array_equal(stats.mean_abs, mean)
