"""Products and attention by oneDNN, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch

from corequant.errors import ShapeError
from corequant_torch.device import onednn
from corequant_torch.device.grams import token_products
from corequant_torch.device.onednn import QuickForward, causal_attention, linear, multiplies_quickly

F = torch.nn.functional


@pytest.fixture(autouse=True)
def _on_any_processor(monkeypatch):
    # Which processors are quicker so is one thing; the numbers are those of all of them.
    if not torch.backends.mkldnn.is_available():
        pytest.fail("this torch was built without oneDNN")
    monkeypatch.setattr(onednn, "_has_operator", lambda: True)


@pytest.fixture
def used(monkeypatch):
    """Count the products that are oneDNN's, by their shapes."""
    shapes = []
    operator = torch.ops.mkldnn._linear_pointwise

    def spy(x, weight, *rest):
        shapes.append((tuple(x.shape), tuple(weight.shape)))
        return operator(x, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    return shapes


def normal(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(96, 300), (2, 48, 300), (1, 2, 3, 16, 300)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(shape, biased, used):
    x, weight = normal(*shape), normal(200, 300, seed=1)
    bias = normal(200, seed=2) if biased else None
    found = linear(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert len(used) == 1
    assert found.shape == expected.shape
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (normal(300, 96).T, normal(300, 200, seed=1).T),
        (normal(96, 400)[:, 50:350], normal(250, 300, seed=1)[::2]),
        (normal(96, 600)[:, ::2], normal(200, 300, seed=1)),
        (normal(1, 300).expand(96, 300), normal(200, 300, seed=1)),
    ],
)
def test_linear_of_tensors_that_are_not_laid_out_in_rows(x, weight, used):
    assert error(linear(x, weight), x.double() @ weight.double().T) < 1e-6
    assert len(used) == 1


def test_few_numbers_of_rows_are_multiplied(used):
    """Experts get any number of tokens, and oneDNN keeps code for each that it has met."""
    weight, bias = normal(1000, 300, seed=1), normal(1000, seed=2)
    for rows in (8, 9, 31, 32, 33, 64):
        x = normal(rows, 300)
        with QuickForward():
            found = F.linear(x, weight, bias)
        assert found.shape == (rows, 1000)
        assert error(found, F.linear(x.double(), weight.double(), bias.double())) < 1e-6
    assert {shape[0] for shape, _ in used} == {32, 64}
    assert len(used) == 6


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_what_is_left_to_torch(used, monkeypatch):
    x, weight = normal(96, 300), normal(200, 300, seed=1)
    assert multiplies_quickly(x, weight)
    assert multiplies_quickly(x, torch.nn.Parameter(weight, requires_grad=False))
    assert not multiplies_quickly(x.double(), weight.double())
    assert not multiplies_quickly(x.bfloat16(), weight.bfloat16())
    assert not multiplies_quickly(x, weight, normal(200).double())
    assert not multiplies_quickly(x.to("meta"), weight.to("meta"))
    # Short ones, where the call would take longer than the product.
    assert not multiplies_quickly(x[:7], normal(2000, 300))
    assert not multiplies_quickly(x, weight[:50])
    assert not multiplies_quickly(x[:, :0], weight[:, :0])
    # Of wrong shapes: torch says what is wrong.
    assert not multiplies_quickly(x, weight[:, :200])
    with pytest.raises(RuntimeError, match="shape"):
        linear(x, weight[:, :200])
    for bias in (normal(1), normal(96, 1), normal(96, 200)):
        assert not multiplies_quickly(x, weight, bias)
    assert not multiplies_quickly(torch.tensor(1.0), weight)
    # Tensors of other classes do something of their own.
    assert not multiplies_quickly(x.as_subclass(Own), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not multiplies_quickly(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not multiplies_quickly(x, weight)
    monkeypatch.setattr(onednn, "_has_operator", lambda: False)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not used


class Own(torch.Tensor):
    """A tensor of another library."""


def test_a_processor_or_a_torch_without_it(monkeypatch):
    monkeypatch.undo()
    x, weight = normal(96, 300), normal(200, 300, seed=1)
    onednn._has_operator.cache_clear()
    with monkeypatch.context() as without:
        without.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert not multiplies_quickly(x, weight)
    onednn._has_operator.cache_clear()
    with monkeypatch.context() as without:
        without.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not multiplies_quickly(x, weight)
    onednn._has_operator.cache_clear()


def test_gradients_are_torchs(used):
    x, weight = normal(96, 300), normal(200, 300, seed=1).requires_grad_()
    with QuickForward():
        F.linear(x, weight).sum().backward()
    assert not used
    torch.testing.assert_close(weight.grad, x.sum(0).expand(200, 300))
    with torch.no_grad():
        linear(x, weight)
    assert len(used) == 1


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_the_number_of_threads_changes_no_bit(threads):
    x, weight = normal(300, 520), normal(333, 520, seed=1)
    q = normal(1, 2, 600, 32)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            square = token_products(x, None, False)
            results.append((linear(x, weight), square, causal_attention(q, q, q, None)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("d", [200, 256, 600])
def test_moments(d, used):
    x, y = normal(2, 300, d), normal(2, 300, d, seed=1)
    rows, others = x.reshape(-1, d).double(), y.reshape(-1, d).double()
    square = token_products(x, None, False)
    assert used
    assert torch.equal(square, square.T)
    assert error(square, rows.T @ rows) < 1e-6
    used.clear()
    assert error(token_products(x, y, False), rows.T @ others) < 1e-6
    assert used == [((d, 600), (d, 600))]
    used.clear()
    # Every second token, and float64.
    half = x[:, ::2].reshape(-1, d).double()
    assert error(token_products(x[:, ::2], None, False), half.T @ half) < 1e-6
    used.clear()
    assert error(token_products(x, None, True), rows.T @ rows) < 1e-14
    assert not used


@pytest.mark.parametrize("length", [512, 600, 1000])
@pytest.mark.parametrize(("heads", "shared", "width", "wide"), [(2, 1, 64, 64), (4, 2, 32, 48)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_causal_attention(length, heads, shared, width, wide, scale, used):
    q, k = normal(2, heads, length, width), normal(2, heads // shared, length, width, seed=1)
    v = normal(2, heads // shared, length, wide, seed=2)
    options = {"is_causal": True, "scale": scale, "enable_gqa": True}
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    with QuickForward():
        found = F.scaled_dot_product_attention(q, k, v, **options)
    assert used
    assert error(found, expected) < 1e-6


def test_attention_looks_at_nothing_later():
    q, k, v = (normal(1, 1, 600, 32, seed=s) for s in range(3))
    before = causal_attention(q, k, v, None)
    k[:, :, 300:], v[:, :, 300:] = 1e3, 1e30
    after = causal_attention(q, k, v, None)
    assert torch.equal(before[:, :, :300], after[:, :, :300])
    assert not torch.equal(before[:, :, 300:], after[:, :, 300:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_show(value):
    q = normal(1, 1, 600, 32)
    v = q.clone()
    v[0, 0, 300] = value
    found = causal_attention(q, q, v, None)
    assert not found[0, 0, 300:].isfinite().any()
    assert found[0, 0, :256].isfinite().all()
    x, weight = normal(96, 300), normal(200, 300, seed=1)
    x[5, 7] = value
    finite = linear(x, weight).isfinite()
    assert not finite[5].any()
    assert finite[:5].all()
    assert finite[6:].all()


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 3, 8, 4), (1, 2, 8, 4), (1, 2, 8, 4)),
        ((1, 2, 8, 4), (1, 2, 9, 4), (1, 2, 9, 4)),
        ((1, 2, 8, 4), (1, 2, 8, 5), (1, 2, 8, 4)),
        ((1, 2, 8, 4), (1, 2, 8, 4), (1, 1, 8, 4)),
        ((2, 2, 8, 4), (1, 2, 8, 4), (1, 2, 8, 4)),
        ((2, 8, 4), (2, 8, 4), (2, 8, 4)),
        ((1, 2, 0, 4), (1, 2, 0, 4), (1, 2, 0, 4)),
    ],
)
def test_shapes_that_do_not_fit(q, k, v):
    with pytest.raises(ShapeError, match="query, key and value"):
        causal_attention(normal(*q), normal(*k), normal(*v), None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "dropout_p": 0.5},
        {"attn_mask": torch.ones(600, 600, dtype=torch.bool).tril()},
    ],
)
def test_other_attention_is_torchs(options, used):
    q = normal(1, 2, 600, 32)
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(q, q, q, **options)
    torch.manual_seed(0)
    with QuickForward():
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, **options), expected)
    assert not used


def test_attention_of_other_shapes_is_torchs(used):
    with QuickForward():
        for q, k in [
            (normal(1, 2, 300, 32), normal(1, 2, 300, 32)),
            (normal(1, 2, 1, 32), normal(1, 2, 600, 32)),
            (normal(2, 600, 32), normal(2, 600, 32)),
            (normal(0, 2, 600, 32), normal(0, 2, 600, 32)),
            (normal(1, 0, 600, 32), normal(1, 0, 600, 32)),
            (normal(1, 2, 600, 32).double(), normal(1, 2, 600, 32).double()),
        ]:
            found = F.scaled_dot_product_attention(q, k, k, is_causal=True)
            assert torch.equal(found, F.scaled_dot_product_attention(q, k, k, is_causal=True))
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(
                normal(1, 4, 600, 32), normal(1, 2, 600, 32), normal(1, 2, 600, 32), is_causal=True
            )
    assert not used


def test_the_context_ends(used):
    layer = torch.nn.Linear(300, 200).requires_grad_(False)
    x = normal(96, 300)
    with QuickForward():
        with QuickForward():
            layer(x)
        assert used
        used.clear()
        layer(x)
    assert len(used) == 1
    with pytest.raises(ZeroDivisionError), QuickForward():
        raise ZeroDivisionError
    layer(x)
    assert len(used) == 1


def test_a_compiled_model_in_the_context(used):
    layer = torch.compile(torch.nn.Linear(300, 200).requires_grad_(False), backend="eager")
    x = normal(96, 300)
    expected = layer(x)
    with QuickForward():
        torch.testing.assert_close(layer(x), expected)
