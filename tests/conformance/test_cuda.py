"""What only a GPU can show: streams, graphs, memory that runs out, compiled kernels.

Needs no adapter, so that it runs where only torch is installed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import corequant as cq
from corequant.testing import check_error
from corequant_torch import nonfinite_replays, rotate_quantize_packed
from corequant_torch.gpu import statistics as launch_streams
from tests.conftest import heavy_tailed

pytestmark = pytest.mark.cuda

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SPECS = ("int4:token:asymmetric", "int4:group32", "mxfp4", "nvfp4")


@pytest.fixture(autouse=True)
def gpu():
    assert torch.cuda.is_available(), "cuda was asked for and there is no usable GPU or driver"


def sample(rows=64, d=4096, dtype=torch.bfloat16):
    x = heavy_tailed(np.random.default_rng(0), rows, d)
    return torch.from_numpy(x).to(dtype)


def same_bits(ours, theirs):
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[theirs.element_size()]
    return torch.equal(ours.cpu().view(kind), theirs.cpu().view(kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [4096, 14336, 96 * 28, 16384, 172 * 64])
def test_compiled_rotations_are_numpys_to_the_bit(d, dtype):
    x = sample(8, d, dtype)
    signs = cq.random_signs(d, 0)
    for b in (16, 64, 128, None) if d % 128 == 0 else (16, 32, None):
        for inverse in (False, True):
            for sign in (None, signs):
                how = {"inverse": inverse, "signs": sign}
                found, expected = (cq.block_hadamard(t, b, **how) for t in (x.cuda(), x))
                assert found.is_cuda
                assert same_bits(found, expected)
                exact = cq.block_hadamard(x.double(), b, **how)
                arrays = (t.double().cpu().numpy() for t in (found, expected, exact))
                check_error(f"b={b}", *arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [16, 64, 128, 512, 12, 28 * 16])
def test_first_calls_of_a_kind_may_write_to_their_input(b, dtype):
    d = b * 8 if b < 512 else 4096
    x = sample(64, d, dtype)
    for inverse in (False, True):
        for signs in (None, cq.random_signs(d, 0)):
            how = {"inverse": inverse, "signs": signs}
            there, expected = x.cuda(), cq.block_hadamard(x, b, **how)
            for _ in range(2):
                there.copy_(x)
                assert cq.block_hadamard(there, b, out=there, **how) is there
                assert same_bits(there, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", SPECS)
def test_both_ends_of_the_range(text, dtype):
    wide = sample(32, 4096, torch.float64)
    for scale in (1e-45, 1e-42, 1e-39, 1e-38, 1e-36, 1e-30, 1e-7, 1e3, 1e30, 1e35, 1e36):
        x = (wide * scale).to(dtype)
        if not cq.block_hadamard(x, 64).isfinite().all():
            continue
        assert same_bits(cq.block_hadamard(x.cuda(), 64), cq.block_hadamard(x, 64))
        for function in (cq.fake_quantize, lambda t, s: cq.rotate_fake_quantize(t, 64, s)):
            assert same_bits(function(x.cuda(), text), function(x, text)), scale


def every_number(dtype):
    """Return all finite numbers of a dtype of 16 bits, subnormal ones too, shuffled."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return every[order[: len(every) // 256 * 256]].reshape(-1, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", SPECS)
