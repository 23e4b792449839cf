from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from tests.conftest import heavy_tailed


def test_concentration_lies_between_spike_and_flat(rng):
    spike = np.zeros(16)
    spike[5] = -3
    assert cq.mass_concentration(spike) == 1 / 16
    assert cq.mass_concentration(np.array([1.0, -1, 1, 1])) == 1
    assert cq.mass_concentration(np.zeros(4)) == 1
    delta = cq.mass_concentration(heavy_tailed(rng, 50, 64))
    assert ((delta >= 1 / 64) & (delta <= 1)).all()
    assert cq.mass_concentration(heavy_tailed(rng, 5, 64), 16).shape == (5, 4)


def test_block_mass_is_the_l1_norm(rng):
    x = rng.normal(size=(3, 12))
    np.testing.assert_allclose(cq.block_mass(x, 4), np.abs(x).reshape(3, 3, 4).sum(-1))


@pytest.mark.parametrize("b", [4, 16, None])
def test_bounds_hold(rng, b):
    x = heavy_tailed(rng, 500, 64)
    lower, upper = cq.outlier_bounds(x, b)
    truth = np.abs(cq.block_hadamard(x, b)).max(-1)
    assert (lower <= truth * (1 + 1e-12)).all()
    assert (truth <= upper * (1 + 1e-12)).all()


def test_upper_bound_is_met_by_adversarial_signs(rng):
    magnitudes = np.abs(rng.normal(size=16))
    x = magnitudes * cq.hadamard_matrix(16)[:, 3]
    _, upper = cq.outlier_bounds(x, 16)
    assert np.abs(cq.block_hadamard(x, 16)).max() == pytest.approx(float(upper), rel=1e-14)


@pytest.mark.parametrize("function", [cq.block_mass, cq.mass_concentration, cq.outlier_bounds])
def test_bad_input(function):
    with pytest.raises(cq.BlockSizeError):
        function(np.ones(10), 4)
    with pytest.raises(cq.NonFiniteError):
        function(np.array([1.0, np.nan]), 2)
    with pytest.raises(TypeError):
        function(np.ones(4, int), 2)
    with pytest.raises(TypeError):
        function([1.0], 1)
    with pytest.raises(cq.ShapeError):
        function(np.ones((2, 0)), 1)


@pytest.mark.parametrize("b", [8, 32, None])
def test_bounds_on_a_hundred_thousand_heavy_tails(rng, b):
    x = heavy_tailed(rng, 33_334, 64)
    lower, upper = cq.outlier_bounds(x, b)
    truth = np.abs(cq.block_hadamard(x, b)).max(-1)
    assert (lower <= truth * (1 + 1e-12)).all()
    assert (truth <= upper * (1 + 1e-12)).all()


@pytest.mark.parametrize("epsilon", [0.5, 0.05])
def test_probable_bounds_fail_no_more_often_than_stated(rng, epsilon):
    x = heavy_tailed(rng, 20_000, 64) * rng.choice([-1.0, 1.0], (20_000, 64))
    published, sharper = cq.probable_outlier_bounds(x, 16, epsilon)
    truth = np.abs(cq.block_hadamard(x, 16)).max(-1)
    assert (sharper <= published).all()
    # Three standard deviations of a binomial with that rate.
    allowed = epsilon + 3 * np.sqrt(epsilon * (1 - epsilon) / len(x))
    assert (truth > sharper).mean() <= allowed
    assert (truth > 0.5 * sharper).any()


def test_sharper_bound_forgets_the_block_size_when_energies_balance():
    x = np.ones(64)
    whole = cq.probable_outlier_bounds(x)[1]
    for b in (4, 16, 32):
        assert cq.probable_outlier_bounds(x, b)[1] == pytest.approx(float(whole))
    with pytest.raises(ValueError, match="epsilon"):
        cq.probable_outlier_bounds(x, 4, 1.5)


def test_load_balance():
    assert cq.load_balance(np.array([4.0, 1, 2, 3]), 2) == 1.0
    assert cq.load_balance(np.zeros(4), 2) == 1.0
    # One channel that outweighs a block's share: no assignment does better.
    assert cq.load_balance(np.array([9.0, 0, 1, 1]), 2) == 1.0
    with pytest.raises(ValueError, match="negative"):
        cq.load_balance(-np.ones(4), 2)


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e-161, 1e161, 1e300])
def test_norms_of_tiny_and_huge_vectors_are_those_of_the_vector_scaled(scale):
    x = np.array([[3.0, 4, 0, 0, 1, 0, 0, 0]])
    lower, upper = cq.outlier_bounds(x * scale, 4)
    np.testing.assert_allclose(
        [lower, upper], [[2.5 * scale], [3.5 * scale]], rtol=1e-15, atol=5e-324
    )
    published, sharper = cq.probable_outlier_bounds(x * scale, 4)
    expected = [bound * scale for bound in cq.probable_outlier_bounds(x, 4)]
    np.testing.assert_allclose([published, sharper], expected, rtol=1e-15, atol=5e-324)
