"""Perplexity of SmolLM2 by rounding method: block sizes, formats, accumulators, weights alone.

Usage: python bench/bench_rounding.py --model M --calibration valid.txt --text test.txt --json FILE

The cells of bench/README.md are in bench/rounding.json; the older ones are rounded to two digits.

Each finished cell is appended to FILE, and cells that are there already are not run again, so that
the script can be stopped and started. With --minutes it starts no cell after that time. Cells come
in the order of their importance.
"""

from __future__ import annotations

import json
import time

from markdown import write_section
from options import parser_for

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe

BREVITAS = {
    ("int4", "full", "identity", "qronos"): 26.4,
    ("int4", "32", "identity", "qronos"): 42.3,
    ("int4", "32", "massdiff", "qronos"): 27.4,
    ("int4", "16", "massdiff", "qronos"): 28.6,
}
"""What brevitas 0.13.4 measured with the same settings on the same tokens."""

FORMATS = {
    "int4": ("int4:channel:symmetric", "int4:token:asymmetric"),
    "fp4": ("float4_e2m1fn:channel", "float4_e2m1fn:token"),
    "mxfp4": ("mxfp4", "mxfp4"),
}


METHODS = ("nearest", "gptq", "gpfq", "qronos")
FITTED = "scales fitted"
BEST, SCALED = "auto, signs, scales", "signs, scales"
PERMUTATIONS = ("identity", "massdiff", "energydiff", BEST)
SHAPES = [(None, "identity"), (16, "massdiff"), (32, "massdiff"), (32, "identity")]


def cells():
    """Yield (table, labels, fields of the recipe), the most important first."""
    for shape in SHAPES:
        yield rounded("int4", *shape, "qronos")
    for block in (16, 32):
        yield rounded("int4", block, "energydiff", "qronos")
        yield rounded("int4", block, "auto", "qronos", factors="scales")
    yield rounded("int4", None, "identity", "qronos", factors="scales")
    for shape in SHAPES[:3]:
        yield rounded("int4", *shape, "qronos", fit_scales=True)
    for block in (16, 32):
        yield rounded("int4", block, "auto", "nearest", factors="scales", fit_scales=True)
    for method in ("nearest", "gptq", "gpfq"):
        for shape in SHAPES[:3]:
            yield rounded("int4", *shape, method)
    for name in ("fp4", "mxfp4"):
        for method in reversed(METHODS):
            for shape in SHAPES[:3]:
                yield rounded(name, *shape, method)
    for method in reversed(METHODS):
        yield rounded("int4", 128, "massdiff", method)
        yield rounded("int4", 32, "identity", method)
    for name in ("fp4", "mxfp4"):
        for method in reversed(METHODS):
            yield rounded(name, 128, "massdiff", method)
    yield from accumulators()
    yield from weights_only()


def rounded(name, block, permutation, method, **more):
    """Return a cell of the first table: 4 bits everywhere."""
    weights, activations = FORMATS[name]
    fields = {
        "block_size": block,
        "permutation": permutation,
        "rounding": method,
        "weights": weights,
        "activations": activations,
    }
    label = f"{method}, {FITTED}" if more.get("fit_scales") else method
    choice = permutation
    if more.get("factors"):
        choice = SCALED if block is None else BEST
    size = "full" if block is None else str(block)
    return "formats", (name, size, choice, label), {**fields, **more}


WIDTHS = {8: ("128x16", "32x14", "128x20", "128x18"), 4: ("128x12", "32x12", "128x14")}
"""Accumulators by the activations' bits, as the tile and the bits."""


