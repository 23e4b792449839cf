"""Directories are read as Transformers reads them, by every function alike, or refused by all."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.files.marks import CARD
from corequant_transformers.model.surroundings import quiet_transformers
from tests import capabilities
from tests.models.test_checkpoint import word_level

# Routers of bfloat16 may send a token elsewhere.
RECIPE = Recipe(block_size=16, weights="int8:channel:symmetric", activations=None, dtype="float32")


def write(folder, kind="llama", **config):
    cqhf.tiny_model(kind, **config).save_pretrained(folder)
    word_level(folder)
    return folder


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits


def transformers_reads(folder):
    with quiet_transformers():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def edit(folder, name="config.json", **fields):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def calls(tokens):
    """Everything that reads a float directory."""
    return {
        "plan": lambda folder: cqhf.plan(folder, RECIPE),
        "quantize": lambda folder: cqhf.quantize(folder, RECIPE, tokens),
        "load": lambda folder: cqhf.Source(folder).load(),
    }


def check_as_transformers(folder, tokens):
    """The loaded model is Transformers' own to the bit, the quantized one is near it."""
    wanted = logits(transformers_reads(folder), tokens)
    assert torch.equal(logits(cqhf.Source(folder).load(), tokens), wanted)
    found = logits(cqhf.quantize(folder, RECIPE, tokens).model, tokens)
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_a_single_file_comes_before_an_index(tokens, tmp_path):
    folder, other = write(tmp_path / "model"), write(tmp_path / "other", seed=7)
    shard = folder / "model-00001-of-00001.safetensors"
    shutil.copy(other / "model.safetensors", shard)
    names = dict.fromkeys(load_file(shard), shard.name)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_as_transformers(folder, tokens)
    assert [f.name for f in cqhf.Source(folder).shards()] == ["model.safetensors"]
    shard.unlink()
    check_as_transformers(folder, tokens)
    (folder / "model.safetensors.index.json").write_text("{")
    check_as_transformers(folder, tokens)
    assert "model.safetensors.index.json" not in {f.name for f in cqhf.Source(folder).files()}


def test_a_config_may_name_the_file(tokens, tmp_path):
    folder, other = write(tmp_path / "model"), write(tmp_path / "other", seed=7)
    shutil.copy(other / "model.safetensors", folder / "better.safetensors")
    edit(folder, transformers_weights="better.safetensors")
    check_as_transformers(folder, tokens)
    assert torch.equal(
        logits(cqhf.Source(folder).load(), tokens), logits(cqhf.Source(other).load(), tokens)
    )
    edit(folder, transformers_weights="../other/model.safetensors")
    for call in calls(tokens).values():
        with pytest.raises(cq.CheckpointError, match="transformers_weights of .* must name a file"):
            call(folder)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_may_be_stored_in_either_place(kept, tied, tokens, tmp_path):
    folder = write(tmp_path / "model", tie_word_embeddings=True)
    edit(folder, tie_word_embeddings=tied)
    file = folder / "model.safetensors"
    tensors = load_file(file, backend="pread")
    matrix = tensors.pop("model.embed_tokens.weight")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if kept in (name, "both"):
            tensors[name] = matrix.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    if tied or kept == "both":
        check_as_transformers(folder, tokens)
        model = cqhf.Source(folder).load()
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    else:
        for call in calls(tokens).values():
            with pytest.raises(cq.CheckpointError, match="lacks 1 weights"):
                call(folder)


