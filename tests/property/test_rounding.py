"""Adaptive rounding against its definitions, written naively, and what it must not depend on."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import corequant as cq
from corequant._cpu.loops.columns import nearest_level
from corequant.formats import FormatKind, formats
from corequant.rounding.loop import column_grid

SPECS = (
    "int4:channel",
    "int2:channel:mse",
    "int3:channel:asymmetric",
    "uint4:channel:asymmetric",
    "int8:tensor",
    "int4:group8",
    "int4:group8:asymmetric:mse",
    "e2m1:channel",
    "e3m2:group16",
    "float8_e4m3fnuz:channel",
    "nf4:group16",
    "codebook(-1,-0.25,0.25,1):channel",
    "mxfp4",
    "mxint8",
    "nvfp4",
    "nvfp4:four_over_six",
)


def layer(seed, rows=24, d=64, tokens=400, noise=0.3, dtype=np.float64):
    """Return W, X and X̃: correlated inputs, and the same with errors."""
    generator = np.random.default_rng(seed)
    mix = np.eye(d) + 0.4 * generator.normal(size=(d, d)) / np.sqrt(d)
    x = (generator.normal(size=(tokens, d)) * np.exp(generator.normal(0, 0.5, d))) @ mix
    q = x + noise * generator.normal(size=x.shape) * x.std(0)
    W = generator.normal(size=(rows, d))
    return W.astype(dtype), x.astype(dtype), q.astype(dtype)


def moments(x, q):
    return q.T @ q / len(q), x.T @ q / len(q)


def methods(W, H, G, spec, **options):
    return {
        "gptq": cq.gptq(W, H, spec, **options),
        "gpfq": cq.gpfq(W, H, G, spec, **options),
        "qronos": cq.qronos(W, H, G, spec, **options),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("act_order", [True, False])
def test_diagonal_moments_give_round_to_nearest(spec, act_order, dtype):
    generator = np.random.default_rng(3)
    W = generator.normal(size=(48, 64)).astype(dtype)
    W[0, :32], W[1, 5], W[2, 7] = 0, -0.0, 1e3
    H = np.diag(np.exp(generator.normal(0, 2, 64))).astype(dtype)
    wanted = cq.round_to_nearest(W, spec)
    for name, found in methods(W, H, H, spec, act_order=act_order).items():
        np.testing.assert_array_equal(found.codes, wanted.codes, err_msg=name)
        np.testing.assert_array_equal(found.scales, wanted.scales, err_msg=name)
        assert found.report.loss == found.report.nearest_loss


NUMBERS = [f for f in formats.values() if f.kind is not FormatKind.POWER]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", NUMBERS, ids=[f.name for f in NUMBERS])
def test_the_column_grid_rounds_as_quantize_does(form, dtype):
    grid, values = column_grid(form, np.dtype(dtype)), form.finite_values
    edges = ((values[1:] + values[:-1]) / 2).astype(dtype)
    x = np.concatenate(
        [
            values.astype(dtype),
            edges,
            np.nextafter(edges, dtype(-np.inf)),
            np.nextafter(edges, dtype(np.inf)),
            np.random.default_rng(0).normal(size=200).astype(dtype) * dtype(values[-1]),
            dtype([1e30, -1e30, 1e-30, -1e-30, 0, -0.0]),
        ]
    )
    # Integers are numbers times 2**-fraction_bits, and the loop divides by that with the scale.
    unit = dtype(2.0**-form.fraction_bits)
    spec = cq.QuantSpec(form, "tensor")
    ones = np.ones((1, 1), dtype)
    wanted = cq.dequantize(cq.quantize(x[None], spec, ones))[0]
    found = np.array([nearest_level(v / unit, dtype(0), grid) for v in x]) * unit
    np.testing.assert_array_equal(found, wanted)


def rounder(spec, W):
    """Return a function that rounds column j of W's grid."""
    q = cq.quantize(W, spec)
    length = q.spec.group_size or W.shape[1]
    zeros = np.zeros_like(q.scales) if q.zero_points is None else q.zero_points.astype(float)
    single = cq.QuantSpec(q.spec.format, "channel", symmetric=q.spec.symmetric)

    def call(v, j):
        scale, zero = q.scales[:, [j // length]], zeros[:, [j // length]]
        codes = None if q.zero_points is None else zero.astype(q.codes.dtype)
        return cq.dequantize(cq.quantize(v[:, None], single, scale, codes))[:, 0]

    return call


def textbook_gptq(W, H, spec, order, P=None):
    """GPTQ's algorithm 1: the rows of the upper factor of the inverse, in the given order."""
    near, Q, w = rounder(spec, W), np.empty_like(W), W[:, order].copy()
    U = np.linalg.cholesky(np.linalg.inv(H[np.ix_(order, order)])).T
    if P is not None:
        gap = P[np.ix_(order, order)]
        P = 0.25 * np.triu(gap @ U.T, 1) @ U
    for i, j in enumerate(order):
        now = w[:, i].copy()
        Q[:, j] = near(now, j)
        w[:, i:] -= np.outer((now - Q[:, j]) / U[i, i], U[i, i:])
        if P is not None:
            w[:, i:] += np.outer(now, P[i, i:])
    return Q


def naive_qronos(W, x, q, spec, order):
    """Alternate between the best next number and the best values of all that come after it."""
    near, Q, V = rounder(spec, W), np.zeros_like(W), W.copy()
    target = x @ W.T
    for i, j in enumerate(order):
        done, later = order[:i], order[i + 1 :]
        rest = target - q[:, done] @ Q[:, done].T - q[:, later] @ V[:, later].T
        Q[:, j] = near(q[:, j] @ rest / (q[:, j] @ q[:, j]), j)
        rest = target - q[:, order[: i + 1]] @ Q[:, order[: i + 1]].T
        if len(later):
            V[:, later] = np.linalg.lstsq(q[:, later], rest, rcond=None)[0].T
    return Q


def naive_gpfq(W, x, q, spec, order):
    """Follow the path of partial sums of x with those of the quantized inputs."""
    near, Q = rounder(spec, W), np.zeros_like(W)
    u = np.zeros((len(x), len(W)))
    for j in order:
        u += np.outer(x[:, j], W[:, j])
        Q[:, j] = near(q[:, j] @ u / (q[:, j] @ q[:, j]), j)
        u -= np.outer(q[:, j], Q[:, j])
    return Q


def by_energy(H):
    return np.argsort(-np.diagonal(H), kind="stable")


@pytest.mark.parametrize("spec", ["int4:channel", "int3:group8:asymmetric", "e2m1:channel", "nf4"])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_and_gptaq_are_their_algorithms(spec, seed):
    W, x, q = layer(seed)
    H, G = moments(x, q)
    order = by_energy(H)
    damped = H + 0.01 * np.diagonal(H).mean() * np.eye(len(H))
    wanted = textbook_gptq(W, damped, spec, order)
    np.testing.assert_allclose(cq.dequantize(cq.gptq(W, H, spec)), wanted, rtol=0, atol=1e-12)
    natural = textbook_gptq(W, damped, spec, np.arange(len(H)))
    found = cq.gptq(W, H, spec, act_order=False)
    np.testing.assert_allclose(cq.dequantize(found), natural, rtol=0, atol=1e-12)
    assert (natural != wanted).any()
    wanted = textbook_gptq(W, damped, spec, order, G - H)
    found = cq.gptq(W, H, spec, G=G)
    assert found.report.method == "gptaq"
    np.testing.assert_allclose(cq.dequantize(found), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    # Not int3 by absmax, which puts the largest magnitude of each group on a tie.
    "spec",
    ["int3:group8:mse", "int4:group8:asymmetric:mse", "mxfp4", "nvfp4"],
)
@pytest.mark.parametrize("act_order", [True, False])
def test_refitted_scales_are_those_of_the_weights_on_entering_a_group(spec, act_order):
    W, x, q = layer(21, d=96)
    H, _ = moments(x, q)
    parsed = cq.QuantSpec.parse(spec)
    size = parsed.group_size
    groups = np.arange(96).reshape(-1, size)
    if act_order:
        groups = groups[by_energy(np.diag(np.diagonal(H)[groups].mean(1)))]
        groups = np.array([g[by_energy(H[np.ix_(g, g)])] for g in groups])
    order = groups.reshape(-1)
    damped = (H + 0.01 * np.diagonal(H).mean() * np.eye(96))[np.ix_(order, order)]
    U = np.linalg.cholesky(np.linalg.inv(damped)).T
    shared = cq.choose_global_scale(W, spec) if spec == "nvfp4" else None
    w, Q = W[:, order].copy(), np.empty_like(W)
    for i, j in enumerate(order):
        if i % size == 0:
            entering = np.ascontiguousarray(w[:, i : i + size])
            scales = cq.choose_qparams(entering, spec, global_scale=shared)
        block = np.repeat(w[:, [i]], size, axis=1)
        rounded = cq.quantize(block, spec, *scales, global_scale=shared)
        Q[:, j] = cq.dequantize(rounded)[:, 0]
        w[:, i:] -= np.outer((w[:, i] - Q[:, j]) / U[i, i], U[i, i:])
    found = cq.gptq(W, H, spec, act_order=act_order, refit=True)
    np.testing.assert_allclose(cq.dequantize(found), Q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("spec", ["int4:channel", "int3:group8:asymmetric", "e2m1:channel"])
@pytest.mark.parametrize("seed", range(3))
def test_efficient_qronos_is_alternating_least_squares(spec, seed):
    W, x, q = layer(seed, d=32)
    H, G = moments(x, q)
    found = cq.qronos(W, H, G, spec, damping=0)
    wanted = naive_qronos(W, x, q, spec, by_energy(H))
    np.testing.assert_allclose(cq.dequantize(found), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", ["int4:channel", "int3:group8:asymmetric", "e2m1:channel"])
@pytest.mark.parametrize("seed", range(3))
def test_gpfq_follows_the_path(spec, seed):
    W, x, q = layer(seed)
    found = cq.gpfq(W, *moments(x, q), spec)
    wanted = naive_gpfq(W, x, q, spec, by_energy(moments(x, q)[0]))
    np.testing.assert_allclose(cq.dequantize(found), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_qronos_with_equal_inputs_is_gptq(spec, dtype):
    W, x, _ = layer(7, d=192, dtype=dtype)
    H, _ = moments(x, x)
    wanted = cq.gptq(W, H, spec, damping=0)
    found = cq.qronos(W, H, H, spec, damping=0)
    np.testing.assert_array_equal(found.codes, wanted.codes)
    assert (wanted.codes != cq.round_to_nearest(W, spec).codes).any()


@pytest.mark.parametrize("spec", ["int4:channel", "mxfp4", "nf4:group16"])
def test_gpfq_is_qronos_on_orthogonal_inputs(spec):
    generator = np.random.default_rng(5)
    basis = np.linalg.qr(generator.normal(size=(300, 128)))[0]
    q = basis[:, :64] * np.exp(generator.normal(0, 1, 64))
    # The float inputs: others lengths, and parts that no quantized input sees.
    x = q * (1 + 0.2 * generator.normal(size=64)) + basis[:, 64:]
    W = generator.normal(size=(32, 64))
    H, G = moments(x, q)
    found = cq.gpfq(W, H, G, spec)
    np.testing.assert_array_equal(found.codes, cq.qronos(W, H, G, spec, damping=0).codes)
    assert (found.codes != cq.round_to_nearest(W, spec).codes).any()


@given(
    seed=st.integers(0, 2**16),
    d=st.sampled_from([8, 40, 136, 264]),
    tokens=st.integers(1, 600),
    spec=st.sampled_from(["int4:channel", "int3:group8:asymmetric", "e2m1:channel", "int2:tensor"]),
)
@settings(max_examples=25, deadline=None)
def test_rounding_lowers_the_objective_and_reports_it(seed, d, tokens, spec):
    W, x, q = layer(seed, rows=64, d=d, tokens=tokens)
    H, G = moments(x, q)
    floor = np.square((x - q) @ W.T).sum() / tokens
    for name, found in methods(W, H, G, spec).items():
        cross = None if name == "gptq" else G
        report = found.report
        assert report.method == name
        assert report.loss == pytest.approx(cq.reconstruction_loss(W, found, H, cross))
        Q = cq.dequantize(found)
        error = np.square((q if cross is None else x) @ W.T - q @ Q.T).sum() / tokens
        wanted = report.loss + (0 if cross is None else floor)
        assert wanted == pytest.approx(error, rel=1e-6, abs=1e-9)
        if name == "gptq" and d < tokens:
            assert report.loss <= report.nearest_loss * 1.02


@pytest.mark.parametrize("name", ["gptq", "gpfq", "qronos", "gptaq"])
def test_rows_do_not_depend_on_each_other_nor_inputs_change(name):
    W, x, q = layer(11, rows=40, d=200)
    H, G = moments(x, q)

    def run(W, H, G):
        calls = {
            "gptq": lambda: cq.gptq(W, H, "int4:group8"),
            "gptaq": lambda: cq.gptq(W, H, "int4:group8", G=G),
            "gpfq": lambda: cq.gpfq(W, H, G, "int4:group8"),
            "qronos": lambda: cq.qronos(W, H, G, "int4:group8"),
        }
        return calls[name]().codes

    wanted = run(W, H, G)
    np.testing.assert_array_equal(run(W[:7], H, G), wanted[:7])
    kept = [a.copy() for a in (W, H, G)]
    for a in (W, H, G):
        a.flags.writeable = False
    np.testing.assert_array_equal(run(W, H, G), wanted)
    for change in (
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: a.astype(a.dtype.newbyteorder(">")),
    ):
        np.testing.assert_array_equal(run(*map(change, (W, H, G))), wanted)
    for a, b in zip(kept, (W, H, G), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("splits", [[100], [1, 7, 399], [200, 201]])
def test_grouping_tokens_in_other_batches_changes_nothing(splits):
    W, x, _ = layer(13)

    def gram(parts):
        stats = cq.ActivationStats(64, gram=True, dtype=np.float64)
        for part in parts:
            stats.update(part)
        return stats.gram

    wanted = cq.gptq(W, gram([x]), "int4:channel")
    found = cq.gptq(W, gram(np.split(x, splits)), "int4:channel")
    np.testing.assert_array_equal(found.codes, wanted.codes)


_PROGRAM = """
import hashlib, numpy as np, corequant as cq
from corequant._cpu import threads
threads.processor_count = lambda: 3
generator = np.random.default_rng(0)
x = generator.normal(size=(900, 700)).astype(np.float32)
x[:, 1:] += x[:, :-1] / 2
q = x + generator.normal(size=x.shape).astype(np.float32) / 10
# Written out, so that the moments themselves don't depend on the threads of a matrix product.
H, G = (np.einsum("ti,tj->ij", a, q, optimize=False) / np.float32(900) for a in (q, x))
W = generator.normal(size=(500, 700)).astype(np.float32)
h = hashlib.sha256()
for found in (
    cq.gptq(W, (H + H.T) / 2, "int4:channel"),
    cq.gpfq(W, H, G, "e2m1:group20"),
    cq.qronos(W, H, G, "int4:channel", accumulator=cq.AccumulatorSpec(16, 100)),
):
    h.update(found.codes.tobytes())
print(h.hexdigest())
"""


def test_the_same_codes_whatever_the_number_of_threads():
    digests = set()
    for threads in ("1", "2", "3"):
        names = ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            env={**os.environ, **dict.fromkeys(names, threads)},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout)
    assert len(digests) == 1
