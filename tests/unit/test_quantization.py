"""Bad and extreme input of quantize, dequantize and fake_quantize, for every kind of spec."""

from __future__ import annotations

import dataclasses
import re
import warnings

import ml_dtypes
import numpy as np
import pytest

import corequant as cq
from corequant.formats import find_format
from corequant.specs import qparams_shape

SPECS = [
    "int4:channel:symmetric",
    "int4:token:asymmetric",
    "int8:tensor:asymmetric",
    "int4:group32:symmetric:mse",
    "int4:group32:symmetric:exact",
    "int4:group32:asymmetric:hqo",
    "int4:group32:percentile99",
    "uint4:token:asymmetric",
    "int4:group32:symmetric:float16",
    "int4:group32:symmetric:bfloat16",
    "int4:group32:symmetric:pow2:ceil",
    "e3m2:channel",
    "float8_e4m3fn:tensor",
    "nf4:group32",
    "nf4:group32:exact",
    *cq.presets,
    "mxfp4:ceil",
    "mxfp4:search",
    "nvfp4:search",
    "nvfp4:four_over_six",
]
LARGEST = np.finfo(np.float32).max


def sample(shape=(6, 96), seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_with_its_place(text, bad):
    x = sample()
    x[3, 70] = bad
    x[4, 1] = bad
    calls = (
        lambda: cq.quantize(x, text),
        lambda: cq.fake_quantize(x, text),
        lambda: cq.choose_qparams(x, text),
        lambda: cq.quantize_packed(x, text),
    )
    for call in calls:
        with pytest.raises(cq.NonFiniteError) as caught:
            call()
        assert (caught.value.count, caught.value.index) == (2, (3, 70))
    good = cq.quantize(sample(), text)
    with pytest.raises(cq.NonFiniteError, match=r"index \(3, 70\)"):
        cq.quantize(x, text, good.scales, good.zero_points, global_scale=good.global_scale)


@pytest.mark.parametrize("text", SPECS)
def test_propagated_entries_spoil_nothing_else(text):
    clean = sample()
    clean[3, 70] = clean[0, 5] = 0
    x = clean.copy()
    x[3, 70], x[0, 5] = np.nan, -np.inf
    rounded = cq.fake_quantize(x, text, nonfinite="propagate")
    expected = cq.fake_quantize(clean, text)
    if "percentile" in text:
        # Zeros in their places would count.
        for row, bad in ((3, 70), (0, 5)):
            first = bad // 32 * 32
            rest = np.delete(np.arange(first, first + 32), bad - first)
            expected[row, rest] = cq.fake_quantize(clean[row, rest], "int4:token:percentile99")
    expected[3, 70], expected[0, 5] = np.nan, -np.inf
    np.testing.assert_array_equal(rounded, expected)


@pytest.mark.parametrize("text", SPECS)
def test_zeros_stay_zeros(text):
    x = sample()
    x[2] = 0
    x[5, :32] = 0
    x[1, 32:64] = -0.0
    rounded = cq.dequantize(cq.quantize(x, text))
    # A grid without zero has no exact zero to give; all of these have.
    assert (rounded[2] == 0).all()
    assert (rounded[5, :32] == 0).all()
    assert (rounded[1, 32:64] == 0).all()
    empty = cq.quantize(np.zeros((2, 32), np.float32), text)
    assert (cq.dequantize(empty) == 0).all()
    assert np.isfinite(empty.scales).all()
    assert (empty.scales > 0).all()


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-30, 1e-12, 1e30, LARGEST / 2, LARGEST])
def test_extreme_sizes_neither_overflow_nor_vanish(text, size):
    unit = sample()
    unit /= np.abs(unit).max()
    x = np.clip(unit.astype(np.float64) * size, -LARGEST, LARGEST).astype(np.float32)
    x[0, 0], x[1, 0] = size, -np.float32(size)
    for rounded in (cq.dequantize(cq.quantize(x, text)), cq.fake_quantize(x, text)):
        assert np.isfinite(rounded).all()
        if 1e-33 < size and not ("float16" in text and "bfloat16" not in text):
            error = np.abs(rounded.astype(np.float64) - x).max()
            assert error <= np.float64(size) * 0.62


