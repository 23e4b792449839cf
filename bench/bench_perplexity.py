"""Perplexity of INT4 weights and activations, rounded to nearest, by block size and permutation.

Usage: python bench/bench_perplexity.py --model M --calibration valid.txt --text test.txt

Prints one row per variant, with the recovery (perplexity of the full-vector rotation divided by the
variant's) and, for WikiText-2 on SmolLM2-135M-Instruct, what brevitas 0.13.4 measured with the same
settings on the same tokens. With ``--fit-scales`` the weights' scales are chosen for the layers'
outputs instead of the weights themselves; brevitas has no such choice.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

import corequant_transformers as cqhf
from corequant.recipe import Recipe

VARIANTS = [
    (None, "identity"),
    (16, "identity"),
    (16, "massdiff"),
    (32, "identity"),
    (32, "massdiff"),
    (128, "identity"),
]
BREVITAS = {
    ("float", ""): 17.79,
    (None, "identity"): 61.3,
    (16, "identity"): 210.2,
    (16, "massdiff"): 77.1,
    (32, "identity"): 129.0,
    (32, "massdiff"): 62.2,
    (128, "identity"): 71.3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--windows", default=10, type=int)
    parser.add_argument("--samples", default=8, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--sign-trials", default=1, type=int)
    parser.add_argument("--fit-scales", action="store_true", help="to each layer's outputs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    source = cqhf.Source(options.model)
    tokenizer, model = source.tokenizer(), source.load()
    text = options.text.read_text(encoding="utf-8")
    tokens = cqhf.token_windows(text, tokenizer, 2048, options.windows)
    recipe = Recipe(
        samples=options.samples,
        seed=options.seed,
        sign_trials=options.sign_trials,
        fit_scales=options.fit_scales,
    )
    data = cqhf.calibrate(model, recipe, options.calibration.read_text(encoding="utf-8"), tokenizer)
    print("signs: draw", data.draw, "of", [round(x, 3) for x in data.draw_losses], flush=True)
    results = {("float", ""): (cqhf.evaluate(model, tokens).perplexity, 0.0)}
    for block_size, permutation in VARIANTS:
        started = time.monotonic()
        variant = replace(recipe, block_size=block_size, permutation=permutation)
        made = cqhf.quantize(model, variant, data)
        quantized = time.monotonic() - started
        perplexity = cqhf.evaluate(made.model, tokens).perplexity
        results[block_size, permutation] = (perplexity, quantized)
        print(block_size, permutation, round(perplexity, 2), flush=True)

    full = results[None, "identity"][0]
    table = Table("block", "permutation", "perplexity", "recovery", "brevitas 0.13.4", "ratio", "s")
    for key, (perplexity, seconds) in results.items():
        block = "full" if key[0] is None else str(key[0])
        table.add_row(
            block,
            key[1],
            f"{perplexity:.2f}",
            f"{full / perplexity:.3f}",
            f"{BREVITAS[key]:.2f}",
            f"{perplexity / BREVITAS[key]:.3f}",
            f"{seconds:.0f}",
        )
    Console().print(table)
    if options.json:
        options.json.write_text(
            json.dumps([[*map(str, k), *v] for k, v in results.items()]), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
