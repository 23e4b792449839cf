"""The sizes that are told beforehand are those of the files."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_cli.app import app
from tests.models.test_gguf_files import VOCABULARY, tokenizer_of

HEADS = {"rotation": "heads", "activations": "none", "weights": "int4:group32:float16"}
BYTES = {"embeddings": "int8:group32", "head": "int8:group32"}
FILES = {
    "corequant": "own/corequant.safetensors",
    "compressed-tensors": "out/model.safetensors",
    "gguf": "model.gguf",
}


def within_one_percent(told, tmp_path, names):
    for name in names:
        size = (tmp_path / FILES[name]).stat().st_size
        assert told[name] == pytest.approx(size, rel=0.01), name


@pytest.mark.parametrize(
    ("kind", "tied", "recipe"),
    [
        ("llama", True, HEADS),
        ("llama", True, {**HEADS, **BYTES}),
        ("qwen2", False, {**HEADS, **BYTES}),
        ("qwen3", True, {**HEADS, "rotation": "offline"}),
        ("llama", False, {**HEADS, "embeddings": "int8:group32", "dtype": "float32"}),
    ],
)
def test_sizes_are_those_of_the_files(kind, tied, recipe, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY}
    cqhf.tiny_model(kind, tie_word_embeddings=tied, **sizes).save_pretrained(tmp_path / "float")
    tokenizer_of("gpt-2").save_pretrained(tmp_path / "float")
    tokens = np.random.default_rng(0).integers(0, VOCABULARY - 8, (2, 48))
    told = cqhf.sizes(cqhf.plan(tmp_path / "float", Recipe(**recipe)), tmp_path / "float")
    cqhf.quantize(tmp_path / "float", Recipe(**recipe), tokens, tmp_path / "own")
    cqhf.export(tmp_path / "own", tmp_path / "out")
    cqhf.export(tmp_path / "own", tmp_path / "model.gguf", to="gguf")
    within_one_percent(told, tmp_path, FILES)


@pytest.mark.parametrize(
    ("kind", "recipe", "readers"),
    [
        ("llama", {"weights": "int8:channel", "activations": "int8"}, ["compressed-tensors"]),
        ("llama", {"block_size": 16, "weights": "int4:channel:bfloat16"}, ["compressed-tensors"]),
        ("llama", {"weights": "nvfp4", "activations": "none"}, ["compressed-tensors"]),
        ("llama", {"weights": "mxfp4", "head": "int4:channel"}, []),
        ("llama", {"weights": "int3:group16:asymmetric"}, []),
        ("llama", {"weights": "float4_e2m1fn:channel", "embeddings": "int8:channel"}, []),
        ("gpt2", {"block_size": 16}, []),
        ("mixtral", {"weights": "int4:group16"}, []),
        (
            "mixtral",
            {"weights": "int4:group16", "rotation": "heads", "activations": "none"},
            ["compressed-tensors"],
        ),
    ],
)
def test_models_in_memory_have_sizes_too(kind, recipe, readers, tokens, tmp_path):
    model = cqhf.tiny_model(kind, hidden_size=64) if kind == "llama" else cqhf.tiny_model(kind)
    told = cqhf.sizes(cqhf.plan(model, Recipe(**recipe)), model)
    assert [name for name, size in told.items() if size] == ["corequant", *readers]
    cqhf.quantize(model, Recipe(**recipe), tokens, tmp_path / "own")
    if readers:
        cqhf.export(tmp_path / "own", tmp_path / "out")
    within_one_percent(told, tmp_path, ["corequant", *readers])


def test_the_command_tells_sizes_and_ties(tmp_path):
    cqhf.tiny_model("llama", tie_word_embeddings=True, hidden_size=64).save_pretrained(tmp_path)
    options = ["plan", str(tmp_path), "--weights", "int4:group16", "--rotation"]
    shown = " ".join(CliRunner().invoke(app, [*options, "heads"]).stdout.split())
    assert "everything else bfloat16, embedding and head one matrix (bfloat16)" in shown
    assert "size of the result: 0.1 MB as corequant's directory" in shown
    shown = " ".join(CliRunner().invoke(app, [*options, "offline"]).stdout.split())
    assert "embedding (bfloat16) and head (bfloat16) two matrices" in shown
    assert "note: model.embed_tokens and lm_head don't stay tied" in shown
    more = ["--embeddings", "int8:channel", "--head", "int8:channel", "--json"]
    found = json.loads(CliRunner().invoke(app, [*options, "heads", *more]).stdout)
    assert found["tied"] is True
    sizes = found["sizes"]
    assert 60_000 < sizes["corequant"] < sizes["compressed-tensors"] < 62_000
    assert sizes["gguf"] is None


def plan_of(folder, *options):
    return CliRunner().invoke(app, ["plan", str(folder), *options], catch_exceptions=False).stdout


@pytest.mark.parametrize(
    ("options", "rotation"),
    [((), "online"), (("--for", "transformers"), "heads"), (("--rotation", "offline"), "heads")],
)
def test_the_plan_says_what_one_matrix_would_save(options, rotation, tmp_path):
    fields = {"tie_word_embeddings": True, "hidden_size": 64, "intermediate_size": 128}
    cqhf.tiny_model("llama", **fields).save_pretrained(tmp_path / "large")
    cqhf.tiny_model("llama", **fields, vocab_size=16).save_pretrained(tmp_path / "small")
    told = json.loads(plan_of(tmp_path / "large", *options, "--json"))["sizes_if_tied"]
    assert told.pop("rotation") == rotation
    again = [*options[:2], "--rotation", rotation]
    found = json.loads(plan_of(tmp_path / "large", *again, "--json"))
    assert (found["tied"], found["sizes"]) == (True, told)
    assert "sizes_if_tied" not in found
    words = f"With --rotation {rotation} they do: 0.1 MB, but"
    shown = [" ".join(plan_of(tmp_path / name, *options).split()) for name in ("large", "small")]
    assert words in shown[0]
    assert "they do" not in shown[1]


@pytest.mark.parametrize(
    ("weights", "bits"),
    [
        ("int4:group16:symmetric:exact:bfloat16", 4 + 16 / 16),
        ("int4:group16:symmetric:mse:float16", 4 + 16 / 16),
        ("int4:group16:symmetric:mse", 4 + 32 / 16),
        ("int4:group16:asymmetric:mse:float16", 4 + 20 / 16),
        ("mxfp4", 4 + 8 / 32),
    ],
)
def test_the_plan_counts_scales_as_they_are_stored(weights, bits):
    recipe = Recipe(rotation="heads", weights=weights, activations="none")
    cost = cqhf.plan(cqhf.tiny_model("llama", hidden_size=64), recipe).cost()
    assert 32 * cost["quantized_mib"] / cost["float_mib"] == pytest.approx(bits, rel=1e-9)
