"""Whether Triton is there, and launches on a tensor's device."""

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
    """Tell whether Triton can be imported."""
    import importlib.util

    return importlib.util.find_spec("triton") is not None


@cache
def interpreted() -> bool:
    """Tell whether Triton's kernels run in its interpreter, on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


class on_device:
    """Launch kernels on the device of ``x``, on the stream that is current there.

    Raises
    ------
    BackendError
        In place of what Triton raises where it can't compile or launch: a missing C compiler, an
        unknown GPU, a driver that is too old. Memory that runs out, and what earlier work on the
        device has broken, stay torch's own errors.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._guard: Any = torch.cuda.device(x.device) if x.is_cuda else None

    def __enter__(self) -> None:
        """Make the device current."""
        if self._guard is not None:
            self._guard.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Leave the device, and say what to do about a kernel that can't run."""
        if self._guard is not None:
            self._guard.__exit__(kind, error, trace)
        if not isinstance(error, Exception) or isinstance(error, _OTHERS):
            return
        device = self._x.device
        if device.type == "cuda" and not capturing(device):
            # Whatever ran before may have failed since, and launching is only what noticed.
            torch.cuda.synchronize(device)
        raise BackendError(
            f"Triton can't run a kernel here ({kind.__name__}: {error}); mend what it names, "
            "or uninstall triton: torch operations then do the same, only slower"
        ) from error


_OTHERS = (CorequantError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors that say themselves what is wrong; the last is for what CUDA reports."""
