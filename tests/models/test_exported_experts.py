"""Models of experts, exported: a matrix for each expert, as Transformers and vLLM read them."""

from __future__ import annotations

import json
import re

import pytest

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant.storage.tensor_file import TensorFile
from corequant_transformers.checkpoint.reader import Stored
from tests.models.test_described import VARIANTS
from tests.models.test_export import check_equal

RECIPE = {"rotation": "offline", "weights": "int4:group16", "activations": "none"}
PROJECTIONS = {
    "mixtral": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3",
                "block_sparse_moe.experts.{}.w2"),
    "qwen3_moe": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
}  # fmt: skip
"""Gate, up and down as the published models have them."""


def exported(folder, tokens, kind, config=(), **recipe):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = cqhf.tiny_model(kind, **sizes, **dict(config))
    cqhf.quantize(model, Recipe(**{**RECIPE, **recipe}), tokens, folder / "own")
    return cqhf.export(folder / "own", folder / "out")


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_files_hold_a_matrix_for_each_expert_under_its_published_name(kind, tokens, tmp_path):
    out = exported(tmp_path, tokens, kind)
    names = set(TensorFile(out / "model.safetensors").names)
    found = {n for n in names if ".experts." in n}
    assert found == {
        f"model.layers.{block}.{projection.format(expert)}.weight_{part}"
        for block in range(2)
        for expert in range(4)
        for projection in PROJECTIONS[kind]
        for part in ("packed", "scale", "shape")
    }
    router = PROJECTIONS[kind][0].partition(".")[0] + ".gate"
    assert f"model.layers.1.{router}.weight" in names
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    # vLLM's router is a linear layer under this name.
    assert f"model.layers.1.{router}" in config["ignore"]
    check_equal(tmp_path / "own", out, tokens)


@pytest.mark.parametrize(
    ("kind", "recipe", "config"),
    [
        ("mixtral", {"weights": "int8:channel", "embeddings": "int8:channel"}, {}),
        ("mixtral", {"weights": "mxfp4"}, {}),
        ("mixtral", {"weights": "int4:channel:bfloat16", "rounding": "gptq"}, {}),
        ("qwen3_moe", {"rotation": "heads"}, {"tie_word_embeddings": True}),
        ("qwen3_moe", {}, {"mlp_only_layers": [0]}),
        # Attention's inputs are rounded, the experts' can't be.
        (
            "qwen3_moe",
            {
                "activations": "int8:token:symmetric",
                "layers": [{"pattern": r"re:.*\.experts\..*", "activations": "none"}],
            },
            {},
        ),
        # Other codes for experts than for the rest.
        (
            "mixtral",
            {"layers": [{"pattern": r"re:.*\.experts\..*", "weights": "int8:channel"}]},
            {},
        ),
        ("mixtral", {"keep": [r"re:.*\.self_attn\..*"]}, {}),
    ],
)
def test_transformers_loads_experts(kind, recipe, config, tokens, tmp_path):
    out = exported(tmp_path, tokens, kind, config, **recipe)
    check_equal(tmp_path / "own", out, tokens)


@pytest.mark.parametrize(
    "kind", ["qwen2_moe", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2"]
)
def test_experts_beside_shared_ones_and_corrected_scores(kind, tokens, tmp_path):
    out = exported(tmp_path, tokens, kind, VARIANTS.get(kind, {}))
    check_equal(tmp_path / "own", out, tokens)
    found = TensorFile(out / "model.safetensors")
    corrections = [n for n in found.names if n.endswith("e_score_correction_bias")]
    assert bool(corrections) == (kind in ("glm4_moe", "ernie4_5_moe", "minimax_m2"))
    assert all(found.read(n).array().any() for n in corrections)


@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss"])
def test_experts_that_are_one_tensor_in_published_models_are_refused(kind, tokens, tmp_path):
    with pytest.raises(cq.ArchitectureError, match=f"of '{kind}' holds several experts' matrices"):
        exported(tmp_path, tokens, kind)


def test_experts_in_several_files(tokens, tmp_path):
    exported(tmp_path, tokens, "mixtral")
    out = cqhf.export(tmp_path / "own", tmp_path / "sharded", shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight_packed" in index
    assert len(set(index.values())) > 3
    check_equal(tmp_path / "own", out, tokens)


def test_experts_without_a_token_and_with_one_are_exported(tokens, tmp_path):
    out = exported(tmp_path, tokens[:1, :12], "mixtral", {"num_experts": 32}, rounding="gptq")
    rows = [r for r in Stored(tmp_path / "own").report["matrices"] if "experts" in r["name"]]
    assert {0, 1} <= {r["tokens"] for r in rows}
    check_equal(tmp_path / "own", out, tokens)


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        (
            {"activations": "int8:token:symmetric"},
            cq.SpecError,
            "activations of experts must be none",
        ),
        ({"weights": "nvfp4"}, cq.SpecError, "experts must have no global scale"),
        ({"keep": [r"re:.*\.experts\..*"]}, cq.SpecError, "must all have one quantizer.*got None"),
        (
            {"layers": [{"pattern": r"re:.*\.down_proj", "weights": "int8:channel"}]},
            cq.SpecError,
            r"one quantizer, .*got int8:channel\S* for model.layers.0.mlp.experts.0.down_proj",
        ),
        (
            {"rotation": "merged", "block_size": 16},
            cq.RecipeError,
            "experts.0.down_proj can't be rotated at run time in Transformers",
        ),
    ],
)
def test_what_transformers_would_compute_otherwise_is_refused(
    recipe, error, words, tokens, tmp_path
):
    with pytest.raises(error, match=words):
        exported(tmp_path, tokens, "qwen3_moe", **recipe)
    model = cqhf.tiny_model("qwen3_moe", hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(error, match=words):
        cqhf.quantize(
            tmp_path / "float", Recipe(**{**RECIPE, **recipe}), tokens, tmp_path / "direct",
            reader="transformers",
        )  # fmt: skip
    assert not (tmp_path / "direct").exists()


def test_experts_that_files_hold_as_one_tensor_are_refused(monkeypatch, tokens, tmp_path):
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("mixtral")
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(cache, "mixtral", [])
    with pytest.raises(cq.ArchitectureError, match=re.escape("'mixtral' holds several experts'")):
        exported(tmp_path, tokens, "mixtral")
