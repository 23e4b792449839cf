"""Scales fitted to a layer's outputs, against trying all combinations and the plain search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import corequant as cq
from corequant.rounding import RoundingOptions, round_together
from corequant.rounding.fitting import FACTORS, leading_pairs


def inputs(rng, tokens, d, mean=2.0):
    return rng.normal(size=(tokens, d)) * np.exp(rng.normal(0, 0.5, d)) + mean * rng.normal(size=d)


def moments(X):
    return X.T @ X / len(X)


@pytest.mark.parametrize("spec", ["int4:channel:symmetric:mse", "int3:channel:asymmetric", "e2m1"])
def test_a_full_rank_fit_is_the_best_factor(rng, spec):
    spec = "e2m1:channel" if spec == "e2m1" else spec
    W, H = rng.normal(size=(6, 24)), moments(inputs(rng, 300, 24))
    start = cq.quantize(W, spec)
    fitted = cq.fit_scales(W, H, spec, rank=24)
    for r in range(6):
        losses = []
        for factor in FACTORS:
            zeros = None if start.zero_points is None else start.zero_points[r : r + 1]
            tried = cq.quantize(W[r : r + 1], spec, start.scales[r : r + 1] * factor, zeros)
            losses.append(cq.reconstruction_loss(W[r : r + 1], tried, H))
        e = W[r] - cq.dequantize(fitted)[r]
        assert e @ H @ e == pytest.approx(min(losses), rel=1e-4)


def test_groups_are_no_worse_than_any_single_change(rng):
    # Coordinate descent ends where no group's scale alone can be changed for the better.
    W, H = rng.normal(size=(3, 16)), moments(inputs(rng, 300, 16))
    spec = "int3:group8:symmetric"
    start, fitted = cq.quantize(W, spec), cq.fit_scales(W, H, spec, rank=16)
    best = np.full(3, np.inf)
    for pair in itertools.product(FACTORS, repeat=2):
        tried = cq.quantize(W, spec, start.scales * np.array(pair, np.float32))
        E = W - cq.dequantize(tried)
        best = np.minimum(best, np.einsum("ij,jk,ik->i", E, H, E))
    E = W - cq.dequantize(fitted)
    found = np.einsum("ij,jk,ik->i", E, H, E)
    assert (found >= best * (1 - 1e-5)).all()
    assert found.sum() < 1.3 * best.sum()
    assert found.sum() < cq.reconstruction_loss(W, start, H)


@pytest.mark.parametrize("spec", ["int4:channel:symmetric:mse", "int4:group32:asymmetric"])
def test_outputs_come_closer_where_inputs_have_a_mean(rng, spec):
    W, X = rng.normal(size=(64, 128)), inputs(rng, 2000, 128)
    H = moments(X)
    nearest, fitted = cq.quantize(W, spec), cq.fit_scales(W, H, spec)
    assert cq.reconstruction_loss(W, fitted, H) < 0.6 * cq.reconstruction_loss(W, nearest, H)
    # Each entry is still the nearest of its grid.
    again = cq.quantize(W, spec, fitted.scales, fitted.zero_points)
    np.testing.assert_array_equal(again.codes, fitted.codes)
    assert fitted.spec == nearest.spec


def test_chunks_of_rows_make_no_difference(rng, monkeypatch):
    W, H = rng.normal(size=(20, 32)), moments(inputs(rng, 100, 32))
    whole = cq.fit_scales(W, H, "int4:group16")
    monkeypatch.setattr("corequant.rounding.fitting.CHUNK", 1)
    rows = cq.fit_scales(W, H, "int4:group16")
    np.testing.assert_array_equal(rows.scales, whole.scales)
    np.testing.assert_array_equal(rows.codes, whole.codes)


def test_inputs_are_left_alone_and_nothing_is_drawn(rng):
    W, H = rng.normal(size=(4, 16)).astype(np.float32), moments(inputs(rng, 50, 16))
    kept = W.copy(), H.copy()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (cq.fit_scales(W, H, "int4:channel", rank=3) for _ in range(2))
    np.testing.assert_array_equal(first.scales, second.scales)
    np.testing.assert_array_equal(W, kept[0])
    np.testing.assert_array_equal(H, kept[1])
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_zero_rows_dead_channels_and_no_rows(rng):
    W, H = rng.normal(size=(3, 16)), moments(inputs(rng, 50, 16))
    W[1] = 0
    H[5] = H[:, 5] = 0
    fitted = cq.fit_scales(W, H, "int4:channel")
    assert not cq.dequantize(fitted)[1].any()
    assert np.isfinite(cq.dequantize(fitted)).all()
    assert cq.fit_scales(W[:0], H, "int4:channel").codes.shape == (0, 16)


@pytest.mark.parametrize("method", ["gptq", "qronos"])
def test_methods_start_from_fitted_scales(rng, method):
    W, H = rng.normal(size=(8, 32)), moments(inputs(rng, 200, 32)).astype(np.float32)
    G = H if method == "qronos" else None
    options = RoundingOptions(method, fit_scales=True)
    found = round_together({"a": W}, "int4:channel", options, H, G)["a"]
    np.testing.assert_array_equal(found.scales, cq.fit_scales(W, H, "int4:channel").scales)


def test_options_ask_for_moments():
    assert RoundingOptions(fit_scales=True).needs_moments
    assert not RoundingOptions().needs_moments
    with pytest.raises(TypeError, match="fit_scales must be true or false"):
        RoundingOptions(fit_scales=1)
    with pytest.raises(TypeError, match="H must be"):
        round_together({"a": np.ones((2, 2))}, "int4:channel", RoundingOptions(fit_scales=True))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"spec": "int4:tensor"}, cq.SpecError, "must scale channels or groups"),
        ({"spec": "mxfp4"}, cq.SpecError, "scales in float32"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"W": np.full((2, 16), np.nan)}, cq.NonFiniteError, "W"),
        ({"H": np.eye(8)}, cq.ShapeError, "H"),
        ({"H": -np.eye(16)}, cq.HessianError, "positive semidefinite"),
    ],
)
def test_bad_input(change, error, words):
    given = {"W": np.ones((2, 16)), "H": np.eye(16), "spec": "int4:channel"} | change
    with pytest.raises(error, match=words):
        cq.fit_scales(given.pop("W"), given.pop("H"), given.pop("spec"), **given)


def test_inputs_that_are_all_zero_leave_the_scales_alone():
    W = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    found = cq.fit_scales(W, np.zeros((32, 32), np.float32), "int4:channel")
    np.testing.assert_array_equal(found.scales, cq.quantize(W, "int4:channel").scales)


def test_inputs_whose_channels_add_up_to_nothing():
    rng = np.random.default_rng(1)
    x = rng.normal(2.0, 1.0, (256, 32))
    x -= x.mean(1, keepdims=True)
    W, H = rng.normal(size=(8, 32)), x.T @ x / 256
    nearest = cq.quantize(W, "int4:channel:symmetric:mse")
    fitted = cq.fit_scales(W, H, "int4:channel:symmetric:mse")
    assert cq.reconstruction_loss(W, fitted, H) < cq.reconstruction_loss(W, nearest, H)


@pytest.mark.parametrize("kind", ["identity", "zeros and ones", "low rank", "noise"])
def test_the_same_matrix_gives_the_same_scales(kind):
    generator, d = np.random.default_rng(0), 64
    H = {
        "identity": np.eye(d),
        "zeros and ones": np.diag(generator.integers(0, 2, d)).astype(float),
        "low rank": np.cov(generator.normal(size=(d, 4))),
        "noise": np.cov(generator.normal(size=(d, 200))),
    }[kind]
    values, vectors = leading_pairs(lambda block: H @ block, d, 8)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(H)[-8:], atol=1e-8 * values[-1])
    np.testing.assert_allclose(H @ vectors, vectors * values, atol=1e-5 * values[-1])
    W = generator.normal(size=(4, d))
    scales = {cq.fit_scales(W, H, "int4:channel:mse").scales.tobytes() for _ in range(4)}
    assert len(scales) == 1
    for weight, moment in ((2.0**-70, 2.0**-70), (2.0**100, 2.0**90)):
        found = cq.fit_scales(W * weight, H * moment, "int4:channel:mse")
        np.testing.assert_array_equal(found.codes, cq.fit_scales(W, H, "int4:channel:mse").codes)
