"""The GPU kernels against copying the same bytes: rotations, fused quantization, decode shapes.

Usage: python bench/bench_gpu.py [--rounds 50] [--json FILE] [--peer PATH]

Needs a GPU that torch can use, and says so without one; nothing is built or installed beforehand,
so that a source tree on PYTHONPATH will do. First codes, scales and rotations are compared with
NumPy's: no difference is allowed. One is reported, and the exit status tells of it at the end; the
times are taken all the same. Figures come in order of importance, and each is printed and written
to the file of ``--json`` at once. One that fails is written as an error; if it has broken CUDA for
this process, another one begins with the next.

Each candidate is captured in CUDA graphs, one for each of several inputs that together exceed the
second-level cache four times, so that launches from Python don't count; they are shown apart for
decode shapes. Candidates take turns; times are medians of CUDA events. A ratio is the time of a
device copy of the same bytes over the kernel's own, in the same run.

``--peer`` names a checkout of Dao-AILab's fast-hadamard-transform, built in this environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import corequant as cq
from corequant_torch import rotate_quantize_packed

ROWS = 8192
WIDTHS = (4096, 8192, 14336)
TARGETS = {16: 0.90, 32: 0.90, 64: 0.90, 128: 0.90, 512: 0.85, 4096: 0.75, 8192: 0.75, 14336: 0.60}
WIDE = {4096: (512, 4096), 8192: (512, 4096, 8192), 14336: (512, 14336)}
SHARES = {"mxfp4": 0.5 + 1 / 32, "nvfp4": 0.5 + 1 / 16, "int4:group128": 0.5 + 4 / 128}
"""Bytes that are written for a number, its share of the scale included."""
FUSED, TWICE, PERMUTED = 0.75, 2.0, 0.85
DECODE = (1, 8, 64)
LAUNCHES = 20


def require_gpu() -> None:
    if not torch.cuda.is_available():
        sys.exit(
            f"bench_gpu.py needs a GPU: torch {torch.__version__} sees none "
            f"(CUDA of this build: {torch.version.cuda}). Nothing was measured."
        )


def sample(rows: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    x = torch.randn(rows, d, generator=generator, device="cuda")
    return (x * torch.exp(torch.randn(d, generator=generator, device="cuda"))).bfloat16()


def inputs(d: int) -> list[torch.Tensor]:
    """Return tensors of which none is in the cache any more when its turn comes."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(3, math.ceil(4 * cache / (2 * ROWS * d)) + 1)
    return [sample(ROWS, d, seed) for seed in range(count)]


class Captured:
    """A call in one CUDA graph for each input; calling this replays the next."""

    def __init__(self, call, given) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Compiles, and brings tables to the device.
            for _ in range(2):
                call(given[0])
        side.synchronize()
        self.graphs, self.results, self.at = [], [], 0
        for x in given:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.results.append(call(x))
            self.graphs.append(graph)

    def __call__(self) -> None:
        self.at = (self.at + 1) % len(self.graphs)
        self.graphs[self.at].replay()


def medians(jobs, rounds: int) -> dict[str, float]:
    """Return microseconds of each job, taking turns forwards and backwards."""
    for job in jobs.values():
        for _ in range(3):
            job()
    times = {name: [] for name in jobs}
    for k in range(rounds):
        for name in list(jobs) if k % 2 == 0 else reversed(list(jobs)):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Keeps the device busy until all of it is in its queue.
            torch.cuda._sleep(200_000)
            start.record()
            jobs[name]()
            stop.record()
            times[name].append((start, stop))
        torch.cuda.synchronize()
    return {
        name: statistics.median(a.elapsed_time(b) * 1e3 for a, b in pairs)
        for name, pairs in times.items()
    }


