"""The bounds on real activations: every token of several layers, permuted or not."""

from __future__ import annotations

import numpy as np
import pytest

import corequant as cq


@pytest.mark.real_model
@pytest.mark.parametrize("b", [16, 128, None])
def test_bounds_hold_for_every_real_token(down_inputs, b):
    for x in down_inputs.values():
        orders = [np.arange(x.shape[1])]
        if b is not None:
            orders.append(cq.massdiff(np.abs(x).mean(0, dtype=np.float64), b))
        for p in orders:
            tokens = x[:, p].astype(np.float64)
            lower, upper = cq.outlier_bounds(tokens, b)
            truth = np.abs(cq.block_hadamard(tokens, b)).max(-1)
            assert (lower <= truth * (1 + 1e-12)).all()
            assert (truth <= upper * (1 + 1e-12)).all()


@pytest.mark.real_model
def test_probable_bounds_hold_for_real_magnitudes_with_random_signs(down_inputs, rng):
    for x in down_inputs.values():
        signed = x.astype(np.float64) * rng.choice([-1.0, 1.0], x.shape)
        published, sharper = cq.probable_outlier_bounds(signed, 16, 0.05)
        truth = np.abs(cq.block_hadamard(signed, 16)).max(-1)
        allowed = 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(x))
        assert (truth > sharper).mean() <= allowed
        assert (truth > published).mean() <= allowed


@pytest.mark.real_model
def test_the_upper_bound_is_met_exactly_by_adversarial_signs_of_real_magnitudes(down_inputs):
    column = cq.hadamard_matrix(16)[:, 5].astype(np.float64)
    for x in down_inputs.values():
        hostile = np.abs(x.astype(np.float64)) * np.tile(column, x.shape[1] // 16)
        _, upper = cq.outlier_bounds(hostile, 16)
        truth = np.abs(cq.block_hadamard(hostile, 16)).max(-1)
        np.testing.assert_allclose(truth, upper, rtol=1e-13)
