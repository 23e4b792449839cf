"""What the command prints for people: safe text, tables and progress bars."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corequant.compiled import CacheFolder

__all__ = [
    "backends",
    "cache",
    "demo",
    "evaluation",
    "fates",
    "inspection",
    "marked",
    "outliers",
    "plain",
    "plan_dict",
    "plan_table",
    "progress",
    "quantized",
    "remaining",
]


# rich takes longer to import than the text of --help takes to print: it is imported when used.
@functools.cache
def _console() -> Any:
    from rich.console import Console

    return Console()


def _table(*columns: Any, **options: Any) -> Any:
    from rich.table import Table

    return Table(*columns, **options)


def _column(name: str, **options: Any) -> Any:
    from rich.table import Column

    return Column(name, **options)


def plain(value: Any) -> str:
    r"""Return a value's text with every character that isn't printable written as an escape.

    These are control characters, those that change the direction of a line, and lone surrogates,
    which stand for undecodable bytes in names of files.

    Examples
    --------
    >>> from corequant_cli.show import plain
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
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callable ``(phase, done, total)`` that draws a bar for each phase on stderr."""
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
    with bars:

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield report


def remaining(event: dict[str, Any]) -> None:
    """Print the remaining time of a run after every fifth step."""
    seconds = event["remaining_seconds"]
    if seconds and event["steps_left"] % 5 == 0:
        minutes, rest = divmod(round(seconds), 60)
        from rich.console import Console

        Console(stderr=True).print(f"about {minutes}:{rest:02d} remaining after {event['step']}")


def fates(rows: list[dict[str, Any]]) -> None:
    """Print a line for each tensor of the model."""
    table = _table("tensor", "shape", "fate")
    for row in rows:
        table.add_row(marked(row["name"]), "×".join(map(str, row["shape"])), row["fate"])
    _console().print(table)


def plan_dict(plan: Any) -> dict[str, Any]:
    """Return a plan as plain values."""
    return {
        "model_type": plan.architecture.model_type,
        "recipe": plan.recipe.to_dict(),
        **plan.cost(),
        "matrices": [
            {
                "name": m.name,
                "shape": list(m.shape),
                "norm": m.norm if plan.folds else None,
                "input_permuted": m.input.permutation is not None,
                "input_rotation": m.input.rotation,
                "online": m.online,
                "output_permuted": m.output.permutation is not None,
                "output_rotation": m.output.rotation,
                "parts": [
                    {
                        "rows": part.rows,
                        "output_permuted": part.output.permutation is not None,
                        "output_rotation": part.output.rotation,
                    }
                    for part in m.slices
                ],
                "quantized": m.quantized,
            }
            for m in plan.matrices
        ],
        "notes": list(plan.notes),
    }


def plan_table(plan: Any) -> None:
    """Print what is done to each kind of matrix."""
    sizes, kind = plan.dimensions, marked(plan.architecture.model_type)
    table = _table(
        _column("matrix", no_wrap=True), "shape", "folds", "reads", "writes", "rounded",
        title=f"{kind}: {sizes.blocks} blocks, hidden {sizes.hidden}, "
        f"intermediate {sizes.intermediate}, head {sizes.head_dim}",
    )  # fmt: skip
    kinds: dict[tuple[tuple[str, int, int], ...], int] = {}
    for i in range(sizes.blocks):
        kinds.setdefault(tuple((m.role, *m.shape) for m in plan.matrices if m.block == i), i)
    for m in plan.matrices:
        # One block of each kind stands for all, and so does one expert.
        if m.expert or (m.block is not None and m.block not in kinds.values()):
            continue
        path = "" if m.block is None else plan.architecture.block.format(m.block) + "."
        table.add_row(
            marked(m.name.removeprefix(path)),
            "×".join(map(str, m.shape)),
            "norm" if plan.folds and m.norm is not None else "",
            _side(m.input, "online " if m.online else ""),
            ", ".join(filter(None, dict.fromkeys(_side(p.output, "") for p in m.row_slices))),
            "yes" if m.quantized else "",
        )
    _console().print(table)
    for note in plan.notes:
        _console().print(f"note: {marked(note)}")
    cost = plan.cost()
    recipe = plan.recipe
    _console().print(f"weights {recipe.weights}, activations {recipe.activations or 'float'}")
    _console().print(
        f"online rotations: {cost['online_rotations']}, "
        f"{cost['online_additions_per_token']:,} additions per token "
        f"({cost['online_share']:.2%} of the linear layers' multiplications), "
        f"{cost['online_bytes_per_token'] / 1024:.0f} KiB read and written\n"
        f"quantized weights: {cost['quantized_mib']:.1f} MiB of {cost['float_mib']:.1f} MiB float; "
        f"peak memory about {cost['peak_mib']:.0f} MiB"
    )
    _console().print(
        f"valid block sizes for {_widths(plan)}: " + ", ".join(map(str, cost["block_sizes"]))
    )


def quantized(result: Any, output: Path) -> None:
    """Print what ``quantize`` did."""
    found = result.verification
    _console().print(
        f"verified before quantizing: logits agree with the float model to "
        f"{found.logits_error:.1e} (float64), {found.matrices_changed} matrices changed, "
        f"{found.rotations_online} online rotations, {found.permutations} permutations"
    )
    _console().print(
        f"saved to {marked(output)} in {result.report['seconds']} s, "
        f"peak memory {result.report['peak_rss_mib']} MiB"
    )


def _roundings(rows: list[dict[str, Any]]) -> None:
    """Print how each layer was rounded, for methods that use its inputs."""
    idle = [row["name"] for row in rows if row.get("unrouted")]
    if idle:
        _console().print(
            f"{len(idle)} layers of experts without calibration tokens were rounded to nearest, "
            f"the first of them {marked(idle[0])}"
        )
    seen = [row for row in rows if row.get("loss") is not None]
    if not seen:
        return
    names = [str(row["name"]).split(".") for row in seen]
    columns = enumerate(zip(*names, strict=False))
    shared = next((k for k, column in columns if len(set(column)) > 1), 0)
    layer, method = (_column(name, overflow="fold") for name in ("layer", "method"))
    heads = ("loss to nearest", "loss", "damping", "dead", "s", "peak MiB")
    table = _table(layer, method, *heads)
    for row, name in zip(seen, names, strict=True):
        damping = row.get("relative_damping")
        again = "" if (row.get("damping_tries") or 1) == 1 else f" (try {row['damping_tries']})"
        table.add_row(
            marked(".".join(name[shared:])),
            marked(row["method"]),
            _figure(row.get("loss_nearest")),
            _figure(row["loss"]),
            "" if damping is None else f"{damping:.2g}{again}",
            str(row.get("dead_columns") or ""),
            f"{row['seconds']:.1f}",
            str(row["peak_rss_mib"]),
        )
    _console().print(table)


def evaluation(model: Path, result: Any) -> None:
    """Print a perplexity."""
    _console().print(
        f"perplexity [bold]{result.perplexity:.3f}[/bold] over {result.predicted} positions "
        f"({result.windows} windows of {result.sequence_length}): {marked(model)}"
    )


def inspection(
    model: Path,
    recipe: Any,
    report: dict[str, Any],
    sizes: dict[str, int],
    compared: int | None,
) -> None:
    """Print recipe, verification, regions and files of a quantized directory."""
    _console().print(f"[bold]{marked(model)}[/bold]")
    _console().print(recipe.to_toml().rstrip(), highlight=False, markup=False)
    found = report.get("verification", {})
    _console().print(
        f"verified: logits to {found['logits_error']:.1e}, "
        f"{marked(found.get('matrices_changed'))} matrices changed"
    )
    regions = report.get("regions", [])
    if regions:
        table = _table("region", "tokens", "largest block mass / mean", "after permutation")
        for row in regions:
            if row.get("unrouted"):
                table.add_row(marked(row["name"]), "0", "no tokens routed to this expert", "")
                continue
            mean = row["mean_block_mass"] or math.nan
            table.add_row(
                marked(row["name"]),
                marked(row.get("tokens", "")),
                f"{row['largest_block_mass'] / mean:.3f}",
                f"{row['largest_block_mass_permuted'] / mean:.3f}",
            )
        _console().print(table)
    _roundings(report.get("matrices", []))
    files = _table("file", "bytes")
    for name, size in sizes.items():
        files.add_row(marked(name), f"{size:,}")
    _console().print(files)
    if compared is not None:
        _console().print(f"{compared} files match their digests")


def outliers(found: Any, page: Path) -> None:
    """Print a line for each layer of an inspected float model."""
    kind = marked(found.model_type)
    table = _table(
        "layer", "δ", "rotated", "both", "full", "balance", "recovery",
        title=f"{kind}, blocks of {found.block_size}: ranges relative to the original "
        "activation",
    )  # fmt: skip
    for layer in found.layers:
        ranges = layer.ranges
        table.add_row(
            marked(_short(layer.name)),
            f"{layer.concentration:.4f}",
            f"{ranges['rotated']:.2f}",
            f"{ranges['permuted and rotated']:.2f}",
            f"{ranges['full rotation']:.2f}",
            f"{layer.balance['identity']:.1f}→{layer.balance['energydiff']:.2f}",
            f"{layer.recovery['energydiff'][0]:.2f}",
        )
    _console().print(table)
    _console().print(f"report: {marked(page)}")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _short(name: str) -> str:
    return name.removeprefix("model.layers.")


def demo(result: Any) -> None:
    """Print the demo's table and the best model's text."""
    table = _table("rotation", "permutation", "perplexity", "recovery")
    for row in result.rows:
        recovery = "" if row.recovery is None else f"{row.recovery:.3f}"
        table.add_row(row.rotation, row.permutation, f"{row.perplexity:.2f}", recovery)
    _console().print(table)
    _console().print(
        f"recovery = perplexity of the full-vector rotation / perplexity; "
        f"INT4 weights and activations\nbest: {result.best}, saved to {marked(result.output)} "
        f"and loaded again; it generates:\n[italic]{marked(result.sentence)}[/italic]"
    )


def cache(folders: Sequence[CacheFolder]) -> None:
    """Print folders of compiled code."""
    for folder in folders:
        _console().print(marked(folder), soft_wrap=True)


def backends(rows: dict[str, dict[str, str]]) -> None:
    """Print one line for each backend."""
    table = _table("backend", "what it has")
    for name, found in rows.items():
        table.add_row(marked(name), marked(", ".join(f"{k} {v}" for k, v in found.items())))
    _console().print(table)


def _widths(plan: Any) -> str:
    if plan.recipe.rotation == "online":
        return "all rotated widths"
    return f"intermediate {plan.dimensions.intermediate}"


def _side(side: Any, prefix: str) -> str:
    permuted = "permuted, " if side.permutation is not None else ""
    if side.rotation is None:
        return permuted.rstrip(", ")
    return f"{permuted}{prefix}rotated {side.rotation}"
