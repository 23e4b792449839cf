"""The errors that corequant raises.

Every error derives from :class:`CorequantError` and, where Python has a class for the kind of
fault, from that class too, so that ``except ValueError`` keeps working. A message names the
argument, the rule that it breaks and the value that was given.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AccumulatorError",
    "ArchitectureError",
    "BackendError",
    "BlockSizeError",
    "CalibrationError",
    "CheckpointError",
    "CorequantError",
    "HadamardOrderError",
    "HessianError",
    "NonFiniteError",
    "OutputError",
    "PermutationError",
    "RecipeError",
    "RunError",
    "ShapeError",
    "SpecError",
    "VerificationError",
]


class CorequantError(Exception):
    """Base class of every error that corequant raises on purpose."""


class ShapeError(CorequantError, ValueError):
    """An array has the wrong number of axes or the wrong length along one."""


class BlockSizeError(CorequantError, ValueError):
    """A block or group size does not divide the axis that it should cut into blocks."""


class HadamardOrderError(CorequantError, ValueError):
    """No Hadamard matrix of the requested order can be constructed."""


class PermutationError(CorequantError, ValueError):
    """An index array is not a permutation of ``0..d-1``."""


class NonFiniteError(CorequantError, ValueError):
    """An array holds NaN or infinity where only finite numbers have a meaning.

    Attributes
    ----------
    name : str
        Name of the offending array.
    count : int
        How many of its entries are not finite.
    index : tuple of int
        Index of the first one, in row-major order.
    value : float
        The first one.
    """

    def __init__(self, name: str, count: int, index: tuple[int, ...], value: float) -> None:
        self.name = name
        self.count = count
        self.index = index
        self.value = value
        super().__init__(
            f"{name} must be finite, got {count} non-finite "
            f"{'value' if count == 1 else 'values'}, the first ({value}) at index {index}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it is made from, so that it comes back from a process of a pool."""
        return type(self), (self.name, self.count, self.index, self.value)


class SpecError(CorequantError, ValueError):
    """A quantization spec is malformed or asks for a combination that has no meaning."""


class RecipeError(CorequantError, ValueError):
    """A recipe is malformed or contradicts itself."""


class BackendError(CorequantError, RuntimeError):
    """No backend is installed, or none is able, to work on the given arrays."""


class CalibrationError(CorequantError, ValueError):
    """Calibration data is missing, empty or too short."""


class ArchitectureError(CorequantError, ValueError):
    """A model's architecture is unknown or contradicts its description."""


class CheckpointError(CorequantError, OSError):
    """A model directory or file is missing, truncated or malformed."""


class OutputError(CorequantError, OSError):
    """An output location can't be written, or holds something already."""


class RunError(CorequantError, RuntimeError):
    """A run can't begin or go on: it is about something else, damaged, or another process's."""


class VerificationError(CorequantError, RuntimeError):
    """A transformed model does not compute the function of the float model, or did not change."""


class HessianError(CorequantError, ValueError):
    """A second-moment matrix ``H = XᵀX / n`` is none: asymmetric, or not positive semidefinite."""


class AccumulatorError(CorequantError, ValueError):
    """An accumulator is too narrow for any nonzero weight, or meets scales that it can't sum."""
