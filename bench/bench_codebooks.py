"""Exact k-means of a matrix's rows: seconds on one core, and against scikit-learn's KMeans.

Usage: NUMBA_NUM_THREADS=1 python bench/bench_codebooks.py [--rows 4096] [--d 4096] [--most 16]
       [--peer-rows 8]

All sizes 1, 2, 4, ... up to ``--most`` come from one pass. The peer (``pip install scikit-learn``)
is run on a few rows, for the largest size, as CLAQ's published code does; without it that part is
left out, and said.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import corequant as cq


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--most", type=int, default=16)
    parser.add_argument("--peer-rows", type=int, default=8)
    given = parser.parse_args()
    generator = np.random.default_rng(0)
    W = generator.standard_t(5, (given.rows, given.d)).astype(np.float32)
    H = generator.gamma(1, size=given.d)
    sizes = [1 << k for k in range(given.most.bit_length()) if 1 << k <= given.most]
    cq.kmeans_table(W[:1], H, sizes)
    for label, weights in (("weighted", H), ("unweighted", None)):
        start, busy = time.perf_counter(), time.process_time()
        table = cq.kmeans_table(W, weights, sizes)
        taken = time.perf_counter() - start, time.process_time() - busy
        print(
            f"{label}: {given.rows}x{given.d}, K = {sizes}: {taken[0]:.2f} s elapsed, "
            f"{taken[1]:.2f} s of processor time"
        )
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        print("scikit-learn isn't installed: not compared")
        return
    rows = min(given.peer_rows, given.rows)
    peer, busy = [], time.process_time()
    for row in W[:rows]:
        found = KMeans(given.most, random_state=10, n_init="auto").fit(row[:, None])
        peer.append(found.inertia_)
    peer_time = (time.process_time() - busy) / rows
    own_time = taken[1] / given.rows
    ratio = table.losses[:rows, -1].sum() / sum(peer)
    print(
        f"a row at K = {given.most}: scikit-learn {peer_time * 1e3:.1f} ms, "
        f"here {own_time * 1e3:.2f} ms for all sizes ({peer_time / own_time:.1f} times faster), "
        f"loss {ratio:.4f} of its"
    )


if __name__ == "__main__":
    main()
