"""Weights off any grid, from any array: the right result or a typed error, never anything else."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

import corequant as cq
from corequant.errors import CorequantError

TYPED = (CorequantError, TypeError, ValueError)

METHODS = {
    "skim": lambda W, H: cq.skim(W, H, 4.5),
    "skim, own levels": lambda W, H: cq.skim(W, H, 6, shared=False),
    "skim, published": lambda W, H: cq.skim(W, H, 3, published=True),
    "claq": lambda W, H: cq.claq(W, H, 8, outliers=0.01),
    "claq, published": lambda W, H: cq.claq(W, H, 2.5, outliers=True, published=True),
    "watersic": lambda W, H: cq.watersic(W, H, 5),
    "billm": cq.billm,
    "billm, published": lambda W, H: cq.billm(W, H, published=True),
    "arb": lambda W, H: cq.arb(W, H, rotation=None),
    "arb, rotated": lambda W, H: cq.arb(W, H, rotation=8, ternary=True),
    "arb, published": lambda W, H: cq.arb(W, H, published=True),
}

DTYPES = ("<f2", ">f2", "bfloat16", "<f4", ">f4", "<f8", ">f8")

D = 24


def case(seed=0, rows=16):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(200, D)) @ rng.normal(size=(D, D)) / 5
    return rng.normal(size=(rows, D)), X.T @ X / 200


def of_dtype(array, dtype):
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def plain(array):
    """The same numbers as a contiguous array of the machine's own float32, or float64."""
    wide = np.float64 if array.dtype.itemsize == 8 else np.float32
    return np.ascontiguousarray(array, wide)


def layouts(array):
    """The same numbers in other places of memory."""
    wide = np.zeros((2 * array.shape[0], 2 * array.shape[1]), array.dtype)
    wide[::2, ::2] = array
    fixed = array.copy()
    fixed.flags.writeable = False
    back = np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]
    return {
        "Fortran": np.asfortranarray(array),
        "strided": wide[::2, ::2],
        "backwards": back,
        "read-only": fixed,
    }


def check(weight, shape):
    """Restore a weight from its tensors, and count them."""
    values, tensors = weight.dequantize(), weight.to_tensors()
    assert values.shape == shape
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert sum(t.nbytes for t in tensors.values()) == weight.nbytes
    again = cq.load_coded(tensors, weight.describe())
    np.testing.assert_array_equal(again.dequantize(), values)
    return values


@pytest.mark.parametrize("method", METHODS)
def test_methods_take_every_dtype_and_layout(method):
    W, H = case()
    run = METHODS[method]
    for dtype in DTYPES:
        narrow = of_dtype(W, dtype)
        found = check(run(narrow, H).weight, W.shape)
        np.testing.assert_array_equal(found, run(plain(narrow), H).dequantize())
        moments = of_dtype(H, dtype)
        found = run(W, moments).dequantize()
        np.testing.assert_array_equal(found, run(W, plain(moments)).dequantize())
    expected = run(W, H).dequantize()
    for name, view in layouts(W).items():
        before = view.copy()
        np.testing.assert_array_equal(run(view, layouts(H)[name]).dequantize(), expected)
        np.testing.assert_array_equal(view, before)


