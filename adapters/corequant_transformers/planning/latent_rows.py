"""Rows of a plan for latent attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from corequant.hadamard import valid_block_sizes
from corequant.recipe import LayerSettings, Recipe
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.dimensions import Dimensions, evaluate
from corequant_transformers.architectures.latent import Latent
from corequant_transformers.planning.matrix_plan import (
    MatrixPlan,
    RowSlice,
    Side,
    Stream,
    check_rotation,
    inside,
    reader_rows,
)

__all__ = ["latent_rows"]


def latent_rows(
    a: Architecture,
    latent: Latent,
    config: Any,
    sizes: Dimensions,
    block: int,
    stream: Stream,
    recipe: Recipe,
    value: Side,
) -> Iterator[MatrixPlan]:
    """Yield the rows of latent attention before its output projection, as they run.

    Parameters
    ----------
    a : Architecture
        Description that holds in the block.
    latent : Latent
    config : transformers.PreTrainedConfig
    sizes : Dimensions
        Sizes of the block, whose heads have the channels of values.
    block : int
    stream : Stream
    recipe : Recipe
    value : Side
        What happens to the values' channels.

    Raises
    ------
    BlockSizeError, HadamardOrderError
        If a rotation doesn't fit a width; the message names the width.
    """
    path = a.block_path(block)

    def size(expression: str) -> int:
        return evaluate(expression, config, block)

    shared, own, values = size(latent.shared_key), size(latent.own_key), sizes.head_dim
    queries = sizes.heads * (own + shared)
    where: dict[str, Any] = {"block": block, "role": "attention_input"}
    given: tuple[Any, ...] = (recipe, sizes, stream)
    # In the order in which they run.
    if latent.query_down is None or latent.query_up is None:
        yield from reader_rows(
            path, a.attention_norm, [(a.query, RowSlice(queries))], *given, **where
        )
    else:
        rank = size(latent.query_rank)
        side = _latent_side(f"{path}.{latent.query_up}", rank, recipe)
        down = (latent.query_down, RowSlice(rank, _merged(side, recipe)))
        yield from reader_rows(path, a.attention_norm, [down], *given, **where)
        norm = inside(path, latent.query_norm)
        yield _reader(f"{path}.{latent.query_up}", (queries, rank), norm, side, recipe, block)
    rank = size(latent.rank)
    side = _latent_side(f"{path}.{latent.up}", rank, recipe)
    parts = (RowSlice(rank, _merged(side, recipe)), RowSlice(shared))
    yield from reader_rows(
        path, a.attention_norm, [(latent.down, part) for part in parts], *given, **where
    )
    slices = (RowSlice(sizes.heads * own), RowSlice(sizes.heads * values, value))
    shape = (sizes.heads * (own + values), rank)
    reader = _reader(f"{path}.{latent.up}", shape, inside(path, latent.norm), side, recipe, block)
    yield replace(reader, slices=slices, groups=sizes.heads)


def _latent_side(name: str, rank: int, recipe: Recipe) -> Side:
    """Return what happens to a latent's channels: a norm without its gain commutes with that."""
    if recipe.rotation == "heads" or recipe.settings_of(name).weights is None:
        return Side()
    if recipe.rotation == "online":
        given = recipe.block_size if isinstance(recipe.block_size, int) else None
        return Side(rotation=check_rotation("block_size", given, "rank of a latent", rank))
    return Side(rotation=max(valid_block_sizes(rank)))


def _merged(side: Side, recipe: Recipe) -> Side:
    return Side() if recipe.rotation == "online" else side


def _reader(
    name: str, shape: tuple[int, int], norm: str | None, side: Side, recipe: Recipe, block: int
) -> MatrixPlan:
    settings: LayerSettings = recipe.settings_of(name)
    return MatrixPlan(
        name,
        shape,
        norm,
        own_norm=norm is not None,
        input=side,
        online=recipe.rotation == "online" and settings.weights is not None,
        settings=settings,
        reads=name,
        block=block,
        role="attention_inner",
    )
