"""The option ``--architecture`` of commands that read a model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from corequant_cli.commands.panels import EXPERT

__all__ = ["takes_architecture"]

_Option = Annotated[
    Path | None,
    typer.Option(
        "--architecture",
        help="TOML file that describes the model's architecture, or Python file that is run and "
        "leaves an ARCHITECTURE; see 'corequant describe'.",
        metavar="<path>",
        rich_help_panel=EXPERT,
    ),
]


def takes_architecture(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option, whose description is known while the command runs."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def described(*args: Any, architecture: Path | None, **options: Any) -> None:
        if architecture is None:
            command(*args, **options)
            return
        from corequant_transformers.architectures.files import read_architecture, registered

        with registered(read_architecture(architecture)):
            command(*args, **options)

    keyword = inspect.Parameter.KEYWORD_ONLY
    added = inspect.Parameter("architecture", keyword, default=None, annotation=_Option)
    parameters = [*signature.parameters.values(), added]
    described.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    described.__annotations__ = {p.name: p.annotation for p in parameters}
    return described
