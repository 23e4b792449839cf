"""Hidden states between decoder blocks: all calibration windows, in memory or in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["Crossing", "HiddenStates", "Windows"]


class Windows(Protocol):
    """Hidden states (windows, length, hidden), in memory as a torch tensor or in a file."""

    @property
    def shape(self) -> Any:
        """Windows, length, hidden."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> torch.Tensor: ...

    def __setitem__(self, index: int, value: torch.Tensor, /) -> None: ...


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


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """What a decoder block reads, in both networks.

    Attributes
    ----------
    quantized : Windows (windows, length, hidden), float32
        In the network whose earlier blocks are quantized.
    float_states : Windows (windows, length, hidden), float32, optional
        In the float network, in the same rotated basis. None where the method compares nothing, or
        with what the float block makes of ``quantized``.
    """

    quantized: Windows
    float_states: Windows | None
