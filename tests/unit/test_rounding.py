"""Arguments of the adaptive methods, bad input, and what the report says."""

from __future__ import annotations

import dataclasses
import re
import warnings

import numpy as np
import pytest

import corequant as cq
from corequant.rounding.eigenvalues import largest_eigenvalue
from corequant.rounding.hessian import Factor, column_order
from tests.property.test_rounding import layer, methods, moments

SPEC = "int4:channel"


@pytest.fixture(name="problem")
def make_problem():
    W, x, q = layer(0)
    return W, *moments(x, q)


def each(W, H, G, **options):
    yield lambda: cq.gptq(W, H, SPEC, **options)
    yield lambda: cq.gptq(W, H, SPEC, G=G, **options)
    yield lambda: cq.gpfq(W, H, G, SPEC, **options)
    yield lambda: cq.qronos(W, H, G, SPEC, **options)
    yield lambda: cq.learned_rounding(W, H, SPEC, G=G, steps=2, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_arrays_are_named(problem, value):
    W, H, G = problem
    for k, name in enumerate(("W", "H of layers.3.q", "G of layers.3.q")):
        arrays = [a.copy() for a in (W, H, G)]
        arrays[k][2, 5] = value
        for n, call in enumerate(each(*arrays, name="layers.3.q")):
            if k == 2 and n == 0:
                continue
            with pytest.raises(cq.NonFiniteError, match=f"^{name} must be finite.*2, 5"):
                call()


def test_matrices_that_are_no_moments_are_refused(problem):
    W, H, G = problem
    skew, negative, indefinite = H.copy(), H.copy(), H.copy()
    skew[3, 7] += 0.5
    negative[4, 4] = -1
    indefinite[1, 2] = indefinite[2, 1] = 2 * np.sqrt(H[1, 1] * H[2, 2])
    for wrong, message in (
        (skew, r"fc must be symmetric.*\(3, 7\)"),
        (negative, r"fc must be positive semidefinite.*\(4, 4\)"),
        (indefinite, r"fc must be positive semidefinite.*\(1, 2\)"),
    ):
        for call in each(W, wrong, G, name="fc"):
            with pytest.raises(cq.HessianError, match=message):
                call()


def test_an_indefinite_matrix_ends_in_an_error_not_in_round_to_nearest():
    W = np.random.default_rng(0).normal(size=(4, 9))
    # Every pair is consistent, all together are not: the smallest eigenvalue is -6.2.
    H = np.full((9, 9), -0.9) + 1.9 * np.eye(9)
    assert np.linalg.eigvalsh(H)[0] < -6
    for call in (lambda: cq.gptq(W, H, SPEC, name="fc"), lambda: cq.qronos(W, H, H, SPEC)):
        with pytest.raises(cq.HessianError, match="Cholesky failed .* times"):
            call()


def test_shapes_and_types_are_checked(problem):
    W, H, G = problem
    for call in each(W, H[:-1, :-1], G):
        with pytest.raises(cq.ShapeError, match=r"\(d, d\) with d=64.*\(63, 63\)"):
            call()
    for call in list(each(W, H, G[:, :-1]))[1:]:
        with pytest.raises(cq.ShapeError, match="G of W"):
            call()
    with pytest.raises(TypeError, match="H must be a numpy"):
        cq.gptq(W, H.tolist(), SPEC)
    with pytest.raises(TypeError, match="real floating dtype"):
        cq.gptq(W, H.astype(int), SPEC)
    for method in (cq.gpfq, cq.qronos):
        with pytest.raises(TypeError, match="G must be"):
            method(W, H, None, SPEC)
    for wrong in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="damping must be finite"):
            cq.gptq(W, H, SPEC, damping=wrong)
    with pytest.raises(ValueError, match="dtype must be float32 or float64"):
        cq.gptq(W, H, SPEC, dtype=np.float16)
    with pytest.raises(cq.BlockSizeError, match="group_size must divide d=64, got 48"):
        cq.gptq(W, H, "int4:group48")
    with pytest.raises(ValueError, match="refit needs a spec with groups"):
        cq.gptq(W, H, SPEC, refit=True)
    with pytest.raises(ValueError, match="objective must be one of adaround, signround"):
        cq.learned_rounding(W, H, SPEC, objective="adam")


