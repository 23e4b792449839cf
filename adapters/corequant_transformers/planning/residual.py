"""What happens to the residual stream's channels, from the embedding to the head."""

from __future__ import annotations

from dataclasses import dataclass, replace

from corequant.errors import BlockSizeError, HadamardOrderError
from corequant.recipe import Recipe
from corequant.rotation import check_block_size
from corequant_transformers.architectures.known import Architecture, Dimensions
from corequant_transformers.planning.matrix_plan import RESIDUAL, Side

__all__ = ["Stream", "check_rotation", "plan_stream"]


def check_rotation(what: str, size: int | None, field: str, width: int) -> int:
    """Return the block length of a rotation of ``width`` channels; None is all of them.

    Raises
    ------
    BlockSizeError, HadamardOrderError
        If there is no such rotation; the message names the config's field.
    """
    try:
        return check_block_size(what, size, width)
    except (BlockSizeError, HadamardOrderError) as error:
        raise type(error)(f"{field}={width} of the model: {error}") from None


@dataclass(frozen=True)
class Stream:
    """The residual stream, as layers see it.

    Attributes
    ----------
    written, final, read : Side
        As it is written, and as layers in float and quantized ones read it.
    online : bool
        Whether the quantized layers' inputs are rotated at run time.
    notes : tuple of str
        What the architecture keeps the recipe from doing, and what is done instead.
    """

    written: Side
    final: Side
    read: Side
    online: bool
    notes: tuple[str, ...] = ()


def plan_stream(a: Architecture, recipe: Recipe, sizes: Dimensions) -> Stream:
    """Decide what happens to the residual stream's channels, as far as the architecture lets it.

    Raises
    ------
    BlockSizeError, HadamardOrderError
        If a rotation doesn't fit the stream's width.
    """
    signs = RESIDUAL if recipe.random_signs else None
    if recipe.rotation != "online":
        width = check_rotation("residual rotation", None, "hidden_size", sizes.hidden)
        side = Side(factors=signs, rotation=width)
        if not a.post_norms:
            return Stream(replace(side, centered=a.norm == "layer"), side, side, online=False)
        # RMSNorm without its gain g commutes with a rotation R, since |x R| = |x|; but (x R) ∘ g is
        # (x ∘ g) R for equal gains only. Signs and permutations are no obstacle.
        plain = Side(factors=signs)
        if recipe.rotation == "offline":
            return Stream(plain, plain, plain, online=False, notes=(_unmerged(a),))
        note = (
            f"{_unmerged(a)}; "
            "the inputs of the layers that read the stream are rotated at run time instead"
        )
        return Stream(plain, plain, side, online=True, notes=(note,))
    block = recipe.block_size if isinstance(recipe.block_size, int) else None
    width = check_rotation("block_size", block, "hidden_size", sizes.hidden)
    permuted = recipe.permutation != "identity" and width < sizes.hidden
    notes: tuple[str, ...] = ()
    if signs and a.norm == "layer":
        signs = None
        notes = (
            "the residual stream gets no random signs: the LayerNorms keep their place with "
            "rotation 'online', and the mean that they subtract doesn't commute with signs",
        )
    side = Side(permutation=RESIDUAL if permuted else None, factors=signs)
    return Stream(side, side, replace(side, rotation=width), online=True, notes=notes)


def _unmerged(a: Architecture) -> str:
    return (
        f"the residual rotation can't be merged: the gains of {' and '.join(a.post_norms)} stand "
        "between the writers and the residual stream and don't commute with a rotation"
    )
