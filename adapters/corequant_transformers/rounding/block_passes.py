"""Forward passes of a decoder block that stop before given layers.

While the block's layers are rounded group by group, each window has to reach a group's input with
the layers before it rounded. A pass that reaches it ends, and another one starts for the next
group, so that nothing is held in between. Recorded results of earlier passes are not computed
again, provided that a pass without them gives the same on the first window.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch

from corequant.errors import ArchitectureError, CorequantError
from corequant_transformers.rounding.replay import Records, left_out

__all__ = ["BlockPasses"]

Prepare = Callable[[str, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Called as ``prepare(layer, x, window)``; returns what the layer is called with instead of ``x``,
and what ``reach`` returns."""

_END = 1 << 62
"""Index beyond all groups: the pass is complete."""


class _Reached(BaseException):
    """Ends a pass before a group; not an Exception, so that no model catches it."""


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
    records : Records, optional
        Records of groups' inputs, with which later passes can skip what leads to them.
    experts : collection of int, optional
        Groups of experts.

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
        records: Records | None = None,
        experts: Collection[int] = (),
    ) -> None:
        self.window = -1
        self._records, self._experts = records, experts
        self._layers = [[block.get_submodule(name) for name in names] for names in groups]
        self._omitted: frozenset[int] = frozenset()
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
        if group in self._omitted:
            return x
        if group > self._target:
            raise _Reached
        replayed = self._omitted and self._records is not None and group in self._records.groups
        if group == self._group and self._prepared is not None and self._raw is not None:
            # A recorded input was compared when it was recorded.
            if replayed or x is self._raw or torch.equal(x, self._raw):
                return self._prepared
            raise ArchitectureError(
                f"{name} must read the same input as the layers that share its norm, got another"
            )
        if group < self._group:
            raise ArchitectureError(f"{name} must run before the layers described after it")
        # Release the last group's input before the next one is computed.
        self._prepared = self._found = None
        if self._records is not None and group == self._target:
            self._records.keep(group, self.window, x)
        elif self._records is not None and replayed:
            x = self._records.read(group, self.window)
        self._group, self._raw = group, x
        self._prepared, self._found = self._prepare(name, x, self.window)
        if group == self._target:
            raise _Reached
        return self._prepared

    def reach(self, window: int, group: int) -> torch.Tensor | None:
        """Return the input of the group's layers; None if no token of the window reaches them."""
        return self._shortest_pass(window, group)

    def finish(self, window: int) -> torch.Tensor:
        """Return the block's output for a window."""
        output = self._shortest_pass(window, _END)
        assert output is not None
        return output

    def check_observed(self, values: Sequence[Any]) -> None:
        """End a pass that leaves groups out if what is observed in it depends on them."""
        if not self._omitted:
            return
        for x in values:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.sum().isfinite():
                raise ArchitectureError("what is observed must not depend on what is left out")

    def _shortest_pass(self, window: int, target: int) -> torch.Tensor | None:
        """Return the result of a pass that leaves out the groups proven not to affect it."""
        records = self._records
        if records is None:
            return self._run(window, target)
        omitted = records.omitted(target, self._experts)
        if omitted:
            ended, found = self._attempt(window, target, omitted)
            # The sum is finite only if all of it is, and several times as fast as asking each.
            if ended and (found is None or bool(found.sum().isfinite())):
                return found
            # Either the block itself computes NaN, or something else reads the skipped outputs.
            records.proven[target] = frozenset()
        found = self._run(window, target)
        if omitted is None and found is not None:
            records.proven[target] = self._prove(window, target, found)
        return found

    def _prove(self, window: int, target: int, found: torch.Tensor) -> frozenset[int]:
        """Return groups without which a pass gives the same result on a window."""
        assert self._records is not None
        for omitted in self._records.candidates(target, self._experts):
            if not all(isinstance(m, torch.nn.Linear) for g in omitted for m in self._layers[g]):
                continue
            _, same = self._attempt(window, target, omitted)
            if same is not None and same.dtype == found.dtype and torch.equal(same, found):
                return omitted
            # Observers of the pass have seen NaN, so show them the right numbers again.
            self._run(window, target)
        return frozenset()

    def _attempt(
        self, window: int, target: int, omitted: frozenset[int]
    ) -> tuple[bool, torch.Tensor | None]:
        """Return whether a pass without some groups came to an end, and its result."""
        try:
            return True, self._run(window, target, omitted)
        except (CorequantError, RuntimeError, ValueError, TypeError, IndexError):
            return False, None

    def _run(
        self, window: int, target: int, omitted: frozenset[int] = frozenset()
    ) -> torch.Tensor | None:
        """Return the result of a pass, or None if it ends without reaching its group."""
        self.window, self._target, self._group, self._omitted = window, target, -1, omitted
        layers = [layer for group in sorted(omitted) for layer in self._layers[group]]
        output = None
        try:
            with left_out(layers) if layers else nullcontext():
                output = self._forward(window)
        except _Reached:
            pass
        finally:
            found = self._found if self._group == target else None
            self._omitted = frozenset()
            self._clear()
        return output if target == _END else found

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
        # The block's layers may refer to this object, which would live until cycles are collected.
        del self._forward, self._prepare
        self._clear()
