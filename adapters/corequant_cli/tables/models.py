"""Results of quantizing and exporting a model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from corequant_cli.tables.console import column, console, counted, marked, table
from corequant_cli.tables.data import taken
from corequant_cli.tables.widths import widths

__all__ = ["demo", "quantized"]


def quantized(result: Any, model: Path, output: Path, reader: str) -> None:
    """Print what ``quantize`` did, and what can be done with it."""
    found = result.verification
    taken("calibrated on", result.report["calibration"])
    console().print(
        f"verified before quantizing: logits agree with the float model to "
        f"{found.logits_error:.1e} (float64), {found.matrices_changed} matrices changed, "
        f"{counted(found.rotations_online, 'rotation')} left for run time, "
        f"{counted(found.permutations, 'permutation')}"
    )
    if "widths" in result.report:
        widths(result.report["widths"])
    console().print(
        f"saved to {marked(output)} in {result.report['seconds']} s, "
        f"peak memory {result.report['peak_rss_mib']} MiB"
    )
    # Lines to copy are not broken.
    whole: dict[str, Any] = {"highlight": False, "soft_wrap": True}
    if output.is_dir():
        console().print(f"how to load it: {marked(output / 'README.md')}", **whole)
    if reader == "corequant":
        said = f"corequant evaluate {_quoted(output)} --against {_quoted(model)} --text FILE"
        console().print(f"how good it is: {marked(said)}", **whole)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def demo(result: Any) -> None:
    """Print the demo's table, which of its rows is for what, and what two models say."""
    heads = [column(name, justify="right") for name in ("perplexity", "KL", "±", "MB")]
    titles = (column("SmolLM2-135M", overflow="fold"), column("rounded by"))
    grid = table(*titles, *heads, box=None, padding=(0, 1, 0, 0))
    for row in result.rows:
        far = ("", "") if row.kl is None else (f"{row.kl:.3f}", f"{row.kl_se:.3f}")
        grid.add_row(row.name, row.rounding, f"{row.perplexity:.2f}", *far, f"{row.megabytes:.0f}")
    console().print(grid)
    console().print(
        f"\nOn {result.tokens} tokens. KL: how far the probabilities of the next token are from "
        "the float model's, in nats per token; ± its standard error. W4A8: 4-bit weights, 8-bit "
        "activations.\n"
        "\n[bold]W4A16[/bold] for small files: close to float, and it runs everywhere. "
        "[bold]W4A8[/bold] for speed where products of 8-bit numbers are fast. [bold]W4A4[/bold] "
        "for hardware that multiplies 4-bit numbers. There a permutation of channels (MassDiff) "
        "makes up for small rotations, whose blocks are of 16 or 32 channels; the preset chooses "
        "among permutations, scales channels and rounds by Qronos."
    )
    for folder, text in result.spoken.items():
        console().print(f"\n{marked(folder)}, saved and loaded again, says:")
        console().print(f"[italic]{marked(text)}[/italic]")
    console().print("\nMore: 'corequant presets', 'corequant quantize --help'.")
