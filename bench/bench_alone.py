"""Perplexity where nothing is rounded but the inputs of ``down_proj``, and where all else is.

Usage: python bench/bench_alone.py --model M --calibration valid.txt --text test.txt --json F

bench_recovery.py has everything rounded at once: its perplexities hang on every layer, on chance
in the order of additions, and on the input of ``down_proj``, the only one that a block rotation and
its permutation touch. This script takes that input by itself, with permutations chosen the same
way from the same calibration: rotated, rounded to INT4 asymmetric per token, and rotated back, in
the float model. The last row is the other way round: the model of bench_recovery.py behind the
full-vector rotation, with those inputs left in float. Every finished row is added to the JSON file;
a later run goes on from there. ``--write`` puts the table into bench/README.md.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager

import torch
from bench_recovery import FULL, METHODS
from choices import choose_all
from markdown import write_section
from options import parser_for

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.model.quantized_linear import QuantizedLinear

ACTIVATIONS = "int4:token:asymmetric"
NOTHING, REST = "nothing rounded", "all but these inputs rounded, full rotation"
ROWS = [
    (None, NOTHING),
    (None, FULL),
    *((b, method) for b in (16, 32) for method in METHODS),
    (None, REST),
]


@contextmanager
def rounding_inputs(model, data, block_size, method):
    """Round what every down_proj of a float model reads, behind its permutation and rotation."""
    fields = METHODS.get(method, {"permutation": "identity"})
    recipe = Recipe(block_size=block_size, **fields)
    plan = cqhf.plan(model, recipe)
    choices = choose_all(plan, data, lambda name: model.get_parameter(f"{name}.weight").numpy())
    with ExitStack() as hooks:
        for region in plan.regions:
            reader = region.readers[0]
            if not reader.endswith("down_proj"):
                continue
            p = choices.permutations.get(region.name)
            p = torch.arange(region.width) if p is None else torch.from_numpy(p)
            f = choices.factors.get(region.name)
            f = torch.ones(region.width) if f is None else torch.from_numpy(f).float()
            back = torch.argsort(p)

            def hook(_, args, p=p, f=f, back=back):
                z = cq.block_hadamard((args[0][..., p] * f).contiguous(), block_size)
                z = cq.fake_quantize(z, ACTIVATIONS)
                return ((cq.block_hadamard(z, block_size, inverse=True) / f)[..., back],)

            handle = model.get_submodule(reader).register_forward_pre_hook(hook)
            hooks.callback(handle.remove)
        yield


def perplexity(model, data, test, block_size, method) -> float:
    """Return a row's perplexity."""
    if method == NOTHING:
        return cqhf.evaluate(model, test).perplexity
    if method == REST:
        rest = cqhf.quantize(model, Recipe(permutation="identity"), data).model
        for name, layer in rest.named_modules():
            if isinstance(layer, QuantizedLinear) and name.endswith("down_proj"):
                layer.activations = None
        return cqhf.evaluate(rest, test).perplexity
    with rounding_inputs(model, data, block_size, method):
        return cqhf.evaluate(model, test).perplexity


def table(found: dict) -> str:
    """Return the Markdown table."""
    lines = ["| block | permutation | perplexity | above float |", "|---|---|---|---|"]
    base = found.get((None, NOTHING))
    for b, method in ROWS:
        value = found.get((b, method))
        if value is not None:
            more = "" if base is None else f"{value / base - 1:+.2%}"
            lines.append(f"| {b or ''} | {method} | {value:.3f} | {more} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_for(__doc__)
    o = parser.parse_args()
    results = json.loads(o.json.read_text(encoding="utf-8")) if o.json.exists() else []
    found = {(b, method): value for b, method, value in results}
    missing = [row for row in ROWS if row not in found]
    if missing:
        source = cqhf.Source(o.model)
        model, tokenizer = source.load(), source.tokenizer()
        recipe = Recipe(permutation="auto", factors="scales")
        data = cqhf.calibrate(model, recipe, o.calibration.read_text("utf-8"), tokenizer)
        test = cqhf.token_windows(o.text.read_text("utf-8"), tokenizer, 2048, 10)
        for row in missing:
            found[row] = perplexity(model, data, test, *row)
            o.json.write_text(json.dumps([[*k, v] for k, v in found.items()]), encoding="utf-8")
            print(*row, round(found[row], 4), flush=True)
    print(table(found))
    if o.write:
        write_section("alone", f"## The input of down_proj alone\n\n{_CAPTION}\n\n{table(found)}\n")


_CAPTION = """Written by `bench_alone.py`: the float SmolLM2-135M-Instruct with nothing rounded but
what `down_proj` reads (INT4 by token, behind the rotation), perplexity over 10 windows of 2048
tokens of WikiText-2's test split. The last row is W4A4 as in the table of recovery, seed 0, without
that input."""


if __name__ == "__main__":
    main()
