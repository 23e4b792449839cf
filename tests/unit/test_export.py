from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from corequant.storage.arrays import from_arrays, to_arrays


@pytest.mark.parametrize("text", ["int4:channel", "int3:group8:asymmetric", "int8:tensor"])
def test_round_trip(rng, text):
    spec = cq.QuantSpec.parse(text)
    q = cq.quantize(rng.normal(size=(6, 24)).astype(np.float32), spec)
    arrays = to_arrays("m", q)
    assert all(a.flags.c_contiguous for a in arrays.values())
    back = from_arrays("m", arrays, spec, (6, 24))
    np.testing.assert_array_equal(cq.dequantize(back), cq.dequantize(q))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("m.weight_packed"), "m.weight_packed is missing"),
        (lambda a: a.update({"m.weight_packed": a["m.weight_packed"][:, :-1]}), "of shape"),
        (lambda a: a.update({"m.weight_scale": a["m.weight_scale"].astype("f8")}), "float32"),
        (lambda a: a["m.weight_scale"].fill(0), "positive finite"),
        (lambda a: a["m.weight_scale"].fill(np.nan), "positive finite"),
        (lambda a: a["m.weight_shape"].fill(3), "weight_shape must be"),
    ],
)
def test_bad_arrays(rng, change, words):
    spec = cq.QuantSpec.parse("int4:channel")
    arrays = to_arrays("m", cq.quantize(rng.normal(size=(6, 24)).astype(np.float32), spec))
    change(arrays)
    with pytest.raises(cq.CheckpointError, match=words):
        from_arrays("m", arrays, spec, (6, 24))
