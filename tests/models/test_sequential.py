"""Rounding decoder blocks one after the other, against the whole model's activations."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import LayerSettings, Recipe
from corequant.rounding import RoundingOptions, round_together
from corequant_transformers.model.forward import HiddenStates
from corequant_transformers.model.parts import ModelWeights, Parts, skeleton
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.rounding import layers, networks
from corequant_transformers.rounding.block import round_block
from corequant_transformers.rounding.groups import groups_of
from corequant_transformers.run.job import Job
from corequant_transformers.run.ledger import MemoryLedger

INT4 = cq.QuantSpec.parse("int4:channel")


def run(model, tokens, **fields):
    fields = {"block_size": 16, "rounding": "qronos", **fields}
    return cqhf.quantize(model, Recipe(**fields), tokens)


def inputs(model, names, tokens):
    """What layers read, rows being the tokens of all windows."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        for window in tokens:
            model(torch.from_numpy(window)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in seen.items()}


@pytest.fixture
def recorded(monkeypatch):
    """The arguments of every problem that is solved."""
    calls = []

    def record(weights, spec, options, H, G, **more):
        calls.append((weights, spec, options, H, G))
        return round_together(weights, spec, options, H, G, **more)

    monkeypatch.setattr(layers, "round_together", record)
    return calls


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_moments_are_those_of_the_whole_model(kind, tokens, recorded):
    model = cqhf.tiny_model(kind)
    # Numbers of bfloat16 lie at ties more often, where a batch's last bits choose another code.
    result = run(model, tokens, reference="model", dtype="float32")
    assert len(recorded) == 14
    names = [m.name for m in result.plan.quantized]
    truth = inputs(model, names, tokens)
    given = inputs(result.model, names, tokens)
    signs = result.choices.factors["residual"]
    rows = {m.name: m for m in result.plan.quantized}
    for weights, _, _, H, G in recorded:
        for name in weights:
            row, x = rows[name], truth[name].astype(np.float64)
            if row.norm is not None:
                gain = model.get_submodule(row.norm).weight.numpy().astype(np.float64)
                x = cq.block_hadamard(x / gain * signs)
            elif row.online:
                x = cq.block_hadamard(x[:, result.choices.permutations[name]], 16)
            else:
                x = cq.block_hadamard(x, model.config.head_dim)
            q = given[name]
            if row.online:
                q = cq.block_hadamard(q, 16)
            q = cq.fake_quantize(q, result.plan.recipe.activations).astype(np.float64)
            # Float32 sums; a rounding that tips over in another batch would move much more.
            scale = np.abs(H).max()
            np.testing.assert_allclose(H, q.T @ q / tokens.size, atol=1e-5 * scale)
            np.testing.assert_allclose(G, x.T @ q / tokens.size, atol=1e-5 * scale)
    order = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up"]
    assert [list(weights) for weights, *_ in recorded[:7]] == [
        [f"model.layers.0.{n}_proj"] for n in (*order, "mlp.down")
    ]
    # Layers that read the same input share its moments.
    assert recorded[0][3] is recorded[2][3]


def test_the_reference_is_the_float_block_behind_quantized_ones(tokens, recorded):
    result = run(cqhf.tiny_model("llama"), tokens)
    by_block = {name: (H, G) for weights, _, _, H, G in recorded for name in weights}
    recorded.clear()
    run(cqhf.tiny_model("llama"), tokens, reference="model")
    by_model = {name: (H, G) for weights, _, _, H, G in recorded for name in weights}
    # Nothing comes before the first block.
    for name in by_block:
        pairs = zip(by_block[name], by_model[name], strict=True)
        same = all(np.array_equal(one, other) for one, other in pairs)
        assert same == name.startswith("model.layers.0.")
    # What query, key and value read in the float block is what they read before it is rounded.
    names = [f"model.layers.1.self_attn.{n}_proj" for n in "qkv"]
    for name, x in inputs(result.model, names, tokens).items():
        q = cq.fake_quantize(x, result.plan.recipe.activations).astype(np.float64)
        G = by_block[name][1]
        np.testing.assert_allclose(
            G, x.T.astype(np.float64) @ q / tokens.size, atol=1e-5 * np.abs(G).max()
        )


def test_without_quantized_activations_moments_are_those_of_the_inputs(tokens, recorded):
    model = cqhf.tiny_model("llama")
    result = run(model, tokens, activations="none", rounding="gptq")
    names = [m.name for m in result.plan.quantized if not m.online]
    given = inputs(result.model, names, tokens)
    for weights, _, _, H, G in recorded:
        assert G is None
        for name in weights:
            if name in given:
                q = given[name].astype(np.float64)
                np.testing.assert_allclose(H, q.T @ q / tokens.size, atol=1e-5 * np.abs(H).max())


def test_better_methods_lose_less(tokens, recorded):
    run(cqhf.tiny_model("llama", num_hidden_layers=3), tokens)
    totals = dict.fromkeys(("qronos", "gptq", "nearest"), 0.0)
    for weights, spec, _, H, G in recorded:
        for method in totals:
            made = round_together(weights, spec, RoundingOptions(method), H, G)
            totals[method] += sum(made[name].report.loss for name in made)
    assert totals["qronos"] < totals["gptq"] < totals["nearest"]


