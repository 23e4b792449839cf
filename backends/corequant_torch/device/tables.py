"""Signs, permutations and other tables of the host, kept on the devices that read them.

A copy from the host would wait for the device, and can't be captured in a CUDA graph. So tables
are known by their contents and kept: recent ones up to a number of bytes, and those that a graph
has captured for good, since its replays read that memory whenever they are run.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import BackendError
from corequant_torch.device.graphs import capturing

__all__ = ["KeptTables", "device_table", "kept_table"]

Tensor = torch.Tensor
Key = tuple[Hashable, torch.device]

_BYTES = 1 << 28
"""Of tables that no graph reads; a model of 80 layers with permutations of 28672 takes 18 MB."""


class KeptTables:
    """Tables on devices, by what they are made from.

    Parameters
    ----------
    limit : int
        Bytes of tables that no graph has captured; the one longest unused goes first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.forget()

    def forget(self) -> None:
        """Begin anew, as the child of a fork must: the devices' memory is its parent's."""
        self._lock = Lock()
        self._captured: dict[Key, Tensor] = {}
        self._recent: OrderedDict[Key, Tensor] = OrderedDict()
        self._size = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        with self._lock:
            return self._size + sum(table.nbytes for table in self._captured.values())

    def find(
        self, name: Hashable, device: torch.device, make: Callable[[], npt.NDArray[Any]]
    ) -> Tensor:
        """Return the table of that name on ``device``; what ``make`` returns if it is new.

        Raises
        ------
        BackendError
            If it is new and a graph is being captured.
        """
        key, captured = (name, device), capturing(device)
        with self._lock:
            table = self._captured.get(key)
            if table is not None:
                return table
            table = self._recent.get(key)
            if table is not None and captured:
                self._captured[key] = self._recent.pop(key)
                self._size -= table.nbytes
            elif table is not None:
                self._recent.move_to_end(key)
        if table is None:
            if captured:
                raise BackendError(
                    f"a CUDA graph is being captured, and signs, a permutation or another table is "
                    f"not on {device} yet; call the function once with the same arguments before"
                )
            # In C order, whatever made it: kernels read memory. And what inference mode makes
            # can't index a tensor that records gradients.
            with torch.inference_mode(False):
                made = torch.from_numpy(np.array(make(), order="C")).to(device)
            table = self._add(key, made)
        if device.type == "cuda" and not captured:
            # Dropped while another stream still reads it, its memory must not be given away.
            table.record_stream(torch.cuda.current_stream(device))
        return table

    def _add(self, key: Key, table: Tensor) -> Tensor:
        with self._lock:
            # Another thread may have been quicker.
            known = self._captured.get(key)
            if known is None:
                known = self._recent.get(key)
            if known is not None:
                return known
            self._recent[key] = table
            self._size += table.nbytes
            while self._size > self.limit and len(self._recent) > 1:
                self._size -= self._recent.popitem(last=False)[1].nbytes
        return table


_kept = KeptTables(_BYTES)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.forget)


def kept_table(
    name: Hashable, device: torch.device, make: Callable[[], npt.NDArray[Any]]
) -> Tensor:
    """Return a table on ``device``, which ``make`` makes where it hasn't been kept there."""
    return _kept.find(name, device, make)


def device_table(values: npt.NDArray[Any] | None, x: Tensor) -> Any:
    """Return signs, a permutation or another table on the device of ``x``; None for None."""
    if values is None:
        return None
    if x.is_cpu:
        return torch.from_numpy(values)
    return kept_table((values.tobytes(), values.dtype.str), x.device, lambda: values)
