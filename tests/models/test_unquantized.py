"""What isn't quantized: the dtype that it is stored in, and matrices that stay tied."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import corequant_transformers as cqhf
from corequant.errors import CheckpointError, RecipeError
from corequant.recipe import Recipe

WEIGHTS = "corequant.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def stored(folder):
    return load_file(folder / WEIGHTS, backend="pread")


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits


def floats(tensors):
    """Return what isn't quantized of a directory's tensors."""
    codes = ("_packed", "_scale", "_shape", "_zero_point")
    return {name: t for name, t in tensors.items() if not name.endswith(codes)}


# ---- dtype


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_not_quantized_is_that_of_float32_rounded_once(kind, dtype, tokens, tmp_path):
    model = cqhf.tiny_model(kind)
    recipe = {"block_size": 16, "weights": "int4:channel"}
    wide = cqhf.quantize(model, Recipe(dtype="float32", **recipe), tokens, tmp_path / "wide")
    result = cqhf.quantize(model, Recipe(dtype=dtype, **recipe), tokens, tmp_path / "out")
    exact, found = stored(tmp_path / "wide"), stored(tmp_path / "out")
    assert exact.keys() == found.keys()
    assert {t.dtype for t in floats(exact).values()} == {torch.float32}
    assert {t.dtype for t in floats(found).values()} == {getattr(torch, dtype)}
    for name, tensor in found.items():
        wanted = exact[name]
        if name in floats(found):
            wanted = wanted.to(tensor.dtype)
        assert torch.equal(tensor, wanted), name
    # Verified before anything was rounded.
    assert result.verification == wide.verification
    loaded = cqhf.load(tmp_path / "out")
    assert torch.equal(logits(result.model, tokens), logits(loaded, tokens))


@pytest.mark.parametrize("rounding", ["nearest", "qronos"])
def test_a_result_in_memory_is_that_of_a_directory(rounding, tokens, tmp_path):
    model = cqhf.tiny_model("qwen2", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "float")
    recipe = Recipe(rotation="heads", rounding=rounding, activations="none")
    result = cqhf.quantize(model, recipe, tokens)
    cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "run")
    result.save(tmp_path / "saved")
    again = cqhf.quantize(model, recipe, tokens, tmp_path / "out")
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("run", "saved", "out")]
    assert files[0] == files[1] == files[2]
    expected = logits(result.model, tokens)
    for other in (again.model, cqhf.load(tmp_path / "run")):
        assert torch.equal(logits(other, tokens), expected)


@pytest.mark.parametrize(
    ("given", "dtype"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16")]
)
def test_auto_is_the_model_s_own_dtype(given, dtype, tokens, tmp_path):
    model = cqhf.tiny_model("llama").to(getattr(torch, given))
    model.save_pretrained(tmp_path / "float")
    for source in (model, tmp_path / "float"):
        assert cqhf.plan(source, Recipe(block_size=16)).recipe.dtype == dtype
    # The weights count, whatever the config says.
    model.config.dtype = torch.float64
    assert cqhf.plan(model, Recipe(block_size=16)).recipe.dtype == dtype
    cqhf.quantize(model, Recipe(block_size=16), tokens, tmp_path / "out")
    assert stored(tmp_path / "out")[HEAD].dtype == getattr(torch, dtype)
    assert Recipe.from_toml((tmp_path / "out" / "recipe.toml").read_text()).dtype == dtype


def test_numbers_beyond_the_dtype_are_refused_by_name(tokens, tmp_path):
    model = cqhf.tiny_model("llama")
    model.lm_head.weight.data[3, 5] = 1e7
    with pytest.raises(RecipeError, match=f"the values of {HEAD}, got float16"):
        cqhf.quantize(model, Recipe(block_size=16, dtype="float16"), tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="dtype must be one of auto, bfloat16"):
        Recipe(dtype="half")


def test_a_weight_that_was_changed_later_is_saved_as_it_is(tokens, tmp_path):
    result = cqhf.quantize(cqhf.tiny_model("llama"), Recipe(block_size=16), tokens)
    with torch.no_grad():
        result.model.lm_head.weight[0, 0] = 1 / 3
    result.save(tmp_path / "out")
    kinds = {name: t.dtype for name, t in floats(stored(tmp_path / "out")).items()}
    assert kinds.pop(HEAD) == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    expected = logits(result.model, tokens)
    assert torch.equal(logits(cqhf.load(tmp_path / "out"), tokens), expected)


def test_directories_from_before_the_choice_are_float32(tokens, tmp_path):
    recipe = Recipe(rotation="online", block_size=16, dtype="float32")
    model = cqhf.tiny_model("llama", tie_word_embeddings=True)
    result = cqhf.quantize(model, recipe, tokens, tmp_path / "old")
    file = tmp_path / "old" / "recipe.toml"
    file.write_text(file.read_text().replace('dtype = "float32"\n', ""))
    config = (tmp_path / "old" / "config.json").read_text()
    config = config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    (tmp_path / "old" / "config.json").write_text(config)
    tensors = stored(tmp_path / "old")
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, tmp_path / "old" / WEIGHTS)
    loaded = cqhf.load(tmp_path / "old", verify=False)
    assert torch.equal(logits(loaded, tokens), logits(result.model, tokens))
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    cqhf.export(tmp_path / "old", tmp_path / "out", verify=False)
    written = load_file(tmp_path / "out" / "model.safetensors", backend="pread")
    assert {t.dtype for t in floats(written).values()} == {torch.float32}


# ---- ties


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("llama", {"rotation": "online", "block_size": 16}),
        ("qwen3", {"rotation": "heads", "activations": "none"}),
        ("opt", {"rotation": "heads"}),
        ("gemma2", {"block_size": 16}),
        ("gpt2", {"rotation": "online", "block_size": 16}),
    ],
)
def test_a_tie_is_kept_and_changes_nothing(kind, recipe, tokens, tmp_path):
    tied = cqhf.tiny_model(kind, tie_word_embeddings=True)
    separate = cqhf.tiny_model(kind, tie_word_embeddings=False)
    state = {k: v.clone() for k, v in tied.state_dict().items()}
    separate.load_state_dict(state)
    one = cqhf.quantize(tied, Recipe(**recipe), tokens, tmp_path / "one")
    two = cqhf.quantize(separate, Recipe(**recipe), tokens, tmp_path / "two")
    a = one.plan.architecture
    assert (one.plan.tied, two.plan.tied) == (True, False)
    assert one.verification.logits_error < 1e-9
    few, all_ = stored(tmp_path / "one"), stored(tmp_path / "two")
    assert all_.keys() - few.keys() == {f"{a.head}.weight"}
    assert all(torch.equal(t, all_[name]) for name, t in few.items())
    loaded = cqhf.load(tmp_path / "one")
    for model in (one.model, loaded):
        matrices = [model.get_submodule(path).weight for path in (a.head, a.embedding)]
        assert matrices[0] is matrices[1]
        assert torch.equal(logits(model, tokens), logits(two.model, tokens))


@pytest.mark.parametrize("rotation", ["merged", "offline"])
def test_a_rotation_unties_and_the_plan_says_why(rotation, tokens, tmp_path):
    model = cqhf.tiny_model("llama", tie_word_embeddings=True)
    table = cqhf.plan(model, Recipe(rotation=rotation))
    assert not table.tied
    (note,) = table.notes
    assert "model.embed_tokens and lm_head don't stay tied: the gain of model.norm" in note
    assert not cqhf.plan(cqhf.tiny_model("llama"), Recipe(rotation=rotation)).notes
    cqhf.quantize(model, Recipe(rotation=rotation), tokens, tmp_path / "out")
    tensors = stored(tmp_path / "out")
    assert not torch.equal(tensors[HEAD], tensors[EMBEDDING])


def test_no_dense_rotation_keeps_unequal_gains_tied(rng):
    """The head is diag(g) R diag(w)⁻¹ to the embedding's R, for whatever gain w the norm gets."""
    from corequant.hadamard import hadamard_matrix

    R = hadamard_matrix(8).astype(float) / np.sqrt(8)
    for g, possible in ((np.full(8, 1.7), True), (1 + 0.1 * rng.random(8), False)):
        # The best w of all: the diagonal of Rᵀ diag(g) R.
        w = np.diag(R.T @ np.diag(g) @ R)
        assert np.allclose(np.diag(g) @ R, R * w) == possible


