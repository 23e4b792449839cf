"""What can't be asked while a CUDA graph is captured: flags are counted, and asked for later.

A captured launch can't ask the device whether everything was finite and choose what to do then.
There the device counts what was not, at each replay, and ``nonfinite_replays`` asks later.
"""

from __future__ import annotations

import torch

from corequant.errors import BackendError

__all__ = ["all_good", "capturing", "nonfinite_replays"]

Tensor = torch.Tensor


def capturing(device: torch.device) -> bool:
    """Tell whether the stream that is current on ``device`` is recorded in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class _Counter:
    """How often replays on a device met what was not finite."""

    def __init__(self, device: torch.device) -> None:
        # What inference mode makes may not be changed outside of it.
        with torch.inference_mode(False):
            self.count = torch.zeros(1, dtype=torch.int32, device=device)
            self.place = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, good: Tensor) -> None:
        """Count one unless ``good``; atomically, since graphs may run on several streams."""
        self.count.scatter_add_(0, self.place, good.logical_not().reshape(1).int())


_counters: dict[torch.device, _Counter] = {}


def all_good(good: Tensor) -> bool:
    """Return whether a flag on a device is set; while a graph is captured, let it count, go on."""
    device = good.device
    if capturing(device):
        counter = _counters.get(device)
        if counter is None:
            raise BackendError(
                f"a CUDA graph is being captured, and nothing has been checked on {device} before; "
                "call the function once with the same arguments before capturing it"
            )
        counter.add(good)
        return True
    if device not in _counters:
        # Not while capturing: each replay would begin by clearing it.
        _counters.setdefault(device, _Counter(device))
    return bool(good)


def nonfinite_replays(device: torch.device | str | None = None) -> int:
    """Return how many captured calls met NaN or infinity in replays, and begin to count anew.

    A call that is replayed in a CUDA graph can't raise ``NonFiniteError``: it writes codes and
    values that mean nothing, and counts. Asking waits for the device.

    Parameters
    ----------
    device : torch.device or str, optional
        The device of the replays; by default the current CUDA device.

    Returns
    -------
    int
        Calls since the last time; 0 if every number was finite.

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
