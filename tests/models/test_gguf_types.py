"""GGUF files of every model type that llama.cpp knows: run by it, and read back as a source."""

from __future__ import annotations

import re

import gguf
import numpy as np
import pytest

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant.storage.gguf_file import GgufFile
from corequant_transformers.exports import to_gguf
from corequant_transformers.model.gguf_files.dialects import DIALECTS
from tests.models.llamacpp import serving
from tests.models.test_gguf_files import (
    LLAMA3,
    VOCABULARY,
    log_probabilities,
    quantized,
    write_model,
)

SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
FULL = {"layer_types": ["full_attention"] * 2}
VARIANTS = {
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "ministral": {**FULL, "sliding_window": 8},
    "smollm3": {"num_hidden_layers": 5},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
        "mlp_bias": True,
    },
    "qwen3": {"head_dim": 32},
    "mixtral": {"sliding_window": None},
    "qwen3_moe": {"moe_intermediate_size": 64, "norm_topk_prob": True},
    "seed_oss": {"attention_out_bias": False},
    "phi3": {"sliding_window": None},
    "olmo3": {**SLIDING, "max_position_embeddings": 64},
    "exaone4": {**FULL, "sliding_window": None},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "gemma3_text": {
        "num_hidden_layers": 7,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": None,
    },
    "starcoder2": {"sliding_window": None},
    "stablelm": {"use_qkv_bias": True},
}
"""What tiny models are made with, away from the defaults where these hide something."""

HEADS = {"gemma", "starcoder2", "stablelm", "gpt2"}
"""Types whose residual stream must stay as it is."""


def made(tmp_path, kind, **changes):
    """Return a quantized directory and its GGUF file."""
    config = {**VARIANTS.get(kind, {}), **changes}
    source = write_model(tmp_path / "source", kind, **config)
    rotation = "heads" if kind in HEADS else "offline"
    own = quantized(tmp_path / "own", source, rotation=rotation, activations="none")
    return own, cqhf.export(own, tmp_path / "model.gguf", "gguf")


def prompt(model, tokenizer, length):
    """Return ids after which the most probable token is text of its own."""
    generator = np.random.default_rng(length)
    while True:
        ids = [int(i) for i in generator.integers(2, 300, length)]
        first = int(log_probabilities(model, ids).argmax())
        if 2 <= first < VOCABULARY - 8 and "\ufffd" not in tokenizer.decode([first]):
            return ids


@pytest.mark.parametrize("kind", [dialect.model_type for dialect in DIALECTS])
def test_llama_cpp_and_source_read_what_is_written(kind, tmp_path):
    own, file = made(tmp_path, kind)
    model = cqhf.load(own)
    ids = prompt(model, cqhf.load_tokenizer(own), 40)
    expected = log_probabilities(model, ids)
    assert expected.std() > 0.3
    with serving(file, VOCABULARY) as next_token:
        found = next_token(ids)
    assert np.abs(found - expected).max() <= 0.2
    assert np.abs(found - expected).mean() <= 0.05
    # Read as a float model: the decoded codes, and an embedding that was float16.
    back = cqhf.Source(file).load()
    assert np.abs(log_probabilities(back, ids) - expected).max() <= 5e-3


def test_a_file_is_quantized_a_part_at_a_time_as_its_model_in_memory(tmp_path):
    _, file = made(tmp_path, "qwen3")
    tokens = np.random.default_rng(0).integers(2, 300, (2, 24))
    recipe = Recipe(block_size=16)
    one = cqhf.quantize(file, recipe, tokens, tmp_path / "one")
    two = cqhf.quantize(cqhf.Source(file).load(), recipe, tokens, tmp_path / "two")
    ids = [5, 6, 7, 8]
    a, b = log_probabilities(one.model, ids), log_probabilities(two.model, ids)
    np.testing.assert_array_equal(a, b)
    first, second = ((tmp_path / n / "corequant.safetensors").read_bytes() for n in ("one", "two"))
    assert first == second


