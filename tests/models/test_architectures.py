"""Every described architecture computes the same function transformed, and survives a file."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.architectures.described import described
from corequant_transformers.architectures.description import NORMS, Architecture, Experts
from corequant_transformers.architectures.known import architecture_of
from corequant_transformers.architectures.multimodal import COMPOSITES
from corequant_transformers.model.layouts import standardize
from corequant_transformers.model.parts import untie
from corequant_transformers.planning.model_plan import plan_model
from corequant_transformers.transforms.matrices import transform_model

DESCRIBED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "gpt2",
    "opt",
    "mixtral",
    "qwen3_moe",
)
SPARSE = ("mixtral", "qwen3_moe")
POST_NORMED = ("gemma2", "gemma3_text", "olmo2")
UNGATED = ("gpt2", "opt")
RECIPES = {
    "blocks": Recipe(block_size=16),
    "full": Recipe(block_size=None, random_signs=False),
    "heads": Recipe(block_size=8, head_block_size=4, permutation="energydiff"),
    "online": Recipe(rotation="online", block_size=4),
}


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", DESCRIBED)
def test_equivalent_in_float64_and_equal_after_a_file(kind, recipe, tokens, tmp_path):
    model = cqhf.tiny_model(kind, tie_word_embeddings=recipe in ("full", "online"))
    result = cqhf.quantize(model, RECIPES[recipe], tokens, tmp_path / "out")
    found = result.verification
    assert found.logits_error < 1e-10
    assert max(found.block_errors) < 1e-10
    assert (found.permutations == 0) == (recipe == "full")
    loaded = cqhf.load(tmp_path / "out")
    assert torch.equal(logits(result.model, tokens), logits(loaded, tokens))
    assert list(loaded.state_dict()) == list(result.model.state_dict())
    # A last look from outside: the model is quantized, and still resembles the float one.
    difference = logits(model, tokens) - logits(loaded, tokens)
    assert 0.01 < float(difference.norm() / logits(model, tokens).norm()) < 1


@pytest.mark.parametrize("kind", [*DESCRIBED, "granite"])
def test_perplexity_is_that_of_the_models_own_logits(kind, tokens, monkeypatch):
    monkeypatch.setitem(cqhf.architectures.known._KNOWN, "granite", Architecture("granite"))
    # Granite divides its logits.
    model = cqhf.tiny_model(kind, logits_scaling=3.0)
    own = logits(model, tokens)[:, :-1].reshape(-1, 128)
    target = torch.from_numpy(tokens[:, 1:]).reshape(-1)
    expected = float(torch.nn.functional.cross_entropy(own, target).exp())
    assert cqhf.evaluate(model, tokens).perplexity == pytest.approx(expected, rel=1e-5)


def choices_of(plan, generator):
    """Return permutations, signs and scales at random, as far as the plan has places for them."""
    permutations, factors = {}, plan.draw_signs()
    for region in plan.regions:
        if region.permuted:
            inside = generator.permuted(
                np.arange(region.width).reshape(region.side.heads, -1), axis=1
            )
            permutations[region.name] = inside.reshape(-1)
        if region.factored:
            scales = generator.uniform(0.5, 2.0, region.width)
            signs = generator.choice([-1.0, 1.0], region.width)
            factors[region.name] = {"signs": signs, "scales": signs * scales}[plan.recipe.factors]
    return cqhf.Choices(permutations, factors)


@pytest.mark.parametrize("kind", DESCRIBED)
@pytest.mark.parametrize(
    ("permutation", "factors"),
    [("random", "none"), ("identity", "signs"), ("identity", "scales"), ("random", "scales")],
)
def test_every_merged_freedom_alone_and_together(kind, factors, permutation, tokens):
    if kind in UNGATED and factors != "none":
        words = "through linear paths, and in an MLP without a gate the activation function stands"
        with pytest.raises(cq.RecipeError, match=words):
            cqhf.plan(cqhf.tiny_model(kind), Recipe(factors=factors))
        return
    biases = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    model = cqhf.tiny_model(kind, **biases)
    recipe = Recipe(block_size=16, head_block_size=4, factors=factors, permutation=permutation)
    plan = cqhf.plan(model, recipe)
    choices = choices_of(plan, np.random.default_rng(1))
    standardize(model, plan)
    untie(model, plan)
    reference = cqhf.trace(model.double(), plan, tokens)
    transform_model(model, plan, choices)
    found = cqhf.verify(reference, model, plan, choices, 1e-10)
    assert found.logits_error < 1e-10
    regions = len(plan.mlp_outputs)
    assert found.permutations == (0 if permutation == "identity" else regions + 2)
    assert len(choices.factors) == 1 + (0 if factors == "none" else regions)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "olmo2", "gemma3_text", "opt"])
def test_attention_biases_and_heads_without_groups(kind, tokens):
    field = {"opt": "enable_bias"}.get(kind, "attention_bias")
    for value in (False, True):
        config = {field: value, "num_key_value_heads": 4}
        result = cqhf.quantize(cqhf.tiny_model(kind, **config), Recipe(block_size=16), tokens)
        assert result.verification.logits_error < 1e-10


def test_layer_norms_become_rms_norms_that_the_model_computes(tokens):
    result = cqhf.quantize(cqhf.tiny_model("gpt2"), Recipe(block_size=16), tokens)
    kinds = {type(m).__name__ for m in result.model.modules()}
    assert "RMSNorm" in kinds
    assert "LayerNorm" not in kinds
    # Its bias went into the head, which had none.
    assert float(result.model.lm_head.bias.abs().max()) > 0.01
    seen = []
    result.model.transformer.h[1].ln_1.register_forward_hook(lambda m, a, y: seen.append((a[0], y)))
    logits(result.model, tokens)
    x, y = seen[0]
    assert float(x.mean(-1).abs().max()) > 0.01
    torch.testing.assert_close(y, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))


def test_online_layer_norms_stay_and_get_no_signs(tokens):
    recipe = Recipe(rotation="online", block_size=16)
    result = cqhf.quantize(cqhf.tiny_model("opt"), recipe, tokens)
    assert result.verification.logits_error < 1e-10
    assert "LayerNorm" in {type(m).__name__ for m in result.model.modules()}
    assert "residual" not in result.choices.factors
    assert "no random signs" in result.report["notes"][0]
    assert not cqhf.plan(cqhf.tiny_model("opt"), Recipe(block_size=16)).notes


@pytest.mark.parametrize("kind", DESCRIBED)
def test_the_plan_says_where_the_residual_rotation_cannot_be_merged(kind, tokens):
    plan = cqhf.plan(cqhf.tiny_model(kind), Recipe(block_size=16))
    readers = [m for m in plan.matrices if m.role in ("attention_input", "mlp_input")]
    assert readers
    assert all(m.input.rotation == 48 for m in readers)
    assert all(m.online == (kind in POST_NORMED) for m in readers)
    if kind in POST_NORMED:
        assert len(plan.notes) == 1
        assert "post_feedforward_layernorm stand between the writers" in plan.notes[0]
        assert "rotated at run time instead" in plan.notes[0]
    else:
        rare = "an expert that fewer than 32 calibration tokens reach"
        experts = any(m.expert is not None for m in plan.matrices)
        assert [note.startswith(rare) for note in plan.notes] == [True] * experts


def test_a_post_norm_does_not_commute_with_a_rotation(tokens):
    # Were the architecture described without its post norms, merging would not be noticed by the
    # plan, but the undescribed norms are.
    broken = Architecture("gemma2", norm="rms_one_plus", mlp_norm="pre_feedforward_layernorm")
    model = cqhf.tiny_model("gemma2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cqhf.architectures.known._KNOWN, "gemma2", broken)
        with pytest.raises(cq.ArchitectureError, match=r"post_attention_layernorm.*says nothing"):
            cqhf.quantize(model, Recipe(), tokens)
        silent = Architecture(
            "gemma2",
            norm="rms_one_plus",
            mlp_norm="pre_feedforward_layernorm",
            inner=("post_attention_layernorm", "post_feedforward_layernorm"),
        )
        patch.setitem(cqhf.architectures.known._KNOWN, "gemma2", silent)
        with pytest.raises(cq.VerificationError, match="from decoder block 0 on"):
            cqhf.quantize(model, Recipe(), tokens)


@pytest.mark.parametrize("kind", SPARSE)
def test_the_report_counts_tokens_of_every_expert(kind, tokens):
    model = cqhf.tiny_model(kind)
    before = [name for name, _ in model.named_modules()]
    seen = []
    gate = model.model.layers[1].mlp.gate
    handle = gate.register_forward_hook(lambda m, a, y: seen.append(y[2]))
    with torch.no_grad():
        for window in tokens:
            model(torch.from_numpy(window)[None])
    handle.remove()
    counts = torch.bincount(torch.cat(seen).reshape(-1), minlength=4).tolist()
    result = cqhf.quantize(model, Recipe(block_size=16), tokens)
    rows = {row["name"]: row for row in result.report["regions"]}
    for expert, count in enumerate(counts):
        assert rows[f"model.layers.1.mlp.experts.{expert}.down_proj"]["tokens"] == count
    assert [name for name, _ in model.named_modules()] == before
    permutations = [
        result.choices.permutations[f"model.layers.1.mlp.experts.{i}.down_proj"] for i in range(4)
    ]
    assert len({p.tobytes() for p in permutations}) == 4


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(block_size=16, permutation="auto", factors="scales", rare_experts="nearest"),
        Recipe(block_size="auto", permutation="massdiff", rare_experts="nearest"),
    ],
)
def test_an_expert_that_no_token_reaches_keeps_its_channels_in_place(recipe, tokens):
    model = cqhf.tiny_model("mixtral")
    model.model.layers[0].mlp.gate.register_forward_hook(without_expert_2)
    result = cqhf.quantize(model, recipe, tokens)
    assert result.verification.logits_error < 1e-10
    name = "model.layers.0.mlp.experts.2.down_proj"
    row = next(r for r in result.report["regions"] if r["name"] == name)
    assert row["tokens"] == 0
    assert row["unrouted"]
    assert row.get("permutation", "identity") == "identity"
    p = result.choices.permutations.get(name, np.arange(1))
    np.testing.assert_array_equal(p, np.arange(len(p)))
    routed = [r for r in result.report["regions"] if r["name"] != name]
    assert all(r["tokens"] > 0 and "unrouted" not in r for r in routed)


def test_inspecting_leaves_out_an_expert_that_no_token_reaches(tokens):
    model = cqhf.tiny_model("mixtral")
    model.model.layers[0].mlp.gate.register_forward_hook(without_expert_2)
    names = [layer.name for layer in cqhf.inspect(model, tokens, 16).layers]
    assert len(names) == 7
    assert "model.layers.0.mlp.experts.2.down_proj" not in names


def test_plans_can_be_sent_to_other_processes():
    plan = cqhf.plan(cqhf.tiny_model("qwen3_moe"), Recipe(block_size=16))
    assert pickle.loads(pickle.dumps(plan)) == plan


def without_expert_2(module, args, output):
    scores, weights, chosen = output
    return scores, weights, torch.where(chosen == 2, 3, chosen)


def test_dense_and_sparse_blocks_mix(tokens, tmp_path):
    model = cqhf.tiny_model("qwen3_moe", mlp_only_layers=[0])
    result = cqhf.quantize(model, Recipe(block_size=16, factors="signs"), tokens, tmp_path / "out")
    assert result.verification.logits_error < 1e-10
    names = [m.name for m in result.plan.mlp_outputs]
    assert names[0] == "model.layers.0.mlp.down_proj"
    assert names[1:] == [f"model.layers.1.mlp.experts.{i}.down_proj" for i in range(4)]
    assert [m.shape for m in result.plan.mlp_outputs] == [(48, 96)] + [(48, 32)] * 4
    assert torch.equal(logits(result.model, tokens), logits(cqhf.load(tmp_path / "out"), tokens))


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "mixtral", "qwen3_moe"])
def test_sharded_files_give_the_same_model(kind, tokens, tmp_path):
    model = cqhf.tiny_model(kind, tie_word_embeddings=kind == "llama")
    model.save_pretrained(tmp_path / "float", max_shard_size="60KB")
    assert (tmp_path / "float" / "model.safetensors.index.json").is_file()
    recipe = Recipe(block_size=16)
    direct = cqhf.quantize(model, recipe, tokens)
    read = cqhf.quantize(cqhf.Source(tmp_path / "float").load(), recipe, tokens)
    assert read.verification.logits_error < 1e-10
    assert torch.equal(logits(direct.model, tokens), logits(read.model, tokens))


@pytest.mark.parametrize("kind", ["starcoder2", "olmoe", "granite"])
def test_a_new_architecture_is_described_from_outside(kind, monkeypatch, tokens, tmp_path):
    known = {k: v for k, v in cqhf.architectures.known._KNOWN.items() if k in DESCRIBED}
    monkeypatch.setattr(cqhf.architectures.known, "_KNOWN", known)
    with pytest.raises(cq.ArchitectureError, match=f"got '{kind}'; to describe another"):
        cqhf.tiny_model(kind)
    if kind == "granite":
        # Multiples of embedding, attention, residual and logits commute with all that is merged.
        cqhf.register(Architecture("granite"))
    else:
        exec(documented_example(), {})
    # OLMoE's norms of queries and keys are as wide as the residual stream.
    model = cqhf.tiny_model(kind, head_dim=12)
    result = cqhf.quantize(model, Recipe(block_size=16), tokens, tmp_path / "out")
    assert result.verification.logits_error < 1e-10
    assert torch.equal(logits(result.model, tokens), logits(cqhf.load(tmp_path / "out"), tokens))


def documented_example():
    page = Path(__file__).parents[2] / "docs" / "architectures.md"
    return page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


def test_the_documented_table_is_complete():
    page = Path(__file__).parents[2] / "docs" / "architectures.md"
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    names = {name: row for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    known = {architecture.model_type: architecture for architecture in described()}
    assert set(names) == {*known, *COMPOSITES}
    for kind, a in known.items():
        assert names[kind].endswith("merged |" if a.merges and not a.enclosed else "at run time |")


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is True, got False"),
        ("opt", {"word_embed_proj_dim": 24}, "word_embed_proj_dim is hidden_size=48, got 24"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is False, got True"),
    ],
)
def test_configs_that_a_description_does_not_cover(kind, config, words):
    model = cqhf.tiny_model(kind)
    for name, value in config.items():
        setattr(model.config, name, value)
    with pytest.raises(cq.ArchitectureError, match=words):
        architecture_of(model.config)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"norm": "batch"}, f"norm must be one of {', '.join(NORMS)}"),
        ({"block": "layers"}, "block must hold {}"),
        ({"norm": "layer", "mlp_post_norm": "post"}, "can't be centered"),
        ({"norm": "layer", "attention_norm": None}, "must read it first"),
    ],
)
def test_descriptions_that_contradict_themselves(fields, words):
    with pytest.raises(cq.ArchitectureError, match=words):
        Architecture("new", **fields)


def test_a_model_without_the_described_experts_is_refused(monkeypatch, tokens):
    wrong = Architecture("mixtral", experts=Experts("mlp.specialists", count="num_local_experts"))
    monkeypatch.setitem(cqhf.architectures.known._KNOWN, "mixtral", wrong)
    model = cqhf.tiny_model("mixtral")
    model.config.moe_intermediate_size = 96
    with pytest.raises(cq.ArchitectureError, match=r"no module 'model\.layers\.0\.mlp\.special"):
        cqhf.quantize(model, Recipe(block_size=16), tokens)


def test_gpt2_widths_that_the_config_leaves_open():
    model = cqhf.tiny_model("gpt2", n_inner=None)
    plan = plan_model(model.config, Recipe(block_size=16))
    assert [m.shape for m in plan.mlp_outputs] == [(48, 192)] * 2


@pytest.mark.parametrize("kind", DESCRIBED)
def test_descriptions_are_short(kind):
    known = cqhf.architectures.known._KNOWN[kind]
    usual = Architecture(kind)
    given = [f for f in vars(known) if getattr(known, f) != getattr(usual, f)]
    assert len(given) <= 20
