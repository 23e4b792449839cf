"""A permutation that sees which channels are large in the same token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_finite, check_floating, check_index, check_numpy
from corequant.errors import ShapeError
from corequant.permutation.first_order import Permutation, block_count, descending

__all__ = ["energydiff"]


def energydiff(energy_gram: npt.NDArray[Any], block_size: int, *, refine: int = 4) -> Permutation:
    """Spread activation energy evenly over blocks, token by token: second-order mass diffusion.

    Minimises the sum over tokens and blocks of the squared energy of a block. Channels that are
    large in the same token are driven apart, which a mean over tokens can't see. Channels are taken
    in descending order of their mean energy; each joins the block, not yet full, whose members'
    energies occur together with its own the least. Then channels of different blocks are exchanged
    as long as that helps.

    Parameters
    ----------
    energy_gram : numpy.ndarray (d, d)
        ``C = E[e eᵀ]`` of the tokens' channel energies e (``ActivationStats.energy_gram``).
    block_size : int
        Channels per block, b; must divide d.
    refine : int
        Most sweeps of exchanges after the greedy pass; 0 for none.

    Returns
    -------
    numpy.ndarray (d,), int64
        The permutation; each block lists its channels in the order in which they joined.

    Raises
    ------
    BlockSizeError, NonFiniteError, ShapeError, TypeError, ValueError
        If b doesn't divide d, or the statistic isn't a finite, symmetric, non-negative matrix.

    Notes
    -----
    O(d²) time for the greedy pass and for each sweep, d²/b further memory. The objective is a
    balanced partition of a graph; for a single token with random signs, blocks of equal energy
    reduce the bound on the rotated maximum to that of the full-vector rotation (see
    ``outlier_bounds``), whatever the block size.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> x = np.array([[9.0, 9, 1, 1], [1, 1, 5, 5]])  # channels 0, 1 and 2, 3 are large together
    >>> stats = cq.ActivationStats(4, energy_gram=True).update(x)
    >>> cq.energydiff(stats.energy_gram, 2).reshape(2, 2)
    array([[0, 2],
           [1, 3]])
    """
    C = _check_gram(energy_gram)
    energy = C.diagonal().astype(np.float64)
    blocks = block_count(energy, block_size)
    sweeps = check_index("refine", refine, 0)
    if blocks == 1:
        return descending(energy)
    from corequant._cpu.loops.permutation_search import exchange, spread

    # A row's sum is the channel's mean energy times the mean total, so it orders alike.
    order = descending(C.sum(1, dtype=np.float64))
    load, block_of = np.zeros((blocks, len(C)), np.float32), np.empty(len(C), np.int64)
    spread(C, order, np.zeros(blocks, np.int64), block_of, load)
    for _ in range(sweeps):
        if exchange(C, order, block_of, load) == 0:
            break
    members: list[list[int]] = [[] for _ in range(blocks)]
    for channel in order.tolist():
        members[block_of[channel]].append(channel)
    return np.array(members, np.int64).reshape(-1)


def _check_gram(gram: Any) -> npt.NDArray[np.float32]:
    check_numpy("energy_gram", gram)
    check_floating("energy_gram", gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.size == 0:
        raise ShapeError(f"energy_gram must be (d, d) with d at least 1, got {gram.shape}")
    check_finite("energy_gram", gram)
    if (gram < 0).any():
        i, j = np.argwhere(gram < 0)[0]
        raise ValueError(f"energy_gram must not be negative, got {gram[i, j]} at ({i}, {j})")
    scale = float(gram.max())
    gap = np.abs(gram - gram.T)
    if scale and float(gap.max()) > 1e-3 * scale:
        i, j = np.unravel_index(int(gap.argmax()), gap.shape)
        entries = f"{gram[i, j]} and {gram[j, i]}"
        raise ValueError(f"energy_gram must be symmetric, got {entries} at ({i}, {j})")
    # Scaled to 1, so that sums of huge statistics stay finite; the partition doesn't change.
    return np.ascontiguousarray(gram / gram.dtype.type(scale or 1), dtype=np.float32)
