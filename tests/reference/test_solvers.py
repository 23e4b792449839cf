"""GPTQ, GPFQ, Qronos, MagR and AXE against brevitas, on the same W, H, G and scales."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import corequant as cq

SPECS = ("int4:channel", "int3:channel", "e2m1:channel", "int4:group32")
KINDS = ("gptq", "gpfq", "qronos")
ALPHA = 1e-3


@pytest.fixture(scope="module")
def peers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import brevitas.nn as qnn
        from brevitas.graph.gpfq import GPFQ
        from brevitas.graph.gptq import GPTQ
        from brevitas.graph.magr import MagR
        from brevitas.graph.qronos import Qronos
        from brevitas.quant import Int8WeightPerChannelFloat
        from brevitas_examples.common.axe import A2GPFQ, A2GPTQ

    class Layer:
        """A layer whose grid is ours, so that only the algorithms differ."""

        def __init__(self, W, spec):
            self.layer = qnn.QuantLinear(
                W.shape[1], W.shape[0], bias=False, weight_quant=Int8WeightPerChannelFloat
            )
            self.layer.weight.data = torch.from_numpy(W.copy())
            self.spec = cq.QuantSpec.parse(spec)
            self.scales = cq.choose_qparams(W, spec)[0]

        def values(self):
            W = self.layer.weight.data.numpy()
            return cq.dequantize(cq.quantize(W, self.spec, self.scales))

    def solver(kind, owner, *arguments):
        class Solver(kind):
            def get_quant_weights(self, i, i1, permutations, with_quant_history=False):
                order, at = permutations[0], i + i1
                q = torch.from_numpy(owner.values())
                if with_quant_history:
                    return q[None][:, :, order[:at]]
                return q[None][:, :, order[at]]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = Solver(owner.layer, "layer", *arguments)
        made.B = None
        return made

    def run(name, W, H, G, spec, bits=None, tile=None, activation=(8, True)):
        owner = Layer(W, spec)
        base = (True, 1, True)
        if bits is None:
            kinds = {"gptq": (GPTQ, 16), "gpfq": (GPFQ,), "qronos": (Qronos, 16, ALPHA)}
        else:
            kinds = {"gptq": (A2GPTQ, 16, bits, tile), "gpfq": (A2GPFQ, bits, tile)}
        kind, *rest = kinds[name]
        made = solver(kind, owner, *base, *rest)
        made.H = torch.from_numpy(H.copy())[None]
        if name != "gptq":
            made.G = torch.from_numpy((G if name == "qronos" else G.T).copy())[None]
        if bits is not None:
            width, signed = torch.tensor(float(activation[0])), activation[1]
            made.quant_metadata = SimpleNamespace(bit_width=width, signed=signed)
            quant_weight = owner.layer.quant_weight
            scale = torch.from_numpy(owner.scales)
            owner.layer.quant_weight = lambda **_: SimpleNamespace(scale=scale)
        with torch.no_grad():
            made.single_layer_update()
        if bits is not None:
            owner.layer.quant_weight = quant_weight
        return owner.values()

    def shrink(W, H, steps, alpha):
        owner = Layer(W, "int4:channel")
        made = MagR(owner.layer, "layer", 1, True, steps, 30, alpha)
        made.H, made.B = torch.from_numpy(H.copy())[None], None
        with torch.no_grad():
            made.single_layer_update()
        return owner.layer.weight.data.numpy()

    return {"round": run, "shrink": shrink}


def error(W, Q, x, q):
    """Mean squared error of the outputs on the tokens themselves, in float64."""
    gap = x.astype(np.float64) @ W.T.astype(np.float64) - q.astype(np.float64) @ Q.T
    return float(np.square(gap).sum() / len(x))


def ours(name, W, H, G, spec, **options):
    # Errors are those of the tokens themselves, and the peers trust any number of tokens.
    options = {"tokens": 10**12, **options}
    if name == "gptq":
        return cq.gptq(W, H, spec, **options)
    if name == "gpfq":
        return cq.gpfq(W, H, G, spec, **options)
    return cq.qronos(W, H, G, spec, damping=ALPHA, **options)


def moments(x, q):
    n = np.float32(len(q))
    return q.T @ q / n, x.T @ q / n


def random_problem(seed):
    generator = np.random.default_rng(seed)
    d = (64, 96, 160, 200)[seed % 4]
    x = generator.normal(size=(3 * d, d)) * np.exp(generator.normal(0, 0.7, d))
    x = (x @ (np.eye(d) + generator.normal(size=(d, d)) / np.sqrt(d))).astype(np.float32)
    q = x + (0.2 * generator.normal(size=x.shape) * x.std(0)).astype(np.float32)
    W = generator.standard_t(5, size=(48, d)).astype(np.float32)
    return W, x, q


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_errors_on_random_layers(peers, name, seed):
    W, x, q = random_problem(seed)
    H, G = moments(x, q)
    spec = SPECS[seed // 4 % 4]
    spec = "int4:group8" if "group" in spec and W.shape[1] % 32 else spec
    theirs = peers["round"](name, W, H, G, spec)
    found = cq.dequantize(ours(name, W, H, G, spec))
    seen = q if name == "gptq" else x
    assert error(W, found, seen, q) <= 1.001 * error(W, theirs, seen, q)
    # The codes themselves are nearly always the same: sums in another order can flip a tie.
    assert np.mean(found != theirs) < 0.03


@pytest.fixture(scope="session")
def real_layers(smollm2, help_tokens):
    """Weights of ten layers, their float inputs, and the same in 4 bits."""
    model, _ = smollm2
    names = (
        "layers.0.self_attn.q_proj",
        "layers.3.self_attn.v_proj",
        "layers.7.self_attn.o_proj",
        "layers.11.mlp.gate_proj",
        "layers.15.mlp.up_proj",
        "layers.18.self_attn.k_proj",
        "layers.21.mlp.gate_proj",
        "layers.25.self_attn.o_proj",
        "layers.28.self_attn.q_proj",
        "layers.29.mlp.up_proj",
    )
    modules, seen = dict(model.model.named_modules()), {}

    def watch(name):
        def hook(module, args):
            seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).numpy())

        return hook

    handles = [modules[n].register_forward_pre_hook(watch(n)) for n in names]
    with torch.no_grad():
        model.model(torch.from_numpy(help_tokens[:4]), use_cache=False)
    for handle in handles:
        handle.remove()
    layers = []
    for n in names:
        x = np.ascontiguousarray(np.concatenate(seen[n]), np.float32)
        W = modules[n].weight.detach().numpy()[:576].astype(np.float32)
        layers.append((n, W, x, cq.fake_quantize(x, "int4:token:asymmetric")))
    return layers


@pytest.mark.parametrize("index", range(10))
def test_errors_on_real_layers(peers, real_layers, index):
    layer, W, x, q = real_layers[index]
    H, G = moments(x, q)
    for name in KINDS:
        theirs = peers["round"](name, W, H, G, "int4:channel")
        found = cq.dequantize(ours(name, W, H, G, "int4:channel"))
        seen = q if name == "gptq" else x
        ratio = error(W, found, seen, q) / error(W, theirs, seen, q)
        assert ratio <= 1.001, (layer, name, ratio)


@pytest.mark.parametrize("name", ["gptq", "gpfq"])
@pytest.mark.parametrize("bits", [13, 15, 20])
@pytest.mark.parametrize("signed", [True, False])
def test_accumulator_aware_errors(peers, name, bits, signed):
    for seed in (0, 3):
        W, x, q = random_problem(seed)
        H, G = moments(x, q)
        theirs = peers["round"](name, W, H, G, "int4:channel", bits, 32, (8, signed))
        spec = cq.AccumulatorSpec(bits, 32, "int8" if signed else "uint8", diffuse=name == "gpfq")
        found = ours(name, W, H, G, "int4:channel", accumulator=spec)
        assert cq.certify(found, spec).safe
        seen = q if name == "gptq" else x
        ratio = error(W, cq.dequantize(found), seen, q) / error(W, theirs, seen, q)
        assert ratio <= 1.001, (seed, ratio)


def shrinkage_problem(seed):
    """Return W, H and what MagR minimizes."""
    W, _, q = random_problem(seed)
    H = moments(q, q)[0]
    sigma = np.linalg.eigvalsh(H.astype(np.float64))[-1]
    weight = 0.01 * sigma**2 / np.abs(H).sum(0).max()

    def objective(v):
        largest = np.abs(v.astype(np.float64)).max(1).sum()
        return 0.5 * cq.reconstruction_loss(W, v, H) + weight * largest

    return W, H, objective


@pytest.mark.parametrize("seed", range(3))
def test_magr_with_a_quarter_of_the_products(peers, seed):
    W, H, objective = shrinkage_problem(seed)
    found, theirs = cq.magr(W, H, alpha=0.01, steps=50), peers["shrink"](W, H, 200, 0.01)
    assert objective(found) <= objective(theirs) < objective(W)


@pytest.mark.parametrize("seed", range(3))
def test_magr_ends_where_plain_steps_do(peers, seed):
    W, H, objective = shrinkage_problem(seed)
    found, theirs = cq.magr(W, H, alpha=0.01, steps=500), peers["shrink"](W, H, 5000, 0.01)
    np.testing.assert_allclose(objective(found), objective(theirs), rtol=2e-4)
    # Along flat directions plain steps are still on their way.
    assert objective(found) <= objective(theirs)
    assert np.linalg.norm(found - theirs) < 0.1 * np.linalg.norm(theirs - W)
    assert np.abs(theirs - W).max() > 0.02
