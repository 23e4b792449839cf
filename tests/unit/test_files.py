"""Files that others may have put there, and JSON that every reader reads."""

from __future__ import annotations

import json
import os
import socket

import numpy as np
import pytest

import corequant as cq
from corequant.recipe import Recipe
from corequant.storage.files import json_text, json_value, open_regular, read_text
from corequant.storage.shard_index import check_homes, read_index
from corequant.storage.tensor_file import RawTensor, TensorFile, write_tensors


@pytest.fixture(params=["pipe", "socket", "device", "link to a pipe"])
def special(request, tmp_path):
    path = tmp_path / "special"
    if not hasattr(os, "mkfifo"):
        pytest.skip("the system has devices alone, in no folder")
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(str(path))
        bound.close()
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    return path


def test_only_regular_files_are_opened(special):
    with pytest.raises(OSError, match="where a regular file is expected"):
        open_regular(special)
    with pytest.raises(OSError, match="where a regular file is expected"):
        read_text(special)


def test_tensors_and_indexes_are_regular_files(special, tmp_path):
    with pytest.raises(cq.CheckpointError, match="where a regular file is expected"):
        TensorFile(special)
    with pytest.raises(cq.CheckpointError, match="where a regular file is expected"):
        read_index(special)
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"x": special.name}}))
    with pytest.raises(cq.CheckpointError, match="where a regular file is expected"):
        read_index(index)


def test_missing_files_and_directories_are_what_they_were(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")
    # Windows opens none, which is an error of permission.
    with pytest.raises((IsADirectoryError, PermissionError)):
        read_text(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"\xef\xbb\xbfthe quick\r\n")
    assert read_text(file) == "the quick\r\n"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert json_value(file) == {"a": 1}
    file.write_bytes("x".encode("utf-16"))
    with pytest.raises(UnicodeDecodeError):
        read_text(file)


def test_a_recipe_may_begin_with_a_byte_order_mark():
    recipe = Recipe(block_size=16)
    assert Recipe.from_toml("\ufeff" + recipe.to_toml()) == recipe


def test_an_index_may_begin_with_a_byte_order_mark(tmp_path):
    write_tensors(tmp_path / "one.safetensors", {"x": RawTensor.of(np.arange(3))})
    index = tmp_path / "index.json"
    index.write_text('\ufeff{"weight_map": {"x": "one.safetensors"}}', encoding="utf-8")
    assert list(read_index(index)) == ["x"]


def test_numbers_that_are_not_finite_become_null():
    values = {"a": [float("nan"), 1.5, {"b": -float("inf")}], "c": (np.float64("inf"), 2)}
    text = json_text(values)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, 1.5, {"b": None}],
        "c": [None, 2],
    }
    finite = {"x": [1, 2.5, "é", None, True], "y": {}}
    assert json_text(finite) == json.dumps(finite, indent=2)


def test_an_index_that_nobody_follows_may_be_stale_but_not_lead_elsewhere(tmp_path):
    index = tmp_path / "index.json"
    for text in ("{", "[]", "{}", '{"weight_map": {"x": "gone.safetensors"}}'):
        index.write_text(text)
        check_homes(index)
    index.write_text('{"weight_map": {"x": "../elsewhere"}}')
    with pytest.raises(cq.CheckpointError, match="files of its own folder"):
        check_homes(index)
