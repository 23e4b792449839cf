"""What holds for any array and any spec."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import corequant as cq

TEXTS = [
    *("int2:channel", "int4:group8", "int4:token:asymmetric", "uint8:tensor:asymmetric"),
    *("e2m1:group8", "e3m2:tensor", "float8_e4m3fn:channel", "nf4:group16", "e4m0:channel"),
    *("int4:group8:exact", "int4:group8:mse", "e2m1:channel:exact", "int3:channel:float16"),
    *("int4:group16:e8m0:even", "float4_e2m1fn:group8:pow2", "int8f6:group16:e8m0"),
    *("float4_e2m1fn:tensor_group16:e4m3", "float4_e2m1fn:tensor_group16:e4m3:mse"),
]
ARRAYS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from([16, 32, 48])),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(x=ARRAYS, text=st.sampled_from(TEXTS))
@settings(max_examples=300, deadline=None)
def test_any_finite_array_decodes_to_finite_numbers_that_round_to_themselves(x, text):
    quantized = cq.quantize(x, text)
    numbers = cq.dequantize(quantized)
    assert np.isfinite(numbers).all()
    assert (quantized.scales > 0).all()
    again = cq.quantize(
        numbers,
        quantized.spec,
        quantized.scales,
        quantized.zero_points,
        global_scale=quantized.global_scale,
    )
    # A subnormal scale can make two codes stand for the same number.
    np.testing.assert_array_equal(cq.dequantize(again), numbers)
    np.testing.assert_array_equal(cq.fake_quantize(x, text), numbers)
    packed = cq.quantize_packed(x, text)
    np.testing.assert_array_equal(cq.dequantize_packed(packed), numbers)


@given(x=ARRAYS, text=st.sampled_from(TEXTS))
@settings(max_examples=200, deadline=None)
def test_rounding_keeps_the_order_within_a_group(x, text):
    spec = cq.QuantSpec.parse(text)
    numbers = cq.fake_quantize(x, spec)
    size = spec.group_size or x.shape[1]
    for values, rounded in zip(x.reshape(-1, size), numbers.reshape(-1, size), strict=True):
        order = np.argsort(values, kind="stable")
        assert (np.diff(rounded[order]) >= 0).all()


@given(
    x=hnp.arrays(
        np.float32, (3, 32), elements=st.floats(-1000, 1000, width=32).filter(lambda v: v == v)
    ),
    bits=st.integers(2, 8),
    symmetry=st.sampled_from(["symmetric", "asymmetric"]),
)
@settings(max_examples=200, deadline=None)
def test_integers_are_at_most_half_a_step_away(x, bits, symmetry):
    quantized = cq.quantize(x, f"int{bits}:group16:{symmetry}")
    steps = np.repeat(quantized.scales.astype(np.float64), 16, axis=1)
    numbers = cq.dequantize(quantized).astype(np.float64)
    room = np.abs(x).max() * 1e-6
    # A rounded zero point moves an asymmetric grid by half a step, and its ends saturate.
    half = 0.5 if symmetry == "symmetric" else 1.0
    assert (np.abs(numbers - x) <= half * steps * (1 + 1e-5) + room).all()
