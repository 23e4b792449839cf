"""Nothing that an index says is believed before its files say the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

import corequant as cq
from corequant.storage import shard_index
from corequant.storage.shard_index import read_index
from corequant.storage.tensor_file import RawTensor, write_tensors

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def index(tmp_path):
    arrays = {ONE: {"a": np.ones(4, np.float32), "b": np.ones(2)}, TWO: {"c": np.ones((3, 3))}}
    for name, tensors in arrays.items():
        write_tensors(tmp_path / name, {k: RawTensor.of(a) for k, a in tensors.items()})
    path = tmp_path / "model.safetensors.index.json"
    write(path, {"a": ONE, "b": ONE, "c": TWO}, {"total_size": 104})
    return path


def write(path, weight_map, metadata=None):
    path.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def test_every_tensor_is_found(index):
    assert read_index(index) == {
        "a": index.parent / ONE,
        "b": index.parent / ONE,
        "c": index.parent / TWO,
    }
    # Sizes that some writers give: tied tensors counted twice, none, a float.
    for metadata in ({"total_size": 190}, {"total_size": 104.0}, {}, None):
        write(index, {"a": ONE, "b": ONE, "c": TWO}, metadata)
        assert len(read_index(index)) == 3


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": ONE, "b": ONE, "c": ONE}, f"{ONE} holds 'c', which it doesn't"),
        ({"a": ONE, "b": TWO, "c": TWO}, "holds 'b', but .* says that it is in"),
        ({"a": ONE, "b": ONE, "c": TWO, "d": TWO}, f"{TWO} holds 'd', which it doesn't"),
        ({"a": ONE, "c": TWO}, "holds 'b', but .* doesn't name it"),
        ({"a": ONE, "b": ONE, "c": "model-3.safetensors"}, "model-3.safetensors is missing"),
        ({"a": ONE, "b": ONE, "c": "../x.safetensors"}, "own folder, got '../x.safetensors' for"),
        ({"a": ONE, "b": ONE, "c": "/etc/passwd"}, "files of its own folder"),
        ({"a": ONE, "b": ONE, "c": "..\\x"}, "files of its own folder"),
        ({"a": ONE, "b": ONE, "c": ".."}, "files of its own folder"),
        ({"a": ONE, "b": ONE, "c": "x\0y"}, "files of its own folder"),
        ({"a": ONE, "b": ONE, "c": 3}, "files of its own folder, got '3' for 'c'"),
        ({"a": ONE, "b": ONE, "c": "x" * 300}, "files of its own folder"),
        ({}, "no weight_map"),
        ([ONE, TWO], "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_maps_that_the_files_contradict(index, weight_map, words):
    write(index, weight_map, {"total_size": 104})
    with pytest.raises(cq.CheckpointError, match=words):
        read_index(index)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"total_size": 25}, "near the 104 bytes of its tensors, got 25"),
        ({"total_size": 420}, "near the 104 bytes"),
        ({"total_size": 0}, "near the 104 bytes"),
        ({"total_size": -1}, "must be a number of bytes, got -1"),
        ({"total_size": "104"}, "must be a number of bytes"),
        ({"total_size": True}, "must be a number of bytes"),
        ({"total_size": float("nan")}, "must be a number of bytes"),
        ({"total_size": float("inf")}, "must be a number of bytes"),
        ([104], "must be a number of bytes"),
    ],
)
def test_sizes_that_can_not_be(index, metadata, words):
    write(index, {"a": ONE, "b": ONE, "c": TWO}, metadata)
    with pytest.raises(cq.CheckpointError, match=words):
        read_index(index)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}', "'a' occurs twice"),
        ("[1]", "must hold a JSON object, got list"),
        ("{", "can't be read as JSON"),
        ("[" * 100_000, "can't be read as JSON"),
        ("\xff", "can't be read as JSON"),
    ],
)
def test_texts_that_are_no_index(index, text, words):
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(cq.CheckpointError, match=words):
        read_index(index)


def test_files_that_are_damaged_missing_or_too_long(index, monkeypatch):
    file = index.parent / TWO
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(cq.CheckpointError, match="malformed"):
        read_index(index)
    file.write_bytes(content)
    monkeypatch.setattr(shard_index, "LONGEST_INDEX", 20)
    with pytest.raises(cq.CheckpointError, match="at most 20 bytes"):
        read_index(index)
    index.unlink()
    with pytest.raises(cq.CheckpointError, match="is missing"):
        read_index(index)


def test_mutated_indexes_are_read_or_refused(index):
    generator, text = np.random.default_rng(0), index.read_bytes()
    refused = 0
    for _ in range(500):
        broken = bytearray(text)
        for _ in range(generator.integers(1, 4)):
            broken[int(generator.integers(len(broken)))] = int(generator.integers(256))
        index.write_bytes(broken)
        try:
            assert set(read_index(index)) == {"a", "b", "c"}
        except cq.CheckpointError:
            refused += 1
    assert 100 < refused < 500
