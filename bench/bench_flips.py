"""Single-bit flips in what was written: a saved directory, an export of it, a GGUF file.

Usage: python bench/bench_flips.py [--count 2000] [--seed 0] [--write]

A bit of a file that is drawn at random is flipped, and whatever was written is loaded. It must be
refused by a CorequantError, unless the file is JSON that says the same or the bit is in the digest
of the model card, which no reader opens; anything else ends the program with the bit that did it.
``--write`` puts the table into bench/README.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from markdown import write_section

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.flipping import flip, outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = ["| written | files | flips | noticed | harmless |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        for kind, path, read in outputs(Path(name)):
            found = flip(path, read, options.count, options.seed)
            rows.append(
                f"| {kind} | {len(found.files)} | {options.count} | {found.noticed} | "
                f"{found.harmless} |"
            )
            print(rows[-1], found.files, flush=True)
    body = [
        "## Flipped bits",
        "",
        f"Written by `bench_flips.py`, seed {options.seed}: each is refused by a CorequantError "
        "when the directory or file is loaded, or is in JSON that says the same, or in the digest "
        "of the model card, which no reader opens.",
        "",
        *rows,
    ]
    if options.write:
        write_section("flips", "\n".join(body))


if __name__ == "__main__":
    main()
