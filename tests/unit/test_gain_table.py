"""The table of what nearest codes gain: exact at its edges, and nowhere too small."""

from __future__ import annotations

import numpy as np
import pytest

from corequant._cpu.loops import gain_table


def drawn(n, seed):
    generator = np.random.default_rng(seed)
    draws = (
        generator.standard_normal(n),
        generator.standard_cauchy(n),
        np.sign(generator.standard_normal(n)),
        generator.uniform(-1, 0.25, n),
    )
    for x in draws:
        yield (x / np.abs(x).max()).astype(np.float32)


def tabulated(x, longer):
    bins, edges = gain_table.room_for(len(x))
    words = np.zeros(len(x), np.uint32)
    # Bins are left empty for the next group.
    for _ in range(2):
        gain_table.tabulate(x, np.float32(longer), words, bins, edges)
        assert not bins.any()
    return edges


@pytest.mark.parametrize("n", [2048, 2 * gain_table.PIECE + 5])
@pytest.mark.parametrize("longer", [-1, 0, 1])
def test_edges_are_exact(n, longer):
    for x in drawn(n, 0):
        edges = tabulated(x, longer)
        places = np.arange(gain_table.BINS + 2) / gain_table.BINS
        # What float32 cuts off at 1, and the integers of 30 bits below.
        allowed = n * 2.0**-24 * np.mean(np.abs(x)) + n * 2.0**-30
        for side, chosen in ((0, x), (1, x[np.sign(x) == longer])):
            if side and not longer:
                continue
            magnitudes = np.sort(np.abs(chosen.astype(np.float64)))
            sums = np.concatenate([np.cumsum(magnitudes[::-1])[::-1], [0]])
            first = np.searchsorted(magnitudes, places)
            expected = sums[first] - places * (len(magnitudes) - first)
            np.testing.assert_allclose(edges[side], expected, rtol=0, atol=allowed)


@pytest.mark.parametrize(("least", "most"), [(-8, 7), (-7, 7), (-2, 1), (-128, 127), (0, 15)])
def test_no_gain_is_too_small(least, most):
    longer = (most > -least) - (most < -least)
    for x in drawn(4096, 1):
        edges = tabulated(x, longer)
        w = x.astype(np.float64)
        total = np.square(w).sum()
        slack = 5e-7 * total + gain_table.CUT * np.abs(w).sum()
        for scale in np.geomspace(0.2, 1.5, 40) / max(most, -least):
            codes = np.clip(np.rint(w / scale), least, most)
            true = 2 * scale * (codes @ w) - scale**2 * np.square(codes).sum()
            product, square = gain_table.look_up(edges, scale, min(-least, most), max(-least, most))
            gain = 2 * scale * product - scale**2 * square
            assert gain >= true - slack
            assert gain <= true + 0.02 * total


def test_short_groups_have_none():
    assert gain_table.room_for(gain_table.LEAST - 1) == (None, None)
