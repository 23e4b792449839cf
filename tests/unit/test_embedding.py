"""Processes that live long: kernels are few and are freed, forks work at any moment."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import corequant as cq
from corequant._cpu import forks, fusion
from corequant._cpu.codegen import cores, row_kernels
from corequant._cpu.codegen.compiler import compiled_away
from corequant._cpu.codegen.plans import plan_rows
from corequant._cpu.codegen.rotation_kernels import kernel_for
from tests import capabilities

PROGRAM = str(Path(__file__).parents[2] / "bench" / "bench_embedding.py")

compiled = pytest.mark.skipif(compiled_away(), reason="nothing is compiled")


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@capabilities.forks
def test_forks_work_while_threads_compile():
    assert "12 forks" in run("forks", "--count", "12")


@capabilities.procfs
def test_shapes_leave_nothing_behind():
    assert "files" in run("shapes", "--calls", "8000", "--shapes", "300")


def test_the_locks_of_numba_and_llvm_are_found():
    import llvmlite.binding  # noqa: F401
    import numba  # noqa: F401

    import corequant._cpu.loops.jit  # noqa: F401

    # A release that hides them elsewhere must be seen here: that of our kernels, the compiler's,
    # those of two contexts, each guarded twice before Python 3.12, and LLVM's.
    found = list(forks.locks())
    assert len(found) == (7 if sys.version_info < (3, 12) else 5)
    for lock in found:
        assert lock.acquire(timeout=60)
        lock.release()
        assert hasattr(lock, "_at_fork_reinit")


@capabilities.forks
def test_a_lock_whose_owner_is_gone_is_made_anew(monkeypatch):
    """Where waiting for a lock is in vain, the child still gets one that is free."""
    lock = threading.RLock()
    monkeypatch.setattr(forks, "locks", lambda: iter([lock]))
    monkeypatch.setattr(forks, "_PATIENCE", 0.05)
    taken, done = threading.Event(), threading.Event()

    def hold():
        with lock:
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    child = os.fork()
    if not child:
        os._exit(0 if lock.acquire(timeout=5) else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert status == 0


@compiled
def test_kernels_are_freed_with_their_last_reference():
    plan = plan_rows("float32", 1, 32, False, "none", "ordinary")
    kernel = kernel_for.__wrapped__(plan)
    engine = weakref.ref(kernel.engine)
    del kernel
    gc.collect()
    assert engine() is None


@compiled
def test_settings_that_are_kept_keep_their_kernel():
    x = np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32)
    first = cq.block_hadamard(x, 32)
    from corequant._cpu import rotation

    kernel_for.cache_clear()
    rotation._row_kernel.cache_clear()
    gc.collect()
    np.testing.assert_array_equal(cq.block_hadamard(x, 32), first)


@compiled
@pytest.mark.parametrize("spec", ["int4:token:asymmetric", "int8:group64:symmetric", "mxfp4"])
def test_row_lengths_share_kernels(spec, monkeypatch):
    built = []

    def build(key, kinds, emit):
        built.append(key)
        return original(key, kinds, emit)

    original = row_kernels.build
    monkeypatch.setattr(row_kernels, "build", build)
    row_kernels.fused_kernel.cache_clear()
    fusion._kernel.cache_clear()
    for blocks in range(1, 60):
        x = np.ones((2, 64 * blocks), np.float32)
        cq.rotate_quantize(x, 64, spec)
    # One for each number of vectors that are worked on side by side.
    assert len(built) <= 3


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("order", [92, 228, 492])
def test_words_choose_the_sums_of_the_core(order, inverse):
    words = cores.choices(order, inverse)
    matrix = cq.hadamard_matrix(order).astype(int)
    matrix = matrix.T if inverse else matrix
    each = cores._batch(order)
    generator = np.random.default_rng(0)
    for four, k in zip(*(generator.integers(0, n, 200) for n in (order // 4, order)), strict=True):
        word = int(words[four // each, k]) // 64
        signs = cores._SIGNS[word >> 4 * (four % each) & 15]
        assert signs == tuple(matrix[4 * four : 4 * four + 4, k])


@compiled
def test_code_does_not_grow_with_the_core(monkeypatch):
    """Order 4108 was 2.8 MB of code and took 16 s to compile."""
    from corequant._cpu.codegen import compiler

    sizes = []

    def compile_anew(module):
        code = compile(module)
        sizes.append(len(code))
        return code

    compile = compiler._compile
    monkeypatch.setattr(compiler, "_compile", compile_anew)
    monkeypatch.setattr(compiler, "read_cached", lambda file: None)
    monkeypatch.setattr(compiler, "write_cached", lambda file, code: None)
    kernel_for.cache_clear()
    for order in (492, 4108):
        x = np.random.default_rng(0).normal(size=(1, order))
        turned = cq.block_hadamard(x, order)
        expected = x @ cq.hadamard_matrix(order) / np.sqrt(order)
        np.testing.assert_allclose(turned, expected, atol=1e-12)
    assert len(sizes) == 2
    assert max(sizes) < 24 << 10, sizes


@capabilities.forks
def test_a_fork_is_not_held_up_by_what_others_do_before_it():
    """Logging takes its lock before a fork, and a compilation waits for it: ours comes first."""
    script = (
        "import os, threading, time, numpy as np, corequant as cq\n"
        "import logging, numba.core.compiler_lock as lock\n"
        "taken = threading.Event()\n"
        "def work():\n"
        "    with lock.global_compiler_lock:\n"
        "        taken.set(); time.sleep(0.3); logging.getLogger('numba.x')\n"
        "threading.Thread(target=work).start(); taken.wait(); began = time.monotonic()\n"
        "child = os.fork()\n"
        "if not child: logging.getLogger('numba.y'); os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert time.monotonic() - began < 20"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@capabilities.forks
def test_a_fork_waits_for_a_context_that_another_thread_reads():
    script = """
import os, signal, threading
import numpy as np, corequant as cq
from numba.core.registry import CPUTarget
guard = vars(CPUTarget)["_toplevel_typing_context"]._lock
taken, done = threading.Event(), threading.Event()
def hold():
    with guard:
        taken.set()
        done.wait(0.5)
threading.Thread(target=hold).start()
taken.wait()
child = os.fork()
if not child:
    signal.alarm(60)
    cq.quantize(np.ones((2, 8)), "int4:channel")
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