@pytest.mark.parametrize("text", ["int4:group32:float16", "int4:group32:bfloat16"])
def test_scales_beyond_their_format_saturate(text):
    """Documented: the nearest scale that there is, so the largest entries are clipped."""
    top = 65504 if text.endswith(":float16") else 3.3895313892515355e38
    scales, _ = cq.choose_qparams(np.full((1, 32), LARGEST, np.float32), text)
    assert 0 < scales[0, 0] <= top
    tiny, _ = cq.choose_qparams(np.full((1, 32), 1e-44, np.float32), text)
    assert tiny[0, 0] == (2.0**-24 if text.endswith(":float16") else 2.0**-133)
    assert np.isfinite(cq.fake_quantize(np.full((1, 32), LARGEST, np.float32), text)).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("text", SPECS)
def test_narrow_dtypes_come_back_finite_and_as_through_float32(dtype, text):
    x = sample().astype(dtype)
    rounded = cq.fake_quantize(x, text)
    assert rounded.dtype == dtype
    wide = cq.fake_quantize(x.astype(np.float32), text).astype(dtype)
    np.testing.assert_array_equal(rounded.view(np.uint16), wide.view(np.uint16))
    top = np.array([65504 if dtype is np.float16 else 3.3895e38], np.float32).astype(dtype)
    edge = np.full((1, 96), top[0])
    edge[0, 1::2] = -top[0]
    assert np.isfinite(cq.fake_quantize(edge, text).astype(np.float32)).all()


@pytest.mark.parametrize("text", SPECS)
def test_layouts_of_memory_make_no_difference(text):
    x = sample((8, 2, 96))
    expected = cq.quantize(x, text)
    wide = np.zeros((8, 2, 192), np.float32)
    wide[..., ::2] = x
    frozen = x.copy()
    frozen.setflags(write=False)
    for other in (
        np.asfortranarray(x),
        wide[..., ::2],
        x[::-1].copy()[::-1],
        x.astype(">f4"),
        frozen,
        x.transpose(2, 0, 1).copy().transpose(1, 2, 0),
    ):
        before = other.copy()
        quantized = cq.quantize(other, text)
        np.testing.assert_array_equal(quantized.codes, expected.codes)
        np.testing.assert_array_equal(quantized.scales, expected.scales)
        np.testing.assert_array_equal(cq.fake_quantize(other, text), cq.dequantize(expected))
        np.testing.assert_array_equal(other, before)


@pytest.mark.parametrize("text", SPECS)
def test_rounding_twice_changes_nothing_with_the_same_scales(text):
    x = sample()
    first = cq.quantize(x, text)
    again = cq.quantize(
        cq.dequantize(first), text, first.scales, first.zero_points, global_scale=first.global_scale
    )
    np.testing.assert_array_equal(again.codes, first.codes)


@pytest.mark.parametrize("text", SPECS)
def test_fake_quantize_is_quantize_and_dequantize(text):
    for dtype in (np.float32, np.float64):
        x = sample().astype(dtype)
        rounded = cq.fake_quantize(x, text)
        decoded = cq.dequantize(cq.quantize(x, text))
        assert rounded.dtype == decoded.dtype == dtype
        np.testing.assert_array_equal(rounded, decoded)
        np.testing.assert_array_equal(np.signbit(rounded), np.signbit(decoded))


@pytest.mark.parametrize("text", SPECS)
def test_results_do_not_depend_on_threads(text, use_threads):
    x = sample((600, 384))
    use_threads(1)
    alone, codes = cq.fake_quantize(x, text), cq.quantize(x, text).codes
    use_threads(3)
    np.testing.assert_array_equal(cq.fake_quantize(x, text), alone)
    np.testing.assert_array_equal(cq.quantize(x, text).codes, codes)


def test_minus_zero_is_kept_where_there_is_one():
    x = np.array([[-0.0, -0.1, 6, 0.0]], np.float32)
    assert np.signbit(cq.fake_quantize(x, "e2m1:channel")).tolist() == [[True, True, False, False]]
    assert not np.signbit(cq.fake_quantize(x, "float8_e4m3fnuz:channel")[0, 0])
    assert not np.signbit(cq.fake_quantize(x, "int4:channel")).any()


