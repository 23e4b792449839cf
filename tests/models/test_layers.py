"""Layers of a model that are quantized otherwise than the rest, or left in float."""

from __future__ import annotations

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_name

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant.storage.gguf import decode_blocks
from corequant_transformers.checkpoint.reader import Stored
from corequant_transformers.model.quantized_linear import QuantizedLinear
from tests import capabilities
from tests.models.llamacpp import serving
from tests.models.test_export import check_equal, load, logits
from tests.models.test_gguf_files import VOCABULARY, log_probabilities, spoken, write_model
from tests.models.test_gguf_files import quantized as gguf_quantized
from tests.models.test_streaming import digest, write
from tests.models.vllmlayout import FUSED, check_layout

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
LAST = "model.layers.2"
MIXED = {
    "weights": "int4:group16",
    "activations": "none",
    "rounding": "qronos",
    "layers": ("re:.*down_proj=int8:channel",),
    "keep": (LAST, "lm_head"),
}
ONLINE = {**MIXED, "block_size": 16}
OFFLINE = {**MIXED, "rotation": "offline"}


def spec_of(name):
    if name.startswith(LAST):
        return None
    return "int8:channel:symmetric:mse" if name.endswith("down_proj") else "int4:group16:mse"


def linear_layers(model):
    return {n: m for n, m in model.named_modules() if ".layers." in n and hasattr(m, "weight")
            and m.weight.ndim == 2}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("float") / "model", **SIZES)


