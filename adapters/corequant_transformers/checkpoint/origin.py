"""Architecture descriptions in a directory's config, so that loading needs no registration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corequant.errors import ArchitectureError, CheckpointError
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["read_description", "report_description", "written_description"]

_FIELD = "architecture"


def written_description(plan: ModelPlan) -> dict[str, Any]:
    """Return a ``quantization_config``'s entry for a description; empty for a shipped one."""
    return {} if plan.is_shipped else {_FIELD: plan.architecture.to_dict()}


def report_description(plan: ModelPlan, rehearsed: Any) -> dict[str, Any]:
    """Return a report's entries for a description and its check on random weights.

    Parameters
    ----------
    plan : ModelPlan
    rehearsed : Verification, optional
        None where the description is the package's.
    """
    found = written_description(plan)
    return found if rehearsed is None else {**found, "rehearsal": rehearsed.to_dict()}


def read_description(settings: Mapping[str, Any], config: Any, where: Path) -> Architecture | None:
    """Return the description that a ``quantization_config`` holds; None without one.

    Parameters
    ----------
    settings : mapping
    config : transformers.PreTrainedConfig
        The float model's.
    where : Path
        The file, for messages.

    Raises
    ------
    CheckpointError
        If it is malformed, or is about another model type.
    """
    values = settings.get(_FIELD)
    if values is None:
        return None
    try:
        found = Architecture.from_dict(values)
    except ArchitectureError as error:
        raise CheckpointError(f"{_FIELD} of {where}: {error}") from error
    if found.model_type != config.model_type:
        raise CheckpointError(
            f"{_FIELD}.model_type of {where} must be {config.model_type!r}, the model's own, got "
            f"{found.model_type!r}"
        )
    return found
