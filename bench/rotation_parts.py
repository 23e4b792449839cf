"""What bench_rotation.py measures, part by part: a table each, and the figures with a target."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import fht_cpu
import hadamard_transform
import ml_dtypes
import numpy as np
import torch
from brevitas.graph.hadamard import matmul_hadU

import corequant as cq

__all__ = ["PARTS", "POWERS", "SIDE", "Goal", "Job", "Result", "medians", "pin"]

SIDE = 4096
POWERS = [2**k for k in range(4, 14)]
LIMIT = {b: 0.92 for b in (16, 32, 64, 128)} | {b: 0.82 for b in (256, 512, 1024)}
LIMIT |= {2048: 0.72, 4096: 0.65, 8192: 0.52}
OUT = {b: 1.45 for b in POWERS[:7]} | {2048: 1.05, 4096: 0.95}
CACHE = {16: 0.6, 64: 0.5, 256: 0.4, 4096: 0.35}
CORES = {(12, 128): 1.25, (20, 256): 0.7, (28, 512): 0.6, (172, 64): 0.3}
MATMUL = {16: 3.0, 64: 10.0, 512: 40.0}

Job = Callable[[], object]


@dataclass
class Goal:
    """A figure beside its target; ``most`` marks one that shouldn't be exceeded."""

    what: str
    target: float
    found: float
    most: bool = False

    @property
    def met(self) -> bool:
        return self.found <= self.target if self.most else self.found >= self.target


@dataclass
class Result:
    """One part's table, goals and curves to plot."""

    title: str
    head: list[str]
    rows: list[list[object]]
    goals: list[Goal] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def aligned(shape: tuple[int, ...], dtype: object = np.float32, offset: int = 0) -> np.ndarray:
    """Ones that start on a line of cache or ``offset`` bytes later, backed by memory."""
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


