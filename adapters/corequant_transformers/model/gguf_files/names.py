"""A model's tensors by their names in Transformers and in GGUF files, and how they differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.errors import ArchitectureError
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.dimensions import Dimensions
from corequant_transformers.model.gguf_files.dialects import Dialect

__all__ = ["ROPE_FREQUENCIES", "norm_offset", "row_order", "translate"]

ROPE_FREQUENCIES = "rope_freqs.weight"
"""By what the rotary frequencies are divided; no parameter in Transformers."""


def _architecture(name: str) -> Any:
    import gguf

    found = [arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name]
    if not found:
        raise ArchitectureError(f"the installed gguf package has no architecture {name!r}")
    return found[0]


def translate(dialect: Dialect, names: Iterable[str], blocks: int) -> dict[str, str]:
    """Return the names in a GGUF file of parameters, by those in Transformers.

    Raises
    ------
    ArchitectureError
        If llama.cpp's architecture has no place for one.
    """
    import gguf

    known = gguf.get_tensor_name_map(_architecture(dialect.name), blocks)
    found = {}
    for name in names:
        translated = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if translated is None:
            raise ArchitectureError(f"llama.cpp's {dialect.name!r} has no tensor for {name}")
        found[name] = str(translated)
    return found


def norm_offset(architecture: Architecture, name: str) -> int:
    """Return what a file adds to a parameter: 1 where a norm multiplies by 1 + w."""
    return int(architecture.norm == "rms_one_plus" and name.endswith("norm.weight"))


def row_order(
    dialect: Dialect, architecture: Architecture, sizes: Dimensions, module: str
) -> npt.NDArray[np.int64] | None:
    """Return the order of the rows of a query or key in the file, where it is another.

    Transformers turns the first half of a head's channels against the second, llama.cpp
    neighbours against each other, for ``permuted`` dialects.
    """
    heads = {architecture.query: sizes.heads, architecture.key: sizes.kv_heads}
    suffix = next((s for s in heads if module.endswith(f".{s}")), None)
    if suffix is None or not dialect.permuted:
        return None
    rows = np.arange(heads[suffix] * sizes.head_dim)
    return rows.reshape(heads[suffix], 2, sizes.head_dim // 2).swapaxes(1, 2).reshape(-1)
