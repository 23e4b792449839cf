"""The interface that exports read, for a model that is still to be quantized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corequant_transformers.checkpoint.reader import Stored
from corequant_transformers.model.layouts import standardize
from corequant_transformers.model.parts import skeleton
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.transforms.matrices import restructure

__all__ = ["Candidate", "Prospect"]


@dataclass(frozen=True, eq=False)
class Prospect:
    """A model as ``Stored`` will have it.

    Attributes
    ----------
    plan : ModelPlan
    config : transformers.PreTrainedConfig
        The float model's.
    folder : Path
        Where the float model is, for error messages.
    source_name : str
        Name of its file or directory; empty for a model in memory.
    """

    plan: ModelPlan
    config: Any
    folder: Path = Path()
    source_name: str = ""

    @property
    def float_config(self) -> dict[str, Any]:
        """The float model's ``config.json``."""
        values: dict[str, Any] = self.config.to_dict()
        return values

    def rest(self) -> list[str]:
        """Return the names of what won't be quantized."""
        return list(self.shapes())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of everything that won't be quantized, by its name."""
        model = skeleton(self.config)
        standardize(model, self.plan)
        restructure(model, self.plan)
        left = {f"{m.name}.weight" for m in self.plan.quantized}
        if self.plan.tied:
            left.add(f"{self.plan.architecture.head}.weight")
        return {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in left}


Candidate = Stored | Prospect
"""Models that can be checked; only a ``Stored`` can be written."""
