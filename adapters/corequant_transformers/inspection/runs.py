"""Two quantized directories side by side: recipes, sizes, and each layer's loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from corequant.recipe import Recipe
from corequant_transformers.checkpoint.reader import read_recipe
from corequant_transformers.checkpoint.reports import read_report
from corequant_transformers.files.hub import locate
from corequant_transformers.files.marks import WEIGHTS

__all__ = ["RunComparison", "compare_runs"]


@dataclass(frozen=True)
class RunComparison:
    """Differences between two runs of ``quantize``.

    Attributes
    ----------
    recipe : dict of str to (value, value)
        The recipes' fields that differ.
    sources : (str or None, str or None)
        Names of what was quantized.
    bytes : (int, int)
        Sizes of the weights' files.
    seconds : (float or None, float or None)
        Time that the runs took.
    losses : dict of str to (float or None, float or None)
        By layer: squared error of its outputs on the calibration text without the part that no
        rounding can change; None where a run rounded it to nearest, or left it in float.
    """

    recipe: dict[str, tuple[Any, Any]]
    sources: tuple[str | None, str | None]
    bytes: tuple[int, int]
    seconds: tuple[float | None, float | None]
    losses: dict[str, tuple[float | None, float | None]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def compare_runs(first: str | Path, second: str | Path) -> RunComparison:
    """Compare the recipes, sizes and layers of two directories that ``quantize`` wrote.

    Parameters
    ----------
    first, second : str or Path

    Returns
    -------
    RunComparison

    Raises
    ------
    CheckpointError
        If one is not such a directory, or a file in it is malformed.

    Examples
    --------
    >>> import tempfile, numpy as np, corequant_transformers as cqhf
    >>> from corequant.recipe import Recipe
    >>> model, tokens = cqhf.tiny_model("llama"), np.arange(64).reshape(2, 32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for bits in (4, 8):
    ...         recipe = Recipe(block_size=16, weights=f"int{bits}:channel")
    ...         _ = cqhf.quantize(model, recipe, tokens, f"{folder}/{bits}")
    ...     found = cqhf.compare_runs(f"{folder}/4", f"{folder}/8")
    >>> found.recipe
    {'weights': ('int4:channel:symmetric:mse', 'int8:channel:symmetric:mse')}
    """
    folders = locate(first), locate(second)
    one, two = (_flat(read_recipe(folder)) for folder in folders)
    reports = [read_report(folder) for folder in folders]
    losses = [_losses(report) for report in reports]
    sizes = [(folder / WEIGHTS).stat().st_size for folder in folders]
    names = dict.fromkeys([*losses[0], *losses[1]])
    return RunComparison(
        {key: (one[key], two[key]) for key in one if one[key] != two[key]},
        (reports[0].get("source"), reports[1].get("source")),
        (sizes[0], sizes[1]),
        (reports[0].get("seconds"), reports[1].get("seconds")),
        {name: (losses[0].get(name), losses[1].get(name)) for name in names},
    )


def _flat(recipe: Recipe) -> dict[str, Any]:
    values: dict[str, Any] = recipe.to_dict()
    values["layers"] = [str(rule) for rule in recipe.layers]
    return values


def _losses(report: dict[str, Any]) -> dict[str, float]:
    rows = report.get("matrices", [])
    return {row["name"]: row["loss"] for row in rows if row.get("loss") is not None}
