"""Packed minifloats of 4 bits, 32 at a time: the same bytes and numbers as by any other way."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

import corequant as cq
from corequant._cpu.grids import rounder_for
from corequant._cpu.loops import lanes, nibbles
from corequant._cpu.loops.jit import jit

TEXTS = ["mxfp4", "mxfp4:even", "nvfp4", "e3m0:group16", "e1m2:group32", "e2m1:group96", "e2m1"]
MORE = ["float4_e2m1fn:group32:float16", "e2m1b3:group64", "e2m1:group48", "mxfp4:search"]


def awkward(d, seed=0):
    """Ties, signed zeros, subnormals, sizes far apart, a row and a group of zeros."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((12, d)).astype(np.float32)
    x *= np.ldexp(np.float32(1), generator.integers(-140, 100, (12, 1))).astype(np.float32)
    x[3] = generator.choice(np.float32([0.25, -0.75, 1.25, 1.75, 2.5, -3.5, 5, -6, 0, -0.0]), d)
    x[4], x[5, :16] = 0, -0.0
    return x


@pytest.mark.parametrize("text", [*TEXTS, *MORE])
@pytest.mark.parametrize("d", [192, 576])
def test_packed_bytes_and_numbers_are_those_of_codes(text, d):
    x = awkward(d)
    whole = cq.quantize(x, text)
    packed = cq.quantize_packed(x, text)
    np.testing.assert_array_equal(packed.packed, cq.pack_bytes(whole.codes, 4))
    numbers, expected = cq.dequantize_packed(packed), cq.dequantize(whole)
    np.testing.assert_array_equal(numbers, expected)
    np.testing.assert_array_equal(np.signbit(numbers), np.signbit(expected))
    strided = cq.quantize_packed(np.asfortranarray(x), text)
    np.testing.assert_array_equal(strided.packed, packed.packed)


@pytest.mark.parametrize("d", [16, 48])
def test_rows_that_do_not_come_in_thirty_twos(d):
    x = awkward(d)
    whole = cq.quantize(x, "nvfp4")
    packed = cq.quantize_packed(x, "nvfp4")
    np.testing.assert_array_equal(packed.packed, cq.pack_bytes(whole.codes, 4))
    np.testing.assert_array_equal(cq.dequantize_packed(packed), cq.dequantize(whole))


@pytest.mark.parametrize("text", ["int4:group32", "int4:channel", "int4:group64:asymmetric"])
def test_packed_integers_stand_for_the_numbers_of_their_codes(text):
    x = awkward(192)
    x[:2] = np.random.default_rng(3).standard_normal((2, 192))
    whole = cq.quantize(x, text)
    numbers = cq.dequantize_packed(cq.pack_quantized(whole))
    np.testing.assert_array_equal(numbers, cq.dequantize(whole))


OLDER = """
import numpy as np, corequant as cq
x = np.random.default_rng(0).standard_normal((8, 192)).astype(np.float32)
for text in ("mxfp4", "nvfp4", "int4:group64"):
    packed = cq.quantize_packed(x, text)
    np.testing.assert_array_equal(cq.dequantize_packed(packed), cq.dequantize(cq.quantize(x, text)))
"""


def test_processors_without_long_permutations():
    processor = "haswell" if platform.machine().lower() in ("x86_64", "amd64") else "generic"
    environment = {**os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(
        [sys.executable, "-c", OLDER], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@jit
def encoded(x, low, high, r, packed):
    nibbles.encode_nibbles(x, 0, low, high, r, packed)


@jit
def decoded(packed, low, high, r, out):
    nibbles.decode_nibbles(packed, 0, low, high, r, out)


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "e1m2"])
def test_compiled_vectors_do_what_their_definition_says(name):
    form = cq.find_format(name)
    r = rounder_for(form, np.dtype(np.float32))
    values = form.finite_values.astype(np.float32)
    ties = (values[1:] + values[:-1]) / 2
    x = np.resize(np.concatenate([values, ties, ties * np.float32(3)]), 32).astype(np.float32)
    steps = np.float32(0.75), np.float32(1.5)
    one, other = np.zeros(16, np.uint8), np.zeros(16, np.uint8)
    encoded(x, *steps, r, one)
    nibbles.encode_nibbles(x, 0, *steps, r, other)
    np.testing.assert_array_equal(one, other)
    every = np.arange(0, 256, 16, dtype=np.uint8) | np.arange(16, dtype=np.uint8)[::-1]
    numbers, again = np.zeros(32, np.float32), np.zeros(32, np.float32)
    decoded(every, *steps, r, numbers)
    nibbles.decode_nibbles(every, 0, *steps, r, again)
    np.testing.assert_array_equal(numbers.view(np.uint32), again.view(np.uint32))
    codes = np.stack([every & 15, every >> 4], axis=1).ravel()
    expected = form.values[codes] * np.repeat(steps, 16)
    np.testing.assert_array_equal(numbers, expected.astype(np.float32))
    assert lanes.largest_bits(x, 0, 32) == np.abs(x).max().view(np.uint32)
