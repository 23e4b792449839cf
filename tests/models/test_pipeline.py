"""Bad models, bad calibration and bad recipes: a typed error before work is lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.architectures.dimensions import dimensions_of
from corequant_transformers.model.text import token_windows


def run(model=None, tokens=None, **recipe):
    tokens = np.arange(64).reshape(2, 32) if tokens is None else tokens
    model = cqhf.tiny_model("llama") if model is None else model
    return cqhf.quantize(model, Recipe(**{"block_size": 16, **recipe}), tokens)


def test_same_seed_same_codes_other_seed_other_codes():
    first, second, third = (run(permutation="random", seed=s) for s in (1, 1, 2))
    name = "model.layers.0.mlp.down_proj"
    codes = [r.model.get_submodule(name).quantized.codes for r in (first, second, third)]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()


def test_global_generators_are_not_touched():
    torch.manual_seed(5)
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    run(permutation="random")
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(torch_state, torch.get_rng_state())


def test_calibration_is_reusable():
    model = cqhf.tiny_model("llama")
    tokens = np.arange(64).reshape(2, 32)
    data = cqhf.calibrate(model, Recipe(), tokens)
    direct, reused = run(model, tokens), run(model, data)
    for name, p in direct.choices.permutations.items():
        np.testing.assert_array_equal(p, reused.choices.permutations[name])


def test_statistics_are_those_of_what_down_reads():
    model = cqhf.tiny_model("llama")
    tokens = np.arange(64).reshape(2, 32)
    data = cqhf.calibrate(model, Recipe(), tokens)
    seen = []
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda m, a: seen.append(a[0].reshape(-1, 96).numpy()))
    with torch.no_grad():
        for window in tokens:
            model(torch.from_numpy(window)[None])
    handle.remove()
    found = data.statistics["model.layers.1.mlp.down_proj"]
    assert found.count == 64
    np.testing.assert_allclose(found.mean_abs, np.abs(np.concatenate(seen)).mean(0), rtol=1e-6)


def test_signs_are_those_whose_rounded_model_loses_least():
    model, tokens = cqhf.tiny_model("llama"), np.arange(96).reshape(2, 48)
    recipe = Recipe(permutation="identity", sign_trials=4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    data = cqhf.calibrate(model, recipe, tokens)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    single = [cqhf.quantize(model, recipe, replace(data, draw=k)) for k in range(4)]
    losses = [np.log(cqhf.evaluate(s.model, tokens[-1:]).perplexity) for s in single]
    np.testing.assert_allclose(data.draw_losses, losses, rtol=1e-3)
    assert len(set(data.draw_losses)) == 4
    assert data.draw == int(np.argmin(losses))
    result = cqhf.quantize(model, recipe, tokens)
    assert result.report["signs"] == {"draw": data.draw, "losses": list(data.draw_losses)}
    residual = [s.choices.factors["residual"] for s in single]
    np.testing.assert_array_equal(result.choices.factors["residual"], residual[data.draw])
    np.testing.assert_array_equal(residual[0], cq.random_signs(48, 0))
    assert not any(np.array_equal(residual[0], other) for other in residual[1:])


def test_fitted_scales_bring_outputs_closer(tmp_path):
    model, tokens = cqhf.tiny_model("llama"), np.arange(96).reshape(2, 48)
    plain, fitted = (
        cqhf.quantize(model, Recipe(block_size=16, fit_scales=flag), tokens)
        for flag in (False, True)
    )
    rows = fitted.report["matrices"]
    assert {r["method"] for r in rows} == {"nearest"}
    assert all(r["loss"] <= r["loss_nearest"] for r in rows)
    assert sum(r["loss"] for r in rows) < 0.8 * sum(r["loss_nearest"] for r in rows)
    name = "model.layers.0.self_attn.q_proj"
    before, after = (r.model.get_submodule(name).quantized for r in (plain, fitted))
    assert (before.scales != after.scales).any()
    again = cqhf.load(fitted.save(tmp_path / "out"))
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, fitted.model(ids).logits)


def test_nan_in_a_weight_names_it():
    model = cqhf.tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[4, 5] = torch.nan
    with pytest.raises(cq.NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight.*\(4, 5\)"):
        run(model)


def test_infinite_activations_name_layer_and_window():
    model = cqhf.tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data *= 1e38
    model.model.layers[1].mlp.gate_proj.weight.data *= 1e30
    with pytest.raises(
        cq.NonFiniteError, match=r"input of model\.layers\.1\.mlp\.down_proj in calibration window"
    ):
        run(model)


def test_infinite_activations_at_run_time_name_the_layer():
    result = run()
    result.model.model.embed_tokens.weight.data[3] = torch.inf
    with pytest.raises(cq.NonFiniteError, match=r"input of model\.layers\.0\.self_attn"):
        cqhf.evaluate(result.model, np.array([[3, 3, 3]]))


def test_unknown_architecture_says_what_to_describe():
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            "biogpt",
            hidden_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            intermediate_size=16,
            vocab_size=128,
        )
    )
    with pytest.raises(cq.ArchitectureError, match=r"got 'biogpt'; to describe another") as caught:
        run(model)
    lacking, placing = str(caught.value).split("Of Llama's parts it lacks ")[1].split("; ")
    assert lacking.startswith("embedding, final_norm, attention_norm, query, key, value")
    assert "biogpt.embed_tokens.weight" in placing
    assert "biogpt.layers.{}.self_attn.out_proj.bias" in placing


def test_a_description_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setitem(
        cqhf.architectures.known._KNOWN, "llama", cqhf.Architecture("llama", up="mlp.wrong")
    )
    with pytest.raises(cq.ArchitectureError, match=r"mlp\.wrong\.weight must have shape"):
        run()


def test_a_new_architecture_can_be_registered(monkeypatch):
    monkeypatch.setattr(cqhf.architectures.known, "_KNOWN", {})
    with pytest.raises(cq.ArchitectureError):
        run()
    cqhf.register(cqhf.Architecture("llama"))
    assert run().verification.logits_error < 1e-10
    with pytest.raises(TypeError):
        cqhf.register("llama")


@pytest.mark.parametrize(
    ("config", "recipe", "error", "words"),
    [
        ({}, {"block_size": 10}, cq.BlockSizeError, "intermediate_size=96.*divide d=96, got 10"),
        ({}, {"block_size": 6}, cq.HadamardOrderError, "intermediate_size=96.*got 6"),
        ({"hidden_size": 188}, {}, cq.HadamardOrderError, "hidden_size=188"),
        ({"head_dim": 6}, {}, cq.HadamardOrderError, "head_dim=6"),
        ({}, {"weights": "int4:group36"}, cq.BlockSizeError, "group size of weights.*36"),
        ({}, {"activations": "int4:group20"}, cq.BlockSizeError, "group size of activations"),
    ],
)
def test_sizes_that_do_not_fit(config, recipe, error, words):
    with pytest.raises(error, match=words):
        run(cqhf.tiny_model("llama", **config), **recipe)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_size", -4, "hidden_size must be a positive integer"),
        ("intermediate_size", None, "intermediate_size must be a positive integer"),
        ("num_key_value_heads", 3, "must divide num_attention_heads"),
    ],
)
def test_malformed_configs(field, value, words):
    class Config:
        model_type = "llama"
        hidden_size, intermediate_size, vocab_size = 48, 96, 128
        num_attention_heads, num_key_value_heads, num_hidden_layers = 4, 2, 2

    setattr(Config, field, value)
    with pytest.raises(cq.ArchitectureError, match=words):
        dimensions_of(Config)


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(c) % 128 for c in text]}


@pytest.mark.parametrize(
    ("text", "samples", "words"),
    [
        ("", 1, "must not be empty"),
        (" \n ", 1, "must not be empty"),
        ("short", 1, "must fill one window of sequence_length=16 tokens, got 5"),
        ("x" * 40, 4, "must fill 4 windows of 16 tokens, it has 40 tokens and fills 2"),
    ],
)
def test_text_that_is_too_short(text, samples, words):
    with pytest.raises(cq.CalibrationError, match=words):
        token_windows(text, Letters(), 16, samples)


def test_windows_are_consecutive_and_the_rest_is_dropped():
    windows = token_windows("abcdefgh", Letters(), 3)
    assert windows.tolist() == [[97, 98, 99], [100, 101, 102]]


@pytest.mark.parametrize(
    "tokens", [np.ones((2, 3)), np.ones(4, int), np.ones((0, 4), int), np.ones((3, 1), int)]
)
def test_bad_token_windows(tokens):
    with pytest.raises(cq.CalibrationError, match="token windows must be integers"):
        run(tokens=tokens)
    with pytest.raises(cq.CalibrationError, match="token windows must be integers"):
        cqhf.evaluate(cqhf.tiny_model("llama"), tokens)


def test_text_needs_a_tokenizer():
    with pytest.raises(TypeError, match="tokenizer must be given"):
        run(tokens="some text")
    with pytest.raises(TypeError, match="tokenizer must be given"):
        cqhf.evaluate(cqhf.tiny_model("llama"), "some text")


def test_perplexity_is_transformers_own_loss():
    model = cqhf.tiny_model("qwen3")
    tokens = np.random.default_rng(0).integers(0, 128, (3, 300 // 3))
    with torch.no_grad():
        losses = [
            float(model(input_ids=t[None], labels=t[None]).loss) for t in torch.from_numpy(tokens)
        ]
    found = cqhf.evaluate(model, tokens)
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)
    assert found.predicted == 3 * 99


def test_plan_costs():
    plan = cqhf.plan(cqhf.tiny_model("llama"), Recipe(block_size=16))
    cost = plan.cost()
    assert cost["online_rotations"] == 2
    # 96 channels, 4 butterfly stages, 2 layers.
    assert cost["online_additions_per_token"] == 96 * 4 * 2
    full = cqhf.plan(cqhf.tiny_model("llama"), Recipe()).cost()
    # 96 = 12 · 8: three stages and twelve additions.
    assert full["online_additions_per_token"] == 96 * 15 * 2
    assert cost["block_sizes"] == [2, 4, 8, 12, 16, 24, 32, 48, 96]


def test_automatic_block_sizes_are_the_least_within_tolerance():
    tokens = np.random.default_rng(0).integers(0, 128, (4, 64))
    chosen = {
        tolerance: run(
            cqhf.tiny_model("llama"),
            tokens,
            block_size="auto",
            tolerance=tolerance,
            permutation="energydiff",
        )
        for tolerance in (0.0, 1000.0)
    }
    assert chosen[1000.0].plan.recipe.block_size == (16, 16)
    assert all(a >= 16 for a in chosen[0.0].plan.recipe.block_size)
    for result in chosen.values():
        assert result.verification.logits_error < 1e-10
        rotations = tuple(m.input.rotation for m in result.plan.online)
        assert rotations == result.plan.recipe.block_size


def test_a_block_size_for_each_layer(tmp_path):
    recipe = Recipe(block_size=(16, 96))
    tokens = np.arange(64).reshape(2, 32)
    result = cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens, tmp_path / "out")
    loaded = cqhf.load(tmp_path / "out")
    assert [layer.mlp.down_proj.rotation for layer in loaded.model.layers] == [16, 96]
    assert list(result.choices.permutations) == ["model.layers.0.mlp.down_proj"]
    with pytest.raises(cq.RecipeError, match="one for each of 2 blocks, got 3"):
        run(block_size=(16, 16, 16))
