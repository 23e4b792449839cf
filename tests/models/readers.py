"""Which programs read what each preset makes, and what they execute: the rows that tests prove.

``test_readers`` has a test for each row, and the README's tables are made from presets and rows:
``python -m tests.models.readers`` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from corequant.recipe import READERS, Recipe
from corequant.specs import QuantSpec, ScaleSearch
from corequant.storage.compressed_tensors import Scheme
from corequant.storage.gguf import block_type_of

ROOT = Path(__file__).parents[2]
START, END = "<!-- what loads where -->", "<!-- end of what loads where -->"
PRESETS_START, PRESETS_END = "<!-- presets -->", "<!-- end of presets -->"

TRANSFORMERS = "Transformers"
WITH_IMPORT = "Transformers, after `import corequant_transformers`"
LLAMA_CPP = "llama.cpp"
ONNXRUNTIME = "onnxruntime"
VLLM = "vLLM"

DECODES = "decodes weights when first called; products in float"
SIMULATES = "decodes weights, rounds activations; products in float"
DECODES_FP4 = "decodes to bfloat16; products in bfloat16"
SIMULATES_FP4 = "decodes to bfloat16, rounds activations; products in bfloat16"
NODES = "nodes of a graph that a program of yours makes; products in float"
KERNELS = {
    "w4a16": "a kernel for 4-bit codes; products in bfloat16",
    "w8a8": "rounds activations; integer products",
    "nvfp4": "kernels that need a GPU; only the layout was tested",
}
"""What vLLM executes: ``make test-vllm`` runs it on a CPU."""

EIGHT_BITS = "rounds activations to 8 bits in groups of 32"


@dataclass(frozen=True)
class Reading:
    """One row: a preset, who reads what it makes, and what is executed there."""

    preset: str
    reader: str
    executed: str
    format: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """The preset's name."""
        return self.preset

    @property
    def weights(self) -> str:
        """The weights' quantizer, without what says how its scales were found."""
        return _short(self.recipe.weights)

    @property
    def activations(self) -> str:
        """The activations' quantizer."""
        return _short(self.recipe.activations)

    @property
    def rotated(self) -> bool:
        """Whether a rotation is left for run time."""
        return self.recipe.rotation in ("merged", "online")


def _short(spec: QuantSpec | None) -> str:
    if spec is None:
        return "none"
    left = {search.value for search in ScaleSearch}
    parts = str(spec).split(":")
    return ":".join(part for part in parts if part not in left)


def _reading(preset: str, reader: str, recipe: Recipe) -> Iterator[Reading]:
    if READERS[reader] == "gguf":
        kind = f"GGUF {block_type_of(recipe.weights)}"
        yield Reading(preset, LLAMA_CPP, EIGHT_BITS, kind, recipe)
        return
    scheme = Scheme(recipe.weights, recipe.activations)
    if reader == "vllm":
        yield Reading(preset, VLLM, KERNELS[preset], scheme.format, recipe)
        return
    fp4 = scheme.dtype == "BF16" and "fp4" in scheme.format
    plain = recipe.activations is None
    executed = (DECODES_FP4 if plain else SIMULATES_FP4) if fp4 else DECODES if plain else SIMULATES
    row = Reading(preset, TRANSFORMERS, executed, scheme.format, recipe)
    if not row.rotated:
        yield row
        return
    yield replace(row, reader=WITH_IMPORT, executed=f"rotates; {executed}")
    yield replace(row, executed="refuses to load and says what to import")


def _readings() -> Iterator[Reading]:
    """Yield a row for each preset and each program that it says can run it."""
    for name, preset in Recipe.presets().items():
        for reader in preset.readers:
            yield from _reading(name, reader, Recipe.preset(name, reader=reader))
    # What a preset with options becomes.
    changed = Recipe.preset("w4a16", reader="transformers", block_size=64)
    yield from _reading("w4a16, `--block-size 64`", "transformers", changed)
    for preset in ("w4a16", "w2a16"):
        recipe = Recipe.preset(preset, reader="transformers")
        yield Reading(preset, ONNXRUNTIME, NODES, "MatMulNBits", recipe)
    zeros = {"weights": "int4:group64:asymmetric:bfloat16", "rotation": "offline"}
    named = "w4a16, `--weights int4:group64:asymmetric`"
    yield Reading(named, ONNXRUNTIME, NODES, "MatMulNBits", Recipe.preset("w4a16", **zeros))


READINGS = tuple(_readings())


def rows(reader: str) -> tuple[Reading, ...]:
    """Return the rows of one reader."""
    return tuple(reading for reading in READINGS if reading.reader == reader)


def versions() -> dict[str, str]:
    """Return the versions that the rows are proved with."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def table() -> str:
    """Return the README's table."""
    found = versions()
    lines = [
        f"Proved with Transformers {found['transformers']} and compressed-tensors "
        f"{found['compressed-tensors']},",
        f"llama.cpp as of xllamacpp {found['xllamacpp']}, and onnxruntime {found['onnxruntime']};",
        "vLLM by the layout that it reads, and itself by `make test-vllm`:",
        "",
        "| preset | weights, activations | format | read by | which executes |",
        "|---|---|---|---|---|",
    ]
    for r in READINGS:
        recipe = f"`{r.weights}`, `{r.activations}`"
        lines.append(f"| {r.name} | {recipe} | {r.format} | {r.reader} | {r.executed} |")
    return "\n".join(lines)


_FIGURES = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("kl", "KL", "{:.3f}"),
    ("bits_per_weight", "bits", "{:.2f}"),
    ("size_mb", "MB", "{:.0f}"),
    ("minutes", "minutes", "{:.1f}"),
    ("memory_mib", "MiB", "{:.0f}"),
)


def presets_table() -> str:
    """Return the README's table of presets, with what was measured."""
    presets = Recipe.presets()
    shown = _FIGURES if any(preset.measured for preset in presets.values()) else ()
    heads = ["preset", "what it makes", *(title for _, title, _ in shown), "runs in"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, preset in presets.items():
        measured = preset.measured
        figures = [form.format(measured[key]) if measured else "" for key, _, form in shown]
        cells = [f"`{name}`", preset.description, *figures, ", ".join(preset.readers)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rendered(text: str) -> str:
    """Return a text with both tables between their marks."""
    for start, end, made in (
        (PRESETS_START, PRESETS_END, presets_table()),
        (START, END, table()),
    ):
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n\n{made}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")
