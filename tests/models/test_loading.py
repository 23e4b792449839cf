"""``from_pretrained`` and ``pipeline`` on directories that ``quantize`` wrote."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers import auto

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.checkpoint.quantizer import CorequantConfig, register_method
from corequant_transformers.files.digests import write_digests
from corequant_transformers.model.quantized_linear import QuantizedLinear
from tests.models.test_checkpoint import edit_json, word_level

LAYER = "model.layers.0.mlp.down_proj"
W4A16 = Recipe(rotation="offline", weights="int4:group16", activations="none")
W4A4 = Recipe(block_size=16)
RECIPES = {
    "W4A4": W4A4,
    "W4A16": W4A16,
    "W3A8": Recipe(weights="int3:group16:asymmetric", activations="int8:group8", block_size=12),
    "NVFP4": Recipe(weights="nvfp4", activations="none", block_size=16),
    "online": Recipe(rotation="online", block_size=16),
}
ids = torch.from_numpy(np.random.default_rng(1).integers(1, 128, (2, 20)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokens):
    """A W4A4 llama with a tokenizer."""
    place = tmp_path_factory.mktemp("loading")
    model = cqhf.tiny_model("llama", pad_token_id=0, eos_token_id=0)
    model.save_pretrained(place / "float")
    word_level(place / "float")
    cqhf.quantize(place / "float", W4A4, tokens, place / "out")
    return place / "out"


@pytest.fixture
def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model, given=ids):
    return model(given).logits


def cast(model, *dtypes):
    """Cast a model, but for the rotary frequencies, which Transformers loads in float32."""
    kept = model.model.rotary_emb.inv_freq
    for dtype in dtypes:
        model.to(dtype)
    model.model.rotary_emb.inv_freq = kept
    return model


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def assert_same(model, other):
    """Compare two models' codes, decoded weights and logits to the bit."""
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name
    for name, layer in layers(model).items():
        assert torch.equal(layer.weight, layers(other)[name].weight), name
    assert torch.equal(logits(model), logits(other))


# ---- what is loaded


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_model_is_that_of_load(recipe, tokens, tmp_path):
    cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens, tmp_path / "out")
    model = load(tmp_path / "out")
    assert type(model) is transformers.LlamaForCausalLM
    assert not model.training
    assert_same(model, cqhf.load(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "opt", "gemma2", "mixtral", "qwen3_moe"])
def test_architectures_whose_modules_are_rearranged_load(kind, tokens, tmp_path):
    cqhf.quantize(cqhf.tiny_model(kind), W4A4, tokens, tmp_path / "out")
    assert_same(load(tmp_path / "out"), cqhf.load(tmp_path / "out"))


@pytest.mark.parametrize("rotation", ["offline", "heads"])
def test_tied_embeddings_load(rotation, tokens, tmp_path):
    model = cqhf.tiny_model("llama", tie_word_embeddings=True)
    recipe = Recipe(rotation=rotation, weights="int4:group16", activations="none")
    cqhf.quantize(model, recipe, tokens, tmp_path / "out")
    model, tied = load(tmp_path / "out"), rotation == "heads"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_same(model, cqhf.load(tmp_path / "out"))
    # Written as it is: with a head of its own if it was given one.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2, requires_grad=False)
    model.save_pretrained(tmp_path / "new")
    assert_same(model, load(tmp_path / "new"))
    assert_same(model, cqhf.load(tmp_path / "new"))


def test_a_head_that_is_not_tied_any_more_is_not_tied_again(copy_of):
    reseal(copy_of, tie_word_embeddings=True)
    for read in (load, cqhf.load):
        with pytest.raises(cq.CheckpointError, match="tie_word_embeddings of .* must be false"):
            read(copy_of)


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_registering_waits_for_transformers():
    """Importing the package imports neither Transformers nor torch; see also ``test_card``."""
    assert run(
        """
        import sys, corequant_transformers
        print("transformers" in sys.modules, "torch" in sys.modules)
        """
    ) == ["False False"]


