"""Which programs read what corequant exports, and what they execute: the rows that tests prove.

``test_readers`` has a test for each row, and the README's table is made from the rows:
``python -m tests.models.readers`` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
START, END = "<!-- what loads where -->", "<!-- end of what loads where -->"

TRANSFORMERS = "Transformers"
WITH_IMPORT = "Transformers, after `import corequant_transformers`"
LLAMA_CPP = "llama.cpp"
ONNXRUNTIME = "onnxruntime"

DECODES = "decodes weights when first called; products in float"
SIMULATES = "decodes weights, rounds activations; products in float"
DECODES_FP4 = "decodes to bfloat16; products in bfloat16"
SIMULATES_FP4 = "decodes to bfloat16, rounds activations; products in bfloat16"
EIGHT_BITS = "rounds activations to 8 bits in groups of 32"


@dataclass(frozen=True)
class Reading:
    """One row: an export, who reads it, and what is executed there."""

    name: str
    weights: str
    activations: str
    format: str
    reader: str
    executed: str
    block_size: int | None = None
    """Of the rotation of ``down_proj``'s input at run time; None where all is merged."""


READINGS = (
    Reading("W4A16", "int4:group64", "none", "pack-quantized", TRANSFORMERS, DECODES),
    Reading("W8A8", "int8:channel", "int8:token", "int-quantized", TRANSFORMERS, SIMULATES),
    Reading("W4A8", "int4:group64", "int8:token", "pack-quantized", TRANSFORMERS, SIMULATES),
    Reading(
        "W4A4", "int4:channel", "int4:token:asymmetric", "pack-quantized", TRANSFORMERS, SIMULATES
    ),
    Reading("MXFP4", "mxfp4", "mxfp4:even", "mxfp4-pack-quantized", TRANSFORMERS, SIMULATES_FP4),
    Reading("NVFP4A16", "nvfp4", "none", "nvfp4-pack-quantized", TRANSFORMERS, DECODES_FP4),
    Reading(
        "W4A16, rotated at run time",
        "int4:group64",
        "none",
        "pack-quantized",
        WITH_IMPORT,
        "rotates by blocks; " + DECODES,
        64,
    ),
    Reading(
        "W4A4, rotated at run time",
        "int4:channel",
        "int4:token:asymmetric",
        "pack-quantized",
        WITH_IMPORT,
        "rotates by blocks; " + SIMULATES,
        64,
    ),
    Reading(
        "W4A16, rotated at run time",
        "int4:group64",
        "none",
        "pack-quantized",
        TRANSFORMERS,
        "refuses to load and says what to import",
        64,
    ),
    *(
        Reading(name, weights, "int8:group32", f"GGUF {kind}", LLAMA_CPP, EIGHT_BITS)
        for name, weights, kind in (
            ("W4A8", "int4:group32:symmetric:float16", "Q4_0"),
            ("W4A8", "int4:group32:asymmetric:float16", "Q4_1"),
            ("W8A8", "int8:group32:symmetric:float16", "Q8_0"),
            ("MXFP4A8", "mxfp4", "MXFP4"),
        )
    ),
    Reading(
        "W4A16", "int4:group64", "none", "MatMulNBits", ONNXRUNTIME, "a layer; products in float"
    ),
)


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
        f"llama.cpp as of xllamacpp {found['xllamacpp']}, and onnxruntime {found['onnxruntime']}:",
        "",
        "| scheme | recipe: weights, activations | format | read by | which executes |",
        "|---|---|---|---|---|",
    ]
    for r in READINGS:
        recipe = f"`{r.weights}`, `{r.activations}`"
        lines.append(f"| {r.name} | {recipe} | {r.format} | {r.reader} | {r.executed} |")
    return "\n".join(lines)


def rendered(text: str) -> str:
    """Return a text with the table between its marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")
