"""GGUF blocks against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

import corequant as cq
from corequant.storage import gguf_blocks
from corequant.storage.gguf import (
    BLOCK_TYPES,
    DECODED_TYPES,
    decode_blocks,
    from_blocks,
    quantize_blocks,
    to_blocks,
)


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


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_stand_for_the_same_numbers(name):
    """Scales of either sign, and offsets, by its own rules."""
    blocks = gguf.quantize(weights(), peer(name))
    theirs, ours = gguf.dequantize(blocks, peer(name)), decode_blocks(blocks, name)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    assert decode_blocks(blocks[:0], name).shape == (0, 256)
    with pytest.raises(cq.ShapeError, match="whole|multiple"):
        decode_blocks(blocks[:, :-1], name)


def random_blocks(name, count):
    """Any bytes, with scales that are numbers."""
    numbers, width = gguf_blocks.block_shape(name)
    blocks = np.random.default_rng(0).integers(0, 256, (count, width), dtype=np.uint8)
    places = {"MXFP4": (), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
    places |= {"TQ1_0": (52,), "TQ2_0": (64,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    places |= {"Q4_1": (0, 2), "Q5_1": (0, 2)}
    scales = np.random.default_rng(1).normal(0, 0.1, (count, 2)).astype("<f2").view(np.uint8)
    scales[0] = 0
    for k, place in enumerate(places.get(name, (0,))):
        blocks[:, place : place + 2] = scales[:, 2 * k : 2 * k + 2]
    if name == "MXFP4":
        blocks[:, 0] = np.minimum(blocks[:, 0], 250)
    return numbers, blocks


@pytest.mark.parametrize("name", DECODED_TYPES)
def test_any_bytes_are_decoded_as_there(name, monkeypatch):
    numbers, blocks = random_blocks(name, 700)
    assert gguf.GGML_QUANT_SIZES[peer(name)] == (numbers, blocks.shape[1])
    expected = gguf.dequantize(blocks, peer(name))
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(
        decode_blocks(blocks, name).view(np.uint32), expected.view(np.uint32)
    )
    # In several panels, and of rows with several blocks.
    monkeypatch.setattr(gguf_blocks, "_PANEL", 99)
    rows = decode_blocks(blocks.reshape(7, 100, -1).reshape(7, -1), name)
    np.testing.assert_array_equal(rows.view(np.uint32), expected.reshape(7, -1).view(np.uint32))


@pytest.mark.parametrize("search", ["", ":mse"])
def test_offsets_of_q4_1_are_rounded_and_nothing_else(search):
    quantized = cq.quantize(weights(), f"int4:group32:asymmetric:float16{search}")
    kind, blocks = to_blocks(quantized)
    assert kind == "Q4_1"
    theirs, meant = gguf.dequantize(blocks, peer(kind)), cq.dequantize(quantized)
    offsets = np.abs((quantized.zero_points + 8.0) * quantized.scales)
    bound = np.maximum(offsets * 2.0**-11, 2.0**-25)
    difference = np.abs(theirs - meant).reshape(*offsets.shape, 32)
    # Two roundings to float32 on the way.
    assert (difference <= bound[..., None] + 2.0**-22 * offsets[..., None]).all()
    assert difference.max() > 0


def test_offsets_beyond_float16_are_refused():
    x = np.tile(np.array([7e4, 6e4], np.float32), (1, 16))
    with pytest.raises(ValueError, match="offsets must be numbers of float16"):
        to_blocks(cq.quantize(-x, "int4:group32:asymmetric:float16"))


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
