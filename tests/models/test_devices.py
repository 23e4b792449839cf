"""Models on another device than the CPU, in name only: see ``tests/otherdevice.py``.

The device is made known to a process of its own, since nothing takes that back.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from tests import otherdevice
from tests.models.test_checkpoint import word_level

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

TOKENS = (np.arange(4 * 48) * 7 % 101).reshape(4, 48)


@pytest.fixture(scope="module")
def elsewhere():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, otherdevice.register) as pool:
        yield pool


def quantized(kind, recipe, device, calibration=TOKENS, folder=None):
    """Return what quantizing on a device gives, as arrays and numbers."""
    model = cqhf.tiny_model(kind)
    if folder is None:
        made = cqhf.quantize(model.to(device), recipe, calibration)
    else:
        model.save_pretrained(folder / "float")
        word_level(folder / "float")
        made = cqhf.quantize(folder / "float", recipe, TOKENS, folder / device, device=device)
    layers = {m.name: made.model.get_submodule(m.name) for m in made.plan.quantized}
    where = {layer.weight.device.type for layer in layers.values()}
    return {
        "codes": {name: layer.quantized.codes for name, layer in layers.items()},
        "permutations": dict(made.choices.permutations),
        "factors": dict(made.choices.factors),
        "error": made.verification.logits_error,
        "perplexity": cqhf.evaluate(made.model, TOKENS).perplexity,
        "devices": where,
        "draw": made.report["signs"],
    }


def same(found, expected):
    assert found["devices"] == {otherdevice.NAME}
    assert found["error"] < 1e-9
    assert found["draw"]["draw"] == expected["draw"]["draw"]
    for name, permutation in expected["permutations"].items():
        np.testing.assert_array_equal(found["permutations"][name], permutation)
    for name, factors in expected["factors"].items():
        np.testing.assert_allclose(found["factors"][name], factors, rtol=1e-6)


NEAREST = {
    "massdiff, three draws of signs": Recipe(block_size=16, permutation="massdiff", sign_trials=3),
    "auto and scales, online": Recipe(
        block_size=16, permutation="auto", factors="scales", rotation="online"
    ),
}


@pytest.mark.parametrize("name", NEAREST)
def test_the_same_statistics_give_the_same_codes(elsewhere, name):
    recipe = NEAREST[name]
    statistics = cqhf.calibrate(cqhf.tiny_model("qwen2"), recipe, TOKENS)
    expected = quantized("qwen2", recipe, "cpu", statistics)
    device = otherdevice.NAME
    found = elsewhere.submit(quantized, "qwen2", recipe, device, statistics).result()
    same(found, expected)
    for layer, codes in expected["codes"].items():
        np.testing.assert_array_equal(found["codes"][layer], codes)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    # Statistics of the device's own differ in their last bits.
    same(elsewhere.submit(quantized, "qwen2", recipe, device).result(), expected)


ADAPTIVE = {
    "qronos": Recipe(block_size=16, rounding="qronos"),
    "learned, scales searched at home": Recipe(
        block_size=16, rounding="learned", steps=5, weights="int4:channel:exact"
    ),
    "gptq, shared global scales": Recipe(
        block_size=16, rounding="gptq", correction=0.25, weights="nvfp4"
    ),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_rounding_happens_there_and_is_as_good(elsewhere, name):
    expected = quantized("llama", ADAPTIVE[name], "cpu")
    found = elsewhere.submit(quantized, "llama", ADAPTIVE[name], otherdevice.NAME).result()
    same(found, expected)
    # A tie that falls otherwise is made up for by what is rounded after it.
    other = [np.mean(found["codes"][n] != codes) for n, codes in expected["codes"].items()]
    assert max(other) < 0.05
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=2e-3)


def test_files_are_quantized_there_and_load_here(elsewhere, tmp_path):
    recipe = Recipe(block_size=16, permutation="massdiff")
    expected = quantized("gpt2", recipe, "cpu")
    found = elsewhere.submit(quantized, "gpt2", recipe, otherdevice.NAME, TOKENS, tmp_path)
    found = found.result()
    for name, codes in expected["codes"].items():
        np.testing.assert_array_equal(found["codes"][name], codes)
    loaded = cqhf.load(tmp_path / otherdevice.NAME)
    assert cqhf.evaluate(loaded, TOKENS).perplexity == pytest.approx(expected["perplexity"])


def statistics(device):
    model = cqhf.tiny_model("llama").to(device)
    recipe = Recipe(block_size=16, permutation="auto", factors="scales")
    found = cqhf.calibrate(model, recipe, TOKENS).statistics
    stay = {type(s._energy_gram).__name__ for s in found.values()}
    return {n: (s.mean_abs, s.energy_gram, s.tokens) for n, s in found.items()}, stay


def test_sums_of_products_stay_on_the_device_while_a_model_is_calibrated(elsewhere):
    expected, _ = statistics("cpu")
    found, stay = elsewhere.submit(statistics, otherdevice.NAME).result()
    assert stay == {"Elsewhere"}
    for name, arrays in expected.items():
        for ours, theirs in zip(found[name], arrays, strict=True):
            # Of sums in float32, those that nearly cancel differ most.
            atol = 1e-6 * np.abs(theirs).max()
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=atol)


def fails(device):
    """Return the error of a model on a device whose inputs are not finite."""
    model = cqhf.tiny_model("llama").to(device)
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[3, 5] = float("nan")
    try:
        cqhf.quantize(model, Recipe(block_size=16), TOKENS)
    except cq.NonFiniteError as error:
        return str(error)


def test_what_is_not_finite_is_named(elsewhere):
    expected = fails("cpu")
    assert "(3, 5)" in expected
    assert elsewhere.submit(fails, otherdevice.NAME).result() == expected


def test_devices_that_are_not_there_are_refused(tmp_path):
    model, recipe = cqhf.tiny_model("llama"), Recipe(block_size=16)
    for device in ("cuda:7", "meta", "nowhere", 1.5):
        with pytest.raises(cq.BackendError, match=f"device must be .* got {device}"):
            cqhf.quantize(model, recipe, TOKENS, device=device)


def shared(device):
    with ThreadPoolExecutor(1) as executor:
        try:
            cqhf.quantize(
                cqhf.tiny_model("llama"), Recipe(), TOKENS, executor=executor, device=device
            )
        except cq.BackendError as error:
            return str(error)


def test_an_executors_workers_have_no_device(elsewhere):
    assert "executor must be left out" in elsewhere.submit(shared, otherdevice.NAME).result()


def resumed(folder, device):
    """Stop a run on the CPU and go on with it on a device."""
    cqhf.tiny_model("llama").save_pretrained(folder / "float")
    word_level(folder / "float")

    def stop(phase, done, total):
        if phase == "quantize" and done == 2:
            raise KeyboardInterrupt

    recipe = Recipe(block_size=16)
    try:
        cqhf.quantize(folder / "float", recipe, TOKENS, folder / "out", progress=stop)
    except KeyboardInterrupt:
        pass
    try:
        cqhf.quantize(folder / "float", recipe, TOKENS, folder / "out", resume=True, device=device)
    except cq.RunError as error:
        return str(error)


def test_a_run_goes_on_only_where_it_was_begun(elsewhere, tmp_path):
    found = elsewhere.submit(resumed, tmp_path, otherdevice.NAME).result()
    assert "device" in found
    assert otherdevice.NAME in found
