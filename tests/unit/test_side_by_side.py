"""Shares of work in processes of their own: results, reports, errors, ends."""

from __future__ import annotations

import os

import pytest

from corequant.errors import CorequantError, RunError, SpecError
from corequant_cli.commands.side_by_side import side_by_side


def double(share, report):
    report("seen", share)
    if share == "refused":
        raise SpecError("share must be another")
    if share == "failed":
        raise KeyError("there is none")
    if share == "stopped":
        os._exit(3)
    return 2 * share, os.getpid(), os.environ["OMP_NUM_THREADS"]


def test_shares_are_worked_on_elsewhere_with_their_part_of_the_processors(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen = set()
    found = side_by_side(double, [3, 5], lambda *event: seen.add(event), 6)
    assert [value for value, _, _ in found] == [6, 10]
    assert len({os.getpid(), *(process for _, process, _ in found)}) == 3
    assert {threads for _, _, threads in found} == {"3"}
    assert "OMP_NUM_THREADS" not in os.environ
    assert seen == {("seen", 3), ("seen", 5)}


def test_one_processor_works_on_all_here(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = side_by_side(double, [3, 5], lambda *event: None, 1)
    assert found == [(6, os.getpid(), "1"), (10, os.getpid(), "1")]


@pytest.mark.parametrize(
    ("share", "error", "message"),
    [
        ("refused", CorequantError, "^share must be another$"),
        ("failed", RuntimeError, "KeyError: 'there is none'"),
        ("stopped", RunError, "must return a result, but it ended"),
    ],
)
def test_what_goes_wrong_elsewhere_is_told_here(share, error, message):
    with pytest.raises(error, match=message):
        side_by_side(double, [share], lambda *event: None, 1 + 1)
