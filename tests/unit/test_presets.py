from __future__ import annotations

from pathlib import Path

import pytest

import corequant as cq
import corequant.recipe
from corequant.recipe import DEFAULT_PRESET, PRESETS, READERS, Recipe, find_preset
from corequant.storage.compressed_tensors import Scheme
from corequant.storage.gguf import block_type_of

FOLDER = Path(corequant.recipe.__file__).parent / "presets"
FIGURES = {"perplexity", "kl", "bits_per_weight", "size_mb", "minutes", "memory_mib", "command"}
PAIRS = [(name, reader) for name in PRESETS for reader in find_preset(name).readers]


def test_every_file_is_a_preset():
    assert {file.stem for file in FOLDER.iterdir()} == set(PRESETS) == set(Recipe.presets())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_recipe_that_survives_toml(name):
    found, recipe = find_preset(name), Recipe.preset(name)
    assert found.description
    assert found.reader in READERS
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.rounding == "qronos"
    assert recipe.weights.scale_search is not cq.QuantSpec.parse("int4").scale_search


@pytest.mark.parametrize("name", PRESETS)
def test_measured_figures_are_all_there_with_their_command(name):
    measured = find_preset(name).measured
    assert not measured or set(measured) == FIGURES
    if measured:
        stored = Recipe.preset(name, reader="corequant").weights
        assert measured["bits_per_weight"] >= stored.format.bits
        assert measured["command"].startswith(("python bench/", "corequant "))


@pytest.mark.parametrize(("name", "reader"), PAIRS)
def test_what_a_preset_says_a_reader_takes_its_files_hold(name, reader):
    recipe = Recipe.preset(name, reader=reader)
    if READERS[reader] == "gguf":
        assert block_type_of(recipe.weights)
    else:
        assert Scheme(recipe.weights, recipe.activations).format
    if reader != "transformers":
        # Only Transformers has a hook that rotates.
        assert recipe.rotation in ("offline", "heads")


def test_the_default_is_a_good_model_and_an_empty_recipe_is_as_before():
    assert Recipe.preset() == Recipe.preset(DEFAULT_PRESET) == Recipe.preset("W4A16")
    assert Recipe.preset().activations is None
    assert (Recipe().rounding, str(Recipe().activations)) == ("nearest", "int4:token:asymmetric")


def test_changes_come_last():
    recipe = Recipe.preset("w8a8", weights="int8:group64", seed=3, activations="none")
    assert (str(recipe.weights), recipe.seed) == ("int8:group64:symmetric:mse", 3)
    assert recipe.activations is None


def test_a_change_brings_the_rotation_that_it_needs():
    assert Recipe.preset("w4a16", block_size=32).rotation == "merged"
    assert Recipe.preset("w4a16", factors="signs").rotation == "merged"
    assert Recipe.preset("w4a16", block_size=None).rotation == Recipe.preset("w4a16").rotation
    for rotation in ("heads", "offline"):
        plain = Recipe.preset("w4a4", rotation=rotation)
        assert (plain.block_size, plain.factors) == (None, "none")
    with pytest.raises(cq.RecipeError, match="block_size must be None"):
        Recipe.preset("w4a4", rotation="offline", block_size=32)


def test_another_rounding_leaves_out_what_only_the_presets_takes():
    for name in PRESETS:
        assert Recipe.preset(name, rounding="nearest").damping is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "w4a61"}, "preset must be one of w4a16, .* did you mean 'w4a16'"),
        ({"name": None}, "preset must be one of"),
        ({"name": "w4a16", "reader": "vlm"}, "one of corequant, .* did you mean 'vllm'"),
        ({"name": "w4a4", "reader": "llama.cpp"}, "presets for llama.cpp: w4a16, .*gguf-q4_0"),
        ({"name": "gguf-q4_1", "reader": "vllm"}, "'gguf-q4_1' can't be run by vllm"),
        ({"name": "w4a16", "bit": 4}, "unknown recipe key 'bit'"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(cq.RecipeError, match=words):
        Recipe.preset(**arguments)
