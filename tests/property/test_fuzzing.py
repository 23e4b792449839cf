"""Damaged files of every kind; ``bench/bench_fuzz.py`` reads a hundred thousand."""

from __future__ import annotations

import json

import pytest

import corequant as cq
from corequant.recipe import Recipe
from tests.fuzzing import fuzz, targets

KINDS = (
    "header",
    "header's values",
    "file of tensors",
    "shard",
    "index",
    "recipe",
    "recipe's values",
    "config",
    "config of experts",
    "quantized config",
    "float config",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    found = {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}
    assert tuple(found) == KINDS
    assert sum(target.share for target in found.values()) == 100
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused_by_a_typed_error(kind, files):
    found = fuzz(files[kind], 200, seed=0)
    # Some are still good, and some are not: the mutations are neither blind nor harmless.
    assert found.read > 0
    assert found.refused > 20
    files[kind].read(files[kind].good)


@pytest.mark.parametrize(
    ("kind", "field", "value", "words"),
    [
        ("config", "num_hidden_layers", 10**12, "at most 4096"),
        ("config", "num_hidden_layers", float("nan"), "at most 4096"),
        ("float config", "num_hidden_layers", 10**12, "at most 4096"),
        ("float config", "head_dim", 10**40, "at most 16777216"),
        ("config of experts", "decoder_sparse_step", 0, "decoder_sparse_step must be a positive"),
        ("config of experts", "num_local_experts", 99999, "at most 32768"),
    ],
)
def test_configs_that_took_forever_or_broke(kind, field, value, words, files):
    values = json.loads(files[kind].good)
    assert field in values
    with pytest.raises(cq.CorequantError, match=words):
        files[kind].read(json.dumps({**values, field: value}).encode())


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000])
def test_recipes_that_broke(value):
    with pytest.raises(cq.RecipeError, match="not valid TOML"):
        Recipe.from_toml(f"seed = {value}")
    with pytest.raises(cq.RecipeError, match="map keys to values, got float"):
        Recipe.from_dict(0.5)