@pytest.mark.parametrize("method", METHODS)
def test_methods_take_unusual_weights_or_name_what_is_wrong(method):
    W, H = case()
    run = METHODS[method]
    dead = H.copy()
    dead[3] = dead[:, 3] = 0
    thin = np.outer(H[0], H[0]) / H[0, 0]
    few = np.repeat([[1.0, -1.0, 2.0]], 16, 0).repeat(8, 1)
    good = {
        "constant": (np.ones_like(W), H),
        "constant rows": (np.arange(16.0)[:, None] * np.ones(D), H),
        "few distinct values": (few, H),
        "zeros": (np.zeros_like(W), H),
        "no inputs": (W, np.zeros_like(H)),
        "a channel without inputs": (W, dead),
        "inputs of rank 1": (W, thin),
        "tiny": (W * 1e-30, H),
        "huge": (W * 1e30, H),
        "one huge outlier": (np.where(W == W.max(), 1e6, W), H),
    }
    for words, (weight, moments) in good.items():
        values = check(run(weight, moments).weight, W.shape)
        assert words != "zeros" or not values.any()
    bad = {
        "at least one weight, got shape \\(0, 24\\)": (W[:0], H),
        "at least one weight, got shape \\(16, 0\\)": (W[:, :0], H[:0, :0]),
        "W must be \\(out_features, in_features\\)": (W[0], H),
        "W must be finite, got 1 .*nan": (np.where(W == W.max(), np.nan, W), H),
        "W must be finite, got 1 .*inf": (np.where(W == W.max(), np.inf, W), H),
        "W must have a real floating dtype, got int64": (W.astype(np.int64), H),
        "W must be a numpy.ndarray, got list": (W.tolist(), H),
        "W must be a plain numpy.ndarray": (np.ma.array(W), H),
        "H of W must be finite": (W, np.where(H == H.max(), np.nan, H)),
        "H of W must be \\(d, d\\) with d=24": (W, H[:-1, :-1]),
        "H of W must be symmetric": (W, H + np.triu(np.full(H.shape, 9.0), 1)),
        "H of W must be positive semidefinite": (W, -H),
    }
    for words, (weight, moments) in bad.items():
        with pytest.raises(TYPED, match=words):
            run(weight, moments)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_least_number_of_bits_in_an_error_is_enough(rows):
    W, H = case(rows=rows)
    methods = {
        "skim": lambda W, H, bits: cq.skim(W, H, bits),
        "skim of own levels": lambda W, H, bits: cq.skim(W, H, bits, shared=False),
        "scaled skim": lambda W, H, bits: cq.skim(W, H, bits, scale=True),
        "unmixed skim": lambda W, H, bits: cq.skim(W, H, bits, mixed=False),
        "claq": lambda W, H, bits: cq.claq(W, H, bits, outliers=0.02),
        "watersic": cq.watersic,
    }
    for name, method in methods.items():
        for weight, moments in ((W, H), (W[:, :1], H[:1, :1])):
            with pytest.raises(cq.SpecError, match=r" at least |bits must be .* to ") as caught:
                method(weight, moments, 0.01)
            said = str(caught.value)
            least = float(re.search(r"(?:at least|be) ([\d.]+)", said)[1])
            if "must be larger" in said:
                assert name == "watersic"
                assert least > 8
                continue
            found = method(weight, moments, least)
            check(found.weight, weight.shape)
            assert found.bits_per_weight <= least
            with pytest.raises(cq.SpecError):
                method(weight, moments, least - 0.01)
            # A little more is never refused, whatever widths it makes possible.
            for more in (least + 0.1, least + 0.7, least + 1.5):
                if name != "watersic" or more <= 8:
                    assert method(weight, moments, more).bits_per_weight <= more


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_moments_and_sensitivities_of_every_dtype(dtype):
    W, H = case()
    G, shares = of_dtype(0.9 * H, dtype), of_dtype(np.abs(W), dtype)
    methods = {
        "skim": lambda G, shares: cq.skim(W, H, 5, G=G, sensitivity=shares),
        "own levels": lambda G, shares: cq.skim(W, H, 6, shared=False, G=G, sensitivity=shares),
        "claq": lambda G, shares: cq.claq(W, H, 8, G=G),
        "watersic": lambda G, shares: cq.watersic(W, H, 5, G=G),
        "billm": lambda G, shares: cq.billm(W, H, G=G),
        "arb": lambda G, shares: cq.arb(W, H, G=G, rotation=8),
    }
    for method in methods.values():
        found = check(method(G, shares).weight, W.shape)
        expected = method(plain(G), plain(shares)).dequantize()
        np.testing.assert_array_equal(found, expected)


def test_weights_too_small_for_streams_are_told_so():
    W, H = case(rows=1)
    with pytest.raises(
        cq.SpecError,
        match=r"a weight \(1, 24\) takes at least \d+\.?\d* bits per weight, .* the limit of 8",
    ):
        cq.watersic(W, H, 3)


@pytest.mark.parametrize("bits", [7, 7.9, 8])
def test_streams_of_small_weights_use_the_bits_they_are_given(bits):
    W, H = case(rows=8)
    coded = cq.watersic(W, H, bits)
    assert bits - 0.3 < coded.bits_per_weight <= bits
    assert coded.report.loss < 0.05 * cq.reconstruction_loss(W, np.zeros_like(W), H)