def test_g_must_belong_to_h(problem):
    W, H, G = problem
    H, G = H.copy(), G.copy()
    H[5], H[:, 5] = 0, 0
    for method in (cq.gpfq, cq.qronos):
        with pytest.raises(cq.HessianError, match="G of W must be zero .* column 5"):
            method(W, H, G, SPEC)


def test_dead_columns_are_rounded_to_nearest_and_reported():
    W, x, q = layer(1)
    x[:, [3, 40]] = q[:, [3, 40]] = 0
    H, G = moments(x, q)
    nearest = cq.round_to_nearest(W, SPEC).codes
    for name, found in methods(W, H, G, SPEC).items():
        assert found.report.dead_columns == (3, 40), name
        np.testing.assert_array_equal(found.codes[:, [3, 40]], nearest[:, [3, 40]])
        assert (found.codes != nearest).any()
        assert found.report.loss < found.report.nearest_loss
    live = np.delete(np.arange(64), [3, 40])
    alone = cq.gptq(W[:, live], H[np.ix_(live, live)], SPEC)
    scales = cq.gptq(W, H, SPEC).scales
    same = np.flatnonzero((alone.scales == scales)[:, 0])
    kept = cq.gptq(W, H, SPEC).codes[:, live]
    assert len(same) > 10
    np.testing.assert_array_equal(kept[same], alone.codes[same])


@pytest.mark.parametrize("rows", [0, 1])
def test_inputs_that_reached_nothing_leave_round_to_nearest(rows):
    """Padding only, or an expert without tokens: every column is dead, and said to be."""
    W = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    stats = cq.ActivationStats(8, gram=True)
    if not rows:
        with pytest.raises(cq.CalibrationError, match="seen no tokens"):
            _ = stats.gram
    H = stats.update(np.zeros((1, 8), np.float32)).gram
    for found in methods(W, H, H, SPEC).values():
        np.testing.assert_array_equal(found.codes, cq.round_to_nearest(W, SPEC).codes)
        assert found.report.dead_columns == tuple(range(8))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_channels(dtype, tokens):
    W, x, q = layer(3, tokens=tokens, dtype=dtype)
    H, G = moments(x, q)
    for given in (tokens, None):
        for name, found in methods(W, H, G, SPEC, tokens=given).items():
            assert np.isfinite(cq.dequantize(found)).all()
            assert found.report.shrinkage > 0.1, name
            # The report is about the moments that were given.
            cross = None if name == "gptq" else G
            loss = cq.reconstruction_loss(W, cq.dequantize(found), H, cross)
            assert found.report.loss == pytest.approx(loss)
    for name, found in methods(W, H, G, SPEC, tokens=10**9).items():
        assert not found.report.shrinkage
        assert found.report.loss < found.report.nearest_loss, name
    bare = cq.gptq(W, H, SPEC, damping=0, tokens=10**9)
    assert bare.report.damping.tries > 1
    assert bare.report.damping.value > 0
    assert bare.report.loss < bare.report.nearest_loss


def test_one_token_is_round_to_nearest():
    W, x, q = layer(3, tokens=1, dtype=np.float32)
    H, G = moments(x, q)
    nearest = cq.round_to_nearest(W, SPEC)
    steps = W.astype(np.float64) / nearest.scales
    # A row's largest weight lies in the middle between two codes, and may take either.
    tied = np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 1e-5
    found = [*methods(W, H, G, SPEC, tokens=1).values()]
    found.append(cq.learned_rounding(W, H, SPEC, G=G, tokens=1))
    for one in found:
        np.testing.assert_array_equal(one.codes[~tied], nearest.codes[~tied])