@pytest.mark.parametrize("rounding", ["gptq", "gpfq", "qronos", "learned"])
def test_report_says_how_each_layer_was_rounded(rounding, tokens):
    rows = run(cqhf.tiny_model("llama"), tokens, rounding=rounding, steps=50).report["matrices"]
    assert [r["name"] for r in rows][:2] == [f"model.layers.0.self_attn.{n}_proj" for n in "qk"]
    assert len(rows) == 14
    assert all(r["method"] == {"learned": "adaround"}.get(rounding, rounding) for r in rows)
    assert sum(r["loss"] for r in rows) < sum(r["loss_nearest"] for r in rows)
    assert all(r["tokens"] == tokens.size and r["peak_rss_mib"] > 50 for r in rows)
    damped = rounding in ("gptq", "qronos")
    assert all((r["damping"] is not None) == damped for r in rows)
    if rounding == "gptq":
        assert {round(r["relative_damping"], 6) for r in rows} == {0.01}


def test_options_reach_the_solvers(tokens, recorded):
    model = cqhf.tiny_model("llama")
    fields = {"damping": 0.5, "act_order": False, "correction": 0.25, "magr": 0.01}
    run(model, tokens, rounding="gptq", weights="int4:group16", refit=True, **fields)
    _, spec, options, _, G = recorded[0]
    assert str(spec) == "int4:group16:symmetric:mse"
    wanted = RoundingOptions("gptq", refit=True, **fields)
    assert options == wanted
    assert G is not None


def test_an_accumulator_is_certified(tokens):
    result = run(
        cqhf.tiny_model("llama"), tokens, activations="int8:token:asymmetric", accumulator="16x14"
    )
    bound = result.plan.recipe.rounding_options().accumulator
    assert (bound.bits, bound.tile, bound.activation.name) == (14, 16, "int8")
    for matrix in result.plan.quantized:
        layer = result.model.get_submodule(matrix.name)
        assert cq.certify(layer.quantized, bound).safe
    plain = run(cqhf.tiny_model("llama"), tokens, activations="int8:token:asymmetric")
    assert not all(
        cq.certify(plain.model.get_submodule(m.name).quantized, bound).safe
        for m in plain.plan.quantized
    )
    assert max(r["bounded_share"] for r in result.report["matrices"]) > 0


def codes(result):
    return {
        m.name: result.model.get_submodule(m.name).quantized.codes for m in result.plan.quantized
    }


def test_an_executor_gives_the_same_codes(tokens):
    model = cqhf.tiny_model("llama")
    alone = codes(run(model, tokens))
    with ThreadPoolExecutor(3) as pool:
        recipe = Recipe(block_size=16, rounding="qronos")
        shared = codes(cqhf.quantize(model, recipe, tokens, executor=pool))
    for name, wanted in alone.items():
        np.testing.assert_array_equal(shared[name], wanted)


def test_float_model_is_untouched_and_the_result_saves(tokens, tmp_path):
    model = cqhf.tiny_model("qwen2")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = run(model, tokens)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    result.save(tmp_path / "out")
    loaded = cqhf.load(tmp_path / "out")
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        assert torch.equal(result.model(ids).logits, loaded(ids).logits)
    assert result.plan.recipe.rounding == "qronos"


def test_an_interrupted_block_is_as_it_was():
    class Stop(Exception):
        pass

    def stop(done):
        raise Stop

    block = Toy("parallel")
    hidden = torch.randn(2, 4, 8, generator=torch.manual_seed(0))
    settings = LayerSettings(INT4, options=RoundingOptions("gptq"))
    rows = [MatrixPlan(f"b.{n}", (8, 8), settings=settings) for n in ("first", "second")]
    watched = weakref.ref(hidden)
    with pytest.raises(Stop):
        round_block(block, "b", rows, HiddenStates(hidden, None), {}, progress=stop)
    assert not block.first._forward_pre_hooks
    before = block.first.weight.clone()
    block(hidden)
    assert torch.equal(block.first.weight, before)
    del hidden
    gc.collect()
    assert watched() is None


def test_progress_counts_groups(tokens):
    seen = []
    cqhf.quantize(
        cqhf.tiny_model("llama"),
        Recipe(block_size=16, rounding="gptq"),
        tokens,
        progress=lambda *step: seen.append(step),
    )
    assert [s[1:] for s in seen if s[0] == "round"] == [(k, 8) for k in range(1, 9)]


def test_fewer_tokens_than_channels_and_constant_ones():
    model = cqhf.tiny_model("llama")
    for windows in (np.arange(4)[None], np.full((2, 16), 7)):
        for rounding in ("gptq", "gpfq", "qronos"):
            result = run(model, windows, rounding=rounding)
            rows = result.report["matrices"]
            assert all(np.isfinite(r["loss"]) and r["tokens"] == windows.size for r in rows)
            assert sum(r["loss"] for r in rows) < sum(r["loss_nearest"] for r in rows)


