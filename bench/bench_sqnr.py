"""Signal to quantization noise and bits per weight of every format and scale rule on real weights.

Usage: python bench/bench_sqnr.py --model M [--layers 30] [--json out.json]

The ratio is Σw² / Σ(w - ŵ)² over all linear layers of the chosen blocks, in dB.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import corequant_transformers as cqhf
import numpy as np

import corequant as cq

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--layers", default=30, type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    weights = read(options.model, options.layers)
    energy = sum(np.square(w, dtype=np.float64).sum() for w in weights)
    rows = []
    for text in RULES:
        spec = cq.QuantSpec.parse(text)
        noise, bits = 0.0, 0.0
        for w in weights:
            quantized = cq.quantize(w, spec)
            noise += np.square(w.astype(np.float64) - cq.dequantize(quantized)).sum()
            bits += w.size * spec.format.bits + quantized.scales.size * spec.scale_bits
            if quantized.zero_points is not None:
                bits += quantized.zero_points.size * spec.format.bits
            bits += 0 if quantized.global_scale is None else 32
        ratio = 10 * math.log10(energy / noise)
        rows.append((text, bits / sum(w.size for w in weights), ratio))
        print(f"{text:40s} {rows[-1][1]:8.3f} bits {ratio:8.2f} dB", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


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
