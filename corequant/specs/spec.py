"""A quantizer as one value, and the string form that it reads and writes."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from corequant._validation import check_index
from corequant.errors import SpecError
from corequant.formats import FormatKind, NumberFormat, find_format, formats, suggestion
from corequant.specs.enumerations import (
    GROUPED,
    POWERS_OF_TWO,
    Granularity,
    ScaleFormat,
    ScaleRounding,
    ScaleSearch,
)

__all__ = ["QuantSpec", "presets", "qparams_shape"]


DEFAULT_PERCENTILE = 99.9
_SYMMETRY = {"symmetric": True, "asymmetric": False}
_GROUP = re.compile(r"(group|tensor_group)([1-9][0-9]{0,8})")
_PERCENTILE = re.compile(r"percentile([0-9]+(?:\.[0-9]+)?)")
_SPLIT = re.compile(r":(?![^()]*\))")


@dataclass(frozen=True)
class QuantSpec:
    """A quantizer: number format, granularity and scales.

    Attributes
    ----------
    format : NumberFormat
        What codes stand for; a name such as ``"int4"`` is looked up by ``find_format``.
    granularity : Granularity
        Which entries share a scale; this and the other enumerations take their values' names too.
    group_size : int, optional
        Entries per group; given exactly when the granularity is ``GROUP`` or ``TENSOR_GROUP``.
    symmetric : bool
        Without zero points (True), or with an integer zero point for each scale (False), which
        only integer formats can have.
    scale_search : ScaleSearch
        How scales are found.
    scale_format : ScaleFormat
        How scales are stored; ``E4M3`` requires ``TENSOR_GROUP``. ``FLOAT32`` means float64 for
        float64 input.
    scale_rounding : ScaleRounding, optional
        How scales are rounded to their format: ``FLOOR`` by default for powers of two and E8M0.
    percentile : float, optional
        Percentile of the magnitudes, in (0, 100], for ``PERCENTILE``; 99.9 by default.

    Raises
    ------
    SpecError
        For an unknown name or an invalid combination.

    Examples
    --------
    >>> from corequant import QuantSpec
    >>> spec = QuantSpec.parse("int4:token:asymmetric")
    >>> spec.symmetric, spec.format.bits
    (False, 4)
    >>> str(QuantSpec.parse("int4:group128"))
    'int4:group128:symmetric'
    >>> str(QuantSpec("float4_e2m1fn", "tensor_group", 16, scale_format="e4m3"))
    'nvfp4'
    """

    format: NumberFormat
    granularity: Granularity = Granularity.CHANNEL
    group_size: int | None = None
    symmetric: bool = True
    scale_search: ScaleSearch = ScaleSearch.ABSMAX
    scale_format: ScaleFormat = ScaleFormat.FLOAT32
    scale_rounding: ScaleRounding | None = None
    percentile: float | None = None

    if TYPE_CHECKING:
        # Names are taken as well as what they name, which a field's type doesn't tell.
        def __init__(
            self,
            format: NumberFormat | str,
            granularity: Granularity | str = ...,
            group_size: int | None = ...,
            symmetric: bool = ...,
            scale_search: ScaleSearch | str = ...,
            scale_format: ScaleFormat | str = ...,
            scale_rounding: ScaleRounding | str | None = ...,
            percentile: float | None = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        """Look names up and refuse invalid combinations."""
        if isinstance(self.format, str):
            object.__setattr__(self, "format", find_format(self.format))
        for field, kind in _ENUMS.items():
            value = getattr(self, field)
            if isinstance(value, str):
                members = {m.value: m for m in kind}
                object.__setattr__(self, field, _lookup(field, value, members))
            elif not isinstance(value, kind) and not (field == "scale_rounding" and value is None):
                raise SpecError(f"{field} must be a {kind.__name__} or its name, got {value!r}")
        if not isinstance(self.format, NumberFormat):
            raise SpecError(f"format must be a NumberFormat or its name, got {self.format!r}")
        if not isinstance(self.symmetric, bool):
            raise SpecError(f"symmetric must be True or False, got {self.symmetric!r}")
        power = self.scale_format in POWERS_OF_TWO
        if self.scale_rounding is None:
            rounding = ScaleRounding.FLOOR if power else ScaleRounding.NEAREST
            object.__setattr__(self, "scale_rounding", rounding)
        if self.scale_search is ScaleSearch.PERCENTILE and self.percentile is None:
            object.__setattr__(self, "percentile", DEFAULT_PERCENTILE)
        self._check_groups()
        self._check_format()
        self._check_scales(power)

    def _check_groups(self) -> None:
        if (self.granularity in GROUPED) != (self.group_size is not None):
            raise SpecError(
                f"group_size must be given exactly for granularities 'group' and 'tensor_group', "
                f"got group_size={self.group_size!r} with granularity {self.granularity.value!r}"
            )
        if self.group_size is None:
            return
        try:
            size = check_index("group_size", self.group_size)
        except (TypeError, ValueError):
            message = f"group_size must be a positive integer, got {self.group_size!r}"
            raise SpecError(message) from None
        object.__setattr__(self, "group_size", size)

    def _check_format(self) -> None:
        if self.format.kind is FormatKind.POWER:
            raise SpecError(f"format must have a zero, got {self.format.name}, which is for scales")
        whole = self.format.kind is FormatKind.INTEGER and not self.format.fraction_bits
        if not self.symmetric and not whole:
            raise SpecError(f"asymmetric needs an integer format, got {self.format.name}")

    def _check_scales(self, power: bool) -> None:
        search, rounding = self.scale_search, self.scale_rounding
        wide = power or self.scale_format is ScaleFormat.E4M3
        if (self.scale_format is ScaleFormat.E4M3) != (
            self.granularity is Granularity.TENSOR_GROUP
        ):
            raise SpecError(
                "scale_format 'e4m3' requires granularity 'tensor_group' and vice versa, got "
                f"{self.scale_format.value!r} with {self.granularity.value!r}"
            )
        if power == (rounding is ScaleRounding.NEAREST):
            raise SpecError(
                f"scale_rounding of {self.scale_format.value} scales must be "
                f"{'floor, ceil or even' if power else 'nearest'}, "
                f"got {rounding.value if rounding else None!r}"
            )
        if wide and not self.symmetric:
            raise SpecError(f"scale_format {self.scale_format.value!r} must be symmetric")
        if wide and search in (ScaleSearch.HQO, ScaleSearch.EXACT):
            raise SpecError(
                f"scale_search {search.value!r} needs float scales, got "
                f"{self.scale_format.value!r}; 'mse' tries all of its scales"
            )
        if search is ScaleSearch.EXACT and not self.symmetric:
            raise SpecError("scale_search 'exact' must be symmetric; 'mse' and 'hqo' need not be")
        if search is ScaleSearch.HQO and self.format.kind is not FormatKind.INTEGER:
            raise SpecError(f"scale_search 'hqo' needs an integer format, got {self.format.name}")
        if search is ScaleSearch.FOUR_OVER_SIX and not (
            self.scale_format is ScaleFormat.E4M3 and {4.0, 6.0} <= set(self.format.values)
        ):
            raise SpecError(f"scale_search 'four_over_six' needs nvfp4, got {self.format.name}")
        if self.percentile is not None and search is not ScaleSearch.PERCENTILE:
            raise SpecError(f"percentile needs scale_search 'percentile', got {search.value!r}")
        number = self.percentile
        if number is None:
            return
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= 100:
            raise SpecError(f"percentile must be a number in (0, 100], got {number!r}")

    @classmethod
    def parse(cls, text: str, **defaults: Any) -> QuantSpec:
        """Read the string form: a format or preset, then any of the other fields.

        Parameters
        ----------
        text : str
            Parts joined by colons, such as ``"int4:channel:symmetric:mse"``; a group is written
            ``group128``, a percentile ``percentile99.9``. The format or the name of a preset comes
            first, the others in any order: granularity, symmetry, search, format and rounding of
            the scales. ``search`` is another word for ``mse``.
        **defaults
            Values of the fields that the text leaves out.

        Returns
        -------
        QuantSpec

        Raises
        ------
        SpecError
            If a part is unknown (the message names what is near) or given twice.

        Examples
        --------
        >>> from corequant import QuantSpec
        >>> str(QuantSpec.parse("int3:group64", scale_search="mse"))
        'int3:group64:symmetric:mse'
        >>> str(QuantSpec.parse("mxfp4:search"))
        'mxfp4:mse'
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {type(text).__name__}")
        return _usual(text) if cls is QuantSpec and not defaults else cls._read(text, defaults)

    @classmethod
    def _read(cls, text: str, defaults: dict[str, Any]) -> QuantSpec:
        name, *parts = (part.strip() for part in _SPLIT.split(text.strip().lower()))
        fields: dict[str, Any] = {}
        for part in parts:
            for key, value in _parse_part(part, text).items():
                if key in fields:
                    raise SpecError(f"{text!r} gives {key} twice, the second time as {part!r}")
                fields[key] = value
        if name in presets:
            # A preset's own fields are not left out by the text, those it has by default are.
            own = {key: getattr(presets[name], key) for key in _PRESET_FIELDS}
            return cls(**{**defaults, **own, **fields})
        return cls(**{**defaults, "format": _find(name), **fields})

    def __str__(self) -> str:
        """Write the form that ``parse`` reads."""
        group = "" if self.group_size is None else str(self.group_size)
        own = tuple(getattr(self, key) for key in _PRESET_FIELDS)
        parts = [_PRESET_NAMES[own]] if own in _PRESET_NAMES else []
        if not parts:
            parts = [self.format.name, self.granularity.value + group]
            if self.format.kind is FormatKind.INTEGER:
                parts.append("symmetric" if self.symmetric else "asymmetric")
        if self.scale_search is ScaleSearch.PERCENTILE:
            parts.append(f"percentile{self.percentile!r}")
        elif self.scale_search is not ScaleSearch.ABSMAX:
            parts.append(self.scale_search.value)
        if own not in _PRESET_NAMES and self.scale_format is not ScaleFormat.FLOAT32:
            parts.append(self.scale_format.value)
        if self.scale_rounding in (ScaleRounding.CEIL, ScaleRounding.EVEN):
            parts.append(self.scale_rounding.value)
        return ":".join(parts)

    def replace(self, **changes: Any) -> QuantSpec:
        """Return a copy with some fields changed.

        The default rounding follows the scale format, the default percentile the search.

        Examples
        --------
        >>> from corequant import QuantSpec
        >>> str(QuantSpec.parse("int4:channel").replace(format="int8"))
        'int8:channel:symmetric'
        """
        if "scale_format" in changes:
            changes.setdefault("scale_rounding", None)
        if "scale_search" in changes:
            changes.setdefault("percentile", None)
        return replace(self, **changes)

    @property
    def scale_bits(self) -> int:
        """Bits that one stored scale takes."""
        return self.scale_format.bits


