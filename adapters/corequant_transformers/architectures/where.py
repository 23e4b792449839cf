"""Conditions on a field of the config that select models and decoder blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from corequant.errors import ArchitectureError

__all__ = ["RELATIONS", "Where", "field_of", "holds"]

_VALUED = ("equals", "differs", "names")
_ORDERED = ("from", "after", "before", "upto")

RELATIONS = (*_VALUED, "lists", "omits", "divides", *_ORDERED)
"""Relations between a field of the config and a block; see ``Where``."""

_FORMS = {
    "names": "have an entry for each decoder block",
    "lists": "list indices",
    "omits": "list indices",
    "divides": "be a positive integer",
}


@dataclass(frozen=True)
class Where:
    """A condition on a field of the config and, for most relations, a decoder block i.

    Attributes
    ----------
    field : str
        With dots, a field of a config in the config.
    relation : str
        ``equals``, ``differs``: the field is one of ``values`` or none, in every block; ``names``:
        its entry for block i is one; ``lists``, ``omits``: it is a list of indices, with i in it or
        not, None being an empty one; ``divides``: it divides i + 1; ``from``, ``after``,
        ``before``, ``upto``: i is at least the field, greater, less, at most.
    values : tuple

    Raises
    ------
    ArchitectureError
        If the relation is unknown, or has values that it doesn't take.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from corequant_transformers.architectures.where import Where
    >>> config = SimpleNamespace(layer_types=["conv", "full_attention"])
    >>> [Where("layer_types", "names", ("conv",)).holds(config, i) for i in range(2)]
    [True, False]
    """

    field: str
    relation: str
    values: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        """Refuse invalid conditions."""
        if self.relation not in RELATIONS:
            raise ArchitectureError(
                f"relation must be one of {', '.join(RELATIONS)}, got {self.relation!r}"
            )
        if bool(self.values) != (self.relation in _VALUED):
            raise ArchitectureError(
                f"values must be given for the relations {', '.join(_VALUED)} and for no other, "
                f"got {self.values!r} for {self.relation!r}"
            )

    @property
    def by_block(self) -> bool:
        """Whether it depends on the block."""
        return self.relation not in ("equals", "differs")

    def holds(self, config: Any, block: int) -> bool:
        """Return whether the condition holds for a decoder block of a config.

        Raises
        ------
        ArchitectureError
            If the config has no such field, or one that the relation can't be applied to.
        """
        found = field_of(config, self.field)
        if not self.by_block:
            return (found in self.values) == (self.relation == "equals")
        try:
            if self.relation == "names":
                return bool(found[block] in self.values)
            if self.relation in ("lists", "omits"):
                return bool(block in (found or ())) == (self.relation == "lists")
            if self.relation == "divides":
                return bool((block + 1) % found == 0)
            at_least, greater = block >= found, block > found
        except (TypeError, IndexError, ZeroDivisionError):
            raise ArchitectureError(
                f"the config's {self.field} must {_FORMS.get(self.relation, 'be a number')}, got "
                f"{str(found)[:80]}"
            ) from None
        ordered = {"from": at_least, "after": greater, "before": not at_least, "upto": not greater}
        return bool(ordered[self.relation])


def field_of(config: Any, path: str) -> Any:
    """Return a field of a config, with dots of a nested config; None if missing.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from corequant_transformers.architectures.where import field_of
    >>> field_of(SimpleNamespace(attention=SimpleNamespace(clip=8)), "attention.clip")
    8
    """
    for name in path.split("."):
        config = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
    return config


def holds(where: tuple[Where, ...], config: Any, block: int) -> bool:
    """Return whether all conditions hold; True without any."""
    return all(each.holds(config, block) for each in where)
