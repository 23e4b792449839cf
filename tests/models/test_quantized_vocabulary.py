"""Quantized embeddings and heads: in a result, in its directory, and where others load it."""

import json

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import corequant as cq
import corequant_transformers as cqhf
from corequant.errors import RecipeError, SpecError
from corequant.recipe import Recipe
from corequant_transformers.checkpoint.reader import Stored
from tests.models.llamacpp import serving
from tests.models.test_gguf_files import VOCABULARY, tokenizer_of

HEADS = {"rotation": "heads", "activations": "none", "weights": "int4:group16"}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.float()


def stored(folder, name="corequant.safetensors"):
    return load_file(folder / name, backend="pread")


def decoded(W, spec):
    return torch.from_numpy(cq.dequantize(cq.round_to_nearest(W.detach().numpy(), spec)))


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("llama", False), ("gemma3_text", True), ("gpt2", False)]
)
def test_a_result_computes_with_the_decoded_rows(kind, tied, tokens, tmp_path):
    model = cqhf.tiny_model(kind, tie_word_embeddings=tied)
    fields = {**HEADS, "dtype": "float32"}
    result = cqhf.quantize(
        model, Recipe(embeddings="int8:channel", head="int8:channel", **fields), tokens
    )
    assert result.plan.tied == tied
    a, spec = result.plan.architecture, result.plan.recipe.head
    # The same model with rounded rows, in float.
    rounded = cqhf.tiny_model(kind, tie_word_embeddings=tied)
    for path in (a.embedding, a.head):
        module = rounded.get_submodule(path)
        module.weight.data = decoded(model.get_submodule(path).weight, spec)
    plain = cqhf.quantize(rounded, Recipe(**fields), tokens)
    assert torch.equal(logits(result.model, tokens), logits(plain.model, tokens))
    rows = {row["name"] for row in result.report["matrices"]}
    assert {a.embedding, a.head} <= rows


@pytest.mark.parametrize(
    ("embeddings", "head", "tied"),
    [
        ("int8:channel", "int8:channel", True),
        ("int4:group16", "int4:group16:asymmetric", False),
        ("nvfp4", None, False),
        (None, "int8:channel", False),
    ],
)
def test_directories_hold_codes_once(embeddings, head, tied, tokens, tmp_path):
    model = cqhf.tiny_model("qwen2", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "float")
    recipe = Recipe(embeddings=embeddings, head=head, rounding="qronos", **HEADS)
    result = cqhf.quantize(model, recipe, tokens)
    cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "run")
    result.save(tmp_path / "saved")
    files = [(tmp_path / n / "corequant.safetensors").read_bytes() for n in ("run", "saved")]
    assert files[0] == files[1]
    names = set(stored(tmp_path / "run"))
    assert (f"{EMBEDDING}.weight_packed" in names) == (embeddings is not None)
    assert (f"{HEAD}.weight_packed" in names) == (head is not None and not tied)
    assert (f"{HEAD}.weight" in names) == (head is None)
    assert result.plan.tied == tied
    assert any("don't stay tied: the first is stored" in n for n in result.plan.notes) != tied
    loaded = cqhf.load(tmp_path / "run")
    assert torch.equal(logits(loaded, tokens), logits(result.model, tokens))
    # Memory of one matrix for both.
    pointers = {loaded.get_submodule(p).weight.data_ptr() for p in (EMBEDDING, HEAD)}
    assert len(pointers) == 1 + (not tied)


