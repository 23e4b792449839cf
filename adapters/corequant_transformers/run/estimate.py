"""How long a run will still take, from the steps that are done and what a plan says of the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from corequant.specs import ScaleSearch
from corequant_transformers.model.parts import ENTRY, EXIT, part_plan
from corequant_transformers.planning.memory import peak_rss_mib
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["Pace", "efforts"]

_OPEN = 1500
"""Reading and checking a weight costs about as much as so many operations of a matrix product."""

_TRANSFORM = 2500
"""The same for transforming it in float64 and comparing and writing the result."""

_SEARCH = 1500
"""The same for a search of its scale."""

_VERIFIED = 128
_JUDGED = 512


def efforts(plan: ModelPlan, shape: tuple[int, ...] | None = None) -> dict[str, float]:
    """Return how much work each step of quantizing a model is, in operations of matrix products.

    Two steps of one kind compare well, and are what ``Pace`` goes by where it can. Those of
    different kinds compare roughly, on any machine: within a factor of two.

    Parameters
    ----------
    plan : ModelPlan
    shape : tuple of int, optional
        Calibration windows and their length; the recipe's by default.

    Returns
    -------
    dict of str to float
        By the names of ``streaming.steps_of``.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> from corequant.recipe import Recipe
    >>> from corequant_transformers.run.estimate import efforts
    >>> work = efforts(cqhf.plan(cqhf.tiny_model("llama"), Recipe(block_size=16)))
    >>> list(work)
    ['calibrate-00000', 'calibrate-00001', 'choose', 'entry', 'block-00000', 'block-00001', 'exit']
    >>> work["calibrate-00000"] == work["calibrate-00001"]
    True
    """
    recipe = plan.recipe
    samples, length = shape or (recipe.samples, recipe.sequence_length)
    tokens = samples * length
    nearest = _TRANSFORM + (_SEARCH if recipe.weights.scale_search is not ScaleSearch.ABSMAX else 0)
    work: dict[str, float] = {}
    rounding: dict[str, float] = {}
    for index in range(plan.dimensions.blocks):
        rows = part_plan(plan, index)
        weights = used = 0.0
        for matrix in rows.matrices:
            count = matrix.shape[0] * matrix.shape[1]
            weights += count
            used += count * plan.share(matrix)
        trials = recipe.sign_trials if recipe.sign_trials > 1 else 0
        work[f"calibrate-{index:05d}"] = (
            _OPEN * weights
            + 2 * used * tokens
            + trials * (nearest * weights + 2 * used * min(_JUDGED, length))
        )
        # In float64, by the float block and the transformed one.
        verified = 2 * 2 * 2 * used * min(_VERIFIED, length)
        rounding[f"block-{index:05d}"] = (
            (_OPEN + nearest) * weights + verified + _adaptive(rows, tokens, used)
        )
    sizes = plan.dimensions
    edge = float(sizes.vocabulary * sizes.hidden)
    logits = 2 * 2 * 2 * edge * min(_VERIFIED, length)
    work["choose"] = 0.0
    work[ENTRY] = (_OPEN + _TRANSFORM) * edge
    return {**work, **rounding, EXIT: (_OPEN + _TRANSFORM) * edge + logits}


def _adaptive(rows: ModelPlan, tokens: int, used: float) -> float:
    """Return what rounding for a block's inputs takes besides rounding it to nearest."""
    recipe = rows.recipe
    options = recipe.rounding_options()
    if not options.needs_moments:
        return 0.0
    networks = 2 if options.needs_float else 1
    total = networks * 2 * used * tokens
    for matrix in rows.quantized:
        out, width = matrix.shape
        share = rows.share(matrix)
        # Once for each input, that is for each matrix that is no wider than what it reads is long.
        total += networks * 2 * share * tokens * width * min(out, width) / 2
        sweeps = 4.0 * options.steps if options.method == "learned" else 8.0
        total += sweeps * out * width**2 + width**3
    return total


class Pace:
    """Tells of each step that is done, and estimates the time that remains.

    Parameters
    ----------
    work : mapping of str to float
        How much each step of the whole run is, in their order; see ``efforts``.
    *listeners : callable
        Called with an event, a dictionary, after each step.

    Examples
    --------
    >>> from corequant_transformers.run.estimate import Pace
    >>> work = {"calibrate-0": 2.0, "calibrate-1": 2.0, "block-0": 4.0, "block-1": 4.0}
    >>> pace = Pace(work)
    >>> pace.step("calibrate-0", 1.0)
    >>> pace.remaining() is None
    True
    >>> pace.step("calibrate-1", 1.0)
    >>> pace.remaining()
    4.0
    """

    def __init__(
        self, work: Mapping[str, float], *listeners: Callable[[dict[str, Any]], None]
    ) -> None:
        self._work = dict(work)
        self._left = list(work)
        self._listeners = listeners
        self._done: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def step(self, name: str, seconds: float) -> None:
        """Note that a step is done and that those before it need not be."""
        while self._left and self._left.pop(0) != name:
            pass
        self._done[_kind(name)].append((seconds, self._work[name]))
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
        blocks = len(self._done["calibrate"]) + len(self._done["block"])
        if blocks < 2:
            return None
        return round(sum(self._expected(step) for step in self._left), 3)

    def _expected(self, step: str) -> float:
        own = self._done[_kind(step)]
        found = own or self._done["block"] or self._done["calibrate"]
        return _rate(found) * self._work[step]


def _rate(done: list[tuple[float, float]]) -> float:
    """Return seconds by work."""
    # The first of a kind also compiles and warms up.
    counted = done[1:] or done
    return sum(s for s, _ in counted) / max(sum(work for _, work in counted), 1e-9)


def _kind(step: str) -> str:
    return step.partition("-")[0]
