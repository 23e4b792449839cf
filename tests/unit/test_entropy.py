"""Entropy-coded weights: what comes back, in how many bits, and what WaterSIC makes of them."""

from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from corequant.errors import CheckpointError, NonFiniteError, ShapeError, SpecError


def moments(rng, d, tokens=400):
    X = rng.normal(size=(tokens, d)) @ rng.normal(size=(d, d)) * rng.lognormal(0, 1, d)
    return X.T @ X / tokens


def restored(weight):
    """Return a weight as it comes back from its bytes, which are as many as it says."""
    tensors = weight.to_tensors()
    assert sum(array.nbytes for array in tensors.values()) == weight.nbytes
    return cq.load_coded(tensors, weight.describe())


def codes_of(rng, rows, columns, spread):
    sizes = rng.lognormal(0, 0.7, (rows, 1)) * rng.lognormal(0, 0.7, columns)
    return np.rint(rng.standard_t(5, (rows, columns)) * sizes * spread).clip(-2047, 2047)


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (64, 48)])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 300.0])
def test_codes_come_back_from_their_bytes(rng, shape, spread):
    codes = codes_of(rng, *shape, spread).astype(np.int16)
    coded = cq.EntropyCoded.of(codes, rng.lognormal(size=shape[1]))
    again = restored(coded)
    np.testing.assert_array_equal(again.codes, codes)
    np.testing.assert_array_equal(again.dequantize(), coded.dequantize())


@pytest.mark.parametrize("shape", [(2, 2), (100, 40)])
def test_extreme_codes_come_back(rng, shape):
    for codes in (
        np.full(shape, -2047, np.int16),
        rng.choice([-2047, 2047], shape).astype(np.int16),
        np.where(np.arange(shape[1]) == 1, 2047, 0).astype(np.int16) * np.ones(shape, np.int16),
        rng.integers(-2047, 2048, shape, np.int16),
    ):
        coded = cq.EntropyCoded.of(codes, np.ones(shape[1]))
        np.testing.assert_array_equal(restored(coded).codes, codes)


def test_streams_are_as_long_as_the_entropy(rng):
    codes = codes_of(rng, 300, 200, 0.4).astype(np.int16)
    coded = cq.EntropyCoded.of(codes, np.ones(200))
    tables = coded.row_levels[:, None] + coded.column_levels
    ideal = 0.0
    for table in np.unique(tables):
        own = codes[tables == table]
        _, counts = np.unique(own, return_counts=True)
        ideal -= (counts * np.log2(counts / len(own))).sum()
    stream = 8 * coded.to_tensors()["stream"].nbytes
    assert ideal <= stream < 1.015 * ideal + 64
    # One table for all would take more.
    _, counts = np.unique(codes, return_counts=True)
    assert stream < -0.95 * (counts * np.log2(counts / codes.size)).sum()


@pytest.mark.parametrize("bits", [0.5, 1, 2.12, 3, 5.5])
def test_the_budget_is_met(rng, bits):
    W, H = rng.standard_t(5, (600, 64)), moments(rng, 64)
    coded = cq.watersic(W, H, bits)
    assert bits - 0.03 < coded.bits_per_weight <= bits
    np.testing.assert_array_equal(restored(coded.weight).dequantize(), coded.dequantize())
    loss = cq.reconstruction_loss(W, coded.dequantize(), H)
    assert coded.report.loss == pytest.approx(loss, rel=1e-6)


def test_steps_by_cost_lose_least(rng):
    W, H = rng.normal(size=(600, 64)), moments(rng, 64)
    losses = [
        cq.watersic(W, H, 2.5).report.loss,
        cq.watersic(W, H, 2.5, waterfilling=False).report.loss,
        cq.gptq(W, H, "int2:channel:symmetric:mse").report.loss,
    ]
    assert losses == sorted(losses)
    assert losses[0] < losses[1] / 1.5


