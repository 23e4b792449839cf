"""The operators: gradients, fake tensors, compilation without graph breaks, transforms."""

from __future__ import annotations

import pytest
import torch

import corequant as cq
from corequant_torch import operators
from corequant_transformers.model.quantized_linear import QuantizedLinear

SPECS = ["int4:token:asymmetric", "mxfp4", "nvfp4", "int8:tensor:symmetric"]
CHECKS = {
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
}


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 48, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def signs():
    return cq.random_signs(48, 0)


@pytest.fixture
def order():
    return cq.random_permutation(48, 0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("axis", "block_size"), [(-1, 12), (-1, 16), (0, 16)])
def test_the_rotations_gradients(x, signs, axis, block_size, inverse):
    def rotate(x):
        turned = x if axis == -1 else x.T
        return cq.block_hadamard(turned, block_size, axis=axis, inverse=inverse, signs=signs)

    assert torch.autograd.gradcheck(rotate, x)
    assert torch.autograd.gradgradcheck(rotate, x)


@pytest.mark.parametrize("spec", SPECS)
def test_rounding_is_passed_straight_through(x, spec):
    weight = torch.arange(144.0, dtype=torch.float64).reshape(3, 48)
    if spec == "mxfp4":
        spec = "mxfp4" if x.shape[-1] % 32 == 0 else "e2m1:group16:pow2"
    y = cq.fake_quantize(x, spec)
    assert torch.equal(y.detach(), cq.fake_quantize(x.detach(), spec))
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_the_fused_gradient_is_that_of_the_steps(x, signs, order):
    weight = torch.arange(144.0, dtype=torch.float64).reshape(3, 48)
    how = {"permutation": order, "signs": signs}
    y = cq.rotate_fake_quantize(x, 16, "int4:token:asymmetric", **how)
    fused = torch.autograd.grad((y * weight).sum(), x)[0]
    steps = cq.block_hadamard(x[:, torch.from_numpy(order)], 16, signs=signs)
    z = cq.fake_quantize(steps, "int4:token:asymmetric")
    assert torch.equal(y, z)
    torch.testing.assert_close(fused, torch.autograd.grad((z * weight).sum(), x)[0])


def test_codes_have_no_gradient(x):
    q = cq.rotate_quantize(x, 16, "int4:token:asymmetric")
    assert not q.scales.requires_grad
    assert not operators.rotate_quantize(x, 16, "int4:token:asymmetric", None, None)[
        1
    ].requires_grad


def test_opcheck(x, signs, order):
    sign, p = torch.from_numpy(signs), torch.from_numpy(order)
    calls = [
        ("block_hadamard", (x, 16, 1, False, sign)),
        ("block_hadamard", (x, 12, 1, True, None)),
        ("fake_quantize", (x, "int4:token:asymmetric", None, False)),
        ("rotate_fake_quantize", (x, 16, "int4:token:asymmetric", p, sign)),
        ("rotate_quantize", (x, 16, "int4:token:asymmetric", p, sign)),
        ("rotate_quantize", (x.float().detach(), 16, "nvfp4", None, None)),
    ]
    for name, arguments in calls:
        results = torch.library.opcheck(getattr(torch.ops.corequant, name).default, arguments)
        assert set(results) == CHECKS
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("spec", ["int4:token:asymmetric", cq.QuantSpec.parse("nvfp4")])
def test_compilation_has_no_graph_breaks(x, signs, order, spec):
    def chain(x):
        y = cq.block_hadamard(x, 16, signs=signs) * 2
        y = cq.fake_quantize(y, spec)
        y = cq.rotate_fake_quantize(y, 12, spec, permutation=order)
        q = cq.rotate_quantize(y, None, spec)
        return y, q.codes, q.scales, q.zero_points, q.global_scale

    expected = chain(x)
    found = torch.compile(chain, fullgraph=True, backend="aot_eager")(x)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    found[0].sum().backward()
    assert x.grad is not None


def test_a_quantized_layer_compiles_and_is_differentiable():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    codes = cq.quantize(weight.numpy(), "int4:channel")
    spec = cq.QuantSpec.parse("int4:token:asymmetric")
    layer = QuantizedLinear(codes, None, 16, spec, "layer")
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    y.sum().backward()
    expected = cq.block_hadamard(layer.weight.sum(0, keepdim=True), 16, inverse=True)
    torch.testing.assert_close(x.grad, expected.expand(4, 32))


def test_fake_tensors_have_shapes_and_no_data(x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = x.detach()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(real)
        y = cq.block_hadamard(fake, 16)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert cq.fake_quantize(fake, "int4:token:symmetric").shape == x.shape
        with pytest.raises(cq.BlockSizeError, match="must divide d=48, got 32"):
            operators.block_hadamard(fake, 32, 1, False, None)


def test_batching(x):
    rows = torch.func.vmap(lambda row: cq.block_hadamard(row, 16))(x.detach())
    assert torch.equal(rows, cq.block_hadamard(x.detach(), 16))
    columns = torch.func.vmap(lambda c: cq.block_hadamard(c, 16), in_dims=1)(x.detach().T)
    assert torch.equal(columns, rows)


def test_out_is_refused_where_gradients_are_recorded(x):
    with pytest.raises(ValueError, match="while gradients are recorded"):
        cq.block_hadamard(x, 16, out=torch.empty_like(x))
    with torch.no_grad():
        out = torch.empty_like(x)
        assert cq.block_hadamard(x, 16, out=out) is out


def test_bad_arguments_of_an_operator_are_named(x):
    with pytest.raises(cq.BlockSizeError, match="must divide d=48"):
        torch.ops.corequant.block_hadamard(x, 32, 1, False, None)
    with pytest.raises(cq.SpecError, match="unknown format"):
        torch.ops.corequant.fake_quantize(x, "int44:token", None, False)
    x.data[0, 3] = float("nan")
    with pytest.raises(cq.NonFiniteError, match=r"index \(0, 3\)"):
        cq.fake_quantize(x, "int4:token:symmetric")
