"""Perplexity and divergence against computations by NumPy in float64, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.evaluation.divergence import compare_positions
from corequant_transformers.evaluation.perplexity import log_probabilities
from corequant_transformers.evaluation.statistics import mean_with_error, quantile_with_error
from corequant_transformers.model import logits as window_module

RECIPE = Recipe(weights="int4:channel", activations=None)


def by_numpy(reference, model, tokens):
    """Return arrays (windows, positions) of divergence, agreements and both losses."""
    found = {name: [] for name in ("kl", "top1", "top5", "loss", "reference_loss")}
    with torch.no_grad():
        for window in torch.from_numpy(tokens):
            p, q = (
                log_softmax(m(input_ids=window[None]).logits[0, :-1].double().numpy(), axis=-1)
                for m in (reference, model)
            )
            places, following = np.arange(len(window) - 1), window[1:].numpy()
            best = [np.argsort(-x, axis=-1, kind="stable")[:, :5] for x in (p, q)]
            found["kl"].append((np.exp(p) * (p - q)).sum(-1))
            found["top1"].append(p.argmax(-1) == q.argmax(-1))
            found["top5"].append([len({*a} & {*b}) / 5 for a, b in zip(*best, strict=True)])
            found["loss"].append(-q[places, following])
            found["reference_loss"].append(-p[places, following])
    return {name: np.array(rows, np.float64) for name, rows in found.items()}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("rows", [7, 256])
def test_divergence_is_that_of_an_independent_computation(kind, rows, tokens, monkeypatch):
    monkeypatch.setattr(window_module, "_MOST_ROWS", rows)
    model = cqhf.tiny_model(kind).double()
    other = cqhf.quantize(cqhf.tiny_model(kind), RECIPE, tokens).model.double()
    found = cqhf.evaluate(other, tokens, against=model)
    wanted = by_numpy(model, other, tokens)
    divergence = found.divergence

    def same(value, right):
        assert value == pytest.approx(right, abs=1e-9, rel=1e-9)

    same(divergence.kl, wanted["kl"].mean())
    assert divergence.kl > 1e-4
    same(divergence.kl_median, np.median(wanted["kl"]))
    same(divergence.kl_p999, np.quantile(wanted["kl"], 0.999))
    same(divergence.top1, wanted["top1"].mean())
    same(divergence.top5, wanted["top5"].mean())
    assert divergence.top1 < 1
    same(math.log(found.perplexity), wanted["loss"].mean())
    same(math.log(divergence.reference_perplexity), wanted["reference_loss"].mean())
    same(divergence.excess, math.log(found.perplexity / divergence.reference_perplexity))
    difference = (wanted["loss"] - wanted["reference_loss"]).mean(axis=1)
    same(divergence.excess_se, difference.std(ddof=1) / math.sqrt(3))
    same(divergence.kl_se, wanted["kl"].mean(axis=1).std(ddof=1) / math.sqrt(3))
    same(
        found.perplexity_se,
        found.perplexity * wanted["loss"].mean(axis=1).std(ddof=1) / math.sqrt(3),
    )


def test_float32_logits_are_compared_in_float64(tokens):
    model = cqhf.tiny_model("llama")
    other = cqhf.quantize(model, Recipe(weights="int8:channel", activations=None), tokens).model
    found = cqhf.evaluate(other, tokens, against=model).divergence
    assert found.kl == pytest.approx(by_numpy(model, other, tokens)["kl"].mean(), rel=1e-4)
    generator = np.random.default_rng(0)
    p, q = generator.normal(size=(2, 40, 1000)).astype(np.float32) * 4
    targets = generator.integers(0, 1000, 40)
    rows = compare_positions(*map(torch.from_numpy, (p, q, targets)))
    exact = [log_softmax(x.astype(np.float64), axis=-1) for x in (p, q)]
    wanted = (np.exp(exact[0]) * (exact[0] - exact[1])).sum(-1)
    np.testing.assert_allclose(rows["kl"], wanted, rtol=0, atol=1e-12)


def test_a_model_against_itself(tokens):
    model = cqhf.tiny_model("qwen3")
    alone = cqhf.evaluate(model, tokens)
    found = cqhf.evaluate(model, tokens, against=model)
    assert (found.perplexity, found.perplexity_se) == (alone.perplexity, alone.perplexity_se)
    assert alone.divergence is None
    divergence = found.divergence
    assert (divergence.kl, divergence.kl_p999, divergence.kl_se) == (0, 0, 0)
    assert (divergence.top1, divergence.top5, divergence.excess) == (1, 1, 0)
    assert divergence.reference_perplexity == found.perplexity
    assert {"perplexity", "kl", "top1", "kl_p999_se"} <= set(found.to_dict())
    assert "kl" not in alone.to_dict()


def test_one_window_has_no_errors(tokens):
    model = cqhf.tiny_model("llama")
    values = cqhf.evaluate(model, tokens[:1], against=model).to_dict()
    assert {name for name, value in values.items() if value is None} == {
        name for name in values if name.endswith("_se")
    }


def test_against_a_path(tokens, tmp_path):
    model = cqhf.tiny_model("llama")
    model.save_pretrained(tmp_path / "float")
    made = cqhf.quantize(model, RECIPE, tokens, tmp_path / "own")
    wanted = cqhf.evaluate(made.model, tokens, against=model)
    loaded = cqhf.load(tmp_path / "own")
    assert cqhf.evaluate(loaded, tokens, against=tmp_path / "float") == wanted
    assert cqhf.evaluate(loaded, tokens, against=str(tmp_path / "own")).divergence.kl == 0
    with pytest.raises(cq.CheckpointError, match="MODEL must be a directory"):
        cqhf.evaluate(loaded, tokens, against=tmp_path / "nothing")


def test_what_is_refused(tokens):
    model, wider = cqhf.tiny_model("llama"), cqhf.tiny_model("llama", vocab_size=140)
    with pytest.raises(cq.ShapeError, match="vocabulary of 128 tokens, got 140"):
        cqhf.evaluate(model, tokens, against=wider)
    narrow = cqhf.tiny_model("llama", vocab_size=100)
    with pytest.raises(cq.CalibrationError, match=r"token ids must be in 0\.\.99"):
        cqhf.evaluate(model, tokens, against=narrow)
    with pytest.raises(TypeError, match="model must be a Transformers model, got int"):
        cqhf.evaluate(model, tokens, against=3)


def test_numbers_that_are_not_finite_are_named(tokens):
    model, broken = cqhf.tiny_model("llama"), cqhf.tiny_model("llama")
    with torch.no_grad():
        broken.lm_head.weight[5, 0] = torch.nan
    with pytest.raises(cq.NonFiniteError, match=r"^logits must be finite.*\(0, 5\)"):
        cqhf.evaluate(broken, tokens)
    with pytest.raises(cq.NonFiniteError, match=r"^logits of against must be finite.*\(0, 5\)"):
        cqhf.evaluate(model, tokens, against=broken)


def test_excluded_tokens_are_no_fault():
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [1.0, 2.0, -torch.inf]])
    found = compare_positions(logits, logits + 1, torch.tensor([0, 1]))
    np.testing.assert_allclose(found["kl"], 0, atol=1e-15)
    assert np.isfinite(found["loss"]).all()
    apart = compare_positions(torch.zeros(2, 3), logits, torch.tensor([0, 1]))
    assert np.isinf(apart["kl"]).all()
    with pytest.raises(cq.NonFiniteError, match=r"the first \(inf\) at index \(1, 2\)"):
        log_probabilities("x", torch.tensor([[-torch.inf, 0, 0], [-torch.inf, 0, torch.inf]]))


def test_errors_are_the_spread_of_repeated_samples():
    """Windows with a level of their own: the error must count windows, not tokens."""
    generator = np.random.default_rng(1)

    def draw():
        return generator.gamma(1, size=(24, 1)) + generator.gamma(1, size=(24, 200))

    drawn = [draw() for _ in range(300)]
    for measure, low, high in (
        (mean_with_error, 0.9, 1.1),
        (lambda x: quantile_with_error(x, 0.5), 0.85, 1.2),
        (lambda x: quantile_with_error(x, 0.99), 0.6, 1.2),
    ):
        values, errors = np.array([measure(x) for x in drawn]).T
        assert low < np.sqrt(np.mean(errors**2)) / values.std(ddof=1) < high
    assert np.mean([x.std() / math.sqrt(x.size) for x in drawn]) < 0.2 * np.mean(errors)
