"""Every backend against NumPy's on its own arrays, as closely as the contract says.

Codes are equal for equal parameters. Rotations and sums are equal where the kernels are NumPy's
own, on CPU tensors; elsewhere they may err twice as much as the naive method.
"""

from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from corequant.testing import check_error
from tests.conftest import heavy_tailed

OWN = ("numpy", "torch")
"""Backends whose kernels on the CPU are NumPy's."""

SPECS = [
    "int2:channel:symmetric",
    "int4:token:asymmetric",
    "int4:group16:symmetric",
    "int4:channel:symmetric:mse",
    "int8:tensor:asymmetric",
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backends").split(","))


@pytest.fixture
def convert(backend):
    """Make the backend's array of a NumPy array; a backend that is absent is an error."""
    if backend == "numpy":
        return np.asarray
    import torch

    if backend == "torch":
        return torch.from_numpy
    assert backend == "cuda", f"unknown backend {backend}"
    assert torch.cuda.is_available(), "cuda was asked for and there is none"
    return lambda x: torch.from_numpy(x).cuda()


def back(x):
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


@pytest.fixture(params=[np.float16, np.float32, np.float64])
def x(request, rng):
    return heavy_tailed(rng, 3, 20, 96).astype(request.param)


@pytest.mark.parametrize("block_size", [None, 16, 12])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation(x, convert, backend, block_size, inverse):
    signs = cq.random_signs(96, 0)
    expected = cq.block_hadamard(x, block_size, inverse=inverse, signs=signs)
    given = convert(x)
    found = cq.block_hadamard(given, block_size, inverse=inverse, signs=signs)
    assert type(found) is type(given)
    assert found.dtype == given.dtype
    exact = cq.block_hadamard(x.astype(np.float64), block_size, inverse=inverse, signs=signs)
    check_error("rotated", back(found), expected, exact)
    if backend in OWN:
        np.testing.assert_array_equal(back(found), expected)
    out = convert(np.zeros_like(x))
    assert cq.block_hadamard(given, block_size, inverse=inverse, signs=signs, out=out) is out
    np.testing.assert_array_equal(back(out), back(found))


@pytest.mark.parametrize("text", SPECS)
def test_codes(x, convert, text):
    expected, found = cq.quantize(x, text), cq.quantize(convert(x), text)
    np.testing.assert_array_equal(back(found.codes), expected.codes)
    np.testing.assert_array_equal(back(found.scales), expected.scales)
    if expected.zero_points is not None:
        np.testing.assert_array_equal(back(found.zero_points), expected.zero_points)
    np.testing.assert_array_equal(back(cq.dequantize(found)), cq.dequantize(expected))
    given = convert(x)
    fake = cq.fake_quantize(given, text)
    assert fake.dtype == given.dtype
    np.testing.assert_array_equal(back(fake), cq.fake_quantize(x, text))
    again = cq.quantize(given, text, found.scales, found.zero_points)
    np.testing.assert_array_equal(back(again.codes), expected.codes)


@pytest.mark.parametrize("token_normalize", [False, True])
def test_statistics(x, convert, backend, token_normalize):
    expected = cq.ActivationStats(96, gram=True, token_normalize=token_normalize).update(x)
    found = cq.ActivationStats(96, gram=True, token_normalize=token_normalize).update(convert(x))
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean_abs, expected.mean_abs, rtol=1e-6)
    np.testing.assert_allclose(found.mean_square, expected.mean_square, rtol=1e-6)
    np.testing.assert_allclose(found.absmax, expected.absmax, rtol=1e-6)
    size = np.abs(expected.gram).max()
    np.testing.assert_allclose(found.gram, expected.gram, rtol=1e-5, atol=1e-6 * size)
    if backend in OWN:
        # Not so the products: torch's library and NumPy's need not add in one order.
        np.testing.assert_array_equal(found.mean_abs, expected.mean_abs)
        np.testing.assert_array_equal(found.absmax, expected.absmax)


def test_non_finite_input_is_refused_alike(x, convert):
    x[1, 2, 3] = np.nan
    for call in (cq.quantize, cq.fake_quantize, cq.choose_qparams):
        with pytest.raises(cq.NonFiniteError, match=r"\(1, 2, 3\)"):
            call(convert(x), "int4:token:symmetric")
    with pytest.raises(cq.NonFiniteError, match=r"\(1, 2, 3\)"):
        cq.ActivationStats(96).update(convert(x))


@pytest.mark.torch
def test_bfloat16_tensors():
    import torch

    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = cq.block_hadamard(x, 16)
    assert y.dtype == torch.bfloat16
    exact = cq.block_hadamard(x.float(), 16)
    assert torch.equal(y, exact.bfloat16())
    assert cq.fake_quantize(x, "int4:token:asymmetric").dtype == torch.bfloat16


@pytest.mark.torch
def test_parameters_give_tensors_with_gradients():
    import torch

    x = torch.nn.Parameter(torch.ones(2, 16))
    y = cq.block_hadamard(x, 16)
    assert type(y) is torch.Tensor
    assert float(y.detach()[0, 0]) == 4.0
    assert y.requires_grad
    with torch.no_grad():
        assert not cq.block_hadamard(x, 16).requires_grad
