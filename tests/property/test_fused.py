"""Every fused path against the separate steps and a plain oracle, also between guarded pages.

The long form is ``bench/bench_cases.py``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import corequant as cq
from tests import capabilities, fusedcases


def some(count, seed):
    generator = np.random.default_rng(seed)
    chosen = fusedcases.kinds(generator, count)
    drawn = (fusedcases.draw(kind, generator) for kind in chosen)
    return [case for case in drawn if case is not None]


@pytest.mark.parametrize("case", some(60, 0))
def test_fused_paths_give_what_the_steps_give(case):
    fusedcases.check(case)


@pytest.mark.parametrize("d", range(8, 73, 8))
def test_permuted_float64_rows_of_every_residue(d):
    x = np.arange(1.0, d + 1)[None]
    for order in (np.arange(d), np.arange(d)[::-1].copy()):
        expected = cq.quantize(cq.block_hadamard(x[:, order], 8), "int8:token:symmetric")
        # What another call leaves in the scratch must not show.
        cq.rotate_quantize(np.full((1, 512), 7.0), 8, "int8:token:symmetric")
        found = cq.rotate_quantize(x, 8, "int8:token:symmetric", permutation=order)
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.scales, expected.scales)


@capabilities.protection
def test_guarded_memory_notices_a_stray_byte():
    memory = fusedcases.Guarded()
    taken = memory.take(100, 1)
    memory.check()
    before = np.ndarray((1,), np.uint8, memory.taken[0][3].data, memory.taken[0][4] - 1)
    before[0] = 0
    with pytest.raises(AssertionError, match="was written"):
        memory.check()
    assert taken.size == 100


@capabilities.protection
def test_a_read_beyond_a_guarded_array_ends_the_process():
    script = (
        "import ctypes, sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests import fusedcases\n"
        "taken = fusedcases.Guarded().take(100, 1)\n"
        "ctypes.string_at(taken.ctypes.data, 101)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", script, root], capture_output=True, check=False)
    assert done.returncode < 0


@capabilities.protection
def test_nothing_reads_or_writes_beyond_its_arrays():
    root = Path(__file__).parents[2]
    program = [sys.executable, str(root / "bench" / "bench_cases.py")]
    options = ["--guarded", "--count", "60", "--kinds", "20", "--workers", "1"]
    done = subprocess.run([*program, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 guarded calls, 0 faults" in done.stdout
