"""Files of tensors: equal to the library's own, and nothing in a damaged one is believed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save

import corequant as cq
from corequant.storage.tensor_file import RawTensor, TensorFile, parse_header, write_tensors


def test_the_library_reads_what_is_written(rng, tmp_path):
    arrays = {
        "b": rng.normal(size=(3, 5)).astype(np.float32).T,
        "a": np.arange(7, dtype=np.int8)[::-1],
        "c": np.zeros((0, 4), np.int64),
        "d": np.float16([1.5]),
    }
    write_tensors(tmp_path / "x", {k: RawTensor.of(a) for k, a in arrays.items()})
    found, file = load_file(tmp_path / "x"), TensorFile(tmp_path / "x")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        np.testing.assert_array_equal(file.read(name).array(), array)


def test_every_bfloat16_is_kept_and_floats_round_to_it():
    import ml_dtypes

    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    x = np.concatenate([x, x * np.float32(1e30), x * np.float32(1e-38)])
    expected = x.astype(ml_dtypes.bfloat16)
    raw = RawTensor.of(x, "BF16")
    np.testing.assert_array_equal(raw.data.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(raw.array(), expected.astype(np.float32))
    with pytest.raises(ValueError, match="fit F16"):
        RawTensor.of(np.array([1e6]), "F16")


def test_mutated_headers_are_read_or_refused(tmp_path):
    """What we accept the library accepts too."""
    generator = np.random.default_rng(0)
    data = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int8)})
    refused = 0
    for _ in range(3000):
        broken = bytearray(data)
        for _ in range(generator.integers(1, 4)):
            kind, at = generator.integers(3), int(generator.integers(len(broken)))
            if kind == 0:
                broken[at] = int(generator.integers(256))
            elif kind == 1:
                del broken[at : at + int(generator.integers(1, 9))]
            else:
                broken[at:at] = bytes(generator.choice(list(b'{}[]",:019-e'), 2).tolist())
        length = int.from_bytes(broken[:8], "little")
        try:
            if length > len(broken) - 8:
                raise cq.CheckpointError("truncated")
            parse_header(bytes(broken[8 : 8 + length]), len(broken) - 8 - length)
        except cq.CheckpointError:
            refused += 1
        else:
            safetensors.deserialize(bytes(broken))
    assert 1500 < refused < 3000


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]},
        {"dtype": "F32", "shape": [2]},
        "x",
    ],
)
def test_lying_entries(entry):
    with pytest.raises(cq.CheckpointError, match="'a'"):
        parse_header(json.dumps({"a": entry}).encode(), 8)
    deep = b"[" * 200_000
    with pytest.raises(cq.CheckpointError):
        parse_header(deep, 0)
