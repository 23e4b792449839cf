"""Planes of signs and their scales in closed form, and their alternating refinement.

Functions take values (rows, n) and, if only some of the weights count, a mask of the same shape.
Scales and means of a row without such weights are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.rounding.binary.alphabet import Alphabet, nearest

__all__ = [
    "RowColumnPlanes",
    "RowPlanes",
    "alternate",
    "column_scales",
    "diagonal_parameters",
    "residual_planes",
    "row_column_planes",
    "solve_near",
]

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

_RIDGE = 1e-6
"""Damping relative to the mean diagonal of a system, so that unused parameters don't change."""


@dataclass(frozen=True, eq=False)
class RowPlanes:
    """``mean_i + Σ_k scales_ki signs_kij``.

    Attributes
    ----------
    mean : numpy.ndarray (rows,)
    scales : numpy.ndarray (planes, rows)
    signs : numpy.ndarray (planes, rows, n), int8
    """

    mean: Array
    scales: Array
    signs: npt.NDArray[np.int8]

    def values(self) -> Array:
        """Return the sums (rows, n)."""
        total = self.mean[:, None] + np.zeros(self.signs.shape[2:], self.mean.dtype)
        for scale, sign in zip(self.scales, self.signs, strict=True):
            total = total + scale[:, None] * sign
        return total


@dataclass(frozen=True, eq=False)
class RowColumnPlanes:
    """``Σ_k rows_ki columns_kj signs_kij``.

    Attributes
    ----------
    rows : numpy.ndarray (planes, rows)
    columns : numpy.ndarray (planes, n)
    signs : numpy.ndarray (planes, rows, n), int8
    """

    rows: Array
    columns: Array
    signs: npt.NDArray[np.int8]

    def plane(self, k: int) -> Array:
        """Return one term of the sum (rows, n)."""
        term: Array = self.rows[k][:, None] * self.columns[k] * self.signs[k]
        return term

    def values(self) -> Array:
        """Return the sums (rows, n)."""
        total: Array = np.sum([self.plane(k) for k in range(len(self.signs))], axis=0)
        return total


def residual_planes(values: Array, order: int, mask: Mask | None = None) -> RowPlanes:
    """Return planes that each binarize the residual of the earlier ones.

    A plane consists of the mean of its residual, and of the signs and the mean magnitude of the
    rest. The mean is the best one for given signs and scale, the scale for given signs and mean.
    With one plane, the scale is the least-squares optimum for the signs that follow from the mean.

    Parameters
    ----------
    values : numpy.ndarray (rows, n)
    order : int
    mask : numpy.ndarray (rows, n), bool, optional

    Notes
    -----
    Source: BiLLM (arXiv 2402.04291), equations 3 to 6.
    """
    rest = values if mask is None else np.where(mask, values, 0)
    count = _counts(values, mask)
    mean = np.zeros(len(values), values.dtype)
    scales, signs = [], []
    for _ in range(order):
        shift = rest.sum(1) / count
        rest = rest - shift[:, None]
        if mask is not None:
            rest = np.where(mask, rest, 0)
        scale = np.abs(rest).sum(1) / count
        sign = _signs(rest)
        rest = rest - scale[:, None] * sign
        if mask is not None:
            rest = np.where(mask, rest, 0)
        mean = mean + shift
        scales.append(scale)
        signs.append(sign)
    return RowPlanes(mean, np.stack(scales), np.stack(signs))


def row_column_planes(
    values: Array, order: int, mask: Mask | None = None, steps: int = 15
) -> RowColumnPlanes:
    """Return planes with scales of rows times scales of columns, refined alternately.

    Plane by plane, each step finds the best row scales with everything else fixed, then the best
    column scales; then each weight takes the nearest of all sums of planes. No step increases the
    squared error.

    Parameters
    ----------
    values : numpy.ndarray (rows, n)
    order : int
    mask : numpy.ndarray (rows, n), bool, optional
    steps : int

    Notes
    -----
    Source: ARB-RC of ARB-LLM (arXiv 2410.03129), algorithm for scales of rows and columns.
    """
    inside = np.ones(values.shape, np.bool_) if mask is None else mask
    values = np.where(inside, values, 0)
    rest, rows, columns, signs = values, [], [], []
    for _ in range(order):
        size = np.abs(rest)
        row = size.sum(1) / _counts(values, mask)
        ratio = np.divide(size, row[:, None], out=np.zeros_like(size), where=row[:, None] > 0)
        live = inside & (row > 0)[:, None]
        column = ratio.sum(0) / np.maximum(live.sum(0), 1)
        sign = _signs(rest)
        rest = np.where(inside, rest - row[:, None] * column * sign, 0)
        rows.append(row)
        columns.append(column)
        signs.append(sign)
    found = RowColumnPlanes(np.stack(rows), np.stack(columns), np.stack(signs))
    for _ in range(steps):
        for k in range(order):
            others = values - sum(found.plane(i) for i in range(order) if i != k)
            others = np.where(inside, others, 0)
            plane = np.where(inside, found.signs[k], 0) * found.columns[k]
            found.rows[k] = _ratio((plane * others).sum(1), (plane * plane).sum(1))
            plane = np.where(inside, found.signs[k], 0) * found.rows[k][:, None]
            found.columns[k] = _ratio((plane * others).sum(0), (plane * plane).sum(0))
        found = RowColumnPlanes(found.rows, found.columns, _nearest_signs(values, found))
    return found


