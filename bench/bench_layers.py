"""Whether the layers that ``inspect`` names are those to keep: against layers drawn at random.

Usage: python bench/bench_layers.py --model M --calibration valid.txt --text test.txt
       [--blocks 6] [--preset w4a16] [--rounding qronos] [--keep 3] [--draws 20] [--seed 0]

The first blocks of the model, with its embedding and head, are the float model; 0 takes all. It is
quantized by the preset, ``layer_errors`` names the layers on windows of the calibration text that
did not calibrate, and the model is quantized again with those in float, then with as many that are
drawn at random, each time from the beginning. Every result is measured on the test text, by its KL
divergence from the float model. A line for each, then a JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import corequant_transformers as cqhf
from corequant.recipe import Recipe

SAMPLES, LENGTH = 2, 256
TESTED = 4
INSPECTED, SHORT = 2, 256


def cut(model: Any, blocks: int) -> Any:
    """Leave the first blocks of a model, in place."""
    if blocks:
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:blocks]
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="a directory or a GGUF file")
    parser.add_argument("--calibration", required=True, type=Path, help="text to calibrate on")
    parser.add_argument("--text", required=True, type=Path, help="text to measure KL on")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--preset", default="w4a16")
    parser.add_argument("--rounding", help="method in place of the preset's")
    parser.add_argument("--keep", type=int, default=3)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source = cqhf.Source(options.model)
    tokenizer, model = source.tokenizer(), cut(source.load(), options.blocks)
    first = SAMPLES * LENGTH // SHORT
    text = options.calibration.read_text(encoding="utf-8")
    calibration = cqhf.token_windows(text, tokenizer, LENGTH, SAMPLES)
    inspected = cqhf.token_windows(text, tokenizer, SHORT, first + INSPECTED)[first:]
    tested = cqhf.token_windows(options.text.read_text(encoding="utf-8"), tokenizer, LENGTH, TESTED)
    recipe = Recipe.preset(options.preset)
    if options.rounding:
        recipe = replace(recipe, rounding=options.rounding)
    started = time.monotonic()

    def kept(names: tuple[str, ...]) -> tuple[Any, float]:
        result = cqhf.quantize(model, replace(recipe, keep=(*recipe.keep, *names)), calibration)
        divergence = cqhf.evaluate(result.model, tested, against=model).divergence
        assert divergence is not None
        seconds = time.monotonic() - started
        print(f"{seconds:5.0f} s  KL {divergence.kl:.5f}  {', '.join(names) or 'all quantized'}")
        return result, divergence.kl

    result, whole = kept(())
    found = cqhf.layer_errors(result, model, inspected, keep=options.keep)
    _, named = kept(found.worth_keeping)
    names = [layer.name for layer in found.layers]
    generator = np.random.default_rng(options.seed)
    drawn = []
    for _ in range(options.draws):
        chosen = sorted(generator.choice(len(names), options.keep, replace=False))
        drawn.append(kept(tuple(names[k] for k in chosen))[1])
    print(
        json.dumps(
            {
                "preset": options.preset,
                "rounding": recipe.rounding,
                "blocks": options.blocks,
                "quantized": whole,
                "named": list(found.worth_keeping),
                "named_kl": named,
                "exchanged_kl": found.kl_kept,
                "inspected_kl": found.kl,
                "drawn_least": min(drawn),
                "drawn_mean": float(np.mean(drawn)),
                "better_than": sum(named < kl for kl in drawn),
                "draws": options.draws,
                "seconds": round(time.monotonic() - started),
            }
        )
    )


if __name__ == "__main__":
    main()
