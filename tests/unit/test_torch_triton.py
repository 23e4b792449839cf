"""Triton's kernels in its interpreter, which tests/conftest.py chooses."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from triton.runtime import autotuner

import corequant as cq
from corequant.specs import QuantSpec
from corequant_torch import rotate_quantize_packed
from corequant_torch.gpu import columns, fusion, rotation, runtime, statistics
from corequant_torch.kernels.device import DeviceKernels
from tests.conftest import heavy_tailed

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:.*:RuntimeWarning:triton"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FUSED = [
    "int4:token:asymmetric",
    "int8:group32:asymmetric",
    "int4:group32",
    "int4:token",
    "int4:group32:pow2",
    "mxfp4",
    "mxfp4:ceil",
    "mxfp4:even",
    "nvfp4",
]


@pytest.fixture(scope="module")
def kernels():
    assert runtime.interpreted()
    return DeviceKernels(triton=True)


def astuple(q):
    return q.codes, q.scales, q.zero_points


def sample(dtype, rows=3, d=96):
    x = heavy_tailed(np.random.default_rng(5), rows, d)
    x[1, :32] = 0
    return torch.from_numpy(x).to(dtype)


def same_bits(ours, theirs):
    """Equal to the bit, zeros of either sign told apart."""
    return torch.equal(ours, theirs) and torch.equal(ours.signbit(), theirs.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 2, 16, 128, 4096, 12, 20 * 2, 28 * 16, 60 * 4, 172 * 2])
def test_rotations_are_numpys_to_the_bit(kernels, dtype, block_size):
    d = block_size * (2 if block_size < 512 else 1)
    x = torch.randn(3, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1], x[2, :block_size] = 0, -0.0
    signs = cq.random_signs(d, 0)
    for inverse, sign in ((False, signs), (True, signs), (False, None), (True, None)):
        how = {"axis": 1, "inverse": inverse, "signs": sign, "threads": None}
        table = None if sign is None else torch.from_numpy(sign)
        found = rotation.rotate(x, block_size, inverse, table, None)
        assert found is not None
        expected = cq.block_hadamard(x, block_size, inverse=inverse, signs=sign)
        assert same_bits(found, expected)
        # Without Triton it is the same.
        plain = DeviceKernels(triton=False).block_hadamard(x, block_size, out=None, **how)
        assert same_bits(plain, expected)
        out = torch.empty(d, 3, dtype=dtype).T
        assert kernels.block_hadamard(x, block_size, out=out, **how) is out
        assert same_bits(out, expected)
        own = x.clone()
        assert kernels.block_hadamard(own, block_size, out=own, **how) is own
        assert same_bits(own, expected)


@pytest.mark.parametrize("block_size", [8192, 32768, 28 * 512, 2 * 32768])
def test_large_rotations_are_numpys_to_the_bit(kernels, block_size):
    x = torch.randn(1, block_size, generator=torch.Generator().manual_seed(0))
    kernel = rotation.rotate(x, block_size, False, None, None)
    assert (kernel is None) == (block_size > 32768)
    how = {"axis": 1, "inverse": False, "signs": None, "out": None, "threads": None}
    expected = cq.block_hadamard(x, block_size)
    assert same_bits(kernels.block_hadamard(x, block_size, **how), expected)


def test_rotations_up_to_the_largest_number(kernels):
    """Parts of bfloat16 would overflow from 3.39e38 on, where only a sum may."""
    largest = torch.finfo(torch.float32).max
    x = torch.zeros(4, 64)
    x[0, 5], x[1, 0], x[1, 1], x[2, 3], x[3, :8] = largest, 3.2e38, 1e37, -3.395e38, largest / 8
    how = {"axis": 1, "inverse": False, "signs": None, "out": None, "threads": None}
    expected = cq.block_hadamard(x, 64)
    assert bool(expected.isfinite().all())
    assert same_bits(kernels.block_hadamard(x, 64, **how), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_call_of_a_kind_may_write_to_its_input(kernels, monkeypatch, dtype):
    """As compiled kernels are launched: nothing runs on the caller's memory to be measured."""
    monkeypatch.setattr(autotuner.Autotuner, "do_bench", measured_twice, raising=False)
    for module in (fusion, rotation):
        monkeypatch.setattr(module, "interpreted", lambda: dtype is not torch.float32)
    signs = cq.random_signs(96, 0)
    for block_size in (32, 12):
        for inverse in (False, True):
            x = sample(dtype)
            expected = cq.block_hadamard(x, block_size, inverse=inverse, signs=signs)
            how = {"axis": 1, "inverse": inverse, "signs": signs, "threads": None}
            assert kernels.block_hadamard(x, block_size, out=x, **how) is x
            assert same_bits(x, expected)