def pin() -> None:
    """Keep to one processor and one thread."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def matrix(b: int) -> np.ndarray:
    return (cq.hadamard_matrix(b) / np.sqrt(b)).astype(np.float32)


def assert_peers_agree(sizes: list[int]) -> None:
    """Compare what is to be timed, on a small array."""
    x = np.random.default_rng(0).normal(size=(8, 2 * SIDE)).astype(np.float32)
    for b in sizes:
        blocks = x.reshape(-1, b)
        ours = cq.block_hadamard(x, b).reshape(-1, b)
        theirs = {
            "fht-cpu": fht_cpu.fht(blocks.copy(), num_threads=1) / np.sqrt(b),
            "numpy": blocks @ matrix(b),
            "hadamard-transform": hadamard_transform.hadamard_transform(
                torch.from_numpy(blocks.copy())
            ).numpy(),
            "matmul_hadU": matmul_hadU(torch.from_numpy(blocks.copy())).numpy(),
        }
        for name, values in theirs.items():
            np.testing.assert_allclose(values, ours, atol=3e-5, err_msg=f"{name}, b={b}")


def powers(rounds: int) -> Result:
    """float32, 64 MiB, every power of two: the limits, ours, and fht-cpu."""
    pin()
    assert_peers_agree(POWERS)
    x, y, z, w = (aligned((SIDE, SIDE)) for _ in range(4))
    w[:] = 0  # fht-cpu doesn't scale: anything else would grow out of range
    rows, goals = [], []
    curves: dict[str, list[float]] = {}
    for b in POWERS:
        shape = (-1, max(b, SIDE))
        source, target, place = x.reshape(shape), y.reshape(shape), z.reshape(shape)
        t = medians(
            {
                "copyto": lambda: np.copyto(y, x),
                "limit": lambda: np.negative(z, out=z),
                "in place": lambda b=b, a=place: cq.block_hadamard(a, b, out=a, threads=1),
                "out=": lambda b=b, a=source, o=target: cq.block_hadamard(a, b, out=o, threads=1),
                "fht-cpu, in place": lambda b=b: fht_cpu.fht(w.reshape(-1, b), num_threads=1),
            },
            rounds,
        )
        share, out = t["limit"] / t["in place"], t["copyto"] / t["out="]
        peer = t["fht-cpu, in place"] / t["in place"]
        rows.append([b, share, t["copyto"] / t["in place"], out, peer, t["copyto"] / t["limit"]])
        goals.append(Goal(f"1: b={b}, in place / limit", LIMIT[b], share))
        if b in OUT:
            goals.append(Goal(f"1: b={b}, out= / copyto", OUT[b], out))
        least = 1.6 if 128 <= b <= 1024 else 1.4
        goals.append(Goal(f"3: b={b}, in place / fht-cpu", least, peer))
        for name in ("in place", "out=", "fht-cpu, in place", "limit"):
            curves.setdefault(name, []).append(t["copyto"] / t[name])
    head = ["b", "in place / limit", "in place / copyto", "out= / copyto", "in place / fht-cpu"]
    title = "float32, 64 MiB, one thread"
    return Result(title, [*head, "limit / copyto"], rows, goals, curves)


def cache(rounds: int) -> Result:
    """A working set of 256 KiB: the kernel alone, and the public function in a loop.

    Arrays start on a line of cache, 16 bytes into one as NumPy's do, and half-way into one.
    """
    from corequant._cpu.codegen.plans import plan_rows
    from corequant._cpu.codegen.rotation_kernels import kernel_for, settings

    pin()
    repeats = 200
    w, scratch = aligned((1 << 16,)), aligned((1 << 16,))
    w[:] = 0
    rows, goals = [], []
    for b, offset in itertools.product(CACHE, (0, 16, 32)):
        x, y, z = (aligned((1 << 16,), offset=offset) for _ in range(3))
        plan = plan_rows("float32", 1, b, False, "none", "ordinary")
        kernel, at = kernel_for(plan), z.ctypes.data
        table, room = kernel.choices.ctypes.data, scratch.ctypes.data
        given = settings(z.size // plan.unit, b**-0.5, choices=table)
        view = z.reshape(-1, SIDE)

        def alone(kernel=kernel, at=at, given=given, room=room):
            for _ in range(repeats):
                kernel(at, at, given, room)

        def public(view=view, b=b):
            for _ in range(repeats):
                cq.block_hadamard(view, b, out=view, threads=1)

        def copy(x=x, y=y):
            for _ in range(repeats):
                np.copyto(y, x)

        def peer(b=b):
            for _ in range(repeats):
                fht_cpu.fht(w.reshape(-1, b), num_threads=1)

        t = medians({"copyto": copy, "kernel": alone, "public": public, "fht": peer}, 3 * rounds)
        found = t["copyto"] / t["public"]
        what = f"1: b={b}, 256 KiB, {offset} bytes into a line, in place / copyto"
        goals.append(Goal(what, CACHE[b], found))
        speed = 2 * x.nbytes * repeats / t["copyto"] / 1e9
        share = t["copyto"] / t["kernel"]
        rows.append([b, offset, share, found, t["fht"] / t["public"], f"{speed:.0f}"])
    head = [
        "b",
        "bytes into a line",
        "kernel / copyto",
        "block_hadamard / copyto",
        "block_hadamard / fht-cpu",
    ]
    return Result("float32, 256 KiB, in place", [*head, "copyto, GB/s"], rows, goals)


def calls(rounds: int) -> Result:
    """16 KiB in ordinary arrays: what a public call takes beyond its kernel."""
    from corequant._cpu.codegen.plans import plan_rows
    from corequant._cpu.codegen.rotation_kernels import kernel_for, settings

    pin()
    repeats = 1000
    x, y = np.ones((64, 64), np.float32), np.empty((64, 64), np.float32)
    scratch = np.empty(1 << 16, np.uint8)
    rows, goals = [], []
    for name, out in (("in place", x), ("out=", y)):
        plan = plan_rows("float32", 1, 64, False, "none", "ordinary")
        kernel = kernel_for(plan)
        table, source = kernel.choices.ctypes.data, x.ctypes.data
        given = settings(x.size // plan.unit, 0.125, choices=table)
        rest = (out.ctypes.data, given, scratch.ctypes.data)

        def alone(kernel=kernel, source=source, rest=rest):
            for _ in range(repeats):
                kernel(source, *rest)

        def public(out=out):
            for _ in range(repeats):
                cq.block_hadamard(x, 64, out=out, threads=1)

        t = medians({"kernel": alone, "public": public}, 5 * rounds)
        kernel_us, beyond = (1e6 * v / repeats for v in (t["kernel"], t["public"] - t["kernel"]))
        rows.append([name, f"{kernel_us:.2f}", f"{beyond:.2f}"])
        goals.append(Goal(f"2: 16 KiB, {name}, µs beyond the kernel", 2.5, beyond, most=True))
    return Result("float32, 16 KiB, b=64", ["", "kernel, µs", "beyond it, µs"], rows, goals)


def cores(rounds: int) -> Result:
    """Rows of K·2^k numbers, about 64 MiB."""
    pin()
    rows, goals = [], []
    for (core, power), least in CORES.items():
        d = core * power
        x, y = aligned(((1 << 24) // d, d)), aligned(((1 << 24) // d, d))
        exact = x[:3].astype(np.float64) @ cq.hadamard_matrix(d) / np.sqrt(d)
        np.testing.assert_allclose(cq.block_hadamard(x[:3]), exact, atol=1e-4)
        t = medians(
            {
                "copyto": lambda x=x, y=y: np.copyto(y, x),
                "place": lambda x=x: cq.block_hadamard(x, out=x, threads=1),
                "out": lambda x=x, y=y: cq.block_hadamard(x, out=y, threads=1),
            },
            rounds,
        )
        place, out = t["copyto"] / t["place"], t["copyto"] / t["out"]
        rows.append([f"{core}·{power}", place, out])
        goals.append(
            Goal(f"2: d={core}·{power}, in place or out= / copyto", least, max(place, out))
        )
    return Result("Rows of K·2^k", ["d", "in place / copyto", "out= / copyto"], rows, goals)


def dtypes(rounds: int) -> Result:
    pin()
    rows, goals = [], []
    sizes = (16, 64, 256, 1024)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        d = SIDE * 4 // np.dtype(dtype).itemsize
        x, y = aligned((SIDE, d), dtype), aligned((SIDE, d), dtype)
        jobs: dict[str, Job] = {"copyto": lambda x=x, y=y: np.copyto(y, x)}
        for b in sizes:
            jobs[str(b)] = lambda x=x, b=b: cq.block_hadamard(x, b, out=x, threads=1)
        t = medians(jobs, rounds)
        name = np.dtype(dtype).name
        rows.append([name, *(t["copyto"] / t[str(b)] for b in sizes)])
        if np.dtype(dtype).itemsize == 2:
            goals.append(Goal(f"4: {name}, b=64, in place / copyto", 0.88, t["copyto"] / t["64"]))
    title = "Other dtypes, 64 MiB, in place / copyto of the same array"
    return Result(title, ["dtype", *(f"b={b}" for b in sizes)], rows, goals)


def matmuls(rounds: int) -> Result:
    """Products with the matrix, and torch's transforms."""
    pin()
    assert_peers_agree(list(MATMUL))
    x, y, z = (aligned((SIDE, SIDE)) for _ in range(3))
    x[:] = np.random.default_rng(0).normal(size=x.shape)
    rows, goals = [], []
    for b, least in MATMUL.items():
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
        product = 2 * b * x.size / t["numpy"] / 1e9
        rows.append([b, *(t[k] / t["ours"] for k in list(t)[1:]), f"{product:.0f}"])
        goals.append(Goal(f"3: b={b}, out= / numpy.matmul", least, t["numpy"] / t["ours"]))
    names = ["in place", "numpy matmul", "torch matmul", "hadamard-transform", "matmul_hadU"]
    title = "Times faster than products with H and than torch's transforms, out=, 64 MiB"
    return Result(title, ["b", *names, "numpy matmul, GFLOP/s"], rows, goals)


