"""The device kernels in plain torch operations, run on CPU tensors: NumPy's codes bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import corequant as cq
from corequant._dispatch import get_backend
from corequant.formats import FormatKind, formats
from corequant.specs import QuantSpec, presets
from corequant_torch.kernels.cpu import to_numpy, to_torch
from corequant_torch.kernels.device import DeviceKernels
from tests.conftest import heavy_tailed

NUMBERS = [n for n, f in formats.items() if f.kind is not FormatKind.POWER]
SCHEMES = [
    *(f"{name}:group16" for name in NUMBERS),
    *(f"{name}:channel:asymmetric" for name in NUMBERS if name.lstrip("u").startswith("int")),
    *(f"{name}:token" for name in NUMBERS),
    *presets,
    *(f"{name}:{how}" for name in presets if name != "nvfp4" for how in ("ceil", "even", "mse")),
    "nvfp4:mse",
    "nvfp4:four_over_six",
    "int4:tensor:asymmetric",
    "int4:tensor:mse",
    "e2m1b5:tensor",
    "int4:group32:mse",
    "int4:channel:asymmetric:mse",
    "nf4:group16:mse",
    "e3m2:channel:mse",
    "int4:channel:percentile99.0",
    "int4:channel:asymmetric:percentile97.5",
    "int4:group32:float16",
    "int4:group32:asymmetric:bfloat16",
    "int4:group32:pow2",
    "int4:group32:pow2:ceil",
]
SCHEMES = [s.replace("int8f6:channel:asymmetric", "int8f6:channel") for s in SCHEMES]


@pytest.fixture(scope="module")
def kernels():
    return DeviceKernels()


def arrays():
    rng = np.random.default_rng(1)
    usual = heavy_tailed(rng, 6, 96)
    usual[1] = 0
    usual[2, :32] = 0
    usual[3] *= 1e-30
    usual[4] *= 1e30
    yield usual.astype(np.float32)
    yield usual.astype(np.float64) * 1e-200
    import ml_dtypes

    yield heavy_tailed(rng, 3, 96).astype(ml_dtypes.bfloat16)
    # Ties, their neighbours, and what a scale of one leaves as it is.
    ties = np.arange(-24, 24, 0.25, dtype=np.float32).reshape(2, 96)
    yield np.concatenate([ties, np.nextafter(ties, np.float32(np.inf))])
    yield np.array([[1e-45, -1e-45, 3e-40, 3.4e38] * 24], np.float32)


def same(ours, theirs):
    if theirs is None:
        assert ours is None
        return
    found = to_numpy(ours)
    assert found.dtype == theirs.dtype
    np.testing.assert_array_equal(found, theirs)
    if theirs.dtype.kind == "f":
        np.testing.assert_array_equal(np.signbit(found), np.signbit(theirs))


@pytest.mark.parametrize("text", SCHEMES)
def test_codes_and_scales(kernels, text):
    spec, numpy = QuantSpec.parse(text), get_backend("numpy")
    for x in arrays():
        given = to_torch(x)
        divisor = numpy.choose_global_scale(x, spec) if spec.scale_format.value == "e4m3" else None
        factor = None if divisor is None else torch.from_numpy(divisor)
        if divisor is not None:
            same(kernels.choose_global_scale(given, spec), divisor)
        expected = numpy.quantize(x, spec, global_scale=divisor)
        found = kernels.quantize(given, spec, global_scale=factor)
        for ours, theirs in zip(found, expected, strict=True):
            same(ours, theirs)
        for ours, theirs in zip(
            kernels.choose_qparams(given, spec, factor), expected[1:], strict=True
        ):
            same(ours, theirs)
        again = kernels.quantize(given, spec, found[1], found[2], factor)
        same(again[0], expected[0])
        same(
            kernels.dequantize(*found[:1], spec, *found[1:], factor),
            numpy.dequantize(expected[0], spec, *expected[1:], divisor),
        )
        same(kernels.fake_quantize(given, spec, factor), numpy.fake_quantize(x, spec, divisor))


@pytest.mark.parametrize("name", sorted(formats))
def test_casts_of_all_halves(kernels, name):
    form, numpy = formats[name], get_backend("numpy")
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    x = halves[np.isfinite(halves)]
    same(kernels.encode(torch.from_numpy(x), form), numpy.encode(x, form))
    codes = np.arange(form.least_code, form.most_code + 1).astype(form.code_dtype)
    same(kernels.decode(torch.from_numpy(codes), form), numpy.decode(codes, form))


@pytest.mark.parametrize("block_size", [1, 2, 16, 64, 12, 192, 28])
@pytest.mark.parametrize("dtype", [np.float16, "bfloat16", np.float32, np.float64])
def test_rotations(kernels, block_size, dtype):
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    d = 2 * block_size
    x = np.random.default_rng(0).normal(size=(3, d, 8)).astype(kind)
    x = np.moveaxis(x, 2, 1)
    signs = cq.random_signs(d, 0)
    for inverse, sign in ((False, None), (True, signs), (False, signs)):
        how = {"axis": 2, "inverse": inverse, "signs": sign, "out": None, "threads": None}
        expected = get_backend("numpy").block_hadamard(x, block_size, **how)
        same(kernels.block_hadamard(to_torch(x), block_size, **how), expected)
    out = torch.empty_like(to_torch(x.copy()))
    found = kernels.block_hadamard(to_torch(x), block_size, **{**how, "out": out})
    assert found is out
    same(out, expected)


def test_rotations_of_the_first_axis(kernels):
    x = np.random.default_rng(0).normal(size=(24, 5))
    how = {"axis": 0, "inverse": False, "signs": None, "out": None, "threads": None}
    same(
        kernels.block_hadamard(torch.from_numpy(x), 12, **how),
        get_backend("numpy").block_hadamard(x, 12, **how),
    )


def test_statistics(kernels):
    x = heavy_tailed(np.random.default_rng(2), 40, 32).astype(np.float32)
    x[3] = 0
    given, numpy = torch.from_numpy(x), get_backend("numpy")
    for ours, theirs in zip(kernels.moments(given), numpy.moments(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    np.testing.assert_allclose(
        kernels.token_normalize(given).numpy(), numpy.token_normalize(x), rtol=1e-6
    )
    empty = torch.empty(0, 32)
    assert all((m == 0).all() and m.shape == (32,) for m in kernels.moments(empty))


@pytest.mark.parametrize("text", ["int4:token:asymmetric", "nvfp4", "mxfp4", "nf4:group16"])
def test_what_is_not_finite(kernels, text):
    spec = QuantSpec.parse(text)
    x = torch.from_numpy(heavy_tailed(np.random.default_rng(3), 4, 32).astype(np.float32))
    x[2, 5], x[3, 1] = float("nan"), float("inf")
    for call in (kernels.quantize, kernels.fake_quantize, kernels.choose_qparams):
        with pytest.raises(cq.NonFiniteError, match=r"2 non-finite values.*index \(2, 5\)"):
            call(x, spec)
    same(
        kernels.fake_quantize(x, spec, propagate=True),
        get_backend("numpy").fake_quantize(x.numpy(), spec, propagate=True),
    )


@pytest.mark.parametrize("text", ["int4:group16:exact", "int4:group16:hqo"])
def test_searches_that_only_the_cpu_has_say_so(kernels, text):
    with pytest.raises(cq.BackendError, match="must run on the CPU"):
        kernels.quantize(torch.ones(2, 32), QuantSpec.parse(text))


def test_empty_tensors(kernels):
    for text in ("int4:token:asymmetric", "nvfp4", "int8:tensor"):
        spec = QuantSpec.parse(text)
        x = torch.empty(0, 32)
        expected = get_backend("numpy").quantize(x.numpy(), spec)
        for ours, theirs in zip(kernels.quantize(x, spec), expected, strict=True):
            same(ours, theirs)
        assert kernels.fake_quantize(x, spec).shape == x.shape