def copied(size: int, x: torch.Tensor) -> torch.Tensor:
    """Copy so many bytes of ``x``: as many again are written."""
    return x.view(torch.uint8).reshape(-1)[: size // 2].clone()


def verify() -> list[str]:
    """Compare with NumPy at every width that is timed; return what differs."""
    found = []

    def compare(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        differing = int((ours.cpu() != theirs).sum())
        if differing:
            found.append(f"{what}: {differing} numbers differ")
            print(found[-1], flush=True)

    for d in WIDTHS:
        x = sample(64, d)
        moved = {"permutation": cq.random_permutation(d, 0), "signs": cq.random_signs(d, 1)}
        for given in (x, x.float()):
            for b in (*(b for b in TARGETS if b <= 128), *WIDE[d]):
                turned = (cq.block_hadamard(t, b) for t in (given, given.cpu()))
                compare(f"rotate, {given.dtype}, d={d}, b={b}", *turned)
        for text in SHARES:
            for b in (16, 64, 128):
                for how in ({}, moved):
                    ours, theirs = (rotate_quantize_packed(t, b, text, **how) for t in (x, x.cpu()))
                    for name in ("packed", "scales"):
                        what = f"{text}, d={d}, b={b}, {name}"
                        compare(what, getattr(ours, name), getattr(theirs, name))
    return found


def dense(b: int):
    matrix = torch.from_numpy(cq.hadamard_matrix(b).copy()).to("cuda", torch.bfloat16)
    return lambda x: torch.matmul(x.reshape(-1, b), matrix)


def peer(b: int):
    from fast_hadamard_transform import hadamard_transform

    return lambda x: hadamard_transform(x.reshape(-1, b), 1 / math.sqrt(b))


def rotation(d: int, b: int, given, rounds: int) -> list[dict]:
    calls = {"copy": torch.clone, "ours": lambda x: cq.block_hadamard(x, b)}
    half = given[0].dtype == torch.bfloat16
    if half and b <= 512:
        calls["torch.matmul"] = dense(b)
    if importlib.util.find_spec("fast_hadamard_transform") and b & (b - 1) == 0:
        calls["fast-hadamard-transform"] = peer(b)
    t = medians({name: Captured(call, given) for name, call in calls.items()}, rounds)
    what = "rotate" if half else "rotate float32"
    return [figure(what, d, b, t, t["copy"] / t["ours"], TARGETS[b] if half else None)]


def fused(d: int, b: int, text: str, given, rounds: int) -> list[dict]:
    moved = {"permutation": cq.random_permutation(d, 0), "signs": cq.random_signs(d, 1)}

    def separately(x):
        return rotate_quantize_packed(cq.block_hadamard(x, b), 1, text)

    calls = {
        "copy": partial(copied, int(ROWS * d * (2 + SHARES[text]))),
        "ours": lambda x: rotate_quantize_packed(x, b, text),
        "permuted": lambda x: rotate_quantize_packed(x, b, text, **moved),
        "separately": separately,
    }
    t = medians({name: Captured(call, given) for name, call in calls.items()}, rounds)
    what = f"rotate + {text}"
    return [
        figure(what, d, b, t, t["copy"] / t["ours"], FUSED),
        figure(f"{what} / apart", d, b, t, t["separately"] / t["ours"], TWICE),
        figure(f"{what}, permuted", d, b, t, t["ours"] / t["permuted"], PERMUTED),
    ]


def decoding(rows: int, rounds: int) -> list[dict]:
    """Time rows of one token: launched from Python, and many in one CUDA graph."""
    x = sample(rows, 4096)
    out = torch.empty_like(x)
    calls = {
        "copy": lambda x: out.copy_(x),
        "rotate": lambda x: cq.block_hadamard(x, 64, out=out),
        "rotate and round": lambda x: cq.rotate_fake_quantize(x, 64, "int4:token"),
    }

    def many(call, x):
        return [call(x) for _ in range(LAUNCHES)]

    jobs = {name: Captured(partial(many, call), [x]) for name, call in calls.items()}
    jobs |= {f"{name}, launched": partial(many, call, x) for name, call in calls.items()}
    t = {name: us / LAUNCHES for name, us in medians(jobs, rounds).items()}
    return [figure(f"{rows} rows", 4096, 64, t, t["copy"] / t["rotate"], None)]


def jobs(rounds: int) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """Yield what is to be timed, the most important first, with its name."""
    for d in WIDTHS:
        given: list[torch.Tensor] = []

        def ready(d=d, given=given) -> list[torch.Tensor]:
            if not given:
                given.extend(inputs(d))
            return given

        def wide(ready=ready) -> list[torch.Tensor]:
            return [x.float() for x in ready()[:3]]

        sizes = (*(b for b in TARGETS if b <= 128), *WIDE[d])
        for b in sizes:
            yield f"rotate d={d} b={b}", lambda d=d, b=b, r=ready: rotation(d, b, r(), rounds)
        for text in SHARES:
            for b in (16, 64, 128):
                yield (
                    f"{text} d={d} b={b}",
                    lambda d=d, b=b, text=text, r=ready: fused(d, b, text, r(), rounds),
                )
        for b in sizes:
            yield f"float32 d={d} b={b}", lambda d=d, b=b, w=wide: rotation(d, b, w(), rounds)
        if d == WIDTHS[0]:
            for rows in DECODE:
                yield f"{rows} rows", lambda rows=rows: decoding(rows, rounds)
        given.clear()


def figure(what: str, d: int, b: int, times, ratio: float, target: float | None) -> dict:
    shown = ", ".join(f"{name} {us:.1f}" for name, us in times.items())
    missed = target is not None and ratio < target
    wanted = "" if target is None else f"(target {target:.2f}{', MISSED' if missed else ''})"
    print(f"{what:30} d={d:5} b={b:5} {ratio:5.2f} {wanted:22} us: {shown}", flush=True)
    return {"what": what, "d": d, "b": b, "ratio": ratio, "target": target, "us": times}


def attempt(name: str, job: Callable[[], list[dict]]) -> list[dict]:
    """Return a job's figures, or its error in place of them."""
    try:
        return job()
    except Exception as error:
        traceback.print_exc()
        print(f"{name}: {type(error).__name__}", flush=True)
        return [{"what": name, "error": f"{type(error).__name__}: {error}"}]


def is_broken() -> bool:
    """Tell whether CUDA refuses everything in this process from now on."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--peer", type=Path, help="a checkout of fast-hadamard-transform")
    parser.add_argument("--first", type=int, default=-1, help="job to begin with; -1 compares")
    options = parser.parse_args()
    require_gpu()
    if options.peer is not None:
        sys.path.insert(0, str(options.peer))
    import triton

    name = torch.cuda.get_device_properties(0).name
    record = {
        "machine": f"{name}, torch {torch.__version__}, triton {triton.__version__}",
        "differences": [],
        "figures": [],
    }
    if options.first >= 0 and options.json is not None:
        record = json.loads(options.json.read_text())

    def write() -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1) + "\n")

    def go_on_if_broken(what: str, following: int) -> None:
        if is_broken():
            print(f"CUDA is broken after {what}; another process goes on", flush=True)
            given = [a for a in sys.argv if not a.startswith("--first")]
            os.execv(sys.executable, [sys.executable, *given, f"--first={following}"])

    print(record["machine"])
    if options.first < 0:
        compared = attempt("comparison with NumPy", verify)
        record["differences"] = [d["error"] if isinstance(d, dict) else d for d in compared]
        print(f"{len(record['differences'])} comparisons with NumPy that differ", flush=True)
        write()
        go_on_if_broken("the comparison", 0)
    for at, (what, job) in enumerate(jobs(options.rounds)):
        if at >= options.first:
            record["figures"] += attempt(what, job)
            write()
            go_on_if_broken(what, at + 1)
    found = record["figures"]
    missed = [f for f in found if f.get("target") is not None and f["ratio"] < f["target"]]
    failed = [f for f in found if "error" in f]
    print(f"{len(found)} figures, {len(missed)} below their target, {len(failed)} failed")
    if record["differences"] or failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
