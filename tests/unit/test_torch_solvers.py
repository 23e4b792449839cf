"""Column solvers on tensors: reconstruction errors against NumPy's, options, and what is refused.

Codes are not compared: in another order of sums a rounding here and there falls the other way, and
the columns after it make up for that.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import corequant as cq
from corequant.rounding import AccumulatorSpec, RoundingOptions, round_together
from corequant_torch.kernels.cpu import to_numpy
from corequant_torch.kernels.device import DeviceKernels
from corequant_torch.rounding.bounds import soft_thresholds

pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning:triton")

METHODS = ("gptq", "gptaq", "gpfq", "qronos")
SPECS = ("int4:channel", "int3:group16:asymmetric", "nvfp4", "mxfp4", "nf4:group32", "e3m2:channel")
BITS = {"int4:channel": 14, "int3:group32:asymmetric": 12, "mxfp4": 14, "e3m2:channel": 14}


def problem(rows=12, d=160, dtype=np.float64, dead=3):
    """Correlated inputs with heavy-tailed channels, a dead one, and the noise of quantization."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(2 * d, d)) * np.exp(rng.normal(0, 0.5, d))
    x[:, 1:] += 0.5 * x[:, :-1]
    x[:, dead] = 0
    q = x + 0.1 * rng.normal(size=x.shape) * x.std(0)
    W = rng.normal(size=(rows, d)) / np.sqrt(d)
    return W.astype(dtype), (q.T @ q / len(q)).astype(dtype), (x.T @ q / len(q)).astype(dtype)


def call(method, W, H, G, spec, options):
    """Return a public function and its arguments."""
    function = cq.gptq if method == "gptaq" else getattr(cq, method)
    cross = {} if method == "gptq" else {"G": G}
    return function, {"W": W, "H": H, "spec": spec, **cross, **options}


def rounded(kernels, function, arguments):
    """Round on a device's kernels, which take every argument of the function."""
    bound = inspect.signature(function).bind(**arguments)
    bound.apply_defaults()
    given = {
        n: torch.from_numpy(a) if isinstance(a, np.ndarray) else a
        for n, a in bound.arguments.items()
    }
    return kernels.round_columns(function.__name__, **given)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", SPECS)
def test_losses_in_float64_are_numpys(method, spec):
    # Each spec with the order of its columns, each grouped one with scales chosen on the way.
    grouped = cq.QuantSpec.parse(spec).group_size is not None
    options = {"refit": True} if grouped and method != "gpfq" else {"act_order": method == "gpfq"}
    function, arguments = call(method, *problem(), spec, options)
    expected, found = function(**arguments), rounded(DeviceKernels(), function, arguments)
    assert found.report.loss == pytest.approx(expected.report.loss, rel=1e-9)
    assert found.report.nearest_loss == pytest.approx(expected.report.nearest_loss, rel=1e-12)
    assert found.report.dead_columns == expected.report.dead_columns == (3,)
    assert found.report.method == expected.report.method
    if method != "gpfq":
        assert found.report.damping.value == pytest.approx(expected.report.damping.value, rel=1e-9)
    loss = cq.reconstruction_loss(
        arguments["W"], to_numpy(cq.dequantize(found)), *moments(arguments)
    )
    assert loss == pytest.approx(expected.report.loss, rel=1e-9)


def moments(arguments):
    return arguments["H"], arguments.get("G")


@pytest.mark.parametrize("method", ["gptq", "gpfq", "qronos"])
@pytest.mark.parametrize("spec", BITS)
def test_accumulators_are_never_overflowed(method, spec):
    bound = AccumulatorSpec(BITS[spec], 32, "int8", diffuse=method != "qronos")
    function, arguments = call(method, *problem(), spec, {"accumulator": bound})
    expected, found = function(**arguments), rounded(DeviceKernels(), function, arguments)
    assert found.report.loss == pytest.approx(expected.report.loss, rel=1e-9)
    assert found.report.bounded_share == pytest.approx(expected.report.bounded_share, abs=1e-3)
    assert found.report.bounded_share > 0
    host = cq.QuantizedTensor(
        *(
            None if t is None else to_numpy(t)
            for t in (found.codes, found.scales, found.zero_points)
        ),
        found.spec,
    )
    assert cq.certify(host, bound).safe


