"""The damping of methods off a grid: that of GPTQ, or that of Qronos with its correction."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.rounding.eigenvalues import largest_eigenvalue
from corequant.rounding.hessian import mean_diagonal
from corequant.rounding.problem import check_damping

__all__ = ["addition_to"]

_PLAIN, _CORRECTED = 0.01, 1e-4
"""Default dampings, relative to the mean of H's diagonal, and to its largest eigenvalue."""


def addition_to(
    H: npt.NDArray[Any], dead: npt.NDArray[np.bool_], damping: Any, *, corrected: bool
) -> float:
    """Return the number to add to the diagonal of H.

    Parameters
    ----------
    H : numpy.ndarray (d, d)
    dead : numpy.ndarray (d,), bool
        Columns to leave out of the mean.
    damping : float or None
        Addition relative to the mean of H's diagonal, 0.01 by default; if ``corrected``, relative
        to its largest eigenvalue, 1e-4 by default.
    corrected : bool
        Whether Qronos's correction is made.
    """
    if corrected:
        share = _CORRECTED if damping is None else check_damping(damping)
        return share * largest_eigenvalue(H)
    share = _PLAIN if damping is None else check_damping(damping)
    return share * mean_diagonal(np.diagonal(H).astype(np.float64), dead)
