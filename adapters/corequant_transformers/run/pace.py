"""Events of a run: each finished step, its time, and the time that remains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from corequant_transformers.model.surroundings import peak_rss_mib

__all__ = ["Pace"]


class Pace:
    """Reports each finished step, and the time that the remaining decoder blocks take.

    Parameters
    ----------
    steps : sequence of str
        Names of all steps of the run, in order.
    *listeners : callable
        Called with an event, a dictionary, after each step.

    Examples
    --------
    >>> from corequant_transformers.run.pace import Pace
    >>> pace = Pace(["block-0", "block-1", "block-2", "block-3", "exit"])
    >>> pace.step("block-0", 3.0)
    >>> pace.remaining() is None
    True
    >>> pace.step("block-1", 1.0)
    >>> pace.remaining()
    2.0
    """

    def __init__(self, steps: Sequence[str], *listeners: Callable[[dict[str, Any]], None]) -> None:
        self._left = list(steps)
        self._listeners = listeners
        self._seconds: list[float] = []

    def step(self, name: str, seconds: float) -> None:
        """Report a step that is done; earlier steps were done in an earlier run."""
        self._left = self._left[self._left.index(name) + 1 :]
        if name.startswith("block"):
            self._seconds.append(seconds)
        event = {
            "step": name,
            "seconds": round(seconds, 3),
            "steps_left": len(self._left),
            "remaining_seconds": self.remaining(),
            "peak_rss_mib": round(peak_rss_mib()),
        }
        for listener in self._listeners:
            listener(event)

    def remaining(self) -> float | None:
        """Return the seconds that the remaining blocks take; None before the second is rounded."""
        blocks = sum(name.startswith("block") for name in self._left)
        # The first also compiles and warms up.
        done = self._seconds[1:]
        if not self._left or (done and not blocks):
            return 0.0
        return round(blocks * sum(done) / len(done), 3) if done else None
