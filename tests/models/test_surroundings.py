"""What is switched on around a call has no influence on it, and is as it was afterwards."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant.storage.tensor_file import TensorFile
from corequant_transformers.files.digests import write_digests

# Adaptive rounding makes statistics on the way; draws of signs run parts of the model.
RECIPE = Recipe(block_size=16, sign_trials=2, rounding="gptq")
PLAIN = Recipe(block_size=16, weights="int4:group16", activations=None)


@contextlib.contextmanager
def switched(switch, value, before):
    switch(value)
    try:
        yield
    finally:
        switch(before)


def dtype_by_default(dtype):
    return switched(torch.set_default_dtype, dtype, torch.float32)


SURROUNDINGS = {
    "bfloat16 by default": lambda: dtype_by_default(torch.bfloat16),
    "float16 by default": lambda: dtype_by_default(torch.float16),
    "float64 by default": lambda: dtype_by_default(torch.float64),
    "device by default": lambda: switched(torch.set_default_device, "meta", None),
    "device around": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "one thread": lambda: switched(torch.set_num_threads, 1, torch.get_num_threads()),
    "three threads": lambda: switched(torch.set_num_threads, 3, torch.get_num_threads()),
}


def ambient():
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "verbosity": transformers.utils.logging.get_verbosity(),
        "generator": torch.get_rng_state().numpy().tobytes(),
    }


def contents(model):
    """Return the kinds and bytes of all tensors, and of codes and scales."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found = {
        n: (t.dtype, t.device, t.is_inference(), t.requires_grad, t.numpy().tobytes())
        for n, t in tensors
    }
    for name, module in model.named_modules():
        if hasattr(module, "quantized"):
            arrays = (module.quantized.codes, module.quantized.scales)
            found[f"{name}.codes"] = tuple(a.tobytes() for a in arrays)
    return found


def everything(kind, model, folder, tokens, output):
    """Return what all functions give, by their names."""
    made = cqhf.quantize(model, RECIPE, tokens)
    loaded = cqhf.load(folder / "own")
    from_disk = cqhf.Source(folder / "float").load()
    cqhf.quantize(folder / "float", RECIPE, tokens, output / "own")
    found = {
        "tiny_model": contents(cqhf.tiny_model(kind, num_hidden_layers=1)),
        "quantize": contents(made.model),
        "verification": made.verification,
        "evaluate": cqhf.evaluate(model, tokens),
        "evaluate quantized": cqhf.evaluate(made.model, tokens),
        "load": contents(loaded),
        "evaluate loaded": cqhf.evaluate(loaded, tokens),
        "evaluate from disk": cqhf.evaluate(from_disk, tokens),
        "from disk": contents(from_disk),
        "a directory": (output / "own" / "corequant.safetensors").read_bytes(),
    }
    if kind == "llama":
        found["inspect"] = cqhf.inspect(model, tokens, 16).to_dict()
        cqhf.export(folder / "own", output / "other")
        found["export"] = (output / "other" / "model.safetensors").read_bytes()
    return found


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 128, (2, 24))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Return a model, its directories, and what all functions give where nothing is switched on."""
    made = {}

    def of(kind, tokens):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = cqhf.tiny_model(kind, num_hidden_layers=1)
            model.save_pretrained(folder / "float")
            letters(folder / "float")
            cqhf.quantize(model, PLAIN, tokens, folder / "own")
            (folder / "out").mkdir()
            made[kind] = model, folder, everything(kind, model, folder, tokens, folder / "out")
        return made[kind]

    return of


def letters(folder: Path):
    """Write a tokenizer, which quantizing a directory reads."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("kind", ["llama"])
def test_nothing_around_has_influence(kind, name, known, tokens, tmp_path):
    model, folder, right = known(kind, tokens)
    with SURROUNDINGS[name]():
        before = ambient()
        found = everything(kind, model, folder, tokens, tmp_path)
        after = ambient()
    assert [key for key in right if found[key] != right[key]] == []
    assert after == before


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_dtypes_by_default_have_no_influence(kind, known, tokens, tmp_path):
    model, folder, right = known(kind, tokens)
    with SURROUNDINGS["bfloat16 by default"](), torch.inference_mode(), torch.device("meta"):
        found = everything(kind, model, folder, tokens, tmp_path)
    assert [key for key in right if found[key] != right[key]] == []


def test_the_dtype_by_default_is_not_exchanged_meanwhile(tokens, tmp_path, monkeypatch):
    model = cqhf.tiny_model("llama")
    cqhf.quantize(model, PLAIN, tokens, tmp_path / "own")

    def refuse(dtype):
        raise AssertionError(f"the process computes in {dtype} by default now")

    monkeypatch.setattr(torch, "set_default_dtype", refuse)
    cqhf.quantize(model, PLAIN, tokens)
    cqhf.evaluate(cqhf.load(tmp_path / "own"), tokens)


def test_a_model_made_in_inference_mode(tokens):
    right = cqhf.quantize(cqhf.tiny_model("llama"), RECIPE, tokens)
    with torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_config(cqhf.tiny_model("llama").config)
        model.load_state_dict(cqhf.tiny_model("llama").state_dict())
    assert next(model.parameters()).is_inference()
    found = cqhf.quantize(model, RECIPE, tokens)
    assert contents(found.model) == contents(right.model)


