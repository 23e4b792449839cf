"""Products of codes as integers against rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import corequant as cq
from corequant.exact import (
    accumulator_bits,
    exact_matmul,
    integer_unit,
    integer_values,
    magnitude_bits,
)

MINIFLOATS = [(e, bits - 1 - e) for bits in range(3, 9) for e in range(1, bits)]
PAIRS = [
    ("e2m1", "e2m1"),
    ("float4_e2m1fn", "float8_e4m3fn"),
    ("e3m2", "int4"),
    ("int8", "int8"),
    ("uint8", "int4"),
    ("float8_e5m2", "float8_e5m2"),
    ("e5m2", "e4m3"),
    ("int8f6", "e4m0"),
]


@pytest.mark.parametrize(("e", "m"), MINIFLOATS)
def test_widths_are_those_of_the_formula(e, m):
    assert magnitude_bits(f"e{e}m{m}") == 2**e + m - 1


@pytest.mark.parametrize(
    "name", [f"e{e}m{m}" for e, m in MINIFLOATS if e < 6] + ["int4", "uint8", "int8f6"]
)
def test_values_are_integers_times_the_unit(name):
    form = cq.formats[name]
    codes = np.arange(form.least_code, form.most_code + 1).astype(form.code_dtype)
    unit = Fraction(integer_unit(form))
    wholes = integer_values(codes, form)
    for code, whole in zip(codes.astype(np.uint8), wholes, strict=True):
        assert whole * unit == Fraction(float(form.values[code & (2**form.bits - 1)]))


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_products_are_exact_in_any_order(a, b):
    generator = np.random.default_rng(1)
    left, right = (
        np.array(
            generator.choice(np.flatnonzero(np.isfinite(cq.formats[f].values)), (4, 37)), np.uint8
        )
        for f in (a, b)
    )
    product, unit = exact_matmul(left, a, right, b)
    u = cq.formats[a].values[left]
    v = cq.formats[b].values[right]
    for i in range(4):
        for j in range(4):
            exact = sum(
                Fraction(float(p)) * Fraction(float(q)) for p, q in zip(u[i], v[j], strict=True)
            )
            assert int(product[i, j]) * Fraction(unit) == exact


@pytest.mark.parametrize(("a", "b"), PAIRS)
@pytest.mark.parametrize("terms", [1, 2, 3, 1000, 4096])
def test_the_accumulator_holds_the_extremes_and_not_a_bit_less(a, b, terms):
    width = accumulator_bits(terms, a, b)
    ends = [
        [int(v / integer_unit(f)) for v in (cq.formats[f].minimum, cq.formats[f].maximum)]
        for f in (a, b)
    ]
    sums = [x * y * terms for x in ends[0] for y in ends[1]]

    def fits(bits):
        return all(abs(s) < 2 ** (bits - 1) for s in sums)

    assert fits(width)
    assert not fits(width - 1)
    whole = magnitude_bits(a) + magnitude_bits(b) + (terms - 1).bit_length() + 1
    assert width <= whole


def test_what_is_not_exact_is_refused():
    with pytest.raises(cq.SpecError, match="multiples of one step, got nf4"):
        integer_unit("nf4")
    with pytest.raises(ValueError, match="finite numbers of float8_e4m3fn"):
        integer_values(np.array([127], np.uint8), "float8_e4m3fn")
    with pytest.raises(cq.ShapeError, match=r"a and b must be \(m, K\) and \(n, K\)"):
        exact_matmul(np.zeros((2, 3), np.uint8), "int4", np.zeros((2, 4), np.uint8), "int4")
    with pytest.raises(ValueError, match="terms must be at least 1, got 0"):
        accumulator_bits(0, "int4", "int4")
