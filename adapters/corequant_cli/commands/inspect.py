"""``corequant inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corequant_cli.commands.arguments import Json, Length, Verify, load_adapter, print_json
from corequant_cli.commands.options import read_option
from corequant_cli.tables import console, models

__all__ = ["inspect"]


def inspect(
    model: Annotated[Path, typer.Argument(help="Quantized or float model.")],
    text: Annotated[
        Path | None,
        typer.Option(help="Text file to run a float model on; Python's help topics by default."),
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
    given = None if text is None else read_option("text", text)
    import corequant_transformers as cqhf

    load_adapter()
    from corequant_cli.commands.demonstration import help_topics
    from corequant_transformers.checkpoint.reader import is_quantized
    from corequant_transformers.inspection.html import check_report_output

    if is_quantized(model):
        _inspect_quantized(model, verify, as_json)
        return
    source, page = cqhf.Source(model, verify=verify), check_report_output(report)
    words = help_topics() if given is None else given
    tokens = cqhf.token_windows(words, source.tokenizer(), sequence_length, windows)
    with console.progress() as progress:
        found = cqhf.inspect(source.load(), tokens, block_size, progress=progress)
    page = cqhf.write_report(found, page)
    if as_json:
        print_json({"model": str(model), "report": str(page), **found.to_dict()})
    else:
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
