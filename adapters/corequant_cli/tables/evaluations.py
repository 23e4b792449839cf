"""Results of evaluations: on a text, against the float model, and on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corequant_cli.tables.console import column, console, counted, marked, table

__all__ = ["evaluation", "recorded"]


def evaluation(model: Path, against: Path | None, measured: Any, tasks: list[Any]) -> None:
    """Print what was measured, each figure with its standard error."""
    if measured is not None and measured.divergence is None:
        value = _with_error(measured.perplexity, measured.perplexity_se, 3)
        console().print(
            f"perplexity [bold]{value}[/bold] over {measured.predicted} positions "
            f"({counted(measured.windows, 'window')} of {measured.sequence_length}): "
            f"{marked(model)}"
        )
    else:
        beside = "" if against is None else f" against {marked(against)}"
        console().print(f"[bold]{marked(model)}[/bold]{beside}")
    if measured is not None and measured.divergence is not None:
        _divergence(measured)
    if tasks:
        _tasks(tasks)


def recorded(folder: Path, card: bool) -> None:
    """Say that figures were written into a directory, and whether its card has them."""
    if card:
        told = "written into report.json and the model card, README.md, of"
    else:
        told = "written into report.json, not into README.md, which was changed, of"
    console().print(f"{told} {marked(folder)}", highlight=False)


def _divergence(measured: Any) -> None:
    from corequant_transformers.checkpoint.figures import figures

    grid = _table("", "value", "±")
    for row in figures(measured.to_dict()):
        grid.add_row(row.name, row.value, row.error)
    console().print(grid)
    several = measured.perplexity_se is not None
    console().print(
        f"{counted(measured.windows, 'window')} of {measured.sequence_length} tokens; "
        + ("± is a standard error, over windows" if several else "more have a standard error, too"),
        highlight=False,
    )


def _tasks(tasks: list[Any]) -> None:
    paired = any(task.acc.comparison is not None for task in tasks)
    heads = ("model %", "float %", "difference", "p") if paired else ("model %", "±")
    for task in tasks:
        console().print(f"{marked(task.name)}: {task.count} questions, {task.kind}")
        grid = _table("", *heads)
        for name, accuracy in (("acc", task.acc), ("acc_norm", task.acc_norm)):
            if accuracy is not None:
                grid.add_row(f"  {name}", *_accuracy(accuracy))
        console().print(grid)
    console().print(
        "± is a standard error over questions"
        + ("; p: McNemar's exact test on the same questions" if paired else ""),
        highlight=False,
    )


def _accuracy(accuracy: Any) -> list[str]:
    value, error = _percent(accuracy.value, accuracy.se)
    found = accuracy.comparison
    if found is None:
        return [f"{value:.2f}", _error(error, 2)]
    difference, spread = _percent(found.difference, found.difference_se)
    return [
        _with_error(value, error, 2),
        f"{100 * accuracy.reference:.2f}",
        f"{difference:+.2f}" + ("" if spread is None else f" ±{spread:.2f}"),
        f"{found.p:.2g}",
    ]


def _table(first: str, *others: str) -> Any:
    numbers = [column(name, justify="right", no_wrap=True) for name in others]
    return table(first, *numbers, box=None, pad_edge=False)


def _percent(value: float, error: float | None) -> tuple[float, float | None]:
    return 100 * value, None if error is None else 100 * error


def _error(error: float | None, digits: int) -> str:
    return "" if error is None else f"{error:.{digits}f}"


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ±{error:.{digits}f}")
