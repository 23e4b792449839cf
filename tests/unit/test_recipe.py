from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from corequant.recipe import PERMUTATIONS, Recipe
from corequant.rounding import RoundingMethod, RoundingOptions, round_together, rounding_methods
from corequant.selection import METHODS, permutation_needs


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
        ({"damping": 0.1}, "damping needs method gptq or qronos, got 'nearest'"),
        ({"rounding": "gptq", "damping": -1}, "damping must be finite and not negative"),
        ({"rounding": "qronos", "correction": 0.25}, "correction needs method gptq"),
        ({"reference": "layer"}, "reference must be one of block, model, got 'layer'"),
        ({"rounding": "gptq", "act_order": "no"}, "act_order must be true or false"),
        ({"rounding": "learned", "steps": -1}, "steps must be at least 0"),
        ({"rounding": "gptq", "accumulator": "wide"}, "accumulator must be a width in bits, or"),
        (
            {"rounding": "gptq", "accumulator": "16", "activations": "none"},
            "None without quantized",
        ),
        (
            {"rounding": "gptq", "accumulator": "16", "weights": "int4:group32"},
            "divides the weights' group size 32, such as 32x16",
        ),
        ({"samples": 0}, "samples must be at least 1"),
        ({"sequence_length": 1}, "sequence_length must be at least 2"),
        ({"sign_trials": 0}, "sign_trials must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"block_size": 2.5}, "block_size must be an integer"),
        ({"weights": "int4:chanel"}, "unknown part 'chanel'.*did you mean 'channel'"),
        ({"weights": "int4:token"}, "weights can't be scaled by token"),
        ({"block_size": (16, 0)}, "block_size must be at least 1"),
        ({"block_size": "many"}, "block_size must be an integer, several, 'auto' or None"),
        ({"tolerance": -1}, "tolerance must be finite"),
        ({"tolerance": "x"}, "tolerance must be a number"),
        ({"factors": "some"}, "factors must be one of"),
        ({"rotation": "some"}, "rotation must be one of merged, online"),
        ({"rotation": "online", "block_size": "auto"}, "one integer or None .* got 'auto'"),
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


@pytest.mark.parametrize(
    "fields",
    [
        {"rounding": "gptq", "damping": 0.02, "correction": 0.25, "act_order": False},
        {"rounding": "qronos", "accumulator": "128x16", "activations": "int8"},
        {"rounding": "gpfq", "accumulator": 24, "magr": 0.01},
        {"rounding": "gptq", "refit": True, "weights": "int3:group64"},
        {"rounding": "learned", "steps": 7},
    ],
)
def test_rounding_round_trip(fields):
    recipe = Recipe(**fields)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    options = recipe.rounding_options()
    assert options.method == fields["rounding"]
    assert options.damping == fields.get("damping")


def test_damping_follows_the_activations():
    assert Recipe(rounding="qronos", activations="none").rounding_options().damping == 1e-4
    assert Recipe(rounding="qronos").rounding_options().damping is None
    chosen = Recipe(rounding="qronos", activations="none", damping=1e-2)
    assert chosen.rounding_options().damping == 1e-2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"accumulator": "8", "activations": "int8"}, "bits must leave room for one weight of 1"),
        ({"accumulator": "2"}, "bits must be 3 to 48, got 2"),
        ({"accumulator": "24x16", "weights": "int4:group32"}, "tile must divide the group size 32"),
    ],
)
def test_an_impossible_accumulator(fields, words):
    with pytest.raises(cq.AccumulatorError, match=words):
        Recipe(rounding="gptq", **fields)


def test_bad_files():
    with pytest.raises(cq.RecipeError, match="not valid TOML"):
        Recipe.from_toml("= 3")
    with pytest.raises(cq.RecipeError, match="unknown recipe key 'blocksize'"):
        Recipe.from_toml("blocksize = 16")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounding": "qronos", "refit": True}, "refit needs a spec with groups"),
        ({"fit_scales": True, "weights": "mxfp4"}, "to fit"),
        ({"reference": "model"}, "reference must be 'block'"),
        ({"block_size": "abc"}, "block_size must be an integer, several, 'auto' or None"),
    ],
)
def test_options_without_a_use_are_refused_at_once(fields, message):
    with pytest.raises(cq.RecipeError, match=message):
        Recipe(**fields)


def test_names_of_methods_come_from_their_tables():
    assert PERMUTATIONS == (*METHODS, "auto")
    assert tuple(rounding_methods()) == ("nearest", "gpfq", "gptq", "learned", "qronos")
    needs = {name: permutation_needs(name) for name in PERMUTATIONS}
    assert needs["massdiff"] == frozenset()
    assert needs["energy"] == needs["energydiff"] == {"energy_gram"}
    assert needs["rangediff"] == needs["auto"] == {"energy_gram", "tokens"}


def test_a_rounding_method_is_known_by_its_row(monkeypatch, rng):
    def towards_zero(W, H, spec, *, scales, zero_points, **given):
        smaller = cq.quantize(0.9 * W, spec, scales, zero_points)
        return cq.RoundedTensor.of(smaller, cq.RoundingReport("towards zero", given["name"]))

    rows = {**rounding_methods(), "zero": RoundingMethod("zero", towards_zero, ("steps",))}
    for module in ("methods", "together"):
        monkeypatch.setattr(f"corequant.rounding.{module}.rounding_methods", lambda: rows)
    W = rng.normal(size=(4, 8))
    found = round_together({"a": W}, "int4:channel", RoundingOptions("zero"), np.eye(8))["a"]
    assert found.report.method == "towards zero"
    assert found.report.loss > found.report.nearest_loss
    with pytest.raises(cq.SpecError, match="damping needs method gptq or qronos, got 'zero'"):
        RoundingOptions("zero", damping=0.1)
