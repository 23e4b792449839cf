"""Rounding the experts of decoder blocks, each for the tokens that it is given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import LayerSettings, Recipe
from corequant.rounding import AccumulatorSpec, InputMoments, RoundingOptions
from corequant_transformers.model.expert_list import ExpertList
from corequant_transformers.model.forward import HiddenStates, block_arguments, run_block
from corequant_transformers.model.parts import ModelWeights, Parts, skeleton
from corequant_transformers.rounding.block import round_block
from tests.models.test_architectures import without_expert_2
from tests.models.test_sequential import INT4, run


@pytest.mark.parametrize(
    ("kind", "rounding"),
    [("mixtral", "gptq"), ("mixtral", "qronos"), ("qwen3_moe", "gpfq"), ("llama4_text", "qronos")],
)
def test_experts_are_rounded_for_the_tokens_that_reach_them(kind, rounding, tokens):
    model = cqhf.tiny_model(kind)
    rows = run(model, tokens, rounding=rounding).report["matrices"]
    experts = [r for r in rows if "experts" in r["name"] and r["name"].endswith("down_proj")]
    layers = {r["name"].split(".")[2] for r in experts}
    chosen = model.config.num_experts_per_tok
    assert sum(r["tokens"] for r in experts) == tokens.size * chosen * len(layers)
    assert sum(r["loss"] for r in rows) < sum(r["loss_nearest"] for r in rows)


def test_the_float_network_is_asked_about_the_tokens_that_an_expert_gets(tokens, monkeypatch):
    model = cqhf.tiny_model("mixtral")
    plan = cqhf.plan(model, Recipe(block_size=16, rounding="qronos", reference="model"))
    parts = Parts(skeleton(model), plan, ModelWeights(model))
    arguments = block_arguments(parts, tokens[0], torch.float32)[0]
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(*tokens.shape, plan.dimensions.hidden, generator=generator)
    noisy = states + 0.3 * torch.randn(states.shape, generator=generator)
    seen, visits = [], []
    update, visit = InputMoments.update, ExpertList.forward

    def spy(self, quantized, float_inputs=None):
        seen.append((quantized.numpy().copy(), float_inputs.numpy().copy()))
        return update(self, quantized, float_inputs)

    def note(self, hidden_states, chosen, weights):
        visits.append((hidden_states.clone(), chosen.clone()))
        return visit(self, hidden_states, chosen, weights)

    monkeypatch.setattr(InputMoments, "update", spy)
    monkeypatch.setattr(ExpertList, "forward", note)
    with parts.open(0):
        block = parts.block(0)
        own = [run_block(block, states[k : k + 1], arguments)[0] for k in range(len(tokens))]
        (_, unforced), visits[:] = visits[0], []
        settings = LayerSettings(INT4, options=RoundingOptions("qronos"))
        rows = [replace(m, settings=settings) for m in plan.quantized if m.block == 0]
        hidden = HiddenStates(noisy.clone(), states.clone())
        round_block(block, "model.layers.0", rows, hidden, arguments)
        # What the float block gives, it gives by its own routes.
        for k, expected in enumerate(own):
            torch.testing.assert_close(hidden.float_states[k], expected, rtol=0, atol=0)
    # The first window visits the experts in the quantized network, then in the float one.
    (quantized, chosen), (floating, followed) = visits[:2]
    assert torch.equal(followed, chosen)
    assert not torch.equal(unforced, chosen)
    # What the first expert is compared on are the same tokens in both.
    q, x = next(pair for pair in seen if pair[0].ndim == 2)
    places = torch.where(chosen == 0)[0]
    np.testing.assert_array_equal(x, floating[places].numpy())
    np.testing.assert_array_equal(q, quantized[places].numpy())


def test_an_expert_that_no_token_visits_is_rounded_to_nearest_and_named(tokens):
    model = cqhf.tiny_model("mixtral")
    model.model.layers[0].mlp.gate.register_forward_hook(without_expert_2)
    rows = run(model, tokens, rare_experts="nearest").report["matrices"]
    idle = [r for r in rows if r["tokens"] == 0]
    path = "model.layers.0.mlp.experts.2"
    expected = {f"{path}.{part}" for part in ("gate_proj", "up_proj", "down_proj")}
    assert {r["name"] for r in idle} == expected
    assert all(r["unrouted"] and r["rare"] == r["method"] == "nearest" for r in idle)
    assert not any("unrouted" in r for r in rows if r["tokens"])


def test_an_expert_that_no_token_visits_keeps_within_an_accumulator(tokens):
    model = cqhf.tiny_model("mixtral")
    model.model.layers[0].mlp.gate.register_forward_hook(without_expert_2)
    made = run(model, tokens, rounding="gptq", accumulator="16x10", rare_experts="nearest")
    bound = AccumulatorSpec(10, 16, made.plan.recipe.activations.format)
    layer = made.model.get_submodule("model.layers.0.mlp.experts.2.down_proj")
    assert cq.certify(layer.quantized, bound).safe
    row = next(
        r for r in made.report["matrices"] if r["name"].endswith("0.mlp.experts.2.down_proj")
    )
    assert row["unrouted"]
    assert row["bounded_share"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("activation", "must compute what the description of its experts says, .* differ by"),
        ("bias", "got one that differs in extra_bias"),
    ],
)
def test_experts_that_compute_something_else_are_refused(change, words, tokens, monkeypatch):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    init = MixtralExperts.__init__

    def begin(self, config):
        init(self, config)
        if change == "bias":
            self.extra_bias = torch.nn.Parameter(torch.zeros(4))

    monkeypatch.setattr(MixtralExperts, "__init__", begin)
    if change == "activation":
        monkeypatch.setattr(MixtralExperts, "forward", other_forward)
    with pytest.raises(cq.ArchitectureError, match=words):
        cqhf.quantize(cqhf.tiny_model("mixtral"), Recipe(block_size=16), tokens)


def other_forward(self, hidden_states, chosen, weights):
    total = torch.zeros_like(hidden_states)
    for index in range(self.num_experts):
        token, position = torch.where(chosen == index)
        gate, up = (hidden_states[token] @ self.gate_up_proj[index].T).chunk(2, -1)
        y = (torch.relu(gate) * up) @ self.down_proj[index].T
        total.index_add_(0, token, y * weights[token, position, None])
    return total
