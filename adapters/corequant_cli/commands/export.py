"""``corequant export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corequant_cli.commands.architectures import takes_architecture
from corequant_cli.commands.arguments import Json, Verify, load_adapter, output_path, print_json
from corequant_cli.commands.panels import WHAT, WHERE
from corequant_cli.tables.console import plain

__all__ = ["export"]


@takes_architecture
def export(
    model: Annotated[Path, typer.Argument(help="Directory written by quantize.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="New or empty directory, or new .gguf file.",
            parser=output_path,
            metavar="<path>",
            rich_help_panel=WHERE,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="Format: compressed-tensors (Transformers, vLLM) or gguf (llama.cpp).",
            metavar="<format>",
            rich_help_panel=WHAT,
        ),
    ] = "compressed-tensors",
    source: Annotated[
        Path | None,
        typer.Option(
            help="Original model, whose metadata and tokenizer a GGUF file takes.",
            metavar="<path>",
            rich_help_panel=WHAT,
        ),
    ] = None,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Write a quantized model in a format that other programs read."""
    import corequant_transformers as cqhf

    load_adapter()
    written = cqhf.export(model, output, to, source=source, verify=verify)
    if as_json:
        files = sorted(written.rglob("*")) if written.is_dir() else [written]
        places = {f: f.relative_to(written).as_posix() if f != written else f.name for f in files}
        sizes = {place: f.stat().st_size for f, place in places.items() if f.is_file()}
        print_json({"output": str(written), "to": to, "files": sizes})
    else:
        print(f"exported {plain(model)} to {plain(written)} as {to}")
