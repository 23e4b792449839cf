"""Planes of signs and ternary digits: closed forms, bytes, BiLLM and ARB-RC."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

import corequant as cq
from corequant.rounding.binary.alphabet import Alphabet, nearest
from corequant.rounding.binary.coding import Coding, Form
from corequant.rounding.binary.planes import (
    alternate,
    column_scales,
    residual_planes,
    row_column_planes,
    solve_near,
)
from corequant.rounding.binary.start import start_parameters
from corequant.rounding.binary.streams import pack_digits, plane_bytes, unpack_digits
from corequant.rounding.binary.target import Measured, Target
from corequant.rounding.codebooks.columns import ColumnProblem


def layer(rows=24, d=60, tokens=400, seed=0, dtype=np.float64):
    """Return a weight with heavy tails, and the moments of correlated inputs."""
    generator = np.random.default_rng(seed)
    W = generator.standard_t(4, size=(rows, d)) * np.exp(0.5 * generator.normal(size=d))
    X = generator.normal(size=(tokens, d)) * np.exp(0.5 * generator.normal(size=d))
    X[:, 1:] += 0.7 * X[:, :-1]
    return W.astype(dtype), (X.T @ X / tokens).astype(dtype)


def file_of(coded):
    """Return what a file gives back: tensors as bytes, the description as JSON."""
    tensors = {
        name: np.frombuffer(array.tobytes(), array.dtype)
        for name, array in coded.to_tensors().items()
    }
    assert sum(len(array.tobytes()) for array in tensors.values()) == coded.nbytes
    assert all(array.ndim == 1 for array in coded.to_tensors().values())
    return tensors, json.loads(json.dumps(coded.describe()))


def test_one_plane_is_the_least_squares_optimum_over_all_signs():
    values = np.random.default_rng(0).standard_t(3, size=(1, 8))
    found = residual_planes(values, 1)
    least = np.inf
    for signs in product((-1.0, 1.0), repeat=8):
        B = np.array(signs)
        scale = B @ (values[0] - found.mean[0]) / 8
        least = min(least, np.square(values[0] - found.mean[0] - scale * B).sum())
    assert found.scales[0, 0] == pytest.approx(np.abs(values - values.mean()).mean())
    assert np.square(values - found.values()).sum() == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("base", [2, 3])
@pytest.mark.parametrize("variants", [1, 2])
def test_alternation_never_raises_the_error(order, base, variants):
    generator = np.random.default_rng(order)
    values = generator.standard_t(4, size=(30, 50))
    weights = generator.uniform(0.1, 3, 50)
    alphabet = Alphabet(variants, order, base, mean=True)
    start = start_parameters(values, alphabet)
    errors = []
    for steps in range(16):
        parameters, codes = alternate(values, alphabet, start, weights, steps)
        gap = values - alphabet.values(codes, parameters)
        errors.append((gap**2 * weights).sum(1))
    assert (np.diff(errors, axis=0) <= 1e-9).all()
    assert errors[-1].sum() < errors[0].sum()


@pytest.mark.parametrize("order", [1, 2])
def test_row_and_column_scales_never_raise_the_error(order):
    values, _ = layer(30, 40)
    mask = np.random.default_rng(1).random(values.shape) < 0.6
    errors = []
    for steps in range(16):
        gap = values - row_column_planes(values, order, mask, steps).values()
        errors.append(np.square(gap[mask]).sum())
    assert (np.diff(errors) <= 1e-9).all()
    assert errors[-1] < errors[0]


def test_scales_of_rows_and_columns_restore_rank_one_times_signs():
    generator = np.random.default_rng(0)
    rows, columns = generator.uniform(0.1, 2, (20, 1)), generator.uniform(0.1, 2, 30)
    values = rows * columns * generator.choice([-1, 1], (20, 30))
    assert np.allclose(row_column_planes(values, 1).values(), values, rtol=1e-12)


def test_two_planes_take_the_nearest_of_their_four_sums():
    values, _ = layer(10, 12)
    found = row_column_planes(values, 2, steps=3)
    first, second = (np.abs(found.plane(k)) for k in (0, 1))
    sums = np.stack([a * first + b * second for a in (-1, 1) for b in (-1, 1)])
    gaps = np.abs(values - sums)
    assert np.allclose(np.abs(values - found.values()), gaps.min(0), atol=1e-12)


def test_column_scales_are_where_the_gradient_is_zero():
    values, H = layer(20, 15)
    terms = np.sign(values) * np.abs(values).mean(1, keepdims=True)

    def error(c):
        gap = values - terms * c
        return np.einsum("ij,jk,ik->", gap, H, gap)

    start = np.ones(15)
    found = column_scales(values, terms, H, start)
    for j in range(15):
        step = np.eye(15)[j] * 1e-4
        slope = (error(found + step) - error(found - step)) / 2e-4
        assert abs(slope) < 1e-4 * error(start)
    assert error(found) < error(start)
    kept = np.arange(15) < 4
    partly = column_scales(values, terms, H, start, kept)
    assert (partly[:4] == 1).all()
    assert error(found) < error(partly) < error(start)


def test_systems_without_a_unique_solution_stay_near_the_start():
    system = np.array([[[2.0, 0], [0, 0]], [[0, 0], [0, 0]]])
    start = np.array([[5.0, 7], [1, 2]])
    found = solve_near(system, np.array([[4.0, 0], [0, 0]]), start)
    assert np.allclose(found, [[2, 7], [1, 2]], atol=1e-4)


def test_nearest_takes_the_first_of_equal_levels():
    levels = np.array([[-1.0, 1.0, 1.0]])
    assert nearest(np.array([[-3.0, 0.0, 2.0]]), levels).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("base", [2, 3])
@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 243])
def test_digits_survive_packing(base, count):
    digits = np.random.default_rng(count).integers(0, base, count)
    packed = pack_digits(digits, base)
    assert len(packed) == plane_bytes(count, base)
    assert np.array_equal(unpack_digits(packed, base, count), digits)


@pytest.mark.parametrize("salient", [0, 3, 17])
@pytest.mark.parametrize("everywhere", [False, True])
def test_parts_of_a_partition_are_disjoint_and_survive_a_file(salient, everywhere):
    large = np.random.default_rng(0).random((5, 17)) < 0.5
    columns = np.arange(17) < salient
    found = cq.Partition.of(columns, large, everywhere=everywhere)
    parts = found.parts()
    covered = large & (everywhere | ~columns)
    assert np.array_equal(parts, 2 * columns + covered)
    assert all(np.array_equal(found.large_of(j), covered[:, j]) for j in range(17))
    assert sum((parts == p).astype(int) for p in range(4)).tolist() == np.ones((5, 17)).tolist()
    again = cq.Partition.from_tensors(found.to_tensors(), found.describe())
    assert np.array_equal(again.parts(), parts)
    bits = 5 * (17 if everywhere else 17 - salient)
    assert found.nbytes == -(-bits // 8) + (3 if salient else 0)


def naive(digits, scales, group, orders, base, means, columns, partition):
    """Return the values of an additive weight, weight by weight."""
    _, rows, d = digits.shape
    values = np.zeros((rows, d))
    parts = partition.parts() if partition else np.zeros((rows, d), int)
    splits = partition.variants() if partition else (1, 1)
    both = partition is not None and partition.columns is not None
    slots = [
        (kind, v, k)
        for kind in ((0, 1) if both else (0,))
        for v in range(splits[kind])
        for k in range(orders[kind])
    ]
    pairs = list(dict.fromkeys((kind, v) for kind, v, _ in slots))
    for i, j in np.ndindex(rows, d):
        kind, v = divmod(int(parts[i, j]), 2)
        if means is not None:
            values[i, j] = means[pairs.index((kind, v)), i, j // group]
        for k in range(orders[kind]):
            s = slots.index((kind, v, k))
            b = 2 * digits[k, i, j] - 1 if base == 2 else digits[k, i, j] - 1.0
            factor = columns[s, j] if columns is not None and len(columns) > 1 else 1
            values[i, j] += b * scales[s, i, j // group] * factor
        if columns is not None and len(columns) == 1:
            values[i, j] *= columns[0, j]
    return values


@pytest.mark.parametrize(
    ("orders", "base", "mean", "columns", "salient", "split"),
    [
        ((1, 1), 2, False, 0, 0, ""),
        ((2, 2), 3, True, 1, 0, ""),
        ((1, 2), 2, True, 0, 4, "others"),
        ((1, 2), 2, False, 6, 4, "all"),
        ((1, 3), 3, False, 4, 11, "rows"),
        ((4, 4), 2, True, 1, 0, "all"),
        ((2, 1), 2, True, 1, 3, "others"),
    ],
)
def test_an_additive_weight_is_its_formula_and_its_file(
    orders, base, mean, columns, salient, split
):
    generator = np.random.default_rng(1)
    rows, d, group = 3, 11, 4
    digits = generator.integers(0, base, (max(orders), rows, d))
    chosen = np.isin(np.arange(d), generator.permutation(d)[:salient])
    large = generator.random((rows, d)) < 0.5
    partition = None
    if split in ("others", "all"):
        partition = cq.Partition.of(chosen, large, everywhere=split == "all")
    elif split:
        partition = cq.Partition.of(chosen, rows=rows)
    splits = partition.variants() if partition else (1, 1)
    kinds = (0, 1) if salient else (0,)
    slots = sum(splits[k] * orders[k] for k in kinds)
    scales = generator.normal(size=(slots, rows, 3)).astype(np.float16)
    means = None
    if mean:
        means = generator.normal(size=(sum(splits[k] for k in kinds), rows, 3)).astype(np.float16)
    factors = generator.normal(size=(columns, d)).astype(np.float16) if columns else None
    coded = cq.Additive.of(
        digits,
        scales,
        group=group,
        orders=orders,
        base=base,
        means=means,
        column_scales=factors,
        partition=partition,
    )
    wanted = naive(digits, scales, group, orders, base, means, factors, partition)
    assert np.allclose(coded.dequantize(), wanted, atol=1e-5)
    again = cq.load_coded(*file_of(coded))
    assert np.array_equal(again.dequantize(), coded.dequantize())
    assert coded.bits_per_weight == 8 * coded.nbytes / (rows * d)
    for j in range(d):
        column = coded.rotated()[:, j]
        assert np.allclose(coded.quantize_column(column, j), column, atol=1e-6)


def test_frozen_scales_go_through_the_column_loop():
    W, H = layer(24, 60)
    for options in ({"order": 2}, {"bitmap": True, "mean": True, "salient": 0.2, "group": 16}):
        coded = cq.arb(W, np.eye(60), rotation=None, rounds=0, **options).weight
        nearest_loss = cq.reconstruction_loss(W, coded.dequantize(), H)
        values = ColumnProblem.of(W, H).run(coded)
        again = coded.encode(values)
        assert np.allclose(again.dequantize(), values, atol=1e-6)
        assert again.nbytes == coded.nbytes
        assert cq.reconstruction_loss(W, again.dequantize(), H) < nearest_loss
        kept = coded.encode(coded.dequantize())
        assert np.array_equal(kept.planes, coded.planes)
    with pytest.raises(cq.ShapeError, match="values must have shape"):
        coded.encode(W[:, :3])


def test_a_rotation_is_undone_last():
    W, _ = layer(8, 16)
    rotated = cq.block_hadamard(W, 8)
    coded = cq.Additive.of(
        (rotated > 0)[None], np.abs(rotated).mean(1).reshape(1, 8, 1), rotation=8
    )
    assert np.allclose(cq.block_hadamard(coded.dequantize(), 8), coded.rotated(), atol=1e-5)
    again = cq.load_coded(*file_of(coded))
    assert np.array_equal(again.dequantize(), coded.dequantize())


METHODS = {
    "billm": lambda W, H, **more: cq.billm(W, H, **more),
    "billm, published": lambda W, H, **more: cq.billm(W, H, published=True, **more),
    "arb": lambda W, H, **more: cq.arb(W, H, **more),
    "arb, published": lambda W, H, **more: cq.arb(W, H, published=True, **more),
    "two planes": lambda W, H, **more: cq.arb(W, H, order=2, group=16, rotation=None, **more),
    "ternary pairs": lambda W, H, **more: cq.arb(W, H, order=2, ternary=True, **more),
    "all bits": lambda W, H, **more: cq.arb(
        W, H, salient=0.3, bitmap=True, mean=True, group=32, rotation=4, **more
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_report_says_what_a_file_holds(name):
    W, H = layer(24, 60, dtype=np.float32)  # blocks of 128, 16, 32: the last is shorter
    kept = W.copy(), H.copy()
    result = METHODS[name](W, H, name="layer")
    assert result.report.bits_per_weight == 8 * result.nbytes / W.size == result.bits_per_weight
    again = cq.load_coded(*file_of(result.weight))
    assert np.array_equal(again.dequantize(), result.dequantize())
    loss = cq.reconstruction_loss(W, result.dequantize(), H)
    assert result.report.loss == pytest.approx(loss, rel=1e-5)
    assert 0 < loss < np.einsum("ij,jk,ik->", W, H, W) * 0.6
    assert result.report.name == "layer"
    assert np.array_equal(W, kept[0])
    assert np.array_equal(H, kept[1])
    same = METHODS[name](W, H)
    assert np.array_equal(same.dequantize(), result.dequantize())


@pytest.mark.parametrize("name", METHODS)
def test_dead_columns_and_rows_of_zeros(name):
    W, H = layer(12, 40)
    dead = [0, 5, 39]
    H[dead], H[:, dead] = 0, 0
    W[3] = 0
    result = METHODS[name](W, H)
    assert result.report.dead_columns == (0, 5, 39)
    assert np.isfinite(result.dequantize()).all()
    W[:, dead] *= 100  # what no input reaches has no say in the others' scales
    again = METHODS[name](W, H)
    if "published" not in name and again.weight.rotation == result.weight.rotation is None:
        assert again.report.loss == pytest.approx(result.report.loss, rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 130)])
def test_small_shapes(name, shape):
    if name == "all bits":
        shape = shape[0], 4 * shape[1]
    W, H = layer(*shape)
    result = METHODS[name](W, H)
    assert result.dequantize().shape == W.shape
    assert np.isfinite(result.dequantize()).all()
    file_of(result.weight)


@pytest.mark.parametrize("name", METHODS)
def test_extreme_inputs(name):
    W, H = layer(6, 24, tokens=5)
    plain = METHODS[name](W.astype(np.float32), H.astype(np.float32))
    for scale, unit in ((2.0**-60, 2.0**50), (2.0**60, 2.0**-70)):
        small, large = (W * scale).astype(np.float32), (H * unit).astype(np.float32)
        result = METHODS[name](small, large)
        assert np.array_equal(result.dequantize(), plain.dequantize() * np.float32(scale))
        wanted = plain.report.loss * scale**2 * unit
        assert result.report.loss == pytest.approx(wanted, rel=1e-4)
        assert result.report.damping.value == plain.report.damping.value * unit
    zero = METHODS[name](np.zeros_like(W), H)
    assert not zero.dequantize().any()
    nothing = METHODS[name](W, np.zeros_like(H))
    assert np.isfinite(nothing.dequantize()).all()
    x = np.ones(24)
    rank_one = METHODS[name](W, np.outer(x, x))
    assert np.isfinite(rank_one.dequantize()).all()


def test_all_columns_and_none_as_salient_ones():
    W, H = layer(16, 32)
    none = cq.arb(W, H, salient=0.0, rotation=None)
    every = cq.arb(W, H, salient=1.0, rotation=None)
    two = cq.arb(W, H, order=2, rotation=None)
    assert none.weight.partition is None
    assert every.weight.partition.salient().all()
    assert every.report.loss == pytest.approx(two.report.loss, rel=1e-6)
    losses = [cq.arb(W, H, salient=s, rotation=None).report.loss for s in (0, 0.25, 0.5, 1)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_turns_after_the_loop_never_raise_the_loss(order):
    W, H = layer(24, 60)
    for group in (16, None):
        form = Form(orders=(order, order), columns=True, mean=True, group=group)
        target = Target.of(Measured.of(W, H, None, None, "W"), group or 1, None, True)
        coding = Coding(target, form, np.zeros(60, bool))
        coding.start_columns()
        if group is None:
            coding.start(0, 60, target.values, np.diagonal(target.H), 10)
        coding.code(2)
        losses = [coding.loss()]
        for _ in range(5):
            coding.refine(1)
            losses.append(coding.loss())
        # What is stored is rounded to float16 in between.
        assert (np.diff(losses) < 1e-4 * losses[0]).all()
        assert losses[-1] < 0.95 * losses[0]
        weight = coding.weight(None).dequantize()
        back = np.argsort(target.order)
        values = np.ldexp(coding.values[:, back], target.scale)
        assert np.allclose(weight, values, atol=1e-5)


def test_what_is_better_than_published():
    W, H = layer(48, 256, tokens=2000)
    loss = {name: METHODS[name](W, H) for name in ("billm", "arb")}
    published = {name: METHODS[f"{name}, published"](W, H) for name in loss}
    assert loss["billm"].report.loss < 0.7 * published["billm"].report.loss
    assert loss["billm"].bits_per_weight <= published["billm"].bits_per_weight
    same = cq.arb(W, H, bitmap=True, group=128)
    assert same.report.loss < 0.7 * published["arb"].report.loss
    assert same.bits_per_weight < published["arb"].bits_per_weight
    assert published["billm"].bits_per_weight > 2.8


def test_a_rotation_takes_the_place_of_column_scales():
    generator = np.random.default_rng(0)
    W = generator.normal(size=(64, 128)) * np.exp(0.5 * generator.normal(size=128))

    def error(values, found):
        return np.square(values - found.values()).sum() / np.square(W).sum()

    turned = cq.block_hadamard(W, 128)
    assert error(turned, residual_planes(turned, 1)) < 0.38  # 1 - 2/π of normal weights is 0.363
    assert error(W, residual_planes(W, 1)) > 0.45
    assert error(W, row_column_planes(W, 1)) == pytest.approx(0.363, abs=0.03)


def test_the_rotation_is_chosen_by_the_loss():
    W, H = layer(24, 64)
    either = {size: cq.arb(W, H, rotation=size) for size in (None, 64)}
    chosen = cq.arb(W, H)
    least = min(either, key=lambda size: either[size].report.loss)
    assert chosen.weight.rotation == least
    assert chosen.report.loss == either[least].report.loss
    assert cq.arb(W[:, :33], H[:33, :33]).weight.rotation is None


@pytest.mark.parametrize("name", ["billm", "arb", "two planes"])
def test_correction_towards_the_float_network(name):
    generator = np.random.default_rng(0)
    W, _ = layer(16, 32)
    X = generator.normal(size=(500, 32)) @ generator.normal(size=(32, 32))
    seen = X + 0.3 * generator.normal(size=X.shape) * X.std(0)
    H, G = seen.T @ seen / 500, X.T @ seen / 500
    plain = METHODS[name](W, H).dequantize()
    corrected = METHODS[name](W, H, G=G)
    loss = cq.reconstruction_loss(W, corrected.dequantize(), H, G)
    assert corrected.report.loss == pytest.approx(loss, rel=1e-6)
    assert loss < cq.reconstruction_loss(W, plain, H, G)


def test_lack_of_tokens_is_compensated_for():
    W, H = layer(16, 32, tokens=8)
    assert cq.arb(W, H, tokens=8).report.shrinkage > 0.01
    assert cq.billm(W, H, tokens=10**6).report.shrinkage == 0


GOOD = layer(4, 8)


@pytest.mark.parametrize("method", [cq.billm, cq.arb])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"W": GOOD[0].tolist()}, TypeError, "W must be a numpy.ndarray"),
        ({"W": GOOD[0][0]}, cq.ShapeError, "W must be"),
        ({"W": np.zeros((0, 8))}, cq.ShapeError, "at least one weight"),
        ({"W": np.where(np.eye(4, 8) > 0, np.nan, 1.0)}, cq.NonFiniteError, "W must be finite"),
        ({"W": GOOD[0].astype(int)}, TypeError, "floating"),
        ({"H": GOOD[1][:7, :7]}, cq.ShapeError, "H of W must be"),
        ({"H": np.where(np.eye(8) > 0, np.inf, 1.0)}, cq.NonFiniteError, "H of W"),
        ({"H": -np.eye(8)}, cq.HessianError, "semidefinite"),
        ({"H": np.triu(np.ones((8, 8)))}, cq.HessianError, "symmetric"),
        ({"H": np.ones((8, 8)) - 0.999 * np.eye(8)}, cq.HessianError, "semidefinite"),
        ({"G": np.zeros((3, 3))}, cq.ShapeError, "G of W"),
        ({"damping": -1}, ValueError, "damping"),
        ({"tokens": -1}, ValueError, "tokens"),
    ],
)
def test_bad_input_is_refused(method, change, error, says):
    with pytest.raises(error, match=says):
        method(**{"W": GOOD[0], "H": GOOD[1], **change})


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"order": 0}, ValueError, "order must be at least 1"),
        ({"order": 5}, ValueError, "order must be at most 4"),
        ({"salient": 1.5}, ValueError, "salient must lie"),
        ({"salient": "a"}, TypeError, "salient must be a number"),
        ({"order": 4, "salient": 0.5}, ValueError, "salient must be 0"),
        ({"group": 0}, ValueError, "group"),
        ({"rotation": 3}, cq.BlockSizeError, "rotation must divide d=8"),
        ({"rotation": "best"}, ValueError, "rotation must be"),
        ({"rounds": -1}, ValueError, "rounds"),
        ({"published": True, "order": 2}, ValueError, "other options, got order"),
        ({"published": True, "G": GOOD[1]}, ValueError, "other options, got G"),
    ],
)
def test_bad_options_of_arb_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        cq.arb(*GOOD, **options)


def test_bad_options_of_billm_are_refused():
    with pytest.raises(ValueError, match="block must be at least 1"):
        cq.billm(*GOOD, block=0)
    with pytest.raises(ValueError, match="G must be None"):
        cq.billm(*GOOD, published=True, G=GOOD[1])


def test_additive_refuses_what_does_not_fit():
    digits, scales = np.ones((1, 2, 4), bool), np.ones((1, 2, 1))
    with pytest.raises(cq.ShapeError, match="digits must be"):
        cq.Additive.of(np.ones((5, 2, 4), bool), scales)
    with pytest.raises(ValueError, match="digits must lie"):
        cq.Additive.of(np.full((1, 2, 4), 2), scales)
    with pytest.raises(cq.ShapeError, match="row_scales must have shape"):
        cq.Additive.of(digits, scales, group=2)
    with pytest.raises(cq.ShapeError, match="means must have shape"):
        cq.Additive.of(digits, scales, means=np.ones((2, 2, 1)))
    with pytest.raises(cq.ShapeError, match="column_scales must have shape"):
        cq.Additive.of(digits, scales, column_scales=np.ones((1, 3)))
    with pytest.raises(ValueError, match="scales must be at most"):
        cq.Additive.of(digits, scales * 1e9)
    with pytest.raises(ValueError, match="base must be 2 or 3"):
        cq.Additive.of(digits, scales, base=4)
    with pytest.raises(cq.ShapeError, match="partition must have the shape"):
        cq.Additive.of(digits, scales, partition=cq.Partition.of(np.ones(3, bool), rows=2))
    with pytest.raises(TypeError, match="rows must be"):
        cq.Partition.of(np.ones(3, bool))
    with pytest.raises(cq.ShapeError, match="large must have 3 columns"):
        cq.Partition.of(np.ones(3, bool), np.ones((2, 4), bool))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2]},
        {"group": 0},
        {"orders": [1]},
        {"orders": [1, 9]},
        {"base": 5},
        {"exponent": "x"},
        {"rotation": 0},
        {"shape": [2, 5]},
        {"kind": "unheard of"},
    ],
)
def test_damaged_descriptions_are_refused(change):
    coded = cq.Additive.of(np.ones((1, 2, 4), bool), np.ones((1, 2, 1)))
    tensors, said = coded.to_tensors(), coded.describe()
    with pytest.raises(cq.CheckpointError):
        cq.load_coded(tensors, {**said, **change})


def test_damaged_tensors_are_refused():
    coded = cq.Additive.of(np.ones((1, 2, 40), int), np.ones((1, 2, 1)), base=3)
    tensors, said = coded.to_tensors(), coded.describe()
    for name in tensors:
        with pytest.raises(cq.CheckpointError, match=name):
            cq.load_coded({n: a for n, a in tensors.items() if n != name}, said)
        with pytest.raises(cq.CheckpointError, match=name):
            cq.load_coded({**tensors, name: tensors[name][:-1]}, said)
    with pytest.raises(cq.CheckpointError, match="below 243"):
        cq.load_coded({**tensors, "planes": tensors["planes"] | 255}, said)