def test_every_number_of_sixteen_bits(text, dtype):
    x = every_number(dtype)
    # Sorted too: groups of neighbours, down to the subnormal ones, and not only next to large ones.
    for given in (x, x.flatten().abs().sort().values.reshape(x.shape)):
        found, expected = (cq.quantize(t, text) for t in (given.cuda(), given))
        assert torch.equal(found.codes.cpu(), expected.codes)
        assert torch.equal(found.scales.cpu(), expected.scales)
        assert same_bits(cq.fake_quantize(given.cuda(), text), cq.fake_quantize(given, text))
        # One number a block: rotating by 1 reads, scales and writes all of them.
        assert same_bits(cq.block_hadamard(given.cuda(), 1), given)
        small = given / 16
        assert same_bits(cq.block_hadamard(small.cuda(), 16), cq.block_hadamard(small, 16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", SPECS)
def test_one_rotation_for_all_functions(text, dtype):
    x = sample(33, 4096, dtype).cuda()
    p, signs = cq.random_permutation(4096, 0), cq.random_signs(4096, 1)
    for b in (16, 64, 512):
        how = {"permutation": p, "signs": signs}
        fused = cq.rotate_quantize(x, b, text, **how)
        steps = cq.quantize(
            cq.block_hadamard(x[:, torch.from_numpy(p).cuda()], b, signs=signs), text
        )
        for name in ("codes", "scales", "zero_points", "global_scale"):
            ours, theirs = getattr(fused, name), getattr(steps, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)
        packed = rotate_quantize_packed(x, b, text, **how)
        nibbles = (steps.codes.int() - steps.spec.format.least_code).to(torch.uint8)
        assert torch.equal(packed.packed, nibbles[..., 0::2] | (nibbles[..., 1::2] << 4))


def test_more_than_two_to_the_31_numbers():
    rows, d = 2**31 // 4096 + 8, 4096
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.fail("24 GiB of free memory are needed")
    x = torch.randn(rows, d, device="cuda", dtype=torch.bfloat16)
    tail = x[-8:].cpu()
    signs = cq.random_signs(d, 0)
    for b in (64, 4096):
        found = cq.block_hadamard(x, b, signs=signs)
        assert same_bits(found[-8:], cq.block_hadamard(tail, b, signs=signs))
        del found
    for text in ("mxfp4", "int4:token:asymmetric"):
        found, expected = (cq.rotate_quantize(t, 64, text, signs=signs) for t in (x, tail))
        assert torch.equal(found.codes[-8:].cpu(), expected.codes)
        del found
    last = cq.block_hadamard(x, 64, signs=signs, out=x)
    assert same_bits(last[-8:], cq.block_hadamard(tail, 64, signs=signs))


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

    graph, results = captured(call)
    static.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    expected = cq.rotate_fake_quantize(other, 64, text, **how)
    assert torch.equal(results[2].cpu(), expected)
    for ours, theirs in zip(results, call(), strict=True):
        assert torch.equal(ours, theirs)


def captured(call):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(), call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_a_graph_replays_after_many_other_permutations_and_signs():
    x = sample()
    there, p, signs = x.cuda(), cq.random_permutation(4096, 0), cq.random_signs(4096, 0)
    expected = cq.rotate_fake_quantize(x, 64, "int4:token", permutation=p, signs=signs)
    graph, found = captured(
        lambda: cq.rotate_fake_quantize(there, 64, "int4:token", permutation=p, signs=signs)
    )
    held = []
    for k in range(1, 81):
        how = {"permutation": cq.random_permutation(4096, k), "signs": cq.random_signs(4096, k)}
        held.append(cq.rotate_fake_quantize(there, 64, "int4:token", **how))
        # What would be given the memory of a table that is dropped.
        held.append(torch.zeros(4096, dtype=torch.int64, device="cuda"))
        held.append(torch.zeros(4096, dtype=torch.int8, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(found, expected)


@pytest.mark.parametrize("text", SPECS)
def test_a_replay_that_meets_what_is_not_finite_is_counted(text):
    x = sample()
    there = x.cuda()
    graph, found = captured(lambda: cq.rotate_fake_quantize(there, 64, text))
    graph.replay()
    assert nonfinite_replays() == 0
    there[3, 70] = float("nan")
    graph.replay(), graph.replay()
    assert nonfinite_replays() == 2
    there.copy_(x)
    graph.replay()
    assert nonfinite_replays() == 0
    assert same_bits(found, cq.rotate_fake_quantize(x, 64, text))


def test_a_table_that_is_not_there_yet_cannot_be_captured():
    x = sample(2, 64).cuda()
    cq.rotate_fake_quantize(x, 16, "int4:token")
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(cq.BackendError, match="call the function once with the same arguments"),
        torch.cuda.graph(graph),
    ):
        cq.rotate_fake_quantize(x, 16, "int4:token", signs=cq.random_signs(64, 12345))
    assert same_bits(cq.block_hadamard(x, 16), cq.block_hadamard(x.cpu(), 16))


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