def test_out_takes_the_result_or_is_refused():
    x = sample()
    expected = cq.fake_quantize(x, "int4:group32")
    out = np.empty_like(x)
    assert cq.fake_quantize(x, "int4:group32", out=out) is out
    np.testing.assert_array_equal(out, expected)
    strided = np.zeros((6, 192), np.float32)[:, ::2]
    cq.fake_quantize(x, "int4:group32", out=strided)
    np.testing.assert_array_equal(strided, expected)
    cq.fake_quantize(x, "int4:group32", out=x)
    np.testing.assert_array_equal(x, expected)
    with pytest.raises(cq.ShapeError, match="out must have x's shape"):
        cq.fake_quantize(x, "int4:group32", out=np.empty((6, 95), np.float32))
    with pytest.raises(ValueError, match="share no memory"):
        cq.fake_quantize(x[:3], "int4:group32", out=x[1:4])
    out.setflags(write=False)
    with pytest.raises(ValueError, match="out must be writeable"):
        cq.fake_quantize(x, "int4:group32", out=out)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0), (2, 0, 32), (2, 3, 64)])
@pytest.mark.parametrize("text", ["int4:channel", "int4:tensor:asymmetric", "mxfp4", "nvfp4"])
def test_shapes_are_kept_by_empty_arrays_too(shape, text):
    quantized = cq.quantize(np.zeros(shape, np.float32), text)
    assert quantized.shape == shape
    assert quantized.scales.shape == qparams_shape(shape, quantized.spec)
    assert cq.dequantize(quantized).shape == shape
    assert cq.fake_quantize(np.zeros(shape, np.float32), text).shape == shape


@pytest.mark.parametrize(
    ("x", "text", "error", "message"),
    [
        (np.float32(3) * np.ones(()), "int4:channel", ValueError, "at least 1 axis"),
        (np.ones((2, 4), np.int64), "int4:channel", TypeError, "real floating dtype, got int64"),
        (np.ones((2, 4), bool), "int4:channel", TypeError, "real floating dtype, got bool"),
        (np.ones((2, 4), object), "int4:channel", TypeError, "real floating dtype, got object"),
        (np.ones((2, 4), complex), "int4:channel", TypeError, "got complex128"),
        ([[1.0]], "int4:channel", TypeError, "x must be an array of one of numpy"),
        (np.ones((2, 250)), "int4:group128", ValueError, "group_size must divide d=250, got 128"),
        (np.ones((2, 250)), "mxfp4", ValueError, "these do: 2, 5, 10, 25, 50, 125, 250"),
        (np.ones((2, 4)), 4, TypeError, "spec must be a QuantSpec or its string form, got int"),
    ],
)
def test_wrong_arguments_are_refused(x, text, error, message):
    for call in (cq.quantize, cq.fake_quantize, cq.choose_qparams):
        with pytest.raises(error, match=message):
            call(x, text)


def test_given_parameters_are_checked():
    x = sample((4, 32))
    scales = np.ones((4, 1), np.float32)
    with pytest.raises(cq.ShapeError, match=r"scales must have shape \(4, 1\), got \(4,\)"):
        cq.quantize(x, "int4:channel", scales[:, 0])
    with pytest.raises(ValueError, match=r"scales must be positive and finite, got 0\.0"):
        cq.quantize(x, "int4:channel", scales * 0)
    with pytest.raises(ValueError, match="scales must be positive and finite"):
        cq.quantize(x, "int4:channel", scales * np.nan)
    with pytest.raises(ValueError, match="zero_points must be given if and only if"):
        cq.quantize(x, "int4:token:asymmetric", scales)
    with pytest.raises(ValueError, match="zero_points must come with scales"):
        cq.quantize(x, "int4:token:asymmetric", None, scales)
    with pytest.raises(ValueError, match="global_scale must come with scales"):
        cq.quantize(x, "nvfp4", np.ones((4, 2), np.float32))
    with pytest.raises(ValueError, match="global_scale requires granularity 'tensor_group'"):
        cq.fake_quantize(x, "mxfp4", global_scale=np.ones(1, np.float32))
    with pytest.raises(ValueError, match="one positive finite number"):
        cq.fake_quantize(x, "nvfp4", global_scale=np.zeros(1, np.float32))
    with pytest.raises(cq.SpecError, match="requires granularity 'tensor_group'"):
        cq.choose_global_scale(x, "mxfp4")
    with pytest.raises(ValueError, match="nonfinite must be one of raise, propagate"):
        cq.fake_quantize(x, "int4:channel", nonfinite="ignore")
    with pytest.raises(TypeError, match="quantized must be a QuantizedTensor"):
        cq.dequantize(x)


def test_a_shared_global_scale_fits_all_of_its_tensors():
    q, k = sample(), sample(seed=1) * np.float32(3)
    shared = np.minimum(cq.choose_global_scale(q, "nvfp4"), cq.choose_global_scale(k, "nvfp4"))
    for x in (q, k):
        quantized = cq.quantize(x, "nvfp4", global_scale=shared)
        assert quantized.global_scale is shared
        error = np.abs(x - cq.dequantize(quantized)).max()
        assert error < 0.2 * np.abs(x).max()


