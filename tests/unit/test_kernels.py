"""block_hadamard: arguments, memory, threads, processes."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import corequant as cq
from corequant._cpu import arrays
from corequant._cpu import rotation as _rotation
from corequant._cpu.codegen import compiler
from tests import capabilities

ROOT = Path(cq.__file__).parents[1]
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def run(script, **environment):
    path = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_come_before_forwards_and_after_backwards(rng, dtype):
    x = rng.normal(size=(5, 96)).astype(dtype)
    signs = cq.random_signs(96, 1)
    signed = cq.block_hadamard((x * signs.astype(dtype)).astype(dtype), 32)
    np.testing.assert_array_equal(cq.block_hadamard(x, 32, signs=signs), signed)
    back = cq.block_hadamard(x, 32, inverse=True) * signs.astype(dtype)
    np.testing.assert_array_equal(cq.block_hadamard(x, 32, inverse=True, signs=signs), back)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [2, 16, 256, 4096, 20, 12 * 64, 92 * 16])
def test_the_inverse_undoes_the_rotation(rng, dtype, order):
    x = rng.normal(size=(3, order)).astype(dtype)
    back = cq.block_hadamard(cq.block_hadamard(x), inverse=True)
    tolerance = {2: 0.02, 4: 1e-5, 8: 1e-13}[np.dtype(dtype).itemsize]
    np.testing.assert_allclose(back.astype(np.float64), x.astype(np.float64), atol=tolerance)


def test_any_axis(rng):
    x = rng.normal(size=(4, 24, 50)).astype(np.float32)
    moved = np.moveaxis(cq.block_hadamard(np.moveaxis(x, 1, -1), 12), -1, 1)
    np.testing.assert_array_equal(cq.block_hadamard(x, 12, axis=1), moved)
    np.testing.assert_array_equal(cq.block_hadamard(x, 12, axis=-2), moved)
    for axis in (3, -4):
        with pytest.raises(ValueError, match="axis must be"):
            cq.block_hadamard(x, 12, axis=axis)


def test_input_is_not_changed_and_out_is_returned(rng):
    x = rng.normal(size=(3, 64)).astype(np.float32)
    before, out = x.copy(), np.empty_like(x)
    assert cq.block_hadamard(x, 16, out=out) is out
    np.testing.assert_array_equal(x, before)
    assert cq.block_hadamard(x, 16, out=x) is x
    np.testing.assert_array_equal(x, out)


def test_overlapping_and_readonly_outputs_are_refused(rng):
    memory = rng.normal(size=200).astype(np.float32)
    with pytest.raises(ValueError, match="overlap"):
        cq.block_hadamard(memory[:128], 64, out=memory[64:192])
    with pytest.raises(ValueError, match="overlap"):
        cq.block_hadamard(memory[:128], 64, out=memory[127::-1])
    fixed = memory[:64].copy()
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        cq.block_hadamard(memory[:64], 64, out=fixed)
    np.testing.assert_array_equal(cq.block_hadamard(fixed), cq.block_hadamard(fixed.copy()))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (0,)])
def test_empty_batches(shape):
    x = np.empty(shape, np.float32)
    if shape[-1] == 0:
        with pytest.raises(cq.ShapeError):
            cq.block_hadamard(x)
    else:
        assert cq.block_hadamard(x, 16).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [4, 64, 2048, 12 * 16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_block(rng, dtype, order, bad):
    x = rng.normal(size=(3, 4 * order)).astype(dtype)
    clean = cq.block_hadamard(x, order)
    x[1, order + 1] = bad
    y = cq.block_hadamard(x, order)
    spoilt = ~np.isfinite(y.astype(np.float64))
    assert spoilt[1, order : 2 * order].all()
    spoilt[1, order : 2 * order] = False
    assert not spoilt.any()
    keep = np.ones_like(spoilt)
    keep[1, order : 2 * order] = False
    np.testing.assert_array_equal(y[keep], clean[keep])


@pytest.mark.parametrize("offset", [0, 4, 16, 60])
@pytest.mark.parametrize("order", [2, 16, 1024, 4096, 12 * 16])
def test_streamed_results_are_the_same_bytes(rng, monkeypatch, offset, order):
    x = rng.normal(size=(3, 3 * order)).astype(np.float32)
    expected = cq.block_hadamard(x, order)
    monkeypatch.setattr(arrays, "_STREAMED_BYTES", 0)
    memory = np.full(x.nbytes + 256, 7, np.uint8)
    start = -memory.ctypes.data % 64 + 64 + offset
    out = memory[start : start + x.nbytes].view(np.float32).reshape(x.shape)
    cq.block_hadamard(x, order, out=out)
    np.testing.assert_array_equal(out, expected)
    assert (memory[:start] == 7).all()
    assert (memory[start + x.nbytes :] == 7).all()


def test_result_does_not_depend_on_threads(rng, monkeypatch, use_threads):
    monkeypatch.setattr(_rotation, "_PER_THREAD", 1 << 12)
    _rotation._rows.cache_clear()
    use_threads(7)
    x = rng.normal(size=(256, 1536)).astype(np.float32)
    for axis, order in ((1, 64), (1, 12 * 128), (0, 256)):
        one = cq.block_hadamard(x, order, axis=axis, threads=1)
        for threads in (2, 3, 7):
            many = cq.block_hadamard(x, order, axis=axis, threads=threads)
            np.testing.assert_array_equal(many, one)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        cq.block_hadamard(x, 64, threads=0)


def test_callers_threads_share_the_kernels(rng, monkeypatch, use_threads):
    monkeypatch.setattr(_rotation, "_PER_THREAD", 1 << 14)
    _rotation._rows.cache_clear()
    use_threads(3)
    arrays = [rng.normal(size=(64, 2048)).astype(np.float32) for _ in range(8)]
    expected = [cq.block_hadamard(x, 2048, threads=1) for x in arrays]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: cq.block_hadamard(x, 2048), arrays))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@capabilities.forks
def test_a_forked_worker_rotates():
    script = """
