"""Block rotations against the limits of memory and against other implementations.

Usage: python bench/bench_rotation.py [--rounds 7] [--quick] [--write]

Every figure is a ratio measured in one run: candidates take turns, forwards and backwards, on one
pinned thread, and medians of thread CPU time are compared. Results are compared before anything is
timed. ``limit`` is in-place negation, which reads and writes each line once; ``copyto`` is
np.copyto, which also reads what it overwrites (up to the size from which the C library streams).
Without ``--write`` the tables are printed; with it they go to bench/README.md, with a plot.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import fht_cpu
import hadamard_transform
import ml_dtypes
import numpy as np
import torch
from brevitas.graph.hadamard import matmul_hadU

import corequant as cq

HERE = Path(__file__).parent
SIDE = 4096
POWERS = [2**k for k in range(4, 14)]
MARKS = ("<!-- rotation: begin -->", "<!-- rotation: end -->")

Job = Callable[[], object]


def aligned(shape: tuple[int, ...], dtype: object = np.float32, offset: int = 0) -> np.ndarray:
    """Ones that start ``offset`` bytes into a line of cache, written so that memory backs them."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    raw = np.empty(size + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    made = raw[start : start + size].view(kind).reshape(shape)
    made[...] = 1
    return made


def medians(jobs: dict[str, Job], rounds: int, clock: Callable[[], float] = time.thread_time):
    """Median time of each job, in interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for k in range(rounds):
        for name in list(jobs)[:: -1 if k % 2 else 1]:
            started = clock()
            jobs[name]()
            times[name].append(clock() - started)
    return {name: float(np.median(t)) for name, t in times.items()}


def table(title: str, head: list[str], rows: list[list[object]]) -> str:
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{c:.2f}" if isinstance(c, float) else str(c) for c in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def assert_peers_agree() -> None:
    """Compare what is to be timed, on a small array."""
    x = np.random.default_rng(0).normal(size=(8, SIDE)).astype(np.float32)
    for b in POWERS[:-1]:
        ours = cq.block_hadamard(x, b).reshape(-1, b)
        blocks = x.reshape(-1, b)
        theirs = {
            "fht-cpu": fht_cpu.fht(blocks.copy(), num_threads=1) / np.sqrt(b),
            "numpy": blocks @ matrix(b),
            "hadamard-transform": hadamard_transform.hadamard_transform(
                torch.from_numpy(blocks.copy())
            ).numpy(),
            "matmul_hadU": matmul_hadU(torch.from_numpy(blocks.copy())).numpy(),
        }
        for name, values in theirs.items():
            np.testing.assert_allclose(values, ours, atol=2e-5, err_msg=f"{name}, b={b}")


def matrix(b: int) -> np.ndarray:
    return (cq.hadamard_matrix(b) / np.sqrt(b)).astype(np.float32)


def powers(rounds: int) -> tuple[str, dict[str, list[float]]]:
    """float32, 64 MiB, every power of two: the limits, ours, and fht-cpu."""
    x, y, z, w = (aligned((SIDE, SIDE)) for _ in range(4))
    w[:] = 0  # fht-cpu doesn't scale: anything else would grow out of range
    rows, curves = [], {"in place": [], "out=": [], "fht-cpu, in place": [], "limit": []}
    for b in POWERS:
        shape = (-1, b)
        t = medians(
            {
                "copyto": lambda: np.copyto(y, x),
                "limit": lambda: np.negative(z, out=z),
                "place": lambda b=b: cq.block_hadamard(
                    z.reshape(-1, max(b, SIDE)), b, out=z.reshape(-1, max(b, SIDE)), threads=1
                ),
                "out": lambda b=b: cq.block_hadamard(
                    x.reshape(-1, max(b, SIDE)), b, out=y.reshape(-1, max(b, SIDE)), threads=1
                ),
                "fht": lambda shape=shape: fht_cpu.fht(w.reshape(shape), num_threads=1),
            },
            rounds,
        )
        copy = t["copyto"]
        rows.append(
            [
                b,
                t["limit"] / t["place"],
                copy / t["place"],
                copy / t["out"],
                t["fht"] / t["place"],
                copy / t["limit"],
            ]
        )
        for name, key in zip(curves, ("place", "out", "fht", "limit"), strict=True):
            curves[name].append(copy / t[key])
    head = ["b", "in place / limit", "in place / copyto", "out= / copyto", "in place / fht-cpu"]
    return table("float32, 64 MiB, one thread", [*head, "limit / copyto"], rows), curves


def in_cache(rounds: int) -> str:
    """A working set of 256 KiB: the kernel called in a loop without leaving it."""
    from corequant._numba.plans import plan_rows
    from corequant._numba.rotation import kernel_for

    repeats = 200
    x, y, z, w, scratch = (aligned((1 << 16,)) for _ in range(5))
    w[:] = 0
    rows = []
    for b in (16, 64, 256, 4096):
        plan = plan_rows("float32", 1, b, False, "none", "ordinary")
        kernel, at = kernel_for(plan), z.ctypes.data
        units = z.size // plan.unit
        given = (at, at, at, 0, 0, units, 0, 0, 0, b**-0.5, scratch.ctypes.data)
        view = z.reshape(-1, 4096)
        t = medians(
            {
                "copyto": lambda: [np.copyto(y, x) for _ in range(repeats)],
                "kernel": lambda kernel=kernel, given=given: [
                    kernel(*given) for _ in range(repeats)
                ],
                "public": lambda b=b, view=view: [
                    cq.block_hadamard(view, b, out=view, threads=1) for _ in range(repeats)
                ],
                "fht": lambda b=b: [
                    fht_cpu.fht(w.reshape(-1, b), num_threads=1) for _ in range(repeats)
                ],
            },
            rounds,
        )
        copy = t["copyto"]
        rows.append([b, copy / t["kernel"], copy / t["public"], t["fht"] / t["public"]])
    head = ["b", "kernel / copyto", "block_hadamard / copyto", "block_hadamard / fht-cpu"]
    return table("float32, 256 KiB, in place", head, rows)


def cores(rounds: int) -> str:
    """Rows of K·2^k numbers, about 64 MiB."""
    rows = []
    for core, power in ((12, 128), (20, 256), (28, 512), (172, 64)):
        d = core * power
        x, y = aligned(((1 << 24) // d, d)), aligned(((1 << 24) // d, d))
        t = medians(
            {
                "copyto": lambda x=x, y=y: np.copyto(y, x),
                "place": lambda x=x: cq.block_hadamard(x, out=x, threads=1),
                "out": lambda x=x, y=y: cq.block_hadamard(x, out=y, threads=1),
            },
            rounds,
        )
        rows.append([f"{core}·{power}", t["copyto"] / t["place"], t["copyto"] / t["out"]])
    return table("Rows of K·2^k", ["d", "in place / copyto", "out= / copyto"], rows)


def other_dtypes(rounds: int) -> str:
    rows = []
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        d = SIDE * 4 // np.dtype(dtype).itemsize
        x, y = aligned((SIDE, d), dtype), aligned((SIDE, d), dtype)
        jobs: dict[str, Job] = {"copyto": lambda x=x, y=y: np.copyto(y, x)}
        for b in (16, 64, 256, 1024):
            jobs[str(b)] = lambda x=x, b=b: cq.block_hadamard(x, b, out=x, threads=1)
        t = medians(jobs, rounds)
        rows.append([np.dtype(dtype).name, *(t["copyto"] / t[k] for k in list(jobs)[1:])])
    head = ["dtype", *(f"b={b}" for b in (16, 64, 256, 1024))]
    return table("Other dtypes, 64 MiB, in place / copyto of the same array", head, rows)


def matmuls(rounds: int) -> str:
    """Products with the matrix, and torch's transforms."""
    x, y, z = (aligned((SIDE, SIDE)) for _ in range(3))
    x[:] = np.random.default_rng(0).normal(size=x.shape)
    rows = []
    for b in (16, 64, 512):
        h = matrix(b)
        th, tx, ty = (torch.from_numpy(a) for a in (h, x.reshape(-1, b), y.reshape(-1, b)))
        t = medians(
            {
                "ours": lambda b=b: cq.block_hadamard(x, b, out=y, threads=1),
                "place": lambda b=b: cq.block_hadamard(z, b, out=z, threads=1),
                "numpy": lambda b=b, h=h: np.matmul(x.reshape(-1, b), h, out=y.reshape(-1, b)),
                "torch": lambda tx=tx, th=th, ty=ty: torch.matmul(tx, th, out=ty),
                "hadamard-transform": lambda tx=tx: hadamard_transform.hadamard_transform(tx),
                "matmul_hadU": lambda tx=tx: matmul_hadU(tx),
            },
            max(3, rounds // 2),
        )
        rows.append([b, *(t[k] / t["ours"] for k in list(t)[1:])])
    names = ["in place", "numpy matmul", "torch matmul", "hadamard-transform", "matmul_hadU"]
    return table(
        "Times faster than products with H and than torch's transforms, out=, 64 MiB",
        ["b", *names],
        rows,
    )


def fused(rounds: int) -> str:
    """Permute, sign, rotate and INT4 per token, b=64; against one copy of x."""
    rng = np.random.default_rng(0)
    x, y, turned = (aligned((SIDE, SIDE)) for _ in range(3))
    x[:] = rng.normal(size=x.shape)
    permutation, signs = rng.permutation(SIDE), cq.random_signs(SIDE, 0)
    codes = np.zeros(x.shape, np.int8)
    rows = []
    for spec in ("int4:token:symmetric", "int4:token:asymmetric", "int4:group64:symmetric"):
        for permuted in (False, True):
            chosen = permutation if permuted else None

            def separately(spec=spec, permuted=permuted):
                source = np.take(x, permutation, axis=1) if permuted else x
                cq.block_hadamard(source, 64, signs=signs, out=turned, threads=1)
                return cq.quantize(turned, spec)

            def together(spec=spec, chosen=chosen):
                return cq.rotate_quantize(
                    x, 64, spec, permutation=chosen, signs=signs, out=codes, threads=1
                )

            def values(spec=spec, chosen=chosen):
                return cq.rotate_fake_quantize(
                    x, 64, spec, permutation=chosen, signs=signs, out=y, threads=1
                )

            if spec.endswith(":symmetric"):
                np.testing.assert_array_equal(together().codes, separately().codes)
            copy = {"copyto": lambda: np.copyto(y, x)}
            t = medians(
                {**copy, "codes": together, "values": values, "separate": separately}, rounds
            )
            rows.append(
                [
                    spec,
                    "yes" if permuted else "no",
                    t["copyto"] / t["codes"],
                    t["copyto"] / t["values"],
                    t["separate"] / t["codes"],
                ]
            )
    head = ["spec", "permuted", "codes / copyto", "values / copyto", "codes / separate steps"]
    return table("Fused quantization, 4096 × 4096, b=64", head, rows)


def statistics(rounds: int) -> str:
    x, z = aligned((SIDE, SIDE)), aligned((SIDE, SIDE))
    stats = cq.ActivationStats(SIDE)
    t = medians(
        {
            "update": lambda: stats.update(x),
            "max": lambda: x.max(),
            "limit": lambda: np.negative(z, out=z),
        },
        rounds,
    )
    rows = [[f"{x.nbytes / t[k] / 1e9:.1f}" for k in t]]
    head = ["ActivationStats.update", "x.max()", "limit (and as much written)"]
    return table("Statistics of one pass, GB/s read", head, rows)


def start_up() -> str:
    script = (
        "import numba, time, numpy as np; a = time.perf_counter(); import corequant as cq;"
        "cq.block_hadamard(np.ones((64, 4096), np.float32), 64); print(time.perf_counter() - a)"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    runs = [
        float(
            subprocess.run(
                [sys.executable, "-c", script],
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                check=True,
            ).stdout
        )
        for _ in range(6)
    ]
    median = f"{np.median(runs[1:]):.3f}"
    return table("Start-up", ["import corequant and first rotation, second process, s"], [[median]])


def two_threads(rounds: int) -> str:
    """Wall clock: one array of 2 MiB, and one of 64 MiB beside two threads that copy."""
    from concurrent.futures import ThreadPoolExecutor

    rows = []
    cpus = sorted(os.sched_getaffinity(0))
    for rows_of in (128, SIDE):
        x, y = aligned((rows_of, SIDE)), aligned((rows_of, SIDE))
        repeats = max(1, 4096 // rows_of)
        half = rows_of // 2
        with ThreadPoolExecutor(1) as pool:

            def copy_twice(x=x, y=y, half=half, repeats=repeats, pool=pool):
                for _ in range(repeats):
                    other = pool.submit(np.copyto, y[half:], x[half:])
                    np.copyto(y[:half], x[:half])
                    other.result()

            def rotate(threads, x=x, repeats=repeats):
                for _ in range(repeats):
                    cq.block_hadamard(x, 64, out=x, threads=threads)

            def copy(x=x, y=y, repeats=repeats):
                for _ in range(repeats):
                    np.copyto(y, x)

            t = medians(
                {
                    "one": lambda rotate=rotate: rotate(1),
                    "two": lambda rotate=rotate: rotate(2),
                    "copy": copy,
                    "copies": copy_twice,
                },
                rounds,
                time.perf_counter,
            )
        rows.append([f"{x.nbytes >> 20} MiB", t["one"] / t["two"], t["copy"] / t["copies"]])
    head = ["array", "two threads / one, b=64 in place", "np.copyto, two threads / one"]
    return table(f"Threads, wall clock, {len(cpus)} processors", head, rows)


def plot(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, values in curves.items():
        axes.plot(POWERS, values, "--" if name == "limit" else "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="block size", ylabel="speed, np.copyto = 1", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def described() -> str:
    names = ("numpy", "llvmlite", "torch", "fht-cpu", "hadamard-transform", "brevitas")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    from corequant._numba.machine import processor

    return f"{model} ({processor()[0]}), Python {platform.python_version()}, {versions}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--write", action="store_true", help="write bench/README.md and the plot")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    torch.set_num_threads(1)
    threads = two_threads(rounds)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    assert_peers_agree()
    first, curves = powers(rounds)
    parts = [first, in_cache(rounds), cores(rounds), other_dtypes(rounds), matmuls(rounds)]
    parts += [fused(rounds), statistics(rounds), threads, start_up()]
    text = f"{described()}\n\n" + "\n".join(parts)
    if not options.write:
        print(text)
        return
    plot(curves, HERE / "rotation.svg")
    page = HERE / "README.md"
    old = page.read_text() if page.exists() else "# Benchmarks\n\n" + "\n".join(MARKS) + "\n"
    if MARKS[0] not in old:
        old += "\n" + "\n".join(MARKS) + "\n"
    before, _, rest = old.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    image = "![Speed over block size](rotation.svg)\n"
    body = f"## Rotations\n\nWritten by `bench_rotation.py`; ratios are speeds.\n\n{text}\n{image}"
    page.write_text(f"{before}{MARKS[0]}\n{body}{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
