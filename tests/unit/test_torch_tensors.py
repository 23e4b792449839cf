"""CPU tensors: the NumPy kernels on the same memory, in every dtype, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

import corequant as cq
from corequant_torch.kernels.cpu import to_numpy, to_torch
from corequant_torch.kernels.engines import check_apart, check_devices

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BYTES = [
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


def sample(dtype=torch.float32, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*(shape or (6, 64)), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS + BYTES)
def test_arrays_share_the_tensors_memory_both_ways(dtype):
    x = sample().abs().to(dtype)[1:, ::2]
    array = to_numpy(x)
    assert array.ctypes.data == x.data_ptr()
    assert array.shape == tuple(x.shape)
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(array.astype(np.float32), x.float().numpy())
    back = to_torch(array)
    assert back.dtype == dtype
    assert back.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("spec", ["int4:token:asymmetric", "mxfp4", "nvfp4", "e3m2:group16"])
def test_every_function_gives_numpys_result(dtype, spec):
    x = sample(dtype)
    array = to_numpy(x)
    signs, p = cq.random_signs(64, 0), cq.random_permutation(64, 1)
    pairs = [
        (cq.block_hadamard(x, 16, signs=signs), cq.block_hadamard(array, 16, signs=signs)),
        (cq.fake_quantize(x, spec), cq.fake_quantize(array, spec)),
    ]
    how = {"permutation": p, "signs": signs}
    pairs.append(
        (
            cq.rotate_fake_quantize(x, 16, spec, **how),
            cq.rotate_fake_quantize(array, 16, spec, **how),
        )
    )
    found, expected = (cq.rotate_quantize(a, 16, spec, **how) for a in (x, array))
    pairs += [(found.codes, expected.codes), (found.scales, expected.scales)]
    for ours, theirs in pairs:
        assert to_numpy(ours).dtype == theirs.dtype
        np.testing.assert_array_equal(to_numpy(ours), theirs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_out_is_written_in_place(dtype):
    x = sample(dtype)
    expected = cq.block_hadamard(x, 16), cq.fake_quantize(x, "int4:token:asymmetric")
    for out in (torch.zeros_like(x), torch.zeros(64, 6, dtype=dtype).T):
        assert cq.block_hadamard(x, 16, out=out) is out
        assert torch.equal(out, expected[0])
        assert cq.fake_quantize(x, "int4:token:asymmetric", out=out) is out
        assert torch.equal(out, expected[1])
    address = x.data_ptr()
    assert cq.block_hadamard(x, 16, out=x) is x
    assert x.data_ptr() == address
    assert torch.equal(x, expected[0])


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: torch.cat([x, x], 1)[:, :64],
        lambda x: x[None].expand(3, 6, 64),
    ],
)
def test_strided_tensors(strided):
    x = strided(sample())
    plain = x.contiguous()
    assert torch.equal(cq.block_hadamard(x, 16), cq.block_hadamard(plain, 16))
    for f in (cq.quantize, lambda t, s: cq.rotate_quantize(t, 16, s)):
        found, expected = f(x, "int4:token:symmetric"), f(plain, "int4:token:symmetric")
        assert torch.equal(found.codes, expected.codes)


def test_overlapping_out_is_refused():
    x = sample()
    for out in (x[:, torch.arange(63, -1, -1)].set_(x.untyped_storage(), 0, (6, 64), (1, 6)),):
        with pytest.raises(ValueError, match="share no memory"):
            cq.block_hadamard(x, 16, out=out)
        with pytest.raises(ValueError, match="share no memory"):
            cq.fake_quantize(x, "int4:token:symmetric", out=out)
    both = torch.zeros(12, 64)
    check_apart(both[:6], both[6:])


@pytest.mark.parametrize("strides", [(2, 1), (0, 1), (1, 1)])
def test_out_whose_entries_overlap_is_refused(strides):
    x, spec = sample(), "int4:token:symmetric"
    message = r"out must not overlap itself, got strides \(\d, 1\) for shape \(6, 64\)"
    out = torch.zeros(6 * 64).as_strided((6, 64), strides)
    codes = torch.zeros(6 * 64, dtype=torch.int8).as_strided((6, 64), strides)
    for call in (
        lambda: cq.block_hadamard(x, 16, out=out),
        lambda: cq.block_hadamard(out, 16, out=out),
        lambda: cq.fake_quantize(x, spec, out=out),
        lambda: cq.fake_quantize(out, spec, out=out),
        lambda: cq.rotate_fake_quantize(x, 16, spec, out=out),
        lambda: cq.rotate_quantize(x, 16, spec, out=codes),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_out_for_codes_may_be_strided_but_not_on_the_memory_of_x():
    x = sample()
    out = torch.zeros(6, 128, dtype=torch.int8)[:, ::2]
    wanted = cq.rotate_quantize(x, 16, "int4:token:symmetric").codes
    assert torch.equal(cq.rotate_quantize(x, 16, "int4:token:symmetric", out=out).codes, wanted)
    for shared in (
        x.view(torch.int8)[:, :64],
        x.view(torch.int8).as_strided((6, 64), (64, 1)),
    ):
        with pytest.raises(ValueError, match="share no memory"):
            cq.rotate_quantize(x, 16, "int4:token:symmetric", out=shared)


def test_tensors_of_two_devices_are_refused():
    x, elsewhere = sample(), torch.empty(6, 64, device="meta")
    with pytest.raises(cq.BackendError, match=r"x on cpu and out on meta"):
        cq.block_hadamard(x, 16, out=elsewhere)
    scales = torch.empty(6, 1, device="meta")
    with pytest.raises(cq.BackendError, match=r"x on cpu and scales on meta"):
        cq.quantize(x, "int4:channel", scales)
    with pytest.raises(cq.BackendError, match=r"x on cpu and global_scale on meta"):
        cq.fake_quantize(x, "nvfp4", global_scale=torch.empty(1, device="meta"))
    q = cq.quantize(x, "int4:channel")
    moved = cq.QuantizedTensor(q.codes, scales, None, q.spec)
    with pytest.raises(cq.BackendError, match="scales on meta"):
        cq.dequantize(moved)
    check_devices(x, "x", y=None)


def test_tensors_without_plain_memory_are_refused():
    with pytest.raises(cq.BackendError, match="must hold data"):
        cq.block_hadamard(torch.empty(6, 64, device="meta"), 16)
    with pytest.raises(cq.BackendError, match="must be dense"):
        cq.block_hadamard(sample().to_sparse(), 16)
    with pytest.raises(TypeError, match="real floating dtype"):
        cq.block_hadamard(torch.ones(4, dtype=torch.int32), 4)
    with pytest.raises(TypeError, match="real floating dtype"):
        cq.block_hadamard(torch.ones(4, dtype=torch.complex64), 4)


def test_bfloat16_array_and_tensor_are_rounded_alike():
    array = np.random.default_rng(0).normal(size=(4, 64)).astype(ml_dtypes.bfloat16)
    x = to_torch(array.copy())
    found = cq.rotate_quantize(x, 16, "int4:token:asymmetric")
    y = cq.block_hadamard(x, 16)
    separate = cq.quantize(y, "int4:token:asymmetric")
    assert torch.equal(found.codes, separate.codes)
    assert torch.equal(found.scales, separate.scales)
