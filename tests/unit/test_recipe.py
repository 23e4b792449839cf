from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import corequant as cq
from corequant.recipe import FLOAT, PERMUTATIONS, LayerRule, Recipe, find_preset
from corequant.recipe.layers import is_match
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


@pytest.mark.parametrize(
    ("pattern", "settings", "fields"),
    [
        ("down_proj", "int8:channel", {"weights": "int8:channel"}),
        ("a.b-c.0", "int8:channel,int8", {"weights": "int8:channel", "activations": "int8"}),
        ("a.0.b", "activations=none", {"activations": "none"}),
        (
            "a",
            "int4:absmax,none,rounding=gptq",
            {"weights": "int4:absmax", "activations": "none", "rounding": "gptq"},
        ),
        (
            "a",
            " rounding=qronos , permutation=zigzag ",
            {"rounding": "qronos", "permutation": "zigzag"},
        ),
        ("a", "permutation=auto,weights=mxfp4", {"weights": "mxfp4", "permutation": "auto"}),
        (
            "a",
            "codebook(-1,0,1):channel,int8",
            {"weights": "codebook(-1,0,1):channel", "activations": "int8"},
        ),
        (r"re:.*\.(?=down)down_(?<=n_)proj{1,2}", "keep", {"keep": True}),
        ("re:(?!lm_head)x|y,z", "int3:group32", {"weights": "int3:group32"}),
        (
            "v_proj",
            "int8,rounding=gptq,optional",
            {"weights": "int8", "rounding": "gptq", "optional": True},
        ),
        ("v_proj", "keep,optional", {"keep": True, "optional": True}),
    ],
)
def test_a_rule_in_one_line(pattern, settings, fields):
    text = f"{pattern}={settings}"
    rule = LayerRule.parse(text)
    assert rule == LayerRule(pattern, **fields)
    assert LayerRule.parse(str(rule)) == rule
    recipe = Recipe(layers=(rule,), keep=("lm_head", "re:.*gate"))
    assert recipe == Recipe(layers=[text], keep=["lm_head", "re:.*gate"])
    assert recipe == Recipe.from_toml(recipe.to_toml()) == Recipe.from_dict(recipe.to_dict())
    assert hash(recipe) == hash(Recipe.from_toml(recipe.to_toml()))


def test_rules_as_tables():
    recipe = Recipe.from_toml(
        """
        keep = ["lm_head"]
        [[layers]]
        pattern = "re:.*down_proj"
        weights = "int8:channel"
        [[layers]]
        pattern = "model.layers.29"
        keep = true
        """
    )
    assert [str(rule) for rule in recipe.layers] == [
        "re:.*down_proj=int8:channel:symmetric:mse:float32",
        "model.layers.29=keep",
    ]
    assert recipe.keep == ("lm_head",)
    assert "layers" not in Recipe().to_dict()
    assert "keep" not in Recipe().to_dict()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": ["down_proj"]}, "a rule for layers must be pattern=weights.*got 'down_proj'"),
        ({"layers": ["a=int4,int8,int8"]}, "got 'int8' in 'a=int4,int8,int8'"),
        ({"layers": ["a=int4,weights=int4"]}, "got 'weights=int4' in"),
        ({"layers": ["a=bits=4"]}, "got 'bits=4'"),
        ({"layers": ["a="]}, "got ''"),
        ({"layers": ["a=none"]}, "the rule for 'a': unknown format 'none'"),
        ({"layers": ["a=keep,int8"]}, "the rule for 'a': keep leaves .* weights must be left out"),
        ({"layers": ["a=keep,keep"]}, "unknown format 'keep'"),
        ({"layers": ["a=optional"]}, "the rule for 'a': one of weights, .* or keep must be"),
        ({"layers": [{"pattern": "a", "keep": True, "optional": 1}]}, "optional must be true or"),
        ({"layers": ["a=int4:token"]}, "the rule for 'a': weights can't be scaled by token"),
        ({"layers": ["a=int4,int8:channel"]}, "the rule for 'a': activations can't be scaled by"),
        ({"layers": ["a=rounding=up"]}, "the rule for 'a': rounding must be one of nearest"),
        ({"layers": ["a=permutation=up"]}, "the rule for 'a': permutation must be one of"),
        ({"layers": ["*.down_proj=int4"]}, "pattern of a rule must be parts of a layer's path"),
        ({"layers": ["re:(=int4"]}, "pattern of a rule must be a regular expression"),
        ({"layers": [{"pattern": "re:a=b", "keep": True}]}, "must not contain '='"),
        ({"layers": [{"pattern": "a"}]}, "the rule for 'a': one of weights, .* or keep must be"),
        ({"layers": [{"pattern": "a", "keep": True, "rounding": "gptq"}]}, "rounding must be left"),
        ({"layers": [{"pattern": "a", "keep": 1}]}, "keep must be true or false, got 1"),
        ({"layers": [{"pattern": "a", "weights": 4}]}, "weights must be a QuantSpec, got int"),
        ({"layers": [{"pattern": "a", "bits": 4}]}, "keys of pattern, .*got the key 'bits'"),
        ({"layers": [{"weights": "int4"}]}, "got one without a pattern"),
        ({"layers": [4]}, "layers must be rules, got int"),
        ({"layers": "a=int4"}, "layers must be a list, got 'a=int4'"),
        ({"keep": "lm_head"}, "keep must be a list, got 'lm_head'"),
        ({"keep": [""]}, "a pattern of keep must be parts"),
        ({"keep": [4]}, "a pattern of keep must be parts"),
    ],
)
def test_bad_rules(fields, words):
    with pytest.raises(cq.RecipeError, match=words):
        Recipe(**fields)


