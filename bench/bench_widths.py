"""Widths within a budget against one width for all layers, on the same tokens.

Usage: python bench/bench_widths.py --model M --calibration valid.txt --text test.txt --json J
       [--windows N] [--length N]

M is SmolLM2-135M-Instruct as GGUF, or a Transformers directory. Its weights are rotated, since
those of a GGUF file lie on a grid of their own, and rounded to nearest with scales from the largest
magnitude of 64 weights, in bfloat16, so that the choice alone tells the cells apart. Gradients are
those of all layers at once; ``corequant quantize --bits`` takes them a block at a time. Each cell
is the bits of a weight with its scales, perplexity, and KL(float || quantized) in nats per token.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from options import parser_for

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant.rounding import expected_losses
from corequant.storage.arrays import stored_bytes
from corequant_torch.device.onednn import QuickForward
from corequant_transformers.inspection.matching import transformed
from corequant_transformers.planning.widths import Shares
from corequant_transformers.transforms.matrices import Choices

BASE: dict[str, Any] = {
    "weights": "int4:group64:symmetric:absmax:bfloat16",
    "activations": "none",
    "permutation": "identity",
}
EQUAL = (4, 3, 5)
BETWEEN = (3, 3.5, 3.75, 4, 4.5, 4.75, 5, 6.25, 7)


class Bench:
    """A float model, the same rotated, and what each width of each layer costs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.file = options.json
        self.cells = json.loads(self.file.read_text()) if self.file.exists() else {}
        source = cqhf.Source(options.model)
        model, tokenizer = source.load(), source.tokenizer()
        files = (options.calibration, options.text)
        self.calibration, self.test = (
            windows(tokenizer, file, options.windows, options.length) for file in files
        )
        self.table = cqhf.plan(model, Recipe(**BASE, bits=4))
        self.shares = self.shares_of(4)
        signs = self.table.draw_signs()
        self.net = transformed(model, self.table, Choices({}, signs)).requires_grad_(False)
        self.layers = {m.name: self.net.get_submodule(m.name) for m in self.table.quantized}
        self.reference = self.logarithms(model)
        self.note("float", {"perplexity": self.perplexity(self.reference)})
        squares, moments = self.gradients()
        self.weights = {n: m.weight.numpy().copy() for n, m in self.layers.items()}
        self.losses = {name: {} for name in ("kl", "output", "weights")}
        for name, W in self.weights.items():
            for kind, counts in (
                ("kl", squares.pop(name) / (2 * self.calibration.numel())),
                ("output", moments[name] / np.square(W).dot(moments[name]).sum()),
                ("weights", np.full(W.shape[1], 1 / np.square(W).sum())),
            ):
                specs = self.shares.candidates
                self.losses[kind][name] = expected_losses(W, specs, weights=counts)

    def shares_of(self, bits: float) -> Shares:
        recipe = Recipe(**BASE, bits=bits)
        return Shares.of(recipe, self.table.architecture, self.table.matrices)

    def note(self, name: str, values: Mapping[str, Any]) -> None:
        self.cells[name] = values
        self.file.write_text(json.dumps(self.cells, indent=1))
        print(name, {k: v for k, v in values.items() if k != "layers"}, flush=True)

    @torch.no_grad()
    def logarithms(self, model: Any) -> list[torch.Tensor]:
        with QuickForward():
            found = [model(input_ids=ids[None]).logits[0, :-1] for ids in self.test]
        return [logits.log_softmax(-1) for logits in found]

    def perplexity(self, logarithms: list[torch.Tensor]) -> float:
        pairs = zip(logarithms, self.test, strict=True)
        means = [p.gather(1, ids[1:, None]).double().mean() for p, ids in pairs]
        return float(torch.exp(-torch.stack(means).mean()))

    def gradients(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return squared gradients of the weights, for labels drawn, and squares of the inputs."""
        squares: dict[str, Any] = dict.fromkeys(self.layers, 0)
        moments: dict[str, Any] = dict.fromkeys(self.layers, 0)
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        generator = torch.Generator().manual_seed(0)

        def watch(name: str) -> Any:
            def hook(module: Any, args: Any, output: torch.Tensor) -> None:
                seen[name] = args[0].detach()[0], output

            return hook

        handles = [m.register_forward_hook(watch(n)) for n, m in self.layers.items()]
        embedding = self.net.get_submodule(self.table.architecture.embedding)
        start = embedding.register_forward_hook(lambda m, a, out: out.detach().requires_grad_())
        for ids in self.calibration:
            with torch.enable_grad():
                logits = self.net(input_ids=ids[None]).logits[0]
            chances = logits.detach().softmax(-1)
            labels = torch.multinomial(chances, 1, generator=generator)
            given = (-chances).scatter_add(1, labels, torch.ones_like(labels, dtype=chances.dtype))
            found = torch.autograd.grad(logits, [seen[n][1] for n in self.layers], given)
            for name, gradient in zip(self.layers, found, strict=True):
                x = seen[name][0]
                squares[name] = squares[name] + (gradient[0].T @ x).square_().numpy()
                moments[name] = moments[name] + x.square().sum(0).numpy()
            seen.clear()
        for handle in (*handles, start):
            handle.remove()
        return squares, moments

    def measure(self, name: str, specs: Mapping[str, cq.QuantSpec]) -> None:
        """Round all layers to nearest, and note how far the model is from the float one."""
        rows = self.table.quantized
        for layer, module in self.layers.items():
            W = cq.fake_quantize(self.weights[layer], specs[layer])
            module.weight.data = torch.from_numpy(W)
        own = self.logarithms(self.net)
        pairs = zip(self.reference, own, strict=True)
        kl = [float((p.exp() * (p - q)).sum(-1).double().mean()) for p, q in pairs]
        size = sum(stored_bytes(m.shape, specs[m.name]) for m in rows)
        counts = Counter(f"{n.rpartition('.')[2]} {s.format.name}" for n, s in specs.items())
        values = {
            "bits": 8 * size / self.shares.weights,
            "perplexity": self.perplexity(own),
            "kl": float(np.mean(kl)),
            "layers": dict(sorted(counts.items())),
        }
        self.note(name, values)

    def uniform(self, k: int) -> None:
        """Measure one width for all."""
        spec = self.shares.candidates[k]
        if spec.format.name not in self.cells:
            self.measure(spec.format.name, dict.fromkeys(self.layers, spec))

    def mixed(self, kind: str, bits: float) -> None:
        """Measure the widths that are chosen by losses of a kind."""
        name = f"{kind} {bits:.4g}"
        if name in self.cells:
            return
        shares, losses = self.shares_of(bits), self.losses[kind]
        found = shares.allocate(lambda row, k: float(losses[row.name][k]))
        units = zip(shares.units, found.choices, strict=True)
        self.measure(name, {row.name: shares.candidates[k] for unit, k in units for row in unit})


def windows(tokenizer: Any, file: Path, count: int, length: int) -> torch.Tensor:
    """Return the first windows of a text."""
    text = file.read_text("utf-8")[: 20 * count * length]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * length]).reshape(count, length)


def main() -> None:
    """Measure all cells that are not there yet."""
    parser = parser_for(__doc__ or "")
    parser.add_argument("--windows", type=int, default=4, help="of either text")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    bits = [spec.format.bits for spec in bench.shares.candidates]
    for width in EQUAL:
        k = bits.index(width)
        bench.uniform(k)
        # A little more, since the sizes are to be equal.
        size = bench.shares.bits(int(bench.shares.sizes()[:, k].sum())) + 1e-9
        for kind in bench.losses:
            bench.mixed(kind, size)
    for more in BETWEEN:
        bench.mixed("kl", more)


if __name__ == "__main__":
    main()
