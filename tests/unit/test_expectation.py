"""Losses that are expected of formats, against those of weights that are rounded."""

from __future__ import annotations

import numpy as np
import pytest

import corequant as cq
from corequant.packing.codes import packed_words
from corequant.recipe import READERS, Recipe, candidates_of, takes
from corequant.rounding import expected_losses, unpredicted
from corequant.storage.arrays import stored_bytes, to_arrays


@pytest.fixture
def layer(rng):
    X = rng.normal(size=(2048, 64)) @ rng.normal(size=(64, 64)) * np.exp(rng.normal(size=64))
    return rng.normal(size=(96, 64)).astype(np.float32), (X.T @ X / 2048).astype(np.float32)


@pytest.mark.parametrize("spec", ["int2:group32", "int3:channel:asymmetric", "int6:group16"])
def test_nearest_is_what_rounding_reports(layer, spec):
    W, H = layer
    wanted = cq.round_to_nearest(W, f"{spec}:mse", H=H).report.loss
    assert expected_losses(W, [f"{spec}:mse"], H=H)[0] == pytest.approx(wanted, rel=1e-5)
    weights = np.linspace(0, 1, W.size).reshape(W.shape)
    errors = np.square(W - cq.fake_quantize(W, f"{spec}:mse"), dtype=np.float64)
    found = expected_losses(W, [f"{spec}:mse", "int8:channel"], weights=weights)
    assert found[0] == pytest.approx((errors * weights).sum())
    assert found[1] < found[0]
    one = expected_losses(W, [f"{spec}:mse"], weights=weights[0])[0]
    assert one == pytest.approx((errors * weights[0]).sum())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_feedback_is_what_gptq_leaves(layer, bits, act_order):
    W, H = layer
    spec = f"int{bits}:group32:mse"
    report = cq.gptq(W, H, spec, tokens=2048, act_order=act_order).report
    moved = unpredicted(H, tokens=2048, act_order=act_order)
    found = expected_losses(W, [spec], weights=moved)[0]
    assert 0.7 * report.loss < found < report.loss / 0.7
    # Which rounding to nearest is far from.
    assert report.nearest_loss > 1.7 * found


def test_unpredicted_variances(layer, rng):
    H = np.diag(rng.uniform(1, 9, 16))
    assert unpredicted(H, damping=0) == pytest.approx(np.diagonal(H), rel=1e-6)
    H = np.array([[4.0, 0, 2], [0, 0, 0], [2, 0, 3]])
    assert unpredicted(H, damping=0) == pytest.approx([4 - 4 / 3, 0, 3])
    assert unpredicted(H, damping=0, act_order=False) == pytest.approx([4 - 4 / 3, 0, 3])


def test_refusals(layer):
    W, H = layer
    with pytest.raises(cq.ShapeError, match=r"weights must be \(96, 64\) or \(64,\)"):
        expected_losses(W, ["int4:channel"], weights=np.ones(63))
    with pytest.raises(cq.NonFiniteError, match="weights must be finite"):
        expected_losses(W, ["int4:channel"], weights=np.full(64, np.nan))
    with pytest.raises(cq.BlockSizeError):
        expected_losses(W, ["int4:group48"], H=H)
    for options, got in (({}, "none"), ({"H": H, "weights": np.ones(64)}, "both")):
        with pytest.raises(TypeError, match=f"one of H and weights must be given, got {got}"):
            expected_losses(W, ["int4:channel"], **options)


@pytest.mark.parametrize("shape", [(6, 64), (5, 48)])
@pytest.mark.parametrize(
    "spec",
    ["int3:group16", "int5:channel:asymmetric", "mxfp4", "nvfp4", "uint4:tensor", "int2:group16"],
)
def test_stored_bytes_are_those_of_the_arrays(spec, shape, rng):
    W = rng.normal(size=shape).astype(np.float32)
    if spec == "mxfp4" and shape[1] % 32:
        shape, W = (5, 96), np.concatenate([W, W], 1)
    arrays = to_arrays("w", cq.quantize(W, spec))
    assert stored_bytes(shape, cq.QuantSpec.parse(spec)) == sum(a.nbytes for a in arrays.values())
    brain = stored_bytes((4, 32), cq.QuantSpec.parse("int4:group16:bfloat16"))
    assert brain == 4 * 4 * packed_words(32, 4) + 2 * 4 * 2 + 16


def test_programs_take_what_they_can_load():
    recipe = Recipe(bits=4, weights="int4:group32:float16")
    bits = {
        reader: [s.format.bits for s in candidates_of(recipe) if takes(reader, s)]
        for reader in READERS
    }
    assert bits == {
        "corequant": [2, 3, 4, 5, 6, 8],
        "transformers": [2, 3, 4, 5, 6, 8],
        "vllm": [4, 8],
        "llama.cpp": [4, 8],
    }
    with pytest.raises(cq.RecipeError, match="the program that a result is for must be one of"):
        takes("mlx", recipe.weights)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bits": 0}, "bits must be a positive number, got 0"),
        ({"bits": float("nan")}, "bits must be a positive number, got nan"),
        ({"bits": True}, "bits must be a positive number, got True"),
        ({"bits": 3, "size": "80MB"}, "size must be None with bits, got '80MB' and 3"),
        ({"size": "eighty"}, "size must be bytes, or a size such as 80MB or 1.5GiB, got 'eighty'"),
        ({"size": -1}, "size must be bytes"),
        ({"candidates": ["int4:channel"]}, "candidates must be left out without bits or size"),
        ({"bits": 3, "candidates": "int4:channel"}, "candidates must be a list"),
        ({"bits": 3, "candidates": ["int4:tensor", "int4:tensor:mse"]}, "candidates must differ"),
        ({"bits": 3, "candidates": [None]}, "candidates must be quantizers, got None"),
        ({"bits": 3, "sensitivity": "hessian"}, "sensitivity must be one of kl, output, weights"),
        ({"bits": 3, "units": "blocks"}, "units must be one of layers, inputs"),
    ],
)
def test_budgets_that_are_refused(fields, text):
    with pytest.raises(cq.RecipeError, match=text):
        Recipe(**fields)


def test_budgets_are_read_and_written():
    assert Recipe(size="1.5 GiB").size == 3 * 2**29
    assert Recipe(size="80MB").size == 80_000_000
    recipe = Recipe(bits=3.25, candidates=["int2:group16", "mxfp4"], sensitivity="output")
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    # Without a budget nothing is said about it.
    assert not {"bits", "size", "candidates", "sensitivity", "units"} & set(Recipe().to_dict())
    found = candidates_of(Recipe(bits=6, weights="mxfp4"))
    assert [spec.format.bits for spec in found] == [4, 6, 8]
    preset = Recipe.preset("w4a16", bits=3.5)
    assert preset.layers == ()
    assert Recipe.preset("w4a16").layers
