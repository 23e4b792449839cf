"""``corequant quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corequant.recipe import Recipe
from corequant_cli.commands.architectures import takes_architecture
from corequant_cli.commands.arguments import (
    CalibrationFiles,
    Device,
    Json,
    Model,
    load_adapter,
    output_path,
    print_json,
    read_data,
)
from corequant_cli.commands.options import takes_recipe
from corequant_cli.commands.panels import WHERE
from corequant_cli.tables import console, data, models, plans

__all__ = ["quantize"]


@takes_architecture
@takes_recipe
def quantize(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="New or empty directory; for llama.cpp a new .gguf file.",
            parser=output_path,
            metavar="<path>",
            rich_help_panel=WHERE,
        ),
    ],
    *,
    calibration: CalibrationFiles = None,
    recipe: Recipe,
    reader: str,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue an interrupted run to the same output.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory limit, which Linux enforces.",
            metavar="<size>[MiB|GiB]",
            rich_help_panel=WHERE,
        ),
    ] = None,
    device: Device = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would happen to every tensor.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model: calibrate, rotate, verify, round, and save it for a program to load."""
    documents = None if dry_run else read_data(calibration)
    import corequant_transformers as cqhf

    load_adapter()
    if dry_run:
        fates = cqhf.fates(cqhf.plan(model, recipe, reader=reader))
        if as_json:
            print_json({"tensors": fates})
        else:
            plans.fates(fates)
        return
    limit = None
    if memory is not None:
        limit = cqhf.limit_memory(memory, cqhf.plan(model, recipe, reader=reader))
    note = "" if calibration or as_json else data.CARRIED
    with console.progress(note) as progress:
        result = cqhf.quantize(
            model,
            recipe,
            documents,
            output,
            reader=reader,
            resume=resume,
            memory=limit,
            device=device,
            events=console.remaining,
            progress=progress,
        )
    if as_json:
        print_json({"output": str(output), "for": reader, **result.report})
    else:
        models.quantized(result, model, output, reader)
