"""Results of inspections, in sentences and tables that fit 60 columns."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corequant_cli.tables.console import column, console, counted, marked, plain, table
from corequant_cli.tables.data import taken

__all__ = ["comparison", "inspection", "layers", "outliers"]

_MOST_ROWS = 24

_LOSSES = (
    "loss: squared error of a layer's outputs without the part that no rounding can change, so it "
    "may be negative; lower is better."
)

_RARE = {"shared": "for all tokens of their layer", "nearest": "to nearest"}


def _rare(row: dict[str, Any]) -> str | None:
    """Return how an expert with few tokens was rounded; older reports name those without any."""
    found: str | None = row.get("rare", "nearest" if row.get("unrouted") else None)
    return found


def _roundings(rows: list[dict[str, Any]]) -> None:
    """Print how each layer was rounded, for methods that use its inputs."""
    for how, words in _RARE.items():
        found = [row["name"] for row in rows if _rare(row) == how]
        if found:
            console().print(
                f"{len(found)} layers of experts with few calibration tokens were rounded {words}, "
                f"the first of them {marked(found[0])}"
            )
    seen = [row for row in rows if row.get("loss") is not None]
    if not seen:
        return
    methods = sorted({row["method"] for row in seen})
    title, most = f"{counted(len(seen), 'layer')} rounded by {', '.join(methods)}", seen
    if len(seen) > _MOST_ROWS:
        title += "; those that lose most"
        most = sorted(seen, key=lambda row: -row["loss"])[:_MOST_ROWS]
    console().print(f"{marked(title)}:", highlight=False)
    names, several = _short_names(seen), ("method",) if len(methods) > 1 else ()
    grid = _plain_table("layer", *several, "nearest", "loss", "damping", "dead", "s")
    for row in most:
        damping = row.get("relative_damping")
        again = "" if (row.get("damping_tries") or 1) == 1 else f" (try {row['damping_tries']})"
        grid.add_row(
            marked(names[row["name"]]),
            *(marked(row["method"]) for _ in several),
            _figure(row.get("loss_nearest")),
            _figure(row["loss"]),
            "" if damping is None else f"{damping:.2g}{again}",
            str(row.get("dead_columns") or ""),
            f"{row['seconds']:.1f}",
        )
    console().print(grid)
    if len(seen) > len(most):
        console().print(f"and {len(seen) - len(most)} more that lose less: --json has them all")
    console().print(f"nearest: what rounding to nearest loses. {_LOSSES}")


def _regions(rows: list[dict[str, Any]]) -> None:
    """Print how evenly blocks share the mass of what is permuted, the heaviest first."""
    lonely = [row for row in rows if row.get("mean_block_mass") is None]
    if lonely:
        console().print(
            f"{counted(len(lonely), 'region')} with too few tokens routed to their expert, the "
            f"first of them {marked(lonely[0]['name'])} with {marked(lonely[0].get('tokens', 0))}"
        )
    known = [row for row in rows if row.get("mean_block_mass") is not None]
    whole = [row for row in known if row["largest_block_mass"] == row["mean_block_mass"]]
    if whole:
        console().print(
            f"{counted(len(whole), 'region')} with one block for all channels: nothing to balance"
        )
    split = [row for row in known if row["largest_block_mass"] != row["mean_block_mass"]]
    if not split:
        return

    def before(row: dict[str, Any]) -> float:
        return float(row["largest_block_mass"] / (row["mean_block_mass"] or math.nan))

    console().print("largest mass of a block over the mean, before and after permuting:")
    grid = _plain_table("region", "tokens", "before", "after")
    names = _short_names(split)
    for row in sorted(split, key=lambda row: -before(row))[:_MOST_ROWS]:
        after = row["largest_block_mass_permuted"] / (row["mean_block_mass"] or math.nan)
        tokens = marked(row.get("tokens", ""))
        grid.add_row(marked(names[row["name"]]), tokens, f"{before(row):.3f}", f"{after:.3f}")
    console().print(grid)
    if len(split) > _MOST_ROWS:
        rest = len(split) - _MOST_ROWS
        console().print(f"and {rest} more that are more even: --json has them all")


def inspection(
    model: Path,
    recipe: Any,
    report: dict[str, Any],
    sizes: dict[str, int],
    compared: int | None,
) -> None:
    """Print recipe, verification, regions and files of a quantized directory."""
    console().print(f"[bold]{marked(model)}[/bold]")
    # To be copied: wrapped by the terminal alone.
    console().print(recipe.to_toml().rstrip(), highlight=False, markup=False, soft_wrap=True)
    if "calibration" in report:
        taken("calibrated on", report["calibration"])
    found = report.get("verification", {})
    console().print(
        f"verified: logits to {found['logits_error']:.1e}, "
        f"{marked(found.get('matrices_changed'))} matrices changed"
    )
    _regions(report.get("regions", []))
    _roundings(report.get("matrices", []))
    files = table("file", "bytes")
    for name, size in sizes.items():
        files.add_row(marked(name), f"{size:,}")
    console().print(files)
    if compared is not None:
        console().print(f"{compared} files match their digests")


def outliers(found: Any, advice: Any, page: Path) -> None:
    """Print what an inspected float model's layers read, the words first."""
    console().print(f"[bold]{marked(found.name)}[/bold]")
    _advice(advice, "")
    console().print(f"Inputs of the rotated layers, blocks of {found.block_size}:", highlight=False)
    grid = _plain_table(
        "layer", "δ", "peak", "mass", "after", "rotated", "both", "full",
    )  # fmt: skip
    names = _short([layer.name for layer in found.layers])
    for name, layer in zip(names, found.layers, strict=True):
        ranges, mass = layer.ranges, layer.block_mass
        grid.add_row(
            marked(name),
            f"{layer.concentration:.3f}",
            f"{layer.outlier:.3g}",
            f"{mass['identity']:.2f}",
            f"{mass['energydiff']:.2f}",
            f"{ranges['rotated']:.2f}",
            f"{ranges['permuted and rotated']:.2f}",
            f"{ranges['full rotation']:.2f}",
        )
    console().print(grid)
    console().print(
        "peak: largest channel over the median; mass: heaviest block over the mean, before and "
        "after EnergyDiff; range of a token over that of the original: blocks rotated, permuted "
        "and rotated, and full rotation",
        highlight=False,
    )
    console().print(f"report: {marked(page)}")


