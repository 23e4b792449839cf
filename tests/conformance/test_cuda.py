"""What only a GPU can show: streams, graphs, memory that runs out, compiled kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant.testing import check_error
from corequant_torch import launch_streams, rotate_quantize_packed
from tests.conftest import heavy_tailed

pytestmark = pytest.mark.cuda

SPECS = ("int4:token:asymmetric", "int4:group32", "mxfp4", "nvfp4")


@pytest.fixture(autouse=True)
def gpu():
    assert torch.cuda.is_available(), "cuda was asked for and there is no usable GPU or driver"


def sample(rows=64, d=4096, dtype=torch.bfloat16):
    x = heavy_tailed(np.random.default_rng(0), rows, d)
    return torch.from_numpy(x).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("d", [4096, 14336, 96 * 28])
def test_compiled_rotations_are_within_twice_the_naive_error(d, dtype):
    x = sample(8, d, dtype)
    signs = cq.random_signs(d, 0)
    for b in (16, 128, None):
        for inverse in (False, True):
            how = {"inverse": inverse, "signs": signs}
            found = cq.block_hadamard(x.cuda(), b, **how)
            assert found.is_cuda
            naive, exact = (cq.block_hadamard(a, b, **how) for a in (x, x.double()))
            check_error(f"b={b}", *(a.double().cpu().numpy() for a in (found, naive, exact)))


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_codes_do_not_differ(text, dtype):
    x = sample(33, 4096, dtype)
    how = {"permutation": cq.random_permutation(4096, 0), "signs": cq.random_signs(4096, 1)}
    for b in (16, 64, 512):
        found, expected = (cq.rotate_quantize(a, b, text, **how) for a in (x.cuda(), x))
        assert torch.equal(found.codes.cpu(), expected.codes)
        assert torch.equal(found.scales.cpu(), expected.scales)
        packed, there = (rotate_quantize_packed(a, b, text, **how) for a in (x, x.cuda()))
        assert torch.equal(there.packed.cpu(), packed.packed)
    assert torch.equal(cq.fake_quantize(x.cuda(), text).cpu(), cq.fake_quantize(x, text))
    q, host = cq.quantize(x.cuda(), text), cq.quantize(x, text)
    assert torch.equal(cq.dequantize(q).cpu(), cq.dequantize(host))


def test_compiled_statistics():
    x = sample(500, 300)
    size = x.double().abs().numpy()
    expected = size.sum(0), np.square(size).sum(0), size.max(0)
    for ours, theirs in zip(launch_streams.moments(x.cuda()), expected, strict=True):
        np.testing.assert_allclose(ours.cpu().numpy(), theirs, rtol=1e-12)


def test_work_on_another_stream_waits_for_nothing_and_is_right():
    x = sample(2048)
    expected = {text: cq.rotate_fake_quantize(x, 64, text) for text in SPECS}
    rotated = cq.block_hadamard(x.cuda(), 64)
    there = torch.empty_like(x, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Work that a kernel on the wrong stream would not wait for.
        torch.cuda._sleep(200_000_000)
        there.copy_(x, non_blocking=True)
        turned = cq.block_hadamard(there, 64)
        values = {text: cq.rotate_fake_quantize(there, 64, text) for text in SPECS}
        sums = cq.ActivationStats(4096).update(there)
    stream.synchronize()
    assert torch.equal(turned, rotated)
    for text in SPECS:
        assert torch.equal(values[text].cpu(), expected[text])
    wanted = cq.ActivationStats(4096).update(x)
    np.testing.assert_allclose(sums.mean_abs, wanted.mean_abs, rtol=1e-12)


@pytest.mark.parametrize("text", SPECS)
def test_graphs_replay_with_new_numbers(text):
    x, other = sample(), sample() * 3 + 1
    how = {"signs": cq.random_signs(4096, 0)}
    static = x.cuda()

    def call():
        y = cq.block_hadamard(static, 64, **how)
        return y, cq.fake_quantize(y, text), cq.rotate_fake_quantize(static, 64, text, **how)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(), call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    static.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    expected = cq.rotate_fake_quantize(other, 64, text, **how)
    assert torch.equal(captured[2].cpu(), expected)
    for ours, theirs in zip(captured, call(), strict=True):
        assert torch.equal(ours, theirs)


def test_memory_that_runs_out_is_torchs_error_and_leaves_the_rest_usable():
    x = sample(16).cuda()
    expected = cq.block_hadamard(x, 64)
    free = torch.cuda.mem_get_info()[0]
    rows = free // (4096 * 2) * 3 // 4
    held = [torch.zeros(rows, 4096, dtype=torch.bfloat16, device="cuda")]
    statistics = cq.ActivationStats(4096, gram=True).update(x)
    count, gram = statistics.count, statistics.gram
    for call in (
        lambda x: cq.block_hadamard(x, 64),
        lambda x: cq.fake_quantize(x, "e3m2:token"),
        lambda x: cq.quantize(x, "int4:token"),
        lambda x: statistics.update(x),
    ):
        with pytest.raises(torch.OutOfMemoryError):
            call(held[0])
    held.clear()
    torch.cuda.empty_cache()
    assert torch.equal(cq.block_hadamard(x, 64), expected)
    assert statistics.count == count
    np.testing.assert_array_equal(statistics.gram, gram)


def test_tensors_of_two_devices_are_refused():
    x = sample(4, 64)
    with pytest.raises(cq.BackendError, match=r"x on cuda:0 and out on cpu"):
        cq.block_hadamard(x.cuda(), 16, out=torch.empty_like(x))
    q = cq.quantize(x, "int4:channel")
    with pytest.raises(cq.BackendError, match=r"x on cuda:0 and scales on cpu"):
        cq.quantize(x.cuda(), "int4:channel", q.scales)
    with pytest.raises(cq.BackendError, match=r"W on cuda:0 and H on cpu"):
        cq.gptq(x.float().cuda(), torch.eye(64), "int4:channel")


def test_models_become_the_same_from_the_same_statistics():
    tokens = np.arange(4 * 64).reshape(4, 64) % 101
    for recipe in (
        Recipe(block_size=16, permutation="massdiff"),
        Recipe(block_size=16, permutation="auto", factors="scales"),
    ):
        model = cqhf.tiny_model("llama")
        statistics = cqhf.calibrate(model, recipe, tokens)
        expected = cqhf.quantize(model, recipe, statistics)
        found = cqhf.quantize(cqhf.tiny_model("llama").cuda(), recipe, statistics)
        for matrix in expected.plan.quantized:
            ours, theirs = (m.model.get_submodule(matrix.name) for m in (found, expected))
            assert ours.weight.is_cuda
            np.testing.assert_array_equal(ours.quantized.codes, theirs.quantized.codes)
        ids = torch.from_numpy(tokens[:1])
        logits = found.model(input_ids=ids.cuda(), use_cache=False).logits.cpu()
        wanted = expected.model(input_ids=ids, use_cache=False).logits
        assert torch.allclose(logits, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
        there = cqhf.calibrate(cqhf.tiny_model("llama").cuda(), recipe, tokens)
        for region, order in expected.choices.permutations.items():
            np.testing.assert_array_equal(found.choices.permutations[region], order)
            ours, theirs = there.statistics[region], statistics.statistics[region]
            np.testing.assert_allclose(ours.mean_abs, theirs.mean_abs, rtol=1e-4)


@pytest.mark.parametrize("rounding", ["gptq", "qronos", "learned"])
def test_models_are_rounded_there_as_well_as_here(rounding):
    tokens = np.arange(4 * 64).reshape(4, 64) % 101
    recipe = Recipe(block_size=16, rounding=rounding, fit_scales=True, steps=50)
    results = []
    for device in ("cpu", "cuda"):
        made = cqhf.quantize(cqhf.tiny_model("llama").to(device), recipe, tokens)
        assert made.verification.logits_error < 1e-9
        results.append(cqhf.evaluate(made.model, tokens).perplexity)
    assert results[1] == pytest.approx(results[0], rel=0.02)


def test_solvers_stay_on_the_device():
    rng = np.random.default_rng(0)
    x = heavy_tailed(rng, 1000, 256).astype(np.float32)
    W, H = rng.normal(size=(96, 256)).astype(np.float32), x.T @ x / len(x)
    for spec in ("int4:channel", "nf4:group64"):
        expected = cq.gptq(W, H, spec)
        found = cq.gptq(torch.from_numpy(W).cuda(), torch.from_numpy(H).cuda(), spec)
        assert found.codes.is_cuda
        assert found.report.loss == pytest.approx(expected.report.loss, rel=5e-3)
    there = [torch.from_numpy(a).cuda() for a in (W, H)]
    for function, more in ((cq.learned_rounding, {"steps": 50}), (cq.fit_scales, {})):
        expected = function(W, H, "int4:channel", **more)
        found = function(*there, "int4:channel", **more)
        assert found.codes.is_cuda
        losses = [cq.reconstruction_loss(W, q, H) for q in (host(found), expected)]
        assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    np.testing.assert_allclose(cq.magr(*there).cpu().numpy(), cq.magr(W, H), atol=1e-4)


def host(q):
    codes, scales = (t.cpu().numpy() for t in (q.codes, q.scales))
    return cq.QuantizedTensor(codes, scales, None, q.spec)
