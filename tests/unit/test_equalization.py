"""Scales between tensors leave functions unchanged; corrected biases leave no mean error."""

from __future__ import annotations

import numpy as np
import pytest

import corequant as cq


def test_smoothing_leaves_the_layer_unchanged_and_evens_ranges(rng):
    x = rng.normal(size=(50, 24)) * np.exp(rng.normal(0, 2, 24))
    weights = [rng.normal(size=(8, 24)), rng.normal(size=(5, 24))]
    s = cq.smoothquant_scales(np.abs(x).max(0), *weights)
    for W in weights:
        np.testing.assert_allclose((x / s) @ (W * s).T, x @ W.T, rtol=1e-12, atol=1e-12)
    # At one half, activations and weights have the same range in every channel.
    largest = np.maximum(*(np.abs(W * s).max(0) for W in weights))
    np.testing.assert_allclose(np.abs(x / s).max(0), largest)
    ones = cq.smoothquant_scales(np.abs(x).max(0), *weights, alpha=1.0)
    np.testing.assert_allclose(ones, np.abs(x).max(0))


def test_silent_channels_keep_scale_one():
    W = np.array([[1.0, 0.0, 2.0]])
    np.testing.assert_array_equal(cq.smoothquant_scales(np.array([0.0, 5.0, 8.0]), W), [1, 1, 2])
    np.testing.assert_array_equal(cq.cross_layer_scales(np.zeros((3, 2)), W), [1, 1, 1])


def test_balanced_scales_meet_their_bound(rng):
    energy = np.exp(rng.normal(0, 2, 24))
    weights = [rng.normal(size=(8, 24)), rng.normal(size=(5, 24)) * np.exp(rng.normal(size=24))]
    norms = np.sqrt(sum(np.square(W).sum(0) for W in weights))

    def product(s):
        return (energy / s**2).sum() * np.square(norms * s).sum()

    s = cq.balanced_scales(energy, *weights)
    bound = (np.sqrt(energy) * norms).sum() ** 2
    assert product(s) == pytest.approx(bound, rel=1e-12)
    assert np.log(s).mean() == pytest.approx(0, abs=1e-12)
    for alpha in (0.0, 0.4, 0.6, 1.0):
        assert product(cq.balanced_scales(energy, *weights, alpha=alpha)) > bound
    for _ in range(20):
        assert product(s * np.exp(0.1 * rng.normal(size=24))) > bound


def test_balanced_scales_of_silent_channels_and_extremes():
    W = np.array([[1.0, 0.0, 2.0, 1.0]])
    found = cq.balanced_scales(np.array([0.0, 5.0, 16.0, 4.0]), W)
    np.testing.assert_allclose(found, [1, 1, 1, 1])
    huge = cq.balanced_scales(np.array([1e300, 1e-300]), np.array([[1e150, 1e-150]]))
    assert np.isfinite(huge).all()
    np.testing.assert_array_equal(cq.balanced_scales(np.zeros(2), np.ones((1, 2))), [1, 1])


def test_bad_balanced_scales():
    W = np.ones((2, 3))
    with pytest.raises(cq.ShapeError, match=r"weights\[0\] must have d=2 columns"):
        cq.balanced_scales(np.ones(2), W)
    with pytest.raises(ValueError, match="alpha must be in"):
        cq.balanced_scales(np.ones(3), W, alpha=-0.1)
    with pytest.raises(ValueError, match="at least one weight"):
        cq.balanced_scales(np.ones(3))


def test_cross_layer_scales_leave_a_relu_pair_unchanged(rng):
    first = rng.normal(size=(16, 6)) * np.exp(rng.normal(0, 1, (16, 1)))
    second, bias = rng.normal(size=(4, 16)), rng.normal(size=16)
    s = cq.cross_layer_scales(first, second)
    x = rng.normal(size=(30, 6))
    wanted = np.maximum(x @ first.T + bias, 0) @ second.T
    one, two = first / s[:, None], second * s
    np.testing.assert_allclose(np.maximum(x @ one.T + bias / s, 0) @ two.T, wanted, atol=1e-12)
    np.testing.assert_allclose(np.abs(one).max(1), np.abs(two).max(0))
    np.testing.assert_allclose(cq.cross_layer_scales(one, two), 1)


def test_a_corrected_bias_leaves_no_mean_error(rng):
    W, x = rng.normal(size=(8, 20)), rng.normal(1, 2, size=(500, 20))
    seen = x + 0.3
    q = cq.round_to_nearest(W, "int3:channel")
    bias = rng.normal(size=8)
    fixed = cq.correct_bias(W, q, x.mean(0), bias=bias, seen_mean=seen.mean(0))
    error = (x @ W.T + bias) - (seen @ cq.dequantize(q).T + fixed)
    np.testing.assert_allclose(error.mean(0), 0, atol=1e-12)
    assert np.abs(((x @ W.T) - (seen @ cq.dequantize(q).T)).mean(0)).max() > 0.01


def test_shapes_and_values_are_checked():
    W = np.ones((2, 3))
    with pytest.raises(cq.ShapeError, match=r"weights\[0\] must have d=2"):
        cq.smoothquant_scales(np.ones(2), W)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        cq.smoothquant_scales(np.ones(3), W, alpha=1.5)
    with pytest.raises(ValueError, match="at least one weight"):
        cq.smoothquant_scales(np.ones(3))
    with pytest.raises(cq.ShapeError, match="as many columns"):
        cq.cross_layer_scales(W, W)
    with pytest.raises(cq.ShapeError, match=r"mean must have shape \(3,\)"):
        cq.correct_bias(W, W, np.ones(2))
    with pytest.raises(cq.NonFiniteError, match="bias"):
        cq.correct_bias(W, W, np.ones(3), bias=np.array([1.0, np.nan]))
