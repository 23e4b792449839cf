"""Few tokens: what a method makes of them is judged on the inputs that they were drawn from."""

from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from corequant.rounding import hessian

SPECTRA = {
    "white": lambda d: np.ones(d),
    "decaying": lambda d: 1 / np.sqrt(np.arange(1, d + 1)),
    "steep": lambda d: 1 / np.arange(1, d + 1),
    "outliers": lambda d: np.r_[np.full(4, 50.0), np.ones(d - 4)],
}


def drawn(spectrum, d, tokens, seed):
    """Return W, the moments of some tokens, and those of the distribution that they are from."""
    generator = np.random.default_rng(seed)
    turn = np.linalg.qr(generator.normal(size=(d, d)))[0]
    values = SPECTRA[spectrum](d)
    truth = (turn * values) @ turn.T
    x = generator.normal(size=(tokens, d)) @ (turn * np.sqrt(values)).T
    spread = 0.1 * np.sqrt(np.diag(truth))
    q = x + spread * generator.normal(size=x.shape)
    W = generator.normal(size=(48, d))
    H, G = q.T @ q / tokens, x.T @ q / tokens
    return W, H, G, truth + np.diag(spread**2), truth


def rounded(method, W, H, G, spec, **options):
    if method == "gptq":
        return cq.gptq(W, H, spec, **options)
    if method == "learned":
        return cq.learned_rounding(W, H, spec, G=G, **options)
    return getattr(cq, method)(W, H, G, spec, **options)


CASES = [
    (method, spectrum, spec)
    for method in ("gptq", "gpfq", "qronos", "learned")
    for spectrum in SPECTRA
    for spec in ("int4:channel", "int2:channel")
    if method != "learned" or (spectrum, spec) == ("white", "int4:channel")
]


@pytest.mark.parametrize(("method", "spectrum", "spec"), CASES)
def test_few_tokens_do_no_harm(method, spectrum, spec):
    """Without the addition the worst of these was 47 times as bad as rounding to nearest."""
    for tokens in (1, 8, 32, 62):
        for known in (tokens, None):
            ratios = []
            for seed in range(3):
                W, H, G, *truth = drawn(spectrum, 64, tokens, seed)
                found = rounded(method, W, H, G, spec, tokens=known)
                plain = cq.round_to_nearest(W, spec)
                losses = [
                    cq.reconstruction_loss(W, cq.dequantize(one), *truth) for one in (found, plain)
                ]
                ratios.append(losses[0] / losses[1])
            # Single draws scatter; on average nothing is lost.
            assert np.mean(ratios) < 1.1, (tokens, known, ratios)


@pytest.mark.parametrize("method", ["gptq", "gpfq", "qronos", "learned"])
def test_more_tokens_than_channels_by_far_change_nothing(method):
    W, H, G, *_ = drawn("decaying", 64, 20_000, 0)
    plain = rounded(method, W, H, G, "int4:channel", tokens=10**12)
    for known in (20_000, None):
        found = rounded(method, W, H, G, "int4:channel", tokens=known)
        assert not found.report.shrinkage
        np.testing.assert_array_equal(found.codes, plain.codes)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tokens", [1, 7, 60, 100, 190, 198])
def test_the_rank_of_few_tokens_is_found(tokens, dtype):
    generator = np.random.default_rng(tokens)
    x = generator.normal(size=(tokens, 200)) * np.exp(generator.normal(0, 2, 200))
    H = (x.T @ x / tokens).astype(dtype)
    found = hessian._tokens_of(H, np.diagonal(H).astype(np.float64))
    assert found is not None
    assert abs(found - tokens) <= max(2, 0.05 * (200 - tokens))


def test_a_mean_of_zero_is_no_lack_of_tokens():
    """Inputs behind a LayerNorm have rank d - 1 however many there are."""
    x = np.random.default_rng(0).normal(size=(5000, 64))
    x -= x.mean(1, keepdims=True)
    H = x.T @ x / len(x)
    assert hessian._tokens_of(H, np.diagonal(H)) is None


def test_weights_are_those_of_the_estimator():
    """Equation 23, written down with the sample covariance itself."""
    x = np.random.default_rng(0).normal(size=(20, 30)) * np.linspace(1, 5, 30)
    S, n, p = x.T @ x / 20, 20, 30
    square, trace = np.trace(S @ S), np.trace(S)
    rho = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    assert hessian.shrinkage_weight(trace, float((S * S).sum()), p, n) == pytest.approx(min(1, rho))
    H, _, value = hessian.shrunk(S, None, n)
    mixed = (1 - rho) * S + rho * trace / p * np.eye(p)
    np.testing.assert_allclose(H * (1 - rho), mixed, rtol=1e-12)
    assert value == pytest.approx(rho / (1 - rho))


def test_dead_columns_stay_dead_and_inputs_are_not_touched():
    W, H, G, *_ = drawn("decaying", 64, 5, 0)
    H[3], H[:, 3], G[:, 3] = 0, 0, 0
    before = H.copy(), G.copy()
    found = cq.qronos(W, H, G, "int4:channel", tokens=5)
    assert found.report.dead_columns == (3,)
    assert found.report.shrinkage > 0
    for now, then in zip((H, G), before, strict=True):
        np.testing.assert_array_equal(now, then)
