"""Layouts, values and quantizers against compressed-tensors 0.20."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

import corequant as cq
from corequant.storage.arrays import to_arrays

SHAPE = (24, 128)


def weights(seed=0):
    generator = np.random.default_rng(seed)
    return generator.standard_t(5, SHAPE).astype(np.float32) * np.float32(0.02)


def decompress(kind, quantized, **arguments):
    """compressed-tensors' weight from our arrays."""
    arrays = to_arrays("m", quantized)
    state = {key.removeprefix("m."): torch.from_numpy(a) for key, a in arrays.items()}
    if quantized.spec.scale_format is cq.ScaleFormat.E4M3:
        state["weight_scale"] = state["weight_scale"].view(torch.float8_e4m3fn)
    if arguments["num_bits"] == 8 and arguments["type"] == "float":
        state["weight"] = state.pop("weight_packed").view(torch.float8_e4m3fn)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor = BaseCompressor.get_value_from_registry(kind)
    return compressor.decompress(state, scheme)["weight"]


def args_of(text):
    spec = cq.QuantSpec.parse(text)
    strategy = "group" if spec.group_size else "channel"
    return {
        "num_bits": spec.format.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "group_size": spec.group_size,
    }


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rest", ["channel", "group32", "group32:mse"])
@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_integers_unpack_to_the_same_weights(bits, rest, symmetry):
    text = f"int{bits}:{rest}:{symmetry}"
    quantized = cq.quantize(weights(bits), text)
    theirs = decompress("pack-quantized", quantized, **args_of(text))
    np.testing.assert_array_equal(theirs.numpy(), cq.dequantize(quantized))


FLOATS = {"num_bits": 4, "type": "float", "symmetric": True}
MX = {**FLOATS, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
NV = {
    **FLOATS,
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
}


@pytest.mark.parametrize("search", ["", ":search", ":even", ":ceil"])
@pytest.mark.parametrize(
    ("preset", "kind", "bits"),
    [
        ("mxfp4", "mxfp4-pack-quantized", 4),
        ("mxfp6_e2m3", "mxfp6-pack-quantized", 6),
        ("mxfp8_e4m3", "mxfp8-quantized", 8),
    ],
)
def test_mx_unpacks_to_the_same_weights(preset, kind, bits, search):
    quantized = cq.quantize(weights(), preset + search)
    theirs = decompress(kind, quantized, **{**MX, "num_bits": bits})
    assert theirs.dtype is torch.bfloat16
    # Every product of such a number and a power of two is a bfloat16.
    np.testing.assert_array_equal(theirs.float().numpy(), cq.dequantize(quantized))


@pytest.mark.parametrize("search", ["", ":search", ":four_over_six"])
def test_nvfp4_unpacks_to_the_same_weights(search):
    quantized = cq.quantize(weights(), "nvfp4" + search)
    theirs = decompress("nvfp4-pack-quantized", quantized, **NV)
    ours = torch.from_numpy(cq.dequantize(quantized)).to(torch.bfloat16)
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_quantizers_agree(bits, symmetric):
    """The same scales and, for the symmetric ones, the same numbers."""
    x = torch.from_numpy(weights(1))
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="channel")
    scale, zero = calculate_qparams(x.amin(1, True), x.amax(1, True), args)
    text = f"int{bits}:channel:{'symmetric' if symmetric else 'asymmetric'}"
    quantized = cq.quantize(x.numpy(), text)
    np.testing.assert_allclose(quantized.scales, scale.numpy(), rtol=2e-7)
    if symmetric:
        np.testing.assert_array_equal(quantized.scales, scale.numpy())
        theirs = fake_quantize(x, scale, zero, args)
        np.testing.assert_array_equal(theirs.numpy(), cq.dequantize(quantized))
    else:
        np.testing.assert_array_equal(quantized.zero_points, zero.numpy())


def groups(x, size):
    parts = x.unflatten(-1, (-1, size))
    return parts.amin(-1), parts.amax(-1)


@pytest.mark.parametrize(("preset", "bits"), [("mxfp4:even", 4), ("mxfp6_e2m3:even", 6)])
def test_mx_quantizers_agree_with_the_mode_even(preset, bits):
    x = torch.from_numpy(weights(2))
    args = QuantizationArgs(**{**MX, "num_bits": bits})
    scale, zero = calculate_qparams(*groups(x, 32), args)
    quantized = cq.quantize(x.numpy(), preset)
    np.testing.assert_array_equal(quantized.scales, scale.numpy())
    theirs = fake_quantize(x, scale, zero, args)
    np.testing.assert_array_equal(theirs.numpy(), cq.dequantize(quantized))


def test_nvfp4_quantizers_agree():
    x = torch.from_numpy(weights(3))
    args = QuantizationArgs(**NV)
    divisor = generate_gparam(x.min(), x.max())
    scale, zero = calculate_qparams(*groups(x, 16), args, global_scale=divisor)
    quantized = cq.quantize(x.numpy(), "nvfp4")
    np.testing.assert_array_equal(quantized.global_scale, divisor.numpy())
    np.testing.assert_array_equal(quantized.scales, scale.float().numpy())
    theirs = fake_quantize(x, scale.float(), zero, args, global_scale=divisor)
    np.testing.assert_array_equal(theirs.numpy(), cq.dequantize(quantized))


def test_every_bfloat16_rounds_to_the_same_e2m1():
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = bits[torch.isfinite(bits)].float()
    theirs = cast_to_fp4(x.clone().clamp(-6, 6)).numpy()
    ours = cq.decode(cq.encode(x.numpy(), "float4_e2m1fn"), "float4_e2m1fn")
    np.testing.assert_array_equal(ours, theirs)