def test_soft_thresholds_leave_the_radius():
    weights = torch.randn(50, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[0] *= 1e-3
    theta = soft_thresholds(weights, 4.0)
    centred = (weights - weights.mean(1, keepdim=True)).abs()
    left = (centred - theta[:, None]).clamp(min=0).sum(1)
    assert theta[0] == 0
    assert float(left[0]) < 4
    torch.testing.assert_close(left[1:], torch.full_like(left[1:], 4.0))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("method", "spec"), [*((m, "int4:channel") for m in METHODS), ("gptq", "nf4:group16")]
)
def test_tritons_loop_is_as_good(method, spec):
    function, arguments = call(method, *problem(9, 32, np.float32), spec, {})
    expected = function(**arguments)
    plain, found = (rounded(DeviceKernels(t), function, arguments) for t in (False, True))
    for result in (plain, found):
        assert result.report.loss == pytest.approx(expected.report.loss, rel=0.01)
        assert to_numpy(result.codes).dtype == expected.codes.dtype
    # The same products before, and the same sums in the same order: here codes are equal.
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)


@pytest.mark.interpreter
def test_tritons_loop_refits_groups():
    function, arguments = call("gptq", *problem(5, 48, np.float32), "int4:group24", {"refit": True})
    plain, found = (rounded(DeviceKernels(t), function, arguments) for t in (False, True))
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)


def test_float32_is_as_good_on_a_larger_layer():
    for method in ("gptaq", "gpfq"):
        function, arguments = call(method, *problem(48, 192, np.float32), "int4:group32", {})
        expected, found = function(**arguments), rounded(DeviceKernels(), function, arguments)
        assert found.report.loss == pytest.approx(expected.report.loss, rel=2e-3)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_weights(kind):
    W, H, _ = (torch.from_numpy(a) for a in problem(8, 64, np.float32))
    W = W.to(kind)
    on_cpu = cq.gptq(W, H, "int4:channel")
    elsewhere = rounded(DeviceKernels(), cq.gptq, {"W": W, "H": H, "spec": "int4:channel"})
    for q in (on_cpu, elsewhere):
        assert isinstance(q, cq.RoundedTensor)
        assert q.codes.dtype == torch.int8
        assert q.scales.dtype == torch.float32
    assert elsewhere.report.loss == pytest.approx(on_cpu.report.loss, rel=0.01)


def test_tensors_on_the_cpu_get_numpys_result():
    W, H, G = problem(8, 64, np.float32)
    tensors = [torch.from_numpy(a) for a in (W, H, G)]
    signature = {"spec": "int4:group16:asymmetric", "damping": 0.02}
    expected, found = cq.qronos(W, H, G, **signature), cq.qronos(*tensors, **signature)
    for name in ("codes", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(found, name).numpy(), getattr(expected, name))
    assert found.report == expected.report
    given = {"scales": found.scales, "zero_points": found.zero_points}
    again = cq.gptq(tensors[0].requires_grad_(), tensors[1], signature["spec"], **given)
    assert torch.equal(again.scales, found.scales)
    assert not again.codes.requires_grad
    nearest = cq.round_to_nearest(tensors[0], "int4:channel", H=tensors[1])
    assert nearest.report == cq.round_to_nearest(W, "int4:channel", H=H).report
    loss = cq.reconstruction_loss(tensors[0], nearest, tensors[1])
    assert loss == cq.reconstruction_loss(W, nearest.codes.numpy() * nearest.scales.numpy(), H)


def test_nearest_and_losses_on_a_device():
    W, H, G = problem(8, 64)
    kernels = DeviceKernels()
    arguments = {"W": W, "spec": "nvfp4", "H": H, "G": G}
    arguments["global_scale"] = np.array([400.0], np.float32)
    expected, found = (
        cq.round_to_nearest(**arguments),
        rounded(kernels, cq.round_to_nearest, arguments),
    )
    np.testing.assert_array_equal(found.codes.numpy(), expected.codes)
    assert found.report.loss == pytest.approx(expected.report.loss, rel=1e-12)
    loss = rounded(kernels, cq.reconstruction_loss, {"W": W, "quantized": found, "H": H, "G": G})
    assert loss == pytest.approx(expected.report.loss, rel=1e-12)


