"""CLAQ: columns of outliers first, what is kept is kept, and bits that are those of the file."""

from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from corequant.errors import SpecError
from corequant.rounding.codebooks.claq import outlier_order


def moments(rng, d, tokens=400):
    X = rng.normal(size=(tokens, d)) @ rng.normal(size=(d, d)) / np.sqrt(d)
    return X.T @ X / tokens


def weights(rng, rows=200, d=40):
    return rng.standard_t(4, (rows, d))


def book_of(coded):
    return coded.weight.base if isinstance(coded.weight, cq.KeptOutliers) else coded.weight


def test_columns_of_outliers_come_first_and_ties_in_their_order(rng):
    W = rng.normal(size=(300, 12))
    W[:3, 7], W[:2, 2] = 40, -40
    assert outlier_order(W).tolist() == [7, 2, 0, 1, 3, 4, 5, 6, 8, 9, 10, 11]


@pytest.mark.parametrize(("bits", "width"), [(2, 2), (3, 3), (4, 4)])
def test_whole_averages_are_plain_codebooks(rng, bits, width):
    coded = cq.claq(weights(rng), moments(rng, 40), bits, published=True)
    assert coded.report.widths == {width: 40}
    assert (book_of(coded).widths == width).all()


@pytest.mark.parametrize(("bits", "few", "share"), [(2.1, 2, 0.05), (2.5, 2, 0.25), (3.5, 3, 0.5)])
def test_the_average_of_published_widths(rng, bits, few, share):
    W = weights(rng)
    W[:2, 11] = 100
    coded = cq.claq(W, moments(rng, 40), bits, published=True)
    assert coded.report.widths == {few: 40 - round(40 * share), 4: round(40 * share)}
    assert book_of(coded).widths[11] == 4


def test_a_diagonal_hessian_leaves_columns_as_they_are(rng):
    W = weights(rng)
    coded = cq.claq(W, np.diag(rng.gamma(1, size=40)), 2, published=True)
    alone = cq.Codebook.fit(W, 2, axis="column")
    np.testing.assert_allclose(coded.dequantize(), alone.dequantize(), rtol=2e-3)


def test_nothing_kept_is_the_same_as_without_outliers(rng):
    W, H = weights(rng), moments(rng, 40)
    one, other = cq.claq(W, H, 2.5), cq.claq(W, H, 2.5, outliers=0)
    assert isinstance(one.weight, cq.Codebook)
    np.testing.assert_array_equal(one.dequantize(), other.dequantize())
    everything = cq.claq(W, H, 20, outliers=1)
    np.testing.assert_allclose(everything.dequantize(), W, rtol=1e-3, atol=1e-2)


def test_what_published_columns_keep(rng):
    W = weights(rng, 1000, 300)
    W[0, 150], W[0, 3] = 200, 150
    H = np.diag(rng.gamma(1, size=300))
    coded = cq.claq(W, H, 2, outliers=True, published=True, act_order=False)
    kept = coded.weight.outliers.mask.sum(0)
    assert set(kept.tolist()) == {8, 28}
    # Column 3 keeps more; so do those at its place in later blocks, where 150 should.
    assert kept[3] == kept[131] == kept[259] == 28
    assert kept[150] == kept[22]
    assert coded.report.outliers == kept.sum()


def test_kept_weights_cost_nothing_and_levels_are_fitted_to_the_rest(rng):
    W = weights(rng, 400)
    with_them = cq.claq(W, np.eye(40), 2.6, outliers=0.01)
    assert with_them.report.outliers == 160
    mask = with_them.weight.outliers.mask
    assert np.abs(W[mask]).min() > np.quantile(np.abs(W), 0.9)
    # A level is the mean of what isn't kept.
    book = book_of(with_them)
    assert np.abs(book.levels).max() <= np.abs(W[~mask]).max() * 1.001
    assert np.abs(W[~mask]).max() < np.abs(W).max() / 2


@pytest.mark.parametrize("outliers", [0.0, 0.004])
@pytest.mark.parametrize("bits", [2.12, 2.5, 3.3])
def test_the_budget_is_met_with_all_that_is_stored(rng, bits, outliers):
    W, H = weights(rng, 1000), moments(rng, 40)
    coded = cq.claq(W, H, bits, outliers=outliers)
    tensors = coded.weight.to_tensors()
    assert sum(t.nbytes for t in tensors.values()) == coded.nbytes
    assert bits - 0.06 < coded.bits_per_weight <= bits
    assert coded.bits_per_weight == coded.report.bits_per_weight
    again = cq.load_coded(tensors, coded.weight.describe())
    np.testing.assert_array_equal(again.dequantize(), coded.dequantize())


@pytest.mark.parametrize("outliers", [None, True])
def test_published_results_restore_themselves(rng, outliers):
    W, H = weights(rng).astype(np.float32), moments(rng, 40).astype(np.float32)
    coded = cq.claq(W, H, 2.1, outliers=outliers, published=True)
    again = cq.load_coded(coded.weight.to_tensors(), coded.weight.describe())
    np.testing.assert_array_equal(again.dequantize(), coded.dequantize())
    loss = cq.reconstruction_loss(W, coded.dequantize(), H)
    assert coded.report.loss == pytest.approx(loss, rel=1e-6)


def test_ours_lose_less_at_the_same_bytes(rng):
    W, H = weights(rng, 1000), moments(rng, 40) * np.outer(*[rng.lognormal(0, 0.5, 40)] * 2)
    H = (H + H.T) / 2 + np.diag(np.diagonal(H))
    published = cq.claq(W, H, 2.1, outliers=True, published=True)
    ours = cq.claq(W, H, published.bits_per_weight, outliers=0.002)
    assert ours.report.loss < published.report.loss


def test_cross_moments_correct(rng):
    W, X = weights(rng), rng.normal(size=(400, 40)) @ rng.normal(size=(40, 40))
    seen = np.round(X / 3) * 3
    H, G = seen.T @ seen / 400, X.T @ seen / 400
    plain, corrected = cq.claq(W, H, 3), cq.claq(W, H, 3, G=G)
    losses = [cq.reconstruction_loss(W, c.dequantize(), H, G) for c in (plain, corrected)]
    assert losses[1] < losses[0]


def test_degenerate_columns(rng):
    W, H = weights(rng), moments(rng, 40)
    W[:, 3], W[:, 4] = 0.5, 0.0
    H[:, 5] = H[5] = 0
    coded = cq.claq(W, H, 3, outliers=0.001)
    assert coded.report.dead_columns == (5,)
    assert np.isfinite(coded.dequantize()).all()


def test_bad_input_is_refused(rng):
    W, H = weights(rng), moments(rng, 40)
    with pytest.raises(SpecError, match="bits must be 2 to 4 as published, got 1.5"):
        cq.claq(W, H, 1.5, published=True)
    with pytest.raises(TypeError, match="outliers must be true or false as published, got 0.1"):
        cq.claq(W, H, 2.1, outliers=0.1, published=True)
    with pytest.raises(ValueError, match="outliers must be a share from 0 to 1, got 2"):
        cq.claq(W, H, 2.1, outliers=2)
    with pytest.raises(SpecError, match=r"bits must be at least 1\.\d+ for q with widths .* got 1"):
        cq.claq(W, H, 1, name="q")
    with pytest.raises(SpecError, match="widths must name at least one"):
        cq.claq(W, H, widths=())
