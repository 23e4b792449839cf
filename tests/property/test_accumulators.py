"""Accumulators: what is certified never overflows, and what is wide enough changes nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import corequant as cq
from corequant.formats import formats
from corequant.rounding import integer_codes
from tests.property.test_rounding import layer, methods, moments

WEIGHTS = ("int4:channel", "int3:group16", "int4:channel:asymmetric", "e2m1:channel", "mxfp4")


def reachable(codes, spec):
    """Largest magnitude of any prefix of any tile's sum, over all inputs, by enumeration."""
    low, high = spec.range
    tile = spec.tile or codes.shape[1]
    worst = 0
    for start in range(0, codes.shape[1], tile):
        part = codes[:, start : start + tile].astype(np.int64)
        inputs = np.array(list(itertools.product(range(low, high + 1), repeat=part.shape[1])))
        sums = np.cumsum(part[:, None, :] * inputs[None], axis=2)
        worst = max(worst, int(np.abs(sums).max()))
    return worst


def adversarial(codes, spec):
    """Largest magnitude of a prefix of a tile's sum, with the worst input for either sign."""
    low, high = spec.range
    tile = spec.tile or codes.shape[1]
    worst = 0
    for start in range(0, codes.shape[1], tile):
        part = codes[:, start : start + tile].astype(np.int64)
        for up in (high, low):
            x = np.where(part > 0, up, low + high - up)
            sums = np.cumsum(part * x, axis=1)
            worst = max(worst, int(np.abs(sums).max()))
    return worst


