"""The largest eigenvalue of a matrix of second moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["lanczos", "largest_eigenvalue"]

Array = npt.NDArray[Any]

_LEAST_STEPS, _MOST_STEPS, _TOLERANCE = 12, 48, 1e-4
"""Steps of Lanczos' method, and the relative change with which it ends."""


def largest_eigenvalue(H: Array) -> float:
    """Return the largest eigenvalue of a positive semidefinite H, to about 1e-4 of itself."""
    if not H.any():
        return 0.0
    sums = np.abs(H).sum(1, dtype=np.float64) / float(np.abs(H).max())
    return lanczos(lambda v: (H @ v.astype(H.dtype)).astype(np.float64), sums)


def lanczos(product: Callable[[Array], Array], sums: Array) -> float:
    """Return the largest eigenvalue of a matrix by Lanczos' method with full orthogonalization.

    Not ``scipy.sparse.linalg.eigsh``: where eigenvalues are equal, ARPACK restarts from vectors
    that differ from call to call, and it takes nearly as long.

    Parameters
    ----------
    product : callable
        Returns ``H v`` of a vector v (d,), float64; H is positive semidefinite and not zero.
    sums : numpy.ndarray (d,), float64
        Proportional to the row sums of |H|. The first vector is half-way between them and a random
        direction, since sums alone can be orthogonal to the eigenvector.
    """
    from scipy.linalg import eigvalsh_tridiagonal

    drawn = np.random.default_rng(0).standard_normal(len(sums))
    vector = sums / np.linalg.norm(sums) + drawn / np.linalg.norm(drawn)
    vector = vector / np.linalg.norm(vector)
    basis, largest = np.empty((0, len(sums))), 0.0
    diagonal: list[float] = []
    offdiagonal: list[float] = []
    while len(basis) < min(len(sums), _MOST_STEPS):
        basis = np.vstack([basis, vector])
        image = product(vector)
        diagonal.append(float(vector @ image))
        for _ in range(2):
            image -= basis.T @ (basis @ image)
        found = eigvalsh_tridiagonal(np.array(diagonal), np.array(offdiagonal))
        before, largest = largest, float(found[-1])
        rest = float(np.linalg.norm(image))
        settled = len(basis) >= _LEAST_STEPS and largest - before <= _TOLERANCE * largest
        if settled or rest <= 1e-12 * abs(largest):
            break
        offdiagonal.append(rest)
        vector = image / rest
    return largest
