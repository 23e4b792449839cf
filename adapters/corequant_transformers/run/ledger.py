"""A run's steps: their names, their results, and the hidden states that the next one reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from corequant_transformers.model.forward import Windows
from corequant_transformers.model.parts import ENTRY, EXIT, OUTSIDE
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.transforms.verification import Verification

__all__ = [
    "ALLOCATE",
    "Ledger",
    "MemoryLedger",
    "quantizes",
    "steps_of",
    "summarize",
    "width_steps",
]

ALLOCATE = "allocate"
"""The step that chooses widths from the measurements of earlier steps."""


def steps_of(plan: ModelPlan) -> list[str]:
    """Return the names of the steps of quantizing a model, in order."""
    blocks = range(plan.dimensions.blocks)
    return [
        *(f"calibrate-{i:05d}" for i in blocks),
        "choose",
        *width_steps(plan),
        *([OUTSIDE] if plan.architecture.outside else []),
        ENTRY,
        *(f"block-{i:05d}" for i in blocks),
        EXIT,
    ]


def width_steps(plan: ModelPlan) -> list[str]:
    """Return the names of the steps that choose widths, an empty list without a budget."""
    if plan.recipe.bits is None:
        return []
    blocks = [f"{i:05d}" for i in range(plan.dimensions.blocks)]
    steps = [f"measure-{i}" for i in blocks]
    if plan.recipe.sensitivity == "kl":
        steps += ["gradient", *(f"gradient-{i}" for i in reversed(blocks))]
    return [*steps, ALLOCATE]


def quantizes(step: str) -> bool:
    """Return whether a step's tensors are a part of the quantized model."""
    return step.startswith("block") or step in (OUTSIDE, ENTRY, EXIT)


_SPARE_BYTES = 128 << 20
"""Largest size of one record; a block has two to four."""


class Ledger(Protocol):
    """Storage of the results of steps. A step is done once it is committed."""

    def windows(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Windows:
        """Return room for hidden states that the next commit will hand on under ``name``."""
        ...

    def spare(self, name: str, shape: tuple[int, ...]) -> Windows | None:
        """Return room for float32 numbers until the next commit, or None if it isn't plentiful.

        It may hold what an earlier step left there.
        """
        ...

    def keep(self, step: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors of a step that the next commit makes count."""
        ...

    def commit(
        self,
        step: str,
        report: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Windows],
    ) -> None:
        """Keep a step's report and further tensors, and hidden states until they aren't needed."""
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
        self._kept: dict[str, torch.Tensor] = {}

    def windows(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Windows:
        """Return room for hidden states."""
        room: Windows = torch.empty(shape, dtype=dtype)
        return room

    def spare(self, name: str, shape: tuple[int, ...]) -> Windows | None:
        """Return room for float32 numbers unless it would take more than 128 MiB."""
        small = math.prod(shape) * torch.float32.itemsize <= _SPARE_BYTES
        return self.windows(name, shape, torch.float32) if small else None

    def keep(self, step: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors of a step that the next commit makes count."""
        self._kept |= {name: t.detach().contiguous() for name, t in tensors.items()}

    def commit(
        self,
        step: str,
        report: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Windows],
    ) -> None:
        """Keep a step's report and further tensors, and hidden states until the next one's."""
        self.keep(step, tensors)
        self._steps[step] = (dict(report), self._kept)
        self._kept = {}
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


def summarize(ledger: Ledger, steps: Sequence[str], online: int) -> dict[str, Any]:
    """Return a report's rows: signs, regions, verification, matrices and the widths chosen.

    Parameters
    ----------
    ledger : Ledger
    steps : sequence of str
        All of them are done.
    online : int
        Number of rotations at run time.
    """
    reports = {step: ledger.report(step) for step in steps}
    regions = [row for r in reports.values() for row in r.get("regions", [])]
    regions.sort(key=lambda row: row["index"])
    changes = [r["changed"] for r in reports.values() if "changed" in r]
    verification = Verification(
        reports[EXIT]["error"],
        tuple(r["error"] for step, r in reports.items() if step.startswith("block")),
        sum(changes),
        online,
        reports[ENTRY]["moving"],
    )
    return {
        "verification": verification,
        "signs": reports["choose"]["signs"],
        "regions": [{k: v for k, v in row.items() if k != "index"} for row in regions],
        "matrices": [row for r in reports.values() for row in r.get("matrices", [])],
        "widths": reports[ALLOCATE]["widths"] if ALLOCATE in reports else None,
    }
