"""Models of the Transformers class that their config names."""

from __future__ import annotations

from typing import Any

import transformers

from corequant_transformers.architectures.enclosed import class_of
from corequant_transformers.architectures.known import is_composite, is_enclosed

__all__ = ["class_name", "load_model", "make_model"]


def make_model(config: Any, **options: Any) -> Any:
    """Return a model of a config, with random weights.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    **options
        Options of Transformers' ``from_config``.
    """
    if is_enclosed(config):
        return class_of(config)._from_config(config, **options)
    return _loader(config).from_config(config, **options)


def load_model(path: str, config: Any, **options: Any) -> Any:
    """Load a model by Transformers' ``from_pretrained``.

    Parameters
    ----------
    path : str
    config : transformers.PreTrainedConfig
        Config that determines the class.
    **options
        Options of ``from_pretrained``.
    """
    loader = class_of(config) if is_enclosed(config) else _loader(config)
    return loader.from_pretrained(path, **options)


def class_name(config: Any) -> str:
    """Return the name of the class of a config's models.

    Examples
    --------
    >>> import transformers
    >>> from corequant_transformers.model.loaders import class_name
    >>> class_name(transformers.LlavaConfig())
    'LlavaForConditionalGeneration'
    """
    if is_enclosed(config):
        return str(class_of(config).__name__)
    return str(_loader(config)._model_mapping[type(config)].__name__)


def _loader(config: Any) -> Any:
    if is_composite(config):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM
