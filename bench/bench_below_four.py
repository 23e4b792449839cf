"""Weights below four bits: output errors of single layers, then perplexity of the whole model.

Usage: python bench/bench_below_four.py --model M --calibration valid.txt --text test.txt
       [--layers 0,8,15,22,29] [--schemes qronos-3,skim-3,...] [--whole] [--windows 10]

Every linear layer of the decoder's blocks is coded in a rotated basis where the scheme says so:
its weight's input side is turned by a Hadamard matrix over the whole side, or the largest block
that has one, its moments likewise, and the result turned back, so that all schemes are measured in
the same float model. Bits are everything that is stored (float16 levels and scales, widths,
positions of outliers) over the number of weights.

Without ``--whole`` it prints each scheme's output error relative to the output's energy, by kind
of layer. With it, blocks are coded one after the other, each from what it reads behind the coded
ones before (H) and in the float model (G); all schemes go through the model side by side.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import corequant as cq
import corequant_transformers as cqhf

READS = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}
"""Layers of a block, and the layer whose input each one reads."""


@dataclass(frozen=True)
class Scheme:
    """A way to code a weight: a function of W, H, G that returns values and bits of a weight."""

    code: Callable
    rotated: bool = False


def grid(method, bits, **more):
    spec = f"int{bits}:channel:symmetric:mse:float16"

    def code(W, H, G):
        moments = (H, G) if method is cq.qronos else (H,)
        return cq.dequantize(method(W, *moments, spec, losses=False, **more)), bits + 16 / W.shape[
            1
        ]

    return code


def coded(method, bits, cross=True, **more):
    def code(W, H, G):
        made = method(W, H, bits, G=G if cross else None, **more)
        return made.dequantize(), made.bits_per_weight

    return code


def planes(method, cross=True, **more):
    def code(W, H, G):
        made = method(W, H, G=G if cross else None, **more)
        return made.dequantize(), made.bits_per_weight

    return code


def _planes():
    """Yield names and schemes of planes of signs."""
    for name, method in (("billm", cq.billm), ("arb", cq.arb)):
        plain = planes(method, cross=False, published=True)
        yield f"{name}-published", Scheme(plain)
        yield f"{name}-published-rotated", Scheme(plain, True)
    yield "billm", Scheme(planes(cq.billm))
    yield "billm-rotated", Scheme(planes(cq.billm), True)
    for order in (1, 2, 3, 4):
        for extra in (0, 0.125, 0.25, 0.5, 0.75) if order < 4 else (0,):
            more = {"order": order, "salient": extra}
            name = f"arb-{order + extra:g}"
            yield name, Scheme(planes(cq.arb, **more))
            yield f"{name}-unrotated", Scheme(planes(cq.arb, rotation=None, **more))
            yield f"{name}-rotated", Scheme(planes(cq.arb, rotation=None, **more), True)
    for suffix, more in {
        "-bitmap": {"bitmap": True, "mean": True, "group": 128, "rotation": None},
        "-group128": {"group": 128, "rotation": None},
        "-norounds": {"rounds": 0, "rotation": None},
        "-gptq": {"cross": False, "rotation": None},
        "-ternary": {"ternary": True, "rotation": None},
    }.items():
        yield f"arb-1{suffix}", Scheme(planes(cq.arb, **more))
        yield f"arb-1{suffix}-rotated", Scheme(planes(cq.arb, **more), True)
    pairs = planes(cq.arb, ternary=True, order=2, rotation=None)
    yield "arb-2-ternary-rotated", Scheme(pairs, True)


def _schemes():
    """Yield names and schemes."""
    for bits in (2, 3, 4):
        for name, method in (("gptq", cq.gptq), ("qronos", cq.qronos)):
            more = {"damping": 1e-4} if method is cq.qronos else {}
            yield f"{name}-{bits}", Scheme(grid(method, bits, **more), True)
            yield f"{name}-{bits}-unrotated", Scheme(grid(method, bits, **more))
    for bits in (2, 2.25, 2.5, 3, 3.25, 4):
        plain = {"cross": False, "published": True}
        yield f"skim-published-{bits:g}", Scheme(coded(cq.skim, bits, **plain))
        yield f"skim-published-{bits:g}-rotated", Scheme(coded(cq.skim, bits, **plain), True)
        for suffix, more in {
            "": {},
            "-scaled": {"scale": True},
            "-uniform": {"mixed": False},
            "-nofeedback": {"feedback": False},
            "-norefit": {"refits": 0},
            "-gptq": {"cross": False},
            "-own": {"shared": False},
        }.items():
            yield f"skim-{bits:g}{suffix}", Scheme(coded(cq.skim, bits, **more), True)
        yield f"skim-{bits:g}-unrotated", Scheme(coded(cq.skim, bits))
    for bits in (2, 2.05, 2.1, 3, 3.05, 4):
        for outliers in (False, True):
            plain = {"cross": False, "published": True, "outliers": outliers}
            name = f"claq-published-{bits:g}" + "-outliers" * outliers
            yield name, Scheme(coded(cq.claq, bits, **plain))
    for bits in (2.12, 2.25, 2.5, 3, 3.25, 4):
        for share in (0, 0.002, 0.005, 0.01):
            name = f"claq-{bits:g}" + (f"-keep{share:g}" if share else "")
            yield name, Scheme(coded(cq.claq, bits, outliers=share))
            yield f"{name}-rotated", Scheme(coded(cq.claq, bits, outliers=share), True)


def _streams():
    """Yield names and schemes of entropy-coded integers."""
    for bits in (1, 1.5, 2, 2.12, 2.25, 2.5, 3, 3.25, 4):
        for suffix, more in {
            "": {},
            "-equal": {"waterfilling": False},
            "-gptq": {"cross": False},
        }.items():
            yield f"watersic-{bits:g}{suffix}", Scheme(coded(cq.watersic, bits, **more), True)
        yield f"watersic-{bits:g}-unrotated", Scheme(coded(cq.watersic, bits))


SCHEMES = {**dict(_schemes()), **dict(_planes()), **dict(_streams())}
DEFAULT = (
    "gptq-3,qronos-3,skim-published-3,skim-3,claq-published-3,claq-3,gptq-2,qronos-2,"
    "claq-published-2.05-outliers,claq-2.25-keep0.002,skim-2.25,watersic-3,watersic-2.25"
)


def rotate(matrix, both=False, inverse=False):
    """Turn the last axis, and where ``both`` the first one too."""
    turned = cq.block_hadamard(np.ascontiguousarray(matrix), inverse=inverse)
    return rotate(turned.T).T if both else turned


def apply(scheme, W, H, G):
    """Return the values and bits of a coded weight, in the basis that it was given in."""
    if not scheme.rotated:
        return scheme.code(W, H, G)
    turned = [np.ascontiguousarray(rotate(M, both=True)) for M in (H, G)]
    values, bits = scheme.code(rotate(W), *turned)
    return rotate(values, inverse=True), bits


class Inputs:
    """The inputs of a block's layers, kept by hooks while the block runs."""

    def __init__(self, block):
        self.seen = {}
        self.hooks = [
            block.get_submodule(name).register_forward_pre_hook(self._keeper(name))
            for name in sorted(set(READS.values()))
        ]

    def _keeper(self, name):
        def keep(module, args):
            self.seen[name] = args[0].reshape(-1, args[0].shape[-1])

        return keep

    def close(self):
        for hook in self.hooks:
            hook.remove()


