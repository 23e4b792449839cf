"""Rotations of CPU tensors: what a tensor costs beyond an array, and against torch's transforms.

Usage: python bench/bench_torch.py [--rounds 3] [--write]

One pinned thread, float32. The peers have no ``out=``; ours is shown with a new result, whose pages
the system must first provide, and with one that is there already. Candidates take turns,
forwards and backwards; figures are medians of thread CPU time. Results are compared first.
"""

from __future__ import annotations

import argparse
import statistics
import time

from bench_rotation import described, table  # sets the number of threads
from markdown import write_section

# ruff: isort: split
import hadamard_transform
import numpy as np
import torch
from brevitas.graph.hadamard import matmul_hadU
from rotation_parts import pin

import corequant as cq

SIDE = 4096
BLOCKS = [2**k for k in range(5, 13)]
SMALL = [((1, 64), 16), ((16, 4096), 64), ((64, 1536), 128)]
TARGET, OVERHEAD = 10.0, 5.0


def medians(jobs, rounds):
    times = {name: [] for name in jobs}
    for k in range(rounds):
        for name in list(jobs) if k % 2 == 0 else reversed(list(jobs)):
            start = time.thread_time()
            jobs[name]()
            times[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def against_peers(rounds):
    """Return rows of: block size, ratios to both peers, ms of a new and of a given result."""
    x = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    out = torch.zeros_like(x)
    rows = []
    for b in BLOCKS:
        blocks = x.reshape(-1, b)
        jobs = {
            "ours": lambda b=b: cq.block_hadamard(x, b, threads=1),
            "out=": lambda b=b: cq.block_hadamard(x, b, out=out, threads=1),
            "hadamard-transform": lambda t=blocks: hadamard_transform.hadamard_transform(t),
            "brevitas": lambda t=blocks: matmul_hadU(t),
        }
        ours = jobs["ours"]().reshape(-1, b)
        for name in ("hadamard-transform", "brevitas"):
            torch.testing.assert_close(jobs[name](), ours, atol=3e-5, rtol=0)
        t = medians(jobs, rounds)
        names = ("hadamard-transform", "brevitas")
        peers = [t[name] / t[mine] for mine in ("ours", "out=") for name in names]
        rows.append([b, *(f"{p:.0f}" if p >= TARGET else f"**{p:.1f}**" for p in peers)])
        rows[-1] += [f"{t[mine] * 1e3:.1f}" for mine in ("ours", "out=")]
        print(*rows[-1], flush=True)
    return rows


def overheads():
    """Return rows of: shape, block size, µs of an array, of a tensor, and their difference."""
    rows = []
    for shape, b in SMALL:
        for out in (False, True):
            x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            t = torch.from_numpy(x.copy())
            calls = 400

            def many(a, out=out, b=b, calls=calls):
                target = a if out else None
                for _ in range(calls):
                    cq.block_hadamard(a, b, out=target)

            many(x), many(t)
            assert np.array_equal(cq.block_hadamard(x, b), cq.block_hadamard(t, b).numpy()) or out
            found = medians({"array": lambda x=x: many(x), "tensor": lambda t=t: many(t)}, 15)
            array, tensor = (found[k] / calls * 1e6 for k in ("array", "tensor"))
            gap = tensor - array
            shown = f"{gap:.1f}" if gap <= OVERHEAD else f"**{gap:.1f}**"
            how = "in place" if out else "new result"
            rows.append(
                [f"{shape[0]} × {shape[1]}", b, how, f"{array:.1f}", f"{tensor:.1f}", shown]
            )
            print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write bench/README.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pin()
    small, large = overheads(), against_peers(options.rounds)
    if not options.write:
        return
    body = [
        "## CPU tensors\n",
        "Written by `bench_torch.py`: one thread, float32, medians of thread CPU time.\n",
        f"{described()}\n",
        f"### What a call costs beyond NumPy's, µs (target: at most {OVERHEAD:.0f})\n",
        table(["shape", "b", "", "array", "tensor", "difference"], small),
        f"### Times faster than torch's transforms, 4096 × 4096 (target: {TARGET:.0f})\n",
        "A new result of 64 MiB takes about 10 ms where the system has huge pages at hand, and "
        "five times that where it must provide small ones; with `out=` there is none to provide.\n",
        table(
            [
                "b",
                "hadamard-transform",
                "brevitas",
                "hadamard-transform, out=",
                "brevitas, out=",
                "ms",
                "ms, out=",
            ],
            large,
        ),
    ]
    write_section("torch", "\n".join(body))


if __name__ == "__main__":
    main()
