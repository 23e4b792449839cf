from __future__ import annotations

import numpy as np
import pytest

import corequant as cq


def test_a_pair_of_layers_keeps_its_function(rng):
    x, first, second = (rng.normal(size=s) for s in ((7, 10), (24, 10), (5, 24)))
    bias = rng.normal(size=24)
    expected = (x @ first.T + bias) @ second.T
    p = cq.random_permutation(24, 0)
    signs = cq.random_signs(24, 1)

    def change(W, side):
        W = cq.merge_permutation(W, p, side=side)
        return cq.merge_rotation(W, 12, side=side, signs=signs)

    new = (x @ change(first, "output").T + change(bias, "output")) @ change(second, "input").T
    np.testing.assert_allclose(new, expected, atol=1e-12)


def test_output_side_is_what_the_activation_becomes(rng):
    x, W = rng.normal(size=(3, 6)), rng.normal(size=(8, 6))
    p = cq.random_permutation(8, 2)
    y = x @ W.T
    np.testing.assert_array_equal(x @ cq.merge_permutation(W, p, side="output").T, y[:, p])
    np.testing.assert_allclose(
        x @ cq.merge_rotation(W, 4, side="output").T, cq.block_hadamard(y, 4), atol=1e-14
    )


def test_fold_norm(rng):
    x, W, gain = rng.normal(size=(3, 6)), rng.normal(size=(8, 6)), rng.normal(size=6)
    np.testing.assert_allclose(x @ cq.fold_norm(W, gain).T, (x * gain) @ W.T, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_results_are_contiguous_copies_in_the_same_dtype(rng, dtype):
    W = rng.normal(size=(8, 16)).astype(dtype)
    before = W.copy()
    results = [
        cq.merge_permutation(W, cq.random_permutation(16, 0), side="input"),
        cq.merge_rotation(W, 8, side="input"),
        cq.merge_rotation(W, 8, side="output"),
        cq.fold_norm(W, np.ones(16, dtype)),
    ]
    for result in results:
        assert result.flags.c_contiguous
        assert result.dtype == dtype
        assert not np.shares_memory(result, W)
    np.testing.assert_array_equal(W, before)


def test_merging_rounds_once(rng):
    W = rng.normal(size=(8, 64)).astype(np.float32)
    exact = cq.merge_rotation(W.astype(np.float64), 64, side="input")
    np.testing.assert_array_equal(cq.merge_rotation(W, 64, side="input"), exact.astype(np.float32))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda W: cq.merge_permutation(W, np.arange(3), side="input"), cq.PermutationError, "d=4"),
        (lambda W: cq.merge_permutation(W, np.arange(4), side="in"), ValueError, "side"),
        (lambda W: cq.merge_permutation(W[0], np.arange(4), side="input"), cq.ShapeError, "side"),
        (lambda W: cq.merge_rotation(W, 3, side="input"), cq.BlockSizeError, "d=4"),
        (lambda W: cq.merge_rotation(W * np.nan, side="input"), cq.NonFiniteError, "W must be"),
        (lambda W: cq.merge_rotation(W.astype(int), side="input"), TypeError, "floating"),
        (lambda W: cq.merge_rotation([[1.0]], side="input"), TypeError, "ndarray"),
        (lambda W: cq.fold_norm(W, np.ones(3)), cq.ShapeError, r"shape \(4,\)"),
        (lambda W: cq.fold_norm(W, np.full(4, np.inf)), cq.NonFiniteError, "gain must be"),
        (lambda W: cq.fold_norm(W[0], np.ones(4)), cq.ShapeError, "2 axes"),
        (lambda W: cq.fold_norm_bias(W, None, np.ones(3)), cq.ShapeError, r"shape \(4,\)"),
        (lambda W: cq.fold_norm_bias(W, np.ones(4), np.ones(4)), cq.ShapeError, r"shape \(2,\)"),
        (lambda W: cq.fold_norm_bias(W, None, np.full(4, np.nan)), cq.NonFiniteError, "shift must"),
        (lambda W: cq.merge_centering(W, side="rows"), ValueError, "side"),
        (lambda W: cq.merge_centering(W * np.inf, side="input"), cq.NonFiniteError, "W must be"),
    ],
)
def test_bad_input(rng, call, error, words):
    with pytest.raises(error, match=words):
        call(rng.normal(size=(2, 4)))


def test_factors_pass_through_a_linear_pair(rng):
    x, up, down = rng.normal(size=(3, 6)), rng.normal(size=(8, 6)), rng.normal(size=(4, 8))
    bias, factors = rng.normal(size=8), rng.normal(size=8)
    expected = (x @ up.T + bias) @ down.T
    written = x @ cq.merge_factors(up, factors, side="output").T
    written += cq.merge_factors(bias, factors, side="output")
    np.testing.assert_allclose(written, (x @ up.T + bias) * factors)
    read = cq.merge_factors(down, factors, side="input")
    np.testing.assert_allclose(written @ read.T, expected, atol=1e-12)
    with pytest.raises(ValueError, match="0 at index 2"):
        cq.merge_factors(up, np.array([1.0, 1, 0, 1, 1, 1, 1, 1]), side="output")
    with pytest.raises(cq.ShapeError):
        cq.merge_factors(up, factors, side="input")


def test_a_layer_norm_between_centered_writers_and_a_folded_reader_is_an_rms_norm(rng):
    h, bias = rng.normal(size=(3, 6)), rng.normal(size=8)
    writer, reader = rng.normal(size=(8, 6)), rng.normal(size=(5, 8))
    gain, shift, reader_bias = rng.normal(size=8), rng.normal(size=8), rng.normal(size=5)
    x = h @ writer.T + bias
    centered = x - x.mean(1, keepdims=True)
    normed = centered / np.sqrt(np.square(centered).mean(1, keepdims=True) + 1e-5)
    expected = (normed * gain + shift) @ reader.T + reader_bias

    W = cq.merge_centering(writer, side="output")
    y = h @ W.T + cq.merge_centering(bias, side="output")
    np.testing.assert_allclose(y.mean(1), 0, atol=1e-15)
    y = y / np.sqrt(np.square(y).mean(1, keepdims=True) + 1e-5)
    got = y @ cq.fold_norm(reader, gain).T + cq.fold_norm_bias(reader, reader_bias, shift)
    np.testing.assert_allclose(got, expected, atol=1e-13)
    np.testing.assert_allclose(cq.fold_norm_bias(reader, None, shift), reader @ shift, atol=1e-14)
    assert cq.merge_centering(writer.astype(np.float32), side="input").dtype == np.float32
