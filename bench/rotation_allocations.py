"""Parts of bench_rotation.py about where arrays begin: what NumPy, files, torch and pages give."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rotation_parts import POWERS, SIDE, Goal, Job, Result, medians, pin

import corequant as cq

__all__ = ["ALLOCATION_PARTS"]

KINDS = ("np.empty", "np.load, mmap", "torch.empty", "page")
LIMIT = {b: 0.92 for b in POWERS} | {2048: 0.9, 4096: 0.9, 8192: 0.85}
OUT = {b: 1.35 for b in POWERS[:7]} | {2048: 1.15, 4096: 1.15}
EVEN = 0.93
"""The worst allocation's share of the best one's speed."""


def allocated(kind: str, folder: Path) -> np.ndarray:
    """Return 64 MiB of ones as they are usually come by, written so that memory backs them."""
    shape = (SIDE, SIDE)
    if kind == "np.empty":
        made = np.empty(shape, np.float32)
    elif kind == "np.load, mmap":
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy") as file:
            np.save(file, np.ones(shape, np.float32))
            file.flush()
            made = np.asarray(np.load(file.name, mmap_mode="c"))
    elif kind == "torch.empty":
        made = torch.empty(shape).numpy()
    else:
        pages = mmap.mmap(-1, 4 * SIDE * SIDE)
        made = np.frombuffer(pages, np.float32).reshape(shape)
    made[...] = 1
    return made


def pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return two arrays of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        return {k: (allocated(k, Path(folder)), allocated(k, Path(folder))) for k in KINDS}


def measured(jobs: dict[str, tuple[Job, Job]], rounds: int) -> list[float]:
    """Return how many times as fast as the second the first job of each pair is."""
    both = {f"{kind}{i}": job for kind, two in jobs.items() for i, job in enumerate(two)}
    t = medians(both, rounds)
    return [t[f"{kind}1"] / t[f"{kind}0"] for kind in jobs]


def allocations(rounds: int) -> Result:
    """float32, 64 MiB, at each kind of allocation, whose own limit and copy are the measure."""
    pin()
    arrays = pairs()
    rows: list[list[object]] = []
    goals = []
    for b in POWERS:
        placed, copied = {}, {}
        for kind, (x, y) in arrays.items():
            a, o = (z.reshape(-1, max(b, SIDE)) for z in (x, y))
            placed[kind] = (
                lambda a=a, b=b: cq.block_hadamard(a, b, out=a, threads=1),
                lambda x=x: np.negative(x, out=x),
            )
            copied[kind] = (
                lambda a=a, o=o, b=b: cq.block_hadamard(a, b, out=o, threads=1),
                lambda x=x, y=y: np.copyto(y, x),
            )
        for what, jobs, least in (
            ("in place / limit", placed, LIMIT),
            ("out= / copyto", copied, OUT),
        ):
            shares = measured(jobs, rounds)
            even = min(shares) / max(shares)
            rows.append([b, what, *shares, even])
            if b in least:
                goals.append(Goal(f"8: b={b}, {what}, the least", least[b], min(shares)))
            goals.append(Goal(f"8: b={b}, {what}, least / most", EVEN, even))
    head = ["b", "", *KINDS, "least / most"]
    return Result("float32, 64 MiB, by allocation", head, rows, goals)


def fused_allocations(rounds: int) -> Result:
    """Fused calls and statistics at each kind of allocation, in milliseconds."""
    pin()
    arrays = pairs()
    codes = np.zeros((SIDE, SIDE), np.int8)
    permutation = np.random.default_rng(0).permutation(SIDE)
    spec = "int4:token:symmetric"
    stats = cq.ActivationStats(SIDE)
    work: dict[str, Callable[[np.ndarray, np.ndarray], object]] = {
        "rotate_quantize": lambda x, y: cq.rotate_quantize(x, 64, spec, out=codes, threads=1),
        "rotate_quantize, permuted": lambda x, y: cq.rotate_quantize(
            x, 64, spec, permutation=permutation, out=codes, threads=1
        ),
        "rotate_fake_quantize": lambda x, y: cq.rotate_fake_quantize(x, 64, spec, out=y, threads=1),
        "ActivationStats.update": lambda x, y: stats.update(x),
    }
    rows: list[list[object]] = []
    goals = []
    for name, call in work.items():
        jobs = {k: lambda x=x, y=y, call=call: call(x, y) for k, (x, y) in arrays.items()}
        t = [1e3 * seconds for seconds in medians(jobs, rounds).values()]
        rows.append([name, *t, min(t) / max(t)])
        goals.append(Goal(f"8: {name}, worst / best allocation", EVEN, min(t) / max(t)))
    head = ["ms", *KINDS, "best / worst"]
    return Result("Fused calls and statistics, 64 MiB, by allocation", head, rows, goals)


ALLOCATION_PARTS: dict[str, Callable[[int], Result]] = {
    "allocations": allocations,
    "fused_allocations": fused_allocations,
}