def test_patterns_name_consecutive_parts_of_a_path():
    name = "model.layers.2.mlp.down_proj"
    matching = ("down_proj", "mlp", "mlp.down_proj", "layers.2", "model.layers.2", "model", name)
    matching += ("re:.*down_proj", "re:model.layers.2", r"re:.*\.\d\.mlp", "re:")
    other = ("down", "proj", "layers.20", "2.down_proj", "re:down_proj", "re:.*down_proj.")
    assert all(is_match(pattern, name) for pattern in matching)
    assert not any(is_match(pattern, name) for pattern in other)


def test_rules_apply_in_their_order_and_the_last_word_counts():
    recipe = Recipe(
        weights="int4:group32", activations="none", rounding="gptq",
        layers=(
            "mlp=int8:channel,int8", "layers.1=keep", "layers.1.mlp.up=int3:channel",
            "up=rounding=nearest", "layers.2=rounding=qronos,activations=none", "layers.3=keep",
            "layers.3=rounding=qronos",
        ),
        keep=("layers.4",),
    )  # fmt: skip

    def found(layer):
        s = recipe.settings_of(layer)
        return (
            s.weights and s.weights.format.name,
            s.activations and str(s.activations),
            (s.options.method),
        )

    assert found("layers.0.attn.q") == ("int4", None, "gptq")
    assert found("layers.0.mlp.down") == ("int8", "int8:token:symmetric", "gptq")
    assert found("layers.0.mlp.up") == ("int8", "int8:token:symmetric", "nearest")
    assert recipe.settings_of("layers.1.mlp.down") is FLOAT
    assert found("layers.1.mlp.up") == ("int3", "int8:token:symmetric", "nearest")
    assert found("layers.2.mlp.up") == ("int8", None, "qronos")
    assert recipe.settings_of("layers.2.mlp.up").options.damping == 1e-4
    assert recipe.settings_of("layers.3.attn.q") is FLOAT
    assert recipe.settings_of("layers.4.mlp.up") is FLOAT


def test_options_that_a_rule_does_not_take_are_left_out():
    recipe = Recipe(
        rounding="gptq", damping=0.05, correction=0.25, refit=True, magr=0.001, fit_scales=True,
        weights="int4:group32", reference="model",
        layers=("a=rounding=qronos", "b=rounding=nearest", "c=mxfp4", "d=int8:channel"),
    )  # fmt: skip
    a, b, c, d = (recipe.settings_of(name).options for name in "abcd")
    assert (a.damping, a.correction, a.refit, a.magr, a.fit_scales) == (None, 0, True, 0.001, True)
    assert (b.damping, b.correction, b.refit, b.magr, b.fit_scales) == (None, 0, False, 0, True)
    assert (c.damping, c.correction, c.refit, c.fit_scales) == (0.05, 0.25, True, False)
    assert (d.damping, d.correction, d.refit, d.fit_scales) == (0.05, 0.25, False, True)


def test_a_rule_keeps_to_an_accumulator_or_is_refused():
    fields = {"rounding": "gptq", "accumulator": "20", "activations": "int4"}
    recipe = Recipe(**fields, layers=("a=int4:channel,int8", "b=rounding=nearest", "c=int4,none"))
    assert recipe.settings_of("x").options.accumulator.activation.name == "int4"
    assert recipe.settings_of("a").options.accumulator.activation.name == "int8"
    with pytest.raises(cq.RecipeError, match="layers, for b: accumulator needs method"):
        recipe.settings_of("b")
    with pytest.raises(cq.RecipeError, match="layers, for c: accumulator must be None"):
        recipe.settings_of("c")


@pytest.mark.parametrize(
    ("weights", "scales"),
    [
        ("int4:group32", "float32"),
        ("int4:group32:bfloat16", "bfloat16"),
        ("int4:group32:float16", "float16"),
        ("int4:group32:pow2", "float32"),
        ("mxfp4", "bfloat16"),
        ("nvfp4", "bfloat16"),
    ],
)
def test_scales_of_a_rule_are_in_the_recipe_s_format(weights, scales):
    rules = ["a=int8:channel", "b=int8:channel:pow2", "c=mxfp4", LayerRule("d", "int8:channel")]
    recipe = Recipe(weights=weights, layers=rules)
    found = [recipe.settings_of(name).weights.scale_format.value for name in "abcd"]
    assert found == [scales, "pow2", "e8m0", "float32"]
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert [LayerRule.parse(str(rule)) for rule in recipe.layers] == list(recipe.layers)


def test_rules_are_added_to_a_preset_s(monkeypatch):
    preset = find_preset("w4a16")
    own = {**preset.recipe, "layers": ["down_proj=int8:channel"], "keep": ["layers.0"]}
    monkeypatch.setattr(
        "corequant.recipe.model.find_preset", lambda name: replace(preset, recipe=own)
    )
    recipe = Recipe.preset("w4a16", layers=["layers.1=keep"], keep=["layers.2"])
    assert [rule.pattern for rule in recipe.layers] == ["down_proj", "layers.1"]
    assert recipe.keep == ("layers.0", "layers.2")
    other = Recipe.preset("w4a16", layers=["layers.1=keep"], weights="int8:channel")
    assert [rule.pattern for rule in other.layers] == ["layers.1"]
    assert not other.refit
