"""What bench_presets.py relies on: the same function in another basis, and the same measure."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import corequant_transformers as cqhf
from corequant.recipe import Recipe

BENCH = str(Path(__file__).parents[2] / "bench")


@pytest.fixture(name="scripts")
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import bench_presets
    import preset_sides

    yield bench_presets, preset_sides
    for name in ("bench_presets", "preset_sides", "markdown", "options"):
        sys.modules.pop(name, None)


def test_rotated_model_computes_the_same_from_other_weights(scripts):
    model = cqhf.tiny_model("llama").double()
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        # Gains that are all one would not show that they are folded.
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.mul_(torch.linspace(0.5, 2, len(parameter), dtype=torch.float64))
        wanted = model(input_ids=ids).logits
        other = scripts[0].rotated(model)
        found = other(input_ids=ids).logits
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    for name, before in model.state_dict().items():
        if "embed" not in name and before.ndim == 2:
            assert float((other.state_dict()[name] - before).abs().max()) > 1e-3, name


def test_permuted_model_computes_the_same_and_stays_tied(scripts):
    model = cqhf.tiny_model("llama", tie_word_embeddings=True).double()
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.mul_(torch.linspace(0.5, 2, len(parameter), dtype=torch.float64))
        other = scripts[0].permuted(model)
        wanted, found = (m(input_ids=ids).logits for m in (model, other))
    # Norms are computed in float32.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    for name, before in model.state_dict().items():
        assert float((other.state_dict()[name] - before).abs().max()) > 1e-3, name


def test_rows_that_are_to_stay_tied_do(scripts):
    model = cqhf.tiny_model(
        "llama", tie_word_embeddings=True, hidden_size=64, intermediate_size=128
    )
    for row in scripts[0].TIED:
        recipe = scripts[1].recipe_of(row)
        assert cqhf.plan(model, recipe).tied
        assert (recipe.head is not None) == row.endswith("int8")
    assert scripts[1].recipe_of("w4a16") == Recipe.preset("w4a16")


def test_sides_are_measured_as_by_evaluate(scripts, tmp_path):
    model = cqhf.tiny_model("llama")
    windows = np.arange(192).reshape(3, 64) % 100
    recipe = Recipe(weights="int4:channel", activations=None, rotation="offline")
    quantized = cqhf.quantize(model, recipe, windows).model
    with torch.no_grad():
        hidden = [model.model(input_ids=torch.from_numpy(w)[None])[0][0].numpy() for w in windows]
    np.savez(tmp_path / "reference", hidden=hidden, head=model.lm_head.weight.detach().numpy())
    np.save(tmp_path / "test", windows)
    found = scripts[1].compare(quantized, tmp_path)
    wanted = cqhf.evaluate(quantized, windows, against=model)
    assert found["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-5)
    assert found["kl"] == pytest.approx(wanted.divergence.kl, rel=1e-3)
    assert found["top1"] == pytest.approx(wanted.divergence.top1, abs=0.02)
