"""CUDA graph capture: checks that can't be read while capturing are counted on the device.

A captured launch can't read back whether its values are finite. Instead the device counts at each
replay the launches that met NaN or Inf, and ``nonfinite_replays`` reads the count later.
"""

from __future__ import annotations

import torch

from corequant.errors import BackendError

__all__ = ["all_good", "capturing", "nonfinite_replays"]

Tensor = torch.Tensor


def capturing(device: torch.device) -> bool:
    """Return whether the current stream of ``device`` is being captured in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class _Counter:
    """The number of replays on a device that met NaN or Inf."""

    def __init__(self, device: torch.device) -> None:
        # Inference tensors can't be changed outside of inference mode.
        with torch.inference_mode(False):
            self.count = torch.zeros(1, dtype=torch.int32, device=device)
            self.place = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, good: Tensor) -> None:
        """Add one unless ``good``; atomically, since graphs may run on several streams."""
        self.count.scatter_add_(0, self.place, good.logical_not().reshape(1).int())


_counters: dict[torch.device, _Counter] = {}


def all_good(good: Tensor) -> bool:
    """Return a flag on a device; while a graph is captured, count it there and return True."""
    device = good.device
    if capturing(device):
        counter = _counters.get(device)
        if counter is None:
            raise BackendError(
                f"a CUDA graph must not capture the first call on {device}; call the function once "
                "with the same arguments before capturing it"
            )
        counter.add(good)
        return True
    if device not in _counters:
        # Not while capturing: each replay would clear it first.
        _counters.setdefault(device, _Counter(device))
    return bool(good)


def nonfinite_replays(device: torch.device | str | None = None) -> int:
    """Return how many replayed calls met NaN or infinity, and reset the count.

    A call that is replayed in a CUDA graph can't raise ``NonFiniteError``: its codes and values are
    invalid, and it is counted. Reading the count synchronizes with the device.

    Parameters
    ----------
    device : torch.device or str, optional
        Device of the replays; by default the current CUDA device.

    Returns
    -------
    int
        Calls since the last reset; 0 if all values were finite.

    Examples
    --------
    >>> from corequant_torch import nonfinite_replays
    >>> nonfinite_replays("cpu")
    0
    """
    where = torch.device("cuda" if device is None else device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    counter = _counters.get(where)
    if counter is None:
        return 0
    if where.type == "cuda":
        # Replays may have run on any stream.
        torch.cuda.synchronize(where)
    found = int(counter.count)
    counter.count.scatter_add_(0, counter.place, torch.full_like(counter.count, -found))
    return found
