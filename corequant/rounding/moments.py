"""Second moments of a layer's inputs in the quantized and in the float network, streamed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_array, check_finite, check_index
from corequant.errors import CalibrationError, ShapeError

__all__ = ["InputMoments"]

Array = npt.NDArray[Any]


class InputMoments:
    """``H = X̃ᵀX̃ / n`` and ``G = XᵀX̃ / n`` of two streams of inputs, token by token the same text.

    Parameters
    ----------
    d : int
        Number of channels.
    cross : bool
        Collect G too.
    dtype : numpy dtype
        Of all sums: float32 (default) or float64.

    Raises
    ------
    TypeError, ValueError
        If ``d`` is not a positive integer or ``dtype`` another one.

    Notes
    -----
    Sums and the count are kept, so that statistics of different tokens merge. A sum of squares that
    overflows its dtype is a ``NonFiniteError``, as NaN is.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.rounding import InputMoments
    >>> seen = np.array([[1.0, -3.0], [3.0, 1.0]])
    >>> moments = InputMoments(2).update(np.round(seen / 2) * 2, seen)
    >>> moments.count, moments.H, moments.G
    (2, array([[8., 0.],
           [0., 8.]], dtype=float32), array([[ 6., -2.],
           [ 2.,  6.]], dtype=float32))
    """

    def __init__(self, d: int, *, cross: bool = True, dtype: npt.DTypeLike = np.float32) -> None:
        self.d = check_index("d", d)
        self._dtype = np.dtype(dtype)
        if self._dtype not in (np.float32, np.float64):
            raise ValueError(f"dtype must be float32 or float64, got {self._dtype}")
        self._count = 0
        self._square = np.zeros((d, d), self._dtype)
        self._cross = np.zeros((d, d), self._dtype) if cross else None

    def update(self, quantized: Any, float_inputs: Any = None) -> InputMoments:
        """Add tokens and return self.

        Parameters
        ----------
        quantized : numpy.ndarray (..., d)
            What the layer reads in the quantized network, X̃.
        float_inputs : numpy.ndarray (..., d), optional
            What it reads in the float network for the same tokens, X; needed for G.

        Raises
        ------
        NonFiniteError
            If an array or a sum holds NaN or infinity; nothing has been added then.
        ShapeError, TypeError
            If shapes don't fit each other and d, or an array is missing or none of floats.
        """
        if (float_inputs is None) != (self._cross is None):
            wanted = "given" if self._cross is not None else "left out"
            raise TypeError(f"float_inputs must be {wanted} where cross={self._cross is not None}")
        q = self._rows("quantized", quantized)
        square = _product("quantized", q, q)
        if self._cross is not None:
            x = self._rows("float_inputs", float_inputs)
            if len(x) != len(q):
                raise ShapeError(
                    f"float_inputs must have the tokens of quantized, {len(q)}, got {len(x)}"
                )
            self._cross += _product("float_inputs", x, q)
        self._square += square
        self._count += len(q)
        return self

    def merge(self, other: InputMoments) -> InputMoments:
        """Return the moments of both objects' tokens; neither is changed.

        Raises
        ------
        TypeError, ValueError
            If ``other`` is something else or collects other statistics.
        """
        if not isinstance(other, InputMoments):
            raise TypeError(f"other must be InputMoments, got {type(other).__name__}")
        mine, theirs = ((m.d, m._cross is not None, m._dtype.name) for m in (self, other))
        if mine != theirs:
            raise ValueError(f"other must collect the same moments {mine}, got {theirs}")
        merged = InputMoments(self.d, cross=self._cross is not None, dtype=self._dtype)
        merged._count = self._count + other._count
        np.add(self._square, other._square, out=merged._square)
        if merged._cross is not None:
            np.add(self._cross, other._cross, out=merged._cross)  # type: ignore[arg-type]
        return merged

    @property
    def count(self) -> int:
        """Number n of tokens seen."""
        return self._count

    @property
    def H(self) -> Array:
        """``X̃ᵀX̃ / n`` (d, d)."""
        return self._mean(self._square)

    @property
    def G(self) -> Array | None:
        """``XᵀX̃ / n`` (d, d), rows being the float network's channels; None without ``cross``."""
        return None if self._cross is None else self._mean(self._cross)

    def _mean(self, total: Array) -> Array:
        if self._count == 0:
            raise CalibrationError("InputMoments has seen no tokens; call update first")
        mean: Array = total / self._dtype.type(self._count)
        return mean

    def _rows(self, name: str, x: Any) -> Array:
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name} must be a numpy.ndarray, got {type(x).__name__}")
        check_array(name, x)
        if x.shape[-1] != self.d:
            raise ShapeError(f"{name} must have d={self.d} channels, got shape {x.shape}")
        rows: Array = np.ascontiguousarray(x.reshape(-1, self.d), dtype=self._dtype)
        return rows


def _product(name: str, x: Array, q: Array) -> Array:
    """Return ``xᵀq``; of one matrix with itself it takes half the work in BLAS."""
    with np.errstate(over="ignore", invalid="ignore"):
        product: Array = x.T @ q
    # What is not finite shows in the products: no pass of its own looks for it.
    if not np.isfinite(product).all():
        check_finite(name, x)
        check_finite(f"the second moments of {name}", product)
    return product