def accumulators():
    """Yield accumulator widths of every method that respects them, and what spares the bounds.

    Without bounds, formats must be so narrow that no weights whatever overflow ("naive"); many
    widths allow the same ones.
    """
    base = {"block_size": 32, "permutation": "massdiff"}
    for bits, widths in WIDTHS.items():
        spec = f"int{bits}:token:asymmetric"
        for width in widths:
            fields = {**base, "activations": spec, "accumulator": width}
            for method in ("qronos", "gptq", "gpfq")[: 3 if width in widths[:2] else 1]:
                yield "accumulators", (f"W4A{bits}", width, method), {**fields, "rounding": method}
    widths = sorted({width for widths in WIDTHS.values() for width in widths})
    for weight, activation in dict.fromkeys(pair for width in widths for pair in naive(width)):
        fields = {
            **base,
            "weights": f"int{weight}:channel:symmetric",
            "activations": f"int{activation}:token:asymmetric",
            "rounding": "qronos",
        }
        yield "accumulators", (f"W{weight}A{activation}", "any", "naive"), fields


def naive(width):
    """Return pairs of weight and activation bits with which no sum of a tile overflows."""
    tile, bits = map(int, width.split("x"))
    fitting = [
        (w, a)
        for w in range(2, 5)
        for a in range(2, 9)
        if cq.accumulator_bits(tile, f"int{w}", f"uint{a}") <= bits
    ]
    return [
        p for p in fitting if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in fitting)
    ]


def weights_only():
    """Yield weights of 2 to 4 bits with scales of least squared error, activations in float."""
    base = {"activations": "none", "permutation": "identity"}
    for bits in (3, 2, 4):
        for method in (*METHODS, "learned"):
            for magr in (0.0, 0.001):
                if magr and method == "nearest":
                    continue
                fields = {**base, "weights": f"int{bits}:channel:symmetric:mse", "rounding": method}
                if method == "learned":
                    fields["steps"] = 100
                label = f"{method}, MagR" if magr else method
                yield "weights", (f"int{bits}", label), {**fields, "magr": magr}


def report(done) -> str:
    """Return the section of bench/README.md."""
    found = {tuple(cell["key"][:-3]): cell for cell in done}
    tables = {
        "formats": ("INT4, FP4 and MXFP4, weights and activations", _formats),
        "accumulators": ("Accumulators, blocks of 32 with MassDiff", _accumulators),
        "weights": (
            "Weights alone, full rotation, scales by channel of least squared error, MagR of 0.001",
            _weights,
        ),
    }
    parts = ["## Rounding that sees the data", _CAPTION, _cost(done)]
    for name, (title, table) in tables.items():
        if any(key[0] == name for key in found):
            parts += [f"### {title}", table(found)]
    return "\n\n".join(parts)


def _cost(done) -> str:
    """Return how long models took, by method, as far as cells say."""
    times = {}
    for cell in done:
        if "seconds" in cell and cell["key"][-4] != "naive":
            times.setdefault(cell["key"][-4], []).append(cell["seconds"])
    told = ", ".join(f"{method} {min(s):.0f}" for method, s in times.items())
    return f"Seconds that a model took on one core, calibrated already, at the least: {told}."


def _markdown(heads, rows) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _formats(found) -> str:
    labels = [*METHODS, f"nearest, {FITTED}", f"qronos, {FITTED}"]
    labels = [m for m in labels if any(k[0] == "formats" and k[4] == m for k in found)]
    shapes = [
        ("full", "identity"),
        ("full", SCALED),
        *((str(b), p) for b in (16, 32, 128) for p in PERMUTATIONS),
    ]
    rows = []
    for name in FORMATS:
        for size, permutation in shapes:
            row = []
            for label in labels:
                cell = found.get(("formats", name, size, permutation, label))
                whole = found.get(("formats", name, "full", "identity", label))
                text = f"{cell['perplexity']:.2f}" if cell else ""
                if cell and whole and cell is not whole:
                    text += f" ({whole['perplexity'] / cell['perplexity']:.3f})"
                row.append(text)
            if any(row):
                peer = BREVITAS.get((name, size, permutation, "qronos"))
                rows.append([name, size, permutation, *row, f"{peer:.1f}" if peer else ""])
    return _markdown(["", "block", "permutation", *labels, "qronos of brevitas 0.13.4"], rows)


