"""Results are the same bytes with every instruction set, and with plain Python."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite import binding

DIGESTS = Path(__file__).parents[1] / "digests.py"

SETS = {
    "x86-64": ("sse2",),
    "nehalem": ("sse4.2",),
    "haswell": ("avx2", "fma", "f16c", "bmi2"),
    "skylake-avx512": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}
"""Processors to compile for, with what this one must have to run that code."""

X86 = platform.machine().lower() in ("x86_64", "amd64")


def digests(*parts: str, **environment: str) -> dict[str, str]:
    """Run ``tests/digests.py`` in a process of its own; the digests by name."""
    path = os.pathsep.join(p for p in sys.path if p)
    # Without features of its own, numba would add this processor's to a named one's.
    chosen = {"NUMBA_DISABLE_JIT": "0", "NUMBA_CPU_FEATURES": "", **environment}
    if not environment.get("NUMBA_CPU_NAME"):
        del chosen["NUMBA_CPU_FEATURES"]
    done = subprocess.run(
        [sys.executable, str(DIGESTS), *parts],
        env={**os.environ, "PYTHONPATH": path, **chosen},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())


@functools.cache
def expected() -> dict[str, str]:
    """Digests with plain Python, which has no instruction set to choose."""
    return digests(NUMBA_DISABLE_JIT="1")


def test_this_processor():
    found = digests()
    assert len(found) > 80
    assert found == expected()


@pytest.mark.parametrize("name", list(SETS) if X86 else ["generic"])
def test_other_processors(name):
    features = binding.get_host_cpu_features() if X86 else {}
    lacking = [feature for feature in SETS.get(name, ()) if not features.get(feature)]
    if lacking:
        pytest.skip(f"this processor lacks {', '.join(lacking)}")
    assert digests(NUMBA_CPU_NAME=name) == expected()


@pytest.mark.skipif(not X86, reason="these processors' plans are for x86")
@pytest.mark.parametrize("name", ["znver4", "znver5"])
def test_other_processors_plans(name):
    """What these processors are given, in code that any processor with AVX2 runs."""
    parts = ("rotated", "stored", "fused")
    found = digests(*parts, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="-avx512f")
    assert found == {key: expected()[key] for key in found}
    assert len(found) > 80