_ENUMS: dict[str, type[enum.Enum]] = {
    "granularity": Granularity,
    "scale_search": ScaleSearch,
    "scale_format": ScaleFormat,
    "scale_rounding": ScaleRounding,
}


def _microscaled(format_name: str) -> QuantSpec:
    return QuantSpec(formats[format_name], Granularity.GROUP, 32, scale_format=ScaleFormat.E8M0)


presets: Mapping[str, QuantSpec] = MappingProxyType(
    {
        "mxfp4": _microscaled("float4_e2m1fn"),
        "mxfp6_e2m3": _microscaled("float6_e2m3fn"),
        "mxfp6_e3m2": _microscaled("float6_e3m2fn"),
        "mxfp8_e4m3": _microscaled("float8_e4m3fn"),
        "mxfp8_e5m2": _microscaled("float8_e5m2"),
        "mxint8": _microscaled("int8f6"),
        "nvfp4": QuantSpec(
            formats["float4_e2m1fn"],
            Granularity.TENSOR_GROUP,
            16,
            scale_format=ScaleFormat.E4M3,
        ),
    }
)
"""Specs of the OCP MX formats and NVFP4 by name (read-only); ``QuantSpec.parse`` knows them.

Source: OCP Microscaling Formats (MX) specification v1.0, table 1; for NVFP4 NVIDIA's format of
16 numbers E2M1 with a scale E4M3 and one float32 scale for the tensor.
"""

