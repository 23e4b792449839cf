"""The widths that a budget chose."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from corequant_cli.tables.console import column, console, marked, table

__all__ = ["widths"]

_NUMBER = re.compile(r"\.\d+(?=\.)")

_LOSSES = {
    "kl": "expected divergence of the probabilities {:.3g} nats a token, layers taken one by one",
    "output": "relative squared errors of the layers' outputs {:.3g} in all",
    "weights": "relative squared errors of the layers' weights {:.3g} in all",
}


def widths(found: Mapping[str, Any]) -> None:
    """Print how many layers of each kind got which width, and what that comes to."""
    kinds: dict[str, Counter[str]] = {}
    for row in found["layers"]:
        kinds.setdefault(_NUMBER.sub("", row["name"]), Counter())[row["weights"]] += 1
    used = [spec for spec in found["candidates"] if any(spec in each for each in kinds.values())]
    names = _short(used)
    grid = table(
        column("layers", overflow="fold"),
        *(column(marked(names[spec]), justify="right") for spec in used),
        box=None,
        padding=(0, 1, 0, 0),
    )
    for kind, counts in kinds.items():
        grid.add_row(marked(kind), *(str(counts[spec] or "") for spec in used))
    console().print(grid)
    gap = "" if found["gap"] == 0 else f"; the best choice is at most {found['gap']:.2g} better"
    loss = _LOSSES[found["sensitivity"]].format(found["loss"])
    bits, asked = found["bits"], found["asked"]
    console().print(f"{bits:.4g} bits of a weight with its scales, of {asked:.4g}; {loss}{gap}")


def _short(specs: list[str]) -> dict[str, str]:
    """Return the formats alone, where they tell quantizers apart."""
    formats = {spec: spec.partition(":")[0] for spec in specs}
    return formats if len(set(formats.values())) == len(specs) else {spec: spec for spec in specs}
