"""Triton's kernels in its interpreter, which tests/conftest.py chooses."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from triton.runtime import autotuner

import corequant as cq
from corequant._dispatch import get_backend
from corequant.specs import Granularity, QuantSpec
from corequant_torch import (
    device,
    launch,
    launch_rotation,
    nonfinite_replays,
    rotate_quantize_packed,
    runtime,
    tables,
    triton_columns,
    triton_fused,
    triton_rotation,
    triton_streams,
)
from corequant_torch.device import DeviceKernels
from tests.conftest import heavy_tailed

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:.*:RuntimeWarning:triton"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FUSED = [
    "int4:token:asymmetric",
    "int8:group32:asymmetric",
    "int4:group32",
    "int4:token",
    "int4:group32:pow2",
    "mxfp4",
    "mxfp4:ceil",
    "mxfp4:even",
    "nvfp4",
]


@pytest.fixture(scope="module")
def kernels():
    assert runtime.interpreted()
    return DeviceKernels(triton=True)


@pytest.fixture(autouse=True)
def counted_anew(monkeypatch):
    """What a test leaves in the counts of replays is no other's business."""
    monkeypatch.setattr(runtime, "_counters", {})


def astuple(q):
    return q.codes, q.scales, q.zero_points


def sample(dtype, rows=3, d=96):
    x = heavy_tailed(np.random.default_rng(5), rows, d)
    x[1, :32] = 0
    return torch.from_numpy(x).to(dtype)


def same_bits(ours, theirs):
    """Equal to the bit, zeros of either sign told apart."""
    return torch.equal(ours, theirs) and torch.equal(ours.signbit(), theirs.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 2, 16, 128, 4096, 12, 20 * 2, 28 * 16, 60 * 4, 172 * 2])
def test_rotations_are_numpys_to_the_bit(kernels, dtype, block_size):
    d = block_size * (2 if block_size < 512 else 1)
    x = torch.randn(3, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1], x[2, :block_size] = 0, -0.0
    signs = cq.random_signs(d, 0)
    for inverse, sign in ((False, signs), (True, signs), (False, None), (True, None)):
        how = {"axis": 1, "inverse": inverse, "signs": sign, "threads": None}
        table = None if sign is None else torch.from_numpy(sign)
        found = launch_rotation.rotate(x, block_size, inverse, table, None)
        assert found is not None
        expected = cq.block_hadamard(x, block_size, inverse=inverse, signs=sign)
        assert same_bits(found, expected)
        # Without Triton it is the same.
        plain = DeviceKernels(triton=False).block_hadamard(x, block_size, out=None, **how)
        assert same_bits(plain, expected)
        out = torch.empty(d, 3, dtype=dtype).T
        assert kernels.block_hadamard(x, block_size, out=out, **how) is out
        assert same_bits(out, expected)
        own = x.clone()
        assert kernels.block_hadamard(own, block_size, out=own, **how) is own
        assert same_bits(own, expected)


@pytest.mark.parametrize("block_size", [8192, 32768, 28 * 512, 2 * 32768])
def test_large_rotations_are_numpys_to_the_bit(kernels, block_size):
    x = torch.randn(1, block_size, generator=torch.Generator().manual_seed(0))
    kernel = launch_rotation.rotate(x, block_size, False, None, None)
    assert (kernel is None) == (block_size > 32768)
    how = {"axis": 1, "inverse": False, "signs": None, "out": None, "threads": None}
    expected = cq.block_hadamard(x, block_size)
    assert same_bits(kernels.block_hadamard(x, block_size, **how), expected)


