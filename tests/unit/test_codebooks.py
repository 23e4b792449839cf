"""Coded weights: nearest levels, bytes that are those of the file, and the column loop."""

from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from corequant.errors import (
    BlockSizeError,
    CheckpointError,
    HessianError,
    NonFiniteError,
    ShapeError,
    SpecError,
)
from corequant.rounding.codebooks import ColumnProblem
from corequant.rounding.codebooks.streams import pack_stream, stream_bytes, unpack_stream

AXES = [("row", None), ("column", None), ("group", 8)]


def entries(shape, axis, group_size):
    rows, columns = shape
    return {"row": rows, "column": columns, "group": rows * columns // (group_size or 1)}[axis]


def moments(rng, d, tokens=400):
    X = rng.normal(size=(tokens, d)) @ rng.normal(size=(d, d))
    return X.T @ X / tokens


def restored(weight):
    """Return a weight as it comes back from its bytes, which are as many as it says."""
    tensors = weight.to_tensors()
    assert sum(array.nbytes for array in tensors.values()) == weight.nbytes
    assert all(array.flags.c_contiguous for array in tensors.values())
    assert weight.bits_per_weight == 8 * weight.nbytes / np.prod(weight.shape)
    return cq.load_coded(tensors, weight.describe())


@pytest.mark.parametrize("width", [0, 1, 2, 3, 5, 8, 11, 16])
@pytest.mark.parametrize("count", [0, 1, 7, 64, 70001])
def test_streams_come_back(rng, width, count):
    codes = rng.integers(0, 1 << width, count)
    packed = pack_stream(codes, width)
    assert packed.nbytes == stream_bytes(count, width) == -(-count * width // 8)
    np.testing.assert_array_equal(unpack_stream(packed, width, count), codes)


def test_streams_are_little_endian():
    assert pack_stream(np.array([1, 2, 3, 0]), 2).tolist() == [0b00111001]
    assert pack_stream(np.array([5, 6]), 3).tolist() == [0b110101]


@pytest.mark.parametrize(("axis", "group_size"), AXES)
@pytest.mark.parametrize("shape", [(5, 24), (1, 8), (16, 40)])
def test_codebooks_come_back_from_their_bytes(rng, axis, group_size, shape):
    W = rng.standard_t(3, shape).astype(np.float32)
    for widths in (0, 1, 4, rng.integers(0, 6, entries(shape, axis, group_size))):
        coded = cq.Codebook.fit(W, widths, axis=axis, group_size=group_size)
        again = restored(coded)
        np.testing.assert_array_equal(again.dequantize(), coded.dequantize())
        np.testing.assert_array_equal(again.labels, coded.labels)


@pytest.mark.parametrize(("axis", "group_size"), AXES)
def test_weights_take_their_nearest_level(rng, axis, group_size):
    W = rng.normal(size=(6, 16))
    widths = rng.integers(0, 4, entries(W.shape, axis, group_size))
    coded = cq.Codebook.fit(W, widths, axis=axis, group_size=group_size)
    Q = coded.dequantize()
    for i in range(6):
        for j in range(16):
            e = {"row": i, "column": j, "group": i * 2 + j // 8}[axis]
            own = coded.levels[e, : 1 << int(widths[e])]
            assert Q[i, j] in own
            assert abs(Q[i, j] - W[i, j]) == pytest.approx(np.abs(own - W[i, j]).min())
    # A column at a time it is the same.
    for j in range(16):
        np.testing.assert_array_equal(coded.quantize_column(W[:, j], j), Q[:, j])


def test_enough_levels_leave_no_error_but_float16s(rng):
    W = rng.choice(rng.normal(size=8), (4, 64))
    Q = cq.Codebook.fit(W, 3).dequantize()
    np.testing.assert_allclose(Q, W, rtol=2**-11)
    exact = rng.choice([-2.0, -0.5, 0.75, 1.0], (4, 64))
    np.testing.assert_array_equal(cq.Codebook.fit(exact, 2).dequantize(), exact)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e6, 1e30])
def test_levels_keep_their_precision_at_any_size(rng, size):
    W = rng.normal(size=(3, 32)) * size
    plain = cq.Codebook.fit(W, 5)
    np.testing.assert_allclose(plain.dequantize(), W, atol=0.6 * np.abs(W).max())
    np.testing.assert_array_equal(restored(plain).dequantize(), plain.dequantize())


def test_weights_of_a_codebook_count(rng):
    W, counts = rng.normal(size=(2, 40)), rng.random(40)
    even, weighted = cq.Codebook.fit(W, 2), cq.Codebook.fit(W, 2, weights=counts)

    def loss(c):
        return (np.square(W - c.dequantize()) * counts).sum()

    assert loss(weighted) < loss(even)


def test_shared_codebooks_come_back_from_their_bytes(rng):
    W = rng.normal(size=(9, 24)) * rng.lognormal(size=(9, 1))
    tables = {w: cq.lloyd_max("laplace", 1 << w) for w in range(4)}
    for widths in (0, 3, rng.integers(0, 4, 9)):
        coded = cq.SharedCodebook.of(W, tables, W.std(1), widths)
        again = restored(coded)
        np.testing.assert_array_equal(again.dequantize(), coded.dequantize())
        for r in range(9):
            own = coded.scales[r] * coded.tables[int(coded.widths[r])]
            np.testing.assert_allclose(
                np.abs(coded.dequantize()[r] - W[r]), np.abs(own - W[r][:, None]).min(1), rtol=1e-6
            )


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_outliers_come_back_from_their_bytes(rng, share):
    W = rng.standard_t(2, (17, 40))
    mask = rng.random(W.shape) < share
    base = cq.Codebook.fit(W, 2, axis="column")
    coded = cq.KeptOutliers(base, cq.SparseOutliers.of(W, mask))
    again = restored(coded)
    np.testing.assert_array_equal(again.dequantize(), coded.dequantize())
    np.testing.assert_array_equal(again.outliers.mask, mask)
    np.testing.assert_allclose(coded.dequantize()[mask], W[mask], rtol=2**-11)
    np.testing.assert_array_equal(coded.dequantize()[~mask], base.dequantize()[~mask])
    # Sparse ones are listed, many are a bitmap.
    assert ("bitmap" in coded.to_tensors()) == (share > 0.1)


def test_column_scales_come_back_from_their_bytes(rng):
    W, scales = rng.normal(size=(9, 24)), rng.lognormal(size=24)
    base = cq.Codebook.fit(W / scales, 3)
    coded = cq.ColumnScaled.of(base, scales)
    np.testing.assert_array_equal(restored(coded).dequantize(), coded.dequantize())
    assert coded.nbytes == base.nbytes + 48
    np.testing.assert_allclose(coded.dequantize(), base.dequantize() * scales, rtol=2**-10)


def test_a_loop_over_one_codebook_is_gptq(rng):
    # Levels that are an integer grid make both the same problem.
    W, H = rng.normal(size=(12, 160)), moments(rng, 160)
    plain = cq.gptq(W, H, "int3:channel:symmetric:float32", damping=0.01)
    levels = plain.scales * np.arange(-4, 4)
    # What float16 makes of levels is not the grid: leave it out.
    book = cq.Codebook.of(W, levels, 3)
    object.__setattr__(book, "levels", levels)
    rounded = ColumnProblem.of(W, H, damping=0.01).run(book)
    np.testing.assert_allclose(rounded, cq.dequantize(plain), rtol=1e-6)


def test_a_loop_with_cross_moments_is_qronos(rng):
    W, H = rng.normal(size=(12, 160)), moments(rng, 160)
    G = 0.9 * H + 0.01 * moments(rng, 160)
    plain = cq.qronos(W, H, G, "int3:channel:symmetric:float32", damping=1e-3)
    levels = plain.scales * np.arange(-4, 4)
    book = cq.Codebook.of(W, levels, 3)
    object.__setattr__(book, "levels", levels)
    rounded = ColumnProblem.of(W, H, G, damping=1e-3).run(book)
    np.testing.assert_allclose(rounded, cq.dequantize(plain), rtol=1e-6)


@pytest.mark.parametrize("block", [1, 40, 128, 500])
def test_blocks_do_not_matter_to_frozen_codebooks(rng, block):
    W, H = rng.normal(size=(8, 150)), moments(rng, 150)
    book = cq.Codebook.fit(W, 2)
    problem = ColumnProblem.of(W, H)
    np.testing.assert_array_equal(problem.run(book, block), problem.run(book))


def test_blocks_are_entered_with_what_their_columns_would_be(rng):
    W, H = rng.normal(size=(6, 20)), moments(rng, 20)
    problem = ColumnProblem.of(W, H, act_order=False, damping=0.0)
    seen = []

    class Steps:
        def enter_block(self, columns, values, curvature):
            seen.append((columns, values, curvature))

        def quantize_column(self, w, j):
            return np.rint(w)

    Q = problem.run(Steps(), 8)
    assert [list(c) for c, _, _ in seen] == [
        list(range(8)), list(range(8, 16)), list(range(16, 20))
    ]  # fmt: skip
    np.testing.assert_allclose(seen[0][1], W[:, :8], rtol=1e-12)
    inverse = np.linalg.cholesky(np.linalg.inv(H)).T  # upper: GPTQ's
    np.testing.assert_allclose(
        np.concatenate([c for _, _, c in seen]), 1 / np.diagonal(inverse) ** 2, rtol=1e-8
    )
    # Given the first block, the best values of all other columns.
    done, rest = slice(0, 8), slice(8, 20)
    best = W[:, rest] + (W - Q)[:, done] @ H[done, rest] @ np.linalg.inv(H[rest, rest])
    np.testing.assert_allclose(seen[1][1], best[:, :8], rtol=1e-8)


def test_feedback_lowers_the_loss(rng):
    W, H = rng.normal(size=(16, 64)), moments(rng, 64)
    book = cq.Codebook.fit(W, 2)
    problem = ColumnProblem.of(W, H)
    assert problem.loss(problem.run(book)) < 0.7 * problem.loss(book.dequantize())


def test_bad_input_is_refused(rng):
    W = rng.normal(size=(4, 24))
    with pytest.raises(SpecError, match="axis must be one of row, column, group, got 'tensor'"):
        cq.Codebook.fit(W, 2, axis="tensor")
    with pytest.raises(BlockSizeError, match="group_size must divide d=24, got 7"):
        cq.Codebook.fit(W, 2, axis="group", group_size=7)
    with pytest.raises(SpecError, match="group_size must be given with axis 'group' alone"):
        cq.Codebook.fit(W, 2, group_size=8)
    with pytest.raises(ValueError, match="widths must be 0 to 8, got 9"):
        cq.Codebook.fit(W, 9)
    with pytest.raises(ShapeError, match="widths must have one width for each of 4"):
        cq.Codebook.fit(W, np.array([1, 2]))
    with pytest.raises(NonFiniteError, match="W"):
        cq.Codebook.fit(np.where(W > 1, np.inf, W), 2)
    with pytest.raises(ValueError, match="levels must ascend"):
        cq.Codebook.of(W, np.ones((4, 2)) * [1, 0], 1)
    with pytest.raises(ShapeError, match="levels must be"):
        cq.Codebook.of(W, np.ones((4, 2)), 2)
    with pytest.raises(ShapeError, match="outliers must have base's shape"):
        cq.KeptOutliers(cq.Codebook.fit(W, 1), cq.SparseOutliers.of(W[:2], W[:2] > 1))
    with pytest.raises(TypeError, match="mask must have dtype bool"):
        cq.SparseOutliers.of(W, W)
    with pytest.raises(ShapeError, match="scales must have one number for each of 24 columns"):
        cq.ColumnScaled.of(cq.Codebook.fit(W, 1), np.ones(3))
    with pytest.raises(ShapeError, match="scales must be one for each of 4 rows"):
        cq.SharedCodebook.of(W, {1: np.array([-1.0, 1.0])}, np.ones(3), 1)
    with pytest.raises(ValueError, match="tables of width 1 must ascend"):
        cq.SharedCodebook.of(W, {1: np.array([1.0, -1.0])}, np.ones(4), 1)
    with pytest.raises(HessianError, match="symmetric"):
        ColumnProblem.of(W, np.triu(np.ones((24, 24))))


def test_damaged_tensors_are_refused(rng):
    W = rng.normal(size=(8, 24))
    mask = np.abs(W) > 2
    coded = cq.KeptOutliers(
        cq.Codebook.fit(W, rng.permutation([1, 2, 3, 3, 1, 2, 2, 2])), cq.SparseOutliers.of(W, mask)
    )
    tensors, said = coded.to_tensors(), coded.describe()
    with pytest.raises(CheckpointError, match="kind must be one of"):
        cq.load_coded(tensors, {**said, "kind": "other"})
    with pytest.raises(CheckpointError, match="base must be a description"):
        cq.load_coded(tensors, {**said, "base": None})
    for name in tensors:
        rest = {k: v for k, v in tensors.items() if k != name}
        with pytest.raises(CheckpointError, match="tensors must hold"):
            cq.load_coded(rest, said)
        with pytest.raises(CheckpointError, match="must be"):
            cq.load_coded({**rest, name: tensors[name][:-1]}, said)
    for key, bad in (
        ("shape", [3, "x"]),
        ("axis", "diagonal"),
        ("widths", [12]),
        ("exponent", 1.5),
    ):
        with pytest.raises(CheckpointError):
            cq.load_coded(tensors, {**said, "base": {**said["base"], key: bad}})