def test_percentiles_are_those_of_finite_entries(rng):
    x = rng.normal(size=(3, 64)).astype(np.float32)
    y = np.concatenate([x, np.full_like(x, np.nan), np.full_like(x, np.inf)], axis=1)
    for text in ("int4:token:percentile90", "int4:token:asymmetric:percentile90"):
        rounded = cq.fake_quantize(y, text, nonfinite="propagate")
        np.testing.assert_array_equal(rounded[:, :64], cq.fake_quantize(x, text))


def test_given_zero_points_become_codes_or_are_refused(rng):
    x, spec = rng.normal(size=(4, 32)).astype(np.float32), "int4:channel:asymmetric"
    scales, zeros = cq.choose_qparams(x, spec)
    expected = cq.quantize(x, spec)
    for dtype in (np.int8, np.int32, np.int64):
        found = cq.quantize(x, spec, scales, zeros.astype(dtype))
        np.testing.assert_array_equal(found.codes, expected.codes)
        assert found.zero_points.dtype == np.int8
    for wrong, error, message in (
        (np.full((4, 1), np.nan), TypeError, "zero_points must have an integer dtype, got float64"),
        (np.full((4, 1), 1000), ValueError, r"zero_points must lie in \[-8, 7\], got 1000"),
        (np.zeros((4, 2), np.int8), cq.ShapeError, r"zero_points must have shape \(4, 1\)"),
    ):
        with pytest.raises(error, match=message):
            cq.quantize(x, spec, scales, wrong)


def test_given_scales_must_be_numbers_of_their_format(rng):
    x = rng.normal(size=(2, 32)).astype(np.float32)
    with pytest.raises(ValueError, match=r"scales must be numbers of e8m0, got 3\.0"):
        cq.quantize(x, "mxfp4", np.full((2, 1), 3, np.float32))
    wrong = np.array([[1], [np.inf]], np.float32)
    with pytest.raises(ValueError, match="scales must be positive and finite, got inf"):
        cq.quantize(x, "int4:channel", wrong)


@pytest.mark.parametrize("text", ["int4:channel:asymmetric", "nvfp4", "mxfp4"])
def test_arrays_that_do_not_fit_each_other_are_not_read(rng, text):
    q = cq.quantize(rng.normal(size=(4, 64)).astype(np.float32), text)
    wrong = [{"scales": q.scales[:1]}, {"scales": q.scales.repeat(2, 1)}]
    wrong.append({"codes": q.codes[:, :48]} if q.spec.group_size else {"codes": q.codes[:2]})
    if q.zero_points is not None:
        wrong += [{"zero_points": None}, {"zero_points": q.zero_points[:2]}]
        wrong.append({"zero_points": q.zero_points.astype(float)})
    if q.global_scale is not None:
        wrong += [{"global_scale": None}, {"global_scale": np.ones((1, 1), np.float32)}]
    else:
        wrong.append({"global_scale": np.ones(1, np.float32)})
    for changes in wrong:
        with pytest.raises((ValueError, TypeError)):
            cq.dequantize(dataclasses.replace(q, **changes))


def test_rounding_in_place_leaves_what_it_refuses(rng):
    x = rng.normal(size=(4, 32)).astype(np.float32)
    x[3, 0] = np.nan
    before = x.copy()
    with pytest.raises(cq.NonFiniteError):
        cq.fake_quantize(x, "int4:token", out=x)
    np.testing.assert_array_equal(x, before)


def test_extreme_numbers_decode_to_finite_ones():
    top = np.finfo(np.float32).max
    generator = np.random.default_rng(1)
    for bits in range(2, 9):
        x = (generator.uniform(-1, 1, (40, 6)) * top).astype(np.float32)
        x[:, :2] = top, -top
        for rest in ("", ":hqo", ":mse", ":bfloat16", ":float16", ":percentile90"):
            assert np.isfinite(cq.fake_quantize(x, f"int{bits}:channel:asymmetric{rest}")).all()
    # Steps are subnormal here, and as coarse as that.
    small = np.array([[1e-44, 0, 3e-44, -2e-43]], np.float32)
    assert np.abs(cq.fake_quantize(small, "int8f6:channel") - small).max() <= 2.5e-44


