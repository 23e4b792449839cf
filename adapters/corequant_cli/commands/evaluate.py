"""``corequant evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corequant_cli.commands.arguments import Device, Json, Length, Verify, load_adapter, print_json
from corequant_cli.commands.options import read_option
from corequant_cli.tables import console, models

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[Path, typer.Argument(help="Quantized or float model.")],
    text: Annotated[Path, typer.Option(help="Text file (UTF-8).")],
    windows: Annotated[
        int | None, typer.Option(help="Number of windows to evaluate; all by default.", min=1)
    ] = None,
    sequence_length: Length = 2048,
    device: Device = "cpu",
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Measure perplexity over consecutive windows of a text."""
    words = read_option("text", text)
    import corequant_transformers as cqhf

    load_adapter()
    from corequant_transformers.checkpoint.reader import is_quantized
    from corequant_transformers.model.surroundings import check_device

    where = check_device(device)
    source = None if is_quantized(model) else cqhf.Source(model, verify=verify)
    tokenizer = source.tokenizer() if source else cqhf.load_tokenizer(model, verify=verify)
    tokens = cqhf.token_windows(words, tokenizer, sequence_length, windows)
    loaded = (source.load() if source else cqhf.load(model, verify=verify)).to(where)
    with console.progress() as progress:
        result = cqhf.evaluate(
            loaded, tokens, progress=lambda done, total: progress("evaluate", done, total)
        )
    if as_json:
        print_json({"model": str(model), **result.to_dict()})
    else:
        models.evaluation(model, result)
