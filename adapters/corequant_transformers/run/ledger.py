"""What a run has done so far: the results of its steps, and the hidden states that come next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

__all__ = ["Crossing", "Ledger", "MemoryLedger", "Windows"]


class Windows(Protocol):
    """Hidden states (windows, length, hidden), in memory as a torch tensor or in a file."""

    @property
    def shape(self) -> Any:
        """Windows, length, hidden."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> torch.Tensor: ...

    def __setitem__(self, index: int, value: torch.Tensor, /) -> None: ...

    def element_size(self) -> int:
        """Return the bytes of a number."""
        ...


class Crossing:
    """Hidden states that are read from one place while new ones are written to another."""

    def __init__(self, before: Windows, after: Windows) -> None:
        self.before, self.after = before, after

    @property
    def shape(self) -> Any:
        """Windows, length, hidden."""
        return self.before.shape

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, index: slice) -> torch.Tensor:
        return self.before[index]

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        self.after[index] = value

    def element_size(self) -> int:
        """Return the bytes of a number."""
        return self.before.element_size()


class Ledger(Protocol):
    """Where steps leave what they made. A step counts from ``commit`` on, or not at all."""

    def windows(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Windows:
        """Return room for hidden states that the next commit will hand on under ``name``."""
        ...

    def commit(
        self,
        step: str,
        report: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Windows],
    ) -> None:
        """Keep a step's report and tensors, and its hidden states until they aren't needed."""
        ...

    def resume(self, steps: list[str]) -> int:
        """Return how many of the steps are done already."""
        ...

    def report(self, step: str) -> dict[str, Any]:
        """Return the report of a step that is done."""
        ...

    def tensors(self, step: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a step that is done."""
        ...

    def state(self) -> dict[str, Windows]:
        """Return the hidden states of the last step that is done."""
        ...


class MemoryLedger:
    """A ledger that ends with the process."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {}
        self._state: dict[str, Windows] = {}

    def windows(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Windows:
        """Return room for hidden states."""
        room: Windows = torch.empty(shape, dtype=dtype)
        return room

    def commit(
        self,
        step: str,
        report: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Windows],
    ) -> None:
        """Keep a step's report and tensors, and its hidden states until the next one's."""
        kept = {name: t.detach().contiguous() for name, t in tensors.items()}
        self._steps[step] = (dict(report), kept)
        self._state = dict(state)

    def resume(self, steps: list[str]) -> int:
        """Return 0: nothing is there before it is done."""
        return 0

    def report(self, step: str) -> dict[str, Any]:
        """Return the report of a step that is done."""
        return self._steps[step][0]

    def tensors(self, step: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a step that is done."""
        return self._steps[step][1]

    def state(self) -> dict[str, Windows]:
        """Return the hidden states of the last step that is done."""
        return self._state
