from __future__ import annotations

import pytest

import corequant as cq
from corequant.recipe import PERMUTATIONS, Recipe


@pytest.mark.parametrize("permutation", PERMUTATIONS)
@pytest.mark.parametrize("block_size", [None, 16, "auto", (16, 32)])
@pytest.mark.parametrize("activations", ["none", "int4:token:asymmetric", "int8"])
@pytest.mark.parametrize("weights", ["int4:channel", "int3:group64:asymmetric:absmax"])
def test_toml_round_trip(permutation, block_size, activations, weights):
    recipe = Recipe(
        block_size=block_size, permutation=permutation, activations=activations, weights=weights
    )
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_weights_search_their_scales_unless_told_otherwise():
    assert str(Recipe(weights="int4:channel").weights).endswith(":mse")
    assert not str(Recipe(weights="int4:channel:absmax").weights).endswith(":mse")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"permutation": "mass"}, "permutation must be one of identity"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"sequence_length": 1}, "sequence_length must be at least 2"),
        ({"sign_trials": 0}, "sign_trials must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"block_size": 2.5}, "block_size must be an integer"),
        ({"weights": "int4:chanel"}, "unknown part 'chanel'.*did you mean 'channel'"),
        ({"weights": "int4:token"}, "weights have no tokens"),
        ({"block_size": (16, 0)}, "block_size must be at least 1"),
        ({"block_size": "many"}, "block_size must be an integer"),
        ({"tolerance": -1}, "tolerance must be finite"),
        ({"tolerance": "x"}, "tolerance must be a number"),
        ({"factors": "some"}, "factors must be one of"),
        ({"rotation": "some"}, "rotation must be one of merged, online"),
        ({"rotation": "online", "block_size": "auto"}, "one number or None .* got 'auto'"),
        ({"rotation": "online", "block_size": (16, 16)}, "share the residual stream's permutation"),
        ({"rotation": "online", "head_block_size": 16}, "head_block_size must be None"),
        ({"head_block_size": 0}, "head_block_size must be at least 1"),
        ({"weights": 4}, "weights must be a QuantSpec"),
        ({"activations": "int9"}, "unknown format 'int9'"),
        ({"activations": "int4:channel"}, "can't be scaled by channel"),
        ({"activations": 4}, "activations must be"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(cq.RecipeError, match=words):
        Recipe(**fields)


def test_bad_files():
    with pytest.raises(cq.RecipeError, match="not TOML"):
        Recipe.from_toml("= 3")
    with pytest.raises(cq.RecipeError, match="unknown recipe key 'blocksize'"):
        Recipe.from_toml("blocksize = 16")
