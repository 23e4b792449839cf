"""What the steps of a run reported, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corequant_transformers.model.parts import ENTRY, EXIT
from corequant_transformers.run.ledger import ALLOCATE, Ledger
from corequant_transformers.transforms.verification import Verification

__all__ = ["summarize"]


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
