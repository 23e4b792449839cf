"""Models of which only the blocks are quantized, such as encoders.

They are saved with different heads, or with none; what holds the blocks has another path in each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers

from corequant.errors import ArchitectureError
from corequant_transformers.architectures.description import Architecture

__all__ = ["class_of", "placed"]


def class_of(config: Any) -> Any:
    """Return the class that a config's ``architectures`` name.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Without ``architectures``, the model has no head.

    Raises
    ------
    ArchitectureError
        If Transformers has no such class, or it is one for configs of another type.

    Examples
    --------
    >>> import transformers
    >>> from corequant_transformers.architectures.enclosed import class_of
    >>> class_of(transformers.BertConfig(architectures=["BertForMaskedLM"])).__name__
    'BertForMaskedLM'
    """
    named = getattr(config, "architectures", None) or [_bare(config).__name__]
    found = getattr(transformers, str(named[0]), None)
    if getattr(found, "config_class", None) is not type(config):
        raise ArchitectureError(
            f"architectures of the config must name a class of Transformers for "
            f"{type(config).__name__}, got {str(named[0])[:80]!r}"
        )
    return found


def placed(architecture: Architecture, config: Any) -> Architecture:
    """Return a description with the paths of its parts in a config's models."""
    kind = class_of(config)
    if architecture.second is not None:
        second = replace(architecture.second, first=config.num_hidden_layers)
        architecture = replace(architecture, second=second)
    if kind is _bare(config) or not architecture.nested:
        return architecture
    within = kind.base_model_prefix
    return replace(
        architecture,
        embedding=f"{within}.{architecture.embedding}",
        stem=f"{within}.{architecture.stem}",
        block=f"{within}.{architecture.block}",
        trunk=within,
    )


def _bare(config: Any) -> Any:
    mapping: Any = transformers.MODEL_MAPPING
    return mapping[type(config)]
