"""Permutations that stay inside attention heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_divides, check_index, check_permutation
from corequant.permutation.first_order import Permutation

__all__ = ["repeat_permutation"]


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
