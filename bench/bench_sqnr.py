"""Signal to quantization noise and bits per weight of every format and scale rule on real weights.

Usage: python bench/bench_sqnr.py --model M [--layers 30] [--json out.json] [--write]

The ratio is Σw² / Σ(w - ŵ)² over all linear layers of the chosen blocks, in dB. Rows that are in
the JSON file already are not measured again; ``--write`` puts the table into bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from markdown import write_section

import corequant as cq
import corequant_transformers as cqhf

RULES = [
    *(
        f"int{bits}:{group}:{search}"
        for bits in (2, 3, 4, 8)
        for group in ("channel", "group64", "group32:float16")
        for search in ("absmax", "percentile99.9", "mse", "exact")
        if bits < 8 or search != "exact"
    ),
    *(f"int{bits}:group64:asymmetric:{s}" for bits in (2, 3, 4) for s in ("absmax", "mse", "hqo")),
    *(f"e{e}m{b - 1 - e}:group64" for b in range(3, 9) for e in range(1, b)),
    *(f"{name}:group64:{s}" for name in ("e2m1", "nf4") for s in ("mse", "exact")),
    "nf4:group64",
    *(
        f"{name}{mode}"
        for name in cq.presets
        if name.startswith("mx")
        for mode in ("", ":ceil", ":even", ":search")
    ),
    *(f"nvfp4{mode}" for mode in ("", ":search", ":four_over_six")),
]


Row = tuple[str, float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--layers", default=30, type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="write the table to bench/README.md")
    options = parser.parse_args()
    rows: list[Row] = []
    if options.json and options.json.exists():
        rows = [tuple(row) for row in json.loads(options.json.read_text(encoding="utf-8"))]
    known = {row[0] for row in rows}
    wanted = [text for text in RULES if text not in known]
    weights = read(options.model, options.layers) if wanted else []
    for text in wanted:
        rows.append(measure(text, weights))
        print(f"{text:40s} {rows[-1][1]:8.3f} bits {rows[-1][2]:8.2f} dB", flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    rows.sort(key=lambda row: RULES.index(row[0]))
    if options.write:
        caption = _CAPTION.format(layers=options.layers)
        write_section("sqnr", f"## Formats and scale rules\n\n{caption}\n\n{table(rows)}\n")


def measure(text: str, weights: list[np.ndarray]) -> Row:
    """Return the spec, its bits per weight and its ratio over all weights."""
    spec = cq.QuantSpec.parse(text)
    energy, noise, bits = 0.0, 0.0, 0.0
    for w in weights:
        quantized = cq.quantize(w, spec)
        energy += np.square(w, dtype=np.float64).sum()
        noise += np.square(w.astype(np.float64) - cq.dequantize(quantized)).sum()
        bits += w.size * spec.format.bits + quantized.scales.size * spec.scale_bits
        if quantized.zero_points is not None:
            bits += quantized.zero_points.size * spec.format.bits
        bits += 0 if quantized.global_scale is None else 32
    return text, bits / sum(w.size for w in weights), 10 * math.log10(energy / noise)


_CAPTION = """Written by `bench_sqnr.py`: signal to quantization noise Σw² / Σ(w - ŵ)² over all
linear layers of {layers} blocks of SmolLM2-135M-Instruct, in dB, and bits per weight with scales
and zero points. Formats without a scale rule in their name take the largest magnitude; MX formats
round its exponent down."""


def table(rows: list[Row]) -> str:
    lines = ["| spec | bits per weight | SQNR, dB |", "|---|---|---|"]
    lines += [f"| `{text}` | {bits:.3f} | {ratio:.2f} |" for text, bits, ratio in rows]
    return "\n".join(lines)


def read(path: Path, layers: int) -> list[np.ndarray]:
    model = cqhf.Source(path).load()
    return [
        module.weight.detach().float().numpy()
        for block in model.model.layers[:layers]
        for module in block.modules()
        if type(module).__name__ == "Linear"
    ]


if __name__ == "__main__":
    main()
