"""Forward passes of a decoder block that wait in front of given layers.

While the block's layers are rounded group by group, each window's pass has to get as far as the
group's input, wait until the group is rounded, and go on with the rounded weights. A pass that is
kept holds its activations while it waits. A pass that is not kept holds nothing and starts again
for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import greenlet
import torch

from corequant.errors import ArchitectureError

__all__ = ["BlockPasses"]

Prepare = Callable[[str, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Called as ``prepare(layer, x, window)``: what the layer is called with instead of ``x``, and what
``reach`` is to return."""


class _Abandoned(BaseException):
    """Ends a pass that nobody waits for; not an Exception, so that no model catches it."""


class _Here:
    """Which pass is running."""

    walk: _Pass


class BlockPasses:
    """The passes of all windows through one block, as a context.

    Parameters
    ----------
    block : torch.nn.Module
    groups : sequence of sequences of str
        Layers of the block that read the same input, by their paths in the block, in the order in
        which they run.
    forward : callable
        ``forward(window)`` runs the block on a window and returns its output.
    windows : int
    prepare : callable
        Called for the first of a group's layers that is reached; the others share its result.
    keep : bool
        Whether passes are kept while they wait.
    """

    def __init__(
        self,
        block: torch.nn.Module,
        groups: Sequence[Sequence[str]],
        forward: Callable[[int], torch.Tensor],
        windows: int,
        prepare: Prepare,
        keep: bool,
    ) -> None:
        self._here = _Here()
        kind = _Kept if keep else _Restarted
        self._passes = {w: kind(self._here, forward, prepare, w) for w in range(windows)}
        self._handles = [
            block.get_submodule(name).register_forward_pre_hook(self._hook(index, name))
            for index, names in enumerate(groups)
            for name in names
        ]

    def _hook(self, group: int, name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self._here.walk.arrive(group, name, args[0]), *args[1:])

        return hook

    @property
    def window(self) -> int:
        """Whose pass is running."""
        return self._here.walk.window

    def reach(self, window: int, group: int) -> torch.Tensor | None:
        """Return what the group's layers read; None if the window's tokens don't get there.

        Groups are asked for in their order.
        """
        return self._passes[window].reach(group)

    def finish(self, window: int) -> torch.Tensor:
        """Return the block's output for a window."""
        return self._passes[window].finish()

    def leave(self, window: int) -> None:
        """Go no further with a window and let go what its pass holds."""
        self._passes.pop(window).close()

    def __enter__(self) -> BlockPasses:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one in self._passes.values():
            one.close()
        for handle in self._handles:
            handle.remove()
        # Passes lead to themselves through these: a block would stay until cycles are looked for.
        self._here.__dict__.clear()
        self._passes.clear()


class _Pass:
    """What both kinds share: one input for all layers of a group."""

    def __init__(
        self,
        here: _Here,
        forward: Callable[[int], torch.Tensor],
        prepare: Prepare,
        window: int,
    ) -> None:
        self._here, self._forward, self._prepare, self.window = here, forward, prepare, window
        self._group = -1
        self._raw: torch.Tensor | None = None
        self._prepared: torch.Tensor | None = None
        self._found: torch.Tensor | None = None

    def _enter(self, group: int, name: str, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Return what a layer reads, and whether it is the first of its group."""
        if group == self._group and self._prepared is not None and self._raw is not None:
            if x is self._raw or torch.equal(x, self._raw):
                return self._prepared, False
            raise ArchitectureError(
                f"{name} must read what the layers described with it read, got another input"
            )
        if group < self._group:
            raise ArchitectureError(f"{name} must run before the layers described after it")
        # The last group's input is let go before the next one is made.
        self._prepared = self._found = None
        self._group, self._raw = group, x
        self._prepared, self._found = self._prepare(name, x, self.window)
        return self._prepared, True

    def arrive(self, group: int, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return what a layer reads, called in front of it while the pass runs."""
        raise NotImplementedError

    def reach(self, group: int) -> torch.Tensor | None:
        """Go on to a group and return its input, or None; it is not kept here."""
        raise NotImplementedError

    def _take(self, group: int) -> torch.Tensor | None:
        if self._group != group:
            # Further on already; what was found there is asked for later.
            return None
        found, self._found = self._found, None
        return found

    def finish(self) -> torch.Tensor:
        """Go on to the end and return the output."""
        raise NotImplementedError

    def _leave(self) -> None:
        self._raw = self._prepared = self._found = None

    def close(self) -> None:
        """Let everything go."""
        self._leave()


class _Restarted(_Pass):
    """A pass that starts again for each group."""

    _target = -1

    def arrive(self, group: int, name: str, x: torch.Tensor) -> torch.Tensor:
        if group > self._target:
            raise _Abandoned
        prepared, _ = self._enter(group, name, x)
        if group == self._target:
            raise _Abandoned
        return prepared

    def reach(self, group: int) -> torch.Tensor | None:
        self._target, self._group = group, -1
        self._here.walk = self
        try:
            self._forward(self.window)
        except _Abandoned:
            pass
        found = self._take(group)
        self._leave()
        return found

    def finish(self) -> torch.Tensor:
        # Beyond any group: nothing stops the pass.
        self._target, self._group = 1 << 62, -1
        self._here.walk = self
        output = self._forward(self.window)
        self._leave()
        return output


class _Kept(_Pass):
    """A pass that is left in the middle and gone on with, as a coroutine whose code knows nothing.

    Threads would do, too, but each has a pool of workers and a heap of its own in torch: on
    SmolLM2 that cost 1 GiB and a fifth of the time.
    """

    _output: torch.Tensor | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._coroutine = greenlet.greenlet(self._run)

    def arrive(self, group: int, name: str, x: torch.Tensor) -> torch.Tensor:
        prepared, first = self._enter(group, name, x)
        if first:
            parent = self._coroutine.parent
            assert parent is not None
            parent.switch()
        return prepared

    def reach(self, group: int) -> torch.Tensor | None:
        while self._group < group and not self._coroutine.dead:
            self._advance()
        return self._take(group)

    def finish(self) -> torch.Tensor:
        while not self._coroutine.dead:
            self._advance()
        assert self._output is not None
        output, self._output = self._output, None
        return output

    def _advance(self) -> None:
        self._coroutine.parent = greenlet.getcurrent()
        self._here.walk = self
        # An error of the pass comes up here.
        self._coroutine.switch()

    def _run(self) -> None:
        self._output = self._forward(self.window)
        self._leave()

    def close(self) -> None:
        # Raises GreenletExit where the pass waits, if it does.
        self._coroutine.throw()
        del self._coroutine
        super().close()
