"""Marks of our directories, which stop readers that would compute nonsense."""

from __future__ import annotations

from typing import Any

from corequant.errors import CheckpointError
from corequant.storage.files import version_of

__all__ = ["CARD", "FORMAT_VERSION", "GUARD", "METHOD", "WEIGHTS", "check_settings"]

METHOD = "corequant"
"""The ``quant_method`` of directories that ``quantize`` writes."""

WEIGHTS = "corequant.safetensors"
"""Their weights, under a name that no other program looks for."""

CARD = "README.md"
"""The model card of directories and exports."""

FORMAT_VERSION = 1

GUARD = "import corequant_transformers first"
"""A value where Transformers alone expects another one, so that its error names the import.

In exports with run-time rotations it is the ``quantization_status``; their weights are compressed,
unless their real status follows in brackets. In directories that ``quantize`` writes it is
``transformers_weights``, which for Transformers alone is the name of the file of weights.
"""


def check_settings(values: Any, where: str) -> None:
    """Raise CheckpointError unless a ``quantization_config`` is one that can be read.

    Parameters
    ----------
    values : dict
    where : str
        The file that has it, for the message.
    """
    if not isinstance(values, dict) or values.get("quant_method") != METHOD:
        raise CheckpointError(f"quant_method of {where} must be {METHOD!r}")
    found = values.get("format_version")
    if found != FORMAT_VERSION:
        by = values.get("corequant_version")
        written = f", written by corequant {by}" if isinstance(by, str) else ""
        raise CheckpointError(
            f"format_version of {where} must be {FORMAT_VERSION} for this corequant "
            f"({version_of('corequant')}), got {found}{written}"
        )
    if not isinstance(values.get("recipe"), dict):
        raise CheckpointError(f"quantization_config of {where} must hold a recipe")
