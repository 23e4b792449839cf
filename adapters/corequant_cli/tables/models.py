"""What was done to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corequant_cli.tables.console import column, console, marked, table
from corequant_cli.tables.data import taken

__all__ = ["demo", "quantized"]


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