def test_rotations_up_to_the_largest_number(kernels):
    """Parts of bfloat16 would overflow from 3.39e38 on, where only a sum may."""
    largest = torch.finfo(torch.float32).max
    x = torch.zeros(4, 64)
    x[0, 5], x[1, 0], x[1, 1], x[2, 3], x[3, :8] = largest, 3.2e38, 1e37, -3.395e38, largest / 8
    how = {"axis": 1, "inverse": False, "signs": None, "out": None, "threads": None}
    expected = cq.block_hadamard(x, 64)
    assert bool(expected.isfinite().all())
    assert same_bits(kernels.block_hadamard(x, 64, **how), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_call_of_a_kind_may_write_to_its_input(kernels, monkeypatch, dtype):
    """As compiled kernels are launched: nothing runs on the caller's memory to be measured."""
    monkeypatch.setattr(autotuner.Autotuner, "do_bench", measured_twice, raising=False)
    for module in (launch, launch_rotation):
        monkeypatch.setattr(module, "interpreted", lambda: dtype is not torch.float32)
    signs = cq.random_signs(96, 0)
    for block_size in (32, 12):
        for inverse in (False, True):
            x = sample(dtype)
            expected = cq.block_hadamard(x, block_size, inverse=inverse, signs=signs)
            how = {"axis": 1, "inverse": inverse, "signs": signs, "threads": None}
            assert kernels.block_hadamard(x, block_size, out=x, **how) is x
            assert same_bits(x, expected)


def measured_twice(self, call, quantiles):
    call(), call()
    return [1.0, 1.0, 1.0]


def test_no_kernel_is_tuned_by_running_it():
    for module in (triton_columns, triton_fused, triton_rotation, triton_streams):
        kinds = {type(value) for value in vars(module).values()}
        assert autotuner.Autotuner not in kinds


@pytest.mark.parametrize("text", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_codes_do_not_differ(kernels, dtype, text):
    spec, x = QuantSpec.parse(text), sample(dtype)
    p, signs = cq.random_permutation(96, 0), cq.random_signs(96, 1)
    how = {"permutation": p, "signs": signs}
    expected = cq.rotate_quantize(x, 16, spec, **how)
    tables = torch.from_numpy(p), torch.from_numpy(signs)
    codes = launch.fused(x, 16, spec, *tables, launch.CODES)
    assert codes is not None
    assert int((codes.out != expected.codes).sum()) == 0
    assert torch.equal(codes.scales.reshape(expected.scales.shape), expected.scales)
    if expected.zero_points is not None:
        assert torch.equal(codes.zeros.flatten(), expected.zero_points.flatten().float())
    if expected.global_scale is not None:
        assert torch.equal(codes.global_scale, expected.global_scale)
    values = kernels.rotate_fake_quantize(x, 16, spec, out=None, threads=None, **how)
    assert torch.equal(values, cq.rotate_fake_quantize(x, 16, spec, **how))
    if spec.format.bits == 4:
        packed = launch.fused(x, 16, spec, *tables, launch.PACKED)
        assert torch.equal(packed.out, rotate_quantize_packed(x, 16, spec, **how).packed)


@pytest.mark.parametrize("text", [*FUSED, "e3m2:group32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 12])
def test_one_rotation_for_all_functions(kernels, dtype, text, block_size):
    spec, x = QuantSpec.parse(text), sample(dtype)
    p, signs = cq.random_permutation(96, 0), cq.random_signs(96, 1)
    how = {"signs": signs, "out": None, "threads": None}
    y = kernels.block_hadamard(x[:, p], block_size, axis=1, inverse=False, **how)
    codes, scales, zeros = kernels.quantize(y, spec)
    fused = kernels.rotate_quantize(x, block_size, spec, permutation=p, **how)
    assert (fused is None) == (block_size == 12 or text.startswith("e3m2"))
    expected = cq.rotate_quantize(x, block_size, spec, permutation=p, signs=signs)
    for ours in ((codes, scales, zeros), fused[:3] if fused else ()):
        for found, wanted in zip(ours, astuple(expected), strict=False):
            assert found is wanted is None or torch.equal(found, wanted)
    if fused and expected.global_scale is not None:
        assert torch.equal(fused[3], expected.global_scale)


@pytest.mark.parametrize("text", ["int4:group32", "mxfp4", "nvfp4", "int8:token:asymmetric"])
def test_fake_quantize(kernels, text):
    x = sample(torch.bfloat16, rows=2)
    found = kernels.fake_quantize(x, QuantSpec.parse(text))
    assert torch.equal(found, cq.fake_quantize(x, text))


@pytest.mark.parametrize("block_size", [16, 32])
def test_packed_bytes_are_those_of_the_core(block_size):
    x = sample(torch.float32, d=64)
    for text in ("mxfp4", "nvfp4", "int4:group32:asymmetric", "int4:group32:float16"):
        found = rotate_quantize_packed(x, block_size, text)
        y = cq.block_hadamard(x.numpy(), block_size)
        expected = cq.quantize_packed(y, text)
        np.testing.assert_array_equal(found.packed.numpy(), expected.packed)
        np.testing.assert_array_equal(found.scales.numpy(), expected.scales)
        assert found.scales.numpy().dtype == expected.scales.dtype
    with pytest.raises(cq.SpecError, match="format of 4 bits"):
        rotate_quantize_packed(x, 16, "int8:token")
    with pytest.raises(cq.ShapeError, match="whole 32-bit words"):
        rotate_quantize_packed(x[:, :4], 4, "int4:token")


def test_what_is_not_finite_takes_the_steps_that_name_it(kernels):
    x = sample(torch.float32)
    x[2, 7] = float("nan")
    spec = QuantSpec.parse("int4:group32")
    assert launch.fused(x, 16, spec, None, None, launch.CODES) is None
    with pytest.raises(cq.NonFiniteError, match=r"index \(2, 7\)"):
        kernels.fake_quantize(x, spec)
    y = launch_rotation.rotate(x, 16, False, None, None)
    assert int(torch.isnan(y).sum()) == 16
    assert bool(torch.isnan(y[2, :16]).all())


@pytest.mark.parametrize(
    ("text", "block_size"),
    [("int4:tensor", 16), ("e3m2:group32", 16), ("int4:group24", 16), ("int4:token", 12)],
)
def test_cases_without_a_fused_kernel_say_none(text, block_size):
    x = sample(torch.float32)
    assert launch.fused(x, block_size, QuantSpec.parse(text), None, None, launch.CODES) is None


def test_results_may_go_into_the_input(kernels):
    x = sample(torch.float32)
    spec, p = QuantSpec.parse("int4:group32"), cq.random_permutation(96, 0)
    expected = cq.rotate_fake_quantize(x, 16, spec, permutation=p)
    how = {"permutation": p, "signs": None, "threads": None}
    assert kernels.rotate_fake_quantize(x, 16, spec, out=x, **how) is x
    assert torch.equal(x, expected)


def test_the_input_is_named_where_results_should_replace_it(kernels):
    x = sample(torch.float32)
    x[2, 7] = float("nan")
    before = x.clone()
    spec = QuantSpec.parse("int4:group32")
    how = {"permutation": None, "signs": None, "threads": None}
    assert kernels.rotate_fake_quantize(x, 16, spec, out=x, **how) is None
    assert torch.equal(x.nan_to_num(1e9), before.nan_to_num(1e9))
    with pytest.raises(cq.NonFiniteError, match=r"index \(2, 7\)"):
        kernels.fake_quantize(x, spec, out=x)


def test_captured_launches_count_instead_of_asking(kernels, monkeypatch):
    """No CUDA graph without a GPU: here the device is only said to be captured."""
    x = sample(torch.float32)
    texts = ("int4:group32", "nvfp4", "e3m2:token")
    expected = {text: cq.fake_quantize(x, text) for text in texts}
    for text in texts:
        kernels.fake_quantize(x, QuantSpec.parse(text))
    nonfinite_replays("cpu")
    monkeypatch.setattr(runtime, "capturing", lambda device: True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", refused)
        found = {text: kernels.fake_quantize(x, QuantSpec.parse(text)) for text in texts}
    assert all(torch.equal(found[text], values) for text, values in expected.items())
    assert nonfinite_replays("cpu") == 0
    x[2, 7] = float("nan")
    for text in texts:
        kernels.fake_quantize(x, QuantSpec.parse(text))
    assert nonfinite_replays("cpu") == len(texts)
    assert nonfinite_replays("cpu") == 0
    monkeypatch.setattr(runtime, "capturing", lambda device: False)
    with pytest.raises(cq.NonFiniteError):
        kernels.fake_quantize(x, QuantSpec.parse("nvfp4"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("text", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_not_a_number_in_a_replay(kernels, monkeypatch, dtype, text, bad):
    x, spec = sample(dtype), QuantSpec.parse(text)
    expected = kernels.fake_quantize(x, spec)
    x[2, 7] = bad
    monkeypatch.setattr(runtime, "capturing", lambda device: True)
    found = kernels.fake_quantize(x, spec)
    _, scales, *_ = kernels.rotate_quantize(
        x, 1, spec, permutation=None, signs=None, out=None, threads=None
    )
    size = spec.group_size or 96
    assert bool(found[2, :size].isnan().all())
    assert bool(scales[2, 0].isnan())
    if spec.granularity is not Granularity.TENSOR_GROUP:
        assert torch.equal(found[:2], expected[:2])


def refused(tensor):
    raise AssertionError("a captured call waits for the device")


def test_a_call_that_is_captured_first_says_what_to_do(monkeypatch):
    monkeypatch.setattr(runtime, "capturing", lambda device: True)
    with pytest.raises(cq.BackendError, match="call the function once with the same arguments"):
        runtime.all_good(torch.ones((), dtype=torch.bool))
    assert nonfinite_replays("cpu") == 0


@pytest.mark.parametrize("text", ["int4:group32", "mxfp4", "nvfp4", "int8:token:asymmetric"])
def test_a_call_waits_for_the_device_once(kernels, monkeypatch, text):
    x, spec, asked = sample(torch.float32), QuantSpec.parse(text), []
    for module in (launch, device):
        real = module.all_good
        monkeypatch.setattr(module, "all_good", lambda good, f=real: asked.append(good) or f(good))
    how = {"permutation": cq.random_permutation(96, 0), "signs": cq.random_signs(96, 1)}
    for function, arguments in (
        (kernels.fake_quantize, (x, spec)),
        (kernels.quantize, (x, spec)),
        (partial(kernels.rotate_quantize, out=None, threads=None, **how), (x, 16, spec)),
        (partial(kernels.rotate_fake_quantize, out=None, threads=None, **how), (x, 16, spec)),
    ):
        asked.clear()
        assert function(*arguments) is not None
        assert len(asked) == 1


def test_tables_are_kept_on_a_device():
    signs = cq.random_signs(96, 0)
    there = torch.empty(1, device="meta")
    found = tables.device_table(signs, there)
    assert found.device.type == "meta"
    assert tables.device_table(signs.copy(), there) is found
    assert tables.device_table(-signs, there) is not found
    assert tables.device_table(None, there) is None
    assert tables.device_table(signs, torch.ones(1)).data_ptr() == signs.ctypes.data


def test_indices_are_kept_on_a_device_too(monkeypatch):
    p, given = cq.random_permutation(96, 0), []
    real = tables.KeptTables.find
    monkeypatch.setattr(tables.KeptTables, "find", lambda *a: given.append(real(*a)) or given[-1])
    x, backend = sample(torch.float32), get_backend("torch")
    there = x.to("meta")
    for _ in range(2):
        assert backend.permute_channels(there, p).shape == x.shape
    assert given[0] is given[1]
    assert torch.equal(backend.permute_channels(x, p), x[:, p])


def test_the_tables_of_a_large_model_stay_where_they_are():
    there = torch.empty(1, device="meta")
    given = [cq.random_permutation(512, seed) for seed in range(150)]
    given += [cq.random_signs(512, seed) for seed in range(150)]
    first = [tables.device_table(values, there) for values in given]
    again = [tables.device_table(values, there) for values in given]
    assert all(a is b for a, b in zip(first, again, strict=True))


def test_tables_that_a_graph_reads_are_never_dropped(monkeypatch):
    kept, where = tables.KeptTables(limit=1000), torch.device("cpu")

    def find(k):
        return kept.find(k, where, lambda: np.full(50, k, np.int16))

    first, second = find(0), find(1)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "capturing", lambda device: True)
        assert find(0) is first
        with pytest.raises(cq.BackendError, match="not on cpu yet; call the function once"):
            find(99)
    for k in range(2, 200):
        assert int(find(k)[0]) == k
    assert find(0) is first
    assert int(find(1)[0]) == 1
    assert find(1) is not second
    assert kept.nbytes <= 1100


def test_what_is_kept_in_inference_mode_serves_outside_of_it(monkeypatch):
    kept, p = tables.KeptTables(limit=1000), np.array([1, 0, 2])
    with torch.inference_mode():
        runtime.all_good(torch.ones((), dtype=torch.bool))
        table = kept.find("p", torch.device("cpu"), lambda: p)
    x = torch.ones(3, requires_grad=True)
    x[table].sum().backward()
    assert torch.equal(x.grad, torch.ones(3))
    monkeypatch.setattr(runtime, "capturing", lambda device: True)
    assert runtime.all_good(torch.zeros((), dtype=torch.bool))
    with torch.inference_mode():
        assert runtime.all_good(torch.zeros((), dtype=torch.bool))
    assert nonfinite_replays("cpu") == 2


def test_tables_are_kept_once_by_several_threads():
    kept, where, made = tables.KeptTables(limit=1 << 20), torch.device("cpu"), []

    def find(k):
        return kept.find(k % 7, where, lambda: made.append(k) or np.full(64, k % 7))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(find, range(700)))
    assert all(int(t[0]) == k % 7 for k, t in enumerate(found))
    assert kept.nbytes == 7 * 64 * 8
    kept.forget()
    assert kept.nbytes == 0


def test_triton_that_cant_run_says_what_to_do(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("Failed to find C compiler")

    class Kernel:
        def __getitem__(self, grid):
            return broken

    monkeypatch.setattr(triton_rotation, "rotate_powers", Kernel())
    with pytest.raises(cq.BackendError, match=r"Failed to find C compiler.*uninstall triton"):
        launch_rotation.rotate(sample(torch.float32), 16, False, None, None)


class Gpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    """Let torch.cuda's calls say which device they were about."""
    current = [0]

    @contextlib.contextmanager
    def guard(device):
        before, current[0] = current[0], torch.device(device).index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return current


def test_what_earlier_work_has_broken_stays_torchs_error(gpu, monkeypatch):
    def failed(device):
        assert device.index == 1
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = torch.ones(1).as_subclass(Gpu)
    with pytest.raises(cq.BackendError, match="no kernel image"), runtime.on_device(x):
        raise RuntimeError("Triton Error [CUDA]: no kernel image is available")
    monkeypatch.setattr(torch.cuda, "synchronize", failed)
    with pytest.raises(torch.AcceleratorError, match="assert"), runtime.on_device(x):
        raise RuntimeError("Triton Error [CUDA]: device-side assert triggered")
    with pytest.raises(torch.AcceleratorError, match="before"), runtime.on_device(x):
        raise torch.AcceleratorError("before")


def test_the_stream_of_the_tensors_device_is_asked(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu[0] == 1)
    assert runtime.capturing(torch.device("cuda", 1))
    assert not runtime.capturing(torch.device("cuda", 0))
    assert not runtime.capturing(torch.device("cpu"))


def test_memory_that_runs_out_stays_torchs_error():
    with pytest.raises(torch.OutOfMemoryError), runtime.on_device(torch.ones(1)):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_without_triton_torch_operations_do_it(monkeypatch):
    monkeypatch.setattr("corequant_torch.device.has_triton", lambda: False)
    assert not DeviceKernels()._triton(torch.ones(1).as_subclass(Gpu))
    monkeypatch.setattr("corequant_torch.device.has_triton", lambda: True)
    assert DeviceKernels()._triton(torch.ones(1).as_subclass(Gpu))
    assert not DeviceKernels()._triton(torch.ones(1))


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: torch.cat([x, x], 1)[:, :96],
        lambda x: x[None].expand(2, 3, 96),
    ],
)
def test_strided_tensors(kernels, strided):
    plain = sample(torch.float32)
    x, spec = strided(plain), QuantSpec.parse("int4:group32:asymmetric")
    wide = x.contiguous()
    assert torch.equal(kernels.fake_quantize(x, spec), kernels.fake_quantize(wide, spec))
    how = {"axis": x.ndim - 1, "inverse": False, "signs": None, "out": None, "threads": None}
    found = kernels.block_hadamard(x, 16, **how)
    assert torch.equal(found, kernels.block_hadamard(wide, 16, **how))
    codes, scales, zeros = kernels.quantize(x, spec)
    back = kernels.dequantize(strided(codes[..., :96].reshape(-1, 96)[:3]), spec, scales, zeros)
    assert back.shape == x.shape
    for ours, theirs in zip(kernels.moments(x), kernels.moments(wide), strict=True):
        np.testing.assert_array_equal(ours, theirs)
