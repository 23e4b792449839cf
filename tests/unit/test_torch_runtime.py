"""What kernels on a device need around them: tables that stay there, waits, graphs, errors.

Triton's interpreter stands for a GPU, and CUDA graphs are only said to be captured.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import corequant as cq
from corequant._dispatch import get_backend
from corequant.specs import Granularity, QuantSpec
from corequant_torch import nonfinite_replays
from corequant_torch.device import graphs, tables
from corequant_torch.gpu import fusion, rotation, runtime
from corequant_torch.kernels import device
from corequant_torch.kernels.device import DeviceKernels
from tests.conftest import heavy_tailed

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:.*:RuntimeWarning:triton"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FUSED = ["int4:token:asymmetric", "int4:group32", "int4:group32:pow2", "mxfp4", "nvfp4"]


@pytest.fixture(scope="module")
def kernels():
    return DeviceKernels(triton=True)


@pytest.fixture(autouse=True)
def counted_anew(monkeypatch):
    """What a test leaves in the counts of replays is no other's business."""
    monkeypatch.setattr(graphs, "_counters", {})


def sample(dtype):
    x = heavy_tailed(np.random.default_rng(5), 3, 96)
    x[1, :32] = 0
    return torch.from_numpy(x).to(dtype)


def test_captured_launches_count_instead_of_asking(kernels, monkeypatch):
    x = sample(torch.float32)
    texts = ("int4:group32", "nvfp4", "e3m2:token")
    expected = {text: cq.fake_quantize(x, text) for text in texts}
    for text in texts:
        kernels.fake_quantize(x, QuantSpec.parse(text))
    nonfinite_replays("cpu")
    monkeypatch.setattr(graphs, "capturing", lambda device: True)
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
    monkeypatch.setattr(graphs, "capturing", lambda device: False)
    with pytest.raises(cq.NonFiniteError):
        kernels.fake_quantize(x, QuantSpec.parse("nvfp4"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("text", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_not_a_number_in_a_replay(kernels, monkeypatch, dtype, text, bad):
    x, spec = sample(dtype), QuantSpec.parse(text)
    expected = kernels.fake_quantize(x, spec)
    x[2, 7] = bad
    monkeypatch.setattr(graphs, "capturing", lambda device: True)
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
    monkeypatch.setattr(graphs, "capturing", lambda device: True)
    with pytest.raises(cq.BackendError, match="call the function once with the same arguments"):
        graphs.all_good(torch.ones((), dtype=torch.bool))
    assert nonfinite_replays("cpu") == 0


@pytest.mark.parametrize("text", ["int4:group32", "mxfp4", "nvfp4", "int8:token:asymmetric"])
def test_a_call_waits_for_the_device_once(kernels, monkeypatch, text):
    x, spec, asked = sample(torch.float32), QuantSpec.parse(text), []
    for module in (fusion, device):
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
        with pytest.raises(cq.BackendError, match="not on cpu; call the function once"):
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
        graphs.all_good(torch.ones((), dtype=torch.bool))
        table = kept.find("p", torch.device("cpu"), lambda: p)
    x = torch.ones(3, requires_grad=True)
    x[table].sum().backward()
    assert torch.equal(x.grad, torch.ones(3))
    monkeypatch.setattr(graphs, "capturing", lambda device: True)
    assert graphs.all_good(torch.zeros((), dtype=torch.bool))
    with torch.inference_mode():
        assert graphs.all_good(torch.zeros((), dtype=torch.bool))
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

    monkeypatch.setattr(rotation, "rotate_powers", Kernel())
    with pytest.raises(cq.BackendError, match=r"Failed to find C compiler.*uninstall triton"):
        rotation.rotate(sample(torch.float32), 16, False, None, None)


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
    assert graphs.capturing(torch.device("cuda", 1))
    assert not graphs.capturing(torch.device("cuda", 0))
    assert not graphs.capturing(torch.device("cpu"))


def test_memory_that_runs_out_stays_torchs_error():
    with pytest.raises(torch.OutOfMemoryError), runtime.on_device(torch.ones(1)):
        raise torch.OutOfMemoryError("CUDA out of memory")