def layers(model: str, against: Path, found: Any, advice: Any, recipe: Path) -> None:
    """Print what each layer of a quantized model does alone, the words first."""
    console().print(f"[bold]{marked(model)}[/bold] against {marked(against)}")
    paths = (shlex.quote(str(path)) for path in (against, recipe))
    command = "corequant quantize {} -o NEW --recipe {}".format(*paths)
    _advice(advice, command)
    worst = sorted(found.layers, key=lambda layer: -layer.kl)
    inputs = any(layer.activations is not None for layer in found.layers)
    heads = ["KL·10³", "error", "clipped", "MB"]
    if inputs:
        heads[2:2] = ["weight"]
    grid = _plain_table("layer alone", *heads)
    names = _short([layer.name for layer in worst])
    for name, layer in list(zip(names, worst, strict=True))[:_MOST_ROWS]:
        clipped = f"{layer.weights_clipped:.1%}"
        if layer.activations_clipped is not None:
            clipped += f" {layer.activations_clipped:.1%}"
        cells = [f"{1000 * layer.kl:.3g}", f"{layer.output_error:.1%}", clipped]
        if inputs:
            cells.insert(2, f"{layer.weight_share:.0%}")
        grid.add_row(marked(name), *cells, f"{layer.kept_bytes / 1e6:+.2f}")
    console().print(grid)
    if len(worst) > _MOST_ROWS:
        console().print(f"and {len(worst) - _MOST_ROWS} more that do less: --json has them all")
    share = "weight: share of the squared error that the weight makes; " if inputs else ""
    which = "weights and inputs" if inputs else "weights"
    console().print(
        f"error: of the layer's outputs; {share}clipped: {which} beyond the grid; MB: what keeping "
        "it costs",
        highlight=False,
    )
    _experts(found)


def _experts(found: Any) -> None:
    for layer in found.layers:
        if len(layer.layers) > 1 and layer.name.startswith("re:") and len(layer.tokens) > 2:
            idle = sum(count == 0 for count in layer.tokens)
            console().print(
                f"{marked(layer.name)}: {len(layer.tokens)} experts, {min(layer.tokens)} to "
                f"{max(layer.tokens)} tokens each, {idle} without any",
                highlight=False,
            )


