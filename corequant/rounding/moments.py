"""Second moments of a layer's inputs in the quantized and in the float network, streamed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import backend_for
from corequant._validation import check_array, check_index
from corequant.errors import CalibrationError, NonFiniteError, ShapeError
from corequant.protocols import RegisteredBackend

__all__ = ["InputMoments"]


class InputMoments:
    """``H = X̃ᵀX̃ / n`` and ``G = XᵀX̃ / n`` of two streams of inputs, of the same tokens.

    Parameters
    ----------
    d : int
        Number of channels.
    cross : bool
        Collect G too.
    dtype : numpy dtype
        Dtype of all sums: float32 (default) or float64.

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
        self._backend: RegisteredBackend | None = None
        self._square: Any = np.zeros((d, d), self._dtype)
        self._cross: Any = np.zeros((d, d), self._dtype) if cross else None

    def update(self, quantized: Any, float_inputs: Any = None) -> InputMoments:
        """Add tokens and return self.

        Parameters
        ----------
        quantized : array (..., d)
            What the layer reads in the quantized network, X̃: NumPy array or torch tensor, of one
            kind and on one device in all updates. What tensors on a device sum up stays there.
        float_inputs : array (..., d), optional
            What it reads in the float network for the same tokens, X; needed for G.

        Raises
        ------
        NonFiniteError
            If an array or a sum holds NaN or infinity; nothing has been added then.
        ShapeError, TypeError
            If shapes don't fit each other and d, or an array is missing or not floating.
        """
        if (float_inputs is None) != (self._cross is None):
            wanted = "given" if self._cross is not None else "left out"
            raise TypeError(f"float_inputs must be {wanted} where cross={self._cross is not None}")
        arrays = {"quantized": quantized, "float_inputs": float_inputs}
        backend = self._owner(**arrays)
        counts = [self._tokens(n, x) for n, x in arrays.items() if x is not None]
        if len(set(counts)) > 1:
            raise ShapeError(
                f"float_inputs must have the tokens of quantized, {counts[0]}, got {counts[1]}"
            )
        square = self._product(backend, "quantized", quantized, None)
        if self._cross is not None:
            cross = self._product(backend, "float_inputs", float_inputs, quantized)
            self._cross = _sum(self._cross, cross)
        self._square = _sum(self._square, square)
        self._backend = backend
        self._count += counts[0]
        return self

    def merge(self, other: InputMoments) -> InputMoments:
        """Return the moments of both objects' tokens; neither is changed.

        Raises
        ------
        TypeError, ValueError
            If ``other`` isn't InputMoments of the same statistics.
        """
        if not isinstance(other, InputMoments):
            raise TypeError(f"other must be InputMoments, got {type(other).__name__}")
        mine, theirs = ((m.d, m._cross is not None, m._dtype.name) for m in (self, other))
        if mine != theirs:
            raise ValueError(f"other must collect the same moments {mine}, got {theirs}")
        merged = InputMoments(self.d, cross=self._cross is not None, dtype=self._dtype)
        merged._backend = self._backend or other._backend
        for one in (self, other):
            if one._backend not in (None, merged._backend):
                raise ValueError("other must have seen arrays of the same kind as self")
            if one._count:
                # Into sums of its own: zeros plus a sum are that sum.
                merged._square = _sum(merged._square, one._square + 0)
                if merged._cross is not None:
                    merged._cross = _sum(merged._cross, one._cross + 0)
        merged._count = self._count + other._count
        return merged

    @property
    def count(self) -> int:
        """Number n of tokens seen."""
        return self._count

    @property
    def H(self) -> Any:
        """``X̃ᵀX̃ / n`` (d, d), an array of the kind and on the device of what was seen."""
        return self._mean(self._square)

    @property
    def G(self) -> Any:
        """``XᵀX̃ / n`` (d, d), rows being the float network's channels; None without ``cross``."""
        return None if self._cross is None else self._mean(self._cross)

    def _mean(self, total: Any) -> Any:
        if self._count == 0:
            raise CalibrationError("InputMoments has seen no tokens; call update first")
        mean: Any = total / self._dtype.type(self._count)
        if isinstance(mean, np.ndarray) and self._backend is not None:
            return self._backend.from_numpy(mean)
        return mean

    def _owner(self, **arrays: Any) -> RegisteredBackend:
        """Return the backend of an update's arrays, which must be that of all before."""
        for name, x in arrays.items():
            if x is not None and not hasattr(x, "dtype"):
                raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        backend = backend_for(**arrays)
        if self._backend is not None and backend is not self._backend:
            raise TypeError(
                f"quantized must be an array of {self._backend.name} as before, got {backend.name}"
            )
        if self._count and not isinstance(self._square, np.ndarray):
            backend_for(sums=self._square, **arrays)
        return backend

    def _tokens(self, name: str, x: Any) -> int:
        check_array(name, x)
        if int(x.shape[-1]) != self.d:
            raise ShapeError(f"{name} must have d={self.d} channels, got shape {tuple(x.shape)}")
        return math.prod(x.shape[:-1])

    def _product(self, backend: RegisteredBackend, name: str, x: Any, q: Any) -> Any:
        """Return ``xᵀq``, or ``xᵀx``."""
        product = backend.add_gram(None, x, q, double=self._dtype == np.float64)
        if isinstance(product, np.ndarray):
            with np.errstate(over="ignore"):
                product = product.astype(self._dtype, copy=False)
        # What is not finite shows in the products: no pass of its own looks for it.
        owner = backend_for(product=product)
        bad = owner.first_nonfinite(product)
        if bad is not None:
            lost = backend.first_nonfinite(x)
            if lost is not None:
                raise NonFiniteError(name, *lost)
            raise NonFiniteError(f"the second moments of {name}", *bad)
        return product


def _sum(total: Any, part: Any) -> Any:
    if isinstance(total, np.ndarray) and not isinstance(part, np.ndarray):
        # The first sum of a device: there is nothing yet to add it to.
        return part
    total += part
    return total
