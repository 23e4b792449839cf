"""Measures of how activation mass is distributed, and bounds on rotated magnitudes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import (
    check_divides,
    check_finite,
    check_floating,
    check_index,
    check_number,
    check_numpy,
    check_scores,
)
from corequant.errors import ShapeError

__all__ = [
    "block_mass",
    "load_balance",
    "mass_concentration",
    "outlier_bounds",
    "probable_outlier_bounds",
]

Array = npt.NDArray[Any]


def block_mass(x: Array, block_size: int) -> npt.NDArray[np.float64]:
    """Sum |x| over each block of the last axis.

    Parameters
    ----------
    x : numpy.ndarray (..., d)
    block_size : int
        Block length b; must divide d.

    Returns
    -------
    numpy.ndarray (..., d/b), float64
        The ℓ1 norm of each block.

    Raises
    ------
    BlockSizeError, NonFiniteError, ShapeError, TypeError
        For a size that doesn't divide d, NaN or infinity, or something other than a float array.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.block_mass(np.array([1.0, -2, 3, 4]), 2)
    array([3., 7.])
    """
    mass: npt.NDArray[np.float64] = np.abs(_blocks(x, block_size)).sum(-1)
    return mass


def mass_concentration(x: Array, block_size: int | None = None) -> npt.NDArray[np.float64]:
    """Compute ``δ(x) = ‖x‖₁ / (d ‖x‖_∞)``: 1/d for a single spike, 1 for equal magnitudes.

    Parameters
    ----------
    x : numpy.ndarray (..., d)
    block_size : int, optional
        Block length over which δ is taken; by default the whole axis.

    Returns
    -------
    numpy.ndarray (...), or (..., d/b) with a block size, float64
        All-zero vectors count as flat: δ = 1.

    Raises
    ------
    BlockSizeError, NonFiniteError, ShapeError, TypeError
        As for ``block_mass``.

    Notes
    -----
    ``δ ≤ 1/√d`` suffices for a full-vector Hadamard rotation not to enlarge the largest
    magnitude. Source: arXiv 2601.22347, section 3.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.mass_concentration(np.array([[4.0, 0, 0, 0], [1, 1, -1, 1]]))
    array([0.25, 1.  ])
    """
    blocks = np.abs(_blocks(x, block_size))
    largest = blocks.max(-1)
    with np.errstate(invalid="ignore"):
        # Dividing first keeps the sum of huge finite values finite.
        share = (blocks / np.where(largest > 0, largest, 1)[..., None]).mean(-1)
    delta: npt.NDArray[np.float64] = np.where(largest > 0, share, 1.0)
    return delta[..., 0] if block_size is None else delta


def outlier_bounds(
    x: Array, block_size: int | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Bound the largest magnitude that a block rotation of each vector can leave.

    Parameters
    ----------
    x : numpy.ndarray (..., d)
    block_size : int, optional
        Block length b of the rotation; the whole axis by default.

    Returns
    -------
    lower, upper : numpy.ndarray (...), float64
        ``max_j ‖x_j‖₂/√b ≤ ‖x R̃‖_∞ ≤ max_j ‖x_j‖₁/√b`` over blocks j.

    Raises
    ------
    BlockSizeError, NonFiniteError, ShapeError, TypeError
        As for ``block_mass``.

    Notes
    -----
    The upper bound is Proposition 3.3 of arXiv 2601.22347, met exactly when a block's signs equal a
    column of H. The lower bound holds as a rotation keeps ℓ2 norms and the largest of b entries is
    at least their root mean square.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> x = np.array([3.0, 1, 1, 1])
    >>> lower, upper = cq.outlier_bounds(x, 4)
    >>> bool(lower <= np.abs(cq.block_hadamard(x, 4)).max() <= upper)
    True
    """
    blocks = _blocks(x, block_size)
    root = np.sqrt(blocks.shape[-1])
    lower = _norms(blocks).max(-1) / root
    upper = np.abs(blocks).sum(-1).max(-1) / root
    return lower, upper


def probable_outlier_bounds(
    x: Array, block_size: int | None = None, epsilon: float = 0.05
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Bound the largest rotated magnitude with probability, over random signs of the entries.

    Parameters
    ----------
    x : numpy.ndarray (..., d)
    block_size : int, optional
        Block length b of the rotation; the whole axis by default.
    epsilon : float
        Probability, in (0, 1), with which a bound may fail.

    Returns
    -------
    published, sharper : numpy.ndarray (...), float64
        ``√(2 ln(2d/ε)/b) ‖x‖₂`` and ``√(2 ln(2d/ε)/b) max_j ‖x_j‖₂`` over blocks j.

    Raises
    ------
    BlockSizeError, NonFiniteError, ShapeError, TypeError, ValueError
        As for ``block_mass``, and if epsilon is not between 0 and 1.

    Notes
    -----
    The first is Proposition 3.5 of arXiv 2601.22347 for independent Rademacher signs. The second
    applies Hoeffding's inequality to each output with its own block's norm, and then the union
    bound. It explains balanced energies: with blocks of equal ℓ2 norm it equals the full-vector
    rotation's bound, whatever b is.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> published, sharper = cq.probable_outlier_bounds(np.ones(64), 16)
    >>> round(float(published / sharper), 6)
    2.0
    """
    if not 0 < check_number("epsilon", epsilon) < 1:
        raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
    blocks = _blocks(x, block_size)
    count, size = blocks.shape[-2:]
    factor = np.sqrt(2 * np.log(2 * count * size / epsilon) / size)
    norms = _norms(blocks)
    return factor * _norms(norms), factor * norms.max(-1)


def load_balance(mass: Array, block_size: int) -> float:
    """Compare the heaviest block with the least that any assignment of channels could reach.

    Parameters
    ----------
    mass : numpy.ndarray (d,)
        What is balanced, in the permuted order: mean magnitudes or energies, not negative.
    block_size : int
        Channels per block, b; must divide d.

    Returns
    -------
    float
        Heaviest block over ``max(mean load, largest channel + b-1 smallest)``: at least 1, and 1
        only for a perfect partition. All-zero masses count as perfect.

    Raises
    ------
    BlockSizeError, NonFiniteError, ShapeError, TypeError, ValueError
        If ``mass`` is not a finite non-negative vector whose length b divides.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.load_balance(np.array([3.0, 0, 1, 2]), 2), cq.load_balance(np.array([3.0, 2, 1, 0]), 2)
    (1.0, 1.6666666666666667)
    """
    values = check_scores("mass", mass)
    loads = block_mass(values, block_size)
    ordered = np.sort(values)
    bound = max(float(loads.mean()), float(ordered[-1] + ordered[: block_size - 1].sum()))
    return float(loads.max()) / bound if bound > 0 else 1.0


def _norms(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute ℓ2 norms over the last axis whose squares neither overflow nor vanish."""
    exponent = np.frexp(np.abs(x).max(-1))[1]
    scaled = np.ldexp(x, -exponent[..., None])
    norms: npt.NDArray[np.float64] = np.ldexp(np.linalg.norm(scaled, axis=-1), exponent)
    return norms


def _blocks(x: Any, block_size: int | None) -> npt.NDArray[np.float64]:
    check_numpy("x", x)
    check_floating("x", x)
    d = x.shape[-1]
    if d == 0:
        raise ShapeError("the last axis of x must not be empty, got length 0")
    size = d if block_size is None else check_index("block_size", block_size)
    check_divides("block_size", size, d)
    check_finite("x", x)
    blocks: npt.NDArray[np.float64] = x.astype(np.float64).reshape(*x.shape[:-1], d // size, size)
    return blocks