def measured_twice(self, call, quantiles):
    call(), call()
    return [1.0, 1.0, 1.0]


def test_no_kernel_is_tuned_by_running_it():
    for module in (columns, fusion, rotation, statistics):
        kinds = {type(value) for value in vars(module).values()}
        assert autotuner.Autotuner not in kinds


@pytest.mark.parametrize("text", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_codes_do_not_differ(kernels, dtype, text):
    spec, x = QuantSpec.parse(text), sample(dtype)
    p, signs = cq.random_permutation(96, 0), cq.random_signs(96, 1)
    how = {"permutation": p, "signs": signs}
    expected = cq.rotate_quantize(x, 16, spec, **how)
    tables = torch.from_numpy(p), torch.from_numpy(signs)
    codes = fusion.fused(x, 16, spec, *tables, fusion.CODES)
    assert codes is not None
    assert int((codes.out != expected.codes).sum()) == 0
    assert torch.equal(codes.scales.reshape(expected.scales.shape), expected.scales)
    if expected.zero_points is not None:
        assert torch.equal(codes.zeros.flatten(), expected.zero_points.flatten().float())
    if expected.global_scale is not None:
        assert torch.equal(codes.global_scale, expected.global_scale)
    values = kernels.rotate_fake_quantize(x, 16, spec, out=None, threads=None, **how)
    assert torch.equal(values, cq.rotate_fake_quantize(x, 16, spec, **how))
    if spec.format.bits == 4:
        packed = fusion.fused(x, 16, spec, *tables, fusion.PACKED)
        assert torch.equal(packed.out, rotate_quantize_packed(x, 16, spec, **how).packed)


@pytest.mark.parametrize("text", [*FUSED, "e3m2:group32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 12])
def test_one_rotation_for_all_functions(kernels, dtype, text, block_size):
    spec, x = QuantSpec.parse(text), sample(dtype)
    p, signs = cq.random_permutation(96, 0), cq.random_signs(96, 1)
    how = {"signs": signs, "out": None, "threads": None}
    y = kernels.block_hadamard(x[:, p], block_size, axis=1, inverse=False, **how)
    codes, scales, zeros = kernels.quantize(y, spec)
    fused = kernels.rotate_quantize(x, block_size, spec, permutation=p, **how)
    assert (fused is None) == (block_size == 12 or text.startswith("e3m2"))
    expected = cq.rotate_quantize(x, block_size, spec, permutation=p, signs=signs)
    for ours in ((codes, scales, zeros), fused[:3] if fused else ()):
        for found, wanted in zip(ours, astuple(expected), strict=False):
            assert found is wanted is None or torch.equal(found, wanted)
    if fused and expected.global_scale is not None:
        assert torch.equal(fused[3], expected.global_scale)


@pytest.mark.parametrize("text", ["int4:group32", "mxfp4", "nvfp4", "int8:token:asymmetric"])
def test_fake_quantize(kernels, text):
    x = sample(torch.bfloat16, rows=2)
    found = kernels.fake_quantize(x, QuantSpec.parse(text))
    assert torch.equal(found, cq.fake_quantize(x, text))


@pytest.mark.parametrize("block_size", [16, 32])
def test_packed_bytes_are_those_of_the_core(block_size):
    x = sample(torch.float32, d=64)
    for text in ("mxfp4", "nvfp4", "int4:group32:asymmetric", "int4:group32:float16"):
        found = rotate_quantize_packed(x, block_size, text)
        y = cq.block_hadamard(x.numpy(), block_size)
        expected = cq.quantize_packed(y, text)
        np.testing.assert_array_equal(found.packed.numpy(), expected.packed)
        np.testing.assert_array_equal(found.scales.numpy(), expected.scales)
        assert found.scales.numpy().dtype == expected.scales.dtype
    with pytest.raises(cq.SpecError, match="4-bit format"):
        rotate_quantize_packed(x, 16, "int8:token")
    with pytest.raises(cq.ShapeError, match="divisible by 8"):
        rotate_quantize_packed(x[:, :4], 4, "int4:token")


def test_what_is_not_finite_takes_the_steps_that_name_it(kernels):
    x = sample(torch.float32)
    x[2, 7] = float("nan")
    spec = QuantSpec.parse("int4:group32")
    assert fusion.fused(x, 16, spec, None, None, fusion.CODES) is None
    with pytest.raises(cq.NonFiniteError, match=r"index \(2, 7\)"):
        kernels.fake_quantize(x, spec)
    y = rotation.rotate(x, 16, False, None, None)
    assert int(torch.isnan(y).sum()) == 16
    assert bool(torch.isnan(y[2, :16]).all())


@pytest.mark.parametrize(
    ("text", "block_size"),
    [("int4:tensor", 16), ("e3m2:group32", 16), ("int4:group24", 16), ("int4:token", 12)],
)
def test_cases_without_a_fused_kernel_say_none(text, block_size):
    x = sample(torch.float32)
    assert fusion.fused(x, block_size, QuantSpec.parse(text), None, None, fusion.CODES) is None


def test_results_may_go_into_the_input(kernels):
    x = sample(torch.float32)
    spec, p = QuantSpec.parse("int4:group32"), cq.random_permutation(96, 0)
    expected = cq.rotate_fake_quantize(x, 16, spec, permutation=p)
    how = {"permutation": p, "signs": None, "threads": None}
    assert kernels.rotate_fake_quantize(x, 16, spec, out=x, **how) is x
    assert torch.equal(x, expected)


def test_the_input_is_named_where_results_should_replace_it(kernels):
    x = sample(torch.float32)
    x[2, 7] = float("nan")
    before = x.clone()
    spec = QuantSpec.parse("int4:group32")
    how = {"permutation": None, "signs": None, "threads": None}
    assert kernels.rotate_fake_quantize(x, 16, spec, out=x, **how) is None
    assert torch.equal(x.nan_to_num(1e9), before.nan_to_num(1e9))
    with pytest.raises(cq.NonFiniteError, match=r"index \(2, 7\)"):
        kernels.fake_quantize(x, spec, out=x)


class Gpu(torch.Tensor):
    is_cuda = True


def test_without_triton_torch_operations_do_it(monkeypatch):
    monkeypatch.setattr("corequant_torch.kernels.device.has_triton", lambda: False)
    assert not DeviceKernels()._triton(torch.ones(1).as_subclass(Gpu))
    monkeypatch.setattr("corequant_torch.kernels.device.has_triton", lambda: True)
    assert DeviceKernels()._triton(torch.ones(1).as_subclass(Gpu))
    assert not DeviceKernels()._triton(torch.ones(1))


ABSENT = """
import sys
sys.modules["triton"] = None
import torch, corequant as cq
from corequant_torch.gpu.runtime import has_triton
from corequant_torch.kernels.device import DeviceKernels
x, spec = torch.arange(16.0).reshape(2, 8), cq.QuantSpec.parse("int4:token")
print(has_triton(), torch.equal(DeviceKernels().fake_quantize(x, spec), cq.fake_quantize(x, spec)))
"""


def test_triton_may_be_absent():
    done = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: torch.cat([x, x], 1)[:, :96],
        lambda x: x[None].expand(2, 3, 96),
    ],
)
def test_strided_tensors(kernels, strided):
    plain = sample(torch.float32)
    x, spec = strided(plain), QuantSpec.parse("int4:group32:asymmetric")
    wide = x.contiguous()
    assert torch.equal(kernels.fake_quantize(x, spec), kernels.fake_quantize(wide, spec))
    how = {"axis": x.ndim - 1, "inverse": False, "signs": None, "out": None, "threads": None}
    found = kernels.block_hadamard(x, 16, **how)
    assert torch.equal(found, kernels.block_hadamard(wide, 16, **how))
    codes, scales, zeros = kernels.quantize(x, spec)
    back = kernels.dequantize(strided(codes[..., :96].reshape(-1, 96)[:3]), spec, scales, zeros)
    assert back.shape == x.shape
    for ours, theirs in zip(kernels.moments(x), kernels.moments(wide), strict=True):
        np.testing.assert_array_equal(ours, theirs)
