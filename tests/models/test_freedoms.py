"""Permutations of value heads and of the residual stream, alone and with signs and scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import PERMUTATIONS, Recipe
from corequant_transformers.model.parts import untie
from corequant_transformers.transforms.matrices import transform_model
from tests.models.conftest import ARCHITECTURES

MOVING = [p for p in PERMUTATIONS if p != "identity"]
OUTPUT = "model.layers.{}.self_attn.o_proj"


def model_of(kind, **config):
    """Return a tiny model with every bias that its kind can have."""
    biases = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    return cqhf.tiny_model(kind, **biases, **config)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("permutation", ["identity", "massdiff", "auto"])
@pytest.mark.parametrize("factors", ["none", "signs", "scales"])
def test_value_heads_rotated_by_blocks(kind, permutation, factors, tokens):
    recipe = Recipe(block_size=16, head_block_size=4, permutation=permutation, factors=factors)
    result = cqhf.quantize(model_of(kind), recipe, tokens)
    assert result.verification.logits_error < 1e-10
    assert result.verification.rotations_online == 2
    assert len(result.choices.permutations) == (0 if permutation == "identity" else 4)
    if permutation == "massdiff":
        assert result.verification.permutations == 4


@pytest.mark.parametrize("permutation", MOVING)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_permutation_stays_inside_its_head(permutation, kv_heads, tokens):
    model = cqhf.tiny_model("qwen2", num_key_value_heads=kv_heads)
    recipe = Recipe(block_size=16, head_block_size=8, permutation=permutation)
    result = cqhf.quantize(model, recipe, tokens)
    assert result.verification.logits_error < 1e-10
    for i in (0, 1):
        p = result.choices.permutations[OUTPUT.format(i)]
        assert len(p) == 16 * kv_heads
        assert (p // 16 == np.arange(len(p)) // 16).all()


def test_statistics_of_value_heads_pool_the_query_heads_that_share_them(tokens):
    model = cqhf.tiny_model("llama")
    data = cqhf.calibrate(model, Recipe(head_block_size=4), tokens)
    seen = []
    o = model.model.layers[1].self_attn.o_proj
    handle = o.register_forward_pre_hook(lambda _, a: seen.append(a[0][0].numpy()))
    with torch.no_grad():
        for window in tokens:
            model(torch.from_numpy(window)[None])
    handle.remove()
    x = np.concatenate(seen)
    # Query heads 0, 1 read value head 0; 2, 3 read value head 1.
    expected = [
        np.abs(x.reshape(-1, 4, 16)[:, 2 * g : 2 * g + 2]).mean((0, 1), np.float64) for g in (0, 1)
    ]
    found = data.statistics[OUTPUT.format(1)]
    assert found.count == 2 * tokens.size
    np.testing.assert_allclose(found.mean_abs, np.concatenate(expected), rtol=1e-6)


def test_a_block_that_holds_whole_heads_moves_nothing_inside_them(tokens):
    result = cqhf.quantize(
        cqhf.tiny_model("llama"), Recipe(block_size=16, head_block_size=16), tokens
    )
    assert set(result.choices.permutations) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("random_signs", [False, True])
@pytest.mark.parametrize("block_size", [None, 4, 16])
def test_all_rotations_online(kind, random_signs, block_size, tokens):
    recipe = Recipe(
        rotation="online", block_size=block_size, random_signs=random_signs, factors="scales"
    )
    result = cqhf.quantize(model_of(kind, tie_word_embeddings=True), recipe, tokens)
    found = result.verification
    assert found.logits_error < 1e-10
    assert max(found.block_errors) < 1e-10
    assert found.rotations_online == 14
    # The residual stream's, and of each block the MLP's and, where a block cuts heads, the heads'.
    assert found.permutations == {None: 0, 4: 5, 16: 3}[block_size]


@pytest.mark.parametrize("permutation", MOVING)
def test_every_permutation_of_the_residual_stream(permutation, tokens):
    recipe = Recipe(rotation="online", block_size=4, permutation=permutation)
    result = cqhf.quantize(model_of("llama"), recipe, tokens)
    assert result.verification.logits_error < 1e-10
    p = result.choices.permutations["residual"]
    assert sorted(p.tolist()) == list(range(48))
    row = next(r for r in result.report["regions"] if r["name"] == "residual")
    if permutation == "massdiff":
        assert row["largest_block_mass_permuted"] <= row["largest_block_mass"]


def test_the_residual_statistics_are_those_of_what_layers_read(tokens):
    model = cqhf.tiny_model("llama")
    recipe = Recipe(rotation="online", block_size=16)
    data = cqhf.calibrate(model, recipe, tokens)
    seen = []
    # Query and gate stand for the others, which read the same norms.
    readers = [m for b in model.model.layers for m in (b.self_attn.q_proj, b.mlp.gate_proj)]
    handles = [
        m.register_forward_pre_hook(lambda _, a: seen.append(a[0][0].numpy())) for m in readers
    ]
    with torch.no_grad():
        for window in tokens:
            model(torch.from_numpy(window)[None])
    for handle in handles:
        handle.remove()
    found = data.statistics["residual"]
    assert found.count == 4 * tokens.size
    expected = np.abs(np.concatenate(seen)).mean(0, np.float64)
    np.testing.assert_allclose(found.mean_abs, expected, rtol=1e-6)


def test_an_online_model_is_saved_and_loaded(tokens, tmp_path):
    recipe = Recipe(rotation="online", block_size=16, permutation="energydiff")
    result = cqhf.quantize(model_of("llama"), recipe, tokens, tmp_path / "out")
    loaded = cqhf.load(tmp_path / "out")
    with torch.no_grad():
        ids = torch.from_numpy(tokens)
        assert torch.equal(result.model(ids).logits, loaded(ids).logits)
    assert loaded.model.layers[0].self_attn.q_proj.rotation == 16


def prepared(tokens, **recipe):
    recipe = Recipe(block_size=4, **recipe)
    model = model_of("llama")
    plan = cqhf.plan(model, recipe)
    result = cqhf.quantize(model, recipe, tokens)
    untie(model, plan)
    model.double()
    return plan, result.choices, model, cqhf.trace(model, plan, tokens)


def test_a_norm_left_out_of_the_residual_permutation_is_caught(tokens):
    plan, choices, model, reference = prepared(tokens, rotation="online")
    gain = model.model.layers[1].input_layernorm.weight.clone()
    transform_model(model, plan, choices)
    cqhf.verify(reference, model, plan, choices)
    model.model.layers[1].input_layernorm.weight.data = gain
    with pytest.raises(cq.VerificationError, match="from decoder block 1 on"):
        cqhf.verify(reference, model, plan, choices)


def test_a_head_left_out_of_the_residual_permutation_is_caught(tokens):
    plan, choices, model, reference = prepared(tokens, rotation="online", random_signs=False)
    head = model.lm_head.weight.clone()
    transform_model(model, plan, choices)
    model.lm_head.weight.data = head
    with pytest.raises(cq.VerificationError, match="1 of 16 .* did not change.*lm_head"):
        cqhf.verify(reference, model, plan, choices)


def test_a_channel_that_leaves_its_head_is_refused(tokens):
    plan, choices, model, _ = prepared(tokens, head_block_size=4)
    wrong = np.roll(choices.permutations[OUTPUT.format(0)], 1)
    broken = cqhf.Choices({**choices.permutations, OUTPUT.format(0): wrong}, choices.factors)
    with pytest.raises(ValueError, match="inside their head of 16"):
        transform_model(model, plan, broken)


def test_costs_of_an_online_model():
    model = cqhf.tiny_model("llama")
    cost = cqhf.plan(model, Recipe(rotation="online", block_size=8)).cost()
    # Five layers read 48 channels, o_proj 64 and down_proj 96, in each of two blocks.
    assert cost["online_additions_per_token"] == 2 * 3 * (5 * 48 + 64 + 96)
    assert cost["online_bytes_per_token"] == 2 * 4 * (5 * 48 + 64 + 96)
    assert cost["block_sizes"] == [2, 4, 8, 16]


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        ({"head_block_size": 6}, cq.BlockSizeError, "head_dim=16 of the model: head_block_size"),
        ({"rotation": "online", "block_size": 32}, cq.BlockSizeError, "hidden_size=48"),
        ({"rotation": "online", "block_size": 24}, cq.BlockSizeError, "heads times head_dim=64"),
    ],
)
def test_sizes_that_do_not_fit(recipe, error, words):
    with pytest.raises(error, match=words):
        cqhf.plan(cqhf.tiny_model("llama"), Recipe(**recipe))
