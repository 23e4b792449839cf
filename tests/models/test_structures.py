"""Models to whose modules something was done are refused, and messages say what and what next."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from torch.nn.utils import parametrizations, parametrize, prune

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe

RECIPE = Recipe(block_size=16)
DOWN = "model.layers.0.mlp.down_proj"


def calls(tokens):
    """Everything that reads a float model."""
    return {
        "plan": lambda model: cqhf.plan(model, RECIPE),
        "calibrate": lambda model: cqhf.calibrate(model, RECIPE, tokens),
        "quantize": lambda model: cqhf.quantize(model, RECIPE, tokens),
        "inspect": lambda model: cqhf.inspect(model, tokens, 16),
    }


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


class Wrapper(torch.nn.Module):
    """As packages with adapters wrap a model, whose config they hand on."""

    def __init__(self, model, config):
        super().__init__()
        self.inner = torch.nn.ModuleDict({"model": model})
        self.config = config


@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_in_two_places_is_refused(compiled, tokens):
    model = cqhf.tiny_model("llama")
    first = model.model.layers[0]
    model.model.layers[1] = torch.compile(first) if compiled else first
    for call in calls(tokens).values():
        with pytest.raises(
            cq.ArchitectureError, match=r"model\.layers\.0 and model\.layers\.1 must be two"
        ):
            call(model)
    wanted = cqhf.evaluate(model, tokens)
    model.model.layers[1] = copy.deepcopy(first)
    assert cqhf.evaluate(model, tokens) == wanted
    cqhf.quantize(model, RECIPE, tokens)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_layers_of_torchs_own_quantization_are_refused_and_evaluated(tokens):
    model = cqhf.tiny_model("llama")
    wanted = cqhf.evaluate(model, tokens).perplexity
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    for call in calls(tokens).values():
        with pytest.raises(
            cq.CheckpointError, match=r"q_proj must hold a float weight, got torch\.ao.*\.Linear"
        ):
            call(model)
    assert cqhf.evaluate(model, tokens).perplexity == pytest.approx(wanted, rel=0.1)


CHANGES = {
    "parametrized": (
        DOWN,
        parametrizations.orthogonal,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        "parametrization _Orthogonal .*remove_parametrizations",
    ),
    "parametrized norm": (
        "model.norm",
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        "parametrization Doubled .*remove_parametrizations",
    ),
    "pruned": (
        DOWN,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.remove(layer, "weight"),
        "L1Unstructured .*prune.remove",
    ),
    "pruned twice": (
        DOWN,
        lambda layer: [prune.random_unstructured(layer, "weight", 0.2) for _ in range(2)],
        lambda layer: prune.remove(layer, "weight"),
        "PruningContainer .*prune.remove",
    ),
    "weight norm": (
        DOWN,
        torch.nn.utils.weight_norm,
        torch.nn.utils.remove_weight_norm,
        "WeightNorm .*remove_weight_norm",
    ),
    "spectral norm": (
        DOWN,
        torch.nn.utils.spectral_norm,
        torch.nn.utils.remove_spectral_norm,
        "SpectralNorm .*remove_spectral_norm",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", CHANGES)
def test_weights_that_torch_computes_anew_are_refused_by_name(kind, tokens):
    path, change, undo, found = CHANGES[kind]
    model = cqhf.tiny_model("llama")
    layer = model.get_submodule(path)
    change(layer)
    for call in calls(tokens).values():
        with pytest.raises(
            cq.ArchitectureError, match=rf"{path}\.weight must be a parameter, got .*{found}"
        ):
            call(model)
    assert np.isfinite(cqhf.evaluate(model, tokens).perplexity)
    undo(layer)
    cqhf.plan(model, RECIPE)


def test_models_of_other_code_are_refused(tokens):
    model = cqhf.tiny_model("llama")
    everything = {**calls(tokens), "evaluate": lambda model: cqhf.evaluate(model, tokens)}
    for call in everything.values():
        with pytest.raises(TypeError, match="must be a Transformers model, got Wrapper, whose .*d"):
            call(Wrapper(model, {"model_type": "llama"}))
        with pytest.raises(
            cq.ArchitectureError,
            match=r"which has model\.embed_tokens .* got Wrapper .* give the LlamaForCausalLM at "
            r"'inner\.model' in it",
        ):
            call(Wrapper(model, model.config))
        with pytest.raises(cq.ArchitectureError, match="got Wrapper without it; load it with"):
            call(Wrapper(torch.nn.Linear(4, 4), model.config))


def test_models_that_predict_no_tokens_are_refused(tokens):
    model = cqhf.tiny_model("llama")
    classifier = transformers.LlamaForSequenceClassification(model.config)
    everything = {**calls(tokens), "evaluate": lambda model: cqhf.evaluate(model, tokens)}
    for given in (model.model, classifier):
        for call in everything.values():
            with pytest.raises(
                cq.ArchitectureError,
                match="must be a causal language model.* got Llama.* without it; load it with "
                "transformers.AutoModelForCausalLM$",
            ):
                call(given)


@pytest.mark.parametrize("recipe", ["recipe.toml", None, {"block_size": 16}])
def test_recipes_of_other_types_are_refused(recipe, tokens):
    model = cqhf.tiny_model("llama")
    for call in (
        lambda: cqhf.plan(model, recipe),
        lambda: cqhf.calibrate(model, recipe, tokens),
        lambda: cqhf.quantize(model, recipe, tokens),
    ):
        with pytest.raises(TypeError, match="recipe must be a Recipe, got (str|NoneType|dict)"):
            call()