@pytest.mark.parametrize(
    ("tied", "embeddings", "head"),
    [
        (True, "int8:channel", "int8:channel"),
        (False, "int8:channel", "int8:channel"),
        (True, "int4:group16", "int4:group16"),
        (False, "int4:channel", "int4:group16"),
        (False, None, "int8:group16"),
        (False, "int8:channel", None),
    ],
)
@pytest.mark.parametrize("scales", ["float32", "bfloat16"])
def test_transformers_alone_loads_them(tied, embeddings, head, scales, tokens, tmp_path):
    model = cqhf.tiny_model("llama", tie_word_embeddings=tied)
    weights = f"int4:group16:{scales}" if scales != "float32" else "int4:group16"
    recipe = Recipe(**{**HEADS, "weights": weights}, embeddings=embeddings, head=head)
    cqhf.quantize(model, recipe, tokens, tmp_path / "own")
    cqhf.export(tmp_path / "own", tmp_path / "out")
    names = set(stored(tmp_path / "out", "model.safetensors"))
    packed = not tied and head == "int4:group16"
    assert (f"{HEAD}.weight_packed" in names) == packed
    assert (f"{HEAD}.weight" in names) == (not tied and not packed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == tied
    assert config["dtype"] == scales
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    expected = logits(cqhf.load(tmp_path / "own"), tokens)
    assert (logits(theirs, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
    ids = torch.from_numpy(tokens[:1])
    made = theirs.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    own = cqhf.load(tmp_path / "own").generate(
        ids, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert torch.equal(made, own)


@pytest.mark.parametrize(
    ("tied", "embeddings", "head", "kinds"),
    [
        (True, "int8:group32", "int8:group32", ("Q8_0", None)),
        (False, "int8:group32", "int4:group32:asymmetric", ("Q8_0", "Q4_1")),
        (False, None, "int4:group32", ("F16", "Q4_0")),
        (True, None, None, ("F16", None)),
    ],
)
def test_llama_cpp_loads_them(tied, embeddings, head, kinds, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY}
    model = cqhf.tiny_model("llama", tie_word_embeddings=tied, **sizes)
    model.save_pretrained(tmp_path / "float")
    tokenizer_of("gpt-2").save_pretrained(tmp_path / "float")
    tokens = np.random.default_rng(0).integers(0, VOCABULARY - 8, (2, 48))
    recipe = Recipe(
        **{**HEADS, "weights": "int8:group32:float16"}, embeddings=embeddings, head=head
    )
    cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "own")
    file = cqhf.export(tmp_path / "own", tmp_path / "model.gguf", to="gguf")
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert (found["token_embd.weight"], found.get("output.weight")) == kinds
    prompt = tokens[:1, :32]
    expected = torch.log_softmax(logits(cqhf.load(tmp_path / "own"), prompt)[0, -1], -1).numpy()
    with serving(file, VOCABULARY) as next_token:
        told = next_token(prompt[0])
    # llama.cpp rounds what each layer reads to 8 bits.
    assert np.abs(np.exp(told) - np.exp(expected)).sum() < 0.03


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"embeddings": "int8:channel"}, "embeddings of llama.cpp: GGUF has no block type"),
        ({"head": "int8:channel"}, "head of llama.cpp: GGUF has no block type"),
    ],
)
def test_gguf_refuses_by_name(fields, words, tokens, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    recipe = Recipe(**{**HEADS, "weights": "int4:group32:float16"}, **fields)
    cqhf.quantize(cqhf.tiny_model("llama", **sizes), recipe, tokens, tmp_path / "own")
    with pytest.raises(SpecError, match=words):
        cqhf.export(tmp_path / "own", tmp_path / "model.gguf", to="gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("field", ["embeddings", "head"])
def test_transformers_refuses_by_name(field, tokens, tmp_path):
    recipe = Recipe(**HEADS, **{field: "int4:channel:asymmetric"})
    cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens, tmp_path / "own")
    with pytest.raises(SpecError, match=f"^{field} of Transformers' compressed-tensors: weights"):
        cqhf.export(tmp_path / "own", tmp_path / "out")


def test_packed_embeddings_are_refused_for_transformers(tokens, tmp_path):
    weights = "int4:group16:bfloat16"
    recipe = Recipe(**{**HEADS, "weights": weights}, embeddings="nvfp4")
    cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens, tmp_path / "own")
    with pytest.raises(SpecError, match="embeddings must be int2 to int8, got nvfp4"):
        cqhf.export(tmp_path / "own", tmp_path / "out")