def test_a_pipeline(folder):
    generate = transformers.pipeline("text-generation", str(folder))
    generate.tokenizer.pad_token = "[UNK]"
    found = generate(["a b", "c"], max_new_tokens=3, batch_size=2)
    assert [len(texts) for texts in found] == [1, 1]


def test_registering_after_transformers_was_imported_and_twice(folder):
    assert run(
        f"""
        import transformers
        from transformers.quantizers import auto
        print("corequant" in auto.AUTO_QUANTIZER_MAPPING)
        import corequant_transformers
        print("corequant" in auto.AUTO_QUANTIZER_MAPPING)
        model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})
        print(model.config.quantization_config.quant_method)
        """
    ) == ["False", "True", "corequant"]
    before = auto.AUTO_QUANTIZER_MAPPING["corequant"]
    register_method()
    assert auto.AUTO_QUANTIZER_MAPPING["corequant"] is before


def test_the_loaded_config_says_what_the_directory_says(folder):
    written = json.loads((folder / "config.json").read_text())
    config = load(folder).config
    assert config.quantization_config.to_dict() == written["quantization_config"]
    assert config.transformers_weights == written["transformers_weights"]
    assert json.loads(config.to_json_string())["model_type"] == "llama"


# ---- generating


def test_generating_with_a_cache_equals_generating_without(folder):
    model, own = load(folder), cqhf.load(folder)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **options)
    assert cached.shape == (2, 28)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert torch.equal(cached, own.generate(ids, use_cache=True, **options))


def test_sequences_padded_on_the_left_are_continued_as_alone(folder):
    model = load(folder)
    short, options = ids[:1, 9:], {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    batch = torch.cat([torch.nn.functional.pad(short, (9, 0)), ids[1:]])
    mask = torch.ones_like(batch)
    mask[0, :9] = 0
    alone = model.generate(short, attention_mask=torch.ones_like(short), pad_token_id=0, **options)
    found = model.generate(batch, attention_mask=mask, pad_token_id=0, **options)
    assert torch.equal(found[0, 20:], alone[0, 11:])


@pytest.mark.parametrize("name", Recipe.presets())
def test_every_preset_loads_and_generates(name, tokens, tmp_path):
    """Three blocks; token by token what the model of ``load`` finds likeliest without a cache."""
    model = cqhf.tiny_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    cqhf.quantize(model, Recipe.preset(name), tokens, tmp_path / "out")
    model, own, expected = load(tmp_path / "out"), cqhf.load(tmp_path / "out"), ids
    assert_same(model, own)
    for _ in range(5):
        following = logits(own, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], -1)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_quantized_embeddings_and_heads_load_cast_copy_and_are_saved(tied, tokens, tmp_path):
    model = cqhf.tiny_model("llama", tie_word_embeddings=tied)
    recipe = Recipe(
        rotation="heads" if tied else "offline",
        weights="int4:group16",
        activations="none",
        embeddings="int8:channel",
        head="int8:channel",
    )
    cqhf.quantize(model, recipe, tokens, tmp_path / "out")
    model, own = load(tmp_path / "out"), cqhf.load(tmp_path / "out")
    assert model.config.tie_word_embeddings == tied
    assert_same(model, own)
    other = copy.deepcopy(model)
    assert_same(cast(other, torch.bfloat16, torch.float32), own)
    assert not any(other.load_state_dict(model.state_dict()))
    assert_same(other, own)
    assert_same(load(tmp_path / "out", dtype="bfloat16"), cast(own, torch.bfloat16))
    model.save_pretrained(tmp_path / "new")
    name = "corequant.safetensors"
    assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert_same(load(tmp_path / "new"), model)