def test_dead_channels_are_reported(tokens):
    model = cqhf.tiny_model("llama")
    # A whole block: the rotation would revive single channels.
    model.model.layers[1].mlp.up_proj.weight.data[16:32] = 0
    result = run(model, tokens, permutation="identity")
    rows = {r["name"]: r["dead_columns"] for r in result.report["matrices"]}
    assert rows.pop("model.layers.1.mlp.down_proj") == 16
    assert not any(rows.values())


class Toy(torch.nn.Module):
    """A block with two linear layers."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.first = torch.nn.Linear(8, 8, bias=False)
        self.second = torch.nn.Linear(8, 8, bias=False)

    def forward(self, x):
        if self.mode == "reversed":
            return self.first(self.second(x))
        if self.mode == "some":
            return self.first(x) + self.second(x[:, 1:]).sum(1, keepdim=True)
        if self.mode == "unrouted":
            return self.first(x)
        return self.first(x) + self.second(x + 1)


def toy(mode, hidden=None, norm=None, options=None):
    options = options or RoundingOptions("qronos")
    settings = LayerSettings(INT4, options=options)
    rows = [MatrixPlan(f"b.{n}", (8, 8), norm, settings=settings) for n in ("first", "second")]
    hidden = torch.randn(2, 4, 8, generator=torch.manual_seed(0)) if hidden is None else hidden
    states = HiddenStates(hidden, hidden.clone() if options.needs_float else None)
    return round_block(Toy(mode), "b", rows, states, {})


def test_layers_that_run_otherwise_than_described():
    with pytest.raises(cq.CalibrationError, match=r"b\.first, after the layers described before"):
        toy("reversed")
    with pytest.raises(cq.ArchitectureError, match=r"second must read the same input as"):
        toy("parallel", norm="b.norm")
    with pytest.raises(cq.CalibrationError, match=r"one token must reach b\.second.*none in 2 cal"):
        toy("unrouted")
    with pytest.raises(cq.CalibrationError, match=r"all 4 tokens.*reach b\.second.*got 3 and 3"):
        toy("some")
    found = toy("some", options=RoundingOptions("gptq"))
    assert [row["tokens"] for row in found.rows] == [8, 6]


def test_bad_hidden_states_name_layer_and_window():
    hidden = torch.ones(2, 4, 8)
    hidden[1, 2, 3] = torch.nan
    with pytest.raises(
        cq.NonFiniteError, match=r"input of b\.first in calibration window 1.*\(0, 2, 3\)"
    ):
        toy("parallel", hidden)
    with pytest.raises(
        cq.NonFiniteError, match=r"second moments of quantized of b\.first in calibration window 0"
    ):
        toy("parallel", torch.full((2, 4, 8), 1e30))


def test_groups_keep_experts_apart():
    def row(name, norm="n"):
        return MatrixPlan(name, (8, 8), norm)

    rows = [row("a.q"), row("a.k"), row("a.o", None)]
    rows += [row("e.0.gate"), row("e.0.up"), row("e.0.down", None), row("e.1.gate"), row("e.1.up")]
    found = [[r.name for r in group] for group in groups_of(rows)]
    assert found == [
        ["a.q", "a.k"], ["a.o"], ["e.0.gate", "e.0.up"], ["e.0.down"], ["e.1.gate", "e.1.up"],
    ]  # fmt: skip


def test_blocks_that_are_called_without_names(tokens):
    rows = run(cqhf.tiny_model("gpt2"), tokens).report["matrices"]
    assert sum(r["loss"] for r in rows) < sum(r["loss_nearest"] for r in rows)


def test_matrices_outside_of_blocks_are_refused(tokens):
    model = cqhf.tiny_model("llama")
    plan = cqhf.plan(model, Recipe(block_size=16, rounding="gptq"))
    head = dataclasses.replace(plan.matrices[-1], settings=plan.quantized[0].settings)
    plan = dataclasses.replace(plan, matrices=(*plan.matrices[:-1], head))
    with pytest.raises(cq.ArchitectureError, match="be in a decoder block.*lm_head"):
        Job(Parts(skeleton(model), plan, ModelWeights(model)), plan, tokens, MemoryLedger())


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_blocks_are_let_go_at_once(monkeypatch, tokens, kind):
    seen, copies = [], copy.deepcopy

    def watch(module, *memo):
        made = copies(module, *memo)
        if type(module).__name__.endswith("DecoderLayer"):
            seen.extend(weakref.ref(m) for m in (module, made))
        return made

    model = cqhf.tiny_model(kind)
    monkeypatch.setattr(networks.copy, "deepcopy", watch)
    # Nothing looks for cycles meanwhile, which takes longer than a small block.
    monkeypatch.setattr(gc, "collect", lambda *_: pytest.fail("cycles are looked for"))
    gc.disable()
    try:
        run(model, tokens)
        alive = [ref() for ref in seen if ref() is not None]
    finally:
        gc.enable()
    assert len(seen) >= 2 * model.config.num_hidden_layers
    assert not alive