def alternate(
    values: Array, alphabet: Alphabet, parameters: Array, weights: Array, steps: int = 15
) -> tuple[Array, npt.NDArray[np.uint8]]:
    """Return parameters and codes, refined alternately, each optimal for the other.

    Codes are the nearest ones; then the means and scales of a row are found together by weighted
    least squares. No step increases the weighted squared error of a row.

    Parameters
    ----------
    values : numpy.ndarray (rows, n)
    alphabet : Alphabet
    parameters : numpy.ndarray (rows, parameters)
    weights : numpy.ndarray (n,)
        Weights of the squared errors of the columns.
    steps : int

    Notes
    -----
    ARB-LLM (arXiv 2410.03129), theorem 1, but with a joint step for the parameters that ARB-LLM
    updates one after another.
    """
    codes = nearest(values, alphabet.levels(parameters))
    for _ in range(steps):
        parameters = diagonal_parameters(values, codes, alphabet, parameters, weights)
        moved = nearest(values, alphabet.levels(parameters))
        if np.array_equal(moved, codes):
            break
        codes = moved
    return parameters, codes


def diagonal_parameters(
    values: Array, codes: Array, alphabet: Alphabet, parameters: Array, weights: Array
) -> Array:
    """Return the best parameters (rows, parameters) for given codes, by weighted least squares.

    Parameters that no weight uses don't change.
    """
    patterns = alphabet.patterns
    counts, sums = [], []
    heavy = values * weights
    for code in range(len(patterns)):
        here = codes == code
        counts.append(here @ weights)
        sums.append(np.einsum("ij,ij->i", here, heavy))
    count, total = np.stack(counts, 1).astype(np.float64), np.stack(sums, 1).astype(np.float64)
    system = np.einsum("il,lf,lg->ifg", count, patterns, patterns)
    found: Array = solve_near(system, total @ patterns, parameters)
    return found


def solve_near(system: Array, right: Array, start: Array) -> Array:
    """Return solutions of small systems (rows, n, n), close to ``start`` if they aren't unique.

    The step from ``start`` is slightly damped, so that the minimized quadratic form can't rise.
    """
    n = system.shape[-1]
    size = np.trace(system, axis1=-2, axis2=-1) / n
    damped = system + (_RIDGE * size + (size <= 0))[..., None, None] * np.eye(n)
    gap = right - np.einsum("...fg,...g->...f", system, start.astype(np.float64))
    step = np.linalg.solve(damped, gap[..., None])[..., 0]
    found: Array = (start + step).astype(start.dtype)
    return found


def column_scales(
    values: Array, terms: Array, H: Array, start: Array, kept: Mask | None = None
) -> Array:
    """Return the scales c (n,) for which ``terms * c`` is closest to ``values`` in the metric H.

    ``tr((V - T diag(c)) H (V - T diag(c))ᵀ)`` is quadratic in c: one system of n equations,
    ``((TᵀT) ∘ H) c = Σ_i t_i ∘ (H v_i)``.

    Parameters
    ----------
    values, terms : numpy.ndarray (rows, n)
    H : numpy.ndarray (n, n)
    start : numpy.ndarray (n,)
        Scales that the solution is damped towards, so that the error can't rise.
    kept : numpy.ndarray (n,), bool, optional
        Mask of columns whose scales don't change.
    """
    from scipy.linalg import lapack

    system = (terms.T @ terms).astype(np.float64) * H
    right = np.einsum("ij,ij->j", terms, values @ H, dtype=np.float64)
    gap = right - system @ start
    place = np.arange(len(system))
    size = float(np.diagonal(system).mean())
    system[place, place] += _RIDGE * size + (size <= 0)
    if kept is not None:
        system[kept] = 0
        system[:, kept] = 0
        system[kept, kept] = 1
        gap[kept] = 0
    _, step, info = lapack.dposv(system, gap)
    found: Array = start if info else (start + step).astype(start.dtype)
    return found


def _nearest_signs(values: Array, found: RowColumnPlanes) -> npt.NDArray[np.int8]:
    """Return the signs (planes, rows, n) whose sum is nearest to each value."""
    order = len(found.signs)
    terms = [found.rows[k][:, None] * found.columns[k] for k in range(order)]
    best = np.full(values.shape, np.inf, values.dtype)
    signs = np.ones((order, *values.shape), np.int8)
    for choice in range(2**order):
        picked = [1 if choice >> k & 1 else -1 for k in range(order)]
        gap = np.abs(values - sum(s * t for s, t in zip(picked, terms, strict=True)))
        closer = gap < best
        np.copyto(best, gap, where=closer)
        for k in range(order):
            signs[k][closer] = picked[k]
    return signs


def _signs(values: Array) -> npt.NDArray[np.int8]:
    return np.where(values < 0, np.int8(-1), np.int8(1))


def _counts(values: Array, mask: Mask | None) -> Array:
    """Return the number of weights that count in each row, at least 1."""
    if mask is None:
        return np.full(len(values), values.shape[1], values.dtype)
    counts: Array = np.maximum(mask.sum(1), 1).astype(values.dtype)
    return counts


def _ratio(over: Array, under: Array) -> Array:
    return np.divide(over, under, out=np.zeros_like(over), where=under > 0)
