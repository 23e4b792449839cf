"""Models on a GPU: the same codes from the same statistics, and roundings as good as the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import corequant_transformers as cqhf
from corequant.recipe import Recipe

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def gpu():
    assert torch.cuda.is_available(), "cuda was asked for and there is no usable GPU or driver"


def test_models_become_the_same_from_the_same_statistics():
    tokens = np.arange(4 * 64).reshape(4, 64) % 101
    for recipe in (
        Recipe(block_size=16, permutation="massdiff"),
        Recipe(block_size=16, permutation="auto", factors="scales"),
    ):
        model = cqhf.tiny_model("llama")
        statistics = cqhf.calibrate(model, recipe, tokens)
        expected = cqhf.quantize(model, recipe, statistics)
        found = cqhf.quantize(cqhf.tiny_model("llama").cuda(), recipe, statistics)
        for matrix in expected.plan.quantized:
            ours, theirs = (m.model.get_submodule(matrix.name) for m in (found, expected))
            assert ours.weight.is_cuda
            np.testing.assert_array_equal(ours.quantized.codes, theirs.quantized.codes)
        ids = torch.from_numpy(tokens[:1])
        logits = found.model(input_ids=ids.cuda(), use_cache=False).logits.cpu()
        wanted = expected.model(input_ids=ids, use_cache=False).logits
        assert torch.allclose(logits, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
        there = cqhf.calibrate(cqhf.tiny_model("llama").cuda(), recipe, tokens)
        for region, order in expected.choices.permutations.items():
            np.testing.assert_array_equal(found.choices.permutations[region], order)
            ours, theirs = there.statistics[region], statistics.statistics[region]
            np.testing.assert_allclose(ours.mean_abs, theirs.mean_abs, rtol=1e-4)


@pytest.mark.parametrize("rounding", ["gptq", "qronos", "learned"])
def test_models_are_rounded_there_as_well_as_here(rounding):
    tokens = np.arange(4 * 64).reshape(4, 64) % 101
    recipe = Recipe(block_size=16, rounding=rounding, fit_scales=True, steps=50)
    results = []
    for device in ("cpu", "cuda"):
        made = cqhf.quantize(cqhf.tiny_model("llama").to(device), recipe, tokens)
        assert made.verification.logits_error < 1e-9
        results.append(cqhf.evaluate(made.model, tokens).perplexity)
    assert results[1] == pytest.approx(results[0], rel=0.02)