def test_loss_is_close_to_what_is_possible(rng):
    # Normal weights: no code of b bits loses less than 4**-b of the geometric mean of eigenvalues.
    d = 64
    W, X = rng.normal(size=(2000, d)), rng.normal(size=(400, d)) * rng.lognormal(0, 1, d)
    H = X.T @ X / 400
    coded = cq.watersic(W, H, 6, damping=0.0)
    least = 2000 * d * np.exp(np.linalg.slogdet(H)[1] / d) * 4.0**-coded.bits_per_weight
    # 0.255 bits of rate, and what scales, tables and levels of spread take: 0.1 of 64 columns.
    assert least < coded.report.loss < least * 4**0.5


def test_cross_moments_correct(rng):
    W, X = rng.normal(size=(200, 40)), rng.normal(size=(400, 40)) @ rng.normal(size=(40, 40))
    seen = np.round(X / 3) * 3
    H, G = seen.T @ seen / 400, X.T @ seen / 400
    made = cq.watersic(W, H, 3), cq.watersic(W, H, 3, G=G)
    plain, corrected = (cq.reconstruction_loss(W, c.dequantize(), H, G) for c in made)
    assert corrected < plain


def test_degenerate_weights(rng):
    H = moments(rng, 40)
    assert not cq.watersic(np.zeros((50, 40)), H, 2).dequantize().any()
    H[:, 3] = H[3] = 0
    W = rng.normal(size=(50, 40))
    W[:, 5] = 0.25
    coded = cq.watersic(W, H, 3)
    assert coded.report.dead_columns == (3,)
    assert np.isfinite(coded.dequantize()).all()


def test_bad_input_is_refused(rng):
    W, H = rng.normal(size=(50, 40)), moments(rng, 40)
    with pytest.raises(SpecError, match=r"bits must be 0\.\d+ to 8 for v, got 0.01"):
        cq.watersic(W, H, 0.01, name="v")
    with pytest.raises(SpecError, match="bits must be .* got 9"):
        cq.watersic(W, H, 9)
    with pytest.raises(SpecError, match="bits must be .* got nan"):
        cq.watersic(W, H, float("nan"))
    with pytest.raises(NonFiniteError):
        cq.watersic(np.where(W > 2, np.nan, W), H)
    with pytest.raises(TypeError, match="codes must be int16, got int64"):
        cq.EntropyCoded.of(np.ones((2, 2), np.int64), np.ones(2))
    with pytest.raises(ValueError, match="codes must be -2047 to 2047, got 0 to 3000"):
        cq.EntropyCoded.of(np.array([[0, 3000]], np.int16), np.ones(2))
    with pytest.raises(ShapeError, match="scales must be one for each of 2 columns"):
        cq.EntropyCoded.of(np.ones((2, 2), np.int16), np.ones(3))


def test_damaged_streams_are_refused(rng):
    codes = codes_of(rng, 40, 30, 1.0).astype(np.int16)
    coded = cq.EntropyCoded.of(codes, np.ones(30))
    tensors, said = coded.to_tensors(), coded.describe()
    stream = tensors["stream"]
    for bad in (stream[:-1], np.append(stream, stream[-1:]), stream[:1], stream.astype(np.int64)):
        with pytest.raises(CheckpointError, match="stream"):
            cq.load_coded({**tensors, "stream": bad}, said)
    for k in range(2, len(stream), 7):
        damaged = stream.copy()
        damaged[k] ^= np.uint32(1 << 9)
        with pytest.raises(CheckpointError, match="stream"):
            cq.load_coded({**tensors, "stream": damaged}, said)
    with pytest.raises(CheckpointError, match="weights must be below 57, got 63"):
        cq.load_coded({**tensors, "weights": tensors["weights"] | np.uint8(255)}, said)
    with pytest.raises(CheckpointError, match="lengths must be at most 2048"):
        cq.load_coded({**tensors, "lengths": tensors["lengths"] + np.uint16(5000)}, said)
    for name in tensors:
        with pytest.raises(CheckpointError):
            cq.load_coded({k: v for k, v in tensors.items() if k != name}, said)
    with pytest.raises(CheckpointError, match="exponent must be an integer"):
        cq.load_coded(tensors, {**said, "exponent": None})
