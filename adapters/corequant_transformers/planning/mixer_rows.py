"""Rows of a plan for mixers, whose inner channels keep their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corequant.hadamard import valid_block_sizes
from corequant.recipe import FLOAT, LayerSettings, Recipe
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.dimensions import Dimensions, evaluate
from corequant_transformers.planning.matrix_plan import (
    MatrixPlan,
    RowSlice,
    Side,
    Stream,
    check_rotation,
    inside,
    reader_rows,
)

__all__ = ["mixer_rows"]


def mixer_rows(
    a: Architecture, config: Any, sizes: Dimensions, block: int, stream: Stream, recipe: Recipe
) -> Iterator[MatrixPlan]:
    """Yield the rows of a decoder block's mixers, in the order in which they run.

    Parameters
    ----------
    a : Architecture
        Description that holds in the block.
    config : transformers.PreTrainedConfig
    sizes : Dimensions
    block : int
    stream : Stream
    recipe : Recipe

    Raises
    ------
    BlockSizeError
        If the recipe's block size doesn't fit a width; the message names the width.
    """
    path = a.block_path(block)
    for mixer in a.mixers:
        readers = [(name, RowSlice(evaluate(size, config, block))) for name, size in mixer.readers]
        yield from reader_rows(
            path, mixer.norm, readers, recipe, sizes, stream, block=block, role="mixer_input"
        )
        for name, size in mixer.steering:
            yield MatrixPlan(
                f"{path}.{name}",
                (evaluate(size, config, block), sizes.hidden),
                inside(path, mixer.norm),
                input=stream.final,
                reads=f"{path}.mixer_input",
                block=block,
                role="steering",
            )
        for name, outputs, inputs in mixer.linears:
            shape = (evaluate(outputs, config, block), evaluate(inputs, config, block))
            yield _rotated(f"{path}.{name}", shape, recipe, block, inputs, role="mixer_inner")
        for name, inputs in mixer.writers:
            shape = (sizes.hidden, evaluate(inputs, config, block))
            yield _rotated(
                f"{path}.{name}",
                shape,
                recipe,
                block,
                inputs,
                output=stream.written,
                role="mixer_output",
            )


def _rotated(
    name: str, shape: tuple[int, int], recipe: Recipe, block: int, width: str, **more: Any
) -> MatrixPlan:
    """Return a row for a layer whose input is rotated at run time, if the recipe does that."""
    settings: LayerSettings = recipe.settings_of(name)
    online = recipe.rotation in ("merged", "online") and settings.weights is not None
    given = recipe.block_size if isinstance(recipe.block_size, int) else None
    size = None
    if online and given is not None:
        size = check_rotation("block_size", given, width, shape[1])
    elif online:
        # The largest that there is: not every width has a rotation of its own.
        size = max(valid_block_sizes(shape[1]))
    return MatrixPlan(
        name,
        shape,
        input=Side(rotation=size),
        online=online,
        settings=settings if settings.weights is not None else FLOAT,
        reads=name,
        block=block,
        **more,
    )
