"""Tokens that a model has no row for, and what is no array of tokens, before any work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe

RECIPE = Recipe(block_size=16)


def traced(model, tokens):
    return cqhf.trace(model.double(), cqhf.plan(model, RECIPE), tokens)


JOBS = {
    "quantize": lambda model, tokens: cqhf.quantize(model, RECIPE, tokens),
    "calibrate": lambda model, tokens: cqhf.calibrate(model, RECIPE, tokens),
    "evaluate": cqhf.evaluate,
    "inspect": lambda model, tokens: cqhf.inspect(model, tokens, 16),
    "trace": traced,
}


@pytest.fixture
def model(monkeypatch):
    made = cqhf.tiny_model("llama")

    def run(*args, **kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr(type(made.model), "forward", run)
    return made


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("token", [128, 10**9, -1, -100, np.iinfo(np.int64).min])
def test_ids_outside_the_vocabulary(job, token, model, tokens):
    bad = tokens.copy()
    bad[1, 5] = token
    words = f"0..127, the model's vocabulary of 128, got {token} .1 of 144 tokens, .* window 1 at p"
    with pytest.raises(cq.CalibrationError, match=words):
        JOBS[job](model, bad)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    "tokens",
    [
        np.zeros((2, 8)),
        np.zeros((2, 8), bool),
        np.zeros(8, int),
        np.zeros((1, 2, 8), int),
        np.zeros((0, 8), int),
        np.zeros((2, 0), int),
        np.zeros((2, 1), int),
        [[1, 2], [3]],
        [["a", "b"]],
        np.full((2, 8), 2**63, np.uint64),
        torch.zeros(2, 8),
        torch.zeros(2, 8, dtype=torch.bfloat16),
        torch.zeros(2, 8, dtype=torch.int64, device="meta"),
    ],
    ids=str,
)
def test_what_is_no_array_of_tokens(job, tokens, model):
    with pytest.raises(cq.CalibrationError):
        JOBS[job](model, tokens)


@pytest.mark.parametrize("job", ["quantize", "calibrate"])
def test_the_text_of_the_package_needs_a_tokenizer(job, model):
    with pytest.raises(TypeError, match="tokenizer must be given to calibrate on the built-in"):
        JOBS[job](model, None)


@pytest.mark.parametrize("job", ["evaluate", "inspect", "trace"])
def test_no_text_is_none(job, model):
    with pytest.raises(cq.CalibrationError, match="token windows"):
        JOBS[job](model, None)


def test_many_ids_are_named_by_the_first(model):
    with pytest.raises(cq.CalibrationError, match=r"got 200, .*, 207, \.\.\. \(20 of 20 tokens"):
        cqhf.evaluate(model, np.arange(200, 220).reshape(2, 10))


def test_tensors_and_other_integers_are_tokens(tokens):
    model = cqhf.tiny_model("llama")
    right = cqhf.evaluate(model, tokens)
    for same in (torch.from_numpy(tokens), tokens.astype(np.uint8), tokens.tolist()):
        assert cqhf.evaluate(model, same) == right


def test_rows_that_were_added_count(tokens):
    model = cqhf.tiny_model("llama")
    model.resize_token_embeddings(130, mean_resizing=False)
    assert np.isfinite(cqhf.evaluate(model, tokens + 2).perplexity)
    with pytest.raises(cq.CalibrationError, match="vocabulary of 130, got 130"):
        cqhf.evaluate(model, tokens + 3)


def test_a_calibration_on_other_tokens_is_checked(tokens):
    data = cqhf.calibrate(cqhf.tiny_model("llama", vocab_size=160), RECIPE, tokens + 32)
    with pytest.raises(cq.CalibrationError, match="vocabulary of 128"):
        cqhf.quantize(cqhf.tiny_model("llama"), RECIPE, data)


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        ({"permutation": "energydiff"}, "second-order statistics"),
        ({"factors": "scales"}, "tokens of"),
        ({"permutation": "auto"}, "second-order statistics"),
    ],
)
def test_a_calibration_for_another_recipe_is_named(needed, words, tokens):
    model = cqhf.tiny_model("llama")
    data = cqhf.calibrate(model, RECIPE, tokens)
    with pytest.raises(cq.CalibrationError, match=f"{words}.*call calibrate"):
        cqhf.quantize(model, Recipe(block_size=16, **needed), data)


def test_a_calibration_of_another_model_is_named(tokens):
    data = cqhf.calibrate(cqhf.tiny_model("llama", intermediate_size=64), RECIPE, tokens)
    with pytest.raises(cq.CalibrationError, match="must hold 96 channels"):
        cqhf.quantize(cqhf.tiny_model("llama"), RECIPE, data)


def test_a_token_that_only_the_tokenizer_has(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "m"
    cqhf.tiny_model("llama").save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(folder)
    recipe = Recipe(block_size=16, samples=1, sequence_length=8)
    with pytest.raises(cq.CalibrationError, match="got 128 .* added to the tokenizer"):
        cqhf.quantize(folder, recipe, "w1 w2 <added> " * 20, tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m"]


def test_windows_to_evaluate_are_counted(tokens):
    model = cqhf.tiny_model("llama")
    assert cqhf.evaluate(model, tokens, windows=2).windows == 2
    with pytest.raises(ValueError, match="windows"):
        cqhf.evaluate(model, tokens, windows=0)