@pytest.fixture(scope="module")
def whole(source, tokens, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "own"
    cqhf.quantize(source, Recipe(**ONLINE), tokens, output)
    return output


@pytest.fixture(scope="module")
def offline(source, tokens, tmp_path_factory):
    output = tmp_path_factory.mktemp("offline") / "own"
    cqhf.quantize(source, Recipe(**OFFLINE), tokens, output)
    return output


def test_each_layer_has_what_its_rule_says(whole, source):
    model, stored = cqhf.load(whole), Stored(whole)
    layers = linear_layers(model)
    assert len(layers) == 21
    for name, layer in layers.items():
        spec = spec_of(name)
        assert isinstance(layer, QuantizedLinear) == (spec is not None)
        if spec is not None:
            assert layer.quantized.spec == cq.QuantSpec.parse(spec)
            assert layer.rotation == (16 if name.endswith("down_proj") else None)
    assert {m.name for m in stored.plan.quantized} == {n for n in layers if spec_of(n)}
    # The rotations around the block that is kept are in its weights, which are in bfloat16.
    float_model = cqhf.Source(source).load()
    kept, before = layers[f"{LAST}.mlp.down_proj"].weight, float_model.model.layers[2].mlp.down_proj
    torch.testing.assert_close(kept.norm(dim=0), before.weight.norm(dim=0), rtol=2**-9, atol=0)
    report = json.loads((whole / "report.json").read_text())
    assert [m["name"] for m in report["matrices"]] == [m.name for m in stored.plan.quantized]
    assert report["verification"]["logits_error"] < 1e-9
    assert report["recipe"]["keep"] == [LAST, "lm_head"]


def test_a_run_in_memory_gives_the_same_bytes(whole, source, tokens, tmp_path):
    model = cqhf.tiny_model("llama", **SIZES)
    made = cqhf.quantize(model, Recipe(**ONLINE), tokens, tmp_path / "own")
    written = (tmp_path / "own/corequant.safetensors").read_bytes()
    assert written == (whole / "corequant.safetensors").read_bytes()
    again, loaded = (linear_layers(m) for m in (made.model, cqhf.load(whole)))
    for name, layer in again.items():
        assert torch.equal(layer.weight, loaded[name].weight)


KILLED = """
import os, sys
import gguf
import numpy as np
import corequant_transformers as cqhf
from corequant.recipe import Recipe

source, output, recipe = sys.argv[1:]
tokens = np.random.default_rng(0).integers(0, 128, (3, 48))
stop = lambda event: os.kill(os.getpid(), 9) if event["step"] == "block-00001" else None
cqhf.quantize(source, Recipe.from_toml(recipe), tokens, output, events=stop)
"""


@capabilities.forks
def test_a_killed_run_goes_on_to_the_same_bytes(whole, source, tokens, tmp_path):
    recipe, output = Recipe(**ONLINE), tmp_path / "own"
    arguments = [str(source), str(output), recipe.to_toml()]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert killed.returncode == -9
    assert not output.exists()
    other = Recipe(**{**ONLINE, "layers": ("down_proj=int8:tensor",)})
    with pytest.raises(cq.RunError, match=r"recipe\.layers must be as when the run was begun"):
        cqhf.quantize(source, other, tokens, output, resume=True)
    seen = []
    cqhf.quantize(source, recipe, tokens, output, resume=True, events=seen.append)
    assert [event["step"] for event in seen] == ["block-00002", "exit"]
    assert digest(output) == digest(whole)


def test_a_stopped_run_for_vllm_goes_on_to_what_an_export_makes(offline, source, tokens, tmp_path):
    def stop(event):
        if event["step"] == "block-00001":
            raise KeyboardInterrupt

    recipe, output = Recipe(**OFFLINE), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        cqhf.quantize(source, recipe, tokens, output, reader="vllm", events=stop)
    assert not output.exists()
    cqhf.quantize(source, recipe, tokens, output, reader="vllm", resume=True)
    assert digest(output) == digest(cqhf.export(offline, tmp_path / "exported"))


@pytest.mark.parametrize("kind", ["offline", "whole"])
def test_transformers_loads_a_group_for_each_scheme(kind, tokens, tmp_path, request):
    own = request.getfixturevalue(kind)
    out = cqhf.export(own, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    names = {True: set(), False: set()}
    for name in linear_layers(cqhf.load(own)):
        if spec_of(name):
            names[name.endswith("down_proj")].add(name)
    groups = config["config_groups"]
    assert [set(g["targets"]) for g in groups.values()] == [names[False], names[True]]
    assert [g["weights"]["num_bits"] for g in groups.values()] == [4, 8]
    kept = {n for n in linear_layers(cqhf.load(own)) if not spec_of(n)}
    assert set(config["ignore"]) == kept | {"lm_head"}
    check_equal(own, out, tokens)
    theirs, ours = load(out), cqhf.load(own)
    for name in (*kept, "lm_head"):
        assert torch.equal(theirs.get_submodule(name).weight, ours.get_submodule(name).weight)


def test_what_vllm_multiplies_by_at_once_has_one_scheme(offline, tokens, tmp_path):
    """Each of its layers is found in one group by every matrix that it holds, or in none."""
    out = cqhf.export(offline, tmp_path / "out")
    values = json.loads((out / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(values)
    assert config.format == "pack-quantized"
    named = {name: group.targets for name, group in config.config_groups.items()}
    named["ignored"] = config.ignore
    for block in range(3):
        for layer, parts in FUSED.items():
            wanted = ["ignored" if block == 2 else f"group_{int(layer == 'mlp.down_proj')}"]
            for part in parts:
                path = f"model.layers.{block}.{part}"
                found = [n for n in named if any(match_name(path, t) for t in named[n])]
                assert found == wanted
    check_layout(offline, out)


def test_schemes_of_several_formats_are_mixed_precision(source, tokens, tmp_path):
    recipe = {**OFFLINE, "rounding": "nearest", "layers": ("down_proj=int8:channel,int8",)}
    cqhf.quantize(source, Recipe(**recipe), tokens, tmp_path / "own")
    out = cqhf.export(tmp_path / "own", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    formats = [g["format"] for g in config["config_groups"].values()]
    assert formats == ["pack-quantized", "int-quantized"]
    check_equal(tmp_path / "own", out, tokens)


def test_scales_of_several_dtypes_are_refused(source, tokens, tmp_path):
    layers = ("down_proj=int8:channel:bfloat16",)
    recipe = {**OFFLINE, "rounding": "nearest", "layers": layers}
    cqhf.quantize(source, Recipe(**recipe), tokens, tmp_path / "own")
    with pytest.raises(
        cq.SpecError, match=r"scales of all layers must be of one format.*down_proj"
    ):
        cqhf.export(tmp_path / "own", tmp_path / "out")


def test_gguf_has_a_type_for_each_tensor(tmp_path):
    rules = {"weights": "int4:group32:float16", "layers": ["down_proj=int8:group32"]}
    source = write_model(tmp_path / "source")
    own = gguf_quantized(tmp_path / "own", source, **rules, keep=["model.layers.1"])
    file = cqhf.export(own, tmp_path / "model.gguf", "gguf")
    stored, reader = Stored(own), gguf.GGUFReader(file)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    found = {t.name: t for t in reader.tensors}
    kinds = {name: t.tensor_type.name for name, t in found.items() if len(t.shape) == 2}
    assert {k for n, k in kinds.items() if n.startswith("blk.0.")} == {"Q4_0", "Q8_0"}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert {k for n, k in kinds.items() if n.startswith("blk.1.")} == {kinds["output.weight"]}
    for name, kind in (("down", "Q8_0"), ("up", "Q4_0")):
        row = next(m for m in stored.plan.quantized if m.name.endswith(f"{name}_proj"))
        blocks = found[f"blk.0.ffn_{name}.weight"].data
        meant = cq.dequantize(stored.quantized(row))
        np.testing.assert_array_equal(decode_blocks(blocks, kind), meant)
    model = cqhf.load(own)
    _, ids = spoken(model, cqhf.load_tokenizer(own))
    with serving(file, VOCABULARY) as next_token:
        assert np.abs(next_token(ids) - log_probabilities(model, ids)).mean() <= 0.05


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral", "opt"])
@pytest.mark.parametrize("rotation", ["merged", "online", "offline"])
def test_a_model_with_kept_layers_computes_the_same(kind, rotation, tokens):
    """A layer that is kept isn't rotated at run time, and the others are as without it."""
    model = cqhf.tiny_model(kind)
    fields = {"rotation": rotation, "weights": "int8:group16", "activations": "none"}
    sizes = {"merged": {"block_size": 16, "head_block_size": 4}, "online": {"block_size": 16}}
    fields |= sizes.get(rotation, {})
    plain = cqhf.plan(model, Recipe(**fields))
    kept = {
        next(m.name for m in plain.matrices if m.block == 1 and m.role == role)
        for role in ("mlp_output", "attention_output", "attention_input")
    }
    result = cqhf.quantize(model, Recipe(**fields, keep=tuple(sorted(kept))), tokens)
    assert result.verification.logits_error < 1e-9
    online, before = ({m.name for m in p.online} for p in (result.plan, plain))
    assert online == before - kept
    for name in kept:
        assert not isinstance(result.model.get_submodule(name), QuantizedLinear)
    expected, found = logits(model, tokens), logits(result.model, tokens)
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    # A token may visit another expert.
    assert error.median() < 0.03


def test_rules_leave_other_layers_as_they_are(tokens):
    """Rounded to nearest, a layer has the codes of a recipe that is all like its rule."""
    plain = {"permutation": "identity", "block_size": 16, "activations": "int8"}
    model = cqhf.tiny_model("llama")
    rules = ("re:.*down_proj=int8:group16", "layers.1.mlp.down_proj=keep", "k_proj=int3:tensor")
    mixed, four, eight, three = (
        cqhf.quantize(model, Recipe(**plain, **fields), tokens).model
        for fields in (
            {"weights": "int4:channel", "layers": rules},
            {"weights": "int4:channel"},
            {"weights": "int8:group16"},
            {"weights": "int3:tensor"},
        )
    )
    for name, layer in linear_layers(mixed).items():
        like = {"down_proj": eight, "k_proj": three}.get(name.rpartition(".")[2], four)
        if name == "model.layers.1.mlp.down_proj":
            assert not isinstance(layer, QuantizedLinear)
            continue
        np.testing.assert_array_equal(
            layer.quantized.codes, like.get_submodule(name).quantized.codes
        )
        assert str(layer.activations) == "int8:token:symmetric"


def test_rounding_and_permutation_of_some_layers(tokens):
    rules = ("down_proj=rounding=gptq,permutation=zigzag", "layers.1=rounding=nearest")
    result = cqhf.quantize(
        cqhf.tiny_model("llama"),
        Recipe(block_size=16, rounding="qronos", damping=0.01, layers=rules),
        tokens,
    )
    methods = {m["name"]: m["method"] for m in result.report["matrices"]}
    assert methods.pop("model.layers.0.mlp.down_proj") == "gptq"
    assert {m for n, m in methods.items() if ".0." in n} == {"qronos"}
    assert {m for n, m in methods.items() if ".1." in n} == {"nearest"}
    rows = {m.name: m for m in result.plan.quantized}
    assert rows["model.layers.0.mlp.down_proj"].options.damping is None
    assert rows["model.layers.0.mlp.up_proj"].options.damping == 0.01
    assert [r["permutation"] for r in result.report["regions"]] == ["zigzag", "zigzag"]


@pytest.mark.parametrize(
    "fields",
    [
        {"block_size": "auto", "permutation": "auto", "factors": "scales", "sign_trials": 2},
        {"rounding": "gptq", "accumulator": "24", "block_size": 16},
        {"rounding": "qronos", "reference": "model", "block_size": 16, "head_block_size": 4},
        {"rounding": "nearest", "fit_scales": True, "block_size": 16},
    ],
)
def test_a_block_with_nothing_to_quantize(fields, tokens):
    recipe = Recipe(**fields, keep=("model.layers.0",))
    result = cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens)
    assert all(".1." in row["name"] for row in result.report["matrices"])
    assert result.verification.rotations_online == 1
    assert all(".1." in row["name"] for row in result.report["regions"])


def test_a_rule_for_the_weights_of_some_layers_keeps_the_recipe_s_options(tokens):
    recipe = Recipe(
        block_size=16, rounding="gptq", refit=True, fit_scales=True, weights="int4:group16",
        layers=("down_proj=int8:tensor",),
    )  # fmt: skip
    result = cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens)
    options = {m.name.rpartition(".")[2]: m.options for m in result.plan.quantized}
    assert (options["up_proj"].refit, options["up_proj"].fit_scales) == (True, True)
    assert (options["down_proj"].refit, options["down_proj"].fit_scales) == (False, False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"keep": ("lm_heads",)},
            r"keep must name layers, got 'lm_heads'.* of model\.embed_tokens",
        ),
        ({"layers": ("down=int8",)}, r"none of .*model\.layers\.{0\.\.1}\.mlp\.down_proj"),
        (
            {"layers": ("lm_head=int8",)},
            "for embedding and head set .* and 'head'.*, got 'lm_head'",
        ),
        ({"layers": ("re:down=int8",)}, "must name linear layers"),
        ({"keep": ("model.layers",)}, "leave a layer to quantize, got all 14 kept"),
        ({"layers": ("q_proj=int8,int8",)}, r"same activations.*\.q_proj.*\.k_proj; give a rule"),
        ({"layers": ("up_proj=permutation=zigzag",)}, "permutation of the rule for 'up_proj' must"),
        (
            {"layers": ("up_proj=rounding=nearest",), "rounding": "gptq", "accumulator": "24"},
            r"layers, for model\.layers\.0\.mlp\.up_proj: accumulator needs method",
        ),
    ],
)
def test_rules_that_cannot_be_carried_out(fields, words):
    with pytest.raises(cq.RecipeError, match=words):
        cqhf.plan(cqhf.tiny_model("llama"), Recipe(**fields))


