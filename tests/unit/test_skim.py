"""SKIM: widths by greedy choice against brute force, budgets met, losses that never rise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import corequant as cq
from corequant.errors import NonFiniteError, ShapeError, SpecError
from corequant.rounding.codebooks.allocation import hull_choice, nonconvex_rows, step_choice
from corequant.rounding.codebooks.quadratic import (
    best_column_scales,
    best_levels,
    best_shared,
    row_losses,
)


def moments(rng, d, tokens=400):
    X = rng.normal(size=(tokens, d)) @ rng.normal(size=(d, d)) / np.sqrt(d)
    return X.T @ X / tokens


def weights(rng, rows=24, d=48):
    return rng.standard_t(4, (rows, d)) * rng.lognormal(0, 0.7, (rows, 1))


def best_of_all(losses, costs, budget):
    """Return the least loss of any choice within the budget."""
    rows = np.arange(len(losses))
    choices = itertools.product(range(len(costs)), repeat=len(losses))
    payable = (list(c) for c in choices if costs[list(c)].sum() <= budget + 1e-9)
    return min(losses[rows, c].sum() for c in payable)


@pytest.mark.parametrize("budget", [5, 8, 11])
@pytest.mark.parametrize("choose", [step_choice, hull_choice])
def test_greedy_is_optimal_where_losses_are_convex(rng, budget, choose):
    costs = np.array([1.0, 2, 3, 4])
    for _ in range(5):
        falls = np.sort(rng.random((4, 3)), axis=1)[:, ::-1]
        losses = np.hstack([np.full((4, 1), 3.0), 3 - np.cumsum(falls, axis=1)])
        assert nonconvex_rows(losses, costs) == 0
        chosen = choose(losses, costs, budget)
        assert costs[chosen].sum() == budget
        found = losses[np.arange(4), chosen].sum()
        assert found == pytest.approx(best_of_all(losses, costs, budget))


def test_hulls_pass_over_a_step_that_saves_nothing():
    # One entry saves nothing with its second bit and everything with its third.
    losses = np.array([[4.0, 4.0, 0.0], [3.0, 2.0, 1.5]])
    costs = np.array([1.0, 2.0, 3.0])
    assert nonconvex_rows(losses, costs) == 1
    assert step_choice(losses, costs, 4).tolist() == [0, 2]
    assert hull_choice(losses, costs, 4).tolist() == [2, 0]


@pytest.mark.parametrize("choose", [step_choice, hull_choice])
def test_choices_stay_within_any_budget(rng, choose):
    losses, costs = rng.random((20, 4)), np.array([1.0, 2.5, 4.5, 9.0])
    for budget in (20, 21, 33.3, 100, 1000):
        assert costs[choose(losses, costs, budget)].sum() <= budget
    with pytest.raises(SpecError, match="budget must be 20 to 180 bits, got 19"):
        choose(losses, costs, 19)


def test_levels_solve_their_normal_equations(rng):
    W, H = weights(rng, 10, 32), moments(rng, 32)
    book = cq.Codebook.fit(W, rng.integers(0, 4, 10))
    fitted = best_levels(book, H, W @ H)
    before, after = (row_losses(W, b.dequantize(), H) for b in (book, fitted))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.999 * before.sum()
    for r in range(10):
        labels, size = book.labels[r], 1 << int(book.widths[r])
        A = np.eye(size)[labels]
        best = A @ np.linalg.lstsq(A.T @ H @ A, A.T @ H @ W[r], rcond=None)[0]
        # Float16 is all that comes between.
        np.testing.assert_allclose(fitted.dequantize()[r], best, rtol=1e-3, atol=1e-4)


def test_column_scales_are_where_the_gradient_vanishes(rng):
    W, H = weights(rng, 20, 12), moments(rng, 12)
    Q, targets = cq.Codebook.fit(W, 2).dequantize().astype(np.float64), W @ H
    u = best_column_scales(Q, H, targets, ridge=0.0)

    def loss(u):
        return row_losses(W, Q * u, H).sum()

    step = 1e-5 * np.eye(12)
    slopes = [(loss(u + s) - loss(u - s)) / 2e-5 for s in step]
    assert np.abs(slopes).max() < 1e-5 * loss(np.ones(12))
    assert loss(u) < loss(np.ones(12))


def test_shared_levels_and_scales_lower_the_loss(rng):
    W, H = weights(rng, 20, 32), moments(rng, 32)
    tables = {2: cq.lloyd_max("normal", 4), 3: cq.lloyd_max("normal", 8)}
    book = cq.SharedCodebook.of(W, tables, W.std(1), rng.permutation(np.repeat([2, 3], 10)))
    fitted = best_shared(book, H, W @ H)
    assert row_losses(W, fitted.dequantize(), H).sum() < row_losses(W, book.dequantize(), H).sum()
    # No level of a table can be moved for the better, but for float16.
    best = row_losses(W, fitted.dequantize(), H).sum()
    for width, table in fitted.tables.items():
        for k in range(len(table)):
            for step in (-0.01, 0.01):
                moved = fitted.unit_values()
                chosen = (fitted.labels == k) & (fitted.widths == width)[:, None]
                moved[chosen] += step
                Q = moved * fitted.scales[:, None]
                assert row_losses(W, Q, H).sum() > best * (1 - 1e-3)


def test_levels_follow_cross_moments(rng):
    W, H = weights(rng, 10, 32), moments(rng, 32)
    G = 0.8 * H
    book = cq.Codebook.fit(W, 2)
    fitted = best_levels(book, H, W @ G)
    one, other = (row_losses(W, b.dequantize(), H, G).sum() for b in (book, fitted))
    assert other < one


@pytest.mark.parametrize("bits", [2.5, 3.2])
def test_the_budget_is_met(rng, bits):
    W, H = weights(rng, 40, 192), moments(rng, 192)
    published = cq.skim(W, H, bits, published=True)
    widths = published.weight.base.widths if published.report.scaled else published.weight.widths
    assert bits - 1 / 40 <= widths.mean() <= bits
    for shared in (False, True):
        ours = cq.skim(W, H, bits, shared=shared)
        assert bits - 0.1 <= ours.bits_per_weight <= bits
        assert ours.nbytes == sum(t.nbytes for t in ours.weight.to_tensors().values())
        assert sum(ours.report.widths.values()) == 40
        same = cq.skim(W, H, published.bits_per_weight, shared=shared)
        assert same.report.loss < published.report.loss


@pytest.mark.parametrize("given", ["plain", "own", "cross", "scale", "uniform", "published"])
def test_the_loss_is_never_above_where_it_starts(rng, given):
    W, H = weights(rng), moments(rng, 48)
    options = {
        "plain": {},
        "own": {"shared": False},
        "cross": {"G": 0.9 * H},
        "scale": {"scale": True},
        "uniform": {"mixed": False},
        "published": {"published": True},
    }[given]
    found = cq.skim(W, H, 4.5, **options).report
    assert found.loss <= found.nearest_loss
    assert given != "uniform" or list(found.widths) == [3]


@pytest.mark.parametrize("shared", [False, True])
def test_each_addition_lowers_the_loss(rng, shared):
    W, H = weights(rng, 32, 96), moments(rng, 96)
    steps = [
        {"mixed": False, "feedback": False, "refits": 0},
        {"feedback": False, "refits": 0},
        {"refits": 0},
        {},
    ]
    losses = [cq.skim(W, H, 4.2, shared=shared, **given).report.loss for given in steps]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2


def test_the_result_restores_itself(rng):
    W, H = weights(rng).astype(np.float32), moments(rng, 48).astype(np.float32)
    for given in ({"published": True}, {"shared": False}, {"shared": True}, {"scale": True}):
        coded = cq.skim(W, H, 4.5, **given)
        again = cq.load_coded(coded.weight.to_tensors(), coded.weight.describe())
        np.testing.assert_array_equal(again.dequantize(), coded.dequantize())
        loss = cq.reconstruction_loss(W, coded.dequantize(), H)
        assert coded.report.loss == pytest.approx(loss, rel=1e-6)


def test_degenerate_weights_are_coded_exactly(rng):
    H = moments(rng, 48)
    for W in (np.zeros((8, 48)), np.full((8, 48), 0.5), rng.choice([-1.0, 1.0], (8, 48))):
        for shared in (False, True):
            np.testing.assert_allclose(cq.skim(W, H, 5, shared=shared).dequantize(), W, rtol=1e-3)
    # Columns that no input reaches.
    W, dead = weights(rng), H.copy()
    dead[:, 5] = dead[5] = 0
    found = cq.skim(W, dead, 4.5)
    assert found.report.dead_columns == (5,)
    assert np.isfinite(found.dequantize()).all()


def test_a_singular_hessian_is_damped(rng):
    X = rng.normal(size=(6, 48))
    found = cq.skim(weights(rng), X.T @ X / 6, 4.5, tokens=6)
    assert found.report.shrinkage > 0
    assert np.isfinite(found.dequantize()).all()


def test_bad_input_is_refused(rng):
    W, H = weights(rng), moments(rng, 48)
    with pytest.raises(SpecError, match=r"bits must be at least 2\.\d+ for k with widths .*got 2"):
        cq.skim(W, H, 2, widths=(2, 3), name="k")
    with pytest.raises(SpecError, match=r"bits must be 2 to 3 for W .* got 3.5"):
        cq.skim(W, H, 3.5, widths=(2, 3), published=True)
    with pytest.raises(ValueError, match="bits must be positive and finite, got nan"):
        cq.skim(W, H, float("nan"))
    with pytest.raises(SpecError, match="widths must name at least one"):
        cq.skim(W, H, widths=())
    with pytest.raises(ShapeError, match="sensitivity must have W's shape"):
        cq.skim(W, H, sensitivity=np.ones(48))
    with pytest.raises(ValueError, match="sensitivity must not be negative"):
        cq.skim(W, H, sensitivity=-np.ones(W.shape))
    with pytest.raises(NonFiniteError):
        cq.skim(np.where(W > 2, np.nan, W), H)
    with pytest.raises(ShapeError):
        cq.skim(W, H[:4, :4])