def test_scales_that_are_given_are_kept():
    W, H, _ = problem(8, 64)
    chosen = cq.quantize(W, "nvfp4")
    arguments = {"W": W, "H": H, "spec": "nvfp4", "scales": chosen.scales}
    arguments["global_scale"] = chosen.global_scale
    found = rounded(DeviceKernels(), cq.gptq, arguments)
    np.testing.assert_array_equal(found.scales.numpy(), chosen.scales)
    assert found.report.loss == pytest.approx(cq.gptq(**arguments).report.loss, rel=1e-9)


def broken(change):
    W, H, G = problem(4, 32)
    arguments = {"W": W, "H": H, "G": G, "spec": "int4:channel", "name": "fc"}
    change(arguments)
    return arguments


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.update(H=a["H"][:16]),
        lambda a: a["H"].__setitem__((3, 7), 100),
        lambda a: a["H"].__setitem__((4, 4), -1),
        lambda a: a["H"].__setitem__(([1, 2], [2, 1]), 1e3),
        lambda a: a["G"].__setitem__((0, 3), 1),
        lambda a: a["G"].__setitem__((0, 5), np.nan),
        lambda a: a["W"].__setitem__((1, 2), np.inf),
        lambda a: a.update(W=a["W"][0]),
        lambda a: a.update(scales=-np.ones((4, 1))),
        lambda a: a.update(scales=np.ones((4, 2))),
        lambda a: a.update(zero_points=np.zeros((4, 1), np.int8)),
        lambda a: a.update(spec="int4:group24"),
        lambda a: a.update(refit=True),
        lambda a: a.update(accumulator=14),
        lambda a: a.update(accumulator=AccumulatorSpec(7, 16, "int8")),
        lambda a: a.update(dtype="float16"),
        lambda a: a.update(damping=-1),
    ],
)
def test_bad_arguments_are_refused_as_numpys_are(change):
    arguments = broken(change)
    for function in (cq.gptq, cq.qronos):
        with pytest.raises((ValueError, TypeError, cq.CorequantError)) as expected:
            function(**arguments)
        with pytest.raises(type(expected.value)) as found:
            rounded(DeviceKernels(), function, arguments)
        ours, theirs = (str(e.value).replace("numpy.ndarray", "") for e in (found, expected))
        assert ours.split(" got ")[0] == theirs.split(" got ")[0]


def test_what_belongs_elsewhere_is_refused():
    W, H, _ = (torch.from_numpy(a) for a in problem(4, 32))
    with pytest.raises(TypeError, match="W belongs to torch, H belongs to numpy"):
        cq.gptq(W, H.numpy(), "int4:channel")
    with pytest.raises(TypeError, match=r"H must be a numpy\.ndarray, got Tensor"):
        cq.gptq(W.numpy(), H, "int4:channel")
    with pytest.raises(cq.BackendError, match="W on cpu and H on meta"):
        cq.gptq(W, torch.empty(32, 32, device="meta"), "int4:channel")
    with pytest.raises(TypeError, match="G must be"):
        rounded(DeviceKernels(), cq.gpfq, {"W": W, "H": H, "G": None, "spec": "int4:channel"})
    with pytest.raises(TypeError, match=r"W must be a numpy\.ndarray, got list"):
        cq.gptq([[1.0]], H, "int4:channel")


def test_an_indefinite_factor_raises_the_damping():
    W, H, _ = problem(4, 32)
    flat = np.ones_like(H)
    arguments = {"W": W, "H": flat, "spec": "int4:channel", "damping": 0.0, "tokens": 10**9}
    expected, found = cq.gptq(**arguments), rounded(DeviceKernels(), cq.gptq, arguments)
    assert found.report.damping.tries == expected.report.damping.tries > 1