def fused(rounds: int) -> Result:
    """Permute, sign, rotate and INT4 per token, b=64; against one copy of x."""
    pin()
    rng = np.random.default_rng(0)
    x, y, turned = (aligned((SIDE, SIDE)) for _ in range(3))
    x[:] = rng.normal(size=x.shape)
    permutation, signs = rng.permutation(SIDE), cq.random_signs(SIDE, 0)
    codes = np.zeros(x.shape, np.int8)
    rows, goals = [], []
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

            np.testing.assert_array_equal(together().codes, separately().codes)
            copy = {"copyto": lambda: np.copyto(y, x)}
            t = medians(
                {**copy, "codes": together, "values": values, "separate": separately}, rounds
            )
            share, steps = t["copyto"] / t["codes"], t["separate"] / t["codes"]
            how = "permuted" if permuted else "not permuted"
            rows.append([spec, how, share, t["copyto"] / t["values"], steps])
            if ":token" in spec:
                what = f"5: {spec}, {how}, codes / "
                goals.append(Goal(what + "copyto", 0.42 if permuted else 0.65, share))
                goals.append(Goal(what + "separate steps", 2.2, steps))
    head = ["spec", "", "codes / copyto", "values / copyto", "codes / separate steps"]
    return Result("Fused quantization, 4096 × 4096, b=64", head, rows, goals)


