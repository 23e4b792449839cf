"""Rounding error behind a block rotation, by permutation and block size, on tokens held out.

Usage: python bench/bench_permutations.py --model M --calibration valid.txt --text test.txt

The error is the mean over tokens of the relative squared error of the rotated input of each
``down_proj``, rounded to INT4 asymmetric per token; a figure is the geometric mean over all layers
of its ratio to the error behind the full-vector rotation. 4096 tokens calibrate, 4096 others judge.
For the last two rows, which trade against the rounded weight, it is the layer's output error.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import corequant as cq
import corequant_transformers as cqhf
from corequant.selection import rotation_error, select_permutation, select_scales

ACTIVATIONS = "int4:token:asymmetric"
WEIGHTS = "int4:channel:symmetric:mse"
SIZES = (16, 32, 64, 128)


def inputs(model, tokens):
    """Return what every down_proj reads, by layer."""
    seen: dict[int, list[np.ndarray]] = {}
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, i=i: seen.setdefault(i, []).append(args[0].flatten(0, 1).numpy())
        )
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for window in tokens:
            model.model(torch.from_numpy(window)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {i: np.concatenate(parts) for i, parts in seen.items()}


def output_error(x, W, b, permutation, factors=None):
    """Return the relative squared error of the layer's output with both sides rounded."""
    factors = np.ones(len(permutation)) if factors is None else factors
    x, W = x[:, permutation], W[:, permutation]
    z = cq.fake_quantize(cq.block_hadamard((x * factors).astype(np.float32), b), ACTIVATIONS)
    rotated = cq.block_hadamard((W / factors).astype(np.float32), b)
    y = z @ cq.dequantize(cq.round_to_nearest(rotated, WEIGHTS)).T
    exact = x @ W.T
    return float(np.square(y - exact).sum(dtype=np.float64) / np.square(exact).sum())


def layer_errors(stats, test, W, b):
    """Return error ratios to the full rotation by method."""
    full = rotation_error(test, None, ACTIVATIONS)
    whole = np.arange(stats.d)
    half = len(stats.tokens) // 2
    auto = select_permutation(stats, stats.tokens[half:], b, ACTIVATIONS)
    second = cq.energydiff(stats.energy_gram, b)
    permutations = {
        "identity": whole,
        "random": cq.random_permutation(stats.d, 0),
        "zigzag": cq.zigzag(stats.absmax, b),
        "MassDiff": cq.massdiff(stats.mean_abs, b),
        "energy, first order": cq.massdiff(stats.mean_energy, b),
        "second order": cq.energydiff(stats.energy_gram, b, refine=0),
        "second order, refined": second,
        "auto": auto.permutation,
    }
    errors = {
        name: rotation_error(test, b, ACTIVATIONS, permutation=p) / full
        for name, p in permutations.items()
    }
    signs = cq.sign_descent(stats.tokens[:half][:, second], b)
    found = rotation_error(test, b, ACTIVATIONS, permutation=second, factors=signs)
    errors["refined, with signs"] = found / full
    p = auto.permutation
    factors, _ = select_scales(
        stats.tokens[:half, p], stats.tokens[half:, p], W[:, p], b, ACTIVATIONS, WEIGHTS
    )
    reference = output_error(test, W, None, whole)
    errors["output: MassDiff"] = output_error(test, W, b, permutations["MassDiff"]) / reference
    errors["output: auto, signs, scales"] = output_error(test, W, b, p, factors) / reference
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    o = parser.parse_args()
    source = cqhf.Source(o.model)
    model, tokenizer = source.load(), source.tokenizer()
    seen, test = (
        inputs(model, cqhf.token_windows(f.read_text(encoding="utf-8"), tokenizer, 2048, 2))
        for f in (o.calibration, o.text)
    )
    table = Table("permutation", *(f"b={b}" for b in SIZES))
    rows: dict[str, list[float]] = {}
    worst = 0.0
    for b in SIZES:
        ratios: dict[str, list[float]] = {}
        for i, x in seen.items():
            stats = cq.ActivationStats(x.shape[1], energy_gram=True, reservoir=1024).update(x)
            W = model.model.layers[i].mlp.down_proj.weight.numpy()
            for name, value in layer_errors(stats, test[i], W, b).items():
                ratios.setdefault(name, []).append(value)
        for name, values in ratios.items():
            rows.setdefault(name, []).append(float(np.exp(np.log(values).mean())))
        worst = max(worst, *(np.array(ratios["auto"]) / np.array(ratios["MassDiff"])))
    for name, values in rows.items():
        table.add_row(name, *(f"{v:.3f}" for v in values))
    Console().print(table)
    print(f"auto's worst layer against MassDiff: {worst:.3f} times its error")


if __name__ == "__main__":
    main()
