"""Every eXmY and codebook against brute force: the nearest of all codes, ties to the even one."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

import corequant as cq

MINIFLOATS = [f"e{e}m{bits - 1 - e}" for bits in range(3, 9) for e in range(1, bits)]
BIASED = ["e2m1b3", "e2m1b-4", "e3m2b10", "e4m0b0", "e1m2b60", "e5m2b-20", "e4m3b11"]
BOOKS = ["nf4", "codebook(-1,-0.25,0.125,1)", "codebook(0.5,1,3,4,7.5)", "codebook(-3,0)"]


def numbers_of(form):
    """Value of each non-negative code, from the definition, in rational arithmetic."""
    m, numbers = form.mantissa_bits, []
    for code in range(2 ** (form.bits - 1)):
        exponent, mantissa = divmod(code, 2**m)
        power = Fraction(2) ** (max(exponent, 1) - form.bias)
        numbers.append(power * (Fraction(mantissa, 2**m) + (exponent > 0)))
    return numbers


def nearest(x, numbers):
    """Index of the nearest number, the even one at a tie."""
    return min(range(len(numbers)), key=lambda k: (abs(numbers[k] - x), k % 2))


def inputs(numbers, dtype):
    middles = [(a + b) / 2 for a, b in itertools.pairwise(numbers)]
    points = np.array([float(v) for v in (*numbers, *middles, numbers[-1] * 3)], dtype)
    near = [np.nextafter(points, dtype(side)) for side in (np.inf, -np.inf)]
    generator = np.random.default_rng(5)
    spread = generator.uniform(0, float(numbers[-1]) * 1.2, 200).astype(dtype)
    return np.concatenate([points, *near, spread])


@pytest.mark.parametrize("name", [*MINIFLOATS, *BIASED])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minifloats_round_to_the_nearest_code(name, dtype):
    form = cq.find_format(name)
    numbers = numbers_of(form)
    np.testing.assert_array_equal(form.values[: len(numbers)], [float(v) for v in numbers])
    x = inputs(numbers, dtype)
    x = x[x >= 0]
    expected = np.array([nearest(Fraction(float(v)), numbers) for v in x])
    np.testing.assert_array_equal(cq.encode(x, form), expected)
    # -0.0 and what rounds to it keep the sign.
    np.testing.assert_array_equal(cq.encode(-x, form), expected + 2 ** (form.bits - 1))


@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_codebooks_round_to_the_nearest_code(name, dtype):
    form = cq.find_format(name)
    numbers = [Fraction(v) for v in form.table]
    x = inputs(numbers, dtype)
    x = np.concatenate([x, -x])
    expected = [nearest(Fraction(float(v)), numbers) for v in x]
    np.testing.assert_array_equal(cq.encode(x, form), expected)


@pytest.mark.parametrize("name", [n for n in cq.formats if n.startswith(("int", "uint"))])
def test_integers_round_to_the_nearest_code(name):
    form = cq.formats[name]
    unit = 2.0**-form.fraction_bits
    x = np.arange(-300, 300, 0.125, dtype=np.float32) * np.float32(unit)
    codes = np.arange(form.least_code, form.most_code + 1)
    expected = np.clip(np.rint(x / unit), codes[0], codes[-1])
    codes = cq.quantize(x[None], cq.QuantSpec(form), np.ones((1, 1), np.float32)).codes[0]
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(cq.encode(x, form), codes)


@pytest.mark.parametrize("bits", range(3, 8))
def test_one_exponent_bit_is_a_sign_and_magnitude_integer(bits):
    """E1Mm: m + 1 magnitude bits with a constant step."""
    form = cq.find_format(f"e1m{bits - 2}")
    steps = form.values[: 2 ** (bits - 1)] / form.values[1]
    np.testing.assert_array_equal(steps, np.arange(2 ** (bits - 1)))


def test_scale_bytes_are_all_there():
    powers = cq.decode(np.arange(255, dtype=np.uint8), "float8_e8m0fnu")
    np.testing.assert_array_equal(powers, np.ldexp(1.0, np.arange(255) - 127))
    np.testing.assert_array_equal(cq.encode(powers, "float8_e8m0fnu"), np.arange(255))
    scales = cq.decode(np.arange(127, dtype=np.uint8), "float8_e4m3fn")
    assert np.isfinite(scales).all()
    assert scales.max() == 448
    np.testing.assert_array_equal(cq.encode(scales, "float8_e4m3fn"), np.arange(127))


@pytest.mark.parametrize("name", [*cq.formats, *BIASED, *BOOKS])
def test_extremes_follow_from_the_table_of_numbers(name):
    form = cq.find_format(name)
    codes = np.arange(form.least_code, form.most_code + 1)
    values = cq.decode(codes.astype(form.code_dtype), form).astype(np.float64)
    values = values[np.isfinite(values)]
    assert (form.minimum, form.maximum) == (values.min(), values.max())
    if form.maximum > 0:
        assert 2.0**form.max_exponent <= form.maximum < 2.0 ** (form.max_exponent + 1)
