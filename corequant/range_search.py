"""Permutations and signs by local search on the ranges that real tokens have after the rotation.

The error of a token rounded with a step of its own is proportional to its squared range, so this is
the deployed quantizer's own objective: ``E[range² / ‖x‖²]`` with max - min for an asymmetric
quantizer and twice the largest magnitude for a symmetric one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import (
    check_divides,
    check_finite,
    check_floating,
    check_generator,
    check_index,
    check_numpy,
    check_permutation,
)
from corequant.errors import ShapeError
from corequant.hadamard import hadamard_matrix
from corequant.permutation import identity_permutation

__all__ = ["rangediff", "sign_descent"]

Array = npt.NDArray[Any]


def rangediff(
    x: Array,
    block_size: int,
    *,
    start: npt.NDArray[np.int64] | None = None,
    symmetric: bool = False,
    proposals: int = 4000,
    seed: int | np.random.Generator = 0,
) -> npt.NDArray[np.int64]:
    """Improve a permutation by exchanges that shrink the ranges of rotated tokens.

    Parameters
    ----------
    x : numpy.ndarray (tokens, d)
        Calibration tokens, some hundreds.
    block_size : int
        Block length b of the rotation.
    start : numpy.ndarray (d,), optional
        Permutation to start from; the identity by default.
    symmetric : bool
        Whether the quantizer has no zero point.
    proposals : int
        Exchanges to try: a channel of the widest block of a token drawn at random against one of
        another block.
    seed : int or numpy.random.Generator
        Seed of the proposals.

    Returns
    -------
    numpy.ndarray (d,), int64

    Raises
    ------
    BlockSizeError, HadamardOrderError, NonFiniteError, PermutationError, ShapeError, TypeError
        If an argument is malformed.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> x = np.random.default_rng(0).normal(size=(64, 32)) * np.repeat([8.0, 1], 16)
    >>> p = cq.rangediff(x, 8, seed=0)
    >>> spread = lambda p: np.ptp(cq.block_hadamard(x[:, p], 8), axis=1).mean()
    >>> bool(spread(p) < spread(np.arange(32)))
    True
    """
    tokens, b = _check(x, block_size)
    d = tokens.shape[1]
    order = (
        identity_permutation(d) if start is None else check_permutation("start", start, d).copy()
    )
    wanted = check_index("proposals", proposals, 0)
    if b == d or not len(tokens):
        return order
    from corequant._cpu.loops.permutation_search import search_exchanges

    generator = check_generator("seed", seed)
    draws = generator.integers(0, 2**31 - 1, (wanted, 4))
    state = _state(np.ascontiguousarray(tokens[:, order]), b, symmetric)
    search_exchanges(*state, draws, symmetric, order)
    return order


def sign_descent(
    x: Array,
    block_size: int,
    *,
    start: npt.NDArray[np.int8] | None = None,
    symmetric: bool = False,
    sweeps: int = 3,
) -> npt.NDArray[np.int8]:
    """Choose signs of channels that shrink the ranges of rotated tokens, one channel at a time.

    Parameters
    ----------
    x : numpy.ndarray (tokens, d)
        Calibration tokens, permuted already.
    block_size : int
        Block length of the rotation.
    start : numpy.ndarray (d,), optional
        Signs to start from; all +1 by default.
    symmetric : bool
        Whether the quantizer has no zero point.
    sweeps : int
        Most passes over the channels; it ends early when none flips.

    Returns
    -------
    numpy.ndarray (d,), int8
        To be applied before the rotation.

    Raises
    ------
    BlockSizeError, HadamardOrderError, NonFiniteError, ShapeError, TypeError, ValueError
        If an argument is malformed.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> x = 1 + np.random.default_rng(0).normal(size=(64, 32))
    >>> signs = cq.sign_descent(x, 8)
    >>> spread = lambda x: np.ptp(cq.block_hadamard(x, 8), axis=1).mean()
    >>> bool(spread(x * signs) < spread(x))
    True
    """
    tokens, b = _check(x, block_size)
    signs = np.ones(tokens.shape[1], np.int8)
    if start is not None:
        if check_numpy("start", start).shape != signs.shape:
            raise ShapeError(f"start must have shape ({len(signs)},), got {start.shape}")
        if (np.abs(start) != 1).any():
            other = start[np.abs(start) != 1][0]
            raise ValueError(f"start must be +1 or -1 everywhere, got {other}")
        signs = start.astype(np.int8)
    wanted = check_index("sweeps", sweeps, 0)
    if not len(tokens):
        return signs
    from corequant._cpu.loops.permutation_search import search_flips

    state = _state(tokens * signs.astype(np.float32), b, symmetric)
    for _ in range(wanted):
        if search_flips(*state, symmetric, signs) == 0:
            break
    return signs


def _check(x: Any, block_size: Any) -> tuple[npt.NDArray[np.float32], int]:
    check_numpy("x", x)
    check_floating("x", x)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ShapeError(f"x must be (tokens, d) with d at least 1, got shape {x.shape}")
    check_finite("x", x)
    size = check_index("block_size", block_size)
    check_divides("block_size", size, x.shape[1])
    # Tokens are scaled to mean square 1 here, which is their weight and keeps squares finite.
    wide = x.astype(np.float64)
    largest = np.abs(wide).max(1, keepdims=True)
    wide = wide[largest[:, 0] > 0] / largest[largest[:, 0] > 0]
    wide /= np.sqrt(np.square(wide).mean(1, keepdims=True))
    return np.ascontiguousarray(wide, dtype=np.float32), size


def _state(x: npt.NDArray[np.float32], b: int, symmetric: bool) -> tuple[Array, ...]:
    from corequant._cpu.loops.permutation_search import extremes

    h = (hadamard_matrix(b) / np.sqrt(b)).astype(np.float32)
    blocks = x.reshape(len(x), -1, b)
    y = np.matmul(blocks, h)
    high, low = np.empty(y.shape[:2], np.float32), np.empty(y.shape[:2], np.float32)
    extremes(y, high, low)
    top, bottom = high.max(1).astype(np.float64), low.min(1).astype(np.float64)
    span = 2 * np.maximum(top, -bottom) if symmetric else top - bottom
    return x, y, high, low, np.square(span), h
