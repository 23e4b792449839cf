"""Which models and which decoder blocks something holds for, by a field of the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from corequant.errors import ArchitectureError

__all__ = ["RELATIONS", "Where", "holds"]

RELATIONS = ("equals", "names", "lists", "omits", "divides", "after", "from", "before", "upto")
"""How a field of the config chooses; see ``Where``."""

_FORMS = {
    "names": "have an entry for each decoder block",
    "lists": "list indices",
    "omits": "list indices",
    "divides": "be a positive integer",
}


@dataclass(frozen=True)
class Where:
    """A condition on a field of the config and, but for ``equals``, a decoder block i.

    Attributes
    ----------
    field : str
    relation : str
        ``equals``: the field is one of ``values``, in every block; ``names``: its entry for block
        i is; ``lists`` or ``omits``: it is a list of indices, with i in it or not, None being an
        empty one; ``divides``: it divides i + 1; ``from``, ``after``, ``before``, ``upto``: i is
        at least the field, greater, less, at most.
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
        """Refuse what says nothing."""
        if self.relation not in RELATIONS:
            raise ArchitectureError(
                f"relation must be one of {', '.join(RELATIONS)}, got {self.relation!r}"
            )
        if bool(self.values) != (self.relation in ("equals", "names")):
            raise ArchitectureError(
                "values must be given for the relations 'equals' and 'names' and for no other, "
                f"got {self.values!r} for {self.relation!r}"
            )

    @property
    def by_block(self) -> bool:
        """Whether it depends on the block."""
        return self.relation != "equals"

    def holds(self, config: Any, block: int) -> bool:
        """Return whether the condition holds for a decoder block of a config.

        Raises
        ------
        ArchitectureError
            If the config has no such field, or one that the relation can't be applied to.
        """
        found = getattr(config, self.field, None)
        if self.relation == "equals":
            return found in self.values
        try:
            if self.relation == "names":
                return found[block] in self.values  # type: ignore[index]
            if self.relation in ("lists", "omits"):
                return (block in (found or ())) == (self.relation == "lists")
            if self.relation == "divides":
                return (block + 1) % found == 0  # type: ignore[operator]
            at_least, greater = block >= found, block > found  # type: ignore[operator]
        except (TypeError, IndexError, ZeroDivisionError):
            raise ArchitectureError(
                f"the config's {self.field} must {_FORMS.get(self.relation, 'be a number')}, got "
                f"{str(found)[:80]}"
            ) from None
        ordered = {"from": at_least, "after": greater, "before": not at_least, "upto": not greater}
        return ordered[self.relation]


def holds(where: tuple[Where, ...], config: Any, block: int) -> bool:
    """Return whether all conditions hold; none are always true."""
    return all(each.holds(config, block) for each in where)