def test_no_rows_and_no_columns():
    for shape in ((0, 16), (3, 0)):
        W, H = np.empty(shape), np.eye(shape[1])
        found = rounded(DeviceKernels(), cq.gptq, {"W": W, "H": H, "spec": "int4:channel"})
        assert tuple(found.codes.shape) == cq.gptq(W, H, "int4:channel").codes.shape == shape


@pytest.mark.parametrize("objective", ["adaround", "signround"])
@pytest.mark.parametrize(
    "spec", ["int4:channel", "int3:group16:asymmetric", "nvfp4", "nf4:group32"]
)
def test_learned_rounding_on_a_device(objective, spec):
    W, H, G = problem()
    arguments = {"W": W, "H": H, "G": G, "spec": spec, "objective": objective, "steps": 30}
    expected = cq.learned_rounding(**arguments)
    found = rounded(DeviceKernels(), cq.learned_rounding, arguments)
    assert found.report.loss == pytest.approx(expected.report.loss, rel=1e-9)
    assert found.report.nearest_loss == pytest.approx(expected.report.nearest_loss, rel=1e-12)
    assert found.report.loss < found.report.nearest_loss
    assert found.report.dead_columns == (3,)
    np.testing.assert_array_equal(found.codes.numpy(), expected.codes)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("group", [None, 32])
def test_magr_on_a_device(kind, group):
    W, H, _ = problem(dtype=kind)
    arguments = {"W": W, "H": H, "alpha": 0.02, "steps": 60, "group_size": group}
    expected, found = cq.magr(**arguments), rounded(DeviceKernels(), cq.magr, arguments)
    assert np.abs(expected).max() < np.abs(W).max()
    tolerance = {np.float32: 1e-5, np.float64: 1e-12}[kind]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance)
    assert found.dtype == torch.from_numpy(W).dtype


@pytest.mark.parametrize("spec", ["int4:channel", "int3:group32:asymmetric", "e2m1:group16"])
@pytest.mark.parametrize("rank", [8, 200])
def test_scales_are_fitted_on_a_device(spec, rank):
    W, H, _ = problem(dtype=np.float32)
    arguments = {"W": W, "H": H, "spec": spec, "rank": rank}
    expected = cq.fit_scales(**arguments)
    found = rounded(DeviceKernels(), cq.fit_scales, arguments)
    np.testing.assert_array_equal(found.codes.numpy(), expected.codes)
    np.testing.assert_array_equal(found.scales.numpy(), expected.scales)
    assert type(found) is cq.QuantizedTensor


def test_the_first_of_scales_that_are_equally_good_is_taken():
    W, H, _ = problem(dtype=np.float32)
    W[2] = 0
    arguments = {"W": W, "H": np.zeros_like(H), "spec": "int4:group32", "rank": 2}
    found = rounded(DeviceKernels(), cq.fit_scales, arguments)
    np.testing.assert_array_equal(found.scales.numpy(), cq.quantize(W, "int4:group32").scales)


@pytest.mark.parametrize(
    "options",
    [
        RoundingOptions(),
        RoundingOptions(fit_scales=True),
        RoundingOptions("gptq", damping=0.02, correction=0.25, fit_scales=True),
        RoundingOptions("gpfq", accumulator=AccumulatorSpec(14, 32, "int8")),
        RoundingOptions("qronos", magr=0.01),
        RoundingOptions("learned", steps=20),
    ],
    ids=str,
)
def test_every_option_on_a_device(monkeypatch, options):
    W, H, G = problem(dtype=np.float64)
    arrays = {"H": H, "G": G if options.needs_float else None}
    expected = round_together({"a": W[:5], "b": W[5:]}, "int4:channel", options, **arrays)
    kernels = DeviceKernels()
    for module in ("kernels.engines", "backend"):
        monkeypatch.setattr(f"corequant_torch.{module}.engine_for", lambda x: kernels)
    W, H, G = (torch.from_numpy(a) for a in (W, H, G))
    arrays = {"H": H, "G": G if options.needs_float else None}
    found = round_together({"a": W[:5], "b": W[5:]}, "int4:channel", options, **arrays)
    assert list(found) == ["a", "b"]
    for name, one in found.items():
        assert isinstance(one.codes, torch.Tensor)
        assert one.report.name == name
        assert one.report.loss == pytest.approx(expected[name].report.loss, rel=1e-4)
        theirs = expected[name].report.nearest_loss
        assert one.report.nearest_loss == pytest.approx(theirs, rel=1e-12)