_PRESET_FIELDS = ("format", "granularity", "group_size", "symmetric", "scale_format")
_PRESET_NAMES = {
    tuple(getattr(spec, key) for key in _PRESET_FIELDS): name for name, spec in presets.items()
}


def qparams_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    """Return the shape of the scales of an array (..., d).

    Parameters
    ----------
    shape : tuple of int
    spec : QuantSpec

    Returns
    -------
    tuple of int
        (..., d/g) for groups of g, (..., 1) for one scale a row, (1, ..., 1) for the whole tensor.

    Examples
    --------
    >>> from corequant.specs import QuantSpec, qparams_shape
    >>> qparams_shape((8, 64), QuantSpec.parse("mxfp4"))
    (8, 2)
    """
    if spec.granularity is Granularity.TENSOR:
        return (1,) * len(shape)
    if spec.group_size is not None:
        return (*shape[:-1], shape[-1] // spec.group_size)
    return (*shape[:-1], 1)


@lru_cache(maxsize=256)
def _usual(text: str) -> QuantSpec:
    """Read a string, cached: parsing takes as long as rounding a row."""
    return QuantSpec._read(text, {})


def _parse_part(part: str, text: str) -> dict[str, Any]:
    if part in _SYMMETRY:
        return {"symmetric": _SYMMETRY[part]}
    if part == "search":
        return {"scale_search": ScaleSearch.MSE}
    for field, kind in _ENUMS.items():
        members = {m.value: m for m in kind}
        if part in members and members[part] not in GROUPED:
            return {field: members[part]}
    if match := _GROUP.fullmatch(part):
        return {"granularity": Granularity(match[1]), "group_size": int(match[2])}
    if match := _PERCENTILE.fullmatch(part):
        return {"scale_search": ScaleSearch.PERCENTILE, "percentile": float(match[1])}
    known = [*_SYMMETRY, *(m.value for kind in _ENUMS.values() for m in kind), "search"]
    known = [{"group": "group128", "tensor_group": "tensor_group16"}.get(k, k) for k in known]
    raise SpecError(f"unknown part {part!r} in {text!r}{_hint(part, known)}")


def _find(name: str) -> NumberFormat:
    try:
        return find_format(name)
    except SpecError as error:
        hint = suggestion(name, presets, "the preset ")
        raise SpecError(f"{error}; or one of the presets {', '.join(presets)}{hint}") from None


def _lookup(what: str, name: str, table: Any) -> Any:
    if name not in table:
        raise SpecError(f"unknown {what} {name!r}{_hint(name, list(table))}")
    return table[name]


def _hint(word: str, known: list[str]) -> str:
    return f", expected one of {', '.join(known)}{suggestion(word, known)}"
