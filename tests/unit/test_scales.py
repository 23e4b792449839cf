"""Scale rules: exponents next to every power of two, formats of scales, searches, extremes."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

import corequant as cq
from corequant._cpu.scales import percentile

POWERS = np.ldexp(1.0, np.arange(-149, 128)).astype(np.float32)
NEAR = np.concatenate(
    [POWERS, np.nextafter(POWERS, np.float32(0)), np.nextafter(POWERS, np.float32(np.inf))]
)
NEAR = NEAR[(NEAR > 0) & np.isfinite(NEAR)]
MX = [name for name in cq.presets if name.startswith("mx")]


def chosen(largest, text):
    x = np.zeros((len(largest), 32), np.float32)
    x[:, 5] = -largest
    return cq.choose_qparams(x, text)[0][:, 0]


def exponent(value):
    """floor(log2) of a positive rational."""
    e = value.numerator.bit_length() - value.denominator.bit_length()
    return e if Fraction(2) ** e <= value else e - 1


def expected_exponent(value, form, mode):
    if mode == "ceil":
        ratio = value / Fraction(form.maximum)
        e = exponent(ratio)
        return e if Fraction(2) ** e == ratio else e + 1
    if mode == "even":
        e = exponent(value)
        unit = Fraction(2) ** (e - form.precision)
        value = round(value / unit) * unit
    return exponent(value) - math.frexp(form.maximum)[1] + 1


@pytest.mark.parametrize("preset", MX)
@pytest.mark.parametrize("mode", ["floor", "ceil", "even"])
def test_exponents_at_every_power_of_two_and_its_neighbours(preset, mode):
    form = cq.presets[preset].format
    generator = np.random.default_rng(1)
    spread = np.ldexp(generator.uniform(1, 2, 500), generator.integers(-140, 127, 500))
    largest = np.concatenate([NEAR, spread.astype(np.float32)])
    scales = chosen(largest, f"{preset}:{mode}")
    # A larger scale could give infinity.
    top = 128 - math.frexp(max(-form.minimum, form.maximum))[1]
    for value, scale in zip(largest, scales, strict=True):
        wanted = expected_exponent(Fraction(float(value)), form, mode)
        assert Fraction(float(scale)) == Fraction(2) ** min(max(wanted, -127), top)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_powers_of_two_without_a_byte_use_the_whole_range(dtype):
    x = np.array([[3.0, 0], [1e-36, 0], [6.5, 0]], dtype)
    scales = cq.choose_qparams(x, "int4:channel:pow2:ceil")[0][:, 0]
    assert np.frexp(scales)[0].tolist() == [0.5] * 3
    assert (np.abs(x).max(1) <= 7 * scales).all()
    assert (np.abs(x).max(1) > 3.5 * scales).all()


@pytest.mark.parametrize("preset", MX)
def test_search_is_at_least_as_good_as_every_fixed_mode(preset):
    x = np.random.default_rng(3).standard_t(3, (64, 256)).astype(np.float32)

    def error(text):
        return np.square(x - cq.fake_quantize(x, text)).reshape(-1, 32).sum(1)

    best = error(f"{preset}:search")
    for mode in ("floor", "ceil", "even"):
        assert (best <= error(f"{preset}:{mode}")).all()


def test_nvfp4_searches_are_at_least_as_good_where_they_share_the_global_scale():
    x = np.random.default_rng(4).standard_t(3, (64, 256)).astype(np.float32)
    shared = cq.choose_global_scale(x, "nvfp4:four_over_six")
    assert shared[0] == np.float32(256 * 6) / np.abs(x).max()

    def error(text):
        rounded = cq.fake_quantize(x, text, global_scale=shared)
        return np.square(x - rounded).reshape(-1, 16).sum(1)

    absmax, sweep, six = error("nvfp4"), error("nvfp4:search"), error("nvfp4:four_over_six")
    assert (sweep <= absmax).all()
    assert (six <= absmax).all()
    assert sweep.sum() < six.sum() < absmax.sum()


@pytest.mark.parametrize("text", ["int4:channel", "e2m1:group32", "nf4:group32", "int2:channel"])
def test_the_exact_search_is_never_above_the_grid(text):
    x = np.random.default_rng(5).standard_t(4, (64, 512)).astype(np.float32)

    def error(search):
        quantized = cq.quantize(x, f"{text}:{search}")
        values = cq.dequantize(
            cq.QuantizedTensor(
                quantized.codes, quantized.scales.astype(np.float64), None, quantized.spec
            )
        )
        return np.square(x - values).reshape(quantized.scales.size, -1).sum(1)

    assert (error("exact") <= error("mse")).all()
    assert (error("mse") <= error("absmax") * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int8", "e2m1", "e3m2", "nf4", "uint3"])
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_the_exact_search_against_every_piece(name, size):
    """Brute force: the best scale for each set of codes that any scale gives."""
    form = cq.find_format(name)
    values = form.finite_values
    generator = np.random.default_rng(size)
    rows = [
        generator.standard_normal(size),
        generator.standard_t(1.5, size),
        np.rint(generator.standard_normal(size) * 3),
        generator.uniform(0.1, 1, size),
    ]
    for x in rows:
        middles = (values[1:] + values[:-1]) / 2
        breaks = (x[:, None] / middles[middles != 0]).ravel()
        breaks = np.unique(breaks[(breaks > 0) & np.isfinite(breaks)])
        if not len(breaks):
            continue
        inside = np.concatenate([breaks * (1 - 1e-9), breaks * (1 + 1e-9)])
        codes = np.abs(x[None, :, None] / inside[:, None, None] - values).argmin(-1)
        levels = values[codes]
        product, square = levels @ x, np.square(levels).sum(1)
        gains = np.where(product > 0, product**2 / np.maximum(square, 1e-300), 0)
        least = np.square(x).sum() - gains.max()
        quantized = cq.quantize(x[None], f"{name}:channel:exact")
        error = np.square(x - cq.dequantize(quantized)[0]).sum()
        assert error <= least + 1e-9 * np.square(x).sum()


@pytest.mark.parametrize(
    ("name", "size"),
    [(n, s) for n in ("int2", "int4", "uint4", "int8") for s in (33, 700, 2048, 4097)]
    + [("int3", 70_000), ("uint2", 70_000)],
)
@pytest.mark.parametrize("unit", [1.0, 1e-310, 1e306])
def test_the_exact_search_against_a_sweep_over_all_breakpoints(name, size, unit):
    values = cq.find_format(name).finite_values
    generator = np.random.default_rng(size)
    draws = (
        generator.standard_normal(size),
        generator.standard_t(2, size),
        generator.standard_cauchy(size),
        np.sign(generator.standard_normal(size)) * 0.7,
        np.where(np.arange(size) % 10 > 0, -1.0, 1e-4),
        np.rint(generator.standard_normal(size) * 4),
    )
    for x in draws:
        x *= unit / np.abs(x).max()
        # Every entry's level falls from the last one to zero where the scale passes a middle.
        w, top = np.abs(x) / unit, np.where(x > 0, values[-1], -values[0])
        level = np.arange(int(top.max()))
        there = level < top[:, None]
        places = (w[:, None] / (level + 0.5))[there]
        order = np.argsort(-places, kind="stable")
        product = np.cumsum(np.broadcast_to(w[:, None], there.shape)[there][order])
        square = np.cumsum(np.broadcast_to(2 * level + 1, there.shape)[there][order])
        least = np.square(w).sum() - (product**2 / square).max()
        codes = cq.quantize(x[None], f"{name}:channel:exact")
        error = np.square((x - cq.dequantize(codes)[0]) / unit).sum()
        # A subnormal scale has few bits.
        assert error <= least + (1e-6 if unit < 1e-300 else 1e-12) * np.square(w).sum()


def test_hqo_lowers_its_norm():
    x = np.random.default_rng(6).standard_t(3, (32, 256)).astype(np.float32)
    for symmetry in ("symmetric", "asymmetric"):
        text = f"int4:group64:{symmetry}"

        def norm(spec):
            return (np.abs(x - cq.fake_quantize(x, spec)) ** 0.7).sum()

        assert norm(f"{text}:hqo") < 0.98 * norm(text)


def test_percentiles_cut_outliers():
    x = np.random.default_rng(7).standard_normal((4, 1000))
    x[0, 17] = 100
    scales, _ = cq.choose_qparams(x, "int4:channel:percentile99")
    np.testing.assert_allclose(scales[:, 0], np.percentile(np.abs(x), 99, axis=1) / 7.5)
    full, _ = cq.choose_qparams(x, "int4:channel:percentile100")
    np.testing.assert_array_equal(full, cq.choose_qparams(x, "int4:channel")[0])
    # Where nothing would be left, the whole range is.
    y = np.zeros((1, 1000))
    y[0, 0] = 3
    assert cq.choose_qparams(y, "int4:channel:percentile50")[0][0, 0] == 3 / 7.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_percentiles_are_numpys_to_the_bit(dtype):
    """Near both ends, where a few entries are looked for, and between, where all are sorted."""
    rng = np.random.default_rng(9)
    for width in (1, 2, 33, 64, 700):
        x = rng.standard_normal((6, width)).astype(dtype)
        x[1], x[2], x[3] = x[1, 0], np.round(x[2]), np.sort(x[3])[::-1]
        for q in (0.5, 3.7, 50.0, 96.3, 99.5, 100.0):
            expected = np.percentile(x, np.float64(q), axis=1).astype(dtype)
            np.testing.assert_array_equal(percentile(x, q), expected)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("float16", np.float16), ("bfloat16", "bfloat16"), ("e4m3", None)]
)
def test_scales_are_numbers_of_their_format(kind, dtype):
    import ml_dtypes

    x = np.random.default_rng(8).standard_normal((16, 64)).astype(np.float32)
    text = "nvfp4" if kind == "e4m3" else f"int4:group16:{kind}"
    narrow = {"bfloat16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn}.get(kind, dtype)
    scales, _ = cq.choose_qparams(x, text)
    if kind == "e4m3":
        quotient = np.abs(x).reshape(16, 4, 16).max(-1) / np.float32(6)
        expected = (quotient * cq.choose_global_scale(x, text)).astype(narrow)
    else:
        expected = (np.abs(x).reshape(16, 4, 16).max(-1) / np.float32(7.5)).astype(narrow)
    np.testing.assert_array_equal(scales, expected.astype(np.float32))