@pytest.mark.parametrize("factor", [2.0**665, 2.0**-565, 2.0**-1000])
def test_searches_do_not_depend_on_the_unit(rng, factor):
    x = rng.normal(size=(3, 64))
    for text in (
        "int8:channel:mse",
        "int4:channel:exact",
        "e2m1:channel:exact",
        "e2m1:channel:mse",
    ):
        expected = cq.dequantize(cq.quantize(x, text))
        np.testing.assert_array_equal(
            cq.dequantize(cq.quantize(x * factor, text)), expected * factor
        )


def test_an_exact_scale_that_is_too_large_is_not_worse_than_the_first():
    x = np.array([[1.1414755e37, 0, 1.2752436e36]], np.float32)
    errors = [
        np.square(cq.dequantize(cq.quantize(x, f"e5m2:channel:{kind}")).astype(float) - x).sum()
        for kind in ("absmax", "exact")
    ]
    assert errors[1] <= errors[0]


def masked(x):
    return np.ma.MaskedArray(x)


def old_matrix(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.matrix(x)


@pytest.mark.parametrize("kind", [masked, old_matrix])
def test_arrays_that_mean_something_else_are_refused(rng, kind):
    W, H = kind(rng.normal(size=(4, 8))), np.eye(8)
    calls = [
        lambda: cq.quantize(W, "int4:channel"),
        lambda: cq.fake_quantize(W, "int4:channel"),
        lambda: cq.quantize_packed(W, "int4:channel"),
        lambda: cq.encode(W, "int4"),
        lambda: cq.block_hadamard(W, 4),
        lambda: cq.rotate_quantize(W, 4, "int4:token"),
        lambda: cq.round_to_nearest(W, "int4:channel"),
        lambda: cq.gptq(W, H, "int4:channel"),
        lambda: cq.merge_rotation(W, 4, side="input"),
        lambda: cq.fold_norm(W, np.ones(8)),
        lambda: cq.block_mass(W, 4),
        lambda: cq.ActivationStats(8).update(W),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"must be a plain .*, got (MaskedArray|matrix)"):
            call()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)])
def test_scales_of_a_tensor_may_have_any_axes_of_length_1(shape):
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    scales, zeros = cq.choose_qparams(x, "int4:tensor:asymmetric")
    expected = cq.quantize(x, "int4:tensor:asymmetric", scales, zeros)
    given = scales.reshape(shape), zeros.reshape(shape)
    found = cq.quantize(x, "int4:tensor:asymmetric", *given)
    np.testing.assert_array_equal(found.codes, expected.codes)
    assert found.scales.shape == found.zero_points.shape == (1, 1)
    other = dataclasses.replace(expected, scales=given[0], zero_points=given[1])
    np.testing.assert_array_equal(cq.dequantize(other), cq.dequantize(expected))
    np.testing.assert_array_equal(cq.pack_quantized(other).scales, expected.scales)


def test_one_number_stands_for_all_scales_and_nothing_else_is_repeated():
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    for spec, shape in (("int4:channel:symmetric", (4, 1)), ("int4:group32:symmetric", (4, 2))):
        found = cq.quantize(x, spec, np.float32(0.25))
        expected = cq.quantize(x, spec, np.full(shape, 0.25, np.float32))
        np.testing.assert_array_equal(found.codes, expected.codes)
        assert found.scales.shape == shape
        for wrong in ((1,), (1, 1), (4,), (2,), (4, 1, 1), (2, 4)):
            if wrong != shape:
                with pytest.raises(cq.ShapeError, match="scales must have shape"):
                    cq.quantize(x, spec, np.ones(wrong, np.float32))
    shared = cq.choose_global_scale(x, "nvfp4")
    found = cq.quantize(x, "nvfp4", global_scale=shared.reshape(()))
    assert found.global_scale.shape == (1,)
    np.testing.assert_array_equal(found.codes, cq.quantize(x, "nvfp4").codes)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_scales_are_read_as_float32(dtype):
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    given = np.full((2, 1), 0.25, dtype)
    found = cq.quantize(x, "int8:channel:symmetric", given)
    assert found.scales.dtype == np.float32
    expected = cq.quantize(x, "int8:channel:symmetric", given.astype(np.float32))
    np.testing.assert_array_equal(found.codes, expected.codes)
    read = cq.dequantize(dataclasses.replace(found, scales=given))
    np.testing.assert_array_equal(read, cq.dequantize(expected))


