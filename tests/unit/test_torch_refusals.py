"""Tensors that are awkward: where there is no GPU, on two devices, with gradients, without data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import corequant as cq
from corequant import testing
from corequant._dispatch import get_backend
from corequant.rounding import InputMoments
from corequant_torch import rotate_quantize_packed
from corequant_torch.kernels.device import DeviceKernels
from corequant_torch.kernels.engines import engine_for

CALLS = {
    "block_hadamard": lambda x: cq.block_hadamard(x, 16),
    "fake_quantize": lambda x: cq.fake_quantize(x, "int4:token"),
    "quantize": lambda x: cq.quantize(x, "mxfp4").codes,
    "choose_qparams": lambda x: cq.choose_qparams(x, "int4:token:asymmetric")[0],
    "choose_global_scale": lambda x: cq.choose_global_scale(x, "nvfp4"),
    "rotate_quantize": lambda x: cq.rotate_quantize(x, 16, "int4:token").codes,
    "rotate_fake_quantize": lambda x: cq.rotate_fake_quantize(x, 16, "int4:token"),
    "rotate_quantize_packed": lambda x: rotate_quantize_packed(x, 16, "mxfp4").packed,
    "encode": lambda x: cq.encode(x, "e3m2"),
    "ActivationStats": lambda x: cq.ActivationStats(32, gram=True).update(x).gram,
    "InputMoments": lambda x: InputMoments(32, cross=False).update(x).H,
    "round_to_nearest": lambda x: cq.round_to_nearest(x, "int4:channel").codes,
    "gptq": lambda x: cq.gptq(x, torch.eye(32), "int4:channel").codes,
    "gpfq": lambda x: cq.gpfq(x, torch.eye(32), torch.eye(32), "int4:channel").codes,
    "qronos": lambda x: cq.qronos(x, torch.eye(32), torch.eye(32), "int4:channel").codes,
    "reconstruction_loss": lambda x: cq.reconstruction_loss(x, x.clone(), torch.eye(32)),
}


def sample(rows=4):
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))


def same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours.detach(), theirs)
    return np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_that_record_gradients(name):
    call, x = CALLS[name], sample()
    expected = call(x)
    recording = x.clone().requires_grad_()
    found = call(recording)
    assert same(found, expected)
    differentiable = ("block_hadamard", "fake_quantize", "rotate_fake_quantize")
    assert getattr(found, "requires_grad", False) == (name in differentiable)
    assert same(call(torch.nn.Parameter(x.clone())), expected)
    with torch.no_grad():
        assert not getattr(call(recording), "requires_grad", False)
    with torch.inference_mode():
        assert same(call(x.clone()), expected)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_data(name):
    with pytest.raises((cq.BackendError, TypeError), match="must hold data|on one device"):
        CALLS[name](torch.empty(4, 32, device="meta"))


@pytest.mark.parametrize("name", CALLS)
def test_sparse_tensors(name):
    with pytest.raises((cq.BackendError, TypeError), match="dense"):
        CALLS[name](sample().to_sparse())


@pytest.mark.parametrize("name", [n for n in CALLS if n != "encode"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool, torch.float8_e4m3fn])
def test_dtypes_that_are_no_floats(name, dtype):
    with pytest.raises(TypeError, match="must have a real floating dtype, got"):
        CALLS[name](sample().to(dtype))


@pytest.mark.parametrize("name", [n for n in CALLS if n != "block_hadamard"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite(name, bad):
    x = sample()
    x[1, 7] = bad
    with pytest.raises(cq.NonFiniteError) as caught:
        CALLS[name](x)
    # A rotation spreads it over its block.
    assert caught.value.index in ((1, 7), (1, 0))


def test_a_gpu_that_is_absent_or_has_the_wrong_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = get_backend("torch")
    with pytest.raises(cq.BackendError, match="must be available, got no usable GPU or driver"):
        backend.from_numpy(np.ones(2), "cuda")
    with pytest.raises(cq.BackendError, match="no usable GPU"):
        testing.find_target("cuda")
    with pytest.raises(cq.BackendError, match="no usable GPU"):
        testing.main(["--backend", "cuda"])


def test_mixed_devices_name_both():
    x, meta = sample(), torch.empty(4, 32, device="meta")
    for call in (
        lambda: cq.block_hadamard(x, 16, out=meta),
        lambda: cq.fake_quantize(x, "int4:token", out=meta),
        lambda: cq.gptq(x, torch.empty(32, 32, device="meta"), "int4:channel"),
        lambda: cq.gptq(x, torch.eye(32), "int4:channel", scales=meta[:, :1]),
        lambda: InputMoments(32).update(x, meta),
    ):
        with pytest.raises(cq.BackendError, match=r"all tensors must be on one device.*cpu.*meta"):
            call()


def test_mixed_frameworks_name_both():
    x = sample()
    with pytest.raises(TypeError, match="x belongs to torch, out belongs to numpy"):
        cq.block_hadamard(x, 16, out=x.numpy())
    with pytest.raises(TypeError, match="to torch, float_inputs belongs to numpy"):
        InputMoments(32).update(x, x.numpy())


def test_memory_that_runs_out_passes_through(monkeypatch):
    def full(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    kernels = DeviceKernels()
    monkeypatch.setattr(DeviceKernels, "first_nonfinite", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"20\.00 GiB"):
        kernels.quantize(sample(), cq.QuantSpec.parse("int4:token"))


def test_engines_know_where_they_work():
    assert engine_for(sample()) is engine_for(sample())
    with pytest.raises(cq.BackendError, match="got one on device meta"):
        engine_for(torch.empty(1, device="meta"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("name", ["block_hadamard", "fake_quantize", "rotate_quantize", "encode"])
def test_nested_tensors_are_refused(name, layout):
    nested = torch.nested.nested_tensor([sample(2), sample(3)], layout=layout)
    with pytest.raises(cq.BackendError, match="x must be one dense tensor, got a nested one"):
        CALLS[name](nested)