def test_layers_that_differ_load(tokens, tmp_path):
    recipe = Recipe(
        rotation="offline",
        weights="int4:group16",
        activations="none",
        layers=("re:.*down_proj=int8:channel",),
        keep=("re:.*o_proj",),
    )
    cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens, tmp_path / "out")
    model = load(tmp_path / "out")
    assert {str(m.quantized.spec.format.name) for m in layers(model).values()} == {"int4", "int8"}
    assert isinstance(model.model.layers[0].self_attn.o_proj, torch.nn.Linear)
    assert_same(model, cqhf.load(tmp_path / "out"))
    model.save_pretrained(tmp_path / "new")
    assert_same(model, load(tmp_path / "new"))


def test_a_static_cache_and_beams(folder):
    model = load(folder)
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    plain = model.generate(ids, **options)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(plain, static)
    assert model.generate(ids, num_beams=2, **options).shape == (2, 25)


# ---- devices and dtypes


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}])
def test_device_maps_of_one_device(place, folder):
    assert_same(load(folder, device_map=place, low_cpu_mem_usage=True), cqhf.load(folder))


@pytest.mark.parametrize("other", ["disk", 0])
def test_layers_off_their_device_are_refused(other, folder):
    places = {"model.embed_tokens": "cpu", "model.layers": other, "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(cq.BackendError, match="device_map must not offload"):
        load(folder, device_map=places)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.float64])
def test_another_dtype_changes_no_codes(dtype, folder):
    wide, model = cqhf.load(folder), load(folder, dtype=dtype)
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in model.parameters()} == {kind}
    for name, layer in layers(model).items():
        exact = layers(wide)[name]
        assert layer.weight.dtype == kind
        assert torch.equal(layer.weight, exact.weight.to(kind))
        assert np.array_equal(layer.quantized.codes, exact.quantized.codes)
        assert layer.quantized.scales.dtype == np.float32
        assert np.array_equal(layer.quantized.scales, exact.quantized.scales)
    assert torch.equal(logits(model), logits(cast(wide, kind)))


def test_a_dtype_without_arithmetic_is_refused(folder):
    with pytest.raises(cq.SpecError, match="dtype must be one of float32"):
        load(folder, dtype=torch.float8_e4m3fn)
    with pytest.raises(cq.SpecError, match="must compute in one of float32"):
        cqhf.load(folder).to(torch.float8_e4m3fn)


def test_casting_there_and_back_loses_nothing_of_quantized_layers(folder):
    model, exact = load(folder), cqhf.load(folder)
    model.to(torch.bfloat16)
    assert layers(model)[LAYER].weight.dtype == torch.bfloat16
    model.to(torch.float32)
    for name, layer in layers(model).items():
        assert torch.equal(layer.weight, layers(exact)[name].weight)
    with pytest.raises(ValueError, match="not supported for quantized model"):
        load(folder).half()
    halved = cqhf.load(folder).half().double()
    assert torch.equal(layers(halved)[LAYER].weight, layers(exact)[LAYER].weight.double())


def test_float16_that_cannot_hold_a_weight_is_refused(folder, tmp_path):
    model = cqhf.load(folder)
    model.model.embed_tokens.weight[3, 3] = 1e5
    model.save_pretrained(tmp_path / "large")
    load(tmp_path / "large")
    with pytest.raises(cq.NonFiniteError, match="embed_tokens.weight"):
        load(tmp_path / "large", dtype="float16")


def test_compiling_gives_the_same_logits(folder):
    model = load(folder)
    expected = logits(model)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


# ---- copies


def test_a_state_dict_carries_codes_from_model_to_model(folder, tokens, tmp_path):
    cqhf.quantize(cqhf.tiny_model("llama", seed=5), W4A4, tokens, tmp_path / "other")
    model, other = load(folder), load(tmp_path / "other")
    assert not torch.equal(logits(model), logits(other))
    state = model.state_dict()
    kept = load_file(folder / "corequant.safetensors", backend="pread")
    assert state.keys() == kept.keys()
    # What isn't quantized is stored in bfloat16.
    assert all(torch.equal(state[name], kept[name].to(state[name].dtype)) for name in kept)
    assert not any(other.load_state_dict(state))
    assert_same(model, other)
    # The state is a copy, as far as codes go.
    state[f"{LAYER}.weight_scale"].mul_(2)
    assert_same(model, other)


