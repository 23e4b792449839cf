"""Means and quantiles over tokens, with standard errors that count windows, not tokens.

Tokens of one window depend on each other, those of different windows hardly do. So windows are
clusters: the error of a mean is that of the mean of the windows' means.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["mean_with_error", "quantile_with_error"]

Values = npt.NDArray[np.float64]


def mean_with_error(values: Values) -> tuple[float, float | None]:
    """Return the mean over all tokens and its standard error over windows.

    Parameters
    ----------
    values : numpy.ndarray (windows, positions)

    Returns
    -------
    mean : float
    error : float or None
        Standard deviation of the windows' means, with W − 1 in its denominator, over √W; None for
        a single window, which says nothing about others.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant_transformers.evaluation.statistics import mean_with_error
    >>> mean_with_error(np.array([[1.0, 3.0], [4.0, 4.0]]))
    (3.0, 1.0)
    """
    windows = len(values)
    means = values.mean(axis=1)
    mean = float(means.mean())
    if windows < 2:
        return mean, None
    return mean, float(means.std(ddof=1)) / math.sqrt(windows)


def quantile_with_error(values: Values, level: float) -> tuple[float, float | None]:
    """Return a quantile over all tokens and its standard error over windows.

    Parameters
    ----------
    values : numpy.ndarray (windows, positions)
    level : float
        Between 0 and 1.

    Returns
    -------
    quantile : float
        Linear between the two order statistics around ``level * (n - 1)``.
    error : float or None
        Half the distance between the quantiles at ``level`` plus and minus the standard error of
        the share of tokens at or below the quantile (Woodruff, 1952); None for a single window. Few
        tokens lie beyond an extreme quantile, whose error is a rough one for that reason.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant_transformers.evaluation.statistics import quantile_with_error
    >>> quantile_with_error(np.arange(12.0).reshape(3, 4), 0.5)
    (5.5, 3.17...)
    """
    quantile = float(np.quantile(values, level))
    _, share_error = mean_with_error((values <= quantile).astype(np.float64))
    if share_error is None:
        return quantile, None
    around = np.clip([level - share_error, level + share_error], 0.0, 1.0)
    low, high = np.quantile(values, around)
    return quantile, float(high - low) / 2
