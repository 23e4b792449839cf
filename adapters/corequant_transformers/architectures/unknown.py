"""The parts that the description of an unknown architecture needs, by its parameters' names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from corequant.errors import ArchitectureError
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.known import UnknownArchitectureError

__all__ = ["missing_parts", "undescribed"]

_OUTER = ("embedding", "final_norm", "head")
_INNER = (
    "attention_norm",
    "query",
    "key",
    "value",
    "attention_output",
    "mlp_norm",
    "gate",
    "up",
    "down",
)


def undescribed(error: UnknownArchitectureError, names: Iterable[str]) -> ArchitectureError:
    """Return the error about an unknown model type with what a description would have to say.

    Parameters
    ----------
    error : UnknownArchitectureError
    names : iterable of str
        The model's parameters.

    Returns
    -------
    ArchitectureError
        Names the parts that are not where Llama has them, and the parameters that remain.
    """
    parts, rest = missing_parts(names)
    return ArchitectureError(
        f"{error}. Of Llama's parts it lacks {', '.join(parts) or 'none'}; "
        f"to be placed are {', '.join(rest) or 'none'}"
    )


def missing_parts(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Compare the names of a model's parameters with where Llama has its parts.

    Parameters
    ----------
    names : iterable of str

    Returns
    -------
    parts : list of str
        Fields of ``Architecture`` that would have to be given.
    rest : list of str
        Names that Llama doesn't have, with ``{}`` for indices.

    Examples
    --------
    >>> from corequant_transformers.architectures.unknown import missing_parts
    >>> parts, rest = missing_parts(["wte.weight", "h.0.fc.weight", "h.1.fc.weight"])
    >>> parts[:2], rest
    (['embedding', 'final_norm'], ['wte.weight', 'h.{}.fc.weight'])
    """
    usual = Architecture("llama")
    places = {name: f"{getattr(usual, name)}.weight" for name in _OUTER}
    places |= {name: f"{usual.block}.{getattr(usual, name)}.weight" for name in _INNER}
    found = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".{}", name) for name in names))
    # A head that is tied is not always stored.
    parts = [name for name, place in places.items() if place not in found and name != "head"]
    biases = {place.removesuffix("weight") + "bias" for place in places.values()}
    known = {*places.values(), *biases, *(f"{usual.block}.{n}.weight" for n in usual.inner)}
    return parts, [name for name in found if name not in known]
