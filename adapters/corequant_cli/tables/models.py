"""What was done to a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from corequant_cli.tables.console import column, console, marked, table
from corequant_cli.tables.data import taken

__all__ = ["demo", "inspection", "outliers", "quantized"]


def quantized(result: Any, output: Path) -> None:
    """Print what ``quantize`` did."""
    found = result.verification
    taken("calibrated on", result.report["calibration"])
    console().print(
        f"verified before quantizing: logits agree with the float model to "
        f"{found.logits_error:.1e} (float64), {found.matrices_changed} matrices changed, "
        f"{found.rotations_online} online rotations, {found.permutations} permutations"
    )
    console().print(
        f"saved to {marked(output)} in {result.report['seconds']} s, "
        f"peak memory {result.report['peak_rss_mib']} MiB"
    )


_LOSSES = (
    "loss: squared error of a layer's outputs without the part that no rounding can change, so it "
    "may be negative; beside that of rounding to nearest. Lower is better."
)


def _roundings(rows: list[dict[str, Any]]) -> None:
    """Print how each layer was rounded, for methods that use its inputs."""
    idle = [row["name"] for row in rows if row.get("unrouted")]
    if idle:
        console().print(
            f"{len(idle)} layers of experts without calibration tokens were rounded to nearest, "
            f"the first of them {marked(idle[0])}"
        )
    seen = [row for row in rows if row.get("loss") is not None]
    if not seen:
        return
    names = [str(row["name"]).split(".") for row in seen]
    columns = enumerate(zip(*names, strict=False))
    shared = next((k for k, column in columns if len(set(column)) > 1), 0)
    layer, method = (column(name, overflow="fold") for name in ("layer", "method"))
    heads = ("loss, nearest", "loss", "damping", "dead", "s", "MiB")
    grid = table(layer, method, *heads, box=None, padding=(0, 1, 0, 0))
    for row, name in zip(seen, names, strict=True):
        damping = row.get("relative_damping")
        again = "" if (row.get("damping_tries") or 1) == 1 else f" (try {row['damping_tries']})"
        grid.add_row(
            marked(".".join(name[shared:])),
            marked(row["method"]),
            _figure(row.get("loss_nearest")),
            _figure(row["loss"]),
            "" if damping is None else f"{damping:.2g}{again}",
            str(row.get("dead_columns") or ""),
            f"{row['seconds']:.1f}",
            str(row["peak_rss_mib"]),
        )
    console().print(grid)
    console().print(_LOSSES)


def inspection(
    model: Path,
    recipe: Any,
    report: dict[str, Any],
    sizes: dict[str, int],
    compared: int | None,
) -> None:
    """Print recipe, verification, regions and files of a quantized directory."""
    console().print(f"[bold]{marked(model)}[/bold]")
    console().print(recipe.to_toml().rstrip(), highlight=False, markup=False)
    if "calibration" in report:
        taken("calibrated on", report["calibration"])
    found = report.get("verification", {})
    console().print(
        f"verified: logits to {found['logits_error']:.1e}, "
        f"{marked(found.get('matrices_changed'))} matrices changed"
    )
    regions = report.get("regions", [])
    if regions:
        grid = table("region", "tokens", "largest block mass / mean", "after permutation")
        for row in regions:
            if row.get("unrouted"):
                grid.add_row(marked(row["name"]), "0", "no tokens routed to this expert", "")
                continue
            mean = row["mean_block_mass"] or math.nan
            grid.add_row(
                marked(row["name"]),
                marked(row.get("tokens", "")),
                f"{row['largest_block_mass'] / mean:.3f}",
                f"{row['largest_block_mass_permuted'] / mean:.3f}",
            )
        console().print(grid)
    _roundings(report.get("matrices", []))
    files = table("file", "bytes")
    for name, size in sizes.items():
        files.add_row(marked(name), f"{size:,}")
    console().print(files)
    if compared is not None:
        console().print(f"{compared} files match their digests")


def outliers(found: Any, page: Path) -> None:
    """Print a line for each layer of an inspected float model."""
    kind = marked(found.model_type)
    grid = table(
        "layer", "δ", "rotated", "both", "full", "balance", "recovery",
        title=f"{kind}, blocks of {found.block_size}: ranges relative to the original "
        "activation",
    )  # fmt: skip
    for layer in found.layers:
        ranges = layer.ranges
        grid.add_row(
            marked(_short(layer.name)),
            f"{layer.concentration:.4f}",
            f"{ranges['rotated']:.2f}",
            f"{ranges['permuted and rotated']:.2f}",
            f"{ranges['full rotation']:.2f}",
            f"{layer.balance['identity']:.1f}→{layer.balance['energydiff']:.2f}",
            f"{layer.recovery['energydiff'][0]:.2f}",
        )
    console().print(grid)
    console().print(f"report: {marked(page)}")


def demo(result: Any) -> None:
    """Print the demo's table, which of its rows is for what, and what two models say."""
    numbers = [column(name, justify="right") for name in ("perplexity", "KL", "±", "MB")]
    grid = table(column("SmolLM2-135M", overflow="fold"), *numbers, box=None, padding=(0, 1, 0, 0))
    for row in result.rows:
        far = ("", "") if row.kl is None else (f"{row.kl:.3f}", f"{row.kl_se:.3f}")
        grid.add_row(row.name, f"{row.perplexity:.2f}", *far, f"{row.megabytes:.0f}")
    console().print(grid)
    console().print(
        f"\nOn {result.tokens} tokens. KL: how far next-token probabilities are from the float "
        "model's, in nats per token. W4A16: 4-bit weights, 16-bit activations, and so on.\n"
        "\n[bold]W4A16[/bold] for small files: runs everywhere, nearly as good as float. "
        "[bold]W4A8[/bold] for speed where 8-bit products are fast. [bold]W4A4[/bold] where "
        "hardware multiplies 4-bit numbers: a permutation (MassDiff) makes cheap rotations of "
        "small blocks do, and scales and a choice of permutations the rest."
    )
    for folder, text in result.spoken.items():
        console().print(f"\n{marked(folder)}, saved and loaded again, says:")
        console().print(f"[italic]{marked(text)}[/italic]")
    console().print("\nMore: 'corequant presets', 'corequant quantize --help'.")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _short(name: str) -> str:
    return name.removeprefix("model.layers.")