@pytest.mark.parametrize("spec", ["e2m1:tensor", "nf4:tensor", "int4:tensor:symmetric"])
@pytest.mark.parametrize("scale", [1e-300, 1e-46, 1e300])
def test_scales_that_float32_does_not_hold_are_refused(spec, scale):
    x = np.array([[0.0, 1, -1, 3]], np.float32)
    with pytest.raises(ValueError, match="scales must be positive and finite"):
        cq.quantize(x, spec, np.full((1, 1), scale))
    assert np.isfinite(cq.quantize(x.astype(np.float64), spec, np.full((1, 1), 1e-46)).scales).all()
    with pytest.raises(ValueError, match="global_scale must be one positive finite number"):
        cq.quantize(np.ones((1, 16), np.float32), "nvfp4", global_scale=np.full(1, scale))


def test_codes_and_scales_of_other_kinds_are_looked_at():
    q = cq.quantize(np.ones((2, 8), np.float32), "int4:channel")
    wide = dataclasses.replace(q, codes=q.codes.astype(np.int64))
    np.testing.assert_array_equal(cq.dequantize(wide), cq.dequantize(q))
    for changes in (
        {"codes": q.codes.astype(np.float32)},
        {"codes": q.codes.astype(np.int64) + 256},
        {"scales": None},
        {"scales": q.scales.astype(np.int32)},
    ):
        with pytest.raises((TypeError, ValueError), match=r"codes|scales"):
            cq.dequantize(dataclasses.replace(q, **changes))


def _as(backend, array):
    if array is None or backend == "numpy":
        return array
    import torch

    return torch.from_numpy(array)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("form", "dtype", "code", "limits"),
    [
        ("int4", np.int8, 100, "-8, 7"),
        ("int4", np.int8, -9, "-8, 7"),
        ("int4", np.uint8, 16, "0, 15"),
        ("uint4", np.int8, -1, "0, 15"),
        ("float4_e2m1fn", np.uint8, 100, "0, 15"),
        ("nf4", np.uint8, 16, "0, 15"),
        ("codebook(-1,0,1)", np.uint8, 3, "0, 2"),
    ],
)
def test_codes_outside_their_format_are_not_decoded(backend, form, dtype, code, limits):
    codes = np.zeros((2, 32), dtype)
    cq.decode(_as(backend, codes), form)
    codes[1, 5] = code
    name = re.escape(find_format(form).name)
    message = rf"codes of {name} must lie in \[{limits}\], got {code}$"
    with pytest.raises(ValueError, match=message):
        cq.decode(_as(backend, codes), form)


def test_all_bytes_are_codes_of_eight_bits_and_the_bits_of_int4_are_read():
    every = np.arange(256).astype(np.uint8)
    for form in ("int8", "uint8", "float8_e4m3fn"):
        wanted = cq.decode(every, form)
        np.testing.assert_array_equal(cq.decode(every.view(np.int8), form), wanted)
    np.testing.assert_array_equal(cq.decode(np.array([7, 8, 15], np.uint8), "int4"), [7, -8, -1])


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("text", "code", "scale", "message"),
    [
        ("int4:token", 100, 1.0, r"codes must lie in \[-8, 7\], got 100"),
        ("int4:token", -9, 1.0, r"codes must lie in \[-8, 7\], got -9"),
        ("mxfp4", 16, 1.0, r"codes must lie in \[0, 15\], got 16"),
        ("nf4:token", 255, 1.0, r"codes must lie in \[0, 15\], got 255"),
        ("int8:token", 100, np.nan, "scales must be positive and finite, got nan"),
        ("int4:token", 1, np.inf, "scales must be positive and finite, got inf"),
        ("int4:token", 1, 0.0, "scales must be positive and finite, got 0.0"),
    ],
)
def test_a_quantized_tensor_of_wrong_numbers_is_not_decoded(backend, text, code, scale, message):
    spec = cq.QuantSpec.parse(text)
    codes = np.zeros((2, 32), spec.format.code_dtype)
    codes[1, 5] = code
    scales = np.ones((2, 1), np.float32)
    scales[1] = scale
    wrong = cq.QuantizedTensor(_as(backend, codes), _as(backend, scales), None, spec)
    with pytest.raises(ValueError, match=message):
        cq.dequantize(wrong)


def test_a_global_scale_of_no_use_is_not_divided_by():
    q = cq.quantize(np.ones((1, 16), np.float32), "nvfp4")
    with pytest.raises(ValueError, match="global_scale must be one positive finite number"):
        cq.dequantize(dataclasses.replace(q, global_scale=np.full(1, np.nan, np.float32)))
