"""GGUF blocks against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

import corequant as cq
from corequant.gguf import BLOCK_TYPES, from_blocks, quantize_blocks, to_blocks


def weights(seed=0):
    generator = np.random.default_rng(seed)
    x = generator.standard_t(4, (64, 256)).astype(np.float32) * np.float32(0.03)
    x[3, :32] = 0
    # Exact ties and powers of two.
    x[5] = np.arange(256, dtype=np.float32) % 13 - 6
    x[6, ::2] = 0.25
    return x


def peer(name):
    return getattr(gguf.GGMLQuantizationType, name)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_by_its_own_rules_are_equal(name):
    for seed in range(5):
        x = weights(seed)
        np.testing.assert_array_equal(quantize_blocks(x, name), gguf.quantize(x, peer(name)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Q4_0", "int4:group32:symmetric:float16"),
        ("Q4_0", "int4:group32:symmetric:float16:mse"),
        ("Q8_0", "int8:group32:symmetric:float16"),
        ("MXFP4", "mxfp4"),
        ("MXFP4", "mxfp4:search"),
        ("MXFP4", "mxfp4:even"),
    ],
)
def test_what_was_quantized_here_is_read_there(name, text):
    quantized = cq.quantize(weights(), text)
    kind, blocks = to_blocks(quantized)
    assert kind == name
    theirs = gguf.dequantize(blocks, peer(name))
    np.testing.assert_array_equal(theirs, cq.dequantize(quantized))
    again = from_blocks(blocks, name)
    np.testing.assert_array_equal(again.codes, quantized.codes)
    np.testing.assert_array_equal(again.scales, quantized.scales)


def test_mxfp4_by_the_ocp_rule_differs_in_ties_only():
    """The same scales; gguf takes the smaller of two codes at the same distance."""
    x = weights()
    _, blocks = to_blocks(cq.quantize(x, "mxfp4"))
    theirs = gguf.quantize(x, gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(blocks.reshape(-1, 17)[:, 0], theirs.reshape(-1, 17)[:, 0])
    a = gguf.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    b = gguf.dequantize(theirs, gguf.GGMLQuantizationType.MXFP4)
    differ = a != b
    np.testing.assert_array_equal(np.abs(a - x)[differ], np.abs(b - x)[differ])


def test_other_specs_are_refused():
    with pytest.raises(cq.SpecError, match="GGUF has no block type for int4:group64:symmetric"):
        to_blocks(cq.quantize(np.ones((1, 64), np.float32), "int4:group64"))
    with pytest.raises(cq.SpecError, match="block_type must be one of Q4_0, Q4_1, Q8_0, MXFP4"):
        quantize_blocks(np.ones((1, 32), np.float32), "Q4_K")
    x = np.ones((1, 32), np.float32)
    x[0, 3] = np.nan
    with pytest.raises(cq.NonFiniteError, match=r"index \(0, 3\)"):
        quantize_blocks(x, "Q8_0")
