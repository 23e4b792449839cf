"""Random calls of the fused paths against the separate steps and a plain NumPy oracle.

Usage: python bench/bench_cases.py [--guarded] [--count 20000] [--kinds 600] [--seed 0]

Every call is made in several ways (fused, step by step, into arrays of ours, packed), over dtypes,
row lengths, block sizes, permutations, signs, specs, strides, byte orders and thread counts. With
``--guarded`` all arrays lie between pages that end the process when they are touched, inputs can't
be written, and what is left of an array's own pages is compared afterwards. The program prints how
many calls were made and how many differed; it exits with 1 where one did, and names the case.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import fusedcases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guarded", action="store_true")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--kinds", type=int, default=600, help="kernels cost more than calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        work(options)
        return
    started = time.perf_counter()
    # Processes of their own: a stray access ends one.
    command = [sys.executable, "-W", "ignore", *sys.argv]
    parts = [
        subprocess.Popen([*command, "--part", str(k)], stdout=subprocess.PIPE, text=True)
        for k in range(options.workers)
    ]
    made = faults = 0
    for part in parts:
        assert part.stdout is not None
        doing = "nothing"
        for line in part.stdout:
            word, _, rest = line.strip().partition(" ")
            made += word == "done"
            faults += word == "differs"
            if word == "differs":
                print(rest, flush=True)
            doing = rest if word == "case" else doing
        if part.wait():
            faults += 1
            print(f"ended by signal {-part.returncode} in {doing}", flush=True)
    seconds = time.perf_counter() - started
    what = "guarded calls" if options.guarded else "calls"
    verdict = "faults" if options.guarded else "differ"
    print(f"{made} {what}, {faults} {verdict}, {seconds:.0f} s")
    sys.exit(faults > 0)


def work(options: argparse.Namespace) -> None:
    """Make this process's share of the calls, one line before and one after each."""
    warnings.simplefilter("ignore")
    generator = np.random.default_rng([options.seed, options.part])
    chosen = fusedcases.kinds(generator, options.kinds // options.workers)
    share = range(options.part, options.count, options.workers)
    memory = fusedcases.Guarded if options.guarded else None
    for _ in share:
        case = None
        while case is None:
            case = fusedcases.draw(chosen[generator.integers(len(chosen))], generator)
        print("case", case, flush=options.guarded)
        try:
            fusedcases.check(case, memory)
        except Exception as error:
            print("differs", type(error).__name__, str(error).replace("\n", " "), case)
        print("done")


if __name__ == "__main__":
    main()