def test_two_matrices_that_a_config_calls_tied_stay_two(tokens, tmp_path):
    folder = edit(write(tmp_path / "model"), tie_word_embeddings=True)
    check_as_transformers(folder, tokens)
    model = cqhf.Source(folder).load()
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
def test_prefixes_are_added_and_taken_away(kind, tokens, tmp_path):
    folder = write(tmp_path / "model", kind)
    wanted = logits(transformers_reads(folder), tokens)
    file = folder / "model.safetensors"
    tensors, prefix = (
        load_file(file, backend="pread"),
        "transformer." if kind == "gpt2" else "model.",
    )
    save_file({k.removeprefix(prefix): t for k, t in tensors.items()}, file, {"format": "pt"})
    check_as_transformers(folder, tokens)
    assert torch.equal(logits(cqhf.Source(folder).load(), tokens), wanted)
    both = {k.removeprefix(prefix): t.clone() for k, t in tensors.items()} | tensors
    save_file(both, file, {"format": "pt"})
    for call in calls(tokens).values():
        with pytest.raises(cq.CheckpointError, match="must be in the files once"):
            call(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("named", ["dtype", "torch_dtype"])
def test_dtypes_of_files_and_configs_are_read(dtype, stored, named, tokens, tmp_path):
    cqhf.tiny_model("llama").to(stored).save_pretrained(tmp_path / "model")
    word_level(tmp_path / "model")
    values = json.loads((tmp_path / "model/config.json").read_text())
    values.pop("dtype", None)
    (tmp_path / "model/config.json").write_text(json.dumps({**values, named: "bfloat16"}))
    with quiet_transformers():
        wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    found = cqhf.Source(tmp_path / "model").load(dtype)
    assert found.dtype is dtype
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert torch.equal(logits(found, tokens), logits(wanted, tokens))


@pytest.mark.parametrize("kind", ["gemma", "qwen3_moe", "opt", "phi3", "gemma3_text"])
def test_models_are_transformers_own(kind, tokens, tmp_path):
    folder = write(tmp_path / "model", kind)
    wanted, found = transformers_reads(folder), cqhf.Source(folder).load()
    assert torch.equal(logits(found, tokens), logits(wanted, tokens))
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())
    assert {n for n, _ in found.named_buffers()} == {n for n, _ in wanted.named_buffers()}
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pytorch_model.bin"], "pytorch_model.bin may run code"),
        (["model.fp16.safetensors"], "doesn't read model.fp16.safetensors without being told"),
        ([], "model.safetensors is missing"),
    ],
)
def test_other_weights_are_refused(names, words, tokens, tmp_path):
    folder = write(tmp_path / "model")
    weights = folder / "model.safetensors"
    for name in names:
        shutil.copy(weights, folder / name)
    weights.unlink()
    for call in calls(tokens).values():
        with pytest.raises(cq.CheckpointError, match=words):
            call(folder)


def test_an_adapter_is_refused(tokens, tmp_path):
    folder = write(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    for call in calls(tokens).values():
        with pytest.raises(cq.CheckpointError, match="a whole model, got one with an adapter"):
            call(folder)


# ---- configs


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation of .* eager, sdpa"),
        ({"_attn_implementation": "someone/kernel"}, "must be one of eager.* got 'someone/kernel'"),
        ({"attn_implementation": {"": "kernels-community/x"}}, "got 'kernels-community/x'"),
        ({"attn_implementation": "paged|a/b@main:f"}, "attn_implementation of"),
        ({"experts_implementation": "sonicmoe"}, "experts_implementation of"),
        ({"text_config": {"attn_implementation": "a/b"}}, "got 'a/b'"),
        ({"configuration_files": ["config.4.0.0.json"]}, "must not have the field configuration_f"),
        ({"hidden_act": "swishy"}, r"config.json can't be made .*hidden_act is 'swishy', .*silu"),
        (
            {"rope_parameters": {"rope_type": "foo", "rope_theta": 100.0}},
            r"rope_parameters.rope_type is 'foo', supported are default.*yarn",
        ),
        ({"rope_scaling": {"type": "foo", "factor": 2.0}}, "'foo'"),
        ({"dtype": "float33"}, "float33"),
        ({"hidden_act": None}, "can't be"),
        ({"hidden_act": "prelu"}, "lacks .* weights"),
        ({"vocab_size": 127}, "must have shape"),
    ],
)
def test_fields_that_no_model_is_made_of_are_named_by_all(fields, words, tokens, tmp_path):
    folder = edit(write(tmp_path / "model"), **fields)
    for call in calls(tokens).values():
        with pytest.raises(cq.CheckpointError, match=words):
            call(folder)


def test_what_a_config_says_about_outputs_has_no_influence(tokens, tmp_path):
    folder = write(tmp_path / "model")
    wanted = cqhf.quantize(folder, RECIPE, tokens)
    edit(folder, return_dict=False, output_hidden_states=True, output_attentions=True)
    found = cqhf.quantize(folder, RECIPE, tokens, tmp_path / "out")
    loaded = cqhf.load(tmp_path / "out")
    assert torch.equal(logits(loaded, tokens), logits(wanted.model, tokens))
    measured = [cqhf.evaluate(m, tokens).perplexity for m in (found.model, wanted.model)]
    assert measured[0] == measured[1]
    assert np.isfinite(cqhf.evaluate(cqhf.Source(folder).load(), tokens).perplexity)