class _Stopped(Exception):
    pass


def first_inputs(model, windows):
    """Return what the first block is given for each window: its states, and all else."""
    found = []

    def stop(module, args, kwargs):
        found.append((args[0] if args else kwargs.pop("hidden_states"), kwargs))
        raise _Stopped

    hook = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    for window in windows:
        try:
            model(torch.as_tensor(window)[None], use_cache=False)
        except _Stopped:
            pass
    hook.remove()
    return found


def run(block, states, kwargs):
    out = block(states, **kwargs)
    return out if isinstance(out, torch.Tensor) else out[0]


def block_moments(block, float_states, states, kwargs):
    """Return H and G of each group of layers by stream, and the float stream behind the block.

    ``states`` has the states before the block of each stream by its label.
    """
    inputs = Inputs(block)
    sums = {label: defaultdict(lambda: [0.0, 0.0]) for label in states}
    moved, count = [], 0
    for k, (reference, more) in enumerate(zip(float_states, kwargs, strict=True)):
        moved.append(run(block, reference, more))
        exact = dict(inputs.seen)
        for label, own in states.items():
            if own[k] is not reference:
                run(block, own[k], more)
            seen = dict(inputs.seen) if own[k] is not reference else exact
            for name, x in seen.items():
                pair = sums[label][name]
                pair[0] = pair[0] + x.T @ x
                pair[1] = pair[1] + exact[name].T @ x
        count += len(exact["self_attn.q_proj"])
    inputs.close()
    moments = {
        label: {n: [np.asarray(m / count, np.float32) for m in pair] for n, pair in own.items()}
        for label, own in sums.items()
    }
    return moments, moved, count