def test_constant_activations():
    W = np.random.default_rng(0).normal(size=(16, 32))
    H = np.full((32, 32), 4.0)
    for found in methods(W, H, H, SPEC, tokens=10_000).values():
        assert found.report.loss < 0.1 * found.report.nearest_loss


@pytest.mark.parametrize("tokens", [-1, 1.5, True, "many"])
def test_numbers_of_tokens_are_checked(tokens, problem):
    with pytest.raises((TypeError, ValueError), match="tokens must be"):
        cq.gptq(*problem[:2], SPEC, tokens=tokens)


def test_extreme_magnitudes():
    W, x, q = layer(5, dtype=np.float32)
    H, G = moments(x, q)
    wanted = {name: found.codes for name, found in methods(W, H, G, SPEC).items()}
    for factor in (np.float32(2.0**-60), np.float32(2.0**60)):
        for name, found in methods(W, H * factor, G * factor, SPEC).items():
            np.testing.assert_array_equal(found.codes, wanted[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for method in (cq.gpfq, cq.qronos):
            with pytest.raises(cq.NonFiniteError, match="adjusted for rounding errors"):
                method(W * np.float32(1e38), H * 1e2, G * 1e2, SPEC, losses=False)


def test_empty_weights():
    H = np.eye(4)
    for W in (np.empty((0, 4)),):
        for found in methods(W, H, H, SPEC, losses=False).values():
            assert found.codes.shape == W.shape


def test_impossible_accumulators_are_refused(problem):
    W, H, G = problem
    for spec, message in (
        (cq.AccumulatorSpec(8, 16, "int8"), "leave room for one weight of 1: int8 reaches 128"),
        (cq.AccumulatorSpec(8, 16, "uint8"), "uint8 reaches 255, got 8 bits, which hold ±127"),
    ):
        for call in list(each(W, H, G, accumulator=spec))[:-1:2]:
            with pytest.raises(cq.AccumulatorError, match=re.escape(message)):
                call()
    for tile, text in ((24, "int4:group16"), (None, "int4:group16"), (32, "mxfp4:search")):
        spec = cq.AccumulatorSpec(16, tile, "int8")
        if text == "mxfp4:search":
            assert cq.gptq(W, H, text, accumulator=spec).report.bounded_share is not None
            continue
        with pytest.raises(cq.AccumulatorError, match="tile must divide the group size 16"):
            cq.gptq(W, H, text, accumulator=spec)
        with pytest.raises(cq.AccumulatorError, match="tile must divide"):
            cq.certify(cq.round_to_nearest(W, text), spec)
    with pytest.raises(cq.SpecError, match="multiples of one step, got nf4"):
        cq.gptq(W, H, "nf4:channel", accumulator=cq.AccumulatorSpec(16))
    with pytest.raises(cq.AccumulatorError, match="bits must be 3 to 48, got 2"):
        cq.AccumulatorSpec(2)
    with pytest.raises(TypeError, match="activation must be"):
        cq.AccumulatorSpec(16, None, 8)
    with pytest.raises(TypeError, match="accumulator must be an AccumulatorSpec"):
        cq.gptq(W, H, SPEC, accumulator=16)
    with pytest.raises(TypeError, match="integer array, got float64"):
        cq.certify(W, cq.AccumulatorSpec(16))


def test_given_scales_are_used_and_not_changed(problem):
    W, H, G = problem
    scales, zeros = cq.choose_qparams(W, "int4:group16:asymmetric")
    kept = scales.copy(), zeros.copy()
    for found in methods(
        W, H, G, "int4:group16:asymmetric", scales=scales * 2, zero_points=zeros
    ).values():
        np.testing.assert_array_equal(found.scales, kept[0] * 2)
        np.testing.assert_array_equal(found.zero_points, kept[1])
    with pytest.raises(cq.ShapeError, match="scales must have shape"):
        cq.gptq(W, H, SPEC, scales=scales)


@pytest.mark.parametrize("spec", ["int3:group16", "int3:group16:asymmetric:mse", "mxfp4", "nvfp4"])
def test_refitted_scales_lower_the_objective(spec):
    W, x, q = layer(9, rows=64, d=128, tokens=1000)
    H, G = moments(x, q)
    for act_order in (True, False):
        for found in methods(W, H, G, spec, act_order=act_order, refit=True).values():
            plain = cq.choose_qparams(W, spec, global_scale=found.global_scale)[0]
            assert (found.scales != plain).any()
            assert found.report.loss < found.report.nearest_loss


def test_float64_on_request(problem):
    W, H, G = (a.astype(np.float32) for a in problem)
    for name in ("gptq", "gpfq", "qronos"):
        wide = methods(W, H, G, SPEC, dtype=np.float64)[name]
        assert wide.scales.dtype == np.float32
        narrow = methods(W, H, G, SPEC)[name]
        assert wide.report.loss == pytest.approx(narrow.report.loss, rel=0.02, abs=0.05)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights(problem, dtype):
    import ml_dtypes

    W, H, G = problem
    half = W.astype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    for found in methods(half, H, G, SPEC).values():
        assert found.scales.dtype == np.float32
        assert found.report.loss < found.report.nearest_loss


def test_the_order_of_columns():
    diagonal, dead = np.array([1.0, 4, 4, 0, 9, 2]), np.array([0, 0, 0, 1, 0, 0], bool)
    np.testing.assert_array_equal(column_order(diagonal, dead, True, 0)[::-1], [4, 1, 2, 5, 0, 3])
    np.testing.assert_array_equal(column_order(diagonal, dead, False, 0)[::-1], range(6))
    np.testing.assert_array_equal(column_order(diagonal, dead, True, 2)[::-1], [4, 5, 1, 0, 2, 3])


@pytest.mark.parametrize("d", [1, 5, 128, 129, 300])
def test_the_factor_and_its_solves(d):
    generator = np.random.default_rng(d)
    x = generator.normal(size=(2 * d, d))
    A = x.T @ x
    factor = Factor.of(A.copy())
    np.testing.assert_allclose(factor.L, np.linalg.cholesky(A), rtol=1e-9, atol=1e-9)
    B = generator.normal(size=(7, d))
    np.testing.assert_allclose(factor.forward(B.copy()) @ factor.L.T, B, atol=1e-8)
    np.testing.assert_allclose(factor.backward(B.copy()) @ factor.L, B, atol=1e-8)
    A[0, 0] = -1
    assert Factor.of(A) is None


def test_the_largest_eigenvalue():
    x = np.random.default_rng(0).normal(size=(300, 40)) * np.arange(1, 41)
    H = x.T @ x
    assert largest_eigenvalue(H) == pytest.approx(np.linalg.eigvalsh(H)[-1], rel=1e-3)
    assert largest_eigenvalue(np.zeros((3, 3))) == 0
    assert largest_eigenvalue(np.eye(5)) == pytest.approx(1)
    # Its eigenvector is orthogonal to the row sums of magnitudes.
    opposed = np.array([[1, -0.9], [-0.9, 1]])
    assert largest_eigenvalue(opposed) == pytest.approx(1.9)
    rotated = cq.merge_rotation(np.diag([1e-4] * 5 + [1.0] + [1e-4] * 58), None, side="input")
    H = rotated.T @ rotated
    assert largest_eigenvalue(H) == pytest.approx(1, rel=1e-6)
    weights = cq.magr(np.array([[1.0, 0.2]]), opposed, alpha=0.02, steps=300)
    assert np.abs(weights).max() <= 1


@pytest.mark.parametrize("d", [1, 2, 3, 64])
def test_the_largest_of_equal_eigenvalues(d):
    half = np.diag(np.arange(d) % 2 == 0).astype(float)
    turned = np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))[0]
    for H in (np.eye(d), half, turned @ half @ turned.T, np.full((d, d), 1 / d)):
        found = largest_eigenvalue(H)
        assert found == pytest.approx(1, rel=1e-6)
        assert largest_eigenvalue(H) == found
    assert largest_eigenvalue(np.zeros((d, d))) == 0