@pytest.mark.parametrize("saved", [False, True])
def test_a_head_of_its_own_is_believed_whatever_the_config_says(saved, tokens, tmp_path):
    model = cqhf.tiny_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2, requires_grad=False)
    source = model
    if saved:
        source = tmp_path / "float"
        model.save_pretrained(source)
        tensors = load_file(source / "model.safetensors", backend="pread")
        tensors[HEAD] = model.lm_head.weight
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(rotation="heads", dtype="float32", weights="int8:group16", activations="none")
    assert not cqhf.plan(source, recipe).tied
    cqhf.quantize(source, recipe, tokens, tmp_path / "out")
    assert torch.equal(stored(tmp_path / "out")[HEAD], model.lm_head.weight)


def test_a_tie_that_the_recipe_has_not_is_refused(tokens, tmp_path):
    cqhf.quantize(cqhf.tiny_model("llama"), Recipe(block_size=16), tokens, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    text = file.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    file.write_text(text)
    with pytest.raises(CheckpointError, match="tie_word_embeddings of .* must be false"):
        cqhf.load(tmp_path / "out", verify=False)


# ---- where others load it


@pytest.mark.parametrize("scales", ["float32", "bfloat16", "float16"])
def test_transformers_loads_tied_matrices(scales, tokens, tmp_path):
    model = cqhf.tiny_model("llama", tie_word_embeddings=True)
    weights = "int4:group16" if scales == "float32" else f"int4:group16:{scales}"
    recipe = Recipe(rotation="heads", weights=weights, activations="none")
    cqhf.quantize(model, recipe, tokens, tmp_path / "own")
    cqhf.export(tmp_path / "own", tmp_path / "out")
    stored = load_file(tmp_path / "own" / "corequant.safetensors", backend="pread")
    scale = "model.layers.0.self_attn.q_proj.weight_scale"
    assert stored[scale].dtype == getattr(torch, scales)
    written = load_file(tmp_path / "out" / "model.safetensors", backend="pread")
    assert HEAD not in written
    kept = "float16" if scales == "float16" else "bfloat16"
    assert written[EMBEDDING].dtype == getattr(torch, kept)
    ours = cqhf.load(tmp_path / "own")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == getattr(torch, scales)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    expected = logits(ours, tokens)
    assert (logits(theirs, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
