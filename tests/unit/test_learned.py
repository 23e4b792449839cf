"""Learned rounding and MagR: what they promise, on any grid."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

import corequant as cq
from corequant._cpu.loops.projection import clip_rows
from corequant.rounding.learned import _neighbours
from corequant.rounding.loop import Scales
from tests.property.test_rounding import SPECS, layer, moments


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("objective", ["adaround", "signround"])
def test_learned_rounding_beats_the_nearest_with_neighbours_alone(spec, objective):
    W, x, q = layer(1, d=64)
    H, G = moments(x, q)
    scales = Scales.choose(W, cq.QuantSpec.parse(spec))
    low, high = _neighbours(W, scales)
    for cross in (None, G):
        found = cq.learned_rounding(W, H, spec, G=cross, objective=objective, steps=120)
        values = cq.dequantize(found)
        chosen = np.isclose(values, low, rtol=1e-6) | np.isclose(values, high, rtol=1e-6)
        assert chosen.all()
        assert found.report.loss < 0.97 * found.report.nearest_loss
        assert found.report.loss == pytest.approx(cq.reconstruction_loss(W, found, H, cross))


@pytest.mark.parametrize("spec", SPECS)
def test_neighbours_enclose_each_weight(spec):
    W = np.random.default_rng(0).normal(size=(16, 64))
    parsed = cq.QuantSpec.parse(spec)
    scales = Scales.choose(W, parsed)
    low, high = _neighbours(W, scales)
    nearest = cq.dequantize(scales.encode(W))
    inside = (low <= W) & (high >= W)
    assert inside.mean() > 0.8
    assert (np.isclose(nearest, low) | np.isclose(nearest, high)).all()
    for side in (low, high):
        np.testing.assert_allclose(cq.dequantize(scales.encode(side)), side)


def test_more_steps_of_adaround_come_close_to_gptq():
    W, x, _ = layer(2, rows=32, d=48, tokens=500)
    H, _ = moments(x, x)
    learned = cq.learned_rounding(W, H, "int3:channel", steps=1000).report
    nearest = learned.nearest_loss
    assert learned.loss < nearest - 0.6 * (nearest - cq.gptq(W, H, "int3:channel").report.loss)


def test_learned_rounding_finds_the_best_of_a_small_problem():
    generator = np.random.default_rng(3)
    x = generator.normal(size=(40, 6)) + 2 * generator.normal(size=(40, 1))
    H, W = x.T @ x / 40, generator.normal(size=(1, 6))
    scales = Scales.choose(W, cq.QuantSpec.parse("int3:channel"))
    low, high = _neighbours(W, scales)
    choices = np.array(np.meshgrid(*[[0, 1]] * 6)).reshape(6, -1).T
    best = min(cq.reconstruction_loss(W, low + c * (high - low), H) for c in choices)
    assert cq.learned_rounding(W, H, "int3:channel", steps=500).report.loss <= 1.3 * best


def test_no_steps_are_round_to_nearest():
    W, x, _ = layer(4)
    H, _ = moments(x, x)
    for objective in ("adaround", "signround"):
        found = cq.learned_rounding(W, H, "mxfp4", objective=objective, steps=0)
        np.testing.assert_array_equal(found.codes, cq.round_to_nearest(W, "mxfp4").codes)


@pytest.mark.parametrize("seed", range(3))
def test_magr_minimizes_its_objective(seed):
    W, x, _ = layer(seed, rows=2, d=8)
    H, _ = moments(x, x)
    alpha = 0.05
    sigma = np.linalg.eigvalsh(H)[-1]
    weight = alpha * sigma**2 / np.abs(H).sum(0).max()
    found = cq.magr(W, H, alpha=alpha, steps=5000)
    for w, v in zip(W, found, strict=True):

        def objective(u, w=w):
            return 0.5 * (u - w) @ H @ (u - w) + weight * np.abs(u).max()

        # The same as a smooth problem: minimize with a bound t on every magnitude.
        rows = [{"type": "ineq", "fun": lambda z, s=s: z[-1] - s * z[:-1]} for s in (1, -1)]
        wanted = scipy.optimize.minimize(
            lambda z, w=w: 0.5 * (z[:-1] - w) @ H @ (z[:-1] - w) + weight * z[-1],
            np.append(w, np.abs(w).max()),
            constraints=rows,
            method="SLSQP",
            options={"maxiter": 1000, "ftol": 1e-14},
        )
        assert objective(v) <= wanted.fun * (1 + 1e-6)
        assert objective(v) < objective(w)


def test_magr_shrinks_ranges_and_keeps_inputs():
    W, x, _ = layer(6, d=64)
    H, _ = moments(x, x)
    kept = W.copy(), H.copy()
    found = cq.magr(W, H, alpha=0.05)
    assert np.abs(found).max(1).mean() < 0.97 * np.abs(W).max(1).mean()
    energy = cq.reconstruction_loss(W, np.zeros_like(W), H)
    assert cq.reconstruction_loss(W, found, H) < 0.02 * energy
    grouped = cq.magr(W, H, alpha=0.05, group_size=16).reshape(-1, 16)
    assert np.abs(grouped).max(1).mean() < np.abs(W.reshape(-1, 16)).max(1).mean()
    np.testing.assert_array_equal(cq.magr(W, H, alpha=0), W)
    np.testing.assert_array_equal(W, kept[0])
    np.testing.assert_array_equal(H, kept[1])
    with pytest.raises(cq.BlockSizeError, match="group_size must divide d=64, got 48"):
        cq.magr(W, H, group_size=48)


@pytest.mark.parametrize("radius", [0.1, 1.0, 30.0])
def test_the_proximal_map_of_the_largest_magnitude(radius):
    x = np.random.default_rng(0).normal(size=(6, 40))
    x[2] = 0
    out = np.empty_like(x)
    clip_rows(0, 6, x, radius, np.empty(6), out)
    for u, v in zip(x, out, strict=True):
        if np.abs(u).sum() <= radius:
            assert not v.any()
            continue
        limit = np.abs(v).max()
        np.testing.assert_array_equal(v, np.clip(u, -limit, limit))
        assert np.abs(u - v).sum() == pytest.approx(radius)


@pytest.mark.parametrize("objective", ["adaround", "signround"])
def test_units_do_not_matter(objective):
    generator = np.random.default_rng(0)
    X, W = generator.normal(size=(300, 48)), generator.normal(size=(8, 48))
    H = X.T @ X / 300
    # Scales of least squared error clip weights, which then have one neighbour only.
    spec = "int3:channel:mse"
    expected = cq.learned_rounding(W, H, spec, objective=objective, steps=100)
    assert expected.report.loss < expected.report.nearest_loss
    for weight, moment in ((2.0**20, 1), (2.0**-20, 2.0**9), (2.0, 2.0**-9)):
        found = cq.learned_rounding(W * weight, H * moment, spec, objective=objective, steps=100)
        np.testing.assert_array_equal(found.codes, expected.codes)
