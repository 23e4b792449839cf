"""Layers multiplied as codes, against exact sums and the layer itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.formats import FormatKind
from corequant.recipe import Recipe
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.rounding import int8_products, networks
from corequant_transformers.rounding.int8_products import (
    input_codes,
    linear_on_codes,
    multiplies_codes,
)

CPU = torch.device("cpu")
QUICK = int8_products._has_instructions()
"""Whether this processor adds products of bytes to 32 bits; others may saturate at 16."""


@pytest.fixture(autouse=True)
def _with_instructions(monkeypatch):
    # Which processors are quick at it is one thing; the sums are the same on all of them.
    if not hasattr(torch, "_int_mm"):
        pytest.fail("this torch has no product of int8 matrices")
    monkeypatch.setattr(int8_products, "_has_instructions", lambda: True)


def applies(weights, activations):
    spec = None if activations is None else cq.QuantSpec.parse(activations)
    return multiplies_codes(cq.QuantSpec.parse(weights), spec, CPU)


def test_what_bytes_can_hold():
    assert applies("int4:channel:symmetric", "int4:token:asymmetric")
    assert applies("int8:tensor:symmetric", "int8:token:symmetric")
    assert applies("int8:channel:symmetric", "int7:token:asymmetric")
    # 255 steps of 8 bits without their zero point are no byte.
    assert not applies("int4:channel:symmetric", "int8:token:asymmetric")
    assert not applies("uint8:channel:symmetric", "int4:token:asymmetric")
    # Codes that stand for fractions.
    assert not applies("int8f6:channel", "int4:token:asymmetric")
    assert not applies("int4:channel:symmetric", "int8f6:token")
    assert not applies("int4:channel:symmetric", None)
    assert not applies("int4:channel:asymmetric", "int4:token:asymmetric")
    assert not applies("int4:group32:symmetric", "int4:token:asymmetric")
    assert not applies("int4:channel:symmetric", "int4:group32:asymmetric")
    assert not applies("e2m1:channel", "int4:token:asymmetric")
    assert not applies("int4:channel:symmetric", "e2m1:token")
    both = [cq.QuantSpec.parse(s) for s in ("int4:channel:symmetric", "int4:token:asymmetric")]
    assert not multiplies_codes(*both, torch.device("meta"))


def test_a_processor_without_the_instructions(monkeypatch):
    monkeypatch.undo()
    int8_products._has_instructions.cache_clear()
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported")
    assert not applies("int4:channel:symmetric", "int4:token:asymmetric")
    int8_products._has_instructions.cache_clear()


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("int4:channel:symmetric", "int4:token:asymmetric"),
        ("int2:tensor:symmetric", "int4:token:symmetric"),
        ("int8:channel:symmetric", "int7:token:asymmetric"),
        ("int8:channel:symmetric", "int8:token:symmetric"),
        ("int3:channel:symmetric:mse", "uint4:token:asymmetric"),
        ("int4:channel:symmetric", "int4:tensor:asymmetric"),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 96), (1, 1, 96), (0, 96)])
def test_products_are_the_exact_sums(monkeypatch, weights, activations, bias, shape):
    assert applies(weights, activations)
    if weights.startswith("int8") and not QUICK:
        # Two products may be above 16 bits, where this processor adds: it is not asked to.
        monkeypatch.undo()
        assert not applies(weights, activations)
        return
    generator = np.random.default_rng(0)
    W = generator.normal(size=(40, 96)).astype(np.float32)
    x = generator.normal(1, 2, shape).astype(np.float32)
    b = torch.from_numpy(generator.normal(size=40).astype(np.float32)) if bias else None
    spec = cq.QuantSpec.parse(activations)
    layer = QuantizedLinear(cq.quantize(W, weights), b, None, spec, "layer")
    values, codes = input_codes(torch.from_numpy(x), spec)
    np.testing.assert_array_equal(values, cq.fake_quantize(x, spec))
    y = linear_on_codes(layer)(codes)
    assert y.dtype == torch.float32
    exact = values.double().numpy() @ layer.weight.double().numpy().T
    exact += 0 if b is None else b.double().numpy()
    # Of whole numbers, three roundings are all there are.
    largest = np.abs(values.numpy()).max(initial=0) * np.abs(layer.weight.numpy()).max() * 96
    np.testing.assert_allclose(y.numpy(), exact, rtol=4e-7, atol=1e-7 * largest)
    torch.testing.assert_close(y, layer(torch.from_numpy(x)), rtol=1e-5, atol=1e-5)


def test_extremes_do_not_saturate(monkeypatch):
    if not QUICK:
        monkeypatch.undo()
        assert not applies("int8:channel:symmetric", "int7:token:asymmetric")
        return
    W = np.full((20, 512), 127.0, np.float32)
    x = torch.full((20, 512), 63.0)
    x[:, 0] = -64
    layer = QuantizedLinear(
        cq.quantize(W, "int8:channel:symmetric"), None, None, cq.QuantSpec.parse("int7:token"), "l"
    )
    values, codes = input_codes(x, cq.QuantSpec.parse("int7:token:asymmetric"))
    torch.testing.assert_close(
        linear_on_codes(layer)(codes), (values.double() @ layer.weight.double().T).float()
    )


def test_blocks_go_on_with_products_of_codes(monkeypatch, tokens):
    model, made = cqhf.tiny_model("qwen2"), []
    original = int8_products.linear_on_codes

    def count(layer):
        multiply = original(layer)

        def counted(x):
            y = multiply(x)
            simulated = torch.nn.functional.linear(
                x.steps * x.scales.float(), layer.weight, layer.bias
            )
            torch.testing.assert_close(y, simulated, rtol=1e-4, atol=1e-5)
            made.append(layer.name)
            return y

        return counted

    monkeypatch.setattr(networks, "linear_on_codes", count)
    recipe = Recipe(block_size=16, rounding="gptq")
    result = cqhf.quantize(model, recipe, tokens)
    # Every layer, at least once a window.
    for matrix in result.plan.quantized:
        assert made.count(matrix.name) >= len(tokens)


INTEGERS = [name for name, form in cq.formats.items() if form.kind is FormatKind.INTEGER]


@pytest.mark.parametrize("weights", INTEGERS)
@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_every_integer_format_is_multiplied_rightly_or_not_at_all(weights, symmetry):
    generator, used = np.random.default_rng(1), 0
    W, x = (generator.normal(size=(20, 64)).astype(np.float32) for _ in range(2))
    for name in INTEGERS:
        if (name, symmetry) == ("int8f6", "asymmetric"):
            # No such quantizer: fractions have no zero points.
            continue
        spec = cq.QuantSpec.parse(f"{name}:token:{symmetry}")
        if not applies(f"{weights}:channel", str(spec)):
            continue
        used += 1
        if not QUICK and weights in ("int8", "uint7"):
            # Might saturate, and is not done, on this processor.
            continue
        layer = QuantizedLinear(cq.quantize(W, f"{weights}:channel"), None, None, spec, "layer")
        _, codes = input_codes(torch.from_numpy(x), spec)
        expected = layer(torch.from_numpy(x))
        torch.testing.assert_close(linear_on_codes(layer)(codes), expected, rtol=1e-5, atol=1e-5)
    assert used == (0 if weights in ("uint8", "int8f6") else 13 if symmetry == "symmetric" else 12)
