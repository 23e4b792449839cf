"""The quantizers of weights that each program can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from corequant.errors import SpecError
from corequant.recipe.preset import READERS, check_reader
from corequant.specs import QuantSpec
from corequant.storage.compressed_tensors import Scheme
from corequant.storage.gguf import block_type_of

__all__ = ["takes"]

_VLLM_BITS = (4, 8)
"""Widths of weights in compressed-tensors files that vLLM has kernels for."""

_LAYOUTS: dict[str, Callable[[QuantSpec], Any]] = {
    "compressed-tensors": Scheme,
    "gguf": block_type_of,
}
"""Functions that raise for weights that a layout can't hold."""


def takes(reader: str, spec: QuantSpec) -> bool:
    """Return whether a program can run weights with a quantizer.

    Parameters
    ----------
    reader : str
        One of ``corequant.recipe.READERS``.
    spec : QuantSpec

    Raises
    ------
    RecipeError
        If there is no such program.

    Examples
    --------
    >>> from corequant.specs import QuantSpec
    >>> from corequant.recipe import takes
    >>> [takes(reader, QuantSpec.parse("int3:group32")) for reader in ("transformers", "vllm")]
    [True, False]
    """
    layout = _LAYOUTS.get(READERS[check_reader(reader)])
    try:
        if layout is not None:
            layout(spec)
    except SpecError:
        return False
    return reader != "vllm" or spec.format.bits in _VLLM_BITS
