"""Triton's kernels in its interpreter, which tests/conftest.py chooses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import corequant as cq
from corequant.specs import QuantSpec
from corequant_torch import launch, rotate_quantize_packed, runtime
from corequant_torch.device import DeviceKernels
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


def sample(dtype, rows=3, d=96):
    x = heavy_tailed(np.random.default_rng(5), rows, d)
    x[1, :32] = 0
    return torch.from_numpy(x).to(dtype)


def relative(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 128, 512, 28 * 16, 20 * 256])
def test_rotations_are_within_twice_the_naive_error(kernels, dtype, block_size):
    d = block_size * (2 if block_size < 512 else 1)
    x = torch.randn(2, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    signs = cq.random_signs(d, 0)
    for inverse, sign in ((False, signs), (True, signs), (False, None)):
        how = {"axis": 1, "inverse": inverse, "signs": sign, "threads": None}
        found = launch.rotate(
            x, block_size, inverse, None if sign is None else torch.from_numpy(sign), None
        )
        assert found is not None
        exact = cq.block_hadamard(x.double(), block_size, inverse=inverse, signs=sign)
        naive = cq.block_hadamard(x, block_size, inverse=inverse, signs=sign)
        assert relative(found, exact) <= 2 * relative(naive, exact)
        out = torch.empty(d, 2, dtype=dtype).T
        assert kernels.block_hadamard(x, block_size, out=out, **how) is out
        assert torch.equal(out, found)


@pytest.mark.parametrize("block_size", [2, 8, 172 * 16])
def test_rotations_without_a_kernel_take_torch_operations(kernels, block_size):
    x = torch.randn(1, block_size)
    assert launch.rotate(x, block_size, False, None, None) is None
    how = {"axis": 1, "inverse": False, "signs": None, "out": None, "threads": None}
    found = kernels.block_hadamard(x, block_size, **how)
    assert torch.equal(found, cq.block_hadamard(x, block_size))


@pytest.mark.parametrize("text", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_codes_do_not_differ(kernels, dtype, text):
    spec, x = QuantSpec.parse(text), sample(dtype)
    p, signs = cq.random_permutation(96, 0), cq.random_signs(96, 1)
    how = {"permutation": p, "signs": signs}
    expected = cq.rotate_quantize(x, 16, spec, **how)
    tables = torch.from_numpy(p), torch.from_numpy(signs)
    codes = launch.fused(x, 16, spec, *tables, launch.CODES)
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
        packed = launch.fused(x, 16, spec, *tables, launch.PACKED)
        assert torch.equal(packed.out, rotate_quantize_packed(x, 16, spec, **how).packed)


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
    with pytest.raises(cq.SpecError, match="format of 4 bits"):
        rotate_quantize_packed(x, 16, "int8:token")
    with pytest.raises(cq.ShapeError, match="whole 32-bit words"):
        rotate_quantize_packed(x[:, :4], 4, "int4:token")


def test_what_is_not_finite_takes_the_steps_that_name_it(kernels):
    x = sample(torch.float32)
    x[2, 7] = float("nan")
    spec = QuantSpec.parse("int4:group32")
    assert launch.fused(x, 16, spec, None, None, launch.CODES) is None
    with pytest.raises(cq.NonFiniteError, match=r"index \(2, 7\)"):
        kernels.fake_quantize(x, spec)
    y = launch.rotate(x, 16, False, None, None)
    assert int(torch.isnan(y).sum()) == 16
    assert bool(torch.isnan(y[2, :16]).all())


@pytest.mark.parametrize(
    ("text", "block_size"),
    [("int4:tensor", 16), ("e3m2:group32", 16), ("int4:group24", 16), ("int4:token", 12)],
)
def test_cases_without_a_fused_kernel_say_none(text, block_size):
    x = sample(torch.float32)
    assert launch.fused(x, block_size, QuantSpec.parse(text), None, None, launch.CODES) is None


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


def test_captured_launches_assert_instead_of_asking(kernels, monkeypatch):
    """No CUDA graph without a GPU: here the assertion is what tells."""
    x = sample(torch.float32)
    expected = {text: cq.fake_quantize(x, text) for text in ("int4:group32", "nvfp4", "e3m2:token")}
    asked = []
    real = torch._assert_async
    monkeypatch.setattr(torch, "_assert_async", lambda good, why: asked.append(real(good, why)))
    monkeypatch.setattr(runtime, "capturing", lambda x: True)
    for text, values in expected.items():
        asked.clear()
        assert torch.equal(kernels.fake_quantize(x, QuantSpec.parse(text)), values)
        assert len(asked) >= 1
    x[2, 7] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinity in a captured call"):
        kernels.fake_quantize(x, QuantSpec.parse("int4:group32"))


def test_tables_are_kept_on_a_device():
    signs = cq.random_signs(96, 0)
    there = torch.empty(1, device="meta")
    found = runtime.device_table(signs, there)
    assert found.device.type == "meta"
    assert runtime.device_table(signs.copy(), there) is found
    assert runtime.device_table(-signs, there) is not found
    assert runtime.device_table(None, there) is None
    assert runtime.device_table(signs, torch.ones(1)).data_ptr() == signs.ctypes.data


def test_triton_that_cant_run_says_what_to_do(kernels, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("Failed to find C compiler")

    class Kernel:
        def __getitem__(self, grid):
            return broken

    monkeypatch.setattr(launch, "_rotation_kernel", Kernel)
    with pytest.raises(cq.BackendError, match=r"Failed to find C compiler.*uninstall triton"):
        launch.rotate(sample(torch.float32), 16, False, None, None)


def test_memory_that_runs_out_stays_torchs_error():
    with pytest.raises(torch.OutOfMemoryError), runtime.on_device(torch.ones(1)):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_without_triton_torch_operations_do_it(monkeypatch):
    class Gpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr("corequant_torch.device.has_triton", lambda: False)
    assert not DeviceKernels()._triton(torch.ones(1).as_subclass(Gpu))
    monkeypatch.setattr("corequant_torch.device.has_triton", lambda: True)
    assert DeviceKernels()._triton(torch.ones(1).as_subclass(Gpu))
    assert not DeviceKernels()._triton(torch.ones(1))


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