def test_an_optional_rule_may_name_nothing():
    model = cqhf.tiny_model("llama")
    rules = ("c_attn=int8,optional", "v_proj=int8,optional", "lm_head=int8,optional")
    made = cqhf.plan(model, Recipe(layers=rules[:2]))
    assert [m.weights.format.name for m in made.matrices if m.name.endswith("v_proj")] == [
        "int8"
    ] * 2
    # A name that exists and cannot have the rule is an error all the same.
    with pytest.raises(cq.RecipeError, match="set .* and 'head'.*, got 'lm_head'"):
        cqhf.plan(model, Recipe(layers=rules))


def test_a_group_that_does_not_divide_a_layer_is_named():
    with pytest.raises(cq.BlockSizeError, match=r"group size of weights .* 36 for .*down_proj"):
        cqhf.plan(cqhf.tiny_model("llama"), Recipe(layers=("down_proj=int4:group36",)))


def test_a_plan_says_what_vllm_cannot_load():
    model = cqhf.tiny_model("llama")
    (note,) = cqhf.plan(model, Recipe(keep=("layers.1.self_attn.v_proj",))).notes
    assert "model.layers.1.self_attn.q_proj and model.layers.1.self_attn.v_proj into one" in note
    assert not cqhf.plan(model, Recipe(keep=("layers.1.self_attn",))).notes


def test_fates_tell_layers_apart():
    table = cqhf.plan(cqhf.tiny_model("llama"), Recipe(**{**ONLINE, "keep": ("layers.1",)}))
    rows = {row["name"]: row["fate"] for row in cqhf.fates(table)}
    assert rows["model.layers.0.mlp.down_proj.weight"].endswith(
        "rounded to int8:channel:symmetric:mse"
    )
    assert rows["model.layers.0.mlp.up_proj.weight"].endswith(
        "rounded to int4:group16:symmetric:mse"
    )
    assert rows["model.layers.1.mlp.down_proj.weight"].endswith("float")
    assert "run time" not in rows["model.layers.1.mlp.down_proj.weight"]
