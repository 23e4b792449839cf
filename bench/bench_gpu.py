"""The GPU kernels against copying the same bytes: rotations, fused quantization, decode shapes.

Usage: python bench/bench_gpu.py [--rounds 50] [--json FILE] [--peer PATH]

Needs a GPU that torch can use, and says so without one; nothing is built beforehand. Before
anything is timed, codes and scales are compared with NumPy's (no difference is allowed) and
rotations with float64 (twice the naive error is). Each candidate is captured in CUDA graphs, one
for each of several inputs that together exceed the second-level cache four times, so that launches
from Python don't count; they are shown apart for decode shapes. Candidates take turns; times are
medians of CUDA events. A ratio is the time of a device copy of the same bytes over the kernel's
own, in the same run.

``--peer`` names a checkout of Dao-AILab's fast-hadamard-transform, built in this environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

import corequant as cq
from corequant.testing import check_error
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
        with torch.cuda.stream(side):
            # Compiles, tunes, and brings tables to the device.
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


def verify() -> None:
    """Compare with NumPy and float64 at every width that is timed."""
    for d in WIDTHS:
        x = sample(64, d)
        host = x.cpu()
        moved = {"permutation": cq.random_permutation(d, 0), "signs": cq.random_signs(d, 1)}
        for b in (*(b for b in TARGETS if b <= 128), *WIDE[d]):
            turned = (cq.block_hadamard(t, b) for t in (x, host, host.double()))
            check_error(f"d={d}, b={b}", *(t.double().cpu().numpy() for t in turned))
        for text in SHARES:
            for b in (16, 64, 128):
                for how in ({}, moved):
                    ours, theirs = (rotate_quantize_packed(t, b, text, **how) for t in (x, host))
                    for name in ("packed", "scales"):
                        found, expected = getattr(ours, name).cpu(), getattr(theirs, name)
                        differing = int((found != expected).sum())
                        if differing:
                            sys.exit(f"{text}, d={d}, b={b}: {differing} of the {name} differ")


def dense(b: int):
    matrix = torch.from_numpy(cq.hadamard_matrix(b).copy()).to("cuda", torch.bfloat16)
    return lambda x: torch.matmul(x.reshape(-1, b), matrix)


def peer(b: int):
    from fast_hadamard_transform import hadamard_transform

    return lambda x: hadamard_transform(x.reshape(-1, b), 1 / math.sqrt(b))


def rotations(d: int, given, rounds: int) -> list[dict]:
    found = []
    for b in (*(b for b in TARGETS if b <= 128), *WIDE[d]):
        calls = {"copy": torch.clone, "ours": lambda x, b=b: cq.block_hadamard(x, b)}
        if b <= 512:
            calls["torch.matmul"] = dense(b)
        if importlib.util.find_spec("fast_hadamard_transform") and b & (b - 1) == 0:
            calls["fast-hadamard-transform"] = peer(b)
        t = medians({name: Captured(call, given) for name, call in calls.items()}, rounds)
        found.append(figure("rotate", d, b, t, t["copy"] / t["ours"], TARGETS[b]))
    return found


def fused(d: int, given, rounds: int) -> list[dict]:
    found = []
    moved = {"permutation": cq.random_permutation(d, 0), "signs": cq.random_signs(d, 1)}
    for text, share in SHARES.items():
        for b in (16, 64, 128):

            def separately(x, b=b, text=text):
                y = cq.block_hadamard(x, b)
                return y, rotate_quantize_packed(y, 1, text)

            calls = {
                "copy": partial(copied, int(ROWS * d * (2 + share))),
                "ours": lambda x, b=b, s=text: rotate_quantize_packed(x, b, s),
                "permuted": lambda x, b=b, s=text: rotate_quantize_packed(x, b, s, **moved),
                "separately": separately,
            }
            t = medians({name: Captured(call, given) for name, call in calls.items()}, rounds)
            what = f"rotate + {text}"
            found += [
                figure(what, d, b, t, t["copy"] / t["ours"], FUSED),
                figure(f"{what} / apart", d, b, t, t["separately"] / t["ours"], TWICE),
                figure(f"{what}, permuted", d, b, t, t["ours"] / t["permuted"], PERMUTED),
            ]
    return found


def decoding(rows: int, rounds: int) -> dict:
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
    return figure(f"{rows} rows", 4096, 64, t, t["copy"] / t["rotate"], None)


def figure(what: str, d: int, b: int, times, ratio: float, target: float | None) -> dict:
    shown = ", ".join(f"{name} {us:.1f}" for name, us in times.items())
    missed = target is not None and ratio < target
    wanted = "" if target is None else f"(target {target:.2f}{', MISSED' if missed else ''})"
    print(f"{what:30} d={d:5} b={b:5} {ratio:5.2f} {wanted:22} us: {shown}", flush=True)
    return {"what": what, "d": d, "b": b, "ratio": ratio, "target": target, "us": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--peer", type=Path, help="a checkout of fast-hadamard-transform")
    options = parser.parse_args()
    require_gpu()
    if options.peer is not None:
        sys.path.insert(0, str(options.peer))
    import triton

    name = torch.cuda.get_device_properties(0).name
    machine = f"{name}, torch {torch.__version__}, triton {triton.__version__}"
    print(machine)
    verify()
    print("codes and scales: no difference; rotations: within twice the naive error")
    found = []
    for d in WIDTHS:
        given = inputs(d)
        found += rotations(d, given, options.rounds) + fused(d, given, options.rounds)
    found += [decoding(rows, options.rounds) for rows in DECODE]
    missed = [f for f in found if f["target"] is not None and f["ratio"] < f["target"]]
    print(f"{len(found)} figures, {len(missed)} below their target")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
