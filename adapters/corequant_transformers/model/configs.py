"""Configs of models, read with suspicion before Transformers acts on what they say."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from corequant.errors import CheckpointError, CorequantError
from corequant.storage.files import open_regular
from corequant_transformers.architectures.dimensions import MOST_BLOCKS

__all__ = ["as_config_errors", "check_config", "check_unmarked", "config_of", "settle_config"]

_DTYPES = ("float32", "float16", "bfloat16", "float64")
"""Such as models are published in; Transformers takes the name of any other dtype of torch."""

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")

_ATTENTIONS = ("eager", "sdpa", "flex_attention")
_EXPERTS = ("eager", "grouped_mm", "batched_mm")
_IMPLEMENTATIONS = {
    "attn_implementation": _ATTENTIONS,
    "_attn_implementation": _ATTENTIONS,
    "_attn_implementation_internal": _ATTENTIONS,
    "experts_implementation": _EXPERTS,
    "_experts_implementation": _EXPERTS,
    "_experts_implementation_internal": _EXPERTS,
}
"""What torch itself computes. Transformers takes any other name for a kernel of a hub, or looks for
one there that stands in for a package that isn't installed, and would download and run it."""

_NAMES = ("model_type", "transformers_version", "_name_or_path")
"""Fields whose values errors speak of without blaming them."""

_ELSEWHERE = ("configuration_files", "fusion_config")
"""Fields that have Transformers read another file for a config, or change a model's class."""


def config_of(values: Mapping[str, Any]) -> Any:
    """Return the config of a model from the values of its ``config.json``.

    Parameters
    ----------
    values : mapping
        Checked already. What JSON has no number for is an object: ``{"__float__": "Infinity"}``.

    Raises
    ------
    Exception
        Whatever Transformers raises.
    """
    return transformers.AutoConfig.for_model(**{k: _decoded(v) for k, v in values.items()})


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {k: _decoded(v) for k, v in value.items()}
    return [_decoded(v) for v in value] if isinstance(value, list) else value


def check_unmarked(path: Path) -> None:
    """Raise CheckpointError for a config that Transformers can't read for its byte order mark."""
    with open_regular(path) as file:
        if file.read(len(BOM_UTF8)) == BOM_UTF8:
            raise CheckpointError(
                f"{path} must not begin with a byte order mark (EF BB BF), which Transformers "
                "doesn't read; save the file as UTF-8 without one (BOM)"
            )


def check_config(values: Any, path: Path) -> None:
    """Raise CheckpointError for what would have Transformers fetch code or make endless lists.

    Parameters
    ----------
    values : dict
        A model's config as plain values, of which parts may be configs themselves.
    path : Path
        File of the config.
    """
    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        if isinstance(value, str) and not isinstance(getattr(torch, value, None), torch.dtype):
            raise CheckpointError(
                f"{name} of {path} must be one of {', '.join(_DTYPES)}, got {value[:80]!r}"
            )
    waiting = [values]
    while waiting:
        for name, value in waiting.pop().items():
            if name in _IMPLEMENTATIONS:
                _check_implementation(name, value, path)
            elif name in _ELSEWHERE and value is not None:
                raise CheckpointError(
                    f"{path} must not have the field {name}, which has Transformers read or build "
                    "something else than what the rest of it says; remove it"
                )
            elif isinstance(value, dict):
                waiting.append(value)
            elif isinstance(value, list):
                waiting += [entry for entry in value if isinstance(entry, dict)]
            elif name in _LAYERS and isinstance(value, int | float) and not value <= MOST_BLOCKS:
                raise CheckpointError(
                    f"{name} of {path} must be at most {MOST_BLOCKS}, got {str(value)[:40]}"
                )


def _check_implementation(name: str, value: Any, path: Path | str) -> None:
    believed = _IMPLEMENTATIONS[name]
    for wanted in value.values() if isinstance(value, dict) else [value]:
        if wanted is not None and wanted not in believed:
            raise CheckpointError(
                f"{name} of {path} must be one of {', '.join(believed)}, which need no other "
                f"package and are never fetched, got {str(wanted)[:80]!r}; remove the field"
            )


def settle_config(config: Any, path: Path) -> Any:
    """Return a config that was built, with outputs as they are by default, however it was saved.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Changed in place.
    path : Path
        File of the config.

    Raises
    ------
    CheckpointError
        If it asks for code that isn't torch's own.
    """
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    for part in (config, *parts):
        for name in ("_attn_implementation", "_experts_implementation"):
            _check_implementation(name, getattr(part, name, None), path)
    # The caller decides which outputs a model returns, and in which form.
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    return config


@contextmanager
def as_config_errors(path: Path, values: Any) -> Iterator[None]:
    """Turn whatever Transformers raises while it builds a model from a config into one error.

    Parameters
    ----------
    path : Path
        File of the config.
    values : dict
        The config as plain values.

    Raises
    ------
    CheckpointError
        Names the field, its value, and what there is instead, as far as that can be told.
    """
    try:
        yield
    except CorequantError:
        raise
    except Exception as error:
        # A KeyError for an unknown activation, an ImportError for a package that is missing, a
        # RuntimeError for an impossible size: each model's class has its own.
        reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        raise CheckpointError(
            f"{path} can't be made into a model: {''.join(_blamed(values, str(error)))}{reason}"
        ) from error


def _speaks_of(message: str, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", message) is not None


def _blamed(values: Any, message: str, prefix: str = "") -> Iterator[str]:
    """Yield which fields an error speaks of, and what they may be."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _blamed(value, message, f"{prefix}{name}.")
        elif isinstance(value, str) and name not in _NAMES and _speaks_of(message, value):
            known: list[str] = []
            if "act" in name and value not in ACT2FN:
                known = list(ACT2FN)
            elif name in ("rope_type", "type") and value not in ROPE_INIT_FUNCTIONS:
                known = ["default", *ROPE_INIT_FUNCTIONS]
            supported = f", supported are {', '.join(sorted(known))}" if known else ""
            yield f"{prefix}{name} is {value[:80]!r}{supported}; "
