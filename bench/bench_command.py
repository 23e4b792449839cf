"""How long the command and the adapter take to start: medians of fresh processes.

Usage: python bench/bench_command.py [--rounds 5] [--write]

Pinned to one processor where that is possible. Each command has run once before, so that code is
compiled and files are cached; what it took beyond ``import torch`` is the difference of medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from markdown import write_section
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import corequant_transformers as cqhf

WORDS = "abcdefghijklmnop"
COMMAND = (sys.executable, "-c", "from corequant.cli import main; main()")
TORCH = "import torch"


def seconds(command: tuple[str, ...], folder: Path) -> float:
    """Return how long a fresh process takes, with what earlier ones wrote removed."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    # What is installed has been compiled to bytecode; a working tree is by the first process.
    given = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=given, check=True, capture_output=True)
    return time.perf_counter() - started


def write_model(folder: Path) -> None:
    """Write a model of two small blocks, its tokenizer of single letters, and a text."""
    cqhf.tiny_model("llama").save_pretrained(folder / "model")
    known = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=known).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(" ".join(WORDS) * 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table to bench/README.md")
    o = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    # Groups of the default preset don't divide the model's 48 channels.
    small = ("--samples", "1", "--sequence-length", "16", "--block-size", "16")
    small += ("--weights", "int4:channel")
    quantize = ("quantize", "model", "-o", "out", "--calibration", "text.txt", *small)
    rows = {
        "`import numpy`": (sys.executable, "-c", "import numpy"),
        "`import corequant`": (sys.executable, "-c", "import corequant"),
        "`corequant --version`": (*COMMAND, "--version"),
        "`corequant --help`": (*COMMAND, "--help"),
        "`import torch`": (sys.executable, "-c", TORCH),
        "`import torch, corequant_transformers`": (
            *(sys.executable, "-c"),
            f"{TORCH}, corequant_transformers",
        ),
        "the same, with `transformers.AutoModelForCausalLM`": (
            *(sys.executable, "-c"),
            f"{TORCH}, corequant_transformers, transformers; transformers.AutoModelForCausalLM",
        ),
        "`import torch`, `transformers.LlamaForCausalLM`, nothing of corequant": (
            *(sys.executable, "-c"),
            f"{TORCH}, transformers; transformers.LlamaForCausalLM",
        ),
        "`corequant quantize`, two small blocks, 16 tokens": (*COMMAND, *quantize),
    }
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name))
        for command in rows.values():
            seconds(command, Path(name))
        taken: dict[str, list[float]] = {row: [] for row in rows}
        for _ in range(o.rounds):
            for row, command in rows.items():
                taken[row].append(seconds(command, Path(name)))
    packages = ", ".join(f"{p} {version(p)}" for p in ("numpy", "torch", "transformers"))
    lines = [
        "## Starting",
        "",
        f"Written by `bench_command.py`: medians of {o.rounds} fresh processes on one processor; "
        f"Python {platform.python_version()}, {packages}.",
        "",
        "| what | seconds |",
        "|---|---|",
        *(f"| {row} | {statistics.median(times):.2f} |" for row, times in taken.items()),
    ]
    print("\n".join(lines))
    if o.write:
        write_section("command", "\n".join(lines))


if __name__ == "__main__":
    main()