@pytest.mark.parametrize(
    ("kind", "rotation", "config", "error", "words"),
    [
        ("starcoder2", "offline", {}, cq.RecipeError, "computes LayerNorms.*rotation 'heads'"),
        ("gemma", "offline", {}, cq.RecipeError, "no head of its own.*rotation 'heads'"),
        (
            "gemma2",
            "heads",
            {"attn_logit_softcapping": None},
            cq.ArchitectureError,
            "must be given",
        ),
        (
            "gemma3_text",
            "heads",
            {"attn_logit_softcapping": 2.0},
            cq.ArchitectureError,
            "attn_logit_softcapping must be null, got 2.0",
        ),
        (
            "gemma3_text",
            "heads",
            {"query_pre_attn_scalar": 17},
            cq.ArchitectureError,
            "query_pre_attn_scalar must be 16, got 17",
        ),
        (
            "gemma2",
            "heads",
            {"layer_types": ["full_attention", "sliding_attention"]},
            cq.ArchitectureError,
            "a multiple of 2, so layer_types must say that",
        ),
        ("smollm3", "heads", {"no_rope_layers": [1] * 5}, cq.ArchitectureError, "every fourth"),
        ("olmo2", "heads", {"attention_bias": True}, cq.ArchitectureError, "attn_output.bias"),
        ("helium", "heads", {}, cq.ArchitectureError, "written for llama, .*got 'helium'"),
        (
            "qwen2",
            "heads",
            {"rope_parameters": LLAMA3},
            cq.ArchitectureError,
            "rope_type must be default or linear for .*'qwen2', got 'llama3'",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_beforehand(
    kind, rotation, config, error, words, tmp_path
):
    config = {**VARIANTS.get(kind, {}), **config}
    source = write_model(tmp_path / "source", kind, **config)
    recipe = Recipe(rotation=rotation, weights="int8:group32:symmetric:float16", activations="none")
    tokens = np.zeros((1, 8), np.int64)
    with pytest.raises(error, match=words):
        cqhf.quantize(source, recipe, tokens, tmp_path / "m.gguf", reader="llama.cpp")
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    rope = {"rope_type": "default", "rope_theta": 100.0}
    return made(folder, "llama", attention_bias=False, mlp_bias=False, rope_parameters=rope)[1]


def rewritten(file, target, fields=(), tensors=(), drop=()):
    """Write a GGUF file again with other fields and tensors."""
    old = GgufFile(file)
    writer = gguf.GGUFWriter(target, old.fields["general.architecture"])
    changed = {**{k: v for k, v in old.fields.items() if k.startswith("llama.")}, **dict(fields)}
    for key, value in changed.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name in old.tensors:
        if name not in drop:
            writer.add_tensor(name, old.read(name))
    for name, value in dict(tensors).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("fields", "tensors", "drop", "words"),
    [
        ({"llama.rope.scaling.type": "yarn"}, {}, (), "rope.scaling.type of .* got 'yarn'"),
        ({"llama.block_count": None}, {}, (), "llama.block_count of .* positive integer, got None"),
        ({"llama.attention.sliding_window": 8}, {}, (), "must have no sliding window"),
        ({"llama.attention.value_length": 8}, {}, (), "values as wide as keys"),
        ({}, {"blk.0.other.weight": np.ones(3, np.float32)}, (), "holds 1 tensors .*blk.0.other"),
        ({}, {}, ("blk.1.ffn_up.weight",), "lacks 1 weights, the first is blk.1.ffn_up.weight"),
        ({"llama.embedding_length": 32}, {}, (), "must have shape"),
        (
            {},
            {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)},
            (),
            "must be those of Llama 3",
        ),
    ],
)
def test_files_that_say_something_else_are_refused(fields, tensors, drop, words, plain, tmp_path):
    file = rewritten(plain, tmp_path / "m.gguf", fields, tensors, drop)
    with pytest.raises(cq.CorequantError, match=words):
        cqhf.Source(file).load()


def test_llama_3_s_frequencies_are_read(plain, tmp_path):
    base = {"rope_theta": 5e5, "factor": 32.0}
    rope = {**LLAMA3, "original_max_position_embeddings": 8192, **base}
    factors = to_gguf.rope_factors(cqhf.tiny_model("llama", rope_parameters=rope).config)
    fields = {"llama.rope.freq_base": base["rope_theta"]}
    file = rewritten(plain, tmp_path / "m.gguf", fields, {"rope_freqs.weight": factors})
    assert cqhf.Source(file).config().rope_parameters == rope


def test_damaged_files_are_refused(plain, tmp_path):
    data = plain.read_bytes()
    place = data.index(b"llama.block_count")
    cases = {
        "short": data[:1000],
        "magic": b"GGUX" + data[4:],
        "version": data[:4] + b"\x09" + data[5:],
        "counts": data[:8] + b"\xff" * 8 + data[16:],
        "ends": data[:-40],
        "kind": data[: place + 17] + b"\x63" + data[place + 18 :],
        "length": data[: place - 8] + b"\xff" * 8 + data[place:],
    }
    for name, changed in cases.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(changed)
        with pytest.raises(cq.CheckpointError, match=re.escape(str(file))):
            GgufFile(file)
    with pytest.raises(cq.CheckpointError, match="has no tensor none"):
        GgufFile(plain).read("none")


def test_numbers_of_a_file_are_those_of_the_gguf_package(plain, tmp_path):
    target = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(target, "llama")
    numbers = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    writer.add_array("some.texts", ["a", "ü", ""])
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_bool("some.truth", True)
    writer.add_int64("some.number", -(2**40))
    writer.add_tensor("f32", numbers)
    writer.add_tensor("f16", numbers.astype(np.float16))
    for name in ("BF16", "Q5_0", "Q8_0"):
        kind = getattr(gguf.GGMLQuantizationType, name)
        writer.add_tensor(name.lower(), gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(target)
    assert file.fields["some.texts"] == ["a", "ü", ""]
    assert file.fields["some.numbers"].tolist() == [1.5, 2.5]
    assert file.fields["some.truth"] is True
    assert file.fields["some.number"] == -(2**40)
    for tensor in gguf.GGUFReader(target).tensors:
        meant = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.read(tensor.name), meant)
        np.testing.assert_array_equal(file.read(tensor.name, slice(2, 5)), meant[2:5])
