from __future__ import annotations

import numpy as np
import pytest

import corequant as cq


def dense(d, b, inverse=False):
    block = cq.hadamard_matrix(b).astype(np.float64) / np.sqrt(b)
    matrix = np.kron(np.eye(d // b), block)
    return matrix.T if inverse else matrix


@pytest.mark.parametrize(
    ("d", "b"), [(8, 2), (64, 16), (24, 12), (96, 24), (1536, 1536), (40, 20), (1, 1), (172, 172)]
)
@pytest.mark.parametrize("inverse", [False, True])
def test_equals_the_matrix(rng, d, b, inverse):
    x = rng.normal(size=(3, d))
    expected = x @ dense(d, b, inverse)
    np.testing.assert_allclose(
        cq.block_hadamard(x, b, inverse=inverse), expected, rtol=0, atol=1e-13
    )


def test_the_whole_axis_is_the_default(rng):
    x = rng.normal(size=(2, 24))
    np.testing.assert_array_equal(cq.block_hadamard(x), cq.block_hadamard(x, 24))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "bfloat16"])
def test_dtype_is_kept_and_arithmetic_is_float32_or_better(rng, dtype):
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    x = rng.normal(size=(5, 32)).astype(dtype)
    y = cq.block_hadamard(x, 8)
    assert y.dtype == x.dtype
    exact = x.astype(np.float64) @ dense(32, 8)
    error = np.abs(y.astype(np.float64) - exact)
    eps = 2.0**-9 if np.dtype(dtype).name == "bfloat16" else np.finfo(dtype).eps
    assert error.max() <= 2 * float(eps) * np.abs(exact).max()


def test_strided_fortran_and_read_only_input(rng):
    x = rng.normal(size=(6, 32))
    expected = cq.block_hadamard(x, 16)
    frozen = x.copy()
    frozen.flags.writeable = False
    wide = np.zeros((12, 64))
    wide[::2, ::2] = x
    for view in (np.asfortranarray(x), frozen, wide[::2, ::2], x[::-1][::-1]):
        np.testing.assert_array_equal(cq.block_hadamard(view, 16), expected)


def test_signs_are_applied_before_and_undone_after(rng):
    x = rng.normal(size=(4, 24))
    signs = cq.random_signs(24, seed=3)
    y = cq.block_hadamard(x, 12, signs=signs)
    np.testing.assert_allclose(y, (x * signs) @ dense(24, 12), atol=1e-13)
    np.testing.assert_allclose(cq.block_hadamard(y, 12, signs=signs, inverse=True), x, atol=1e-13)


def test_out_in_place_and_apart(rng):
    x = rng.normal(size=(4, 32))
    expected = cq.block_hadamard(x, 16)
    out = np.empty_like(x)
    assert cq.block_hadamard(x, 16, out=out) is out
    np.testing.assert_array_equal(out, expected)
    strided = np.empty((4, 64))[:, ::2]
    cq.block_hadamard(x, 16, out=strided)
    np.testing.assert_array_equal(strided, expected)
    assert cq.block_hadamard(x, 16, out=x) is x
    np.testing.assert_array_equal(x, expected)


def test_input_is_not_changed(rng):
    x = rng.normal(size=(4, 32))
    before = x.copy()
    cq.block_hadamard(x, 16, signs=cq.random_signs(32, 0))
    np.testing.assert_array_equal(x, before)


def test_nan_stays_in_its_block():
    x = np.ones((2, 32), np.float32)
    x[0, 3] = np.nan
    x[1, 20] = np.inf
    y = cq.block_hadamard(x, 16)
    assert np.isnan(y[0, :16]).all()
    assert np.isfinite(y[0, 16:]).all()
    assert np.isfinite(y[1, :16]).all()
    assert not np.isfinite(y[1, 16:]).any()


def test_empty_batch():
    assert cq.block_hadamard(np.empty((0, 16), np.float32), 4).shape == (0, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"block_size": 5},
            cq.BlockSizeError,
            "block_size must divide d=24, got 5; these do and work: 2, 4, 8, 12, 24$",
        ),
        ({"block_size": 0}, ValueError, "at least 1"),
        ({"block_size": True}, TypeError, "got the bool"),
        ({"block_size": 2.0}, TypeError, "must be an integer"),
        ({"block_size": 6}, cq.HadamardOrderError, "got 6"),
        ({"signs": np.zeros(24)}, ValueError, "signs must be"),
        ({"signs": np.ones(3)}, cq.ShapeError, "signs must have shape"),
        ({"signs": [1] * 24}, TypeError, "signs must be a numpy.ndarray"),
        ({"out": np.empty((2, 12))}, cq.ShapeError, "out must have"),
        ({"out": np.empty((2, 24), np.float32)}, cq.ShapeError, "out must have"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        cq.block_hadamard(np.ones((2, 24)), **{"block_size": 4, **arguments})


@pytest.mark.parametrize(
    ("x", "error"),
    [
        ([1.0, 2.0], TypeError),
        (np.ones(4, int), TypeError),
        (np.ones(4, complex), TypeError),
        (np.ones(4, object), TypeError),
        (np.ones(4, bool), TypeError),
        (np.float64(3.0), cq.ShapeError),
        (np.array(3.0), cq.ShapeError),
        (np.ones((3, 0)), cq.ShapeError),
    ],
)
def test_bad_input(x, error):
    with pytest.raises(error):
        cq.block_hadamard(x)


def test_overlapping_and_read_only_out_are_refused(rng):
    memory = rng.normal(size=48)
    with pytest.raises(ValueError, match="overlap"):
        cq.block_hadamard(memory[:32], 4, out=memory[8:40])
    out = np.empty(32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        cq.block_hadamard(memory[:32], 4, out=out)


def test_the_message_lists_block_sizes_that_work():
    with pytest.raises(cq.HadamardOrderError, match=r"2, 4, 8, 16, 32, 64, 128"):
        cq.block_hadamard(np.ones(13696))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_blocks_of_one_only_take_signs(rng, dtype, axis):
    x = rng.normal(size=(4, 6, 5)).astype(dtype)
    signs = cq.random_signs(x.shape[axis], 0)
    shape = [1, 1, 1]
    shape[axis] = -1
    np.testing.assert_array_equal(cq.block_hadamard(x, 1, axis=axis), x)
    expected = x * signs.reshape(shape).astype(dtype)
    np.testing.assert_array_equal(cq.block_hadamard(x, 1, axis=axis, signs=signs), expected)
