"""Rows of a plan for linear layers that read the residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from corequant.recipe import Recipe
from corequant_transformers.architectures.dimensions import Dimensions
from corequant_transformers.planning.matrix_plan import MatrixPlan, RowSlice, Side, Stream

__all__ = ["inside", "reader_rows"]


def inside(path: str, name: str | None) -> str | None:
    """Return the path of a module of a decoder block; None for none."""
    return None if name is None else f"{path}.{name}"


def reader_rows(
    path: str,
    norm: str | None,
    projections: Iterable[tuple[str, RowSlice]],
    recipe: Recipe,
    sizes: Dimensions,
    stream: Stream,
    groups: int = 1,
    **where: Any,
) -> Iterator[MatrixPlan]:
    """Yield rows of linear readers of the stream; those with one path are slices of one matrix.

    Parameters
    ----------
    path : str
        The decoder block's.
    norm : str, optional
        The norm that they read.
    projections : iterable of (str, RowSlice)
    recipe : Recipe
    sizes : Dimensions
    stream : Stream
    groups : int
        Groups that the rows of a matrix with several projections are stored in.
    **where
        Block, role and expert.
    """
    fused: dict[str, list[RowSlice]] = {}
    for name, rows in projections:
        fused.setdefault(name, []).append(rows)
    expert = where.get("expert")
    reads = f"{path}.{where['role']}" + ("" if expert is None else f".{expert}")
    for name, slices in fused.items():
        settings = recipe.settings_of(f"{path}.{name}")
        kept = settings.weights is None
        yield MatrixPlan(
            f"{path}.{name}",
            (sum(each.rows for each in slices), sizes.hidden),
            inside(path, norm),
            input=stream.final if kept else stream.read,
            output=slices[0].output if len(slices) == 1 else Side(),
            online=stream.online and not kept,
            settings=settings,
            slices=tuple(slices) if len(slices) > 1 else (),
            groups=groups if len(slices) > 1 else 1,
            reads=reads,
            **where,
        )