# ---- a quantized model that is cast afterwards


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_was_cast_is_stored_in_float32(kind, dtype, tokens, tmp_path):
    recipe = Recipe(rotation="offline", weights="int4:group16", activations=None, dtype="float32")
    result = cqhf.quantize(cqhf.tiny_model(kind), recipe, tokens)
    exact = {n: t for n, t in result.model.state_dict().items()}
    result.model.to(dtype)
    # It runs as it is, and can be stored.
    assert result.model(torch.from_numpy(tokens)).logits.dtype == dtype
    folder = result.save(tmp_path / "own")
    file = TensorFile(folder / "corequant.safetensors")
    floats = [n for n in file.names if ".weight_" not in n]
    assert {file.read(n).dtype for n in floats} == {"F32"}
    loaded = cqhf.load(folder)
    assert loaded(torch.from_numpy(tokens)).logits.dtype == torch.float32
    for name, tensor in loaded.state_dict().items():
        wanted = exact[name].to(dtype).float() if name in floats else exact[name]
        assert torch.equal(tensor, wanted), name
    if kind != "gpt2":
        cqhf.export(folder, tmp_path / "other")


def test_a_cast_that_lost_numbers_is_not_stored(tokens, tmp_path):
    model = cqhf.tiny_model("llama")
    model.lm_head.weight[3, 5] = 1e7
    result = cqhf.quantize(model, PLAIN, tokens)
    result.model.half()
    with pytest.raises(cq.OutputError, match="lm_head.weight holds NaN or infinity"):
        result.save(tmp_path / "own")
    result = cqhf.quantize(model, PLAIN, tokens)
    result.model.double().lm_head.weight[0, 0] = 1 / 3
    with pytest.raises(cq.OutputError, match="float64 with numbers that float32 can't represent"):
        result.save(tmp_path / "own")
    result = cqhf.quantize(model, PLAIN, tokens)
    result.model.to("meta")
    with pytest.raises(cq.OutputError, match="must be in memory"):
        result.save(tmp_path / "own")
    result = cqhf.quantize(model, PLAIN, tokens)
    result.model.model.layers[0].mlp.up_proj = torch.nn.Linear(48, 96)
    with pytest.raises(cq.OutputError, match="must still be a QuantizedLinear, got Linear"):
        result.save(tmp_path / "own")
    assert not list(tmp_path.iterdir())


def edit(folder, change):
    import safetensors.torch

    file = folder / "corequant.safetensors"
    tensors = safetensors.torch.load_file(file, backend="pread")
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    # As whoever writes such a directory would.
    write_digests(folder)


CASTS = {
    "head float16": ("lm_head.weight", lambda t: t.half()),
    "embedding float64": ("model.embed_tokens.weight", lambda t: t.double()),
    "norm bfloat16": ("model.norm.weight", lambda t: t.bfloat16()),
    "bias float64": ("model.layers.0.self_attn.q_proj.bias", lambda t: t.double()),
}
REFUSED = {
    "head int32": ("lm_head.weight", lambda t: t.to(torch.int32), "float32, got int32"),
    "norm bool": ("model.norm.weight", lambda t: t.bool(), "float32, got bool"),
    "embedding between": (
        "model.embed_tokens.weight",
        lambda t: t.double() + 1e-12,
        "float64 with numbers that float32 can't represent",
    ),
    "embedding huge": ("model.embed_tokens.weight", lambda t: t.double() * 1e300, "float64"),
    "bias int64": (
        "model.layers.0.self_attn.q_proj.bias",
        lambda t: t.to(torch.int64),
        "float32, got int64",
    ),
    "bias short": ("model.layers.0.self_attn.q_proj.bias", lambda t: t[:5], "must have shape"),
    "bias not finite": (
        "model.layers.0.self_attn.q_proj.bias",
        lambda t: t * float("nan"),
        "NaN or infinity",
    ),
    "scales bfloat16": (
        "model.layers.0.mlp.up_proj.weight_scale",
        lambda t: t.bfloat16(),
        "must have a dtype that NumPy has, got bfloat16",
    ),
    "scales float64": ("model.layers.0.mlp.up_proj.weight_scale", lambda t: t.double(), "float32"),
}


@pytest.fixture
def own(known, tokens, tmp_path):
    folder = tmp_path / "own"
    cqhf.quantize(cqhf.tiny_model("qwen2"), PLAIN, tokens, folder)
    return folder


@pytest.mark.parametrize("name", CASTS)
def test_directories_with_other_floats_are_read_as_float32(name, own, tokens, tmp_path):
    key, cast = CASTS[name]
    expected = cqhf.load(own).state_dict()
    edit(own, lambda tensors: tensors.update({key: cast(tensors[key])}))
    loaded = cqhf.load(own)
    for other, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 or ".weight_" in other
        wanted = cast(expected[other]).float() if other == key else expected[other]
        assert torch.equal(tensor, wanted)
    assert np.isfinite(cqhf.evaluate(loaded, tokens).perplexity)
    cqhf.export(own, tmp_path / "other")


@pytest.mark.parametrize("name", REFUSED)
def test_directories_with_other_dtypes_are_refused(name, own):
    key, cast, words = REFUSED[name]
    edit(own, lambda tensors: tensors.update({key: cast(tensors[key]).contiguous()}))
    with pytest.raises(cq.CheckpointError, match=words):
        cqhf.load(own)
