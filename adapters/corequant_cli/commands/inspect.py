"""``corequant inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corequant_cli.commands.arguments import (
    AnyModel,
    Json,
    Length,
    Verify,
    load_adapter,
    print_json,
    read_data,
)
from corequant_cli.tables import console, data, models

__all__ = ["inspect"]


def inspect(
    model: AnyModel,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to run a float model on, as for quantize --calibration; by default the text "
            "that the package carries."
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Block length to analyze.")] = 16,
    windows: Annotated[
        int, typer.Option(help="Number of windows of text; the last is held out.", min=2)
    ] = 3,
    sequence_length: Length = 2048,
    report: Annotated[Path, typer.Option(help="HTML report on a float model.")] = Path(
        "inspection.html"
    ),
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Show how a directory was quantized, or a float model's outliers."""
    documents = read_data(text)
    import corequant_transformers as cqhf

    load_adapter()
    from corequant_transformers.checkpoint.reader import is_quantized
    from corequant_transformers.files.hub import locate
    from corequant_transformers.inspection.html import check_report_output

    model = locate(model)
    if is_quantized(model):
        _inspect_quantized(model, verify, as_json)
        return
    source, page = cqhf.Source(model, verify=verify), check_report_output(report)
    sample = cqhf.sample_windows(documents, source.tokenizer(), sequence_length, windows)
    with console.progress() as progress:
        found = cqhf.inspect(source.load(), sample.tokens, block_size, progress=progress)
    page = cqhf.write_report(found, page)
    if as_json:
        shown = {"model": str(model), "report": str(page), **found.to_dict()}
        print_json({**shown, "data": sample.to_dict()})
    else:
        data.taken("inspected on", sample.to_dict())
        models.outliers(found, page)


def _inspect_quantized(model: Path, verify: bool, as_json: bool) -> None:
    from corequant_transformers import check_digests
    from corequant_transformers.checkpoint.reader import read_recipe
    from corequant_transformers.checkpoint.reports import read_report
    from corequant_transformers.files.digests import warn_of_none

    recipe, report = read_recipe(model), read_report(model)
    compared = check_digests(model) if verify else None
    if verify and compared is None:
        warn_of_none(model)
    sizes = {f.name: f.stat().st_size for f in sorted(model.iterdir()) if f.is_file()}
    if as_json:
        print_json({"model": str(model), "files": sizes, **report})
    else:
        models.inspection(model, recipe, report, sizes, compared)
