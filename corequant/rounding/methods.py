"""The rounding methods by name, and their options as one value.

A module of this package that has a ``METHOD`` adds it; recipes, ``round_together`` and the command
take its name then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import MappingProxyType

from corequant._validation import check_index
from corequant.errors import SpecError
from corequant.rounding.accumulators import AccumulatorSpec
from corequant.rounding.fitting import check_fitted
from corequant.rounding.problem import RoundedTensor
from corequant.specs import GROUPED, QuantSpec

__all__ = ["RoundingMethod", "RoundingOptions", "rounding_methods"]


@dataclass(frozen=True)
class RoundingMethod:
    """A rounding method and what it needs.

    Attributes
    ----------
    name : str
    round : callable, optional
        Function of the keywords ``W``, ``H``, ``spec``, ``name``, ``tokens``, ``global_scale``,
        those of ``options`` and, unless scales are chosen later, ``scales`` and ``zero_points``;
        returns a RoundedTensor. None stands for rounding to nearest.
    options : tuple of str
        Fields of ``RoundingOptions`` that it takes, under the same names.
    needs_moments : bool
        Whether it needs H; otherwise H may be None.
    needs_cross : bool
        Whether it takes G, as the keyword ``G``.
    optional_cross : bool
        Whether G may be None although the method takes it.
    weight_only_damping : float, optional
        Default damping where activations stay in float.
    """

    name: str
    round: Callable[..., RoundedTensor] | None
    options: tuple[str, ...] = ()
    needs_moments: bool = True
    needs_cross: bool = False
    optional_cross: bool = False
    weight_only_damping: float | None = None


@cache
def rounding_methods() -> Mapping[str, RoundingMethod]:
    """Return the methods of all modules of this package by name, ``nearest`` first."""
    names = (info.name for info in iter_modules([str(Path(__file__).parent)]))
    modules = [import_module(f"{__package__}.{name}") for name in names]
    rows: list[RoundingMethod] = [m.METHOD for m in modules if hasattr(m, "METHOD")]
    rows.sort(key=lambda row: (row.round is not None, row.name))
    return MappingProxyType({row.name: row for row in rows})


@dataclass(frozen=True)
class RoundingOptions:
    """How weights are rounded.

    Attributes
    ----------
    method : str
        A key of ``rounding_methods()``.
    damping : float, optional
        Addition to H's diagonal; by default the method's own.
    act_order : bool
        Round columns of large inputs first.
    correction : float
        Strength of GPTAQ's correction towards the float network's outputs.
    refit : bool
        Choose a group's scale when its first column is reached.
    fit_scales : bool
        Choose scales for the least error of the outputs, not of the weights; see ``fit_scales``.
    magr : float
        Strength of MagR, which shrinks the weights' range beforehand; 0 leaves them alone.
    accumulator : AccumulatorSpec, optional
        Accumulator that no dot product may overflow.
    steps : int
        Gradient steps of a learned method.

    Raises
    ------
    SpecError, TypeError, ValueError
        If a value has no meaning, or the method doesn't take the option.
    """

    method: str = "nearest"
    damping: float | None = None
    act_order: bool = True
    correction: float = 0.0
    refit: bool = False
    fit_scales: bool = False
    magr: float = 0.0
    accumulator: AccumulatorSpec | None = None
    steps: int = 400

    def __post_init__(self) -> None:
        """Refuse what the method doesn't take."""
        methods = rounding_methods()
        if self.method not in methods:
            raise SpecError(f"method must be one of {', '.join(methods)}, got {self.method!r}")
        for name in ("damping", "correction", "magr"):
            value = getattr(self, name)
            if value is None and name == "damping":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        for name in ("act_order", "refit", "fit_scales"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        check_index("steps", self.steps, 0)
        for name in ("damping", "correction", "refit", "accumulator", "magr"):
            takes = {m.name for m in methods.values() if name in m.options}
            if name == "magr":
                takes = {m.name for m in methods.values() if m.needs_moments}
            if getattr(self, name) and self.method not in takes:
                raise SpecError(
                    f"{name} needs method {' or '.join(sorted(takes))}, got {self.method!r}"
                )

    def check_spec(self, spec: QuantSpec) -> None:
        """Raise SpecError unless the options are of use for weights of a spec."""
        if self.refit and spec.granularity not in GROUPED:
            raise SpecError(f"refit needs a spec with groups, got {spec}")
        if self.fit_scales:
            check_fitted(spec)

    @property
    def needs_moments(self) -> bool:
        """Whether the method takes H."""
        return rounding_methods()[self.method].needs_moments or self.fit_scales

    @property
    def needs_float(self) -> bool:
        """Whether the method takes G, the float network's inputs against the quantized one's."""
        return rounding_methods()[self.method].needs_cross or bool(self.correction)
