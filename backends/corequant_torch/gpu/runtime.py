"""Availability of Triton, and launches on a tensor's device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from corequant.errors import BackendError, CorequantError
from corequant_torch.device.graphs import capturing

__all__ = ["has_triton", "interpreted", "on_device"]

Tensor = torch.Tensor


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    import importlib.util

    return importlib.util.find_spec("triton") is not None


@cache
def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


class on_device:
    """A context that launches kernels on the device of ``x``, on its current stream.

    Raises
    ------
    BackendError
        If Triton can't compile or launch: a missing C compiler, an unknown GPU, an outdated
        driver. Out-of-memory errors and failures of earlier work on the device stay torch's errors.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._guard: Any = torch.cuda.device(x.device) if x.is_cuda else None

    def __enter__(self) -> None:
        """Make the device current."""
        if self._guard is not None:
            self._guard.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Restore the device, and raise BackendError if a kernel can't run."""
        if self._guard is not None:
            self._guard.__exit__(kind, error, trace)
        if not isinstance(error, Exception) or isinstance(error, _OTHERS):
            return
        device = self._x.device
        if device.type == "cuda" and not capturing(device):
            # Earlier work may have failed, and the launch only have reported it.
            torch.cuda.synchronize(device)
        raise BackendError(
            f"Triton can't run a kernel here ({kind.__name__}: {error}); fix the cause, or "
            "uninstall triton to use torch operations, which are slower"
        ) from error


_OTHERS = (CorequantError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors that pass unchanged; the last are CUDA's."""
