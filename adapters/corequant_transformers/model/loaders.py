"""Which class of Transformers a model is of, from its config."""

from __future__ import annotations

from typing import Any

import transformers

from corequant_transformers.architectures.known import is_composite

__all__ = ["loader_of"]


def loader_of(config: Any) -> Any:
    """Return the class of Transformers that makes a model of a config.

    Parameters
    ----------
    config : transformers.PreTrainedConfig

    Examples
    --------
    >>> import transformers
    >>> from corequant_transformers.model.loaders import loader_of
    >>> loader_of(transformers.LlavaConfig()).__name__
    'AutoModelForImageTextToText'
    """
    if is_composite(config):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM
