"""Conversion of CPU tensors to NumPy arrays on the same memory, and back.

NumPy lacks bfloat16 and float8: these are passed as integers and viewed as ml_dtypes, without a
copy in either direction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import BackendError

__all__ = [
    "VIEWS",
    "View",
    "to_numpy",
    "to_numpy_or_none",
    "to_torch",
    "to_torch_or_none",
]

Array = npt.NDArray[Any]


class View(NamedTuple):
    """The dtypes by which a dtype that NumPy lacks is converted."""

    bits: torch.dtype
    plain: np.dtype[Any]
    array: np.dtype[Any]


def _view(bits: torch.dtype, plain: Any, array: Any) -> View:
    return View(bits, np.dtype(plain), np.dtype(array))


VIEWS: dict[torch.dtype, View] = {
    torch.bfloat16: _view(torch.int16, np.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: _view(torch.uint8, np.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e4m3fnuz: _view(torch.uint8, np.uint8, ml_dtypes.float8_e4m3fnuz),
    torch.float8_e5m2: _view(torch.uint8, np.uint8, ml_dtypes.float8_e5m2),
    torch.float8_e5m2fnuz: _view(torch.uint8, np.uint8, ml_dtypes.float8_e5m2fnuz),
    torch.float8_e8m0fnu: _view(torch.uint8, np.uint8, ml_dtypes.float8_e8m0fnu),
}
_BACK = {view.array: (view.plain, tensor) for tensor, view in VIEWS.items()}


def to_numpy(x: torch.Tensor) -> Array:
    """Return an array on a CPU tensor's memory; BackendError if it has none that is dense.

    Examples
    --------
    >>> import torch
    >>> from corequant_torch.cpu.bridge import to_numpy
    >>> to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype.name
    'bfloat16'
    """
    if not x.is_cpu:
        raise BackendError(
            f"the tensor must be on the CPU, got {x.device}; move it yourself with .cpu(), tensors "
            "are never copied silently"
        )
    if x.requires_grad:
        x = x.detach()
    view = VIEWS.get(x.dtype)
    try:
        array: Array = x.numpy() if view is None else x.view(view.bits).numpy().view(view.array)
    except (RuntimeError, TypeError) as error:
        raise BackendError(
            f"the tensor must be dense and in ordinary memory, got layout {x.layout} "
            f"and dtype {x.dtype} ({error})"
        ) from None
    return array


def to_torch(array: Array) -> torch.Tensor:
    """Return a tensor on an array's memory.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from corequant_torch.cpu.bridge import to_torch
    >>> to_torch(np.ones(2, ml_dtypes.bfloat16))
    tensor([1., 1.], dtype=torch.bfloat16)
    """
    view = _BACK.get(array.dtype)
    if view is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(view[0])).view(view[1])


def to_numpy_or_none(x: torch.Tensor | None) -> Array | None:
    """Return ``to_numpy(x)``, or None for None."""
    return None if x is None else to_numpy(x)


def to_torch_or_none(array: Array | None) -> torch.Tensor | None:
    """Return ``to_torch(array)``, or None for None."""
    return None if array is None else to_torch(array)
