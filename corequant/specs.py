"""What to round to: number format, granularity of the scales, symmetry, search of the scale."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from typing import Any

from corequant.errors import SpecError
from corequant.formats import NumberFormat, formats

__all__ = ["Granularity", "QuantSpec", "ScaleSearch"]


class Granularity(enum.Enum):
    """Which entries share one scale.

    ``TENSOR`` the whole array, ``CHANNEL`` each row of a weight ``(out_features, in_features)``,
    ``TOKEN`` each row of activations ``(..., d)``, ``GROUP`` each run of ``group_size`` entries of
    the last axis.
    """

    TENSOR = "tensor"
    CHANNEL = "channel"
    TOKEN = "token"
    GROUP = "group"


class ScaleSearch(enum.Enum):
    """How a scale is found: from the largest magnitude, or by least squared rounding error."""

    ABSMAX = "absmax"
    MSE = "mse"


_SYMMETRY = {"symmetric": True, "asymmetric": False}
_GROUP = re.compile(r"group([1-9][0-9]*)")


@dataclass(frozen=True)
class QuantSpec:
    """A quantizer, described.

    Attributes
    ----------
    format : NumberFormat
        What codes stand for; a name such as ``"int4"`` is looked up in ``formats``.
    granularity : Granularity
        Which entries share a scale; the value's name is accepted too.
    group_size : int, optional
        Entries per group; given exactly when the granularity is ``GROUP``.
    symmetric : bool
        Without zero points (True), or with an integer zero point for each scale (False).
    scale_search : ScaleSearch
        ``absmax`` covers the whole range; ``mse`` shrinks it to the least squared error.

    Raises
    ------
    SpecError
        For an unknown name or a combination without a meaning.

    Examples
    --------
    >>> from corequant import QuantSpec
    >>> spec = QuantSpec.parse("int4:token:asymmetric")
    >>> spec.symmetric, spec.format.bits
    (False, 4)
    >>> str(QuantSpec.parse("int4:group128"))
    'int4:group128:symmetric'
    """

    format: NumberFormat
    granularity: Granularity = Granularity.CHANNEL
    group_size: int | None = None
    symmetric: bool = True
    scale_search: ScaleSearch = ScaleSearch.ABSMAX

    def __post_init__(self) -> None:
        """Look names up and refuse combinations without a meaning."""
        if isinstance(self.format, str):
            object.__setattr__(self, "format", _lookup("format", self.format, formats))
        for field, kind in (("granularity", Granularity), ("scale_search", ScaleSearch)):
            value = getattr(self, field)
            if isinstance(value, str):
                members = {m.value: m for m in kind}
                object.__setattr__(self, field, _lookup(field, value, members))
        grouped = self.granularity is Granularity.GROUP
        if grouped != (self.group_size is not None):
            raise SpecError(
                f"group_size must be given exactly for granularity 'group', got "
                f"group_size={self.group_size!r} with granularity {self.granularity.value!r}"
            )
        if self.group_size is not None and (
            isinstance(self.group_size, bool)
            or not isinstance(self.group_size, int)
            or self.group_size < 1
        ):
            raise SpecError(f"group_size must be a positive integer, got {self.group_size!r}")

    @classmethod
    def parse(cls, text: str, **defaults: Any) -> QuantSpec:
        """Read the string form: a format, then any of granularity, symmetry and scale search.

        Parameters
        ----------
        text : str
            Parts joined by colons, such as ``"int4:channel:symmetric:mse"``; a group is written
            ``group128``. The format comes first, the others in any order.
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
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {type(text).__name__}")
        name, *parts = (part.strip() for part in text.strip().lower().split(":"))
        fields: dict[str, Any] = {"format": _lookup("format", name, formats)}
        for part in parts:
            for key, value in _parse_part(part, text).items():
                if key in fields:
                    raise SpecError(f"{text!r} gives {key} twice, the second time as {part!r}")
                fields[key] = value
        return cls(**{**defaults, **fields})

    def __str__(self) -> str:
        """Write the form that ``parse`` reads."""
        group = "" if self.group_size is None else str(self.group_size)
        parts = [
            self.format.name,
            self.granularity.value + group,
            "symmetric" if self.symmetric else "asymmetric",
        ]
        if self.scale_search is not ScaleSearch.ABSMAX:
            parts.append(self.scale_search.value)
        return ":".join(parts)

    def replace(self, **changes: Any) -> QuantSpec:
        """Return a copy with some fields changed.

        Examples
        --------
        >>> from corequant import QuantSpec
        >>> str(QuantSpec.parse("int4:channel").replace(format="int8"))
        'int8:channel:symmetric'
        """
        return replace(self, **changes)


def _parse_part(part: str, text: str) -> dict[str, Any]:
    if part in _SYMMETRY:
        return {"symmetric": _SYMMETRY[part]}
    if part in {s.value for s in ScaleSearch}:
        return {"scale_search": ScaleSearch(part)}
    if part in {g.value for g in Granularity} - {"group"}:
        return {"granularity": Granularity(part)}
    if match := _GROUP.fullmatch(part):
        return {"granularity": Granularity.GROUP, "group_size": int(match[1])}
    known = [*_SYMMETRY, *(s.value for s in ScaleSearch), "tensor", "channel", "token", "group128"]
    raise SpecError(f"unknown part {part!r} in {text!r}{_hint(part, known)}")


def _lookup(what: str, name: str, table: Any) -> Any:
    if name not in table:
        raise SpecError(f"unknown {what} {name!r}{_hint(name, list(table))}")
    return table[name]


def _hint(word: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    did = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f", expected one of {', '.join(known)}{did}"