def statistics(rounds: int) -> Result:
    pin()
    x, z = aligned((SIDE, SIDE)), aligned((SIDE, SIDE))
    stats = cq.ActivationStats(SIDE)
    jobs = {
        "update": lambda: stats.update(x),
        "max": lambda: x.max(),
        "limit": lambda: np.negative(z, out=z),
    }
    t = medians(jobs, rounds)
    rows = [[f"{x.nbytes / t[k] / 1e9:.1f}" for k in t]]
    head = ["ActivationStats.update", "x.max()", "limit (and as much written)"]
    return Result("Statistics of one pass, GB/s read", head, rows)


def threads(rounds: int) -> Result:
    """Wall clock, two threads against one; beside them two threads that copy or scale.

    Calls follow closely on each other, as in a loop: helpers that sleep are woken for 32 MiB only.
    """
    rows, goals = [], []
    cpus = sorted(os.sched_getaffinity(0))
    for count in (256, 512, 1024, SIDE):
        for b in (64, 1024):
            x, y, z = (aligned((count, SIDE)) for _ in range(3))
            repeats, half = 8 * SIDE // count, count // 2
            with ThreadPoolExecutor(1) as pool:

                def both(work, one, other, repeats=repeats, pool=pool):
                    for _ in range(repeats):
                        helped = pool.submit(work, *other)
                        work(*one)
                        helped.result()

                def alone(work, *given, repeats=repeats):
                    for _ in range(repeats):
                        work(*given)

                def rotate(count, x=x, b=b):
                    cq.block_hadamard(x, b, out=x, threads=count)

                def scale(part):
                    np.negative(part, out=part)

                jobs: dict[str, Job] = {
                    "one": lambda alone=alone, rotate=rotate: alone(rotate, 1),
                    "two": lambda alone=alone, rotate=rotate: alone(rotate, 2),
                    "copy": lambda alone=alone, x=x, y=y: alone(np.copyto, y, x),
                    "copies": lambda both=both, x=x, y=y, h=half: both(
                        np.copyto, (y[:h], x[:h]), (y[h:], x[h:])
                    ),
                    "scale": lambda alone=alone, scale=scale, z=z: alone(scale, z),
                    "scales": lambda both=both, scale=scale, z=z, h=half: both(
                        scale, (z[:h],), (z[h:],)
                    ),
                }
                t = medians(jobs, rounds, time.perf_counter)
            size = f"{x.nbytes >> 20} MiB, b={b}"
            found, copies = t["one"] / t["two"], t["copy"] / t["copies"]
            rows.append([size, found, copies, t["scale"] / t["scales"]])
            target = min(1.7, copies)
            goals.append(Goal(f"6: {size}, two threads / one (1.7 or np.copyto's)", target, found))
    head = ["array", "rotation in place", "np.copyto", "in-place negation"]
    return Result(f"Two threads / one, wall clock, {len(cpus)} processors", head, rows, goals)


def start(rounds: int) -> Result:
    script = (
        "import numba, time, numpy as np; a = time.perf_counter(); import corequant as cq;"
        "cq.block_hadamard(np.ones((64, 4096), np.float32), 64); print(time.perf_counter() - a)"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    runs = []
    for _ in range(rounds + 1):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            check=True,
        )
        runs.append(float(done.stdout))
    median = float(np.median(runs[1:]))
    goal = Goal("7: first rotation of a second process, s", 0.3, median, most=True)
    head = ["import corequant and first rotation, second process, s"]
    return Result("Start-up", head, [[f"{median:.3f}"]], [goal])


PARTS: dict[str, Callable[[int], Result]] = {
    "powers": powers,
    "cache": cache,
    "calls": calls,
    "cores": cores,
    "dtypes": dtypes,
    "matmuls": matmuls,
    "fused": fused,
    "statistics": statistics,
    "threads": threads,
    "start": start,
}