def test_recipes_read_back():
    recipe = Recipe(weights="int4:group32:bfloat16", embeddings="int8:channel", head="mxfp4")
    assert str(recipe.embeddings) == "int8:channel:symmetric:mse:bfloat16"
    wide = Recipe(weights="int4:group32:bfloat16", head=cq.QuantSpec.parse("int8:channel"))
    for each in (recipe, wide, Recipe(embeddings="none")):
        assert Recipe.from_toml(each.to_toml()) == each
    with pytest.raises(RecipeError, match="embeddings can't be scaled by token"):
        Recipe(embeddings="int8:token")
    with pytest.raises(RecipeError, match="head must be a QuantSpec or None, got int"):
        Recipe(head=8)
    with pytest.raises(RecipeError, match="head: unknown"):
        Recipe(head="int9")


def test_a_run_chooses_signs_with_quantized_rows(tokens):
    model = cqhf.tiny_model("llama")
    recipe = Recipe(permutation="identity", sign_trials=2, head="int2:channel", embeddings="int2")
    result = cqhf.quantize(model, recipe, tokens)
    loss = np.log(cqhf.evaluate(result.model, tokens[-1:]).perplexity)
    assert min(result.report["signs"]["losses"]) == pytest.approx(loss, rel=1e-3)


def test_groups_that_do_not_fit_are_refused(tokens):
    from corequant.errors import BlockSizeError

    with pytest.raises(BlockSizeError, match="32 for model.embed_tokens with 48 inputs"):
        cqhf.plan(cqhf.tiny_model("llama"), Recipe(**HEADS, embeddings="int8:group32"))


def test_stored_codes_of_a_tied_head_are_the_embedding_s(tokens, tmp_path):
    model = cqhf.tiny_model("llama", tie_word_embeddings=True)
    recipe = Recipe(**HEADS, embeddings="int8:channel", head="int8:channel")
    cqhf.quantize(model, recipe, tokens, tmp_path / "own")
    directory = Stored(tmp_path / "own")
    first, last = directory.plan.matrices[0], directory.plan.matrices[-1]
    codes = [directory.quantized(m).codes for m in (first, last)]
    np.testing.assert_array_equal(*codes)


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("gemma3_text", True), ("opt", False)])
def test_transformers_loads_the_directory_itself(kind, tied, tokens, tmp_path):
    model = cqhf.tiny_model(kind, tie_word_embeddings=tied)
    recipe = Recipe(**HEADS, embeddings="int8:channel", head="int8:channel")
    result = cqhf.quantize(model, recipe, tokens, tmp_path / "own")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype="float32")
    expected = logits(result.model, tokens)
    assert torch.equal(logits(loaded, tokens), expected)
    a = result.plan.architecture
    embedding, head = loaded.get_submodule(a.embedding), loaded.get_submodule(a.head)
    assert (embedding.weight is head.weight) == tied
    # Codes survive a cast there and back, and are written once again.
    again = loaded.to(torch.bfloat16).to(torch.float32)
    # Rotary frequencies don't.
    assert torch.equal(embedding.weight, result.model.get_submodule(a.embedding).weight)
    again.save_pretrained(tmp_path / "again")
    files = [(tmp_path / n / "corequant.safetensors").read_bytes() for n in ("own", "again")]
    assert files[0] == files[1]
    state = again.state_dict()
    assert f"{a.embedding}.weight_packed" in state
    fresh = cqhf.load(tmp_path / "again")
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh, tokens), expected)


@pytest.mark.parametrize("field", ["embeddings", "head"])
def test_vllm_is_refused_before_any_work(field, tokens, tmp_path):
    recipe = Recipe(**HEADS, **{field: "int8:channel"})
    with pytest.raises(RecipeError, match=f"vllm can't run the result: {field} must be none"):
        cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens, tmp_path / "out", reader="vllm")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_kept_stays_in_float():
    recipe = Recipe(**HEADS, embeddings="int8:channel", head="int8:channel", keep=("lm_head",))
    table = cqhf.plan(cqhf.tiny_model("llama"), recipe)
    assert (table.matrices[0].quantized, table.matrices[-1].quantized) == (True, False)
