"""Perplexity of SmolLM2 by rounding method: block sizes, formats, accumulators, weights alone.

Usage: python bench/bench_rounding.py --model M --calibration valid.txt --text test.txt --json FILE

Each finished cell is appended to FILE, and cells that are there already are not run again, so that
the script can be stopped and started. With --minutes it starts no cell after that time. Cells come
in the order of their importance.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import corequant_transformers as cqhf
from corequant.recipe import Recipe

BREVITAS = {
    ("int4", "full", "identity", "qronos"): 26.4,
    ("int4", "32", "identity", "qronos"): 42.3,
    ("int4", "32", "massdiff", "qronos"): 27.4,
    ("int4", "16", "massdiff", "qronos"): 28.6,
}
"""What brevitas 0.13.4 measured with the same settings on the same tokens."""

FORMATS = {
    "int4": ("int4:channel:symmetric", "int4:token:asymmetric"),
    "fp4": ("float4_e2m1fn:channel", "float4_e2m1fn:token"),
    "mxfp4": ("mxfp4", "mxfp4"),
}


def cells():
    """Yield (table, labels, fields of the recipe), the most important first."""
    four = [(None, "identity"), (16, "massdiff"), (32, "massdiff"), (32, "identity")]

    def one(name, block, permutation, rounding, **more):
        weights, activations = FORMATS[name]
        size = "full" if block is None else str(block)
        fields = {
            "block_size": block,
            "permutation": permutation,
            "rounding": rounding,
            "weights": weights,
            "activations": activations,
            **more,
        }
        return "formats", (name, size, permutation, rounding), fields

    for block, permutation in four:
        yield one("int4", block, permutation, "qronos")
    for block in (16, 32):
        yield one("int4", block, "auto", "qronos")
    yield one("int4", 16, "energydiff", "qronos")
    for rounding in ("nearest", "gptq", "gpfq"):
        for block, permutation in four[:3]:
            yield one("int4", block, permutation, rounding)
    yield from accumulators()
    yield from weights_only()
    for name in ("fp4", "mxfp4"):
        for rounding in ("qronos", "nearest", "gptq", "gpfq"):
            for block, permutation in four[:3]:
                yield one(name, block, permutation, rounding)
    for rounding in ("qronos", "nearest", "gptq", "gpfq"):
        yield one("int4", 128, "massdiff", rounding)
        yield one("int4", 32, "identity", rounding)


def accumulators():
    """Accumulator widths of every method that respects them."""
    base = {"block_size": 32, "permutation": "massdiff"}
    for activations, widths in (
        ("int8:token:asymmetric", ("128x16", "128x20")),
        ("int4:token:asymmetric", ("128x16", "32x14", "128x12")),
    ):
        for rounding in ("qronos", "gptq", "gpfq"):
            for width in widths:
                fields = {**base, "activations": activations, "rounding": rounding}
                label = "W4A" + activations[3]
                yield "accumulators", (label, width, rounding), {**fields, "accumulator": width}


def weights_only():
    """Weights of 2 to 4 bits, activations in float."""
    base = {"activations": "none", "permutation": "identity"}
    for bits in (3, 2, 4):
        for rounding in ("nearest", "gptq", "gpfq", "qronos", "learned"):
            for magr in (0.0, 0.01):
                if magr and rounding == "nearest":
                    continue
                fields = {**base, "weights": f"int{bits}:channel:symmetric", "rounding": rounding}
                if rounding == "learned":
                    fields["steps"] = 100
                label = rounding + (" + MagR" if magr else "")
                yield "weights alone", (f"int{bits}", label), {**fields, "magr": magr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--windows", default=10, type=int)
    parser.add_argument("--samples", default=8, type=int)
    parser.add_argument("--minutes", default=1e9, type=float)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--only", help="run cells whose labels contain this")
    options = parser.parse_args()

    started = time.monotonic()
    source = cqhf.Source(options.model)
    tokenizer, model = source.tokenizer(), source.load()
    tokens = cqhf.token_windows(
        options.text.read_text(encoding="utf-8"), tokenizer, 2048, options.windows
    )
    text = options.calibration.read_text(encoding="utf-8")
    calibrations = {}
    for table, labels, fields in cells():
        done = read(options.json)
        key = [table, *labels, options.seed, options.samples, options.windows]
        if key in [cell["key"] for cell in done] or (options.only and options.only not in str(key)):
            continue
        if time.monotonic() - started > 60 * options.minutes:
            break
        recipe = Recipe(samples=options.samples, seed=options.seed, **fields)
        kind = "tokens" if recipe.permutation in ("auto", "energydiff") else "means"
        if kind not in calibrations:
            calibrations.clear()
            calibrations[kind] = cqhf.calibrate(model, recipe, text, tokenizer)
        begun = time.monotonic()
        made = cqhf.quantize(model, recipe, calibrations[kind])
        quantized = time.monotonic() - begun
        perplexity = cqhf.evaluate(made.model, tokens).perplexity
        rows = made.report["matrices"]
        cell = {
            "key": key,
            "perplexity": perplexity,
            "seconds": round(quantized, 1),
            "solving": round(sum(row.get("seconds", 0) for row in rows), 1),
            "evaluating": round(time.monotonic() - begun - quantized, 1),
            "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        print(cell, flush=True)
        del made


def read(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