@pytest.mark.parametrize(("spec", "bits"), [("e2m1:channel", 14), ("int8:channel", 16)])
def test_float32_weights_keep_within_accumulators(spec, bits):
    generator, accumulator = np.random.default_rng(0), cq.AccumulatorSpec(bits, 64, "int8")
    W = generator.normal(size=(2048, 512)).astype(np.float32)
    H = np.eye(512, dtype=np.float32)
    for rounded in (
        cq.gptq(W, H, spec, accumulator=accumulator),
        cq.gpfq(W, H, H, spec, accumulator=accumulator),
        cq.qronos(W, H, H, spec, accumulator=accumulator),
    ):
        found = cq.certify(rounded, accumulator)
        assert found.safe
        assert found.largest > 0.9 * accumulator.limit


def test_gpfq_always_diffuses(problem):
    W, H, G = problem
    given = (cq.AccumulatorSpec(9, None, "int4", diffuse) for diffuse in (True, False))
    one, other = (cq.gpfq(W, H, G, "int4:channel", accumulator=a).codes for a in given)
    np.testing.assert_array_equal(one, other)


def test_certificates_of_huge_integers_are_exact():
    for codes in (np.array([[2**62] * 4]), np.array([[2**63] * 2], np.uint64)):
        found = cq.certify(codes, cq.AccumulatorSpec(16))
        assert not found.safe
        assert found.largest == sum(map(int, codes[0])) * 128


