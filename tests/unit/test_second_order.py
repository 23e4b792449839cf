from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from tests.conftest import heavy_tailed


def objective(C, p, b):
    blocks = p.reshape(-1, b)
    return sum(float(C[np.ix_(block, block)].sum()) for block in blocks)


def grams(rng, d, tokens=400):
    """Energies with groups of channels that are large in the same tokens."""
    x = heavy_tailed(rng, tokens, d)
    loud = rng.random((tokens, 4)) < 0.3
    x *= np.repeat(np.where(loud, 5.0, 1.0), d // 4, axis=1)
    return cq.ActivationStats(d, energy_gram=True).update(x), x


def literal_greedy(C, b):
    """Follow the definition with plain sums."""
    d = len(C)
    blocks = [[] for _ in range(d // b)]
    for c in np.argsort(-C.sum(1), kind="stable"):
        costs = [C[c, block].sum() if len(block) < b else np.inf for block in blocks]
        blocks[int(np.argmin(costs))].append(int(c))
    return {frozenset(block) for block in blocks}


@pytest.mark.parametrize(("d", "b"), [(32, 4), (48, 12), (64, 16)])
def test_greedy_equals_its_definition(rng, d, b):
    # Small integers: sums are exact, so that ties fall alike.
    e = rng.integers(0, 4, (50, d)).astype(np.float64)
    C = e.T @ e
    C *= 2.0 ** -np.ceil(np.log2(C.max()))
    C /= C.max()
    p = cq.energydiff(C.astype(np.float32), b, refine=0)
    assert {frozenset(x) for x in p.reshape(-1, b).tolist()} == literal_greedy(
        C.astype(np.float32), b
    )


def test_better_than_first_order_and_refining_helps(rng):
    stats, _ = grams(rng, 128)
    C = stats.energy_gram.astype(np.float64)
    greedy, refined = (cq.energydiff(stats.energy_gram, 8, refine=n) for n in (0, 8))
    first = cq.massdiff(stats.mean_abs, 8)
    assert objective(C, refined, 8) <= objective(C, greedy, 8)
    assert objective(C, greedy, 8) < objective(C, first, 8)


def test_no_exchange_is_left_that_helps(rng):
    stats, _ = grams(rng, 32)
    C = stats.energy_gram.astype(np.float64)
    p = cq.energydiff(stats.energy_gram, 4, refine=50)
    best = objective(C, p, 4)
    for i in range(32):
        for k in range(i):
            q = p.copy()
            q[[i, k]] = q[[k, i]]
            assert objective(C, q, 4) > best * (1 - 1e-5)


def test_energy_statistic_against_the_formula(rng):
    x = heavy_tailed(rng, 50, 24)
    x[7] = 0
    e = np.square(x) * 24 / np.where((x == 0).all(1), 1, np.square(x).sum(1))[:, None]
    stats = cq.ActivationStats(24, energy_gram=True, dtype=np.float64).update(x)
    np.testing.assert_allclose(stats.energy_gram, e.T @ e / 50, rtol=1e-10)
    np.testing.assert_allclose(stats.mean_energy, e.mean(0), rtol=1e-10)


def test_halves_merge_to_the_whole(rng):
    x = heavy_tailed(rng, 301, 24).astype(np.float32)
    whole = cq.ActivationStats(24, energy_gram=True).update(x)
    halves = [cq.ActivationStats(24, energy_gram=True).update(h) for h in (x[:150], x[150:])]
    merged = halves[0].merge(halves[1])
    difference = np.abs(merged.energy_gram - whole.energy_gram).max()
    assert difference <= 1e-6 * whole.energy_gram.max()


def test_reservoir_is_a_uniform_sample_that_merges():
    x = np.arange(1000, dtype=np.float32)[:, None] + 1
    hits = np.zeros(1001)
    for seed in range(300):
        stats = [cq.ActivationStats(1, reservoir=20, seed=2 * seed + i) for i in (0, 1)]
        for part in np.split(x[:700], 7):
            stats[0].update(part)
        stats[1].update(x[700:])
        merged = stats[0].merge(stats[1])
        assert merged.tokens.shape == (20, 1)
        values = merged.tokens[:, 0].astype(int)
        assert len(set(values)) == 20
        hits[values] += 1
    # 300 draws of 20 of 1000: six each on average; the thirds of the stream are met alike.
    for part in (hits[1:334], hits[334:667], hits[667:]):
        assert part.mean() == pytest.approx(6, abs=0.45)


def test_reservoir_smaller_than_its_room(rng):
    stats = cq.ActivationStats(4, reservoir=50).update(rng.normal(size=(3, 4)))
    assert stats.tokens.shape == (3, 4)


@pytest.mark.parametrize(
    ("gram", "b", "error", "words"),
    [
        (np.ones((4, 4)), 3, cq.BlockSizeError, "divide d=4"),
        (np.ones((4, 3)), 2, cq.ShapeError, r"\(d, d\)"),
        (np.ones(4), 2, cq.ShapeError, r"\(d, d\)"),
        (np.full((4, 4), np.nan), 2, cq.NonFiniteError, "energy_gram"),
        (-np.ones((4, 4)), 2, ValueError, "must not be negative"),
        (np.triu(np.ones((4, 4))), 2, ValueError, "symmetric"),
        (np.ones((4, 4), int), 2, TypeError, "floating"),
        ([[1.0]], 1, TypeError, "ndarray"),
    ],
)
def test_bad_input(gram, b, error, words):
    with pytest.raises(error, match=words):
        cq.energydiff(gram, b)


def test_degenerate_sizes():
    np.testing.assert_array_equal(cq.energydiff(np.ones((3, 3)), 3), [0, 1, 2])
    assert sorted(cq.energydiff(np.zeros((4, 4)), 2)) == [0, 1, 2, 3]
    assert sorted(cq.energydiff(np.eye(4) * 1e30, 1)) == [0, 1, 2, 3]


def test_energy_gram_must_have_been_collected():
    with pytest.raises(ValueError, match="energy_gram=True"):
        _ = cq.ActivationStats(4).update(np.ones(4)).energy_gram


def test_a_stride_takes_every_so_many_th_token_however_they_are_batched(rng):
    x = heavy_tailed(rng, 103, 24)
    options = {"energy_gram": True, "energy_stride": 4, "dtype": np.float64}
    whole = cq.ActivationStats(24, **options).update(x)
    expected = cq.ActivationStats(24, energy_gram=True, dtype=np.float64).update(x[2::4])
    np.testing.assert_allclose(whole.energy_gram, expected.energy_gram, rtol=1e-12)
    np.testing.assert_allclose(whole.mean_energy.sum(), 24, rtol=1e-12)
    assert whole.count == 103
    pieces = cq.ActivationStats(24, **options)
    for part in np.split(x, [1, 2, 9, 10, 50]):
        pieces.update(part)
    np.testing.assert_allclose(pieces.energy_gram, whole.energy_gram, rtol=1e-12)
    np.testing.assert_allclose(pieces.mean_abs, np.abs(x).mean(0), rtol=1e-12)
    merged = pieces.merge(cq.ActivationStats(24, **options).update(x[:8]))
    assert merged.count == 111
    with pytest.raises(cq.CalibrationError, match="more than 2 tokens with energy_stride=4"):
        _ = cq.ActivationStats(24, **options).update(x[:2]).energy_gram
    with pytest.raises(ValueError, match="energy_stride must be at least 1"):
        cq.ActivationStats(24, energy_stride=0)
