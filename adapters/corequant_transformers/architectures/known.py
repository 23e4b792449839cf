"""The architectures that are known by their model types; ``register`` adds one."""

from __future__ import annotations

from typing import Any

from corequant.errors import ArchitectureError
from corequant_transformers.architectures.described import described
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.enclosed import placed
from corequant_transformers.architectures.multimodal import COMPOSITES
from corequant_transformers.architectures.where import field_of

__all__ = [
    "UnknownArchitectureError",
    "architecture_of",
    "decoder_config",
    "is_composite",
    "is_enclosed",
    "register",
]


class UnknownArchitectureError(ArchitectureError):
    """A model type without a description."""


_KNOWN = {architecture.model_type: architecture for architecture in described()}


def decoder_config(config: Any) -> Any:
    """Return the config of the decoder, which may be a part of the whole model's."""
    composite = COMPOSITES.get(getattr(config, "model_type", ""))
    return config if composite is None else composite.decoder(config)


def is_composite(config: Any) -> bool:
    """Return whether a config is that of a model with a decoder beside other modules."""
    return getattr(config, "model_type", None) in COMPOSITES


def is_enclosed(config: Any) -> bool:
    """Return whether a config is that of a model of which only the blocks are described."""
    known = _KNOWN.get(getattr(config, "model_type", ""))
    return known is not None and known.enclosed


def register(architecture: Architecture) -> None:
    """Make an architecture known under its model type, replacing an earlier one."""
    if not isinstance(architecture, Architecture):
        got = type(architecture).__name__
        raise TypeError(f"architecture must be an Architecture, got {got}")
    _KNOWN[architecture.model_type] = architecture


def architecture_of(config: Any) -> Architecture:
    """Return the description for a Transformers config.

    Raises
    ------
    ArchitectureError
        If the model type is unknown, or the config asks for something that its description
        doesn't cover; the message says what would have to be described.
    """
    kind = getattr(config, "model_type", None)
    if kind in COMPOSITES:
        composite = COMPOSITES[kind]
        inner, own = composite.decoder(config), composite.own
        is_own = own is not None and getattr(inner, "model_type", None) == own.model_type
        return composite.around(own.resolved(inner) if own and is_own else architecture_of(inner))
    if kind not in _KNOWN:
        raise UnknownArchitectureError(
            f"model_type must be one of {', '.join(sorted(_KNOWN))}, got {kind!r}; to describe "
            "another, call corequant_transformers.register(Architecture(...)) with the paths of "
            "its embedding, final norm and head, in each block of the norms, of query, key, "
            "value and output projections, and of the MLP's gate, up and down projections or its "
            "experts, as far as they differ from Llama's"
        )
    architecture = _KNOWN[kind].resolved(config)
    for name, wanted in architecture.requires:
        found = field_of(config, name)
        value = getattr(config, wanted) if isinstance(wanted, str) else wanted
        if found != value:
            other = f"{wanted}={value!r}" if isinstance(wanted, str) else repr(value)
            raise ArchitectureError(
                f"the description of {kind!r} holds for configs whose {name} is {other}, "
                f"got {found!r}"
            )
    return placed(architecture, config) if architecture.enclosed else architecture
