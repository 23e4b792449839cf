"""How long a run will still take, from the steps that are done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from corequant_transformers.budgets import peak_rss_mib

__all__ = ["Pace"]


class Pace:
    """Tells of each step that is done, and estimates the time that remains.

    Parameters
    ----------
    steps : list of str
        Of the whole run.
    *listeners : callable
        Called with an event, a dictionary, after each step.
    """

    def __init__(self, steps: list[str], *listeners: Callable[[dict[str, Any]], None]) -> None:
        self._left = list(steps)
        self._listeners = listeners
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def step(self, name: str, seconds: float) -> None:
        """Note that a step is done and that those before it need not be."""
        while self._left and self._left.pop(0) != name:
            pass
        self._seconds[_kind(name)].append(seconds)
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
        """Return the seconds that remain, or None before the second decoder block."""
        blocks = len(self._seconds["calibrate"]) + len(self._seconds["block"])
        if blocks < 2:
            return None
        return round(sum(self._expected(_kind(step)) for step in self._left), 3)

    def _expected(self, kind: str) -> float:
        found = self._seconds[kind]
        if not found:
            other = self._seconds["block"] or self._seconds["calibrate"]
            return _mean(other)
        return _mean(found)


def _mean(seconds: list[float]) -> float:
    # The first of a kind also compiles and warms up.
    counted = seconds[1:] or seconds
    return sum(counted) / len(counted)


def _kind(step: str) -> str:
    return step.partition("-")[0]