@given(
    codes=hnp.arrays(np.int8, (2, 6), elements=st.integers(-8, 7)),
    bits=st.integers(4, 9),
    tile=st.sampled_from([None, 2, 4]),
    activation=st.sampled_from(["int2", "uint2"]),
)
@settings(max_examples=60, deadline=None)
def test_certificates_are_exact(codes, bits, tile, activation):
    spec = cq.AccumulatorSpec(bits, tile, activation)
    worst = reachable(codes, spec)
    found = cq.certify(codes, spec)
    assert found.largest == worst
    assert found.safe == (worst <= spec.limit)
    assert found.minimum_bits == next(b for b in range(1, 30) if 2 ** (b - 1) - 1 >= worst)
    start = found.tile * (tile or 6)
    part = slice(start, start + (tile or 6))
    assert abs(int(codes[found.row, part].astype(np.int64) @ found.witness[part])) == worst
    assert not np.delete(found.witness, np.arange(6)[part]).any()
    low, high = spec.range
    assert found.witness.min() >= low
    assert found.witness.max() <= high
    total = cq.certify(codes, cq.AccumulatorSpec(bits, None, activation))
    assert found.outer_bits == total.minimum_bits


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("activation", ["int8", "uint8", "int4", "uint4", "e2m1"])
@pytest.mark.parametrize("tile", [16, 8])
def test_rounded_weights_never_overflow(weight, activation, tile):
    W, x, q = layer(2, rows=32, d=96)
    H, G = moments(x, q)
    low, high = cq.AccumulatorSpec(16, tile, activation).range
    top = max(-low, high)
    # From a few units of weight for each tile up to no constraint at all.
    for bits in (top.bit_length() + 2, top.bit_length() + 4, top.bit_length() + 7):
        for diffuse in (True, False):
            spec = cq.AccumulatorSpec(bits, tile, activation, diffuse)
            for name, found in methods(W, H, G, weight, accumulator=spec, losses=False).items():
                codes = integer_codes(found)
                assert adversarial(codes, spec) <= spec.limit, (name, spec)
                certificate = cq.certify(found, spec)
                assert certificate.safe
                assert certificate.largest == adversarial(codes, spec)
                assert np.abs(codes).max() > 0
                assert 0 <= found.report.bounded_share <= 1


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("activation", ["int8", "uint4", "e2m1"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_wide_accumulator_changes_nothing(weight, activation, dtype):
    W, x, q = layer(4, rows=32, d=96, dtype=dtype)
    H, G = moments(x, q)
    form = cq.QuantSpec.parse(weight).format
    largest = int(np.abs(integer_codes(cq.round_to_nearest(W, weight))).max())
    narrow = cq.accumulator_bits(16, form, activation)
    if "asymmetric" in weight:
        narrow += 1
    plain = methods(W, H, G, weight)
    for bits in (narrow, 32):
        spec = cq.AccumulatorSpec(bits, 16, activation, diffuse=False)
        assert largest * 16 * max(-spec.range[0], spec.range[1]) <= spec.limit
        for name, found in methods(W, H, G, weight, accumulator=spec).items():
            np.testing.assert_array_equal(found.codes, plain[name].codes, err_msg=name)
            assert found.report.bounded_share == 0


def test_narrower_accumulators_cost_more():
    W, x, q = layer(6, rows=64, d=256, tokens=2000)
    H, G = moments(x, q)
    for call in (
        lambda spec: cq.gptq(W, H, "int4:channel", accumulator=spec),
        lambda spec: cq.gpfq(W, H, G, "int4:channel", accumulator=spec),
        lambda spec: cq.qronos(W, H, G, "int4:channel", accumulator=spec),
    ):
        losses = [call(cq.AccumulatorSpec(b, 128, "uint8")).report.loss for b in (20, 16, 15, 14)]
        assert losses == sorted(losses)
        assert losses[0] < losses[-1]


def test_no_weights_of_the_format_overflow_at_the_bound():
    for weight, activation in itertools.product(("int3", "e2m1"), ("int4", "uint4", "e3m2")):
        bits = cq.accumulator_bits(24, weight, activation)
        values = integer_codes_of(weight)
        worst = np.tile(values[np.argmax(np.abs(values))], (1, 24))
        for codes in (worst, np.tile(values, 24)[: 24 * 4].reshape(-1, 24)):
            assert cq.certify(codes, cq.AccumulatorSpec(bits, None, activation)).safe
        assert not cq.certify(worst, cq.AccumulatorSpec(bits - 1, None, activation)).safe


def integer_codes_of(name):
    form = formats[name]
    values = form.finite_values
    unit = np.abs(values[values != 0]).min()
    return np.rint(values / unit).astype(np.int64)


@pytest.mark.parametrize("weight", ["e2m1", "e2m3", "e3m2", "e4m3", "float4_e2m1fn"])
@pytest.mark.parametrize("activation", ["e2m1", "e3m2", "float8_e4m3fn"])
def test_minifloat_dot_products_are_integer_ones(weight, activation):
    """On a certified weight, float64 sums of minifloats equal integers times the two units."""
    W, x, q = layer(8, rows=16, d=64)
    H, _ = moments(x, q)
    spec = cq.AccumulatorSpec(min(48, cq.accumulator_bits(16, weight, activation)), 16, activation)
    found = cq.gptq(W, H, f"{weight}:channel", accumulator=spec)
    assert cq.certify(found, spec).safe
    inputs = cq.quantize(q[:40], f"{activation}:token")
    one, two = integer_codes(found), integer_codes(inputs)
    for start in range(0, 64, 16):
        tile = slice(start, start + 16)
        whole = two[:, tile] @ one[:, tile].T
        assert np.abs(whole).max() <= spec.limit
        numbers = [
            form.values[codes[:, tile]]
            for form, codes in (
                (inputs.spec.format, inputs.codes),
                (found.spec.format, found.codes),
            )
        ]
        units = [integer_unit(form) for form in (inputs.spec.format, found.spec.format)]
        exact = np.zeros(whole.shape)
        for k in range(16):
            # One product after the other, as hardware would; each sum is exact in float64.
            exact += np.outer(numbers[0][:, k], numbers[1][:, k])
        np.testing.assert_array_equal(exact, whole * units[0] * units[1])


def integer_unit(form):
    values = form.finite_values
    return values[values > 0].min()


@pytest.mark.parametrize("text", ["int4:token:asymmetric", "uint4:token:asymmetric"])
def test_zero_points_of_activations_are_certified(text):
    """Sums of codes less their zero points leave an accumulator that holds those of the codes."""
    generator = np.random.default_rng(0)
    weights = cq.quantize(generator.normal(size=(8, 32)).astype(np.float32), "int4:channel")
    spec = cq.AccumulatorSpec(12, None, text)
    assert spec.zero_points
    assert spec.range == (-15, 15)
    stored = cq.AccumulatorSpec(12, None, cq.QuantSpec.parse(text).format)
    assert not stored.zero_points
    bound = cq.certify(weights, spec).largest
    assert bound > cq.certify(weights, stored).largest
    # Ranges include zero, so that an all positive token's zero point is the least code.
    x = np.abs(generator.normal(size=(200, 32))).astype(np.float32)
    tokens = cq.quantize(np.concatenate([x, -x]), text)
    whole = tokens.codes.astype(np.int64) - tokens.zero_points
    sums = np.abs(np.cumsum(whole[:, None, :] * integer_codes(weights)[None], axis=2))
    assert sums.max() <= bound
    for codes in (tokens.codes.astype(np.int64), whole):
        assert np.abs(codes @ integer_codes(weights).T).max() <= bound
    worst = cq.certify(weights, spec).witness
    assert np.abs(integer_codes(weights) @ worst).max() == bound


@pytest.mark.parametrize("method", ["gptq", "gpfq", "qronos"])
def test_weights_keep_within_accumulators_of_asymmetric_activations(method):
    W, x, q = layer(0, 8, 32)
    H, G = moments(x, q)
    spec = cq.AccumulatorSpec(10, 16, "int4:token:asymmetric")
    arguments = (W, H) if method == "gptq" else (W, H, G)
    codes = getattr(cq, method)(*arguments, "int4:channel", accumulator=spec)
    assert cq.certify(codes, spec).safe
