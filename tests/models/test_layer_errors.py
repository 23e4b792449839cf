"""Each quantized layer alone: its error, and the divergence that it causes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.inspection.clipping import clipped_tokens, clipped_weights
from corequant_transformers.inspection.matching import find_choices, match_channels, transformed
from corequant_transformers.model.forward import check_tokens

RECIPES = {
    "merged": Recipe(block_size=16, permutation="energydiff", factors="scales"),
    "signs": Recipe(block_size=16, permutation="massdiff", factors="signs", rounding="qronos"),
    "online": Recipe(rotation="online", block_size=16, permutation="massdiff"),
    "heads": Recipe(rotation="heads", activations=None, head_block_size=8),
    "offline": Recipe(rotation="offline", weights="int4:group16", activations=None),
    "some": Recipe(
        block_size=16, keep=("layers.1.mlp.down_proj",), layers=("q_proj=int8:channel",)
    ),
}
KINDS = [
    ("llama", "merged"),
    ("llama", "signs"),
    ("llama", "online"),
    ("llama", "heads"),
    ("llama", "some"),
    ("qwen3", "offline"),
    ("gpt2", "merged"),
    ("gemma2", "merged"),
    ("mixtral", "merged"),
    ("opt", "online"),
]


def made(kind, recipe, tokens):
    model = cqhf.tiny_model(kind)
    if kind in ("gpt2", "opt"):
        recipe = Recipe.from_dict({**recipe.to_dict(), "factors": "none"})
    return model, cqhf.quantize(model, recipe, tokens)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_choices_are_found_again(kind, name, tokens):
    model, result = made(kind, RECIPES[name], tokens)
    found = find_choices(result.plan, result.model, model, result.report["signs"]["draw"])
    assert found.permutations.keys() == result.choices.permutations.keys()
    for region, order in result.choices.permutations.items():
        assert np.array_equal(found.permutations[region], order)
    assert found.factors.keys() == result.choices.factors.keys()
    for region, factors in result.choices.factors.items():
        assert np.allclose(found.factors[region], factors, rtol=0.1)
    # Whatever was found, the function is the float model's.
    ids = torch.from_numpy(tokens)
    same = transformed(model, result.plan, found)(input_ids=ids).logits
    assert torch.allclose(same, model(input_ids=ids).logits, atol=1e-4)


def layers_by_hand(model, result, tokens, name):
    """Exchange a layer of the transformed model itself, and compare logits in float64."""
    alone = transformed(model, result.plan, result.choices)
    layer = alone.get_submodule(name)
    layer._forward_pre_hooks.clear()
    alone.set_submodule(name, copy.deepcopy(result.model.get_submodule(name)))
    ids = torch.from_numpy(tokens)
    p = model(input_ids=ids).logits.double().log_softmax(-1)[:, :-1]
    q = alone(input_ids=ids).logits.double().log_softmax(-1)[:, :-1]
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_divergence_of_one_layer(kind, tokens):
    recipe = Recipe(block_size=16, dtype="float32", permutation="massdiff")
    model, result = made(kind, recipe, tokens)
    found = cqhf.layer_errors(result, model, tokens)
    assert [layer.name for layer in found.layers] == [m.name for m in result.plan.quantized]
    whole = cqhf.evaluate(result.model, tokens, against=model).divergence
    assert found.kl == pytest.approx(whole.kl, rel=1e-4)
    assert found.kl_se == pytest.approx(whole.kl_se, rel=1e-4)
    for layer in found.layers:
        wanted = layers_by_hand(model, result, tokens, layer.name)
        assert layer.kl == pytest.approx(wanted, rel=1e-3)
        assert layer.tokens == (tokens.size,)


def test_errors_of_a_layer_by_hand(tokens):
    recipe = Recipe(block_size=16, dtype="float32", weights="int3:channel:mse")
    model, result = made("llama", recipe, tokens)
    found = cqhf.layer_errors(result, model, tokens)
    name = "model.layers.1.mlp.down_proj"
    layer, own = found.layer(name), result.model.get_submodule(name)
    reference = transformed(model, result.plan, result.choices)
    plain, seen = reference.get_submodule(name), []
    handle = plain.register_forward_hook(
        lambda module, args, output: seen.append((args[0], output))
    )
    reference(input_ids=torch.from_numpy(tokens))
    handle.remove()
    x, y = seen[0]
    z = cq.fake_quantize(x, own.activations)
    wrong = torch.nn.functional.linear(z, own.weight) - y
    assert layer.output_error == pytest.approx(float(wrong.norm() / y.norm()), rel=1e-3)
    by_weight = (torch.nn.functional.linear(x, own.weight) - y).square().sum()
    by_input = (torch.nn.functional.linear(z, plain.weight) - y).square().sum()
    share = float(by_weight / (by_weight + by_input))
    assert layer.weight_share == pytest.approx(share, rel=1e-3)
    W = plain.weight
    assert layer.weight_error == pytest.approx(float((own.weight - W).norm() / W.norm()), rel=1e-3)
    delta = np.median(cq.mass_concentration(x.reshape(-1, x.shape[-1]).numpy()))
    assert layer.concentration == pytest.approx(delta, rel=1e-3)
    # Beyond the largest code by more than half a step, channel by channel.
    scales = own.quantized.scales
    beyond = (W.numpy() > 3.5001 * scales) | (W.numpy() < -4.5001 * scales)
    assert layer.weights_clipped == pytest.approx(float(beyond.mean()), abs=1e-6)
    assert beyond.any()
    assert layer.activations_clipped == 0


def test_keeping_the_worst_layers(tokens):
    model, result = made("llama", RECIPES["merged"], tokens)
    found = cqhf.layer_errors(result, model, tokens, keep=3)
    order = sorted(found.layers, key=lambda layer: -layer.kl)
    assert list(found.worth_keeping) == [layer.name for layer in order[:3]]
    assert found.kl_kept < found.kl
    everything = cqhf.layer_errors(result, model, tokens, keep=100)
    assert len(everything.worth_keeping) == 14
    # What is left is the rest's bfloat16.
    assert everything.kl_kept < 1e-4 < found.kl


def test_sizes_of_what_is_kept(tokens):
    model, result = made("qwen3", RECIPES["offline"], tokens)
    layer = cqhf.layer_errors(result, model, tokens).layer("model.layers.0.mlp.down_proj")
    count, scales = 48 * 96, 48 * 6
    bits = result.plan.quantized[0].weights.scale_format.bits
    assert layer.kept_bytes == 2 * count - (count // 2 + scales * bits // 8)
    assert layer.wider == "model.layers.0.mlp.down_proj=int8:group16"
    assert layer.wider_bytes == count // 2


def test_a_directory_is_as_the_result(tokens, tmp_path):
    model, result = made("llama", RECIPES["merged"], tokens)
    result.save(tmp_path / "out")
    model.save_pretrained(tmp_path / "model")
    phases = []
    found = cqhf.layer_errors(
        tmp_path / "out", tmp_path / "model", tokens, progress=lambda *step: phases.append(step)
    )
    assert found == cqhf.layer_errors(result, model, tokens)
    assert phases[-1] == ("layers", 14, 14)


def test_experts_count_together(tokens):
    model, result = made("mixtral", RECIPES["merged"], tokens)
    found = cqhf.layer_errors(result, model, tokens)
    assert len(found.layers) == 2 * (4 + 3)
    experts = next(x for x in found.layers if x.name.endswith("down_proj") or "w2" in x.name)
    assert len(experts.layers) == len(experts.tokens) == 4
    assert sum(experts.tokens) == 2 * tokens.size
    recipe = Recipe.from_dict({**result.plan.recipe.to_dict(), "keep": [experts.name]})
    kept = {m.name for m in result.plan.quantized} - {
        m.name for m in cqhf.plan(model, recipe).quantized
    }
    assert kept == set(experts.layers)


def test_rules_are_carried_out(tokens):
    model, result = made("llama", RECIPES["merged"], tokens)
    found = cqhf.layer_errors(result, model, tokens)
    for layer in found.layers:
        recipe = Recipe.from_dict({**result.plan.recipe.to_dict(), "layers": [layer.wider]})
        plan = cqhf.plan(model, recipe)
        assert {m.name for m in plan.quantized if m.weights.format.bits == 8} == {layer.name}


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head(tied, tokens):
    recipe = Recipe(
        rotation="heads", activations=None, embeddings="int4:channel", head="int4:channel"
    )
    model = cqhf.tiny_model("llama", tie_word_embeddings=tied)
    result = cqhf.quantize(model, recipe, tokens)
    assert result.plan.tied == tied
    found = cqhf.layer_errors(result, model, tokens, keep=16)
    head, embedding = "lm_head", "model.embed_tokens"
    name = r"re:(model\.embed_tokens|lm_head)$" if tied else embedding
    assert {layer.name for layer in found.layers} >= {name if tied else head, name}
    for layer in (found.layer(name), found.layer(name if tied else head)):
        assert 0.01 < layer.output_error < 0.3
        assert layer.kl > 1e-4
        assert layer.kept_bytes == 2 * 128 * 48 - 128 * 48 // 2 - 128 * 4
        assert layer.wider is None
    assert found.kl_kept < 1e-4
    kept = Recipe.from_dict({**recipe.to_dict(), "keep": [name]})
    assert cqhf.plan(model, kept).tied == tied
    assert len(cqhf.plan(model, kept).quantized) == 14 + (not tied)


def test_another_model_is_refused(tokens):
    model, result = made("llama", RECIPES["merged"], tokens)
    with pytest.raises(cq.CheckpointError, match="against must be the float model .* another matr"):
        cqhf.layer_errors(result, cqhf.tiny_model("llama", seed=1), tokens)
    wide = cqhf.tiny_model("llama", intermediate_size=128)
    with pytest.raises(cq.CheckpointError, match=r"of \(96, 48\), got one of \(128, 48\)"):
        cqhf.layer_errors(result, wide, tokens)
    with pytest.raises(cq.CheckpointError, match="quantized already"):
        cqhf.layer_errors(result, result.model, tokens)
    with pytest.raises(cq.CalibrationError, match="token ids"):
        cqhf.layer_errors(result, model, check_tokens(np.full((1, 8), 500)))


def test_channels_without_weights():
    W = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    W[[1, 4]] = 0
    order = np.array([5, 4, 1, 0, 3, 2])
    found, factors = match_channels([(W[order], W, 1)], signed=True)
    assert sorted(found) == list(range(6))
    assert np.array_equal(W[found], W[order])
    assert factors == pytest.approx(1)


@pytest.mark.parametrize("spec", ["int4:token:asymmetric", "int8:token", "mxfp4", "nvfp4"])
def test_what_the_range_holds_is_not_clipped(spec):
    x = np.random.default_rng(0).standard_t(3, (32, 64)).astype(np.float32)
    assert clipped_tokens(x, cq.QuantSpec.parse(spec) if ":" in spec else cq.presets[spec]) < 0.02
    if ":" in spec:
        assert clipped_tokens(x, cq.QuantSpec.parse(spec)) == 0


def test_groups_that_are_clipped():
    W = np.array([[1.0, 2, 3, 30, 1, 2, 3, 4]], np.float32)
    q = cq.quantize(W, "int4:group4:symmetric")
    narrow = cq.QuantizedTensor(q.codes, q.scales / 4, None, q.spec)
    assert clipped_weights(W, q) == 0
    assert clipped_weights(W, narrow) == pytest.approx(
        np.mean(np.abs(W.reshape(2, 4) / narrow.scales.reshape(2, 1)) > 7.6)
    )
