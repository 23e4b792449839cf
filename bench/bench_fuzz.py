"""Damaged files of every kind that is read: headers, shards, indexes, recipes, configs.

Usage: python bench/bench_fuzz.py [--count 100000] [--seed 0] [--write]

Each file is a good one with bytes or values changed. It must be read or refused by a
CorequantError, within two seconds and 512 MiB more than the process has; anything else ends the
program with the file that did it. ``--write`` puts the table into bench/README.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from markdown import write_section

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fuzzing import SECONDS, fuzz, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    # Transformers tells of every key that it doesn't know.
    logging.disable(logging.WARNING)
    rows = [
        "| file | damaged | read | refused | slowest, ms | a second |",
        "|---|---|---|---|---|---|",
    ]
    total = 0
    with tempfile.TemporaryDirectory() as name:
        for target in targets(Path(name)):
            count = options.count * target.share // 100
            found = fuzz(target, count, options.seed)
            total += count
            rows.append(
                f"| {target.name} | {count} | {found.read} | {found.refused} | "
                f"{1000 * found.slowest:.0f} |"
            )
            print(rows[-1], flush=True)
    body = [
        "## Damaged files",
        "",
        f"Written by `bench_fuzz.py`, seed {options.seed}: {total} files, each read or refused by "
        f"a CorequantError, none of them taking {SECONDS:.0f} s of processor time or 512 MiB.",
        "",
        *rows,
    ]
    if options.write:
        write_section("fuzz", "\n".join(body))


if __name__ == "__main__":
    main()