import multiprocessing, numpy as np, corequant as cq
x = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
expected = cq.block_hadamard(x, 256)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(all((r == expected).all() for r in pool.starmap(cq.block_hadamard, [(x, 256)] * 4)))
"""
    assert run(script) == "True"


def test_a_cache_that_cannot_be_written_or_is_damaged_does_no_harm(tmp_path):
    script = "import numpy as np, corequant as cq; print(cq.block_hadamard(np.ones(4)))"
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    assert run(script, NUMBA_CACHE_DIR=str(blocked), NUMBA_DISABLE_JIT="0") == "[2. 0. 0. 0.]"
    folder = tmp_path / "cache"
    assert run(script, NUMBA_CACHE_DIR=str(folder), NUMBA_DISABLE_JIT="0") == "[2. 0. 0. 0.]"
    (kernel,) = (folder / "corequant").glob("*.o")
    good = kernel.read_bytes()
    kernel.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert run(script, NUMBA_CACHE_DIR=str(folder), NUMBA_DISABLE_JIT="0") == "[2. 0. 0. 0.]"
    assert kernel.read_bytes() == good


def test_a_second_process_compiles_nothing_and_needs_no_numba(tmp_path):
    script = f"""
import sys, numpy as np, corequant as cq
from corequant._cpu.codegen import compiler
def refuse(*given):
    raise AssertionError("compiled again")
if len(list(__import__("pathlib").Path({str(tmp_path)!r}).rglob("*.o"))):
    compiler._compile = refuse
