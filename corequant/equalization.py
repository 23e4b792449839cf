"""Scales that move difficulty between activations and weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_scores
from corequant.errors import ShapeError

__all__ = ["smoothquant_scales"]


def smoothquant_scales(
    activation_absmax: npt.NDArray[Any], weight_absmax: npt.NDArray[Any], alpha: float = 0.5
) -> npt.NDArray[np.float64]:
    """Compute the factors that activations are divided by and weight columns multiplied by.

    Parameters
    ----------
    activation_absmax : numpy.ndarray (d,)
        Largest |x| of each channel.
    weight_absmax : numpy.ndarray (d,)
        Largest |W| of each input channel, over all weights that read the activation.
    alpha : float
        How much of the difficulty moves to the weights: 0 none, 1 all.

    Returns
    -------
    numpy.ndarray (d,), float64
        ``max|x|**alpha / max|W|**(1 - alpha)``, positive, with geometric mean 1, which leaves the
        overall range alone; 1 for channels that are zero on either side.

    Raises
    ------
    NonFiniteError, ShapeError, TypeError, ValueError
        If the arrays are not finite non-negative vectors of one length, or alpha is not in [0, 1].

    Notes
    -----
    Source: SmoothQuant, arXiv 2211.10438, equation 4.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.equalization import smoothquant_scales
    >>> smoothquant_scales(np.array([16.0, 1.0]), np.array([1.0, 1.0]))
    array([2. , 0.5])
    """
    x = check_scores("activation_absmax", activation_absmax)
    w = check_scores("weight_absmax", weight_absmax)
    if x.shape != w.shape:
        raise ShapeError(f"weight_absmax must have shape {x.shape}, got {w.shape}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    scales = np.ones_like(x)
    live = (x > 0) & (w > 0)
    if live.any():
        logs = alpha * np.log(x[live]) - (1 - alpha) * np.log(w[live])
        scales[live] = np.exp(logs - logs.mean())
    return scales
