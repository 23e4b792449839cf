"""Bit streams: golden bytes, inverses, errors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import corequant as cq
from corequant.storage.arrays import from_arrays, to_arrays

SPECS = [
    *(f"int{b}:{rest}" for b in range(2, 9) for rest in ("channel", "group32:asymmetric")),
    *("uint4:token:asymmetric", "uint3:channel", "nf4:group16", "e3m2:channel:float16"),
    *("codebook(-1,0,2):group32", "e4m3:tensor:bfloat16", "float8_e4m3fn:channel"),
    *cq.presets,
]


def words(array):
    return [f"{int(w) & 0xFFFFFFFF:08x}" for w in array.ravel()]


def test_golden_integers():
    codes = np.arange(-8, 8)
    assert words(cq.pack(codes, 4)) == ["76543210", "fedcba98"]
    assert words(cq.pack(np.tile(np.arange(-4, 4), 4), 3)) == ["88fac688", "c688fac6", "fac688fa"]


def test_golden_zero_points_are_packed_along_the_outputs():
    scales, codes = np.ones((16, 1), np.float32), np.zeros((16, 8), np.int8)
    zeros = np.arange(-8, 8, dtype=np.int8)[:, None]
    spec = cq.QuantSpec.parse("int4:channel:asymmetric")
    arrays = to_arrays("w", cq.QuantizedTensor(codes, scales, zeros, spec))
    assert arrays["w.weight_zero_point"].shape == (2, 1)
    assert words(arrays["w.weight_zero_point"]) == ["76543210", "fedcba98"]


def test_golden_fp4():
    assert cq.pack_bytes(np.arange(16), 4).tobytes().hex() == "1032547698badcfe"
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = 6, -3, 1.4, 0.3
    micro = cq.quantize_packed(x, "mxfp4")
    assert micro.scales.tolist() == [[127]]
    assert micro.packed[0, :2].tobytes().hex() == "d713"
    np.testing.assert_array_equal(cq.dequantize_packed(micro)[0, :4], [6, -3, 1.5, 0.5])
    nv = cq.quantize_packed(np.ascontiguousarray(x[:, :16]), "nvfp4")
    assert nv.global_scale.tolist() == [448.0]
    assert nv.scales.tolist() == [[0x7E]]
    assert nv.packed[0, :2].tobytes().hex() == "d713"
    np.testing.assert_array_equal(cq.dequantize_packed(nv)[0, :4], [6, -3, 1.5, 0.5])


@given(st.integers(2, 8), st.integers(0, 70), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_unpack_undoes_pack(bits, d, rows, seed):
    generator = np.random.default_rng(seed)
    half = 2 ** (bits - 1)
    codes = generator.integers(-half, half, (rows, d)).astype(np.int8)
    np.testing.assert_array_equal(cq.unpack(cq.pack(codes, bits), bits, d), codes)
    plain = (codes.astype(np.int16) + half).astype(np.uint8)
    np.testing.assert_array_equal(cq.unpack_bytes(cq.pack_bytes(plain, bits), bits, d), plain)


@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_bits_lie_where_the_definition_says(bits, d, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, d)
    stream = int.from_bytes(cq.pack_bytes(codes, bits).tobytes(), "little")
    assert [(stream >> (bits * k)) & (2**bits - 1) for k in range(d)] == codes.tolist()


@pytest.mark.parametrize("text", SPECS)
def test_packed_tensors_and_arrays_come_back(text):
    x = np.random.default_rng(7).standard_normal((6, 96)).astype(np.float32)
    quantized = cq.quantize(x, text)
    packed = cq.quantize_packed(x, text)
    apart = cq.pack_quantized(quantized)
    np.testing.assert_array_equal(packed.packed, apart.packed)
    np.testing.assert_array_equal(packed.scales, apart.scales)
    np.testing.assert_array_equal(cq.dequantize_packed(packed), cq.dequantize(quantized))
    again = from_arrays("m", to_arrays("m", quantized), quantized.spec, (6, 96))
    for tensor in (cq.unpack_quantized(packed), again):
        np.testing.assert_array_equal(tensor.codes, quantized.codes)
        np.testing.assert_array_equal(tensor.scales, quantized.scales)
        assert tensor.codes.dtype == quantized.codes.dtype
        if quantized.zero_points is not None:
            np.testing.assert_array_equal(tensor.zero_points, quantized.zero_points)
        np.testing.assert_array_equal(cq.dequantize(tensor), cq.dequantize(quantized))


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"codes of 4 bits must lie in \[-8, 7\], got 8"):
        cq.pack(np.array([8]), 4)
    with pytest.raises(TypeError, match="codes must have an integer dtype, got float64"):
        cq.pack(np.array([1.0]), 4)
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 9"):
        cq.pack(np.array([1]), 9)
    with pytest.raises(ValueError, match="packed must hold 1 words a row"):
        cq.unpack(np.zeros((2, 2), np.int32), 4, 8)
    with pytest.raises(TypeError, match="packed must have dtype uint8, got int32"):
        cq.unpack_bytes(np.zeros(4, np.int32), 4, 8)
    quantized = cq.quantize(np.ones((1, 32), np.float32), "mxfp4")
    wrong = cq.QuantizedTensor(quantized.codes, quantized.scales * 24, None, quantized.spec)
    with pytest.raises(ValueError, match=r"scales must be numbers of e8m0, got 6\.0"):
        cq.pack_quantized(wrong)
    with pytest.raises(cq.ShapeError, match="out must be uint8"):
        cq.quantize_packed(np.ones((1, 32), np.float32), "mxfp4", out=np.zeros((1, 32), np.uint8))


@pytest.mark.parametrize("codes", [[2**40], [1, -(2**40)], [2**63 - 1]])
def test_codes_never_wrap_around(codes):
    for pack in (cq.pack, cq.pack_bytes):
        with pytest.raises(ValueError, match=r"codes of 4 bits must lie in \[.*\], got "):
            pack(np.array(codes), 4)


def test_what_is_not_codes_is_refused():
    with pytest.raises(TypeError, match="codes must have an integer dtype, got bool"):
        cq.pack(np.array([True]), 4)
    with pytest.raises(cq.ShapeError, match="codes must have at least 1 axis, got a scalar"):
        cq.pack(np.array(3), 4)
    with pytest.raises(cq.BlockSizeError, match="group_size must divide d=250, got 128"):
        cq.quantize_packed(np.ones((2, 250), np.float32), "int4:group128")


@pytest.mark.parametrize("text", ["int4:group32", "int3:group32:asymmetric", "mxfp4", "nvfp4"])
def test_shards_cut_between_groups_are_parts_of_the_whole(text):
    x = np.random.default_rng(8).standard_normal((6, 192)).astype(np.float32)
    whole = cq.quantize(x, text)
    for start in (0, 96):
        shard = np.ascontiguousarray(x[:, start : start + 96])
        part = cq.quantize(shard, text, global_scale=whole.global_scale)
        np.testing.assert_array_equal(part.codes, whole.codes[:, start : start + 96])
    with pytest.raises(cq.BlockSizeError, match="group_size must divide d=72"):
        cq.quantize(x[:, :72], text)


@pytest.mark.parametrize("text", ["mxfp4", "nvfp4", "int4:channel:asymmetric", "int3:group32"])
def test_packed_arrays_that_do_not_fit_each_other_are_not_read(text):
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    p = cq.quantize_packed(x, text)
    wrong = [
        {"d": 128},
        {"d": 56},
        {"packed": p.packed[:, :8]},
        {"packed": p.packed.astype(np.int32)},
        {"scales": p.scales[:1]},
        {"scales": p.scales.astype(np.int64)},
        {"zero_points": None if p.zero_points is not None else np.zeros((4, 1), np.int8)},
        {"global_scale": None if p.global_scale is not None else np.ones(1, np.float32)},
    ]
    for changes in wrong:
        other = dataclasses.replace(p, **changes)
        for read in (cq.dequantize_packed, cq.unpack_quantized):
            with pytest.raises((TypeError, ValueError)):
                read(other)


def test_what_packing_is_given_is_checked():
    x = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    for wrong in (np.nan, -5.0):
        with pytest.raises(ValueError, match="global_scale must be one positive finite number"):
            cq.quantize_packed(x, "nvfp4", global_scale=np.array([wrong], np.float32))
    with pytest.raises(ValueError, match="global_scale requires granularity 'tensor_group'"):
        cq.quantize_packed(x, "int4:group16", global_scale=np.ones(1, np.float32))
    with pytest.raises(TypeError, match="global_scale must be a numpy.ndarray, got float"):
        cq.quantize_packed(x, "nvfp4", global_scale=3.0)
    fixed = np.zeros((4, 16), np.uint8)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        cq.quantize_packed(x, "int4:group16", out=fixed)
    numbers = np.zeros((4, 32), np.float32)
    numbers.flags.writeable = False
    packed = cq.quantize_packed(x, "int4:group16")
    with pytest.raises(ValueError, match="out must be writeable"):
        cq.dequantize_packed(packed, out=numbers)
    with pytest.raises(TypeError, match="packed must be a PackedTensor"):
        cq.unpack_quantized(None)


@pytest.mark.parametrize("d", [1, 3, 5, 7, 9, 15, 31, 33])
@pytest.mark.parametrize(
    "spec", ["int4:token", "int3:token:asymmetric", "e2m1:token", "int8:tensor"]
)
def test_padding_of_a_given_place_is_zero_bits(d, spec):
    x = np.random.default_rng(d).normal(size=(3, d)).astype(np.float32)
    expected = cq.pack_quantized(cq.quantize(x, spec)).packed
    out = np.full(expected.shape, 0xA7, np.uint8)
    assert cq.quantize_packed(x, spec, out=out).packed is out
    np.testing.assert_array_equal(out, expected)


def test_packing_refuses_to_write_into_what_it_reads():
    x = np.ones((4, 32), np.float32)
    inside = x.view(np.uint8).reshape(-1)[: 4 * 16].reshape(4, 16)
    with pytest.raises(ValueError, match="out must share no memory"):
        cq.quantize_packed(x, "mxfp4", out=inside)
    packed = cq.quantize_packed(np.ones((4, 64), np.float32), "int8:token")
    view = packed.packed.reshape(-1).view(np.float32)[:64].reshape(1, 64)
    part = dataclasses.replace(packed, packed=packed.packed[:1], scales=packed.scales[:1])
    with pytest.raises(ValueError, match="out must share no memory"):
        cq.dequantize_packed(part, out=view)
