"""Where a model computes, and how numbers get from there to NumPy's functions.

Whatever transforms a matrix does so in float64 on the CPU. Forward passes, statistics, adaptive
rounding and comparisons happen on the device.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import BackendError, NonFiniteError

__all__ = ["check_device", "check_finite", "device_of", "to_host"]


def check_device(device: str | torch.device) -> torch.device:
    """Return a device that tensors can be made on.

    Raises
    ------
    BackendError
        If there is none of that name here.

    Examples
    --------
    >>> from corequant_transformers.model.devices import check_device
    >>> check_device("cpu")
    device(type='cpu')
    """
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("tensors of the device meta hold no data")
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        # Unknown names, a torch built without CUDA, a device without kernels, and no name at all.
        reason = str(error).partition("\n")[0]
        raise BackendError(
            f"device must be one that torch finds here, got {device} ({reason})"
        ) from None
    return found


def device_of(module: torch.nn.Module) -> torch.device:
    """Return where a module's first parameter is; the CPU if it has none."""
    for parameter in module.parameters():
        return parameter.device
    return torch.device("cpu")


def to_host(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return a tensor's numbers as an array: a CPU tensor's memory, or a copy of another's."""
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def check_finite(name: str, x: torch.Tensor) -> None:
    """Raise NonFiniteError, about ``name``, where a tensor holds NaN or infinity."""
    # A sum with one of them is neither; a sum of large numbers may not be, and is looked at.
    if math.isfinite(float(x.sum())):
        return
    good = to_host(torch.isfinite(x))
    if not good.all():
        index = tuple(int(i) for i in np.unravel_index(int(good.argmin()), good.shape))
        raise NonFiniteError(name, int((~good).sum()), index, float(x[index]))
