"""The values that a sum of signed planes can take, as combinations of its means and scales."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Alphabet", "nearest"]

Array = npt.NDArray[Any]


class Alphabet:
    """The codes of salient or of other columns: a part, and a digit for each plane.

    A code's value is the product of its row of ``patterns`` with the parameters of a weight's row
    and group: for each part a mean, where there are means, and a scale for each plane.

    Attributes
    ----------
    variants, order, base : int
        Numbers of parts, planes, and values of a digit, 2 (-1, 1) or 3 (-1, 0, 1).
    mean : bool
        Whether each part has a mean.
    patterns : numpy.ndarray (codes, parameters), float64
    """

    def __init__(self, variants: int, order: int, base: int, mean: bool) -> None:
        self.variants, self.order, self.base, self.mean = variants, order, base, mean
        self.patterns = _patterns(variants, order, base, mean)

    @property
    def width(self) -> int:
        """Number of parameters of one part."""
        return self.order + self.mean

    def levels(self, parameters: Array) -> Array:
        """Return the codes' values (..., codes) for parameters (..., parameters)."""
        levels: Array = parameters @ self.patterns.T.astype(parameters.dtype)
        return levels

    def values(self, codes: Array, parameters: Array) -> Array:
        """Return the values of codes (rows, n) for parameters (rows, parameters)."""
        values: Array = np.take_along_axis(self.levels(parameters), codes.astype(np.intp), 1)
        return values

    def parts(self, codes: Array) -> Array:
        """Return whether codes belong to the second part."""
        second: Array = codes >= self.base**self.order
        return second

    def digits(self, codes: Array) -> npt.NDArray[np.uint8]:
        """Return the digits (planes, rows, n) of codes (rows, n)."""
        steps = [self.base ** (self.order - 1 - k) for k in range(self.order)]
        return np.stack([codes // np.uint8(s) % np.uint8(self.base) for s in steps])


@lru_cache(maxsize=64)
def _patterns(variants: int, order: int, base: int, mean: bool) -> Array:
    symbols = (-1.0, 1.0) if base == 2 else (-1.0, 0.0, 1.0)
    width = order + mean
    rows = []
    for variant in range(variants):
        for digits in product(symbols, repeat=order):
            row = np.zeros(variants * width)
            row[variant * width : (variant + 1) * width] = (1.0,) * mean + digits
            rows.append(row)
    return np.array(rows)


def nearest(values: Array, levels: Array) -> npt.NDArray[np.uint8]:
    """Return the index (rows, n) of the level nearest to each value, the first one in a tie.

    Parameters
    ----------
    values : numpy.ndarray (rows, n)
    levels : numpy.ndarray (rows, codes)
    """
    best = np.full(values.shape, np.inf, values.dtype)
    found = np.zeros(values.shape, np.uint8)
    for index in range(levels.shape[1]):
        gap = np.abs(values - levels[:, index, None])
        closer = gap < best
        np.copyto(best, gap, where=closer)
        found[closer] = index
    return found
