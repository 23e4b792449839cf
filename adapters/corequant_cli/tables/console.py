"""Text that is safe for a terminal, tables, and progress bars."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["column", "console", "counted", "marked", "plain", "progress", "remaining", "table"]


# rich takes longer to import than the text of --help takes to print: it is imported when used.
@functools.cache
def console() -> Any:
    """Return the console of standard output."""
    from rich.console import Console

    return Console()


def table(*columns: Any, **options: Any) -> Any:
    """Return an empty table of rich."""
    from rich.table import Table

    return Table(*columns, **options)


def column(name: str, **options: Any) -> Any:
    """Return a column of a table."""
    from rich.table import Column

    return Column(name, **options)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def plain(value: Any) -> str:
    r"""Return a value's text with every character that isn't printable written as an escape.

    These are control characters, those that change the direction of a line, and lone surrogates,
    which stand for undecodable bytes in names of files.

    Examples
    --------
    >>> from corequant_cli.tables.console import plain
    >>> print(plain("a\x1b[31mb\u202e"))
    a\x1b[31mb\u202e
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def marked(value: Any) -> str:
    """Return ``plain`` text with square brackets escaped for rich."""
    from rich.markup import escape

    return escape(plain(value))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


@contextmanager
def progress(note: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callable ``(phase, done, total)`` that draws a bar for each phase on stderr.

    Parameters
    ----------
    note : str
        Printed above the bars when the first of them begins.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bars = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    tasks: dict[str, Any] = {}

    def report(phase: str, done: int, total: int) -> None:
        if not tasks:
            # What is refused at once shows no empty bars.
            if note:
                bars.console.print(note)
            bars.start()
        if phase not in tasks:
            tasks[phase] = bars.add_task(phase, total=total)
        bars.update(tasks[phase], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()


def remaining(event: dict[str, Any]) -> None:
    """Print the remaining time of a run after every fifth step."""
    seconds = event["remaining_seconds"]
    if seconds and event["steps_left"] % 5 == 0:
        minutes, rest = divmod(round(seconds), 60)
        from rich.console import Console

        Console(stderr=True).print(f"about {minutes}:{rest:02d} remaining after {event['step']}")
