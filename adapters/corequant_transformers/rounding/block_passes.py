"""Forward passes of a decoder block that stop in front of given layers.

While the block's layers are rounded group by group, each window has to get as far as a group's
input with the layers before it rounded. A pass that has got there ends, and another one starts for
the next group, so that nothing is held in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from corequant.errors import ArchitectureError

__all__ = ["BlockPasses"]

Prepare = Callable[[str, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Called as ``prepare(layer, x, window)``: what the layer is called with instead of ``x``, and what
``reach`` returns."""

_END = 1 << 62
"""A group beyond all others: nothing stops the pass."""


class _Reached(BaseException):
    """Ends a pass in front of a group; not an Exception, so that no model catches it."""


class BlockPasses:
    """Passes of windows through one block, as a context.

    Parameters
    ----------
    block : torch.nn.Module
    groups : sequence of sequences of str
        Layers of the block that read the same input, by their paths in the block, in the order in
        which they run.
    forward : callable
        ``forward(window)`` runs the block on a window and returns its output.
    prepare : callable
        Called for the first of a group's layers that is reached; the others share its result.

    Attributes
    ----------
    window : int
        The window of the pass that is running.
    """

    def __init__(
        self,
        block: torch.nn.Module,
        groups: Sequence[Sequence[str]],
        forward: Callable[[int], torch.Tensor],
        prepare: Prepare,
    ) -> None:
        self.window = -1
        self._forward, self._prepare = forward, prepare
        self._target = self._group = -1
        self._raw: torch.Tensor | None = None
        self._prepared: torch.Tensor | None = None
        self._found: torch.Tensor | None = None
        self._handles = [
            block.get_submodule(name).register_forward_pre_hook(self._hook(index, name))
            for index, names in enumerate(groups)
            for name in names
        ]

    def _hook(self, group: int, name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self._arrive(group, name, args[0]), *args[1:])

        return hook

    def _arrive(self, group: int, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return the input of a layer, or end the pass before it."""
        if group > self._target:
            raise _Reached
        if group == self._group and self._prepared is not None and self._raw is not None:
            if x is self._raw or torch.equal(x, self._raw):
                return self._prepared
            raise ArchitectureError(
                f"{name} must read the same input as the layers that share its norm, got another"
            )
        if group < self._group:
            raise ArchitectureError(f"{name} must run before the layers described after it")
        # The last group's input is let go before the next one is made.
        self._prepared = self._found = None
        self._group, self._raw = group, x
        self._prepared, self._found = self._prepare(name, x, self.window)
        if group == self._target:
            raise _Reached
        return self._prepared

    def reach(self, window: int, group: int) -> torch.Tensor | None:
        """Return what the group's layers read; None if the window's tokens don't get there."""
        try:
            self._run(window, group)
        except _Reached:
            pass
        found = self._found if self._group == group else None
        self._clear()
        return found

    def finish(self, window: int) -> torch.Tensor:
        """Return the block's output for a window."""
        output = self._run(window, _END)
        self._clear()
        return output

    def _run(self, window: int, target: int) -> torch.Tensor:
        self.window, self._target, self._group = window, target, -1
        return self._forward(window)

    def _clear(self) -> None:
        self._raw = self._prepared = self._found = None

    def __enter__(self) -> BlockPasses:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        # The block's layers may lead here: it would stay until cycles are looked for.
        del self._forward, self._prepare
        self._clear()
