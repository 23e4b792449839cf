"""Zeros that stay zeros, and an identity that was chosen, are right; errors say what to do."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.model.parts import untie
from corequant_transformers.transforms import verification
from corequant_transformers.transforms.matrices import transform_model

RECIPES = {
    "merged": Recipe(block_size=16),
    "online": Recipe(block_size=16, rotation="online"),
    "offline": Recipe(rotation="offline", activations=None),
    "auto": Recipe(block_size="auto", permutation="auto", factors="scales"),
    "gptq": Recipe(block_size=16, rounding="gptq"),
    "qronos": Recipe(block_size=16, rounding="qronos"),
}
LAYERS = [
    *(f"layers.1.self_attn.{x}_proj" for x in "qkvo"),
    *(f"layers.1.mlp.{x}_proj" for x in ("gate", "up", "down")),
]


def zeroed(kind, pattern, **config):
    """Return a model whose parameters of matching names are zeros."""
    model = cqhf.tiny_model(kind, **config)
    found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
    assert found
    for parameter in found:
        parameter.zero_()
    return model


def check(model, recipe, tokens):
    found = cqhf.quantize(model, recipe, tokens)
    assert found.verification.logits_error < 1e-9
    assert max(found.verification.block_errors) < 1e-9
    assert np.isfinite(cqhf.evaluate(found.model, tokens).perplexity)
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_a_matrix_of_zeros(layer, tokens):
    found = check(zeroed("llama", layer), RECIPES["merged"], tokens)
    matrix = found.model.get_submodule(f"model.{layer}").quantized
    assert not cq.dequantize(matrix).any()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("pattern", [r"layers\.0\.", "up_proj", "embed_tokens", "norm", "."])
def test_zeros_by_all_methods(pattern, name, tokens):
    check(zeroed("llama", pattern), RECIPES[name], tokens)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("gpt2", "c_attn"),
        ("gpt2", "wte"),
        ("gpt2", "ln_"),
        ("gpt2", "."),
        ("opt", "fc1|bias"),
        ("gemma2", "norm|v_proj"),
        ("qwen2", "bias|lm_head"),
        ("mixtral", "experts|mlp.gate"),
    ],
)
def test_zeros_of_other_architectures(kind, pattern, tokens):
    config = {"num_hidden_layers": 1} if kind == "mixtral" else {}
    check(zeroed(kind, pattern, **config), RECIPES["merged"], tokens)


def test_an_expert_of_zeros(tokens):
    model = cqhf.tiny_model("mixtral", num_hidden_layers=1)
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj[1].zero_()
    experts.down_proj[1].zero_()
    check(model, RECIPES["merged"], tokens)


def test_a_constant_matrix_that_is_only_permuted(tokens):
    # Permuting equal numbers gives them back, so that this is no sign of a step left out.
    recipe = Recipe(block_size=16, rotation="online", random_signs=False)
    model = cqhf.tiny_model("llama")
    model.model.embed_tokens.weight.fill_(0.5)
    check(model, recipe, tokens)


@pytest.mark.parametrize("seed", range(6))
def test_auto_may_choose_the_identity(seed):
    tokens = np.random.default_rng(0).integers(0, 256, (2, 64))
    model = cqhf.tiny_model(
        "llama",
        seed=seed,
        vocab_size=256,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
    )
    found = cqhf.quantize(model, Recipe(block_size=16, permutation="auto"), tokens)
    row = found.report["regions"][0]
    assert row["errors"][row["permutation"]] == min(row["errors"].values())
    moving = row["permutation"] != "identity"
    assert found.verification.permutations == moving
    if seed in (2, 5):
        assert not moving
        assert found.choices.unmoved == {"model.layers.0.mlp.down_proj"}


@pytest.mark.parametrize("permutation", ["massdiff", "zigzag", "absmax", "energydiff"])
def test_a_method_may_find_nothing_to_move(permutation, tokens):
    # Without any mass there is nothing to spread.
    model = zeroed("llama", "up_proj", num_hidden_layers=1)
    check(model, Recipe(block_size=16, permutation=permutation), tokens)


def test_choices_of_the_identity_pass_verify(tokens):
    model = cqhf.tiny_model("llama")
    recipe = Recipe(block_size=16)
    plan = cqhf.plan(model, recipe)
    names = [r.name for r in plan.regions]
    same = {name: np.arange(96) for name in names}
    chosen = cqhf.Choices(same, plan.draw_signs(), frozenset(names))
    untie(model, plan)
    reference = cqhf.trace(model.double(), plan, tokens)
    transform_model(model, plan, chosen)
    assert cqhf.verify(reference, model, plan, chosen).permutations == 0


def test_zeros_do_not_hide_a_transform_that_was_left_out(tokens):
    model = zeroed("llama", "layers.1.mlp.down_proj")
    plan = cqhf.plan(model, Recipe(block_size=16, permutation="identity"))
    choices = cqhf.Choices({}, plan.draw_signs())
    untie(model, plan)
    reference = cqhf.trace(model.double(), plan, tokens)
    with pytest.raises(cq.VerificationError, match="15 of 16 matrices .* did not change"):
        cqhf.verify(reference, model, plan, choices)


def test_zeros_differ_from_anything_else():
    zeros = torch.zeros(3, dtype=torch.float64)
    assert verification.relative_error(zeros, zeros) == 0
    assert verification.relative_error(zeros, zeros + 1e-300) == np.inf
    assert not verification.relative_error(zeros, zeros * float("nan")) <= 1


def errors_of_verification(tokens):
    model = cqhf.tiny_model("llama")
    plan = cqhf.plan(model, Recipe(block_size=16))
    moved = {r.name: np.roll(np.arange(96), 1) for r in plan.regions}
    idle = cqhf.Choices({name: np.arange(96) for name in moved}, {})
    reference = cqhf.trace(model.double(), plan, tokens)
    choices = cqhf.Choices(moved, plan.draw_signs())
    transformed = cqhf.tiny_model("llama").double()
    untie(transformed, plan)
    transform_model(transformed, plan, choices)
    transformed.model.layers[0].mlp.down_proj._forward_pre_hooks.clear()
    return [
        lambda: verification.check_block_error(0, 1.0),
        lambda: verification.check_logits_error(np.nan),
        lambda: cqhf.verify(reference, model, plan, choices),
        lambda: cqhf.verify(reference, transformed, plan, choices),
        lambda: verification.check_choices(plan, idle),
        lambda: verification.check_choices(plan, cqhf.Choices({}, {})),
        lambda: verification.check_any_changed(0),
    ]


def test_every_error_says_what_can_be_done(tokens):
    for attempt in errors_of_verification(tokens):
        with pytest.raises(cq.VerificationError) as caught:
            attempt()
        advice = (
            "ompare the description|transform a fresh copy|take permutations|give it a rotation"
        )
        assert re.search(advice, str(caught.value)), str(caught.value)
