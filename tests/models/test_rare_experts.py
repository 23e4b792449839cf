"""Experts that few calibration tokens reach, or one, or none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant.rounding import InputMoments
from corequant_transformers.calibration import collector
from corequant_transformers.model.expert_list import ExpertList

EXPERTS = 16
FEW = 2
RECIPE = {"block_size": 16, "permutation": "massdiff", "expert_tokens": FEW}


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(1).integers(0, 128, (2, 6))


def model_of(kind="mixtral"):
    """So many experts that some get no token, and some get one."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return cqhf.tiny_model(kind, num_experts=EXPERTS, num_local_experts=EXPERTS, **sizes)


def rows_of(result, what):
    found = {r["name"]: r for r in result.report[what] if ".experts." in r["name"]}
    assert {0, 1} <= {r["tokens"] for r in found.values()}
    return found


@pytest.mark.parametrize(("kind", "rounding"), [("mixtral", "gptq"), ("qwen3_moe", "qronos")])
def test_rare_experts_are_rounded_for_all_tokens_of_their_layer(
    kind, rounding, windows, monkeypatch
):
    seen = []
    update = InputMoments.update

    def note(self, q, x=None):
        seen.append(q.numel() // q.shape[-1])
        return update(self, q, x)

    monkeypatch.setattr(InputMoments, "update", note)
    made = cqhf.quantize(model_of(kind), Recipe(**RECIPE, rounding=rounding), windows)
    assert made.verification.logits_error < 1e-10
    rows = rows_of(made, "matrices")
    assert sum(r["tokens"] for r in rows.values()) == 3 * 2 * windows.size
    for row in rows.values():
        assert row["method"] == rounding
        assert row.get("rare") == ("shared" if row["tokens"] < FEW else None)
        assert ("unrouted" in row) == (row["tokens"] == 0)
        assert row["loss"] <= row["loss_nearest"]
    rare = sum("rare" in r for r in rows.values())
    # One group of gate and up, and one of down: each of them once more, over both windows.
    assert seen.count(windows.shape[1]) >= 2 * windows.shape[0] * rare // 3
    assert any("fewer than 2 calibration tokens" in note for note in made.plan.notes)
    assert not any(m.shared for m in made.model.modules() if isinstance(m, ExpertList))


def test_rare_experts_are_rounded_to_nearest_where_that_is_asked_for(windows):
    recipe = Recipe(**RECIPE, rounding="gptq", rare_experts="nearest")
    rows = rows_of(cqhf.quantize(model_of(), recipe, windows), "matrices")
    for row in rows.values():
        few = row["tokens"] < FEW
        assert (row["method"], row.get("rare")) == (
            ("nearest", "nearest") if few else ("gptq", None)
        )


def test_one_token_is_enough_where_that_is_asked_for(windows):
    recipe = Recipe(**{**RECIPE, "expert_tokens": 1}, rounding="gptq", rare_experts="nearest")
    rows = rows_of(cqhf.quantize(model_of(), recipe, windows), "matrices").values()
    assert {r["method"] for r in rows if r["tokens"] == 1} == {"gptq"}
    assert {r["method"] for r in rows if r["tokens"] == 0} == {"nearest"}


def test_permutations_of_rare_experts_are_made_from_all_tokens(windows):
    model, recipe = model_of(), Recipe(**RECIPE)
    result = cqhf.quantize(model, recipe, windows)
    rows = rows_of(result, "regions")
    name, row = next((n, r) for n, r in rows.items() if n.startswith("model.layers.0") and
                     r["tokens"] == 0)  # fmt: skip
    assert (row["rare"], row["permutation"]) == ("shared", "massdiff")
    assert row["largest_block_mass_permuted"] <= row["largest_block_mass"]
    # The same from the inputs of the layer's experts, and the expert's own gate and up.
    read = []
    experts = model.model.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        for window in windows:
            model(torch.from_numpy(window)[None])
    hook.remove()
    gate, up = experts.gate_up_proj[int(name.split(".")[5])].chunk(2)
    statistics = cq.ActivationStats(up.shape[0])
    for x in read:
        inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        statistics.update(inner.numpy())
    mine = cq.massdiff(statistics.mean_abs, 16)
    np.testing.assert_array_equal(result.choices.permutations[name], mine)
    few = {**RECIPE, "rare_experts": "nearest"}
    left = cqhf.quantize(model, Recipe(**few), windows)
    np.testing.assert_array_equal(left.choices.permutations[name], np.arange(up.shape[0]))
    assert rows_of(left, "regions")[name]["rare"] == "nearest"


@pytest.mark.parametrize("factors", ["signs", "scales"])
def test_what_is_calibrated_once_is_chosen_from_alike(factors, windows):
    model = model_of("qwen3_moe")
    recipe = Recipe(**{**RECIPE, "permutation": "auto"}, factors=factors)
    calibration = cqhf.calibrate(model, recipe, windows)
    assert calibration.routed
    assert all(n < FEW for n in calibration.routed.values())
    assert {calibration.statistics[n].count for n in calibration.routed} == {windows.shape[1]}
    one, other = (cqhf.quantize(model, recipe, given) for given in (windows, calibration))
    assert one.report["regions"] == other.report["regions"]
    for name, p in one.choices.permutations.items():
        np.testing.assert_array_equal(p, other.choices.permutations[name])


def test_a_second_look_changes_nothing_that_follows(windows, monkeypatch):
    result = cqhf.quantize(model_of(), Recipe(**RECIPE), windows)
    dense = [r for r in result.report["regions"] if "rare" not in r]
    monkeypatch.setattr(collector.Collector, "restart", None)
    other = cqhf.quantize(model_of(), Recipe(**RECIPE, rare_experts="nearest"), windows)
    assert dense == [r for r in other.report["regions"] if "rare" not in r]


@pytest.mark.parametrize(
    ("how", "words"), [("shared", "for all tokens of their layer"), ("nearest", "to nearest")]
)
def test_card_and_report_on_disk_name_rare_experts(how, words, windows, tmp_path):
    recipe = Recipe(**RECIPE, rounding="gptq", rare_experts=how)
    cqhf.quantize(model_of(), recipe, windows, tmp_path / how)
    found = json.loads((tmp_path / how / "report.json").read_text())["matrices"]
    count = sum(r.get("rare") == how for r in found)
    card = (tmp_path / how / "README.md").read_text()
    assert f"{count} layers of experts that fewer than 2 calibration tokens reached" in card
    assert f"were rounded {words}." in card
    cqhf.load(tmp_path / how)


def test_numbers_and_names_are_checked():
    with pytest.raises(cq.RecipeError, match="expert_tokens must be .*1"):
        Recipe(expert_tokens=0)
    with pytest.raises(cq.RecipeError, match="rare_experts must be one of shared, nearest, got"):
        Recipe(rare_experts="first")
