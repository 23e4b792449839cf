"""Registry of architectures by model type; ``register`` adds one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from corequant.errors import ArchitectureError
from corequant_transformers.architectures.described import described
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.enclosed import placed
from corequant_transformers.architectures.multimodal import COMPOSITES
from corequant_transformers.architectures.refused import REASONS
from corequant_transformers.architectures.where import field_of

__all__ = [
    "UnknownArchitectureError",
    "architecture_of",
    "decoder_config",
    "forget",
    "is_composite",
    "is_enclosed",
    "is_shipped",
    "keep_architecture",
    "kept_architecture",
    "known_architectures",
    "own_config",
    "register",
    "resolved",
]


class UnknownArchitectureError(ArchitectureError):
    """A model type without a description."""


_SHIPPED = {architecture.model_type: architecture for architecture in described()}
_KNOWN = dict(_SHIPPED)
_KEPT = "_corequant_architecture"


def known_architectures() -> Mapping[str, Architecture]:
    """Return all descriptions by their model types (read-only)."""
    return MappingProxyType(_KNOWN)


def is_shipped(architecture: Architecture, config: Any) -> bool:
    """Return whether a description of a config is the one that comes with the package."""
    try:
        return _look_up(config, _SHIPPED) == architecture
    except ArchitectureError:
        return False


def decoder_config(config: Any) -> Any:
    """Return the config of the decoder, which may be a part of the whole model's."""
    composite = COMPOSITES.get(getattr(config, "model_type", ""))
    return config if composite is None else composite.decoder(config)


def is_composite(config: Any) -> bool:
    """Return whether a config is that of a model with modules around its decoder."""
    return getattr(config, "model_type", None) in COMPOSITES


def is_enclosed(config: Any) -> bool:
    """Return whether a config is that of a model of which only the blocks are described."""
    known = _KNOWN.get(getattr(config, "model_type", ""))
    return known is not None and known.enclosed


def own_config(model: Any) -> Any:
    """Return a model's config, with the model's class in ``architectures``.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left as it is.
    """
    if not is_enclosed(model.config):
        return model.config
    config = copy.copy(model.config)
    config.architectures = [type(model).__name__]
    return config


def keep_architecture(model: Any, architecture: Architecture) -> None:
    """Attach a description to a model, whose quantized modules no longer reveal it."""
    model.__dict__[_KEPT] = architecture


def kept_architecture(model: Any) -> Architecture | None:
    """Return the description that is attached to a model; None without one."""
    found: Architecture | None = getattr(model, _KEPT, None)
    return found


def register(architecture: Architecture) -> None:
    """Register an architecture under its model type, replacing an earlier one."""
    if not isinstance(architecture, Architecture):
        got = type(architecture).__name__
        raise TypeError(f"architecture must be an Architecture, got {got}")
    _KNOWN[architecture.model_type] = architecture


def forget(kind: str) -> None:
    """Remove a registered description, restoring the package's own if there is one."""
    _KNOWN.pop(kind, None)
    if kind in _SHIPPED:
        _KNOWN[kind] = _SHIPPED[kind]


def architecture_of(config: Any) -> Architecture:
    """Return the description for a Transformers config.

    Raises
    ------
    ArchitectureError
        If the model type is unknown, or the config asks for something that its description
        doesn't cover; the message says what would have to be described.
    """
    return _look_up(config, _KNOWN)


def _look_up(config: Any, known: Mapping[str, Architecture]) -> Architecture:
    kind: Any = getattr(config, "model_type", None)
    if kind in COMPOSITES:
        composite = COMPOSITES[kind]
        inner, own = composite.decoder(config), composite.own
        is_own = own is not None and getattr(inner, "model_type", None) == own.model_type
        return composite.around(own.resolved(inner) if own and is_own else _look_up(inner, known))
    if kind in REASONS and kind not in known:
        raise ArchitectureError(f"models of type {kind!r} can't be quantized: {REASONS[kind]}")
    if kind not in known:
        raise UnknownArchitectureError(
            f"model_type must be one of {', '.join(sorted(known))}, got {kind!r}; to describe "
            "another, call corequant_transformers.register(Architecture(...)) with the paths, "
            "where they differ from Llama's, of the embedding, final norm and head, and in each "
            "block of the norms, the query, key, value and output projections, and the MLP's gate, "
            "up and down projections or experts"
        )
    return resolved(known[kind], config)


def resolved(architecture: Architecture, config: Any) -> Architecture:
    """Return a description resolved for a config.

    Raises
    ------
    ArchitectureError
        If it doesn't hold for the config.
    """
    kind, config = architecture.model_type, decoder_config(config)
    architecture = architecture.resolved(config)
    for name, wanted in architecture.requires:
        found = field_of(config, name)
        value = getattr(config, wanted) if isinstance(wanted, str) else wanted
        if found != value:
            other = f"{wanted}={value!r}" if isinstance(wanted, str) else repr(value)
            raise ArchitectureError(
                f"the description of {kind!r} holds for configs whose {name} is {other}, "
                f"got {found!r}"
            )
    is_placed = not architecture.enclosed or architecture.trunk
    return architecture if is_placed else placed(architecture, config)
