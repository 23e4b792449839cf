"""Seconds of first calls: with nothing compiled, with everything on disk, and together.

Usage: python bench/bench_start.py [--runs 5] [--only NAME ...] [--write]

Each figure is the median over fresh processes on one processor. NumPy and, except for one row,
numba are imported before the clock starts. The cache is put on a read-only mount where that is
permitted (root, on Linux); otherwise its write permission is removed. ``--write`` puts the table
into bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from markdown import write_section

SCRIPT = """
import sys, time
import numpy as np
if sys.argv[1] == "numba":
    import numba
x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
W, H = x[:32], x.T @ x
started = time.perf_counter()
import corequant as cq
q = None
for name in sys.argv[2:]:
    exec(name)
print(time.perf_counter() - started)
"""

CALLS = {
    "block_hadamard": "cq.block_hadamard(x, 32)",
    "ActivationStats": "cq.ActivationStats(256).update(x)",
    "massdiff": "cq.massdiff(np.abs(x).mean(0), 32)",
    "energydiff": "cq.energydiff(np.square(x).T @ np.square(x), 32)",
    "quantize, symmetric": "cq.quantize(x, 'int4:token')",
    "quantize, asymmetric": "cq.quantize(x, 'int4:token:asymmetric')",
    "quantize, group": "cq.quantize(x, 'int4:group32')",
    "quantize, mse": "cq.quantize(x, 'int4:channel:symmetric:mse')",
    "dequantize": (
        "cq.dequantize(cq.QuantizedTensor(np.zeros((64, 256), np.int8), "
        "np.ones((64, 1), np.float32), None, cq.QuantSpec.parse('int4:token')))"
    ),
    "fake_quantize": "cq.fake_quantize(x, 'int4:token')",
    "rotate_quantize": "cq.rotate_quantize(x, 32, 'int4:token')",
    "pack_quantized": (
        "cq.pack_quantized(cq.QuantizedTensor(np.zeros((64, 256), np.int8), "
        "np.ones((64, 1), np.float32), None, cq.QuantSpec.parse('int4:token')))"
    ),
    "round_to_nearest": "cq.round_to_nearest(W, 'int4:channel')",
    "gptq": "cq.gptq(W, H, 'int4:channel')",
    "qronos": "cq.qronos(W, H, H, 'int4:channel')",
    "fit_scales": "cq.fit_scales(W, H, 'int4:channel')",
}
LIMITS = {"cold": (1.5, 4.0), "warm": (0.25, 0.7)}
"""Of one function, and of all in one process."""


def started(calls: list[str], folder: str, numba: bool = True) -> subprocess.Popen[str]:
    """Start a process on the first processor that makes calls and prints their seconds."""
    path = os.pathsep.join(p for p in sys.path if p)
    given = {**os.environ, "NUMBA_CACHE_DIR": folder, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # What is installed has been compiled to bytecode; a working tree is by the first process.
    given.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", SCRIPT, "numba" if numba else "", *calls]
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, text=True)


def seconds(calls: list[str], folder: str, numba: bool = True) -> float:
    """Return what a process of its own took."""
    process = started(calls, folder, numba)
    printed = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{calls} failed")
    return float(printed)


def first_calls(calls: list[str], runs: int) -> tuple[float, float]:
    """Return medians cold and warm."""
    cold, warm = [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(seconds(calls, folder))
            warm.append(seconds(calls, folder))
    return statistics.median(cold), statistics.median(warm)


def together(count: int, runs: int) -> float:
    """Return the wall time of cold processes that start at once, all functions in each."""
    found = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            processes = [started(list(CALLS.values()), folder) for _ in range(count)]
            for process in processes:
                process.communicate()
            found.append(time.perf_counter() - begin)
    return statistics.median(found)


def guarded(runs: int) -> list[list[str]]:
    """Measure all functions with a full cache that can't be written, and without a home."""
    calls = list(CALLS.values())
    with tempfile.TemporaryDirectory() as folder:
        seconds(calls, folder)
        os.environ.update(HOME="/dev/null", XDG_CACHE_HOME="/dev/null")
        with read_only(folder) as how:
            warm, alone = (
                statistics.median(seconds(calls, folder, numba) for _ in range(runs))
                for numba in (True, False)
            )
    return [
        [f"all, {how}, no home", "", f"{warm:.2f}"],
        [f"all, {how}, no home, importing nothing but NumPy before", "", f"{alone:.2f}"],
    ]


@contextlib.contextmanager
def read_only(folder: str) -> Iterator[str]:
    """Keep a folder from being written to; yields in which way."""
    mount = ["mount", "--bind", folder, folder]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        kept = [Path(folder), *Path(folder).rglob("*")]
        for path in kept:
            path.chmod(path.stat().st_mode & 0o555)
        yield "no permission to write to the cache"
        for path in kept:
            path.chmod(path.stat().st_mode | 0o200)
        return
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield "cache on a read-only mount"
    finally:
        subprocess.run(["umount", folder], check=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default=5, type=int)
    parser.add_argument("--only", nargs="*", choices=[*CALLS, "all", "together"])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    every = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if every:
        os.sched_setaffinity(0, every[:1])
    rows = []
    wanted = options.only or [*CALLS, "all", "together"]
    for name in wanted:
        if name == "together":
            continue
        calls = list(CALLS.values()) if name == "all" else [CALLS[name]]
        cold, warm = first_calls(calls, options.runs)
        rows.append([name, f"{cold:.2f}", f"{warm:.2f}"])
        print(*rows[-1], sep="\t", flush=True)
    if "together" in wanted:
        rows += guarded(options.runs)
        if every:
            os.sched_setaffinity(0, every)
        alone = together(1, options.runs)
        for count in (2, 4):
            several = together(count, options.runs)
            share = max(1.0, count / max(1, len(every)))
            rows.append(
                [f"{count} processes at once, of one", f"{several / alone / share:.2f}", ""]
            )
            print(*rows[-1], sep="\t", flush=True)
    one, whole = ([LIMITS[k][i] for k in ("cold", "warm")] for i in (0, 1))
    head = (
        f"Seconds beyond importing NumPy and numba, one processor, medians of {options.runs}; at "
        f"most {one[0]} and {one[1]} are wanted of each function, {whole[0]} and {whole[1]} of all."
    )
    table = ["| first call | cold | warm |", "|---|---|---|"]
    table += [f"| {' | '.join(row)} |" for row in rows]
    body = "\n".join(["## First calls", "", head, "", *table])
    print(body)
    if options.write:
        write_section("start", body)


if __name__ == "__main__":
    main()
