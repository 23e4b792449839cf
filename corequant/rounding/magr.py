"""MagR: weights of smaller range with nearly the same outputs, before they are rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.loops.projection import clip_rows
from corequant._cpu.threads import for_rows
from corequant._dispatch import is_elsewhere, round_elsewhere
from corequant._validation import check_divides, check_index, check_matrix, working_dtype
from corequant.rounding.eigenvalues import largest_eigenvalue
from corequant.rounding.hessian import check_hessian
from corequant.rounding.problem import check_damping

__all__ = ["magr"]


def magr(
    W: Any,
    H: Any,
    *,
    alpha: float = 0.001,
    steps: int = 50,
    group_size: int | None = None,
    name: str = "W",
) -> Any:
    """Return weights whose largest magnitudes are smaller, and whose outputs are nearly the same.

    Parameters
    ----------
    W : array (out_features, in_features)
        NumPy array or torch tensor, finite, of a floating dtype.
    H : array (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    alpha : float
        Strength, relative to H: its authors take 0.001 for scales by channel, 0.0001 for groups.
    steps : int
        Accelerated proximal gradient steps; each takes one product with H.
    group_size : int, optional
        Columns of a group whose range is shrunk; by default the whole row.
    name : str
        The layer's name, for errors.

    Returns
    -------
    array (out_features, in_features)
        Weights of W's kind and dtype, on its device.

    Raises
    ------
    BackendError, BlockSizeError, HessianError, NonFiniteError, ShapeError, TypeError, ValueError
        If an argument breaks its rule.

    Notes
    -----
    Each row minimizes ``½(v - w) H (v - w)ᵀ + a · max|v|`` with ``a = alpha · σ² / ‖H‖₁``, σ being
    the largest eigenvalue of H (arXiv 2406.00800). The proximal map of the largest magnitude clips:
    at the level that cuts off a total of ``a / σ``. Steps have momentum, which a row loses where it
    leads uphill (Beck and Teboulle 2009; arXiv 1204.3982): 50 of them come closer to the least
    value than the paper's 200 without.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[1.0, 0.2, 0.1]])
    >>> H = np.array([[1.0, 0.9, 0.9], [0.9, 1.0, 0.9], [0.9, 0.9, 1.0]])
    >>> cq.magr(W, H, alpha=0.02).round(2)
    array([[0.62, 0.38, 0.28]])
    """
    if is_elsewhere(W):
        return round_elsewhere(
            "magr", W=W, H=H, alpha=alpha, steps=steps, group_size=group_size, name=name
        )
    W = check_matrix("W", W)
    H = check_hessian(H, W.shape[1], name)
    strength, steps = check_damping(alpha, "alpha"), check_index("steps", steps, 0)
    size = W.shape[1] if group_size is None else check_index("group_size", group_size)
    if W.size:
        check_divides("group_size", size, W.shape[1])
    dtype = working_dtype(W)
    sigma = largest_eigenvalue(H)
    start: npt.NDArray[Any] = np.array(W, dtype, order="C")
    if sigma == 0 or strength == 0 or not W.size:
        return start.astype(W.dtype)
    gram = H.astype(dtype, copy=False) / dtype.type(sigma)
    radius = strength * sigma / float(np.abs(H).sum(1, dtype=np.float64).max())
    v, ahead, pace = start, start, np.ones((len(W), 1))
    limits = np.empty(start.size // size, dtype)
    for _ in range(steps):
        clipped = np.empty_like(start)
        rows = (ahead - (ahead - start) @ gram).reshape(-1, size)

        def work(first: int, last: int, rows: Any = rows, out: Any = clipped) -> None:
            clip_rows(first, last, rows, radius, limits, out.reshape(-1, size))

        for_rows(len(rows), 8 * size, work)
        change = clipped - v
        uphill = np.einsum("ij,ij->i", ahead - clipped, change, dtype=np.float64) > 0
        pace = np.where(uphill[:, None], 1.0, pace)
        following = (1 + np.sqrt(1 + 4 * pace**2)) / 2
        momentum = ((pace - 1) / following).astype(dtype)
        v, ahead, pace = clipped, clipped + momentum * change, following
    return v.astype(W.dtype)
