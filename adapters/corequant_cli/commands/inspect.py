"""``corequant inspect``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from corequant_cli.commands.architectures import takes_architecture
from corequant_cli.commands.arguments import (
    Json,
    Verify,
    load_adapter,
    print_json,
    read_data,
)
from corequant_cli.commands.panels import QUALITY, WHAT, WHERE
from corequant_cli.tables import console, data, inspections

__all__ = ["inspect"]


def _number(text: str, least: int) -> Any:
    return typer.Option(help=text, min=least, metavar="<int>", rich_help_panel=QUALITY)


@takes_architecture
def inspect(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL [OTHER]",
            help="Quantized or float model, or the id of one in the local Hugging Face cache; two "
            "quantized ones are compared.",
            show_default=False,
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            help="Float model that MODEL was made from, to measure each layer against.",
            metavar="<path>",
            rich_help_panel=WHAT,
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to run on, as for quantize --calibration; defaults to the text that comes "
            "with the package.",
            metavar="<path>",
            rich_help_panel=WHAT,
        ),
    ] = None,
    keep: Annotated[int, _number("Number of layers to name.", 1)] = 3,
    block_size: Annotated[
        int, _number("Block length of the rotations to try on a float model.", 1)
    ] = 16,
    windows: Annotated[
        int | None,
        _number(
            "Number of windows of text, of which a float model's last is held out; 3 for a float "
            "model, 2 with --against.",
            2,
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        _number("Tokens per window; 2048 for a float model, 256 with --against.", 2),
    ] = None,
    report: Annotated[
        Path,
        typer.Option(help="HTML report on a float model.", metavar="<path>", rich_help_panel=WHERE),
    ] = Path("inspection.html"),
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Show which layers hurt, why, and which options help, or how a directory was quantized.

    For a float model: the effect of outliers on the inputs of its layers. For a quantized one with
    --against FLOAT: error and KL divergence of each layer alone, what is clipped, and the layers
    worth keeping in float. For two quantized ones: their differences.
    """
    if len(models) > 2:
        raise typer.BadParameter(f"inspect takes one or two models, got {len(models)}")
    documents = read_data(text)
    load_adapter()
    from corequant_transformers.checkpoint.reader import is_quantized
    from corequant_transformers.files.hub import locate

    given, models = models, [locate(model) for model in models]
    quantized = [is_quantized(model) for model in models]
    if not all(quantized) and (against is not None or len(models) > 1):
        what = "--against needs" if len(models) == 1 else "two models must both be"
        other = given[quantized.index(False)]
        hint = ""
        if len(models) == 2 and any(quantized):
            hint = f"; to compare with a float model: --against {other}"
        raise typer.BadParameter(f"{what} directories that quantize wrote, got {other}{hint}")

    def measure(model: Path) -> tuple[Any, Any]:
        shape = (sequence_length or 256, windows or 2)
        return _layer_errors(model, against, documents, shape, keep, verify)

    if len(models) == 2:
        _compare(given, models, against, measure, as_json)
    elif against is not None:
        _inspect_layers(given[0], models[0], against, measure, as_json)
    elif quantized[0]:
        _inspect_quantized(models[0], verify, as_json)
    else:
        shape = (sequence_length or 2048, windows or 3)
        _inspect_float(models[0], documents, shape, block_size, report, verify, as_json)


def _inspect_float(
    model: Path,
    documents: Any,
    shape: tuple[int, int],
    block_size: int,
    report: Path,
    verify: bool,
    as_json: bool,
) -> None:
    import corequant_transformers as cqhf
    from corequant_transformers.inspection.html import check_report_output
    from corequant_transformers.inspection.words import outlier_advice

    source, page = cqhf.Source(model, verify=verify), check_report_output(report)
    sample = cqhf.sample_windows(documents, source.tokenizer(), *shape)
    with console.progress() as progress:
        found = cqhf.inspect(source.load(), sample.tokens, block_size, progress=progress)
    found = replace(found, name=source.name)
    page = cqhf.write_report(found, page)
    advice = outlier_advice(found)
    if as_json:
        shown = {"model": str(model), "report": str(page), "advice": advice.to_dict()}
        print_json({**shown, **found.to_dict(), "data": sample.to_dict()})
    else:
        data.taken("inspected on", sample.to_dict())
        inspections.outliers(found, advice, page)


def _layer_errors(
    model: Path,
    against: Path | None,
    documents: Any,
    shape: tuple[int, int],
    keep: int,
    verify: bool,
) -> tuple[Any, Any]:
    """Return what each layer does, and the sample that it was measured on."""
    import corequant_transformers as cqhf

    assert against is not None
    source = cqhf.Source(against, verify=verify)
    tokenizer = cqhf.load_tokenizer(model, verify=verify)
    sample = cqhf.sample_windows(documents, tokenizer, *shape)
    with console.progress() as progress:
        found = cqhf.layer_errors(
            model, source.load(), sample.tokens, keep=keep, verify=verify, progress=progress
        )
    return found, sample


def _inspect_layers(
    given: Path,
    model: Path,
    against: Path,
    measure: Callable[[Path], tuple[Any, Any]],
    as_json: bool,
) -> None:
    from corequant_transformers.inspection.words import layer_advice

    found, sample = measure(model)
    advice = layer_advice(found)
    if as_json:
        shown = {"model": str(given), "against": str(against), "advice": advice.to_dict()}
        print_json({**shown, **found.to_dict(), "data": sample.to_dict()})
    else:
        data.taken("inspected on", sample.to_dict())
        inspections.layers(str(given), against, found, advice, model / "recipe.toml")


def _compare(
    given: list[Path],
    models: list[Path],
    against: Path | None,
    measure: Callable[[Path], tuple[Any, Any]],
    as_json: bool,
) -> None:
    import corequant_transformers as cqhf

    found = cqhf.compare_runs(*models)
    errors = [] if against is None else [measure(model)[0] for model in models]
    if as_json:
        shown: dict[str, Any] = {"models": [str(model) for model in given], **found.to_dict()}
        if errors:
            shown |= {"against": str(against), "errors": [each.to_dict() for each in errors]}
        print_json(shown)
    else:
        inspections.comparison(given, found, errors)


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
        inspections.inspection(model, recipe, report, sizes, compared)