print(cq.block_hadamard(np.ones(64, np.float32))[0], "numba" in sys.modules)
"""
    assert run(script, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_DISABLE_JIT="0") == "8.0 False"
    assert run(script, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_DISABLE_JIT="0") == "8.0 False"


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("where", ["in place", "in place by another name", "on", "off", "fresh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_second_call_of_a_kind_gives_what_the_first_gave(rng, monkeypatch, dtype, where, size):
    first = rng.normal(size=(16, 192)).astype(dtype)
    numbers = [first, rng.normal(size=first.shape).astype(dtype)]
    expected = [cq.block_hadamard(np.vstack([x, x]), 64)[:16] for x in numbers]
    if size == "large":
        monkeypatch.setattr(arrays, "_STREAMED_BYTES", 0)
    for x, turned in zip(numbers, expected, strict=True):
        off = arrays.aligned(x.size + 16, x.dtype)[4 : 4 + x.size].reshape(x.shape)
        out = {
            "in place": x,
            "in place by another name": x[:],
            "on": arrays.aligned(x.size, x.dtype).reshape(x.shape),
            "off": off,
            "fresh": None,
        }[where]
        found = cq.block_hadamard(x, 64, out=out)
        assert out is None or found is out
        np.testing.assert_array_equal(found, turned)


def test_a_repeated_call_is_as_strict_as_the_first(rng):
    x = rng.normal(size=(4, 64)).astype(np.float32)
    expected = cq.block_hadamard(x, 64)
    cq.block_hadamard(x, 64, axis=1, threads=1)
    wrong = (
        {"block_size": 64.0},
        {"axis": -1.0},
        {"threads": True},
        {"threads": 1.0},
        {"axis": []},
    )
    for arguments in [*wrong, {"axis": []}]:
        with pytest.raises(TypeError, match="must be an integer"):
            cq.block_hadamard(x, **{"block_size": 64, **arguments})
    fixed = x.copy()
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        cq.block_hadamard(x, 64, out=fixed)
    with pytest.raises(ValueError, match="writeable"):
        cq.block_hadamard(fixed, 64, out=fixed)
    memory = np.zeros(x.size + 64, np.float32)
    memory[: x.size] = x.ravel()
    with pytest.raises(ValueError, match="overlap"):
        cq.block_hadamard(memory[: x.size].reshape(x.shape), 64, out=memory[64:].reshape(x.shape))
    for other in (np.empty((4, 64)), np.empty((64, 4), np.float32)):
        with pytest.raises(cq.ShapeError, match="out must have"):
            cq.block_hadamard(x, 64, out=other)
    np.testing.assert_array_equal(cq.block_hadamard(np.asfortranarray(x), 64), expected)
    np.testing.assert_array_equal(cq.block_hadamard(x.astype(">f4"), 64), expected)
    np.testing.assert_array_equal(cq.block_hadamard(x, 64, inverse=True), expected)
    np.testing.assert_array_equal(cq.block_hadamard(x, np.array(64)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_addresses_are_those_of_the_arrays(dtype):
    memory = np.zeros(64, dtype)
    for x in (memory, memory[3:], memory[::2], memory.reshape(4, 16)[1:, 2:]):
        assert compiler.address_of(x) == x.ctypes.data == compiler._by_interface(x)


def test_a_repeated_call_works_in_the_scratch_that_there_is(rng, monkeypatch):
    """A larger one takes its place, and no call must write to the old one."""
    order = 172 * 16
    x, used = rng.normal(size=(1, order)), []
    out = arrays.aligned(order, x.dtype).reshape(x.shape)
    first = cq.block_hadamard(x, order)
    rows = _rotation._rows(x.dtype, x.size, order, False, "none", "ordinary", None)
    call = rows.call
    monkeypatch.setattr(rows, "call", lambda *given: used.append(given[3]) or call(*given))

    def run():
        for _ in range(2):
            np.testing.assert_array_equal(cq.block_hadamard(x, order, out=out), first)
            assert used.pop() == arrays.scratch.address
            arrays.scratch.at_least(2 * arrays.scratch.size)

    # A thread's scratch is its own, and so new.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not used
