"""Rules for some of a model's layers, and the patterns that name them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from corequant.errors import RecipeError
from corequant.recipe.fields import (
    activation_spec,
    check_choice,
    check_specs,
    spec_text,
    weight_spec,
)
from corequant.specs import QuantSpec, ScaleFormat

__all__ = ["LayerRule", "as_rule", "check_pattern", "combine", "is_match"]

_REGEX = "re:"
_PATH = re.compile(r"[\w-]+(\.[\w-]+)*")
_LOOKAROUND = re.compile(r"\(\?<?=")
_RULE = re.compile(r"((?:\(\?<?=|[^=])+)=(.*)", re.S)
_COMMA = re.compile(r",(?![^(]*\))")
_FORM = (
    "pattern=weights[,activations][,rounding=...][,permutation=...] or pattern=keep, such as "
    "down_proj=int8:channel"
)


@dataclass(frozen=True)
class LayerRule:
    """Settings of the layers that a pattern names.

    Written in one line it is ``pattern=weights,activations``, each also by its name, as in
    ``down_proj=int8:channel,rounding=gptq``, or ``pattern=keep``, and ends with ``,optional`` if it
    is; ``parse`` and ``str`` convert.

    Attributes
    ----------
    pattern : str
        Consecutive parts of the path of a layer or of a module that holds it, such as ``down_proj``
        or ``model.layers.29``; or ``re:`` and a regular expression, which has to match the
        beginning of the path, as in files of compressed-tensors.
    weights, activations : QuantSpec, optional
        Quantizers, as those of a recipe; activations may be ``"none"``, which leaves them in float.
        Where a recipe reads the rule from a string or a mapping, the scales of weights have the
        format of its own, or bfloat16 with MXFP4 and NVFP4, unless the rule names one.
    rounding, permutation : str, optional
        Methods. Options of the recipe's own method that this one doesn't take are left out.
    keep : bool
        Leave the layers in float.
    optional : bool
        Accept a model that has no such layers, which is an error otherwise.

    Raises
    ------
    RecipeError
        If the pattern is malformed, a value is invalid, or nothing differs.

    Examples
    --------
    >>> from corequant.recipe import LayerRule
    >>> rule = LayerRule.parse("re:.*down_proj=int8:channel,int8")
    >>> str(rule.weights), str(rule.activations)
    ('int8:channel:symmetric:mse', 'int8:token:symmetric')
    >>> LayerRule.parse(str(rule)) == rule
    True
    """

    pattern: str
    weights: QuantSpec | None = None
    activations: QuantSpec | Literal["none"] | None = None
    rounding: str | None = None
    permutation: str | None = None
    keep: bool = False
    optional: bool = False

    if TYPE_CHECKING:
        # Fields have the types that are read; these are those that are accepted.
        def __init__(
            self,
            pattern: str,
            weights: QuantSpec | str | None = ...,
            activations: QuantSpec | str | None = ...,
            rounding: str | None = ...,
            permutation: str | None = ...,
            keep: bool = ...,
            optional: bool = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        """Parse specs that are strings and refuse invalid values."""
        check_pattern("pattern of a rule", self.pattern)
        try:
            self._settle()
        except RecipeError as error:
            raise RecipeError(f"the rule for {self.pattern!r}: {error}") from None

    def _settle(self) -> None:
        weights, activations = weight_spec(self.weights), activation_spec(self.activations)
        check_specs(weights, activations)
        object.__setattr__(self, "weights", weights)
        if isinstance(self.activations, str):
            object.__setattr__(self, "activations", activations or "none")
        for name in ("rounding", "permutation"):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        given = [name for name in _NAMES if getattr(self, name) is not None]
        if self.keep and given:
            raise RecipeError(f"keep leaves layers in float, so {given[0]} must be left out")
        if not self.keep and not given:
            raise RecipeError(f"one of {', '.join(_NAMES)} or keep must be given")

    @classmethod
    def parse(cls, text: str) -> LayerRule:
        """Read a rule in one line.

        Raises
        ------
        RecipeError
            If it is malformed or a value is invalid.
        """
        return cls(**_read(text))

    def __str__(self) -> str:
        """Return the rule in one line, for ``parse``."""
        values = self.to_dict()
        del values["pattern"]
        words = [name for name in _FLAGS if values.pop(name, False)]
        parts = [values.pop("weights")] if self.weights is not None else []
        named = [f"{k}={v}" for k, v in values.items()]
        return f"{self.pattern}=" + ",".join([*parts, *named, *words])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: specs in string form, absent ones left out."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.weights is not None:
            # Read with a recipe whose scales are of another format, it should stay as it is.
            text, own = spec_text(self.weights), self.weights.scale_format.value
            plain = own == ScaleFormat.FLOAT32.value and self.weights.format.name in text
            values["weights"] = f"{text}:{own}" if plain else text
        values["activations"] = None if self.activations is None else str(self.activations)
        values |= {name: getattr(self, name) or None for name in _FLAGS}
        return {name: value for name, value in values.items() if value is not None}


_NAMES = ("weights", "activations", "rounding", "permutation")
_FLAGS = ("keep", "optional")


def _read(text: str) -> dict[str, Any]:
    """Return the fields of a rule in one line."""
    found = _RULE.fullmatch(text.strip())
    if found is None:
        raise RecipeError(f"a rule for layers must be {_FORM}, got {text!r}")
    values: dict[str, Any] = {}
    for part in _COMMA.split(found[2]):
        name, given, value = part.strip().partition("=")
        if not given and name in _FLAGS and name not in values:
            values[name] = True
            continue
        if not given:
            # Without their names, in the order of the fields.
            value = name
            name = next((n for n in _NAMES[:2] if n not in values), "")
        if name not in _NAMES or name in values or not value:
            raise RecipeError(f"a rule for layers must be {_FORM}, got {part!r} in {text!r}")
        values[name] = value
    return {"pattern": found[1].strip(), **values}


def as_rule(value: Any, scales: ScaleFormat = ScaleFormat.FLOAT32) -> LayerRule:
    """Return a rule that may be given in one line or as a mapping.

    The scales of its weights are then of the format ``scales`` unless it names another.

    Raises
    ------
    RecipeError
        If it is something else, or has an unknown key.
    """
    if isinstance(value, LayerRule):
        return value
    if isinstance(value, str):
        value = _read(value)
    if not isinstance(value, Mapping):
        raise RecipeError(f"layers must be rules, got {type(value).__name__}")
    known = [f.name for f in fields(LayerRule)]
    unknown = sorted(set(value) - set(known))
    if unknown or "pattern" not in value:
        what = f"the key {unknown[0]!r}" if unknown else "one without a pattern"
        raise RecipeError(f"a rule of layers must have keys of {', '.join(known)}, got {what}")
    try:
        weights = weight_spec(value.get("weights"), scales)
    except RecipeError as error:
        raise RecipeError(f"the rule for {value['pattern']!r}: {error}") from None
    return LayerRule(**{**value, "weights": weights})


def check_pattern(what: str, pattern: Any) -> None:
    """Raise RecipeError unless a value can name layers.

    Parameters
    ----------
    what : str
        What it is, for the message.
    pattern : object
    """
    if isinstance(pattern, str) and pattern.startswith(_REGEX):
        try:
            re.compile(pattern.removeprefix(_REGEX))
        except re.error as error:
            raise RecipeError(
                f"{what} must be a regular expression, {error}, got {pattern!r}"
            ) from None
        if "=" in _LOOKAROUND.sub("", pattern):
            raise RecipeError(f"{what} must not contain '=', got {pattern!r}")
        return
    if not isinstance(pattern, str) or not _PATH.fullmatch(pattern):
        raise RecipeError(
            f"{what} must be parts of a layer's path, such as down_proj or model.layers.29, or "
            f"re: and a regular expression, such as re:.*down_proj, got {pattern!r}"
        )


def is_match(pattern: str, layer: str) -> bool:
    """Return whether a pattern names a layer.

    Parameters
    ----------
    pattern : str
        As ``LayerRule.pattern``.
    layer : str
        Path of its module.
    """
    if pattern.startswith(_REGEX):
        return re.match(pattern.removeprefix(_REGEX), layer) is not None
    return f".{pattern}." in f".{layer}."


def combine(rules: Iterable[LayerRule]) -> dict[str, Any] | None:
    """Return the changes of several rules to a recipe; None keeps a layer in float.

    If several rules set the same field, the last one counts, as does a quantizer of weights after
    ``keep``.
    """
    changes: dict[str, Any] = {}
    kept = False
    for rule in rules:
        kept = rule.keep or (kept and rule.weights is None)
        given = {name: getattr(rule, name) for name in _NAMES}
        changes |= {name: value for name, value in given.items() if value is not None}
    return None if kept else changes