def test_a_state_dict_that_lacks_codes_or_has_wrong_ones_is_refused(folder):
    model, state = load(folder), load(folder).state_dict()
    some = {k: v for k, v in state.items() if not k.startswith(f"{LAYER}.weight_")}
    with pytest.raises(RuntimeError, match=f"Missing key.*{LAYER}.weight_packed"):
        model.load_state_dict(some)
    lacking = {k: v for k, v in state.items() if k != f"{LAYER}.weight_scale"}
    with pytest.raises(cq.CheckpointError, match=f"{LAYER}.weight_scale is missing"):
        model.load_state_dict(lacking)
    state[f"{LAYER}.weight_scale"] = state[f"{LAYER}.weight_scale"].half()
    with pytest.raises(cq.CheckpointError, match=f"{LAYER}.weight_scale must be float32"):
        model.load_state_dict(state)
    assert_same(model, cqhf.load(folder))


@pytest.mark.parametrize("load_it", [load, cqhf.load], ids=["from_pretrained", "load"])
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_on_their_own(again, load_it, folder, tmp_path):
    model = load_it(folder)
    other = again(model)
    assert_same(model, other)
    other.model.norm.weight.mul_(2)
    layers(other)[LAYER].quantized.scales[:] = 1
    assert_same(model, cqhf.load(folder))
    other.save_pretrained(tmp_path / "other")
    again = cqhf.load(tmp_path / "other")
    assert torch.equal(again.model.norm.weight, other.model.norm.weight)
    assert (layers(again)[LAYER].quantized.scales == 1).all()


def test_a_model_is_freed_when_its_last_name_is_gone(folder):
    load(folder)
    gc.collect()
    gc.disable()
    try:
        for read in (load, cqhf.load):
            model = read(folder)
            alive = weakref.ref(layers(model)[LAYER])
            del model
            assert alive() is None, read
    finally:
        gc.enable()


# ---- saving


@pytest.mark.parametrize("load_it", [load, cqhf.load], ids=["from_pretrained", "load"])
def test_saving_writes_such_a_directory(load_it, folder, tmp_path):
    model = load_it(folder)
    model.save_pretrained(tmp_path / "new", safe_serialization=True, max_shard_size="1MB")
    for name in ("corequant.safetensors", "float_config.json", "recipe.toml", "config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes(), name
    for read in (load, cqhf.load):
        assert_same(model, read(tmp_path / "new"))
    assert cqhf.check_digests(tmp_path / "new")
    with pytest.raises(cq.OutputError, match="new or empty directory"):
        model.save_pretrained(tmp_path / "new")


def test_a_tokenizer_may_be_saved_next_to_the_model(folder, tmp_path):
    load(folder).save_pretrained(tmp_path / "new")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "new")
    assert_same(load(tmp_path / "new"), cqhf.load(tmp_path / "new"))
    assert cqhf.load_tokenizer(tmp_path / "new")("a b").input_ids == [1, 2]


@pytest.mark.parametrize(
    ("name", "value"), [("state_dict", {}), ("variant", "fp16"), ("push_to_hub", True), ("x", 1)]
)
def test_options_that_cannot_be_followed_are_refused(name, value, folder, tmp_path):
    with pytest.raises(cq.OutputError, match=f"called without {name} .* nothing was written"):
        load(folder).save_pretrained(tmp_path / "new", **{name: value})
    assert not (tmp_path / "new").exists()


def test_a_model_that_was_cast_is_saved_as_it_computes(folder, tmp_path):
    model = load(folder, dtype="bfloat16")
    model.save_pretrained(tmp_path / "new")
    again = load(tmp_path / "new")
    assert again.dtype == torch.bfloat16
    assert_same(model, again)


