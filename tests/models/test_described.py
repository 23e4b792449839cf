"""Every described architecture: exact in float64, the same after a file and from a file."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.architectures.described import described
from corequant_transformers.architectures.known import architecture_of

HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
ALONE = {"num_attention_heads": 3, "num_key_value_heads": 1}
"""As many channels in all heads as in the stream."""
GEMMA4 = SLIDING | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
GEMMA4 |= {"global_head_dim": 8}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 40}
LATENT |= {"head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16}
GROUPED = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
VARIANTS = {
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "granitemoe": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "olmoe": {"head_dim": 12},
    "helium": {"head_dim": 12},
    "stablelm": ALONE,
    "phimoe": {"head_dim": 12, "attention_bias": True, "lm_head_bias": True},
    "phi": {"qk_layernorm": True, "head_dim": 12, "rope_parameters": HALF},
    "gpt_neox": ALONE | {"rope_parameters": HALF},
    "falcon": {"num_attention_heads": 3, "ffn_hidden_size": 96, "bias": True},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.3},
    "olmo": {"head_dim": 12},
    "bitnet": ALONE,
    "mpt": {"max_seq_len": 64},
    "gemma4_text": GEMMA4,
    "llama4_text": {"intermediate_size_mlp": 64, "moe_layers": [1], "attention_chunk_size": 8}
    | {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    # A dense block, then one with experts in two groups, of which a token chooses one.
    "deepseek_v2": LATENT | GROUPED | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT | GROUPED,
    **dict.fromkeys(("youtu", "minicpm3"), LATENT),
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba2": {"num_heads": 6, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 96, "ssm_multipliers": [0.5, 2.0, 0.7, 1.5, 0.3]},
    "granitemoehybrid": MAMBA
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "residual_multiplier": 0.7,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 6,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
    },
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 16}
    | {"linear_attn_alpha_factor": 0.7, "full_attn_beta_factor": 1.3},
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": DELTA_NET | {"shared_expert_intermediate_size": 64},
    "qwen3_next": DELTA_NET
    | {"shared_expert_intermediate_size": 64, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    "mistral": {"sliding_window": 8},
    "qwen2_moe": {"mlp_only_layers": [0], "norm_topk_prob": True},
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True, "n_group": 2, "topk_group": 1},
    "dots1": {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    "ernie4_5_moe": {"use_bias": True},
    "hunyuan_v1_moe": {"attention_bias": True},
    "granitemoeshared": {"residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "gpt_oss": {**SLIDING, "swiglu_limit": 0.5},
    "starcoder2": {"sliding_window": 8},
    "qwen2": {**SLIDING, "use_sliding_window": True},
    **dict.fromkeys(("ministral", "olmo3", "exaone4", "gemma2", "gemma3_text", "cohere2"), SLIDING),
}
"""What tiny models are made with, away from the defaults where these hide something."""

OTHERS = (
    ("stablelm", ALONE | {"use_parallel_residual": True}),
    ("gpt_neox", ALONE | {"use_parallel_residual": False}),
    ("falcon", {"num_attention_heads": 3, "ffn_hidden_size": 96, "parallel_attn": False}),
    ("falcon", {"num_attention_heads": 3, "ffn_hidden_size": 96, "multi_query": False}),
    (
        "falcon",
        {"num_kv_heads": 2, "ffn_hidden_size": 96, "new_decoder_architecture": True, "alibi": True},
    ),
    (
        "falcon",
        {
            "num_kv_heads": 2,
            "ffn_hidden_size": 96,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
        },
    ),
    ("gpt_bigcode", {"multi_query": False}),
    ("mpt", {"attn_config": {"clip_qkv": 0.5}}),
    ("olmo", {"head_dim": 12, "clip_qkv": 0.5}),
    ("gemma4_text", GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("deepseek_v2", LATENT | {"q_lora_rank": None, "first_k_dense_replace": 2}),
)
"""Further variants that the same descriptions cover."""

KINDS = [a.model_type for a in described() if not a.enclosed]


def logits(model, tokens):
    with torch.no_grad():
        # Of an encoder the hidden states.
        return model(input_ids=torch.from_numpy(tokens))[0]


@pytest.mark.parametrize(
    ("kind", "config"), [*((kind, VARIANTS.get(kind, {})) for kind in KINDS), *OTHERS]
)
def test_exact_in_float64_and_equal_to_the_bit_from_and_after_a_file(kind, config, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 128, (2, 24))
    model, recipe = cqhf.tiny_model(kind, **config), Recipe(block_size=16)
    result = cqhf.quantize(model, recipe, tokens, tmp_path / "out")
    found = result.verification
    assert found.logits_error < 1e-10
    assert max(found.block_errors) < 1e-10
    own = logits(result.model, tokens)
    assert 0.01 < float((logits(model, tokens) - own).norm() / own.norm()) < 1
    loaded = cqhf.load(tmp_path / "out")
    assert torch.equal(own, logits(loaded, tokens))
    assert list(loaded.state_dict()) == list(result.model.state_dict())
    model.save_pretrained(tmp_path / "float")
    read = cqhf.quantize(str(tmp_path / "float"), recipe, tokens)
    assert torch.equal(own, logits(read.model, tokens))


def test_conditions_on_blocks_and_models():
    config = SimpleNamespace(
        types=["conv", "attention", "conv"], sparse=[0, 2], none=None, step=2, first=1, kind="new"
    )
    expected = {
        ("types", "names", ("conv",)): [True, False, True],
        ("types", "names", ("conv", "attention")): [True] * 3,
        ("sparse", "lists", ()): [True, False, True],
        ("sparse", "omits", ()): [False, True, False],
        ("none", "omits", ()): [True] * 3,
        ("step", "divides", ()): [False, True, False],
        ("first", "from", ()): [False, True, True],
        ("first", "after", ()): [False, False, True],
        ("first", "before", ()): [True, False, False],
        ("first", "upto", ()): [True, True, False],
        ("kind", "equals", ("new",)): [True] * 3,
        ("absent", "equals", ("new",)): [False] * 3,
    }
    for given, found in expected.items():
        assert [cqhf.Where(*given).holds(config, i) for i in range(3)] == found, given
    for given, words in (
        (("types", "names", ("conv",)), "types must have an entry for each decoder block, got"),
        (("first", "lists"), "first must list indices, got 1"),
        (("none", "divides"), "none must be a positive integer, got None"),
        (("kind", "before"), "kind must be a number, got new"),
    ):
        with pytest.raises(cq.ArchitectureError, match=words):
            cqhf.Where(*given).holds(config, 3)
    with pytest.raises(cq.ArchitectureError, match="relation must be one of equals, differs"):
        cqhf.Where("kind", "is")
    with pytest.raises(
        cq.ArchitectureError, match=r"values must be given .*, got \(\) for 'equals'"
    ):
        cqhf.Where("kind", "equals")


@pytest.mark.parametrize("kind", KINDS)
def test_rotations_at_run_time_alone_and_rounding_that_compares_networks(kind):
    tokens = np.random.default_rng(0).integers(0, 128, (1, 24))
    model = cqhf.tiny_model(kind, **VARIANTS.get(kind, {}))
    # It runs each block's layers in the order in which the plan has them.
    recipe = Recipe(rotation="online", block_size=4, rounding="qronos")
    result = cqhf.quantize(model, recipe, tokens)
    assert result.verification.logits_error < 1e-10
    rows = [row for row in result.report["matrices"] if "loss" in row]
    assert len(rows) == len([m for m in result.plan.quantized if m.block is not None])


def test_what_can_not_be_described_is_refused_with_the_reason():
    with pytest.raises(cq.ArchitectureError, match="its blocks mix several residual streams"):
        architecture_of(SimpleNamespace(model_type="gemma3n_text"))


@pytest.mark.parametrize("kind", ["olmo", "cohere", "mpt"])
def test_norms_that_subtract_the_mean_are_not_exported_where_the_weights_do_it(kind, tmp_path):
    # Such norms have no bias, so that the tensors alone would tell nothing.
    tokens = np.random.default_rng(0).integers(0, 128, (1, 24))
    model = cqhf.tiny_model(kind, **VARIANTS[kind])
    recipe = Recipe(rotation="offline", weights="int8:channel", activations="none")
    cqhf.quantize(model, recipe, tokens, tmp_path / "own")
    with pytest.raises(cq.ArchitectureError, match=f"the norms of '{kind}' subtract the mean"):
        cqhf.export(tmp_path / "own", tmp_path / "out")


@pytest.mark.parametrize("kind", ["nemotron_h", "mamba2"])
def test_an_automatic_block_size_where_blocks_have_no_mlp(kind):
    tokens = np.random.default_rng(0).integers(0, 128, (1, 24))
    model = cqhf.tiny_model(kind, **VARIANTS[kind])
    result = cqhf.quantize(model, Recipe(block_size="auto"), tokens)
    assert result.verification.logits_error < 1e-10
