"""Statistics of tensors: sums stay on the device until they are read; decoding in Triton."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import corequant as cq
from corequant._dispatch import get_backend
from corequant.rounding import InputMoments
from corequant.specs import QuantSpec
from corequant_torch.gpu import statistics
from corequant_torch.kernels import engines
from corequant_torch.kernels.cpu import to_torch
from corequant_torch.kernels.device import DeviceKernels
from tests.conftest import heavy_tailed

pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning:triton")

SPECS = [
    "int4:group16",
    "int8f6:group16",
    "e3m2:channel",
    "nf4:group16",
    "float8_e4m3fn:token",
    "int4:channel:asymmetric",
    "int8:tensor:asymmetric",
    "uint4:token:asymmetric",
    "mxfp4",
    "nvfp4",
]


@pytest.fixture
def elsewhere(monkeypatch):
    """Treat CPU tensors as those of a device, so that the public functions take its kernels."""
    kernels = DeviceKernels()
    monkeypatch.setattr(engines, "engine_for", lambda x: kernels)
    monkeypatch.setattr("corequant_torch.backend.engine_for", lambda x: kernels)
    return kernels


def tokens(dtype=np.float32):
    x = heavy_tailed(np.random.default_rng(2), 3, 20, 48)
    x[1, 4] = 0
    return x.astype(dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 5), (37, 130), (3, 20, 48)])
def test_tritons_moments(kind, shape):
    x = torch.from_numpy(heavy_tailed(np.random.default_rng(1), *shape)).to(kind)
    found = statistics.moments(x.transpose(0, -1).contiguous().transpose(0, -1))
    for ours, theirs in zip(found, cq_moments(x), strict=True):
        assert ours.dtype == torch.float64
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-13)


def cq_moments(x):
    return get_backend("torch").moments(x)


@pytest.mark.interpreter
def test_tritons_moments_show_what_is_not_finite():
    x = torch.ones(40, 3)
    x[35, 1], x[0, 2] = float("nan"), float("inf")
    sums, squares, _ = statistics.moments(x)
    assert torch.equal(sums.isfinite(), torch.tensor([True, False, False]))
    assert torch.equal(squares.isfinite(), torch.tensor([True, False, False]))
    assert statistics.moments(torch.empty(0, 3)) is None


@pytest.mark.interpreter
@pytest.mark.parametrize("text", SPECS)
def test_tritons_decoding_does_not_differ(text):
    spec = QuantSpec.parse(text)
    for dtype in (np.float32, np.float64):
        q = cq.quantize(heavy_tailed(np.random.default_rng(2), 5, 96).astype(dtype), spec)
        given = [
            None if a is None else to_torch(a) for a in (q.scales, q.zero_points, q.global_scale)
        ]
        found = statistics.dequantize(to_torch(q.codes), spec, *given)
        expected = cq.dequantize(q)
        assert found.numpy().dtype == expected.dtype
        np.testing.assert_array_equal(found.numpy(), expected)
        np.testing.assert_array_equal(np.signbit(found.numpy()), np.signbit(expected))
        through = DeviceKernels(triton=True).dequantize(to_torch(q.codes), spec, *given)
        assert torch.equal(through, found)


def test_sums_stay_where_the_tokens_are(elsewhere):
    x = tokens()
    options = {"gram": True, "energy_gram": True, "reservoir": 4}
    expected = cq.ActivationStats(48, **options).update(x[:1]).update(x[1:])
    found = cq.ActivationStats(48, **options).update(torch.from_numpy(x[:1]))
    assert isinstance(found._gram, torch.Tensor)
    kept = found._gram
    found.update(torch.from_numpy(x[1:]))
    assert found._gram is kept
    for name in ("mean_abs", "mean_square", "absmax", "gram", "energy_gram", "tokens"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert type(ours) is np.ndarray
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    assert isinstance(found._gram, torch.Tensor)


def test_sums_are_stored_and_go_on(elsewhere):
    x = torch.from_numpy(tokens())
    whole = cq.ActivationStats(48, gram=True).update(x[0]).update(x[1]).update(x[2])
    half = cq.ActivationStats(48, gram=True).update(x[0]).update(x[1])
    again = cq.ActivationStats(48, gram=True).restore(half.to_arrays()).update(x[2])
    np.testing.assert_array_equal(again.gram, whole.gram)
    other = cq.ActivationStats(48, gram=True).update(x[2])
    np.testing.assert_allclose(half.merge(other).gram, whole.gram, rtol=1e-5, atol=1e-5)
    # NumPy's arrays go on with what a device has summed.
    mixed = half.update(x[2].numpy())
    assert isinstance(mixed._gram, np.ndarray)
    np.testing.assert_allclose(mixed.gram, whole.gram, rtol=1e-5, atol=1e-5)


def test_moments_for_solvers_stay_too(elsewhere):
    x = tokens(np.float64)
    q = np.round(x * 2) / 2
    given = torch.from_numpy(x), torch.from_numpy(q)
    for dtype in (np.float32, np.float64):
        expected = InputMoments(48, dtype=dtype).update(q, x)
        parts = [InputMoments(48, dtype=dtype).update(given[1][i], given[0][i]) for i in range(3)]
        found = parts[0].merge(parts[1]).merge(parts[2])
        assert found.count == expected.count
        for ours, theirs in ((found.H, expected.H), (found.G, expected.G)):
            assert isinstance(ours, torch.Tensor)
            size = np.abs(theirs).max()
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6, atol=1e-6 * size)
    W = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 48)))
    rounded = cq.gptq(W, found.H, "int4:group16", G=found.G)
    loss = cq.gptq(W.numpy(), expected.H, "int4:group16", G=expected.G).report.loss
    assert rounded.report.loss == pytest.approx(loss, rel=1e-6)


def test_moments_of_cpu_tensors_are_numpys():
    x = tokens()
    expected, found = InputMoments(48, cross=False), InputMoments(48, cross=False)
    expected.update(x), found.update(torch.from_numpy(x))
    assert isinstance(found.H, torch.Tensor)
    np.testing.assert_array_equal(found.H.numpy(), expected.H)
    with pytest.raises(TypeError, match="quantized must be an array of torch as before, got numpy"):
        found.update(x)
    with pytest.raises(ValueError, match="same kind"):
        found.merge(expected)
    with pytest.raises(cq.NonFiniteError, match="quantized"):
        found.update(torch.full((2, 48), float("nan")))
    assert found.count == 60
    with pytest.raises(cq.NonFiniteError, match="second moments of quantized"):
        found.update(torch.full((2, 48), 1e30))
    with pytest.raises(TypeError, match="quantized must be an array, got list"):
        InputMoments(48, cross=False).update([1.0])


def test_products_are_exact_in_float64(elsewhere):
    x = torch.from_numpy(tokens())
    found = elsewhere.add_gram(None, x, double=True)
    wide = x.double().reshape(-1, 48)
    torch.testing.assert_close(found, wide.T @ wide, rtol=1e-14, atol=1e-14)
    assert elsewhere.add_gram(np.ones((48, 48)), x).dtype == torch.float64


@pytest.mark.parametrize("d", [1, 255, 256, 300, 513])
def test_products_of_every_width_are_symmetric_and_those_of_any_thread_count(d):
    x = torch.randn(70, d, generator=torch.Generator().manual_seed(d))
    backend, before, found = get_backend("torch"), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(backend.add_gram(None, x))
    torch.set_num_threads(before)
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(found[0], found[0].T)
    expected = x.numpy().T @ x.numpy()
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5 * np.sqrt(70))


def test_autocast_lowers_no_products(elsewhere):
    x = torch.from_numpy(tokens())
    for backend in (elsewhere, get_backend("torch")):
        exact = np.asarray(backend.add_gram(None, x)), np.asarray(backend.add_gram(None, x, -x))
        with torch.autocast("cpu", torch.bfloat16):
            found = np.asarray(backend.add_gram(None, x)), np.asarray(backend.add_gram(None, x, -x))
        np.testing.assert_array_equal(found, exact)


def test_memory_that_runs_out_leaves_the_statistics_as_they_were(elsewhere, monkeypatch):
    x = torch.from_numpy(tokens())
    found = cq.ActivationStats(48, gram=True).update(x)
    before = found.to_arrays()

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(elsewhere, "add_gram", full)
    with pytest.raises(torch.OutOfMemoryError):
        found.update(x)
    for name, array in found.to_arrays().items():
        np.testing.assert_array_equal(array, before[name])
