"""Moments of two streams, and weights that are rounded together."""

from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from corequant.rounding import InputMoments, RoundingOptions, round_together


def streams(seed=0, tokens=200, d=32):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(tokens, d)) * np.exp(generator.normal(0, 1, d))
    x[:, 1:] += 0.5 * x[:, :-1]
    return x, x + 0.1 * generator.normal(size=x.shape)


def weights(*rows, d=32):
    generator = np.random.default_rng(1)
    return {f"w{k}": generator.normal(size=(n, d)) for k, n in enumerate(rows)}


def test_moments_are_means_over_tokens_however_they_come():
    x, q = streams()
    whole = InputMoments(32, dtype=np.float64).update(q, x)
    np.testing.assert_allclose(whole.H, q.T @ q / 200, rtol=1e-12)
    np.testing.assert_allclose(whole.G, x.T @ q / 200, rtol=1e-12)
    parts = [
        InputMoments(32, dtype=np.float64).update(q[a:b].reshape(2, -1, 32), x[a:b])
        for a, b in ((0, 60), (60, 200))
    ]
    merged = parts[0].merge(parts[1])
    assert merged.count == 200
    np.testing.assert_allclose(merged.H, whole.H, rtol=1e-12)
    np.testing.assert_allclose(merged.G, whole.G, rtol=1e-12, atol=1e-12)


def test_moments_refuse():
    x, q = streams()
    bad = q.copy()
    bad[3, 4] = np.nan
    moments = InputMoments(32)
    with pytest.raises(cq.NonFiniteError, match=r"quantized.*\(3, 4\)"):
        moments.update(bad, x)
    with pytest.raises(cq.NonFiniteError, match=r"float_inputs.*\(3, 4\)"):
        moments.update(x, bad)
    with pytest.raises(cq.NonFiniteError, match="second moments of quantized"):
        moments.update(np.full((2, 32), 1e30), x[:2])
    with pytest.raises(cq.CalibrationError, match="no tokens"):
        _ = moments.H
    with pytest.raises(TypeError, match="float_inputs must be given"):
        moments.update(q)
    with pytest.raises(TypeError, match="float_inputs must be left out"):
        InputMoments(32, cross=False).update(q, x)
    with pytest.raises(TypeError, match="quantized must be an array, got list"):
        moments.update([1.0], x)
    with pytest.raises(cq.ShapeError, match="d=32 channels"):
        moments.update(q[:, 1:], x)
    with pytest.raises(cq.ShapeError, match="tokens of quantized, 200, got 100"):
        moments.update(q, x[:100])
    with pytest.raises(ValueError, match="float32 or float64"):
        InputMoments(4, dtype=np.float16)
    with pytest.raises(ValueError, match="same moments"):
        moments.merge(InputMoments(32, cross=False))
    with pytest.raises(TypeError, match="must be InputMoments"):
        moments.merge(3)


@pytest.mark.parametrize("method", ["nearest", "gptq", "gpfq", "qronos", "learned"])
@pytest.mark.parametrize("spec", ["int4:channel", "int3:group8:asymmetric", "nvfp4", "int4:tensor"])
def test_together_equals_each_alone(method, spec):
    x, q = streams()
    moments = InputMoments(32, dtype=np.float64).update(q, x)
    given = weights(3, 5, 1)
    options = RoundingOptions(method, steps=20)
    copies = {name: W.copy() for name, W in given.items()}
    found = round_together(given, spec, options, moments.H, moments.G)
    assert list(found) == list(given)
    for name, W in given.items():
        alone = round_together({name: W}, spec, options, moments.H, moments.G)[name]
        np.testing.assert_array_equal(found[name].codes, alone.codes)
        np.testing.assert_array_equal(found[name].scales, alone.scales)
        assert found[name].report.name == name
        assert found[name].report.loss == pytest.approx(alone.report.loss)
        wanted = cq.reconstruction_loss(W, found[name], moments.H, moments.G)
        assert found[name].report.loss == pytest.approx(wanted)
        nearest = cq.reconstruction_loss(W, cq.round_to_nearest(W, spec), moments.H, moments.G)
        assert found[name].report.nearest_loss == pytest.approx(nearest)
        np.testing.assert_array_equal(W, copies[name])