CODED = {
    "rows": lambda W: cq.Codebook.fit(W, 2),
    "weighted": lambda W: cq.Codebook.fit(W, 2, weights=np.abs(W)),
    "columns": lambda W: cq.Codebook.fit(W, 3, axis="column"),
    "groups": lambda W: cq.Codebook.fit(W, 1, axis="group", group_size=8),
    "several widths": lambda W: cq.Codebook.fit(W, np.arange(len(W)) % 4),
    "given levels": lambda W: cq.Codebook.of(W, np.sort(W[:, :4], 1), 2),
    "shared": lambda W: cq.SharedCodebook.of(W, {2: np.sort(W[0, :4])}, np.abs(W[:, 0]), 2),
    "scaled": lambda W: cq.ColumnScaled.of(cq.Codebook.fit(W, 2), W[0]),
    "kept": lambda W: cq.KeptOutliers(
        cq.Codebook.fit(W, 2), cq.SparseOutliers.of(W, np.asarray(W > W.dtype.type(1)))
    ),
    "everything kept": lambda W: cq.KeptOutliers(
        cq.Codebook.fit(W, 0), cq.SparseOutliers.of(W, np.ones(W.shape, np.bool_))
    ),
    "signs": lambda W: cq.Additive.of(
        np.asarray(W > W.dtype.type(0))[None], np.abs(W[None, :, :1]), column_scales=W[:1]
    ),
    "integers": lambda W: cq.EntropyCoded.of(plain(W).round().astype(np.int16), W[0]),
}


@pytest.mark.parametrize("kind", CODED)
def test_coded_weights_take_every_dtype_and_layout(kind):
    W, _ = case()
    make = CODED[kind]
    for dtype in DTYPES:
        narrow = of_dtype(W, dtype)
        found = check(make(narrow), W.shape)
        np.testing.assert_array_equal(found, make(plain(narrow)).dequantize())
    expected = make(W).dequantize()
    for view in layouts(W).values():
        np.testing.assert_array_equal(make(view).dequantize(), expected)
    if kind != "integers":
        with pytest.raises(TYPED, match="must be finite"):
            make(W * np.nan)


@pytest.mark.parametrize("kind", ["rows", "columns", "groups", "several widths", "shared", "signs"])
def test_new_labels_come_from_any_array_and_only_from_numbers(kind):
    W, _ = case()
    weight, other = CODED[kind](W), case(1)[0]
    for dtype in DTYPES:
        narrow = of_dtype(other, dtype)
        found = check(weight.encode(narrow), W.shape)
        np.testing.assert_array_equal(found, weight.encode(plain(narrow)).dequantize())
    for values, words in (
        (other[:-1], "values must have shape"),
        (other * np.nan, "values must be finite"),
        (other.astype(np.int64), "values must have a real floating dtype"),
        (other.tolist(), "values must be a numpy.ndarray"),
    ):
        with pytest.raises(TYPED, match=words):
            weight.encode(values)


def test_kept_weights_leave_the_matrix_alone():
    W, _ = case()
    kept = cq.SparseOutliers.of(W, W > 1)
    for view in (np.zeros_like(W), *layouts(np.zeros_like(W)).values(), np.zeros(W.shape[::-1]).T):
        placed = kept.place(view)
        np.testing.assert_allclose(placed[W > 1], W[W > 1], rtol=1e-3)
        assert not view.any()
    with pytest.raises(cq.ShapeError, match="matrix must have shape"):
        kept.place(W[1:])


def test_fitted_levels_come_from_any_array():
    W, H = case()
    weights = np.diagonal(H)
    for dtype in DTYPES:
        values, masses = of_dtype(W, dtype), of_dtype(weights, dtype)
        one = cq.kmeans_table(values, masses, (1, 3, 40))
        other = cq.kmeans_table(plain(values), plain(masses), (1, 3, 40))
        np.testing.assert_array_equal(one.losses, other.losses)
        np.testing.assert_array_equal(one.levels(3), other.levels(3))
        # With more levels than values, the levels are the values.
        for row, levels in zip(plain(values), one.levels(40), strict=True):
            np.testing.assert_array_equal(np.unique(levels), np.unique(row))
    for view in layouts(W).values():
        np.testing.assert_array_equal(cq.kmeans_levels(view), cq.kmeans_levels(W))
    np.testing.assert_array_equal(cq.kmeans_levels(np.full((2, 5), 3.0), levels=2), 3.0)


