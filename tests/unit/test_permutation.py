from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from tests.conftest import heavy_tailed

METHODS = [cq.massdiff, cq.zigzag, cq.absmax]


def test_massdiff_on_the_worked_example():
    m = np.array([9.0, 8, 7, 6, 5, 4, 3, 2])
    blocks = m[cq.massdiff(m, 4)].reshape(2, 4)
    assert {frozenset(b) for b in blocks.tolist()} == {
        frozenset({9.0, 6.0, 5.0, 2.0}),
        frozenset({8.0, 7.0, 4.0, 3.0}),
    }
    assert blocks.sum(1).tolist() == [22, 22]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("d", "b"), [(1, 1), (8, 8), (8, 1), (1536, 16), (60, 12)])
def test_result_is_a_permutation_and_deterministic(rng, method, d, b):
    score = np.abs(heavy_tailed(rng, 3, d)).mean(0)
    p = method(score, b)
    assert p.dtype == np.int64
    assert sorted(p.tolist()) == list(range(d))
    np.testing.assert_array_equal(p, method(score.copy(), b))


def test_massdiff_ignores_scale_and_follows_relabelling(rng):
    m = np.abs(heavy_tailed(rng, 64, 96)).mean(0)
    p = cq.massdiff(m, 12)
    np.testing.assert_array_equal(p, cq.massdiff(m * 8, 12))
    relabel = cq.random_permutation(96, 5)
    q = cq.massdiff(m[relabel], 12)
    np.testing.assert_array_equal(relabel[q], p)


def test_massdiff_balances_better_than_the_baselines(rng):
    m = np.abs(heavy_tailed(rng, 64, 1536)).mean(0)

    def largest(p):
        return cq.block_mass(m[p], 16).max()

    bound = max(m.sum() / 96, np.sort(m)[-1] + np.sort(m)[:15].sum())
    found = largest(cq.massdiff(m, 16))
    assert bound <= found * (1 + 1e-12)
    assert found <= largest(cq.zigzag(m, 16))
    assert found <= largest(cq.random_permutation(1536, 0))
    assert largest(cq.absmax(m, 16)) >= largest(cq.random_permutation(1536, 0))


def test_ties_go_to_the_lower_block():
    np.testing.assert_array_equal(cq.massdiff(np.ones(6), 3), [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(cq.massdiff(np.zeros(4), 2), [0, 2, 1, 3])


def test_absmax_gathers_and_zigzag_deals():
    score = np.array([1.0, 4, 2, 3])
    np.testing.assert_array_equal(cq.absmax(score, 2), [1, 3, 2, 0])
    np.testing.assert_array_equal(cq.zigzag(score, 2), [1, 0, 3, 2])


def test_random_permutation_needs_no_global_state():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    a = cq.random_permutation(100, 7)
    np.testing.assert_array_equal(a, cq.random_permutation(100, np.random.default_rng(7)))
    assert (a != cq.random_permutation(100, 8)).any()
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_inverse(rng):
    p = cq.random_permutation(33, 1)
    x = rng.normal(size=(2, 33))
    np.testing.assert_array_equal(x[:, p][:, cq.invert_permutation(p)], x)
    np.testing.assert_array_equal(cq.identity_permutation(3), [0, 1, 2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("score", "b", "error", "words"),
    [
        (np.ones(10), 4, cq.BlockSizeError, "block_size must divide d=10, got 4; these do: 2, 5"),
        (np.ones(10), 0, ValueError, "at least 1"),
        (np.ones((2, 5)), 5, cq.ShapeError, "must be a vector"),
        (np.array([]), 1, cq.ShapeError, "must be a vector"),
        (np.array([1.0, np.nan]), 1, cq.NonFiniteError, r"index \(1,\)"),
        (np.array([1.0, np.inf]), 2, cq.NonFiniteError, "must be finite"),
        (np.array([1.0, -2.0]), 2, ValueError, "must not be negative, got -2.0 at index 1"),
        (np.array([1, 2]), 2, TypeError, "floating dtype"),
        ([1.0, 2.0], 2, TypeError, "numpy.ndarray"),
    ],
)
def test_bad_scores(method, score, b, error, words):
    with pytest.raises(error, match=words):
        method(score, b)


@pytest.mark.parametrize(
    ("p", "error", "words"),
    [
        (np.array([0, 0, 2]), cq.PermutationError, "got 0 2 times and 1 never"),
        (np.array([0, 3, 1]), cq.PermutationError, "got 3 at position 1"),
        (np.array([0, -1, 1]), cq.PermutationError, "got -1 at position 1"),
        (np.array([0.0, 1.0]), TypeError, "integer dtype"),
        (np.array([[0, 1]]), cq.ShapeError, "vector"),
        ([0, 1], TypeError, "numpy.ndarray"),
    ],
)
def test_bad_permutations(p, error, words):
    with pytest.raises(error, match=words):
        cq.invert_permutation(p)


def test_repeated_heads_move_alike(rng):
    p = np.concatenate([rng.permutation(8) + 8 * g for g in range(3)])
    x = rng.normal(size=(5, 3, 8))
    v = np.repeat(x, 2, axis=1).reshape(5, -1)
    moved = np.repeat(x.reshape(5, -1)[:, p].reshape(5, 3, 8), 2, axis=1).reshape(5, -1)
    np.testing.assert_array_equal(v[:, cq.repeat_permutation(p, 3, 2)], moved)
    np.testing.assert_array_equal(cq.repeat_permutation(p, 3, 1), p)


@pytest.mark.parametrize(
    ("p", "heads", "repeat", "error", "words"),
    [
        (np.array([0, 2, 1, 3]), 2, 1, ValueError, "inside their head of 2, got channel 2 in head"),
        (np.arange(4), 3, 1, cq.BlockSizeError, "heads must divide d=4, got 3"),
        (np.arange(4), 2, 0, ValueError, "repeat must be at least 1"),
        (np.zeros(4, int), 2, 1, cq.PermutationError, "every index once"),
    ],
)
def test_bad_repeats(p, heads, repeat, error, words):
    with pytest.raises(error, match=words):
        cq.repeat_permutation(p, heads, repeat)
