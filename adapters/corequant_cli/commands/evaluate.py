"""``corequant evaluate``."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from corequant.errors import CorequantError
from corequant_cli.commands.architectures import takes_architecture
from corequant_cli.commands.arguments import (
    AnyModel,
    Device,
    Json,
    Length,
    TextFiles,
    Verify,
    load_adapter,
    print_json,
    read_data,
)
from corequant_cli.commands.panels import WHAT, WHERE
from corequant_cli.tables import console, data, evaluations

__all__ = ["evaluate"]

Against = Annotated[
    Path | None,
    typer.Option(
        help="Float model to compare with, usually the one that MODEL was made from.",
        metavar="<path>",
        rich_help_panel=WHAT,
    ),
]
Tasks = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="<path>",
        rich_help_panel=WHAT,
        help="JSON lines of zero-shot questions, multiple choice or minimal pairs; may be "
        "repeated.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        help="Number of questions of each task, from the first; all by default.",
        min=1,
        metavar="<int>",
        rich_help_panel=WHAT,
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(
        help="Number of windows to evaluate; all by default.",
        min=1,
        metavar="<int>",
        rich_help_panel=WHAT,
    ),
]
Record = Annotated[
    bool,
    typer.Option(
        help="Write the figures into a quantized directory's report and model card.",
        rich_help_panel=WHERE,
    ),
]


@takes_architecture
def evaluate(
    model: AnyModel,
    text: TextFiles = None,
    against: Against = None,
    tasks: Tasks = None,
    limit: Limit = None,
    windows: Windows = None,
    sequence_length: Length = 2048,
    device: Device = "cpu",
    verify: Verify = True,
    record: Record = True,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, distance to the float model, and zero-shot accuracy.

    Perplexity is that of consecutive windows. --against adds the Kullback-Leibler divergence from
    the float model, in nats per token, and how often both predict the same. What --tasks names may
    have the fields of HellaSwag or BLiMP, or query, choices and gold. A directory that quantize
    wrote keeps what was measured last in its report and its model card.
    """
    if not text and not tasks:
        raise typer.BadParameter("--text or --tasks must be given")
    documents = read_data(text) if text else None
    import corequant_transformers as cqhf

    questions = [cqhf.read_task(path, limit) for path in tasks or ()]
    load_adapter()
    from corequant_transformers.model.surroundings import check_device

    where = check_device(device)
    read_tokenizer, load = _opened(model, verify)
    tokenizer = read_tokenizer()
    sample = None
    if documents is not None:
        sample = cqhf.sample_windows(documents, tokenizer, sequence_length, windows)
    other = None if against is None else _opened(against, verify)[1]
    loaded = load().to(where)
    reference = None if other is None else other().to(where)
    found: dict[str, Any] = {"model": str(model)}
    if against is not None:
        found["against"] = str(against)
    measured, results = None, []
    with console.progress() as progress:
        if sample is not None:
            measured = cqhf.evaluate(
                loaded,
                sample.tokens,
                against=reference,
                progress=lambda done, total: progress("evaluate", done, total),
            )
        if questions:
            results = cqhf.evaluate_tasks(
                loaded, questions, tokenizer, against=reference, progress=progress
            )
    if as_json:
        found |= {} if measured is None else measured.to_dict()
        found |= {} if sample is None else {"data": sample.to_dict()}
        if questions:
            found["tasks"] = [result.to_dict() for result in results]
        print_json(found)
    else:
        if sample is not None:
            data.taken("evaluated on", sample.to_dict())
        evaluations.evaluation(model, against, measured, results)
    if record:
        _record(model, against, sample, measured, results, quiet=as_json)


def _record(
    model: Path,
    against: Path | None,
    sample: Any,
    measured: Any,
    results: list[Any],
    *,
    quiet: bool,
) -> None:
    """Write what was measured where it belongs; what was printed is not lost if that fails."""
    from corequant_transformers.checkpoint.figures import flat
    from corequant_transformers.checkpoint.record import record_evaluation, records

    if not records(model):
        return
    files = [] if sample is None else [file.name for file in sample.documents.files]
    values = flat(
        None if measured is None else measured.to_dict(),
        [result.to_dict() for result in results],
        text=", ".join(files),
        against=_name(against),
    )
    try:
        card = record_evaluation(model, values)
    except CorequantError as error:
        warnings.warn(f"the figures were not recorded (--no-record): {error}", stacklevel=2)
        return
    if not quiet:
        evaluations.recorded(model, card)


def _name(path: Path | None) -> str:
    """Return a model's own name, or its id, without the folders that it is in."""
    if path is None:
        return ""
    return path.resolve().name if path.exists() else path.as_posix()


def _opened(path: Path, verify: bool) -> tuple[Any, ...]:
    """Return what loads a model's tokenizer, and what loads the model."""
    import corequant_transformers as cqhf
    from corequant_transformers.checkpoint.reader import is_quantized

    if is_quantized(path):
        return tuple(partial(f, path, verify=verify) for f in (cqhf.load_tokenizer, cqhf.load))
    source = cqhf.Source(path, verify=verify)
    return source.tokenizer, source.load
