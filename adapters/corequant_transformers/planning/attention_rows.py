"""Rows of a plan for a decoder block's attention."""

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

__all__ = ["attention_rows", "cross_attention_rows"]


def attention_rows(
    a: Architecture, config: Any, sizes: Dimensions, block: int, stream: Stream, recipe: Recipe
) -> Iterator[MatrixPlan]:
    """Yield the rows of a decoder block's attention, in the order in which they run.

    Parameters
    ----------
    a : Architecture
        Description that holds in the block.
    config : transformers.PreTrainedConfig
    sizes : Dimensions
        Sizes of the block.
    block : int
    stream : Stream
    recipe : Recipe

    Raises
    ------
    BlockSizeError, HadamardOrderError
        If a rotation doesn't fit a width; the message names the width.
    """
    if a.latent is not None:
        yield from _latent_attention(a, a.latent, config, sizes, block, stream, recipe)
        return
    path = a.block_path(block)
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    gates = queries if a.query_gate else 0
    value, output = _values(a, sizes, block, stream, recipe)
    known = {
        "query": (a.query, RowSlice(queries + gates)),
        "key": (a.key, RowSlice(keys)),
        "value": (a.value, RowSlice(keys, value)),
    }
    projections = [
        (name, rows) for name, rows in (known[which] for which in a.qkv_order) if name is not None
    ]
    groups = evaluate(a.qkv_groups, config, block)
    yield from reader_rows(
        path, a.attention_norm, projections, recipe, sizes, stream, groups,
        block=block, role="attention_input",
    )  # fmt: skip
    yield output


def cross_attention_rows(
    a: Architecture, config: Any, sizes: Dimensions, block: int, stream: Stream, recipe: Recipe
) -> Iterator[MatrixPlan]:
    """Yield the rows of a block's attention to what another stack of blocks gave, if it has one.

    Parameters are those of ``attention_rows``. Keys and values read no stream of this stack's, so
    that their inputs are named apart.
    """
    second = a.second
    if second is None or block < second.first:
        return
    other = replace(
        a,
        query=second.query,
        key=second.key,
        value=second.value,
        attention_output=second.output,
        qkv_order=("query", "key", "value"),
    )
    path = a.block_path(block)
    reads = dict.fromkeys((f"{path}.{second.key}", f"{path}.{second.value}"), f"{path}.memory")
    for row in attention_rows(other, config, sizes, block, stream, recipe):
        own = row.name if row.role == "attention_input" else row.reads
        yield replace(row, reads=reads.get(row.name, own))


def _values(
    a: Architecture, sizes: Dimensions, block: int, stream: Stream, recipe: Recipe
) -> tuple[Side, MatrixPlan]:
    """Return what happens to the values' channels, and the row of the output projection."""
    path = a.block_path(block)
    name = f"{path}.{a.attention_output}"
    queries = sizes.heads * sizes.head_dim
    online = recipe.rotation == "online"
    linear = a.linear_values and (a.value is not None or a.latent is not None)
    width: int | None
    if online:
        given = recipe.block_size if isinstance(recipe.block_size, int) else None
        width = check_rotation("block_size", given, "heads times head_dim", queries)
    else:
        width = check_rotation(
            "head_block_size", recipe.head_block_size, "head_dim", sizes.head_dim
        )
    settings = recipe.settings_of(name)
    value = read = Side()
    if not linear and recipe.rotation in ("offline", "heads"):
        width = None
    if settings.weights is None or width is None:
        # Nothing is done for the sake of an input that stays as it is.
        online = False
    else:
        # A block that holds whole heads leaves nothing to balance inside them.
        within = width < sizes.head_dim and sizes.head_dim % width == 0
        moved = within and linear and settings.permutation != "identity"
        region = name if moved else None
        group = sizes.heads // sizes.kv_heads if region else 1
        heads = sizes.kv_heads if region else 1
        # What values are not linear in is rotated at run time alone.
        online = online or not linear
        value = Side(permutation=region, rotation=None if online else width, heads=heads)
        read = Side(permutation=region, rotation=width, heads=heads, repeat=group)
    output = MatrixPlan(
        name,
        (sizes.hidden, queries),
        inside(path, a.attention_inner_norm),
        own_norm=a.attention_inner_norm is not None,
        input=read,
        output=stream.written,
        online=online,
        settings=settings,
        reads=name,
        block=block,
        role="attention_output",
    )
    return value, output


def _latent_attention(
    a: Architecture,
    latent: Latent,
    config: Any,
    sizes: Dimensions,
    block: int,
    stream: Stream,
    recipe: Recipe,
) -> Iterator[MatrixPlan]:
    path = a.block_path(block)

    def size(expression: str) -> int:
        return evaluate(expression, config, block)

    shared, own, values = size(latent.shared_key), size(latent.own_key), size(latent.value)
    sizes = replace(sizes, kv_heads=sizes.heads, head_dim=values)
    value, output = _values(a, sizes, block, stream, recipe)
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
    yield output


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
