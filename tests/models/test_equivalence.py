"""Permuting, rotating and merging leaves the function alone; every mistake is caught."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import PERMUTATIONS, Recipe
from corequant_transformers.model.parts import untie
from corequant_transformers.transforms.matrices import OnlineRotation, transform_model
from corequant_transformers.transforms.verification import KeepFloat64
from tests.models.conftest import ARCHITECTURES


def prepare(kind, tokens, recipe=None, **config):
    """Return plan, permutations, untied float64 model and its trace."""
    recipe = recipe or Recipe(block_size=16)
    model = cqhf.tiny_model(kind, **config)
    plan = cqhf.plan(model, recipe)
    data = cqhf.calibrate(model, recipe, tokens)
    permutations = {
        r.name: cq.massdiff(data.statistics[r.name].mean_abs, r.side.rotation) for r in plan.regions
    }
    choices = cqhf.Choices(permutations, plan.draw_signs())
    untie(model, plan)
    model.double()
    return plan, choices, model, cqhf.trace(model, plan, tokens)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block_size", [None, 12, 32])
def test_transformed_models_agree_in_float64(kind, tied, block_size, tokens):
    recipe = Recipe(block_size=block_size)
    model = cqhf.tiny_model(kind, tie_word_embeddings=tied)
    found = cqhf.quantize(model, recipe, tokens).verification
    assert found.logits_error < 1e-10
    assert max(found.block_errors) < 1e-10
    assert found.rotations_online == 2
    assert found.permutations == (0 if block_size is None else 2)


@pytest.mark.parametrize("permutation", PERMUTATIONS)
@pytest.mark.parametrize("random_signs", [False, True])
def test_every_permutation_is_merged(permutation, random_signs, tokens):
    recipe = Recipe(block_size=16, permutation=permutation, random_signs=random_signs)
    found = cqhf.quantize(cqhf.tiny_model("qwen2"), recipe, tokens).verification
    assert found.logits_error < 1e-10
    assert found.permutations == (0 if permutation == "identity" else 2)


@pytest.mark.parametrize("config", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases(config, tokens):
    found = cqhf.quantize(cqhf.tiny_model("llama", **config), Recipe(block_size=16), tokens)
    assert found.verification.logits_error < 1e-10


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("factors", ["signs", "scales"])
@pytest.mark.parametrize("permutation", ["identity", "auto"])
def test_factors_are_merged(kind, factors, permutation, tokens):
    config = {"mlp_bias": True} if kind == "llama" else {}
    recipe = Recipe(block_size=16, permutation=permutation, factors=factors)
    result = cqhf.quantize(cqhf.tiny_model(kind, **config), recipe, tokens)
    assert result.verification.logits_error < 1e-10
    name = "model.layers.0.mlp.down_proj"
    row = result.report["regions"][0]
    assert row["output_errors"][row["factors"]] <= row["output_errors"]["none"]
    assert name in result.choices.factors
    if permutation == "auto":
        assert row["errors"][row["permutation"]] == min(row["errors"].values())


def test_the_given_model_is_left_alone(tokens):
    model = cqhf.tiny_model("llama", tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    cqhf.quantize(model, Recipe(block_size=16), tokens)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_float32_is_lifted_only_while_verifying(tokens):
    _, _, model, reference = prepare("gemma2", tokens)
    logits = model(torch.from_numpy(tokens)).logits
    # The model's own norms and attention round to float32.
    assert 1e-9 < float((logits - reference.logits).abs().max()) < 1e-4


def test_positions_meet_rotary_frequencies_in_float64():
    """As ``inv_freq @ position_ids.float()``, which Transformers 5.17 computes."""
    frequencies, positions = torch.rand(4, 1, dtype=torch.float64), torch.arange(3)[None]
    with KeepFloat64():
        angles = frequencies @ positions.float()
        assert (positions == 1).float().dtype == torch.float64
        assert frequencies.float() is frequencies
        # What is none of float64's business stays as it is.
        assert torch.ones(1, dtype=torch.bfloat16).float().dtype == torch.float32
    assert torch.equal(angles, frequencies @ positions.double())
    assert positions.float().dtype == torch.float32


def test_a_correct_transform_passes(tokens):
    plan, choices, model, reference = prepare("llama", tokens)
    transform_model(model, plan, choices)
    assert cqhf.verify(reference, model, plan, choices).logits_error < 1e-10


def test_a_wrong_permutation_is_caught(tokens):
    plan, choices, model, reference = prepare("llama", tokens)
    transform_model(model, plan, choices)
    up = model.model.layers[1].mlp.up_proj
    up.weight.data[[3, 7]] = up.weight.data[[7, 3]]
    with pytest.raises(cq.VerificationError, match="from decoder block 1 on"):
        cqhf.verify(reference, model, plan, choices)


def test_an_inverted_permutation_is_caught(tokens):
    plan, choices, model, reference = prepare("llama", tokens)
    transform_model(model, plan, choices)
    down = model.model.layers[0].mlp.down_proj
    name = "model.layers.0.mlp.down_proj"
    columns = cq.block_hadamard(down.weight.data, 16, inverse=True)[
        :, np.argsort(choices.permutations[name])
    ][:, np.argsort(choices.permutations[name])]
    down.weight.data = cq.block_hadamard(columns.contiguous(), 16)
    with pytest.raises(cq.VerificationError, match="from decoder block 0 on"):
        cqhf.verify(reference, model, plan, choices)


def test_a_forgotten_norm_fold_is_caught(tokens):
    plan, choices, model, reference = prepare("llama", tokens)
    # The gain is dropped before the transform can fold it.
    torch.nn.init.ones_(model.model.layers[1].input_layernorm.weight)
    transform_model(model, plan, choices)
    with pytest.raises(cq.VerificationError, match="from decoder block 1 on"):
        cqhf.verify(reference, model, plan, choices)


def test_a_forgotten_final_norm_fold_is_caught(tokens):
    plan, choices, model, reference = prepare("llama", tokens)
    torch.nn.init.ones_(model.model.norm.weight)
    transform_model(model, plan, choices)
    with pytest.raises(cq.VerificationError, match="logits don't"):
        cqhf.verify(reference, model, plan, choices)


def test_a_transform_that_did_nothing_is_caught(tokens):
    plan, choices, model, reference = prepare("llama", tokens)
    with pytest.raises(cq.VerificationError, match="16 of 16 matrices .* did not change"):
        cqhf.verify(reference, model, plan, choices)


def test_a_missing_online_rotation_is_caught_before_its_nonsense(tokens):
    plan, choices, model, reference = prepare("llama", tokens)
    transform_model(model, plan, choices)
    model.model.layers[0].mlp.down_proj._forward_pre_hooks.clear()
    with pytest.raises(cq.VerificationError, match=r"must rotate its input .* got rotations \[\]"):
        cqhf.verify(reference, model, plan, choices)


def test_a_second_online_rotation_is_caught(tokens):
    plan, choices, model, reference = prepare("llama", tokens)
    transform_model(model, plan, choices)
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(OnlineRotation(16))
    with pytest.raises(cq.VerificationError, match=r"got rotations \[16, 16\]"):
        cqhf.verify(reference, model, plan, choices)


def test_identity_permutations_are_caught_when_others_were_asked_for(tokens):
    plan, choices, model, reference = prepare("llama", tokens)
    identity = {name: np.arange(len(p)) for name, p in choices.permutations.items()}
    same = cqhf.Choices(identity, choices.factors)
    transform_model(model, plan, same)
    with pytest.raises(cq.VerificationError, match="are the identity"):
        cqhf.verify(reference, model, plan, same)
    with pytest.raises(cq.VerificationError, match="no permutation was chosen"):
        cqhf.verify(reference, model, plan, cqhf.Choices({}, choices.factors))


def test_verifying_needs_float64(tokens):
    plan, choices, model, reference = prepare("llama", tokens)
    with pytest.raises(TypeError, match="float64"):
        cqhf.verify(reference, model.float(), plan, choices)
