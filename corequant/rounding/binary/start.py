"""Initial means and scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.rounding.binary.alphabet import Alphabet

__all__ = ["start_parameters"]

Array = npt.NDArray[Any]

_TERNARY = 1.25
"""Scale of a ternary plane relative to the mean magnitude, nearly optimal for normal weights."""


def start_parameters(values: Array, alphabet: Alphabet) -> Array:
    """Return parameters (rows, parameters) that roughly fit values (rows, n).

    If there are two parts, the second one consists of the weights that are farther from the mean
    than the average distance.
    """
    mean = values.mean(1) if alphabet.mean else np.zeros(len(values), values.dtype)
    size = np.abs(values - mean[:, None])
    if alphabet.variants == 1:
        return np.stack(_part(values, np.ones(values.shape, np.bool_), alphabet), 1)
    large = size >= size.mean(1, keepdims=True)
    return np.stack(_part(values, ~large, alphabet) + _part(values, large, alphabet), 1)


def _part(values: Array, mask: npt.NDArray[np.bool_], alphabet: Alphabet) -> list[Array]:
    """Return the parameters (rows,) for the weights in a mask."""
    count = np.maximum(mask.sum(1), 1).astype(values.dtype)
    found = []
    rest = np.where(mask, values, 0)
    if alphabet.mean:
        found.append(rest.sum(1) / count)
        rest = np.where(mask, rest - found[0][:, None], 0)
    for _ in range(alphabet.order):
        scale = np.abs(rest).sum(1) / count
        if alphabet.base == 3:
            scale = scale * values.dtype.type(_TERNARY)
            rest = rest - scale[:, None] * np.sign(rest) * (np.abs(rest) > scale[:, None] / 2)
        else:
            rest = rest - scale[:, None] * np.sign(rest)
        rest = np.where(mask, rest, 0)
        found.append(scale)
    return found
