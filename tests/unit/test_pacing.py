"""The time that a run will still take, by a clock that is made up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.run.estimate import Pace, efforts
from corequant_transformers.run.job import steps_of

BLOCKS = 30


def plan(**fields):
    model = cqhf.tiny_model("llama", num_hidden_layers=2)
    model.config.num_hidden_layers = BLOCKS
    return cqhf.plan(model, Recipe(block_size=16, **fields))


def clock(seconds):
    """Run through steps and return (done, estimate) after each, in seconds."""
    events = []
    pace = Pace({step: work for step, (_, work) in seconds.items()}, events.append)
    passed = itertools.accumulate(spent for spent, _ in seconds.values())
    for step, (spent, _) in seconds.items():
        pace.step(step, spent)
    return list(zip(passed, (e["remaining_seconds"] for e in events), strict=True))


def at_half_way(trace):
    """Return the estimate's relative error at the first step after half of the time."""
    total = trace[-1][0]
    passed, estimate = next((p, e) for p, e in trace if p >= total / 2)
    return estimate / (total - passed) - 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"samples": 1, "sequence_length": 64},
        {"weights": "int4:channel:symmetric:absmax"},
        {"rounding": "qronos"},
        {"rounding": "gptq", "samples": 1},
        {"sign_trials": 3},
    ],
)
@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.7])
def test_within_a_quarter_at_half_way(fields, ratio):
    """Also where a block takes another share of the time than the plan expects."""
    generator = np.random.default_rng(0)
    work = efforts(plan(**fields))
    seconds = {}
    for step, effort in work.items():
        # The first of a kind also compiles; a machine's speed comes and goes.
        first = 3.0 if step.endswith("00000") else 1.0
        slower = ratio if step.startswith("block") else 1.0
        spent = 1e-6 * effort * first * slower * generator.uniform(0.8, 1.25)
        seconds[step] = (spent, effort)
    trace = clock(seconds)
    assert [e is None for _, e in trace[:3]] == [True, False, False]
    assert abs(at_half_way(trace)) < 0.25
    assert trace[-1][1] == 0


def test_blocks_that_differ():
    """Experts take longer than the dense blocks between them, and the plan knows."""
    model = cqhf.tiny_model("qwen3_moe", mlp_only_layers=[0])
    model.config.num_hidden_layers, model.config.mlp_only_layers = 12, list(range(6))
    work = efforts(cqhf.plan(model, Recipe(block_size=16, samples=1, sequence_length=64)))
    trace = clock({step: (1e-6 * effort, effort) for step, effort in work.items()})
    for passed, estimate in trace[1:]:
        assert estimate == pytest.approx(trace[-1][0] - passed, abs=0.01)


def test_a_run_that_goes_on_estimates_from_its_own_blocks():
    table = plan()
    work = efforts(table)
    assert list(work) == steps_of(table)
    events = []
    pace = Pace(work, events.append)
    pace.step("block-00027", 9.0)
    pace.step("block-00028", 2.0)
    assert [e["steps_left"] for e in events] == [3, 2]
    assert events[0]["remaining_seconds"] is None
    exit_share = work["exit"] / work["block-00029"]
    assert events[1]["remaining_seconds"] == pytest.approx(2 * (1 + exit_share), abs=0.01)
