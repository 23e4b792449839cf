"""Compiled code on disk: read where nothing can be written, compiled by one process at a time."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import corequant as cq
from corequant import compiled
from corequant._cpu.codegen import compiler
from corequant._cpu.loops.jit import Kernel, jit

pytestmark = pytest.mark.skipif(compiler.compiled_away(), reason="nothing is compiled")

SCRIPT = """
import sys, numpy as np, corequant as cq
from corequant._cpu.codegen import compiler
if sys.argv[1] == "read-only":
    def refuse(*given, **more):
        raise OSError("read-only file system")
    compiler.tempfile.mkstemp = compiler.os.open = refuse
if sys.argv[1] != "cold":
    def unexpected(*given):
        raise AssertionError("compiled again")
    compiler._compile = unexpected
x = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
H = x.T @ x
for spec in ("int4:channel:symmetric", "mxfp4"):
    cq.dequantize_packed(cq.pack_quantized(cq.gptq(x[:8], H, spec)))
print(float(cq.fake_quantize(x, "int4:group32").sum()), "numba" in sys.modules)
"""


def run(how, folder):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder), "NUMBA_DISABLE_JIT": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_later_process_compiles_nothing_and_needs_no_numba(tmp_path):
    total, _ = run("cold", tmp_path)
    assert run("warm", tmp_path) == [total, "False"]
    assert run("read-only", tmp_path) == [total, "False"]


def test_others_wait_for_the_process_that_compiles(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    inside, order = threading.Event(), []

    def first():
        with compiler.compilation_lock("a.o") as waited:
            inside.set()
            time.sleep(0.2)
            compiler.write_cached("a.o", b"code")
            order.append(("first", waited))

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with compiler.compilation_lock("b.o") as waited:
        assert not waited  # another file
    with compiler.compilation_lock("a.o") as waited:
        order.append(("second", waited))
        assert compiler.read_cached("a.o") == b"code"
    thread.join()
    assert order == [("first", False), ("second", True)]
    assert [p.name for p in (tmp_path / "corequant").iterdir()] == ["a.o"]


@pytest.mark.parametrize("how", ["ended", "elsewhere, long ago"])
def test_a_killed_process_keeps_nobody_waiting(tmp_path, monkeypatch, how):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (tmp_path / "corequant").mkdir()
    lock = tmp_path / "corequant" / "a.o.lock"
    if how == "ended" and os.name == "posix":
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        lock.write_text(f"{platform.node()} {ended.pid}")
    else:
        lock.write_text(f"elsewhere {os.getpid()}")
        os.utime(lock, (time.time() - 100,) * 2)
    started = time.monotonic()
    with compiler.compilation_lock("a.o") as waited:
        assert waited
    assert time.monotonic() - started < 5
    assert not lock.exists()


def test_where_no_file_can_be_made_nobody_waits(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    with compiler.compilation_lock("a.o") as waited:
        assert not waited
    compiler.write_cached("a.o", b"code")
    assert compiler.read_cached("a.o") is None
    (entry,) = compiled.cache_contents()
    assert (entry.files, entry.writable) == (0, False)


def test_the_cache_is_filled_beforehand(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")  # put back after the test
    monkeypatch.setattr(compiled, "_rotations", lambda: iter([lambda: run("cold", tmp_path)]))
    monkeypatch.setattr(compiled, "_quantizers", lambda: iter([]))
    compiled.use_folder(tmp_path)
    made = compiled.warm_cache()
    assert made > 5
    (entry,) = compiled.cache_contents()
    assert entry.path == tmp_path / "corequant"
    assert entry.files == len(list(entry.path.glob("*.o"))) > 5
    assert entry.nbytes > 0
    assert entry.writable
    assert str(entry).endswith("writable")


@jit
def weighted(x, y, factor, step, flag, pair, out):
    total = 0.0
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            value = x[i, j] * factor + y[j] * pair[0]
            if flag:
                value += pair[1]
            out[i, j] = value
            total += value
    return int(total * 8) // step


@jit
def reserve(n):
    room = np.empty(n, np.float64)
    for i in range(room.shape[0]):
        room[i] = i
    return int(room[n - 1])


def off_by_a_byte(x):
    moved = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    moved[...] = x
    return moved


LAYOUTS = {
    "contiguous": lambda x: x,
    "strided": lambda x: x[..., ::-1],
    "Fortran": np.asfortranarray,
    "unaligned": off_by_a_byte,
    "a subclass": lambda x: x.view(np.memmap),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.uint8, np.int64])
def test_arguments_arrive_as_they_are(rng, dtype, layout):
    x, y, out, plain = (
        LAYOUTS[layout](a)
        for a in (
            rng.integers(0, 16, (6, 10)).astype(dtype),
            rng.integers(0, 16, 10).astype(dtype),
            *np.zeros((2, 6, 10)),
        )
    )
    for factor in (2, 2.5, np.float32(0.5), np.float64(-1), np.int64(-7)):
        for flag in (True, np.bool_(False)):
            given = (x, y, factor, 3, flag, (np.float64(0.25), 4))
            assert isinstance(weighted, Kernel)
            assert weighted(*given, out) == weighted.function(*given, plain)
            np.testing.assert_array_equal(out, plain)


def test_other_byte_orders_are_not_mistaken(rng):
    from numba.core.errors import NumbaNotImplementedError

    x, y = rng.normal(size=(6, 10)), rng.normal(size=10)
    out = np.zeros((6, 10))
    weighted(x, y, 1.0, 3, True, (0.5, 1), out)
    with pytest.raises(NumbaNotImplementedError, match=">f8"):
        weighted(x.astype(">f8"), y, 1.0, 3, True, (0.5, 1), out)


def test_matrices_in_files_are_taken(rng, tmp_path):
    x = rng.normal(size=(64, 32)).astype(np.float32)
    np.save(tmp_path / "H.npy", x.T @ x)
    H = np.load(tmp_path / "H.npy", mmap_mode="r")
    expected = cq.gptq(x[:8], np.array(H), "int4:channel")
    np.testing.assert_array_equal(cq.gptq(x[:8], H, "int4:channel").codes, expected.codes)


def test_memory_of_kernels_is_given_back_or_refused():
    assert reserve(1000) == 999
    with pytest.raises(MemoryError, match="reserve"):
        reserve(1 << 55)


def test_a_kernel_that_calls_numbas_runtime_is_refused():
    """It would run where it was compiled, and crash where it is read from the cache."""

    def ranks(x, out):
        out[:] = np.argsort(x)

    with pytest.raises(RuntimeError, match="must not call numba's runtime or Python, got .*NRT_"):
        jit(ranks)(np.arange(40.0), np.empty(40, np.int64))
