"""What isn't quantized: the dtype that it is stored in, and whether head and embedding are tied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from corequant.recipe import Recipe
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.dimensions import Dimensions
from corequant_transformers.planning.matrix_plan import MatrixPlan

__all__ = ["folds_gains", "settle_dtype", "tie"]


def settle_dtype(recipe: Recipe, model: Any) -> Recipe:
    """Return a recipe that names the dtype which ``auto`` is for a model.

    Parameters
    ----------
    recipe : Recipe
    model : transformers.PreTrainedConfig or torch.Tensor
        A config or a weight, whose ``dtype`` is the model's own.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from corequant.recipe import Recipe
    >>> from corequant_transformers.planning.unquantized import settle_dtype
    >>> settle_dtype(Recipe(), SimpleNamespace(dtype="float32")).dtype
    'bfloat16'
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}")
    if recipe.dtype != "auto":
        return recipe
    own = str(getattr(model, "dtype", None)).removeprefix("torch.")
    # Weights of float32 and float64 have far more digits than what is quantized beside them.
    return replace(recipe, dtype="float16" if own == "float16" else "bfloat16")


def folds_gains(a: Architecture, recipe: Recipe) -> bool:
    """Return whether the gains of the residual stream's norms are folded into the weights."""
    return recipe.rotation in ("merged", "offline") and a.merges and not a.enclosed


def tie(
    a: Architecture, sizes: Dimensions, recipe: Recipe, matrices: Sequence[MatrixPlan]
) -> tuple[bool, tuple[str, ...]]:
    """Return whether embedding and head are one matrix after their transforms, and notes.

    Parameters
    ----------
    a : Architecture
    sizes : Dimensions
    recipe : Recipe
    matrices : sequence of MatrixPlan
        All rows of a plan.

    Notes
    -----
    With a rotation R of the residual stream and the gain g of the final norm, the embedding E
    becomes E R and the head, whose norm then multiplies by w, E diag(g) R diag(w)⁻¹. If E has full
    column rank, the two are equal only if diag(g) R = R diag(w): every column of R is an
    eigenvector of diag(g). One without zeros, as those of a Hadamard matrix are, is that for equal
    gains alone.
    """
    if not sizes.tied:
        return False, ()
    embedding = next(m for m in matrices if m.name == a.embedding)
    head = next(m for m in matrices if m.name == a.head)
    same = embedding.settings.weights == head.settings.weights
    if not folds_gains(a, recipe) and embedding.input == head.input and same:
        return True, ()
    if not same:
        here, there = (m.settings.weights or recipe.dtype for m in (embedding, head))
        note = (
            f"{a.embedding} and {a.head} don't stay tied: the one is to be {here}, "
            f"the other {there}"
        )
        return False, (note,)
    note = (
        f"{a.embedding} and {a.head} don't stay tied: the gain of {a.final_norm} goes into one of "
        "them alone, since it doesn't commute with the rotation of the residual stream; rotation "
        "'heads' keeps them tied"
    )
    return False, (note,)