@pytest.mark.parametrize("name", ["float_config.json", "config.json"])
def test_no_kernel_is_fetched_for_a_saved_directory(name, tokens, tmp_path):
    cqhf.quantize(cqhf.tiny_model("llama"), RECIPE, tokens, tmp_path / "out")
    edit(tmp_path / "out", name, attn_implementation="someone/kernel")
    reads = (
        lambda: cqhf.load(tmp_path / "out", verify=False),
        lambda: cqhf.load_tokenizer(tmp_path / "out", verify=False),
        lambda: cqhf.export(tmp_path / "out", tmp_path / "export", verify=False),
    )
    for read in reads:
        with pytest.raises(cq.CheckpointError, match=f"{name} must be one of eager"):
            read()


def test_no_kernel_is_fetched_for_an_export(tokens, tmp_path):
    recipe = Recipe(rotation="offline", weights="int4:group16", activations="none")
    cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens, tmp_path / "own")
    cqhf.export(tmp_path / "own", tmp_path / "out")
    edit(tmp_path / "out", attn_implementation="someone/kernel")
    with pytest.raises(cq.CheckpointError, match="got 'someone/kernel'"):
        cqhf.Source(tmp_path / "out")


# ---- files that lead elsewhere, or nowhere


@capabilities.links
@pytest.mark.parametrize(
    "name",
    [
        "LICENSE", "tokenizer.model", "vocab.json", "chat_template.jinja", "merges.txt",
        "generation_config.json", "config.json", "model.safetensors",
    ],
)  # fmt: skip
def test_links_out_of_the_directory_are_refused(name, tokens, tmp_path):
    folder = write(tmp_path / "model")
    secret = tmp_path / "secret"
    if (folder / name).exists():
        (folder / name).rename(secret)
    else:
        secret.write_text("private")
    (folder / name).symlink_to("../secret")
    for call in calls(tokens).values():
        with pytest.raises(cq.CheckpointError, match="must be a file of its own folder"):
            call(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("gone")
    for call in calls(tokens).values():
        with pytest.raises(cq.CheckpointError, match="is missing"):
            call(folder)


@capabilities.links
def test_links_inside_the_directory_and_to_blobs_are_followed(tokens, tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    folder.mkdir(parents=True)
    write(blobs)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(os.path.relpath(file, folder))
    (blobs / "licence").write_text("of the model")
    (folder / "LICENSE").symlink_to("../../blobs/licence")
    cqhf.quantize(folder, RECIPE, tokens, tmp_path / "out")
    assert (tmp_path / "out/LICENSE").read_text() == "of the model"
    cqhf.load(tmp_path / "out")


@capabilities.links
def test_a_link_out_of_a_saved_directory_is_not_exported(tokens, tmp_path):
    recipe = Recipe(rotation="offline", weights="int4:group16", activations="none")
    cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens, tmp_path / "own")
    (tmp_path / "secret").write_text("private")
    (tmp_path / "own/LICENSE").symlink_to("../secret")
    with pytest.raises(cq.CheckpointError):
        cqhf.export(tmp_path / "own", tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


@capabilities.pipes
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_pipes_are_not_waited_for(name, tokens, tmp_path):
    folder = write(tmp_path / "model")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for call in calls(tokens).values():
        with pytest.raises(cq.CheckpointError, match="regular file"):
            call(folder)


@capabilities.pipes
def test_pipes_in_saved_directories_are_not_waited_for(tokens, tmp_path):
    source, out = write(tmp_path / "model"), tmp_path / "out"
    cqhf.quantize(source, RECIPE, tokens, out)
    for name in sorted(f.name for f in out.iterdir()):
        content = (out / name).read_bytes()
        (out / name).unlink()
        os.mkfifo(out / name)
        if name == CARD:
            # No reader opens it.
            cqhf.load(out)
        else:
            with pytest.raises(cq.CheckpointError):
                cqhf.load(out)
        (out / name).unlink()
        (out / name).write_bytes(content)
    cqhf.load(out)


def test_directories_with_names_of_files_are_not_copied(tokens, tmp_path):
    folder = write(tmp_path / "model")
    (folder / "tokenizer_original").mkdir()
    (folder / "chat_template.jinja").mkdir()
    cqhf.quantize(folder, RECIPE, tokens, tmp_path / "out")
    assert not (tmp_path / "out/tokenizer_original").exists()
    cqhf.load(tmp_path / "out")


def test_a_config_with_a_byte_order_mark_is_refused_as_by_transformers(tokens, tmp_path):
    folder = write(tmp_path / "model")
    file = folder / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    with pytest.raises(OSError, match="not a valid JSON file"):
        transformers_reads(folder)
    for call in calls(tokens).values():
        with pytest.raises(cq.CheckpointError, match="must not begin with a byte order mark"):
            call(folder)
