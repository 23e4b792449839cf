"""Permutations from one number for each channel: its mean magnitude, energy or maximum.

Also those that need no number, and the inverse and the repetition of any.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import (
    check_divides,
    check_generator,
    check_index,
    check_permutation,
    check_scores,
)

__all__ = [
    "absmax",
    "identity_permutation",
    "invert_permutation",
    "massdiff",
    "random_permutation",
    "repeat_permutation",
    "zigzag",
]

Permutation = npt.NDArray[np.int64]


def massdiff(mean_abs: npt.NDArray[Any], block_size: int) -> Permutation:
    """Spread activation mass evenly over blocks: greedy mass diffusion.

    Channels are taken in descending order of their mean magnitude; the first d/b open one block
    each, and every further one joins the block, not yet full, that carries the least mass.

    Parameters
    ----------
    mean_abs : numpy.ndarray (d,)
        Mean of |x| of each channel over calibration tokens (``ActivationStats.mean_abs``).
    block_size : int
        Channels per block, b; must divide d.

    Returns
    -------
    numpy.ndarray (d,), int64
        The permutation; each block lists its channels in the order in which they joined.

    Raises
    ------
    BlockSizeError
        If b doesn't divide d.
    NonFiniteError, ShapeError, TypeError, ValueError
        If ``mean_abs`` is not a finite, non-negative vector.

    Notes
    -----
    The objective, the largest block's mean ℓ1 norm, is additive over channels, so the d means
    suffice: O(d log d), whatever the number of tokens. It is the longest-processing-time rule for
    partitions into parts of equal cardinality. Equal loads go to the lower block, equal means to
    the lower channel. Source: Algorithm 1 (MassDiff) of arXiv 2601.22347.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> m = np.array([9.0, 8, 7, 6, 5, 4, 3, 2])
    >>> m[cq.massdiff(m, 4)].reshape(2, 4)
    array([[9., 6., 5., 2.],
           [8., 7., 4., 3.]])
    """
    mean = check_scores("mean_abs", mean_abs)
    blocks = block_count(mean, block_size)
    order = descending(mean)
    members: list[list[int]] = [[int(c)] for c in order[:blocks]]
    room = len(mean) // blocks
    open_blocks = [(float(mean[c]), j) for j, c in enumerate(order[:blocks])] if room > 1 else []
    heapq.heapify(open_blocks)
    for channel in order[blocks:].tolist():
        load, j = open_blocks[0]
        members[j].append(channel)
        if len(members[j]) < room:
            heapq.heapreplace(open_blocks, (load + float(mean[channel]), j))
        else:
            heapq.heappop(open_blocks)
    return np.array(members, np.int64).reshape(-1)


def zigzag(score: npt.NDArray[Any], block_size: int) -> Permutation:
    """Deal channels out to blocks in zigzag order, by descending score.

    Parameters
    ----------
    score : numpy.ndarray (d,)
        What to balance: the largest |x| of each channel in the source, the mean works better.
    block_size : int
        Channels per block, b; must divide d.

    Returns
    -------
    numpy.ndarray (d,), int64

    Raises
    ------
    BlockSizeError, NonFiniteError, ShapeError, TypeError, ValueError
        As for ``massdiff``.

    Notes
    -----
    Source: DuQuant, arXiv 2406.01721, section 3 (zigzag permutation).

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> m = np.array([9.0, 8, 7, 6, 5, 4, 3, 2])
    >>> m[cq.zigzag(m, 4)].reshape(2, 4)
    array([[9., 6., 5., 2.],
           [8., 7., 4., 3.]])
    """
    values = check_scores("score", score)
    blocks = block_count(values, block_size)
    deal = descending(values).reshape(-1, blocks)
    deal[1::2] = deal[1::2, ::-1]
    return np.ascontiguousarray(deal.T).reshape(-1)


def absmax(score: npt.NDArray[Any], block_size: int) -> Permutation:
    """Sort channels by descending score, so that the largest share a block.

    A baseline that does harm: it gathers outliers instead of spreading them.

    Parameters
    ----------
    score : numpy.ndarray (d,)
        The largest |x| of each channel.
    block_size : int
        Channels per block; must divide d (the order doesn't depend on it).

    Returns
    -------
    numpy.ndarray (d,), int64

    Raises
    ------
    BlockSizeError, NonFiniteError, ShapeError, TypeError, ValueError
        As for ``massdiff``.

    Notes
    -----
    Source: a baseline of arXiv 2601.22347.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.absmax(np.array([1.0, 3, 2, 4]), 2)
    array([3, 1, 2, 0])
    """
    values = check_scores("score", score)
    block_count(values, block_size)
    return descending(values)


def random_permutation(d: int, seed: int | np.random.Generator) -> Permutation:
    """Draw a uniform permutation of ``d`` channels from a seed or a generator.

    Parameters
    ----------
    d : int
        Number of channels.
    seed : int or numpy.random.Generator
        The only source of randomness; the global generators are not touched.

    Returns
    -------
    numpy.ndarray (d,), int64

    Raises
    ------
    TypeError, ValueError
        If ``d`` is not a positive integer.

    Examples
    --------
    >>> import corequant as cq
    >>> sorted(cq.random_permutation(4, seed=1).tolist())
    [0, 1, 2, 3]
    """
    generator = check_generator("seed", seed)
    return generator.permutation(check_index("d", d)).astype(np.int64)


def identity_permutation(d: int) -> Permutation:
    """Return ``0..d-1``: no permutation.

    Examples
    --------
    >>> import corequant as cq
    >>> cq.identity_permutation(3)
    array([0, 1, 2])
    """
    return np.arange(check_index("d", d), dtype=np.int64)


def invert_permutation(p: npt.NDArray[Any]) -> Permutation:
    """Return the permutation that undoes ``p``: ``x[..., p][..., q]`` equals ``x``.

    Parameters
    ----------
    p : numpy.ndarray (d,), integer

    Returns
    -------
    numpy.ndarray (d,), int64

    Raises
    ------
    PermutationError, ShapeError, TypeError
        If ``p`` is not a permutation.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.invert_permutation(np.array([2, 0, 1]))
    array([1, 2, 0])
    """
    valid = check_permutation("p", p)
    inverse = np.empty_like(valid)
    inverse[valid] = np.arange(len(valid))
    return inverse


def repeat_permutation(p: npt.NDArray[Any], heads: int, repeat: int) -> Permutation:
    """Repeat each head's own permutation, as a key and value head serves several query heads.

    The output projection's input holds the channels of query head h at ``h*c..h*c+c-1``, c being
    the head's channels, and ``repeat`` consecutive query heads hold those of one value head. So a
    permutation of the value projection's outputs that keeps its heads apart becomes one of the
    output projection's inputs.

    Parameters
    ----------
    p : numpy.ndarray (heads*c,), integer
        Moves channels only inside their head.
    heads : int
        Key and value heads; must divide the length of ``p``.
    repeat : int
        Query heads for each.

    Returns
    -------
    numpy.ndarray (heads*repeat*c,), int64

    Raises
    ------
    BlockSizeError, PermutationError, ShapeError, TypeError, ValueError
        If ``p`` is not a permutation, ``heads`` does not divide its length, or a channel leaves its
        head.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.repeat_permutation(np.array([1, 0, 2, 3]), heads=2, repeat=2)
    array([1, 0, 3, 2, 4, 5, 6, 7])
    """
    valid = check_permutation("p", p)
    count, times = check_index("heads", heads), check_index("repeat", repeat)
    check_divides("heads", count, len(valid))
    width = len(valid) // count
    inside = valid.reshape(count, width) - width * np.arange(count)[:, None]
    strays = np.argwhere((inside < 0) | (inside >= width))
    if len(strays):
        head, slot = strays[0]
        raise ValueError(
            f"p must keep channels inside their head of {width}, got channel "
            f"{valid[head * width + slot]} in head {head}"
        )
    tiled = np.repeat(inside, times, axis=0) + width * np.arange(count * times)[:, None]
    return np.ascontiguousarray(tiled, dtype=np.int64).reshape(-1)


def descending(values: npt.NDArray[np.float64]) -> Permutation:
    """Return the order of descending values, equal ones by their index."""
    return np.argsort(-values, kind="stable").astype(np.int64)


def block_count(values: npt.NDArray[np.float64], block_size: Any) -> int:
    """Return how many blocks ``block_size`` cuts the channels into, or raise."""
    size = check_index("block_size", block_size)
    check_divides("block_size", size, len(values))
    return len(values) // size