def test_evaluating_and_exporting_what_was_saved(folder, tokens, tmp_path):
    model = load(folder)
    assert cqhf.evaluate(model, tokens) == cqhf.evaluate(cqhf.load(folder), tokens)
    model.save_pretrained(tmp_path / "new")
    one, two = (cqhf.export(f, tmp_path / f.name[::-1]) for f in (folder, tmp_path / "new"))
    for name in ("model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


# ---- what is refused


def reseal(folder, **changes):
    edit_json(folder / "config.json", **changes)
    write_digests(folder)


def settings(folder, **changes):
    own = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {k: v for k, v in {**own, **changes}.items() if v is not ...}


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def rename_tensor(folder):
    file = folder / "corequant.safetensors"
    tensors = load_file(file, backend="pread")
    tensors["model.other.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    write_digests(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: flip(f / "corequant.safetensors", -5), "not as it was written"),
        (lambda f: flip(f / "recipe.toml", 5), "not as it was written"),
        (lambda f: (f / "corequant.sha256").unlink(), "corequant.sha256 is missing"),
        (lambda f: (f / "x.json").write_text("{}"), "is not among the files"),
        (lambda f: os.truncate(f / "corequant.safetensors", 3), "is truncated"),
        (lambda f: os.truncate(f / "corequant.safetensors", 9000), "corequant.safetensors"),
        (lambda f: (f / "corequant.safetensors").unlink(), "corequant.safetensors"),
        (rename_tensor, "unexpected tensor model.other.weight|lacks the tensor model.norm.weight"),
        (lambda f: reseal(f, num_hidden_layers=1), "unexpected tensor model.layers.1"),
        (lambda f: reseal(f, vocab_size=64), "must have shape .64, 48., got .128, 48."),
        (lambda f: reseal(f, model_type="mistral", num_key_value_heads=4), "must"),
        (
            lambda f: reseal(f, quantization_config=settings(f, format_version=0)),
            r"format_version of .* must be \d+ for this corequant .* got 0, written by corequant",
        ),
        (
            lambda f: reseal(
                f, quantization_config=settings(f, format_version=..., corequant_version=...)
            ),
            r"must be \d+ for this corequant \(.*\), got None$",
        ),
        (
            lambda f: reseal(f, quantization_config=settings(f, recipe=...)),
            "must hold a recipe",
        ),
        (
            lambda f: reseal(f, quantization_config=settings(f, recipe={"weights": "int99"})),
            "recipe of .*config.json: .*int99",
        ),
    ],
)
def test_damaged_directories_are_refused(damage, words, copy_of):
    damage(copy_of)
    with pytest.raises(cq.CheckpointError, match=words):
        load(copy_of)


def test_an_architecture_that_is_not_described_is_refused(copy_of):
    reseal(copy_of, model_type="biogpt")
    with pytest.raises(cq.ArchitectureError, match="biogpt"):
        load(copy_of)


def test_a_model_of_another_kind_is_refused(folder):
    with pytest.raises(cq.ArchitectureError, match="must be a causal language model"):
        transformers.AutoModel.from_pretrained(folder)


def test_a_snapshot_of_the_hub_with_the_files_that_transformers_reads(folder, tmp_path):
    snapshot = tmp_path / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "corequant.safetensors"):
        shutil.copy(folder / name, snapshot)
    model = load(snapshot)
    assert_same(model, cqhf.load(folder))
    model.save_pretrained(tmp_path / "new")
    assert_same(model, load(tmp_path / "new"))


def test_a_float_model_is_not_quantized_on_the_way(folder):
    given = CorequantConfig(**settings(folder))
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        load(folder.parent / "float", quantization_config=given)


def test_dequantizing_is_refused(folder):
    with pytest.raises(cq.ArchitectureError, match="has no float model to return"):
        load(folder).dequantize()