def _accumulators(found) -> str:
    methods = ("gptq", "gpfq", "qronos")
    rows = []
    for bits, widths in WIDTHS.items():
        for width in widths:
            kind = f"W4A{bits}"
            cells = [found.get(("accumulators", kind, width, method)) for method in methods]
            values = [f"{cell['perplexity']:.2f}" if cell else "" for cell in cells]
            if any(values):
                rows.append([width.replace("x", " × "), kind, *values, _best_naive(found, width)])
    rows.sort(key=lambda row: (-int(row[0].split()[0]), -int(row[0].split()[2]), row[1]))
    enough = ", ".join(
        f"{cq.accumulator_bits(tile, 'int4', f'uint{bits}')} bits for W4A{bits} in tiles of {tile}"
        for bits in WIDTHS
        for tile in (128, 32)
    )
    heads = ["tile × bits", "formats", *methods, "formats without bounds"]
    return f"No weights overflow {enough}: from there on bounds change no code.\n\n" + _markdown(
        heads, rows
    )


def _best_naive(found, width) -> str:
    """Return what the best formats that need no bounds reach with Qronos, and which they are."""
    labels = [f"W{weight}A{activation}" for weight, activation in naive(width)]
    cells = [(found.get(("accumulators", label, "any", "naive")), label) for label in labels]
    reached = [(cell["perplexity"], label) for cell, label in cells if cell]
    return "{:.2f} ({})".format(*min(reached)) if len(reached) == len(labels) else ""


def _weights(found) -> str:
    labels = dict.fromkeys(labels[1] for _, labels, _ in weights_only())
    rows = []
    for label in labels:
        cells = [found.get(("weights", f"int{bits}", label)) for bits in (4, 3, 2)]
        rows.append([label, *(_number(cell["perplexity"]) if cell else "" for cell in cells)])
    return _markdown(["", "int4", "int3", "int2"], rows)


def _number(perplexity) -> str:
    return f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.0e}"


_CAPTION = """Written by `bench_rounding.py`: SmolLM2-135M-Instruct, WikiText-2, 8 calibration
windows of 2048 tokens, perplexity over the first 10 windows of the test split, seed 0; in brackets
recovery, the full-vector rotation's perplexity divided by the row's. The float model has 17.79.
Cells without a number were not run."""


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--windows", default=10, type=int)
    parser.add_argument("--samples", default=8, type=int)
    parser.add_argument("--minutes", default=1e9, type=float)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--only", help="run cells whose labels contain this")
    options = parser.parse_args()

    started = time.monotonic()
    if options.minutes > 0:
        run(options, started)
    print(report(read(options.json)))
    if options.write:
        write_section("rounding", report(read(options.json)))


def run(options, started):
    """Run the cells that are missing."""
    source = cqhf.Source(options.model)
    tokenizer, model = source.tokenizer(), source.load()
    tokens = cqhf.token_windows(
        options.text.read_text(encoding="utf-8"), tokenizer, 2048, options.windows
    )
    text = options.calibration.read_text(encoding="utf-8")
    calibrations = {}
    for table, labels, fields in cells():
        done = read(options.json)
        key = [table, *labels, options.seed, options.samples, options.windows]
        if key in [cell["key"] for cell in done] or (options.only and options.only not in str(key)):
            continue
        if time.monotonic() - started > 60 * options.minutes:
            break
        recipe = Recipe(samples=options.samples, seed=options.seed, **fields)
        tokens_too = recipe.permutation in ("auto", "energydiff") or recipe.factors != "none"
        kind = "tokens" if tokens_too else "means"
        if kind not in calibrations:
            calibrations.clear()
            calibrations[kind] = cqhf.calibrate(model, recipe, text, tokenizer)
        begun = time.monotonic()
        made = cqhf.quantize(model, recipe, calibrations[kind])
        quantized = time.monotonic() - begun
        perplexity = cqhf.evaluate(made.model, tokens).perplexity
        rows = made.report["matrices"]
        cell = {
            "key": key,
            "perplexity": perplexity,
            "seconds": round(quantized, 1),
            "solving": round(sum(row.get("seconds", 0) for row in rows), 1),
            "evaluating": round(time.monotonic() - begun - quantized, 1),
            "peak_rss_mib": made.report["peak_rss_mib"],
        }
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        print(cell, flush=True)
        del made


def read(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
