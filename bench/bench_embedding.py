"""What a process that lives for weeks asks of the library: bounded memory, and forks that work.

Usage: python bench/bench_embedding.py shapes [--calls 200000] [--shapes 1000]
       python bench/bench_embedding.py forks [--count 200]

``shapes`` makes fused calls in random order over as many shapes, 8 specs and 4 dtypes, and prints
resident memory, memory maps and open files after the first tenth of them and at the end. ``forks``
forks while two threads load and compile kernels; each child rotates and quantizes. Both exit with 1
where something grew by more than 2 %, or a child failed or did not end within a minute.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np

import corequant as cq

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
SPECS = (
    "int4:token:symmetric",
    "int4:token:asymmetric",
    "int8:token:symmetric",
    "int8:token:asymmetric",
    "int4:group32:symmetric",
    "int4:group64:asymmetric",
    "int8:group128:symmetric",
    "mxfp4",
)
BLOCKS = (16, 32, 64, 128)


def footprint() -> dict[str, int]:
    """Return resident KiB, memory maps and open files of this process."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return {
        "resident KiB": resident // 1024,
        "maps": len(Path("/proc/self/maps").read_text().splitlines()),
        "files": len(os.listdir("/proc/self/fd")),
    }


def shapes(calls: int, count: int, seed: int = 0) -> bool:
    """Make the calls; return whether nothing grew."""
    rng = random.Random(seed)
    kinds = [
        (rng.randint(1, 4), 128 * rng.randint(1, 40), rng.choice(BLOCKS)) for _ in range(count)
    ]
    source = np.random.default_rng(seed).normal(size=4 * 128 * 40)
    sources = [source.astype(dtype) for dtype in DTYPES]
    early, started = {}, time.perf_counter()
    for call in range(calls):
        rows, d, block = kinds[rng.randrange(count)]
        x = sources[rng.randrange(len(DTYPES))][: rows * d].reshape(rows, d)
        function = rng.choice((cq.rotate_quantize, cq.rotate_fake_quantize))
        function(x, block, rng.choice(SPECS))
        if call == calls // 10 - 1:
            early = footprint()
    late = footprint()
    print(f"{calls} calls over {count} shapes in {time.perf_counter() - started:.0f} s")
    for name, value in early.items():
        change = late[name] / value - 1
        print(f"{name}: {value} after a tenth, {late[name]} at the end ({change:+.1%})")
    return all(late[name] <= 1.02 * value for name, value in early.items())


def forks(count: int, seed: int = 0) -> bool:
    """Fork as often; return whether each child did its work."""
    stop = threading.Event()
    made = [0, 0]

    def compile_kernels(which: int) -> None:
        rng = random.Random(which)
        while not stop.is_set():
            block = rng.choice((4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 96, 112, 128, 160, 256))
            d = int(np.lcm(block, 64)) * rng.randint(1, 3)
            x = np.ones((2, d), rng.choice(DTYPES))
            signs = cq.random_signs(d, 0) if rng.random() < 0.5 else None
            if rng.random() < 0.5:
                cq.rotate_quantize(x, block, rng.choice(SPECS[:6]), signs=signs)
            else:
                cq.block_hadamard(x, block, signs=signs, inverse=rng.random() < 0.5)
            made[which] += 1

    threads = [threading.Thread(target=compile_kernels, args=(k,), daemon=True) for k in (0, 1)]
    for thread in threads:
        thread.start()
    rng, failed = random.Random(seed), 0
    for number in range(count):
        time.sleep(rng.random() / 20 if number else 0)
        child = os.fork()
        if not child:
            signal.alarm(60)
            x = np.arange(96.0)[None]
            cq.block_hadamard(x, (12, 24, 48, 96)[number % 4])
            cq.rotate_quantize(x.astype(np.float32), (16, 32)[number % 2], "int4:group32")
            cq.quantize(x, "int4:channel")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        failed += status != 0
        if status:
            print(f"child {number} ended with status {status}", flush=True)
    stop.set()
    for thread in threads:
        thread.join()
    print(f"{count} forks beside {sum(made)} calls of two threads, {failed} children failed")
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("shapes", "forks"))
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--shapes", type=int, default=1000)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.part == "shapes":
        sys.exit(not shapes(options.calls, options.shapes))
    with tempfile.TemporaryDirectory() as folder:
        # An empty cache: loading a kernel takes a moment, compiling it long enough to be met.
        os.environ["NUMBA_CACHE_DIR"] = folder
        sys.exit(not forks(options.count, options.seed))


if __name__ == "__main__":
    main()
