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
    "kl": "expected KL divergence {:.3g} nats per token, the sum of layers taken one by one",
    "output": "relative squared errors of the layers' outputs {:.3g} in all",
    "weights": "relative squared errors of the layers' weights {:.3g} in all",
}


def widths(found: Mapping[str, Any]) -> None:
    """Print the number of layers of each kind with each width, and the resulting bits and loss."""
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
    gap = "" if found["gap"] == 0 else f"; the optimum is at most {found['gap']:.2g} better"
    loss = _LOSSES[found["sensitivity"]].format(found["loss"])
    bits, asked = found["bits"], found["asked"]
    console().print(f"{bits:.4g} bits per weight with scales, of {asked:.4g}; {loss}{gap}")


def _short(specs: list[str]) -> dict[str, str]:
    """Return names of the formats alone, if they distinguish the quantizers."""
    formats = {spec: spec.partition(":")[0] for spec in specs}
    return formats if len(set(formats.values())) == len(specs) else {spec: spec for spec in specs}