W, H = case()
LEVELS, TABLE = np.sort(W[:, :4], 1), {2: np.array([-2.0, -1, 1, 2])}
SIGNS, SCALES = (W > 0)[None], np.abs(W).mean(1).reshape(1, -1, 1)
BOOK = cq.Codebook.fit(W, 2)

REFUSED = [
    (lambda: cq.skim(W, H, 4, widths=[2.5]), "widths must be an integer, got float"),
    (lambda: cq.skim(W, H, 4, widths=2), "widths must be a sequence of integers, got int"),
    (lambda: cq.skim(W, H, 4, widths=(9,)), "widths must be 0 to 8, got 9"),
    (lambda: cq.skim(W, H, 4, widths=()), "widths must name at least one"),
    (lambda: cq.skim(W, H, 4, refits=-1), "refits must be at least 0, got -1"),
    (lambda: cq.skim(W, H, 4, refits=1.0), "refits must be an integer, got float"),
    (lambda: cq.skim(W, H, 9, published=True), r"bits must be 6 to 8 .*, got 9"),
    (lambda: cq.claq(W, H, 9, widths="12"), "widths must be a sequence of integers, got str"),
    (lambda: cq.claq(W, H, 9, outliers=True), "outliers must be a number, got True"),
    (lambda: cq.watersic(W, H, 8.1), r"bits must be \d.* to 8 for W, got 8.1"),
    (lambda: cq.billm(W, H, block=0), "block must be at least 1, got 0"),
    (lambda: cq.arb(W, H, order=5), "order must be at most 4, got 5"),
    (lambda: cq.arb(W, H, rotation=5), "rotation must divide d=24, got 5"),
    (lambda: cq.kmeans_table(W, sizes=3), "sizes must be a sequence of integers, got int"),
    (lambda: cq.kmeans_table(W, sizes=(2.5,)), "sizes must be an integer, got float"),
    (lambda: cq.kmeans_levels(W, levels=5000), "sizes must be numbers from 1 to 4096"),
    (lambda: cq.kmeans_levels(W[:, :0]), "values must be .* not empty"),
    (lambda: cq.lloyd_max(["normal"], 4), "distribution must be laplace or normal"),
    (lambda: cq.lloyd_max("normal", 4097), "levels must be at most 4096"),
    (lambda: cq.allocate_bits([["a"]], [1], 3), "losses must be real numbers, got <U1"),
    (lambda: cq.allocate_bits([[1, 2], [3]], [1, 2], 3), "losses must be rows of equal lengths"),
    (lambda: cq.allocate_bits([[1j]], [1], 3), "losses must be real numbers, got complex128"),
    (lambda: cq.allocate_bits(np.ma.ones((1, 1)), [1], 3), "losses .* got MaskedArray"),
    (lambda: cq.allocate_bits([[1]], [None], 3), "sizes must be real numbers, got object"),
    (lambda: cq.Codebook.fit(W, 9), "widths must be 0 to 8, got 9"),
    (lambda: cq.Codebook.fit(W, 2**70), "widths must be 0 to 8, got"),
    (lambda: cq.Codebook.fit(W, 2, weights=np.ones(5)), r"weights must be \(16, 24\) or \(24,\)"),
    (lambda: cq.Codebook.fit(W, 2, weights=[1.0] * D), "weights must be a numpy.ndarray"),
    (lambda: cq.Codebook.fit(W * 1e300, 2), r"stored numbers must be at most 3.401e\+38"),
    (lambda: cq.Codebook.of(W, LEVELS[:, ::-1], 2), "levels must ascend"),
    (lambda: cq.Codebook.of(W[:, :0], LEVELS, 2), "W must hold at least one weight"),
    (lambda: cq.SharedCodebook.of(W, TABLE, W[:, 0], 2), "scales must be finite and not negative"),
    (lambda: cq.SharedCodebook.of(W, TABLE, W[:, 0] ** 2, 3), "tables must hold levels of width 3"),
    (lambda: cq.SharedCodebook.of(W, TABLE[2], W[:, 0] ** 2, 2), "tables must be a mapping"),
    (
        lambda: cq.SharedCodebook.of(W, {2: TABLE[2] * np.nan}, W[:, 0] ** 2, 2),
        "table of width 2 must be finite",
    ),
    (
        lambda: cq.SharedCodebook.of(W, {2: TABLE[2] * 1e30}, W[:, 0] ** 2 * 1e30, 2),
        "scales times levels must be at most",
    ),
    (lambda: cq.SparseOutliers.of(W, W), "mask must have dtype bool"),
    (lambda: cq.SparseOutliers.of(W, W[:2] > 1), "mask must have W's shape"),
    (lambda: cq.SparseOutliers.of(W * 1e300, W > 1), "stored numbers must be at most"),
    (lambda: cq.ColumnScaled.of(W, W[0]), "base must be a CodedWeight, got ndarray"),
    (
        lambda: cq.ColumnScaled.of(cq.Codebook.fit(W * 1e30, 2), W[0] * 1e30),
        "scales must keep all values in float32's range",
    ),
    (
        lambda: cq.KeptOutliers(W, cq.SparseOutliers.of(W, W > 1)),
        "base must be a CodedWeight, got ndarray",
    ),
    (
        lambda: cq.KeptOutliers(BOOK, cq.SparseOutliers.of(W[1:], W[1:] > 1)),
        "outliers must have base's shape",
    ),
    (lambda: cq.Additive.of(SIGNS * 0.5, SCALES), "digits must be bool or integers, got float64"),
    (lambda: cq.Additive.of(SIGNS, SCALES.astype(object)), "row_scales must have a real floating"),
    (lambda: cq.Additive.of(SIGNS, SCALES * np.nan), "row_scales must be finite"),
    (lambda: cq.Additive.of(SIGNS, SCALES * 1e9), r"row_scales must be at most 6.55e\+04"),
    (lambda: cq.Additive.of(SIGNS, SCALES * 1e39, exponent=120), "row_scales must be at most 3.4"),
    (lambda: cq.Additive.of(SIGNS, SCALES, exponent=900), "exponent must leave scales"),
    (lambda: cq.Additive.of(SIGNS, SCALES, exponent=2.5), "exponent must be an integer"),
    (lambda: cq.Additive.of(SIGNS, SCALES, column_scales=3), "column_scales must be a numpy"),
    (lambda: cq.Additive.of(SIGNS, SCALES, orders=(1, 2)), "digits must have 2 planes"),
    (lambda: cq.Additive.of(SIGNS, SCALES, orders=1), "orders must be two integers, got 1"),
    (lambda: cq.Additive.of(SIGNS, SCALES, partition=1), "partition must be a Partition, got int"),
    (lambda: cq.Additive.of(SIGNS, SCALES, rotation=5), "rotation must divide d=24, got 5"),
    (lambda: cq.Partition.of(SIGNS[0, 0], rows=0), "rows must be at least 1, got 0"),
    (lambda: cq.Partition.of(SIGNS[0, 0], rows=2.5), "rows must be an integer, got float"),
    (lambda: cq.Partition.of(SIGNS[0, 0], SIGNS[0], rows=5), "rows must be 16 as in large, got 5"),
    (lambda: cq.Partition.of(SIGNS[0, 0, :0], rows=2), r"salient must be \(columns,\), not empty"),
    (lambda: cq.Partition.of(SIGNS[0, 0] * 1, rows=2), "salient must have dtype bool"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(TYPED, match=words):
        call()


@pytest.mark.torch
@pytest.mark.parametrize("method", METHODS)
def test_tensors_of_torch_are_refused(method):
    import torch

    with pytest.raises(TypeError, match="W must be a numpy.ndarray, got Tensor"):
        METHODS[method](torch.ones(4, 8), torch.eye(8))
    with pytest.raises(TypeError, match="H must be a numpy.ndarray, got Tensor"):
        METHODS[method](W, torch.eye(D))
