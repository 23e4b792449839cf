"""MassDiff with its statistics, against brevitas's, on one size: equal blocks, then the ratio.

Usage: python bench/bench_massdiff.py [--d 14336] [--block-size 16] [--tokens 4096]

The peer's time grows with tokens · d² / block size; it runs once.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import torch

import corequant as cq

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from brevitas.graph.permute import massdiff_permute


def timed(call):
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=14336)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    o = parser.parse_args()
    generator = np.random.default_rng(0)
    x = generator.normal(size=(o.tokens, o.d)) * np.exp(generator.normal(0, 1.5, o.d))
    x = x.astype(np.float32)

    def ours():
        return cq.massdiff(cq.ActivationStats(o.d).update(x).mean_abs, o.block_size)

    ours()  # compile
    found, seconds = min((timed(ours) for _ in range(5)), key=lambda pair: pair[1])
    theirs, peer = timed(lambda: massdiff_permute(torch.from_numpy(x), o.block_size).numpy())
    mean = np.abs(x.astype(np.float64)).mean(0)
    loads = [cq.block_mass(mean[p], o.block_size).max() for p in (found, theirs)]
    assert loads[0] <= loads[1] * (1 + 1e-6), loads
    print(
        f"d={o.d} b={o.block_size} tokens={o.tokens}: corequant {seconds:.3f} s (statistics "
        f"included), brevitas {peer:.1f} s, ratio {peer / seconds:.0f}; largest block mass "
        f"{loads[0]:.6g} and {loads[1]:.6g}"
    )


if __name__ == "__main__":
    main()
