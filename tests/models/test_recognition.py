"""Model types that aren't described but built as one that is; and those that only look so."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers import pipeline
from corequant_transformers.architectures.described import described
from corequant_transformers.architectures.known import known_architectures
from corequant_transformers.model.recognition import architecture_in, recognize
from tests.models.test_described import VARIANTS
from tests.models.wired import HARMLESS, WRONG, wired

KINDS = [a.model_type for a in described() if not a.enclosed]
RECIPE = Recipe(block_size=16, factors="scales")


class OtherConfig(Qwen2Config):
    """Qwen2's config by another name."""

    model_type = "other_qwen2"


class OtherForCausalLM(Qwen2ForCausalLM):
    """Qwen2 by another name."""

    config_class = OtherConfig


AutoConfig.register(OtherConfig.model_type, OtherConfig, exist_ok=True)
AutoModelForCausalLM.register(OtherConfig, OtherForCausalLM, exist_ok=True)


def renamed(model):
    """Give a model a type of its own."""
    own = type(model.config)
    kind = f"other_{own.model_type}"
    model.config.__class__ = type(own.__name__, (own,), {"model_type": kind})
    return model


@pytest.fixture(scope="module")
def other():
    given = cqhf.tiny_model("qwen2")
    fields = {k: v for k, v in given.config.to_dict().items() if k != "model_type"}
    model = OtherForCausalLM(OtherConfig(**fields)).eval().requires_grad_(False)
    model.load_state_dict(given.state_dict())
    return model


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_described_type_is_found_under_another_name(kind):
    model = renamed(cqhf.tiny_model(kind, **VARIANTS.get(kind, {})))
    before = {name: type(module) for name, module in model.named_modules()}
    found = recognize(model)
    assert found is not None
    assert replace(found.architecture, model_type=kind) == known_architectures()[kind]
    assert found.architecture.model_type == f"other_{kind}"
    assert kind in found.like
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_recognized_type_goes_everywhere_that_a_described_one_goes(other, tokens, tmp_path):
    assert OtherConfig.model_type not in known_architectures()
    other.save_pretrained(tmp_path / "float")
    recipe = Recipe(block_size="auto", sign_trials=2)
    plan = cqhf.plan(tmp_path / "float", recipe)
    assert plan.architecture == replace(known_architectures()["qwen2"], model_type="other_qwen2")
    assert plan.notes[0].startswith("the model type 'other_qwen2' has no description; its modules")
    assert "verified in float64" in plan.notes[0]
    result = cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["notes"] == list(plan.notes)
    assert report["architecture"]["model_type"] == "other_qwen2"
    assert report["rehearsal"]["logits_error"] < 1e-10
    assert len(report["rehearsal"]["block_errors"]) == 2
    assert result.verification.logits_error < 1e-10
    loaded = cqhf.load(tmp_path / "out")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # As the same model is quantized under the name that is described.
    described_as = cqhf.quantize(cqhf.tiny_model("qwen2"), recipe, tokens)
    expected = logits(described_as.model, tokens)
    assert torch.equal(logits(loaded, tokens), expected)
    assert torch.equal(logits(there, tokens), expected)
    assert architecture_in(loaded) == plan.architecture
    assert cqhf.evaluate(loaded, tokens, against=other).divergence.kl > 0
    errors = cqhf.layer_errors(tmp_path / "out", other, tokens)
    assert len(errors.layers) == 14
    assert len(cqhf.inspect(other, tokens).layers) == 2
    calibration = cqhf.calibrate(other, recipe, tokens)
    again = cqhf.quantize(other, recipe, calibration)
    assert torch.equal(logits(again.model, tokens), expected)


def test_an_exported_model_of_a_recognized_type_is_read_by_transformers(other, tokens, tmp_path):
    recipe = Recipe(rotation="heads", weights="int4:group16", activations=None)
    result = cqhf.quantize(other, recipe, tokens, tmp_path / "out")
    cqhf.export(tmp_path / "out", tmp_path / "export")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    own = logits(result.model, tokens)
    assert float((logits(read, tokens) - own).abs().max() / own.abs().max()) < 0.02


# ---- what only looks like a described type


@pytest.mark.parametrize("wire", WRONG)
def test_one_wire_that_differs_is_refused_by_verification(wire, tokens, tmp_path, monkeypatch):
    model = wired(wire)
    # Its modules are Llama's, so that only what it computes tells.
    assert "llama" in recognize(model).like
    words = "the description that was found for 'wired' doesn't hold for this model: with random"
    with pytest.raises(cq.VerificationError, match=words):
        cqhf.quantize(model, RECIPE, tokens, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    # The verification of the model's own weights would have refused it, too.
    monkeypatch.setattr(pipeline, "rehearse", lambda *given: None)
    with pytest.raises(cq.VerificationError, match="differs from the float model|agree with the"):
        cqhf.quantize(model, RECIPE, tokens)


@pytest.mark.parametrize("wire", WRONG)
def test_gains_of_one_hide_no_wire(wire, tokens):
    with pytest.raises(cq.VerificationError, match="doesn't hold for this model: with random"):
        cqhf.quantize(wired(wire, neutral=True), Recipe(rotation="heads"), tokens)


def test_gains_of_one_would_hide_a_wire_from_the_models_own_verification(tokens, monkeypatch):
    monkeypatch.setattr(pipeline, "rehearse", lambda *given: None)
    found = cqhf.quantize(wired("norms exchanged", neutral=True), RECIPE, tokens)
    assert found.verification.logits_error < 1e-10


@pytest.mark.parametrize("wire", HARMLESS)
def test_wires_that_no_transform_touches_are_exact(wire, tokens):
    result = cqhf.quantize(wired(wire), RECIPE, tokens)
    assert result.verification.logits_error < 1e-10
    assert result.report["rehearsal"]["logits_error"] < 1e-10


class _Centered(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class _OnePlus(LlamaRMSNorm):
    def forward(self, x):
        found = super().forward(x)
        return found + found / self.weight


class _Absolute(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x / x.abs().mean(-1, keepdim=True)


@pytest.mark.parametrize("kind", [_Centered, _OnePlus, _Absolute])
def test_a_norm_of_another_kind_is_not_taken_for_one(kind):
    model = wired("as llama")
    assert "llama" in recognize(model).like
    model.model.layers[1].input_layernorm.__class__ = kind
    assert recognize(model) is None
    with pytest.raises(cq.ArchitectureError, match="got 'wired'"):
        cqhf.plan(model, RECIPE)


def test_a_parameter_too_many_is_not_overlooked():
    model = wired("as llama")
    model.model.layers[1].extra = torch.nn.Linear(64, 64)
    assert recognize(model) is None
    with pytest.raises(cq.ArchitectureError, match=r"to be placed are model\.layers\.\{\}\.extra"):
        cqhf.plan(model, RECIPE)


def test_a_recipe_that_does_not_fit_is_said_rather_than_that_nothing_fits():
    model = renamed(cqhf.tiny_model("llama"))
    with pytest.raises(cq.BlockSizeError, match="intermediate_size=96"):
        cqhf.plan(model, Recipe(block_size=7))


def test_requirements_of_a_description_hold_for_recognized_types_too():
    model = renamed(cqhf.tiny_model("opt"))
    assert recognize(model) is not None
    model.config.do_layer_norm_before = False
    assert recognize(model) is None


def test_rehearsals_are_the_same_each_time(other, tokens):
    found = [cqhf.quantize(other, RECIPE, tokens).report["rehearsal"] for _ in range(2)]
    assert found[0] == found[1]
    assert np.isfinite(found[0]["logits_error"])
