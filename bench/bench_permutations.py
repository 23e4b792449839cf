"""Rounding error behind a block rotation, by permutation and block size, on tokens held out.

Usage: python bench/bench_permutations.py --model M --calibration valid.txt --text test.txt --json F

The error is the mean over tokens of the relative squared error of the rotated input of each
``down_proj``, rounded to INT4 asymmetric per token; a figure is the geometric mean over layers of
its ratio to the error behind the full-vector rotation. 4096 tokens calibrate, of which 512 only
judge candidates; 4096 others measure. Scales trade the input's error against the rounded weight's,
so there is a second table of the error of the layer's output with both rounded. Every finished
layer is added to the JSON file; a later run goes on from there. ``--write`` puts the tables into
bench/README.md.
"""

from __future__ import annotations

import json
import time

import numpy as np
import torch
from markdown import write_section
from options import parser_for

import corequant as cq
import corequant_transformers as cqhf
from corequant.selection import make_permutation, rotation_error, select_scales

ACTIVATIONS = "int4:token:asymmetric"
WEIGHTS = "int4:channel:symmetric:mse"
SIZES = (16, 32, 64, 128)
JUDGES = 512
SEVEN = (0, 3, 8, 15, 22, 27, 29)
"""Layers of the measurements that there are for other implementations."""
CANDIDATES = {
    "identity": "identity",
    "random": "random",
    "zigzag": "zigzag",
    "MassDiff": "massdiff",
    "energy, first order": "energy",
    "second order, refined": "energydiff",
    "range search": "rangediff",
}


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


def output_error(x, exact, W, b, permutation, factors=1.0):
    """Return the relative squared error of the layer's output with both sides rounded."""
    z = cq.block_hadamard((x[:, permutation] * factors).astype(np.float32), b)
    rotated = cq.block_hadamard((W[:, permutation] / factors).astype(np.float32), b)
    y = cq.fake_quantize(z, ACTIVATIONS) @ cq.dequantize(cq.round_to_nearest(rotated, WEIGHTS)).T
    return float(np.square(y - exact).sum(dtype=np.float64) / np.square(exact).sum())


def layer_errors(stats, judge, test, W, b, references):
    """Return error ratios to the full rotation by method: of the input, and of the output."""
    full, exact, full_output = references
    made = {name: make_permutation(m, stats, b, seed=0) for name, m in CANDIDATES.items()}
    fit = [name for name in CANDIDATES if name != "random"]
    judged = {n: rotation_error(judge, b, ACTIVATIONS, permutation=made[n]) for n in fit}
    chosen = min(judged, key=lambda n: judged[n])
    made["auto"] = p = made[chosen]
    made["second order"] = cq.energydiff(stats.energy_gram, b, refine=0)

    def error(permutation, factors=None):
        found = rotation_error(test, b, ACTIVATIONS, permutation=permutation, factors=factors)
        return found / full

    errors = {name: error(permutation) for name, permutation in made.items()}
    refined = made["second order, refined"]
    signs = cq.sign_descent(stats.tokens[:JUDGES, refined], b)
    errors["refined, with signs"] = error(refined, signs)
    signs = cq.sign_descent(stats.tokens[:JUDGES, p], b)
    errors["auto, with signs"] = error(p, signs)
    tokens, weight = stats.tokens[:JUDGES, p], W[:, p]
    given = (tokens, judge[:, p], weight, b, ACTIVATIONS, WEIGHTS)
    energy = stats.mean_square[p]
    factors, _ = select_scales(*given, mean_square=energy)
    scales, _ = select_scales(*given, mean_square=energy, signs=False)
    errors["auto, with scales"] = error(p, scales)
    errors["auto, with signs and scales"] = error(p, factors)
    outputs = {
        "identity": (made["identity"], 1.0),
        "MassDiff": (made["MassDiff"], 1.0),
        "second order, refined": (refined, 1.0),
        "auto": (p, 1.0),
        "auto, with signs": (p, signs),
        "auto, with scales": (p, scales),
        "auto, with signs and scales": (p, factors),
    }
    ratios = {n: output_error(test, exact, W, b, *v) / full_output for n, v in outputs.items()}
    return {"input": errors, "output": ratios, "chosen": chosen}


