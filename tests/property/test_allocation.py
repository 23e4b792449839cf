"""Formats chosen for units: against all choices, within budgets, with a gap that holds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import corequant as cq
from corequant.rounding import allocation

NUMBERS = st.floats(0, 100, width=32)


def enumerated(losses, sizes, *, budget=np.inf, loss=np.inf):
    """Return the totals of the best of all choices."""
    rows = np.arange(len(losses))
    best = None
    for choice in itertools.product(range(losses.shape[1]), repeat=len(losses)):
        found = losses[rows, choice].sum(), sizes[rows, choice].sum()
        if found[1] > budget or found[0] > loss or not np.isfinite(found[0]):
            continue
        key = found if np.isfinite(budget) else found[::-1]
        if best is None or key < best:
            best = key
    return best


def tables(units, formats):
    """Return losses and sizes, the latter integers, in any order."""
    shape = (units, formats)
    return st.tuples(
        hnp.arrays(np.float64, shape, elements=NUMBERS),
        hnp.arrays(np.int64, shape, elements=st.integers(0, 9)),
    )


def convex(generator, units, formats):
    """Return losses that fall by less and less."""
    steps = np.sort(generator.exponential(size=(units, formats - 1)), axis=1)[:, ::-1]
    return np.cumsum(np.concatenate([np.full((units, 1), 100.0), -steps], 1), 1)


@given(tables(4, 3), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_best_choice_within_a_size(table, share):
    losses, sizes = table
    least, most = sizes.min(1).sum(), sizes.max(1).sum()
    budget = float(least + share * (most - least))
    found = cq.allocate_bits(losses, sizes, budget)
    rows = np.arange(4)
    assert found.size == sizes[rows, found.choices].sum() <= budget
    assert found.loss == pytest.approx(losses[rows, found.choices].sum())
    assert found.loss == pytest.approx(enumerated(losses, sizes, budget=budget)[0])
    assert found.gap == 0


@given(tables(4, 3), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_least_size_within_a_loss(table, share):
    losses, sizes = table
    least, most = losses.min(1).sum(), losses.max(1).sum()
    limit = float(least + share * (most - least)) + 1e-6
    found = cq.allocate_bits(losses, sizes, loss=limit)
    assert found.loss <= limit
    assert found.size == enumerated(losses, sizes, loss=limit)[0]
    assert found.gap == 0


@given(
    hnp.arrays(np.float64, (4, 3), elements=NUMBERS),
    hnp.arrays(np.float64, (4, 3), elements=st.floats(0.5, 9.5)),
    st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_gap_holds_for_any_sizes(losses, sizes, share):
    least, most = sizes.min(1).sum(), sizes.max(1).sum()
    budget = float(least + share * (most - least)) + 1e-9
    found = cq.allocate_bits(losses, sizes, budget)
    best = enumerated(losses, sizes, budget=budget)[0]
    assert found.size <= budget
    assert best <= found.loss + 1e-9
    assert found.loss - found.gap <= best + 1e-9


@pytest.mark.parametrize("budget", [40, 61, 95])
def test_convex_losses_are_solved_by_steps_alone(rng, monkeypatch, budget):
    def fail(*arguments, **options):
        raise AssertionError("the steps must be the optimum")

    losses, sizes = convex(rng, 20, 5), np.arange(2, 7)
    monkeypatch.setattr(allocation, "_by_programming", fail)
    found = cq.allocate_bits(losses, sizes, budget)
    assert found.size == budget
    assert found.gap == 0
    # One bit at a time, to whom it helps most.
    bits = np.zeros(20, int)
    for _ in range(budget - 40):
        gains = [losses[i, b] - losses[i, b + 1] if b < 4 else -1 for i, b in enumerate(bits)]
        bits[int(np.argmax(gains))] += 1
    assert np.array_equal(found.choices, bits)


def test_exchanges_reach_the_optimum_closely(rng, monkeypatch):
    losses = rng.exponential(size=(40, 6)) * np.exp(rng.normal(size=(40, 1)))
    losses = np.sort(losses, axis=1)[:, ::-1]
    sizes = np.arange(2, 8) * rng.integers(10, 1000, size=(40, 1))
    exact = cq.allocate_bits(losses, sizes, 4 * sizes[:, 0].sum() // 2)
    monkeypatch.setattr(allocation, "_by_programming", lambda *arguments, **options: None)
    found = cq.allocate_bits(losses, sizes, 4 * sizes[:, 0].sum() // 2)
    assert exact.gap == 0
    assert exact.loss <= found.loss <= exact.loss + found.gap
    assert found.gap < 0.01 * found.loss
    relaxed = allocation._follow_hulls(losses, sizes.astype(float), 2.0 * sizes[:, 0].sum())[0]
    assert found.loss < losses[np.arange(40), relaxed].sum()


def test_formats_that_a_unit_lacks(rng):
    losses = np.array([[np.inf, 3.0, 1.0], [5.0, np.inf, np.inf]])
    found = cq.allocate_bits(losses, [1, 2, 4], 3)
    assert found.choices.tolist() == [1, 0]
    assert found.loss == 8
    with pytest.raises(cq.BudgetError, match="budget must be at least 3, .*more than 5 gains"):
        cq.allocate_bits(losses, [1, 2, 4], 2.5)
    with pytest.raises(cq.BudgetError, match="loss must be at least 6, .*more than 8 saves"):
        cq.allocate_bits(losses, [1, 2, 4], loss=5.9)


def test_more_room_never_costs_loss(rng):
    losses, sizes = np.sort(rng.normal(size=(9, 4)) ** 2, axis=1)[:, ::-1], np.array([2, 3, 4, 8])
    found = [cq.allocate_bits(losses, sizes, budget).loss for budget in range(18, 76)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(losses[:, -1].sum())


@pytest.mark.parametrize(
    ("losses", "sizes", "options", "error", "text"),
    [
        ([1.0, 2.0], [1, 2], {"budget": 3}, cq.ShapeError, r"losses must be \(units, formats\)"),
        (
            [[1.0, 2.0]],
            [1, 2, 3],
            {"budget": 3},
            cq.ShapeError,
            r"sizes must have shape \(1, 2\) or \(2,",
        ),
        ([[1.0, np.nan]], [1, 2], {"budget": 3}, cq.NonFiniteError, "losses must be finite"),
        ([[1.0, 2.0]], [1, np.inf], {"budget": 3}, cq.NonFiniteError, "sizes must be finite"),
        ([[1.0, 2.0]], [-1, 2], {"budget": 3}, ValueError, "sizes must not be negative, got -1"),
        ([[np.inf, np.inf]], [1, 2], {"budget": 3}, ValueError, "a finite loss, got none for 0"),
        ([[1.0, 2.0]], [1, 2], {}, ValueError, "one of budget and loss must be given, got none"),
        ([[1.0, 2.0]], [1, 2], {"budget": 1, "loss": 1}, ValueError, "be given, got both"),
        ([[1.0, 2.0]], [1, 2], {"budget": "3"}, TypeError, "budget must be a number"),
        ([[1.0, 2.0]], [1, 2], {"budget": np.nan}, cq.BudgetError, "at least 1, "),
    ],
)
def test_refusals(losses, sizes, options, error, text):
    with pytest.raises(error, match=text):
        cq.allocate_bits(losses, sizes, **options)
