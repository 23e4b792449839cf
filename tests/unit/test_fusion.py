"""rotate_quantize and rotate_fake_quantize."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import corequant as cq
from corequant._cpu import arrays
from corequant._cpu.arrays import aligned
from corequant._cpu.codegen.compiler import compiled_away
from corequant._cpu.fusion import can_fuse, fuse

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def separate(x, order, spec, permutation, signs):
    y = x if permutation is None else x[..., permutation]
    return cq.quantize(cq.block_hadamard(y, order, signs=signs), spec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["int4:token:symmetric", "int8:group64:symmetric"])
@pytest.mark.parametrize(("order", "d"), [(16, 512), (128, 512), (12 * 16, 768), (10, 40), (2, 6)])
@pytest.mark.parametrize("permuted", [False, True])
def test_codes_are_those_of_the_separate_steps(rng, dtype, spec, order, d, permuted):
    if order == 10:
        order = 20
    if d % 64 and "group" in spec:
        spec = f"int8:group{order}:symmetric"
    x = rng.standard_t(3, size=(3, 5, d)).astype(dtype)
    x[1, 2] = 0
    permutation = rng.permutation(d) if permuted else None
    signs = rng.choice([-1, 1], d).astype(np.int8)
    expected = separate(x, order, spec, permutation, signs)
    found = cq.rotate_quantize(x, order, spec, permutation=permutation, signs=signs)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)
    values = cq.rotate_fake_quantize(x, order, spec, permutation=permutation, signs=signs)
    assert values.dtype == x.dtype
    np.testing.assert_array_equal(values, cq.dequantize(expected).astype(dtype))


def parameters(y, least, most, group):
    """Scales and zero points in the dtype of ``y``, each operation rounded to it."""
    real = y.dtype.type
    groups = y.reshape(len(y), -1, group)
    low = np.minimum(groups.min(-1), real(0))
    high = np.maximum(groups.max(-1), real(0))
    scales = (high / real(2) - low / real(2)) / (real(most - least) / real(2))
    scales = np.where((low == 0) & (high == 0), real(1), scales)
    zeros = np.clip(np.rint(real(least) - low / scales), least, most)
    return scales, np.where((low == 0) & (high == 0), 0, zeros)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("group", [64, 256, 512])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_codes(rng, dtype, group, bits):
    x = rng.standard_t(3, size=(7, 512)).astype(dtype)
    x[3] = 0
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    y = cq.block_hadamard(x, 64)
    scales, zeros = parameters(y, least, most, group)
    shaped = y.reshape(7, -1, group)
    codes = np.rint(shaped / scales[..., None]) + zeros[..., None]
    spec = f"int{bits}:{'token' if group == 512 else f'group{group}'}:asymmetric"
    found = cq.rotate_quantize(x, 64, spec)
    np.testing.assert_array_equal(found.scales, scales)
    np.testing.assert_array_equal(found.zero_points, zeros)
    np.testing.assert_array_equal(found.codes, np.clip(codes, least, most).reshape(7, 512))


def test_microscaled_codes_and_scales(rng):
    x = rng.standard_t(3, size=(64, 512)).astype(np.float32)
    x[0, :64] = 0
    x[1] *= np.float32(1e-42)
    x[2] *= np.float32(1e33)
    x[3, :32] = [-0.0] * 32
    y = cq.block_hadamard(x, 32)
    groups = y.reshape(64, -1, 32)
    exponents = np.frexp(np.abs(groups).max(-1))[1] - 1 - 2
    exponents[np.abs(groups).max(-1) == 0] = -127
    exponents = np.maximum(exponents, -127)
    scaled = np.ldexp(groups.astype(np.float64), -exponents[..., None])
    # Casting saturates nowhere in ml_dtypes' format without infinity, so clip first.
    expected = np.clip(scaled, -6, 6).astype(np.float32).astype(ml_dtypes.float4_e2m1fn)
    codes = np.empty(x.shape, np.uint8)
    scales, _, finite = fuse(x, 32, 32, "float4", out=codes)
    assert finite
    np.testing.assert_array_equal(scales.reshape(64, -1).astype(int) - 127, exponents)
    np.testing.assert_array_equal(codes, expected.view(np.uint8).reshape(x.shape) & 15)


def test_microscaled_ties_go_to_even_codes():
    # A block of two times a spike: the rotation turns (a + b, a - b) back into chosen numbers.
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5] * 4, np.float32)
    y = np.concatenate([ties, -ties])
    x = cq.block_hadamard(y.astype(np.float64)[None], 64, inverse=True).astype(np.float32)
    rotated = cq.block_hadamard(x, 64)
    np.testing.assert_array_equal(rotated[0], y)
    codes = np.empty((1, 64), np.uint8)
    fuse(x, 64, 32, "float4", out=codes)
    np.testing.assert_array_equal(codes[0, :8], [0, 2, 2, 4, 4, 6, 6, 7])
    np.testing.assert_array_equal(codes[0, 32:40], [8, 10, 10, 12, 12, 14, 14, 15])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("order", [64, 20])
def test_what_is_not_finite_is_named(rng, bad, order):
    x = rng.normal(size=(4, 320)).astype(np.float32)
    x[2, 7] = bad
    with pytest.raises(cq.NonFiniteError, match=r"1 non-finite.*\(2, 7\)"):
        cq.rotate_quantize(x, order, "int4:token")
    with pytest.raises(cq.NonFiniteError, match=r"\(2, 7\)"):
        cq.rotate_fake_quantize(x, order, "int4:token")


def test_sums_that_overflow_are_refused():
    x = np.full((1, 64), 3e38, np.float32)
    with pytest.raises(cq.NonFiniteError, match="rotated x"):
        cq.rotate_quantize(x, 64, "int4:token")


def test_threads_and_outputs(rng):
    x = rng.normal(size=(300, 1024)).astype(np.float32)
    one = cq.rotate_quantize(x, 64, "int4:token:asymmetric", threads=1)
    codes = np.empty(x.shape, np.int8)
    two = cq.rotate_quantize(x, 64, "int4:token:asymmetric", threads=2, out=codes)
    assert two.codes is codes
    for a, b in ((one.codes, codes), (one.scales, two.scales), (one.zero_points, two.zero_points)):
        np.testing.assert_array_equal(a, b)
    values = cq.rotate_fake_quantize(x, 64, "int4:token:asymmetric")
    assert cq.rotate_fake_quantize(x, 64, "int4:token:asymmetric", out=x) is x
    np.testing.assert_array_equal(x, values)
    with pytest.raises(ValueError, match="dtype int8"):
        cq.rotate_quantize(x, 64, "int4:token", out=x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 16])
@pytest.mark.parametrize("threads", [1, 2])
def test_streamed_values_are_the_same(rng, monkeypatch, dtype, offset, threads):
    x = rng.normal(size=(128, 1024)).astype(dtype)
    expected = cq.rotate_fake_quantize(x, 64, "int4:group64:asymmetric")
    monkeypatch.setattr(arrays, "_STREAMED_BYTES", 0)
    memory = aligned(x.nbytes + 256)
    memory[:] = 7
    out = memory[64 + offset :][: x.nbytes].view(dtype).reshape(x.shape)
    cq.rotate_fake_quantize(x, 64, "int4:group64:asymmetric", out=out, threads=threads)
    np.testing.assert_array_equal(out, expected)
    assert (memory[: 64 + offset] == 7).all()
    assert (memory[64 + offset + x.nbytes :] == 7).all()
    fresh = cq.rotate_fake_quantize(x, 64, "int4:group64:asymmetric")
    np.testing.assert_array_equal(fresh, expected)


def test_which_shapes_are_fused():
    compiled = not compiled_away()
    assert can_fuse(4096, 64, 4096, np.dtype(np.float32)) == compiled
    assert can_fuse(768, 192, 32, np.dtype(np.float32)) == compiled
    assert not can_fuse(40, 20, 40, np.dtype(np.float32))
    assert not can_fuse(96, 32, 24, np.dtype(np.float32))


def test_empty_batch():
    q = cq.rotate_quantize(np.empty((0, 64), np.float32), 64, "int4:token")
    assert q.codes.shape == (0, 64)
    assert q.scales.shape == (0, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "spec",
    [
        "int4:token:symmetric",
        "int8:token:symmetric",
        "int4:token:asymmetric",
        "int8:token:asymmetric",
    ],
)
@pytest.mark.parametrize("size", ["subnormal", "small", "one", "large"])
def test_quotients_next_to_the_middle_of_two_codes(rng, dtype, spec, size):
    """A row is scaled so that its numbers lie on, above and below k + 1/2 steps."""
    info = np.finfo(dtype)
    unit = {
        "subnormal": info.smallest_subnormal * 3,
        "small": info.tiny * 5,
        "one": dtype(1),
        "large": info.max / 400,
    }[size]
    most = 127.5 if spec.startswith("int8") else 7.5
    steps = (rng.uniform(1, 2, size=(64, 1)) * unit).astype(dtype)
    middles = (rng.integers(-7, 7, size=(64, 512)) + 0.5) * steps
    x = middles.astype(dtype)
    for _ in range(3):
        moved = np.nextafter(x, (rng.choice([-1, 1], x.shape) * info.max).astype(dtype))
        x = np.where(rng.random(x.shape) < 0.4, moved, x)
    x[:, 0] = (most * steps[:, 0]).astype(dtype)
    if not spec.endswith(":symmetric"):
        x[:, 1] = -x[:, 0]
    fused = cq.rotate_quantize(x, 1, spec)
    apart = cq.quantize(x, spec)
    np.testing.assert_array_equal(fused.scales, apart.scales)
    np.testing.assert_array_equal(fused.codes, apart.codes)
    zeros = 0
    if apart.zero_points is not None:
        np.testing.assert_array_equal(fused.zero_points, apart.zero_points)
        zeros = apart.zero_points.reshape(-1, 1)
    # Taking the product with the reciprocal would not do.
    if size == "one":
        hasty = np.rint(x * (dtype(1) / apart.scales.reshape(-1, 1))) + zeros
        assert (hasty != apart.codes).any()


PLACES = [
    lambda x, out: cq.block_hadamard(x, 8, out=out),
    lambda x, out: cq.fake_quantize(x, "int4:token", out=out),
    lambda x, out: cq.rotate_fake_quantize(x, 8, "int4:token", out=out),
]


@pytest.mark.parametrize("call", PLACES)
def test_one_rule_decides_where_results_may_go(call, rng):
    values = rng.normal(size=(4, 24)).astype(np.float32)
    expected = call(values, None)
    for x in (values.copy(), np.asfortranarray(values), values.copy()[::-1]):
        right = call(x, None)
        assert call(x, x[:]).shape == x.shape
        np.testing.assert_array_equal(x, right)
    memory = np.zeros(200, np.float32)
    x = memory[:96].reshape(4, 24)
    x[...] = values
    with pytest.raises(ValueError, match="share no memory"):
        call(x, memory[24:120].reshape(4, 24))
    with pytest.raises(ValueError, match="share no memory"):
        call(x, x[::-1])
    with pytest.raises(ValueError, match="share no memory"):
        call(x[:, :8], x[:, 4:12])
    np.testing.assert_array_equal(call(x[:, :8], x[:, 8:16]), call(values[:, :8], None))
    fixed = np.empty_like(values)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        call(values, fixed)
    with pytest.raises(ValueError, match="must not overlap itself"):
        call(values, np.lib.stride_tricks.as_strided(np.zeros(24, np.float32), (4, 24), (0, 4)))
    for wrong in (np.zeros((4, 23), np.float32), np.zeros((4, 24)), np.zeros((4, 24), ">f4")):
        with pytest.raises(cq.ShapeError, match="out must have x's shape"):
            call(values, wrong)
    with pytest.raises(TypeError):
        call(values, [[0.0] * 24] * 4)
    np.testing.assert_array_equal(call(values, None), expected)


def test_codes_may_not_go_where_x_lies(rng):
    x = rng.normal(size=(4, 32)).astype(np.float32)
    inside = x.view(np.int8).reshape(-1)[:128].reshape(4, 32)
    with pytest.raises(ValueError, match="share no memory"):
        cq.rotate_quantize(x, 8, "int4:token", out=inside)


@pytest.mark.parametrize("shape", [(2, 0, 32), (0, 32)])
def test_empty_arrays_go_to_empty_places(shape):
    x = np.ones(shape, np.float32)
    for call in PLACES:
        out = np.empty_like(x)
        assert call(x, out) is out
    packed = cq.quantize_packed(x, "mxfp4")
    cq.quantize_packed(x, "mxfp4", out=np.empty_like(packed.packed))


@pytest.mark.parametrize("call", PLACES)
def test_places_that_overlap_themselves_are_refused(call):
    out = np.lib.stride_tricks.as_strided(np.zeros(40, np.float32), (4, 8), (16, 4))
    with pytest.raises(ValueError, match="must not overlap itself"):
        call(np.ones((4, 8), np.float32), out)
