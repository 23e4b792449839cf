"""A cache on each device of signs, permutations and other tables from the host.

A copy from the host would synchronize, and can't be captured in a CUDA graph. So tables are cached
by content: recent ones up to a number of bytes, and those that a graph has captured for ever, since
its replays read their memory.
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
"""Limit of uncaptured tables; a model of 80 layers with permutations of 28672 takes 18 MB."""


class KeptTables:
    """An LRU cache of tables on devices, by content.

    Parameters
    ----------
    limit : int
        Maximum bytes of tables that no graph has captured.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.forget()

    def forget(self) -> None:
        """Clear the cache; after a fork the devices' memory belongs to the parent."""
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
        """Return the table of that name on ``device``, made by ``make`` if it is not cached.

        Raises
        ------
        BackendError
            If it is not cached and a graph is being captured.
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
                    "signs, permutations and other tables must be on the device before a graph is "
                    f"captured, got one not on {device}; call the function once with the same "
                    "arguments before capturing it"
                )
            # Kernels read C order, and an inference tensor can't index one with gradients.
            with torch.inference_mode(False):
                made = torch.from_numpy(np.array(make(), order="C")).to(device)
            table = self._add(key, made)
        if device.type == "cuda" and not captured:
            # If evicted, its memory must not be reused while this stream still reads it.
            table.record_stream(torch.cuda.current_stream(device))
        return table

    def _add(self, key: Key, table: Tensor) -> Tensor:
        with self._lock:
            # Another thread may have added it since.
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
    """Return the table of that name on ``device``, made by ``make`` if it is not cached."""
    return _kept.find(name, device, make)


def device_table(values: npt.NDArray[Any] | None, x: Tensor) -> Any:
    """Return a host array as a tensor on the device of ``x``, cached there; None for None."""
    if values is None:
        return None
    if x.is_cpu:
        return torch.from_numpy(values)
    return kept_table((values.tobytes(), values.dtype.str), x.device, lambda: values)