def comparison(paths: Sequence[Path], found: Any, errors: Sequence[Any]) -> None:
    """Print what differs between two runs."""
    for letter, path, size, seconds in zip("AB", paths, found.bytes, found.seconds, strict=True):
        took = "" if seconds is None else f", {seconds:.0f} s"
        console().print(
            f"[bold]{letter}[/bold] {marked(path)}: {size / 1e6:.1f} MB{took}", highlight=False
        )
    if found.sources[0] != found.sources[1]:
        first, second = (marked(source or "a model in memory") for source in found.sources)
        console().print(f"made from different models: {first} and {second}")
    if not found.recipe:
        console().print("the recipes are equal")
    for key, (one, two) in found.recipe.items():
        console().print(f"{key}: {marked(_value(one))} → {marked(_value(two))}", highlight=False)
    if errors:
        one, two = errors
        console().print(
            f"KL from the float model: {one.kl:.4f} → {two.kl:.4f} nats per token", highlight=False
        )
        pairs = {layer.name: (1000 * layer.kl, None) for layer in one.layers}
        for layer in two.layers:
            pairs[layer.name] = (pairs.get(layer.name, (None,))[0], 1000 * layer.kl)
        _pairs("KL·10³ of each layer alone", pairs)
    elif "activations" in found.recipe:
        console().print(
            "What layers lose can't be compared where activations differ, since no rounding of "
            "weights changes their part: --against FLOAT measures each layer."
        )
    elif found.losses:
        _pairs("loss of each layer on the calibration text", found.losses)
        console().print(_LOSSES)


def _pairs(title: str, rows: dict[str, Any]) -> None:
    """Print two numbers of each layer, those that differ most first."""

    def change(name: str) -> float:
        one, two = rows[name]
        return math.inf if None in (one, two) else abs(two - one)

    names = sorted(rows, key=change, reverse=True)
    console().print(f"{title}:", highlight=False)
    grid = _plain_table("layer", "A", "B")
    for name, short in list(zip(names, _short(names), strict=True))[:_MOST_ROWS]:
        one, two = rows[name]
        grid.add_row(marked(short), _figure(one), _figure(two))
    console().print(grid)
    if len(names) > _MOST_ROWS:
        console().print(f"and {len(names) - _MOST_ROWS} more that differ less: --json has them all")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _advice(advice: Any, command: str) -> None:
    """Print what an inspection comes to; ``command`` is what ``--keep`` is to be given to."""
    console().print(marked(advice.summary), highlight=False)
    for number, reason in enumerate(advice.reasons, 1):
        console().print(f"{number}. {marked(reason)}", highlight=False)
    from rich.padding import Padding

    console().print("What helps:")
    for option, effect in advice.options:
        text = f"{command} {option}" if option.startswith("--keep") and command else option
        parts = [text] if len(text) <= console().width - 2 else text.split(" --")
        lines = [parts[0], *(f"  --{part}" for part in parts[1:])]
        for k, line in enumerate(lines, 1):
            # As it is, and wrapped by the terminal if need be, so that it can be copied.
            shown = f"  {plain(line)}" + (" \\" if k < len(lines) else "")
            console().print(shown, markup=False, highlight=False, soft_wrap=True, style="bold")
        console().print(Padding(marked(effect), (0, 0, 0, 6)), highlight=False)


def _plain_table(first: str, *numbers: str, **options: Any) -> Any:
    columns = [column(name, justify="right", no_wrap=True) for name in numbers]
    options = {"box": None, "pad_edge": False, "title_justify": "left", **options}
    return table(column(first, overflow="fold"), *columns, **options)


def _short(names: Sequence[str], *, ends: bool = False) -> list[str]:
    """Return names without the parts that all of them begin and, unless ``ends``, end with.

    Examples
    --------
    >>> from corequant_cli.tables.inspections import _short
    >>> _short(["model.layers.0.mlp.down", "model.layers.1.mlp.down"])
    ['0', '1']
    """
    parts = [name.removeprefix("re:").replace("\\.", ".").split(".") for name in names]
    if len(parts) < 2:
        return list(names)
    first = _shared(parts)
    last = 0 if ends else _shared([row[first:][::-1] for row in parts])
    return [".".join(row[first : len(row) - last]) or ".".join(row) for row in parts]


def _short_names(rows: list[dict[str, Any]]) -> dict[str, str]:
    names = [str(row["name"]) for row in rows]
    return dict(zip(names, _short(names, ends=True), strict=True))


def _shared(rows: list[list[str]]) -> int:
    least = min(len(row) for row in rows) - 1
    return next((k for k in range(least) if len({row[k] for row in rows}) > 1), max(0, least))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