def layerwise(model, windows, chosen, layers):
    """Print the relative output error of each scheme by kind of layer."""
    found = first_inputs(model, windows)
    states, kwargs = [s for s, _ in found], [k for _, k in found]
    errors, bits, seconds = defaultdict(list), defaultdict(list), defaultdict(float)
    for index, block in enumerate(model.model.layers):
        if index > max(layers):
            break
        found, moved, _ = block_moments(block, states, {"float": states}, kwargs)
        for name, source in READS.items() if index in layers else ():
            W = block.get_submodule(name).weight.detach().numpy().astype(np.float32)
            H, G = found["float"][source]
            energy = cq.reconstruction_loss(W, np.zeros_like(W), H)
            for label in chosen:
                started = time.process_time()
                values, size = apply(SCHEMES[label], W, H, G)
                seconds[label] += time.process_time() - started
                errors[label, name].append(cq.reconstruction_loss(W, values, H) / energy)
                bits[label].append((size * W.size, W.size))
        states = moved
    kinds = [name.rpartition(".")[2].removesuffix("_proj") for name in READS]
    print(
        f"{'relative output error, per cent':40s}", *(f"{k:>7s}" for k in kinds), "   all  bits  s"
    )
    for label in chosen:
        rows = [100 * np.mean(errors[label, name]) for name in READS]
        total = sum(b for b, _ in bits[label]) / sum(n for _, n in bits[label])
        cells = " ".join(f"{row:7.3f}" for row in rows)
        print(f"{label:40s} {cells} {np.mean(rows):7.3f} {total:6.3f} {seconds[label]:6.1f}")


def whole(model, windows, chosen, tokens):
    """Code the model by each scheme and print its perplexity and distance to the float model."""
    found = first_inputs(model, windows)
    kwargs = [k for _, k in found]
    float_states = [s for s, _ in found]
    states = {label: list(float_states) for label in chosen}
    made = {label: copy.deepcopy(model) for label in chosen}
    bits = defaultdict(list)
    for index, block in enumerate(model.model.layers):
        moments, moved, count = block_moments(block, float_states, states, kwargs)
        for label in chosen:
            target = made[label].model.layers[index]
            for name, source in READS.items():
                W = block.get_submodule(name).weight.detach().numpy().astype(np.float32)
                values, size = apply(SCHEMES[label], W, *moments[label][source])
                bits[label].append((size * W.size, W.size))
                target.get_submodule(name).weight.data.copy_(torch.from_numpy(values))
            states[label] = [
                run(target, own, more) for own, more in zip(states[label], kwargs, strict=True)
            ]
        float_states = moved
        print(f"block {index}: {count} tokens", flush=True)
    for label in chosen:
        result = cqhf.evaluate(made[label], tokens, against=model)
        total = sum(b for b, _ in bits[label]) / sum(n for _, n in bits[label])
        print(
            f"{label:40s} {total:6.3f} bits, perplexity {result.perplexity:8.2f}, "
            f"KL {result.divergence.kl:.4f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--layers", default="0,8,15,22,29")
    parser.add_argument("--schemes", default=DEFAULT, help="names, or 'list'")
    parser.add_argument("--samples", default=8, type=int)
    parser.add_argument("--windows", default=10, type=int)
    parser.add_argument("--whole", action="store_true")
    given = parser.parse_args()
    if given.schemes == "list":
        print("\n".join(SCHEMES))
        return
    chosen = given.schemes.split(",")
    unknown = sorted(set(chosen) - set(SCHEMES))
    if unknown:
        parser.error(f"--schemes doesn't know {', '.join(unknown)}")
    source = cqhf.Source(given.model)
    tokenizer, model = source.tokenizer(), source.load().eval()
    text = given.calibration.read_text(encoding="utf-8")
    windows = cqhf.token_windows(text, tokenizer, 2048, given.samples)
    with torch.no_grad():
        if not given.whole:
            layerwise(model, windows, chosen, [int(k) for k in given.layers.split(",")])
            return
        tokens = cqhf.token_windows(
            given.text.read_text(encoding="utf-8"), tokenizer, 2048, given.windows
        )
        whole(model, windows, chosen, tokens)


if __name__ == "__main__":
    main()
