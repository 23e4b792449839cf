"""A block's forward pass in three: up to its experts, expert by expert, and from there on.

With all windows taken to the experts first, each expert is read once for all of them, not once for
each. Sums have the order that they have in one pass, so that results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from corequant.errors import ArchitectureError
from corequant_transformers.model.expert_list import ExpertList
from corequant_transformers.model.forward import Windows, run_block
from corequant_transformers.model.replicas import standing_in
from corequant_transformers.model.streamed_experts import StreamedExperts

__all__ = [
    "ExpertCalls",
    "Room",
    "StreamedPass",
    "given_outputs",
    "record_calls",
    "sum_so_far",
]

Room = Callable[[str, tuple[int, ...], torch.dtype], Windows]
"""Called with a name, a shape and a dtype: returns room for as many windows."""


class _Called(BaseException):
    """Ends a pass at the experts; not an Exception, so that no model catches it."""


@dataclass(frozen=True, eq=False)
class ExpertCalls:
    """What a block's experts are called with, window after window.

    Attributes
    ----------
    inputs : Windows (windows, tokens, hidden)
    chosen, shares : Windows (windows, tokens, experts per token)
    """

    inputs: Windows
    chosen: Windows
    shares: Windows

    def __len__(self) -> int:
        return len(self.inputs)

    def of(
        self, window: int, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the arguments of one call."""
        arguments = (self.inputs, self.chosen, self.shares)
        x, chosen, shares = (each[window : window + 1][0].to(device) for each in arguments)
        return x, chosen, shares


def record_calls(
    experts: ExpertList, run: Callable[[int], object], windows: int, room: Room, name: str
) -> ExpertCalls:
    """Take windows through a block up to its experts.

    Parameters
    ----------
    experts : ExpertList
    run : callable
        ``run(window)`` runs the block that they are in.
    windows : int
    room : callable
    name : str
        Of what is kept, in ``room``.

    Raises
    ------
    ArchitectureError
        If the block doesn't call its experts once, with hidden states, indices and shares.
    """
    kept: list[Windows] = []
    for window in range(windows):
        for at, value in enumerate(_call(experts, run, window)):
            if window == 0:
                key = f"{name}-{('inputs', 'chosen', 'shares')[at]}"
                kept.append(room(key, (windows, *value.shape), value.dtype))
            kept[at][window] = value
    return ExpertCalls(*kept)


def _call(
    experts: ExpertList, run: Callable[[int], object], window: int
) -> tuple[torch.Tensor, ...]:
    found: list[tuple[torch.Tensor, ...]] = []

    def stop(*given: torch.Tensor) -> None:
        found.append(given)
        raise _Called

    with standing_in(experts, stop):
        try:
            run(window)
        except _Called:
            pass
    if len(found) != 1 or len(found[0]) != 3:
        raise ArchitectureError(
            "a decoder block must call its experts with hidden states, the experts' indices and "
            f"their shares, got {len(found)} calls"
        )
    return found[0]


@contextmanager
def given_outputs(
    experts: ExpertList, outputs: Windows, window: Callable[[], int]
) -> Iterator[None]:
    """Have experts give what they were found to give, within the context.

    Parameters
    ----------
    experts : ExpertList
    outputs : Windows (windows, tokens, hidden)
    window : callable
        Tells the window that is running.
    """

    def give(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        k = window()
        # Blocks may add to it in place.
        return outputs[k : k + 1][0].to(x.device, x.dtype, copy=True)

    with standing_in(experts, give):
        yield


class StreamedPass:
    """The pass of all windows through a block whose experts are open a group at a time.

    Parameters
    ----------
    block : torch.nn.Module
    experts : StreamedExperts
        In the block.
    hidden : Windows (windows, length, hidden)
        Input of the block, which ``finish`` replaces by its output.
    arguments : dict
        Its further arguments.
    room : callable
    name : str
        Of what is kept, in ``room``.
    """

    def __init__(
        self,
        block: Any,
        experts: StreamedExperts,
        hidden: Windows,
        arguments: Mapping[str, Any],
        room: Room,
        name: str,
    ) -> None:
        self._block, self._experts, self._hidden = block, experts, hidden
        self._arguments, self._window = arguments, -1
        self.calls = record_calls(experts, self._run, len(hidden), room, name)
        shape = tuple(self.calls.inputs.shape)
        self._outputs = room(f"{name}-outputs", shape, self.calls.inputs[0:1].dtype)

    def _run(self, window: int) -> torch.Tensor:
        state = self._hidden[window : window + 1]
        return run_block(self._block, state, self._arguments, window)

    def add(self, window: int, indices: range) -> None:
        """Take a window through a group of experts, the first group first."""
        x, chosen, shares = self.calls.of(window, self._experts.device)
        total = sum_so_far(self._outputs, window, x, indices)
        self._experts.add(total, x, chosen, shares, indices)
        self._outputs[window] = total

    def finish(self, window: int) -> None:
        """Take a window from the experts to the block's end."""
        self._window = window
        with given_outputs(self._experts, self._outputs, lambda: self._window):
            self._hidden[window] = self._run(window)

    def run(self) -> None:
        """Take all windows through the block."""
        for indices in self._experts.groups():
            with self._experts.opened(indices):
                for window in range(len(self._hidden)):
                    self.add(window, indices)
        for window in range(len(self._hidden)):
            self.finish(window)


def sum_so_far(outputs: Windows, window: int, x: torch.Tensor, indices: range) -> torch.Tensor:
    """Return what experts before some gave a window: zeros like ``x`` where these are the first."""
    if indices.start == 0:
        return torch.zeros_like(x)
    return outputs[window : window + 1][0].to(x.device, x.dtype)
