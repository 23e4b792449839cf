"""Densities of unit variance and their levels of least squared error."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["DENSITIES", "Density"]

Array = npt.NDArray[Any]

_STEPS = 60
"""Limit of Newton steps; four or five are usual."""


class Density(ABC):
    """A symmetric density of variance 1, whose logarithm is concave."""

    @abstractmethod
    def height(self, x: Array) -> Array:
        """Return the density at each x ≥ 0, which may be infinite."""

    @abstractmethod
    def above(self, x: Array) -> Array:
        """Return the probability of a number above each x ≥ 0."""

    @abstractmethod
    def moment(self, x: Array) -> Array:
        """Return the integral of t times the density over t > x, for each x ≥ 0."""

    @abstractmethod
    def spread(self, p: Array) -> Array:
        """Return the x ≥ 0 beyond which a share p of the density's cube root lies."""

    def levels(self, size: int) -> npt.NDArray[np.float64]:
        """Return ``size`` levels, each the mean of the numbers nearest to it, ascending."""
        half = size // 2
        odd = size % 2
        # Levels above zero; the middle one of an odd number is zero.
        share = (np.arange(half, 0, -1) - 0.5) / size
        found = self.spread(share)
        if half:
            found = self._settle(found, odd)
        return np.concatenate([-found[::-1], np.zeros(odd), found])

    def _settle(self, levels: Array, odd: int) -> Array:
        """Return the solution of ``levels == means`` by Newton's method."""
        from scipy.linalg import solve_banded

        for _ in range(_STEPS):
            means, slopes, inner = self._means(levels, odd)
            # A mean depends on its edges, each of which is half the sum of two neighbours.
            lower, upper = slopes
            banded = np.zeros((3, len(levels)))
            banded[0, 1:] = -upper[:-1] / 2
            banded[1] = 1 - lower / 2 - upper / 2
            banded[1, 0] = 1 - inner - upper[0] / 2
            banded[2, :-1] = -lower[1:] / 2
            step = solve_banded((1, 1), banded, means - levels)
            moved = levels + step
            while moved[0] <= 0 or (np.diff(moved) <= 0).any():
                step = step / 2
                moved = levels + step
            levels = moved
            if np.abs(step).max() <= 4e-16 * levels[-1]:
                break
        return levels

    def _means(self, levels: Array, odd: int) -> tuple[Array, tuple[Array, Array], float]:
        """Return means between edges, their slopes by both edges, and by the first level's own."""
        first = levels[:1] / 2 if odd else np.zeros(1)
        edges = np.concatenate([first, (levels[1:] + levels[:-1]) / 2, [np.inf]])
        mass = -np.diff(self.above(edges))
        means = -np.diff(self.moment(edges)) / mass
        heights = self.height(edges)
        lower = heights[:-1] * (means - edges[:-1]) / mass
        upper = np.zeros(len(levels))
        upper[:-1] = heights[1:-1] * (edges[1:-1] - means[:-1]) / mass[:-1]
        return means, (lower, upper), float(lower[0]) / 2 if odd else 0.0


class _Normal(Density):
    def height(self, x: Array) -> Array:
        found: Array = np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)
        return found

    def above(self, x: Array) -> Array:
        from scipy.special import ndtr

        found: Array = ndtr(-x)
        return found

    def moment(self, x: Array) -> Array:
        return self.height(x)

    def spread(self, p: Array) -> Array:
        from scipy.special import ndtri

        found: Array = -math.sqrt(3) * ndtri(p)
        return found


class _Laplace(Density):
    """``exp(-√2 |x|) / √2``."""

    def height(self, x: Array) -> Array:
        found: Array = np.exp(-math.sqrt(2) * x) / math.sqrt(2)
        return found

    def above(self, x: Array) -> Array:
        found: Array = np.exp(-math.sqrt(2) * x) / 2
        return found

    def moment(self, x: Array) -> Array:
        finite = np.where(np.isfinite(x), x, 0)
        found: Array = self.above(x) * (finite + 1 / math.sqrt(2))
        return found

    def spread(self, p: Array) -> Array:
        found: Array = -3 / math.sqrt(2) * np.log(2 * p)
        return found


DENSITIES: dict[str, Density] = {"laplace": _Laplace(), "normal": _Normal()}
"""Densities by name."""