@pytest.mark.parametrize(
    ("method", "refit"), [("nearest", False), ("gptq", False), ("gptq", True), ("learned", False)]
)
def test_a_global_scale_that_is_given_is_shared(method, refit):
    x, q = streams()
    moments = InputMoments(32, dtype=np.float64).update(q, x)
    given = weights(3, 5)
    divisor = np.array([100.0], np.float32)
    options = RoundingOptions(method, steps=20, refit=refit)
    shared = {"spec": "nvfp4", "options": options, "H": moments.H, "G": moments.G}
    found = round_together(given, **shared, global_scale=divisor)
    for name, W in given.items():
        assert found[name].global_scale == divisor
        alone = round_together({name: W}, **shared, global_scale=divisor)[name]
        np.testing.assert_array_equal(found[name].codes, alone.codes)
        np.testing.assert_array_equal(found[name].scales, alone.scales)


def test_options_are_those_of_the_methods():
    x, q = streams()
    m = InputMoments(32, dtype=np.float64).update(q, x)
    (W,) = weights(6).values()

    def codes(options, **more):
        return round_together({"w": W}, "int4:channel", options, m.H, m.G)["w"].codes

    def plain(rounded):
        return rounded.codes

    pairs = [
        (RoundingOptions("gptq", 0.3, False), cq.gptq(W, m.H, "int4:channel", damping=0.3,
                                                       act_order=False)),
        (RoundingOptions("gptq", correction=1.0), cq.gptq(W, m.H, "int4:channel", G=m.G,
                                                           correction=1.0)),
        (RoundingOptions("qronos", 1e-2), cq.qronos(W, m.H, m.G, "int4:channel", damping=1e-2)),
        (RoundingOptions("gpfq", act_order=False), cq.gpfq(W, m.H, m.G, "int4:channel",
                                                           act_order=False)),
        (RoundingOptions("gptq", magr=0.02), cq.gptq(cq.magr(W, m.H, alpha=0.02), m.H,
                                                     "int4:channel")),
    ]  # fmt: skip
    for options, wanted in pairs:
        np.testing.assert_array_equal(codes(options), wanted.codes)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "up"}, "method must be one of nearest, gpfq"),
        ({"method": "gpfq", "damping": 0.1}, "damping needs method gptq or qronos"),
        ({"method": "qronos", "correction": 0.1}, "correction needs method gptq"),
        ({"method": "learned", "refit": True}, "refit needs method"),
        ({"method": "nearest", "magr": 0.1}, "magr needs method"),
        ({"method": "gptq", "damping": -1}, "damping must be finite and not negative"),
        ({"method": "gptq", "damping": True}, "damping must be a number"),
        ({"method": "gptq", "act_order": 1}, "act_order must be true or false"),
        ({"method": "learned", "steps": -1}, "steps must be at least 0"),
    ],
)
def test_bad_options(fields, words):
    with pytest.raises((ValueError, TypeError), match=words):
        RoundingOptions(**fields)


def test_missing_and_bad_moments_name_the_layers():
    (W,) = weights(4).values()
    with pytest.raises(TypeError, match="H must be"):
        round_together({"a": W}, "int4:channel", RoundingOptions("gptq"))
    with pytest.raises(TypeError, match="G must be"):
        round_together({"a": W}, "int4:channel", RoundingOptions("qronos"), np.eye(32))
    crooked = np.eye(32)
    crooked[2, 3] = 0.5
    with pytest.raises(cq.HessianError, match="H of a, b must be symmetric"):
        round_together({"a": W, "b": W}, "int4:channel", RoundingOptions("gptq"), crooked)
    negative = -np.eye(32)
    with pytest.raises(cq.HessianError, match="H of a must be positive semidefinite"):
        round_together({"a": W}, "int4:channel", RoundingOptions("gptq"), negative)
