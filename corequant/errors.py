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
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "CorequantError",
    "HadamardOrderError",
    "HessianError",
    "MissingPackageError",
    "NonFiniteError",
    "OutputError",
    "PermutationError",
    "RecipeError",
    "RunError",
    "ShapeError",
    "SpecError",
    "TaskError",
    "VerificationError",
]


class CorequantError(Exception):
    """Base class of every error that corequant raises on purpose."""


class ShapeError(CorequantError, ValueError):
    """An array has the wrong number of axes or the wrong length along one."""


class BlockSizeError(CorequantError, ValueError):
    """A block or group size does not divide the length of its axis."""


class BudgetError(CorequantError, ValueError):
    """No choice of formats meets a budget of size or loss; the message states the range."""


class HadamardOrderError(CorequantError, ValueError):
    """No Hadamard matrix of the requested order can be constructed."""


class PermutationError(CorequantError, ValueError):
    """An index array is not a permutation of ``0..d-1``."""


class NonFiniteError(CorequantError, ValueError):
    """An array holds NaN or infinity where finite numbers are required.

    Attributes
    ----------
    name : str
        Name of the offending array.
    count : int
        Number of its non-finite entries.
    index : tuple of int
        Index of the first non-finite entry, in row-major order.
    value : float
        The first non-finite entry.
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
        """Pickle the constructor's arguments, so that worker processes can return it."""
        return type(self), (self.name, self.count, self.index, self.value)


class SpecError(CorequantError, ValueError):
    """A quantization spec is malformed or combines incompatible fields."""


class RecipeError(CorequantError, ValueError):
    """A recipe is malformed or contradicts itself."""


class BackendError(CorequantError, RuntimeError):
    """No installed backend can work on the given arrays."""


class MissingPackageError(BackendError, ImportError):
    """A package of one of the extras is not installed; the message says how to install it."""


class CalibrationError(CorequantError, ValueError):
    """Calibration data is missing, empty or too short."""


class TaskError(CorequantError, ValueError):
    """A file of tasks to evaluate on is missing, empty or malformed."""


class ArchitectureError(CorequantError, ValueError):
    """A model's architecture is unknown or contradicts its description."""


class CheckpointError(CorequantError, OSError):
    """A model directory or file is missing, truncated or malformed."""


class OutputError(CorequantError, OSError):
    """An output location can't be written, or holds something already."""


class RunError(CorequantError, RuntimeError):
    """A run can't start or resume: it is damaged, of other inputs, or in use by another process."""


class VerificationError(CorequantError, RuntimeError):
    """A transformed model does not compute the function of the float model, or did not change."""


class HessianError(CorequantError, ValueError):
    """A matrix H is not a second-moment matrix: asymmetric, or not positive semidefinite."""


class AccumulatorError(CorequantError, ValueError):
    """An accumulator is too narrow for any nonzero weight, or its tile spans several scales."""