def measure(seen, test, W, layer):
    """Return a layer's record for every block size."""
    statistics = cq.ActivationStats(seen.shape[1], energy_gram=True, reservoir=1024)
    stats, judge = statistics.update(seen[:-JUDGES]), seen[-JUDGES:]
    exact = test @ W.T
    whole = np.arange(W.shape[1])
    full_output = output_error(test, exact, W, None, whole)
    references = (rotation_error(test, None, ACTIVATIONS), exact, full_output)
    found = {str(b): layer_errors(stats, judge, test, W, b, references) for b in SIZES}
    return {"layer": layer, "sizes": found}


ROWS = {
    "input": (
        *("identity", "random", "zigzag", "MassDiff", "energy, first order", "second order"),
        *("second order, refined", "refined, with signs", "range search", "auto"),
        *("auto, with signs", "auto, with scales", "auto, with signs and scales"),
    ),
    "output": (
        *("identity", "MassDiff", "second order, refined", "auto", "auto, with signs"),
        *("auto, with scales", "auto, with signs and scales"),
    ),
}


def table(records, kind, layers=None):
    """Return a Markdown table of geometric means over layers."""
    used = [r for r in records if layers is None or r["layer"] in layers]
    lines = ["| permutation | " + " | ".join(f"b={b}" for b in SIZES) + " |"]
    lines.append("|" + "---|" * (1 + len(SIZES)))
    for name in ROWS[kind]:
        values = [[r["sizes"][str(b)][kind][name] for r in used] for b in SIZES]
        means = [float(np.exp(np.log(v).mean())) for v in values]
        lines.append(f"| {name} | " + " | ".join(f"{m:.3f}" for m in means) + " |")
    return "\n".join(lines)


def report(records) -> str:
    """Return the section of bench/README.md."""
    ratios = [
        r["sizes"][str(b)]["input"]["auto"] / r["sizes"][str(b)]["input"]["MassDiff"]
        for r in records
        for b in SIZES
    ]
    counts = {}
    for r in records:
        for b in SIZES:
            name = r["sizes"][str(b)]["chosen"]
            counts[name] = counts.get(name, 0) + 1
    picked = ", ".join(f"{n} {c}" for n, c in sorted(counts.items(), key=lambda t: -t[1]))
    known = [layer for layer in SEVEN if any(r["layer"] == layer for r in records)]
    return "\n\n".join(
        [
            "## Permutations",
            "Written by `bench_permutations.py`: SmolLM2-135M-Instruct, WikiText-2, 4096 tokens of "
            "the validation split to calibrate, 4096 of the test split to measure. Geometric means "
            "over layers, relative to the full-vector rotation; below 1 the blocks are better.",
            f"### Input of `down_proj`, INT4 asymmetric per token, {len(records)} layers",
            table(records, "input"),
            f"Auto's worst layer has {max(ratios):.3f} times MassDiff's error, its best "
            f"{min(ratios):.3f} times. Chosen: {picked}.",
            f"### The same, layers {', '.join(map(str, known))}",
            table(records, "input", known),
            "### Output of `down_proj`, its weight rounded to INT4 by channel too",
            table(records, "output"),
        ]
    )


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--minutes", default=1e9, type=float, help="start no layer after that")
    o = parser.parse_args()
    started = time.monotonic()
    records = json.loads(o.json.read_text(encoding="utf-8")) if o.json.exists() else []
    source = cqhf.Source(o.model)
    done = {r["layer"] for r in records}
    layers = range(source.config().num_hidden_layers)
    # The layers that others measured come first.
    wanted = [i for i in sorted(layers, key=lambda i: (i not in SEVEN, i)) if i not in done]
    if wanted and o.minutes > 0:
        model, tokenizer = source.load(), source.tokenizer()
        seen, test = (
            inputs(model, cqhf.token_windows(f.read_text(encoding="utf-8"), tokenizer, 2048, 2))
            for f in (o.calibration, o.text)
        )
    for i in wanted:
        if time.monotonic() - started > 60 * o.minutes:
            break
        begun = time.monotonic()
        W = model.model.layers[i].mlp.down_proj.weight.numpy()
        records.append(measure(seen[i], test[i], W, i))
        o.json.write_text(json.dumps(records, indent=1), encoding="utf-8")
        print(i, round(time.monotonic() - begun, 1), flush=True)
    records.sort(key=lambda r: r["layer"])
    print(report(records))
    if o.write:
        write_section("permutations", report(records))


if __name__ == "__main__":
    main()
