"""Casts against ml_dtypes: every code, every 16-bit input, millions of float32 inputs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import corequant as cq

FLOATS = [name for name in cq.formats if name.startswith("float")]
MINIFLOATS = [name for name in FLOATS if name != "float8_e8m0fnu"]
CHUNK = 1_000_000


def peer(name):
    return np.dtype(getattr(ml_dtypes, name))


def cast(x, name):
    """ml_dtypes' codes, and where they are finite."""
    # Straight from the input's own dtype: a detour through float32 would round twice.
    with np.errstate(all="ignore"):
        wide = x.astype(peer(name))
    return wide.view(np.uint8), np.isfinite(wide.astype(np.float32))


def assert_same_codes(x, name):
    form = cq.formats[name]
    ours = cq.encode(x, form)
    theirs, finite = cast(x, name)
    np.testing.assert_array_equal(ours[finite], theirs[finite])
    # Where a finite input overflows there, it saturates here.
    over = x[~finite].astype(np.float64)
    assert (np.abs(over) > form.maximum).all()
    top = form.magnitudes - 1
    expected = np.where(np.signbit(over), top + 2 ** (form.bits - 1), top)
    np.testing.assert_array_equal(ours[~finite], expected)


def all_finite(dtype):
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    return x[np.isfinite(x.astype(np.float32))]


def adversarial(form, count, generator):
    """float32 near what decides: ties and numbers with their neighbours, limits, subnormals."""
    numbers = form.finite_values.astype(np.float32)
    ties = ((form.finite_values[1:] + form.finite_values[:-1]) / 2).astype(np.float32)
    centres = np.concatenate([numbers, ties, np.float32([form.maximum * 2, form.minimum * 2])])
    tiny = np.finfo(np.float32).smallest_subnormal
    special = np.float32([0.0, -0.0, tiny, -tiny, 1.17549421e-38, 1.17549435e-38, 3.4028235e38])
    centres = np.concatenate([centres, special, -special])
    x = generator.choice(centres, count)
    steps = generator.integers(-3, 4, count)
    bits = x.view(np.int32) + steps.astype(np.int32)
    near = bits.view(np.float32)
    return np.where(np.isfinite(near), near, x)


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_decodes_equally(name):
    codes = np.arange(2 ** cq.formats[name].bits, dtype=np.uint8)
    theirs = codes.view(peer(name)).astype(np.float32)
    ours = cq.decode(codes, name)
    np.testing.assert_array_equal(ours, theirs)
    real = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.signbit(ours[real]), np.signbit(theirs[real]))


@pytest.mark.parametrize("name", MINIFLOATS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_16_bit_input_encodes_equally(name, dtype):
    x = all_finite(dtype)
    assert len(x) in (63488, 65280)
    assert_same_codes(x, name)


@pytest.mark.parametrize("name", MINIFLOATS)
def test_ten_million_float32_inputs_encode_equally(name):
    generator = np.random.default_rng(20)
    form = cq.formats[name]
    for _ in range(5):
        bits = generator.integers(0, 2**32, CHUNK, dtype=np.uint32).view(np.float32)
        assert_same_codes(bits[np.isfinite(bits)], name)
    for _ in range(2):
        x = generator.standard_normal(CHUNK, dtype=np.float32) * np.float32(form.maximum / 3)
        assert_same_codes(x, name)
    for _ in range(3):
        assert_same_codes(adversarial(form, CHUNK, generator), name)


@pytest.mark.parametrize("name", MINIFLOATS)
def test_float64_inputs_are_rounded_once(name):
    form = cq.formats[name]
    middles = (form.finite_values[1:] + form.finite_values[:-1]) / 2
    x = np.concatenate([middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)])
    codes = cq.encode(x, form)
    errors = np.abs(form.finite_values - x[:, None]).min(1)
    np.testing.assert_array_equal(np.abs(form.values[codes] - x), errors)


def test_e8m0_encodes_equally():
    for x in (all_finite(np.float16), all_finite(ml_dtypes.bfloat16)):
        assert_same_powers(x)
    generator = np.random.default_rng(21)
    for _ in range(10):
        bits = generator.integers(0, 2**32, CHUNK, dtype=np.uint32).view(np.float32)
        assert_same_powers(bits[np.isfinite(bits)])
    powers = np.ldexp(np.float32(1), np.arange(-140, 128)).astype(np.float32)
    for middle in (powers, powers[:-1] * np.float32(1.5)):
        for x in (middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(9))):
            assert_same_powers(x)


def assert_same_powers(x):
    # Just above its smallest power, where float32 is subnormal, ml_dtypes 0.6 rounds up instead of
    # to nearest: there ours is the smallest power, theirs the next one.
    low = (x.astype(np.float64) > 2.0**-127) & (x.astype(np.float64) < 2.0**-127 * 1.5)
    assert (cq.encode(x[low], "float8_e8m0fnu") == 0).all()
    x = x[~low]
    ours = cq.encode(x, "float8_e8m0fnu")
    theirs, finite = cast(x, "float8_e8m0fnu")
    np.testing.assert_array_equal(ours[finite], theirs[finite])
    rest = x[~finite].astype(np.float64)
    # ml_dtypes has NaN for zero, negative numbers and overflow; here they saturate.
    assert ((rest <= 0) | (rest >= 2.0**127 * 1.5)).all()
    np.testing.assert_array_equal(ours[~finite], np.where(rest > 0, 254, 0))


@pytest.mark.parametrize("name", [n for n in FLOATS if cq.formats[n].has_nan])
def test_nan_and_infinity_propagate_as_in_ml_dtypes(name):
    x = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    theirs = x.astype(peer(name)).astype(np.float32)
    ours = cq.decode(cq.encode(x, name, nonfinite="propagate"), name)
    np.testing.assert_array_equal(ours, theirs)
    codes = cq.encode(x[:1], name, nonfinite="propagate")
    np.testing.assert_array_equal(codes, x[:1].astype(peer(name)).view(np.uint8))


@pytest.mark.parametrize("name", ["int2", "int4", "uint2", "uint4"])
def test_small_integers_decode_equally(name):
    form = cq.formats[name]
    codes = np.arange(form.least_code, form.most_code + 1).astype(form.code_dtype)
    theirs = codes.astype(peer(name)).astype(np.float32)
    np.testing.assert_array_equal(cq.decode(codes, form), theirs)