def test_tensors_on_the_cpu_get_numpys_learned_and_fitted_result():
    W, H, _ = problem(8, 64, np.float32)
    there, moments = torch.from_numpy(W), torch.from_numpy(H)
    learned = cq.learned_rounding(there, moments, "int4:channel", steps=10)
    expected = cq.learned_rounding(W, H, "int4:channel", steps=10)
    assert learned.report == expected.report
    np.testing.assert_array_equal(learned.codes.numpy(), expected.codes)
    np.testing.assert_array_equal(cq.magr(there, moments).numpy(), cq.magr(W, H))
    half = cq.magr(there.bfloat16(), moments)
    assert half.dtype == torch.bfloat16
    fitted, theirs = cq.fit_scales(there, moments, "int4"), cq.fit_scales(W, H, "int4")
    assert isinstance(fitted.scales, torch.Tensor)
    np.testing.assert_array_equal(fitted.scales.numpy(), theirs.scales)


@pytest.mark.parametrize(
    ("function", "change", "error"),
    [
        (cq.learned_rounding, {"objective": "best"}, ValueError),
        (cq.learned_rounding, {"steps": -1}, ValueError),
        (cq.learned_rounding, {"rate": 0.0}, ValueError),
        (cq.learned_rounding, {"W": np.full((4, 32), np.nan)}, cq.NonFiniteError),
        (cq.magr, {"alpha": -1}, ValueError),
        (cq.magr, {"group_size": 24}, cq.BlockSizeError),
        (cq.magr, {"H": np.eye(16)}, cq.ShapeError),
        (cq.fit_scales, {"spec": "mxfp4"}, cq.SpecError),
        (cq.fit_scales, {"rank": 0}, ValueError),
        (cq.fit_scales, {"H": -np.eye(32)}, cq.HessianError),
    ],
)
def test_bad_arguments_of_the_others_are_refused_as_numpys_are(function, change, error):
    W, H, _ = problem(4, 32)
    arguments = {"W": W, "H": H} | ({} if function is cq.magr else {"spec": "int4:channel"})
    arguments |= change
    with pytest.raises(error) as expected:
        function(**arguments)
    tensors = {
        n: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()
    }
    for call in (
        lambda: function(**tensors),
        lambda: rounded(DeviceKernels(), function, arguments),
    ):
        with pytest.raises(error) as found:
            call()
        assert str(found.value).split(" got ")[0] == str(expected.value).split(" got ")[0]


@pytest.mark.parametrize("tokens", [None, 1, 6, 40, 10**9])
@pytest.mark.parametrize("method", ["gptq", "gpfq", "qronos", "learned_rounding"])
def test_few_tokens_are_made_up_for_as_on_numpy(method, tokens):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(6 if tokens is None else min(tokens, 500), 48)).astype(np.float32)
    q = x + 0.1 * generator.normal(size=x.shape).astype(np.float32)
    H, G = q.T @ q / len(x), x.T @ q / len(x)
    W = generator.normal(size=(16, 48)).astype(np.float32)
    arguments = {"W": W, "H": H, "spec": "int4:channel", "tokens": tokens}
    if method != "gptq":
        arguments["G"] = G
    function = getattr(cq, method)
    expected, found = function(**arguments), rounded(DeviceKernels(), function, arguments)
    assert found.report.shrinkage == pytest.approx(expected.report.shrinkage, rel=1e-3)
    assert (found.report.shrinkage > 0) == (tokens != 10**9)
    if tokens == 1:
        # Rounded to nearest, but for ties.
        assert np.abs(to_numpy(found.codes) - expected.codes).mean() < 0.02
    else:
        assert found.report.loss == pytest.approx(expected.report.loss, rel=0.02, abs=1e-6)
