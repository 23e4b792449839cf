from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from corequant.selection import rotation_error, select_permutation, select_scales
from tests.conftest import heavy_tailed

A, W4 = "int4:token:asymmetric", "int4:channel:symmetric:mse"


@pytest.fixture
def activations(rng):
    x = heavy_tailed(rng, 600, 64).astype(np.float32)
    return x[:400], x[400:]


def test_rotation_error_is_its_definition(activations):
    x = activations[1]
    p, factors = cq.random_permutation(64, 0), cq.random_signs(64, 1)
    z = cq.block_hadamard(x[:, p] * factors, 8)
    q = cq.dequantize(cq.quantize(z, A))
    expected = (np.square(q - z).sum(1) / np.square(z).sum(1)).mean()
    found = rotation_error(x, 8, A, permutation=p, factors=factors)
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert rotation_error(np.zeros((3, 8), np.float32), 4, A) == 0


def test_the_chosen_permutation_is_the_best_on_tokens_held_out(activations):
    seen, held_out = activations
    stats = cq.ActivationStats(64, energy_gram=True, reservoir=200).update(seen)
    chosen = select_permutation(stats, held_out, 8, A, seed=1)
    assert {"identity", "massdiff", "zigzag", "energydiff", "rangediff"} <= set(chosen.errors)
    again = rotation_error(held_out, 8, A, permutation=chosen.permutation)
    assert chosen.errors[chosen.method] == again == min(chosen.errors.values())
    same = select_permutation(stats, held_out, 8, A, seed=1)
    np.testing.assert_array_equal(chosen.permutation, same.permutation)


def test_factors_lower_the_output_error_and_merge(activations, rng):
    seen, judge = activations
    W = rng.normal(size=(24, 64))
    factors, errors = select_scales(seen, judge, W, 8, A, W4)
    assert min(errors.values()) < errors["none"]
    assert (factors != 0).all()
    y = (judge * factors) @ cq.merge_factors(W, factors, side="input").T
    np.testing.assert_allclose(y, judge @ W.T, rtol=1e-9, atol=1e-9)
    only_signs, errors = select_scales(seen, judge, W, 8, A, W4, exponents=())
    assert set(errors) == {"none", "signs"}
    assert set(np.abs(only_signs)) == {1.0}


def test_bad_input(activations, rng):
    seen, judge = activations
    stats = cq.ActivationStats(64, energy_gram=True, reservoir=10).update(seen)
    with pytest.raises(cq.CalibrationError, match="held_out"):
        select_permutation(stats, judge[:0], 8, A)
    bare = cq.ActivationStats(64, energy_gram=True).update(seen)
    with pytest.raises(cq.CalibrationError, match="statistics.tokens"):
        select_permutation(bare, judge, 8, A)
    with pytest.raises(cq.NonFiniteError):
        select_scales(seen, judge, np.full((2, 64), np.nan), 8, A, W4)
    with pytest.raises(cq.CalibrationError, match="judge"):
        select_scales(seen, judge[:0], np.ones((2, 64)), 8, A, W4)
