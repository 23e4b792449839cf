"""How large a result will be, in each layout that it can be written in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from corequant.errors import CorequantError
from corequant.specs import ScaleFormat
from corequant.storage.arrays import Layout, layout_of
from corequant.storage.tensor_file import file_bytes
from corequant_transformers.exports import to_compressed_tensors, to_gguf
from corequant_transformers.exports.prospect import Prospect
from corequant_transformers.model.replicas import unwrap
from corequant_transformers.model.sources import Source
from corequant_transformers.model.surroundings import undisturbed
from corequant_transformers.planning.model_plan import ModelPlan, plan_model

__all__ = ["sizes", "sizes_if_tied"]

_TAGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@undisturbed()
def sizes(table: ModelPlan, model: str | Path | Any) -> dict[str, int | None]:
    """Return the bytes that a result's weights will take, by the layout that they are written in.

    Parameters
    ----------
    table : ModelPlan
        What ``plan`` returned for the model.
    model : str, Path or transformers.PreTrainedModel

    Returns
    -------
    dict of str to int or None
        ``corequant`` (the directory that ``quantize`` writes), ``compressed-tensors`` and ``gguf``,
        of which the last includes the tokenizer. None where the layout can't hold the result, or a
        model in memory has no tokenizer for it.

    Raises
    ------
    CheckpointError
        If the model can't be read.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> from corequant.recipe import Recipe
    >>> recipe = Recipe(rotation="heads", weights="int4:group16", activations="none")
    >>> model = cqhf.tiny_model("llama")
    >>> cqhf.sizes(cqhf.plan(model, recipe), model)["compressed-tensors"]
    64920
    """
    source = Source(model) if isinstance(model, str | Path) else None
    config = unwrap(model).config if source is None else source.config()
    place = (Path(), "") if source is None else (source.path, source.name)
    prospect = Prospect(table, config, *place)
    layouts: dict[str, Callable[[], int]] = {
        "corequant": lambda: file_bytes(_own_layout(prospect)),
        "compressed-tensors": lambda: file_bytes(to_compressed_tensors.expected_layout(prospect)),
    }
    if source is not None:
        layouts["gguf"] = lambda: to_gguf.expected_bytes(prospect, source.path)
    return {"gguf": None, **{name: _or_none(size) for name, size in layouts.items()}}


def sizes_if_tied(
    table: ModelPlan, model: str | Path | Any, rotation: str
) -> dict[str, int | None] | None:
    """Return the sizes of a result that keeps embedding and head one matrix, as ``sizes``.

    Parameters
    ----------
    table : ModelPlan
        What ``plan`` returned for the model.
    model : str, Path or transformers.PreTrainedModel
    rotation : str
        One that merges nothing into both: ``heads``, or ``online``, which rotates at run time.

    Returns
    -------
    dict of str to int or None, or None
        None where they are one matrix already, or wouldn't be with that rotation either.
    """
    if table.tied or not table.dimensions.tied:
        return None
    left: dict[str, Any] = {"block_size": None, "head_block_size": None, "factors": "none"}
    recipe = replace(table.recipe, rotation=rotation, **left)
    config = Source(model).config() if isinstance(model, str | Path) else unwrap(model).config
    other = plan_model(config, recipe, table.architecture)
    return sizes(other, model) if other.tied else None


def _or_none(size: Callable[[], int]) -> int | None:
    try:
        return size()
    except CorequantError:
        return None


def _own_layout(prospect: Prospect) -> Layout:
    table = prospect.plan
    tag = _TAGS[table.recipe.dtype]
    found: Layout = {name: (tag, shape) for name, shape in prospect.shapes().items()}
    for matrix in table.kept:
        found |= layout_of(matrix.name, matrix.shape, matrix.weights)
        if matrix.weights.scale_format is ScaleFormat.BFLOAT16:
            name = f"{matrix.name}.weight_scale"
            found[name] = ("BF16", found[name][1])
    return found
