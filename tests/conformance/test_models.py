"""A model quantized on a device and by NumPy from the same statistics: the same codes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_torch.kernels import engines
from corequant_torch.kernels.cpu import to_numpy
from corequant_torch.kernels.device import DeviceKernels
from corequant_transformers.model.quantized_linear import QuantizedLinear

SPECS = ("int4:channel", "int4:group16:asymmetric", "mxfp4", "nvfp4", "e3m2:channel:mse")
BLOCK = 16


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Test torch on the CPU, the kernels for devices on CPU tensors, and CUDA if asked for."""
    if "device" not in metafunc.fixturenames:
        return
    asked = metafunc.config.getoption("--backends").split(",")
    known = {"numpy": [], "torch": ["cpu", "elsewhere"], "cuda": ["cuda"]}
    metafunc.parametrize("device", [d for name in asked for d in known[name]])


@pytest.fixture
def convert(device, monkeypatch):
    if device == "cuda":
        assert torch.cuda.is_available(), "cuda was asked for and there is none"
        return lambda x: torch.from_numpy(x).cuda()
    if device == "elsewhere":
        kernels = DeviceKernels()
        monkeypatch.setattr(engines, "engine_for", lambda x: kernels)
        monkeypatch.setattr("corequant_torch.backend.engine_for", lambda x: kernels)
        monkeypatch.setattr("corequant_torch.backend.is_plain_call", lambda x: False)
        monkeypatch.setattr("corequant_torch.operators.engine_for", lambda x: kernels)
    return torch.from_numpy


@pytest.fixture(scope="module")
def model():
    return cqhf.tiny_model("llama")


@pytest.fixture(scope="module")
def calibration(model):
    return cqhf.calibrate(model, Recipe(block_size=BLOCK), TOKENS)


TOKENS = np.arange(128).reshape(2, 64)


@pytest.fixture(scope="module", params=[None, "int8:token"], ids=str)
def quantized(request, model):
    """Return a quantized model and its logits by NumPy's kernels."""
    recipe = Recipe(block_size=BLOCK, activations=request.param)
    made = cqhf.quantize(model, recipe, TOKENS).model
    with torch.no_grad():
        return made, made(torch.from_numpy(TOKENS[:1])).logits, request.param


def merged(weight, order, signs, convert):
    """Return a weight in float64, permuted and rotated where ``convert`` puts it."""
    wide = convert(weight.astype(np.float64))
    turned = wide[:, order if isinstance(wide, np.ndarray) else convert(order)]
    return cq.block_hadamard(turned, BLOCK, signs=signs)


@pytest.mark.parametrize("text", SPECS)
def test_codes_and_permutations_are_equal(model, calibration, convert, text):
    compared = 0
    for layer in range(2):
        statistics = calibration.statistics[f"model.layers.{layer}.mlp.down_proj"]
        order = cq.massdiff(statistics.mean_abs, BLOCK)
        signs = cq.random_signs(len(order), layer)
        weight = model.model.layers[layer].mlp.down_proj.weight.numpy()
        host, there = (merged(weight, order, signs, how) for how in (np.asarray, convert))
        # Merged in float64 the weights are equal, bit for bit.
        np.testing.assert_array_equal(to_numpy(there.cpu()), host)
        expected, found = cq.quantize(host, text), cq.quantize(there, text)
        for name in ("codes", "scales", "zero_points", "global_scale"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.device == there.device
                np.testing.assert_array_equal(to_numpy(ours.cpu()), theirs)
                compared += theirs.size
        values = cq.dequantize(found)
        np.testing.assert_array_equal(to_numpy(values.cpu()), cq.dequantize(expected))
    assert compared > 0


@pytest.mark.parametrize("method", ["gptq", "qronos"])
def test_reconstruction_errors_are_equal(model, calibration, convert, method):
    weight = model.model.layers[0].mlp.down_proj.weight.numpy().astype(np.float64)
    x = np.random.default_rng(0).normal(size=(400, weight.shape[1]))
    x *= calibration.statistics["model.layers.0.mlp.down_proj"].mean_abs
    H = x.T @ x / len(x)
    cross = {"G": 0.99 * H} if method == "qronos" else {}
    expected = getattr(cq, method)(weight, H, spec="int4:channel", **cross)
    there = {name: convert(G) for name, G in cross.items()}
    found = getattr(cq, method)(convert(weight), convert(H), spec="int4:channel", **there)
    assert found.report.loss == pytest.approx(expected.report.loss, rel=1e-6)
    assert found.codes.device == convert(H).device


def test_activations_are_rounded_alike(calibration, convert, rng):
    x = rng.normal(size=(6, 96)).astype(np.float32) * 3
    for text in ("int4:token:asymmetric", "mxfp4", "nvfp4"):
        expected = cq.fake_quantize(x, text)
        np.testing.assert_array_equal(to_numpy(cq.fake_quantize(convert(x), text).cpu()), expected)


def test_logits_agree(quantized, convert, device):
    made, expected, activations = quantized
    place = "cuda" if device == "cuda" else "cpu"
    there = copy.deepcopy(made).to(place)
    layers = [m for m in there.modules() if isinstance(m, QuantizedLinear)]
    assert any(layer.rotation for layer in layers)
    with torch.no_grad():
        found = there(torch.from_numpy(TOKENS[:1]).to(place)).logits.cpu()
    gap = float((found - expected).norm() / expected.norm())
    # Where sums differ in their last place, an activation in a thousand falls to its other side.
    assert gap <= (1e-5 if activations is None else 1e-2)
