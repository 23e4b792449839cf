"""The result of quantizing a model: in memory, or in the directory that it was written to."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corequant.errors import CheckpointError
from corequant_transformers.checkpoint.reader import is_quantized, load
from corequant_transformers.checkpoint.writer import save
from corequant_transformers.model.surroundings import undisturbed
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.transforms.matrices import Choices
from corequant_transformers.transforms.verification import Verification

__all__ = ["Quantized"]


@dataclass(frozen=True, eq=False)
class Quantized:
    """Result of ``quantize``.

    Attributes
    ----------
    tokenizer : transformers tokenizer or None
    plan : ModelPlan
    choices : Choices
        Permutations and factors by region.
    verification : Verification
    report : dict
        Plain values: recipe, verification, a row per region and matrix, seconds, peak memory.
    float_config : str
        Text of the float model's ``config.json``.
    copied_files : list of Path
        Tokenizer files of the float model.
    made : transformers.PreTrainedModel, optional
        The model, if it was made in memory.
    path : Path, optional
        The directory that it was written to otherwise.
    """

    tokenizer: Any
    plan: ModelPlan
    choices: Choices
    verification: Verification
    report: dict[str, Any]
    float_config: str
    copied_files: list[Path]
    made: Any = None
    path: Path | None = None

    @functools.cached_property
    def model(self) -> Any:
        """The model, with a ``QuantizedLinear`` for every quantized matrix.

        One that was written part by part is loaded when it is first asked for.

        Raises
        ------
        CheckpointError
            If it was written for another program.
        """
        if self.made is None and self.path is not None and not is_quantized(self.path):
            raise CheckpointError(
                f"{self.path} must be in corequant's own format to be loaded here; it was written "
                "for another program"
            )
        return load(self.path) if self.made is None and self.path is not None else self.made

    @undisturbed()
    def save(self, output: str | Path) -> Path:
        """Write the model to a new or empty directory and return its path.

        Raises
        ------
        ArchitectureError
            If the model has something that loading wouldn't build from its config, such as a hook.
        OutputError
            If it can't be written or doesn't read back equal; nothing is left there then.
        """
        return save(
            self.model,
            self.plan,
            output,
            report=self.report,
            float_config=self.float_config,
            tokenizer=self.tokenizer,
            copied_files=self.copied_files,
        )
