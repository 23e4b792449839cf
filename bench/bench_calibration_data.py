"""What a model loses with the text of the package as calibration data, and with other data.

Usage: python bench/bench_calibration_data.py --model M --data valid.txt --text test.txt
           [--data FILES ...] [--preset w4a16] [--sampling random] [--windows 10]

Prints a row for each: perplexity and Kullback-Leibler divergence from the float model on
``--text``, with their standard errors.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import corequant_transformers as cqhf
from corequant.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path, action="append")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--preset", default="w4a16")
    parser.add_argument("--sampling", default="consecutive")
    parser.add_argument("--windows", default=10, type=int)
    options = parser.parse_args()

    source = cqhf.Source(options.model)
    tokenizer, model = source.tokenizer(), source.load()
    recipe = replace(Recipe.preset(options.preset), sampling=options.sampling)
    tokens = cqhf.sample_windows(
        cqhf.read_documents(options.text), tokenizer, 2048, options.windows
    ).tokens
    for data in (None, *options.data):
        started = time.monotonic()
        made = cqhf.quantize(model, recipe, data, tokenizer=tokenizer)
        seconds = time.monotonic() - started
        found = cqhf.evaluate(made.model, tokens, against=model).to_dict()
        print(
            f"{'text of the package' if data is None else data.name}: perplexity "
            f"{found['perplexity']:.3f} ± {found['perplexity_se']:.3f} (float "
            f"{found['reference_perplexity']:.3f}), KL {found['kl']:.4f} ± {found['kl_se']:.4f}, "
            f"{seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
