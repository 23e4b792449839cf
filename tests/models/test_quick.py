"""Whole models by the quicker products and attention, against torch's own."""

from __future__ import annotations

import pytest
import torch

import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_torch.device import onednn
from tests.models.test_architectures import DESCRIBED

CALLS = ["_linear_pointwise", "causal_attention"]


@pytest.fixture
def used(monkeypatch):
    """Let them be used for tiny models too, on any processor, and count how often they are."""
    counts = dict.fromkeys(CALLS, 0)

    def counted(owner, name):
        function = getattr(owner, name)

        def spy(*args):
            counts[name] += 1
            return function(*args)

        monkeypatch.setattr(owner, name, spy)

    monkeypatch.setattr(onednn, "_has_operator", lambda: True)
    monkeypatch.setattr(onednn, "_LEAST_PRODUCTS", 1)
    monkeypatch.setattr(onednn, "_ROWS", 16)
    counted(torch.ops.mkldnn, CALLS[0])
    counted(onednn, CALLS[1])
    return counts


@pytest.mark.parametrize("kind", DESCRIBED)
def test_perplexity_is_the_same(kind, tokens, used):
    model = cqhf.tiny_model(kind)
    found = cqhf.evaluate(model, tokens).perplexity
    assert used["_linear_pointwise"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "_has_operator", lambda: False)
        before = dict(used)
        expected = cqhf.evaluate(model, tokens).perplexity
        assert used == before
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rounding", ["nearest", "qronos"])
def test_a_model_is_quantized_by_them(rounding, tokens, used):
    model = cqhf.tiny_model("llama")
    recipe = Recipe(block_size=16, rounding=rounding)
    found = cqhf.quantize(model, recipe, tokens)
    assert all(used.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "_has_operator", lambda: False)
        other = cqhf.quantize(model, recipe, tokens)
    # Sums in another order move single codes.
    rows, others = found.report["matrices"], other.report["matrices"]
    assert len(rows) == len(others) > 0
    for row, same in zip(rows, others, strict=True):
        assert row["name"] == same["name"]
        if rounding == "qronos":
            assert row["loss"] == pytest.approx(same["loss"], rel=0.1)
    first = cqhf.evaluate(found.model, tokens).perplexity
    assert first == pytest.approx(cqhf.evaluate(other.model, tokens).perplexity, rel=0.02)
