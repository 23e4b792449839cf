"""The time that a run will still take, by a clock that is made up."""

from __future__ import annotations

from corequant_transformers.run.pace import Pace

STEPS = ["calibrate-0", "calibrate-1", "calibrate-2", "choose", "entry"]
STEPS += ["block-0", "block-1", "block-2", "exit"]


def test_blocks_that_are_left_take_as_long_as_those_before():
    events = []
    pace = Pace(STEPS, events.append)
    for step in STEPS:
        # The first block also compiles.
        pace.step(step, {"block-0": 9.0, "block-1": 2.0, "block-2": 4.0}.get(step, 1.0))
    assert [e["step"] for e in events] == STEPS
    assert [e["steps_left"] for e in events] == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert [e["remaining_seconds"] for e in events] == [None] * 6 + [2.0, 0.0, 0.0]


def test_a_run_that_goes_on_estimates_from_its_own_blocks():
    events = []
    pace = Pace([f"block-{k}" for k in range(30)] + ["exit"], events.append)
    pace.step("block-27", 9.0)
    pace.step("block-28", 2.0)
    assert [e["steps_left"] for e in events] == [3, 2]
    assert [e["remaining_seconds"] for e in events] == [None, 2.0]