def test_losses_of_other_shapes_are_refused():
    with pytest.raises(cq.ShapeError, match=r"must have W's shape \(2, 2\), got \(1, 2\)"):
        cq.reconstruction_loss(np.ones((2, 2)), np.ones((1, 2)), np.eye(2))


def test_a_rounded_tensor_is_a_quantized_tensor(problem):
    W, H, _ = problem
    found = cq.gptq(W, H, SPEC, name="layers.0.up")
    assert isinstance(found, cq.QuantizedTensor)
    assert found.report.name == "layers.0.up"
    assert found.report.damping.relative == pytest.approx(0.01)
    assert found.report.damping.tries == 1
    assert cq.pack(found.codes, 4).nbytes == W.size // 2
    assert cq.gptq(W, H, SPEC, losses=False).report.loss is None


def test_round_to_nearest_reports_too(problem):
    W, H, G = problem
    plain = cq.round_to_nearest(W, SPEC)
    assert plain.report.method == "nearest"
    assert plain.report.loss is None
    found = cq.round_to_nearest(W, SPEC, H=H, name="fc")
    np.testing.assert_array_equal(found.codes, plain.codes)
    assert found.report.loss == cq.gptq(W, H, SPEC).report.nearest_loss
    mismatched = cq.round_to_nearest(W, SPEC, H=H, G=G).report
    assert mismatched.loss == cq.qronos(W, H, G, SPEC).report.nearest_loss
    assert found.report.name == "fc"


def test_zero_points_of_another_shape_are_brought_into_it_or_refused():
    q = cq.quantize(
        np.arange(8.0).reshape(2, 4), "int4:channel:asymmetric", np.ones(()), np.int8(1)
    )
    one = dataclasses.replace(q, zero_points=np.array(1, np.int8))
    assert (
        cq.certify(one, cq.AccumulatorSpec(16)).largest
        == cq.certify(q, cq.AccumulatorSpec(16)).largest
    )
    with pytest.raises(cq.ShapeError, match="zero_points must have shape"):
        cq.certify(
            dataclasses.replace(q, zero_points=np.ones((4, 3), np.int8)), cq.AccumulatorSpec(16)
        )


def test_switches_of_an_accumulator_are_switches():
    for name in ("diffuse", "zero_points"):
        with pytest.raises(TypeError, match=f"{name} must be true or false"):
            cq.AccumulatorSpec(16, **{name: "no"})
    spec = cq.AccumulatorSpec(16, None, "int8:token:asymmetric", zero_points=False)
    assert spec.range == (-128, 127)
