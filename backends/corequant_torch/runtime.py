"""Where Triton's kernels run: on which device, captured in a graph or not, or not at all.

A captured launch can't ask the device whether everything was finite and choose what to do then.
There the question becomes an assertion on the device: what is not finite stops a replay with
CUDA's error "device-side assert triggered", and never passes in silence.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import BackendError

__all__ = ["all_good", "capturing", "device_table", "has_triton", "interpreted", "on_device"]

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


def capturing(x: Tensor) -> bool:
    """Tell whether the work on ``x`` is being recorded in a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def all_good(good: Tensor) -> bool:
    """Return whether a flag on a device is set; while a graph is captured, assert it and go on."""
    if capturing(good):
        torch._assert_async(good, "corequant: NaN or infinity in a captured call")
        return True
    return bool(good)


def device_table(values: npt.NDArray[Any] | None, x: Tensor) -> Any:
    """Return signs, a permutation or another table on the device of ``x``; None for None.

    Recent ones are kept there, known by their bytes: a copy from the host would wait for the
    device, and can't be captured.
    """
    if values is None:
        return None
    if x.is_cpu:
        return torch.from_numpy(values)
    return _kept(values.tobytes(), values.dtype.str, x.device)


@lru_cache(maxsize=64)
def _kept(data: bytes, kind: str, device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, kind).copy()).to(device)


class on_device:
    """Launch kernels on the device of ``x``, on the stream that is current there.

    Raises
    ------
    BackendError
        In place of what Triton raises where it can't compile or launch: a missing C compiler, an
        unknown GPU, a driver that is too old. Memory that runs out stays torch's own error.
    """

    def __init__(self, x: Tensor) -> None:
        self._guard: Any = torch.cuda.device(x.device) if x.is_cuda else None

    def __enter__(self) -> None:
        """Make the device current."""
        if self._guard is not None:
            self._guard.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Leave the device, and say what to do about a kernel that can't run."""
        if self._guard is not None:
            self._guard.__exit__(kind, error, trace)
        if error is None or isinstance(error, torch.OutOfMemoryError):
            return
        if isinstance(error, Exception):
            raise BackendError(
                f"Triton can't run a kernel here ({kind.__name__}: {error}); mend what it names, "
                "or uninstall triton: torch operations then do the same, only slower"
            ) from error
