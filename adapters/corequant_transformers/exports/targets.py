"""From a directory that ``quantize`` wrote to one that other programs read.

Each module of this folder whose name begins with ``to_`` is a target, with a function ``write``
that takes a ``Stored``, the output, ``source`` and ``shard_bytes``, and returns the output's path.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from corequant.errors import OutputError
from corequant_transformers.checkpoint.reader import Stored
from corequant_transformers.model.surroundings import undisturbed

__all__ = ["export", "targets"]

_PREFIX = "to_"


def targets() -> list[str]:
    """Return the names of all targets.

    Examples
    --------
    >>> from corequant_transformers.exports.targets import targets
    >>> {"compressed-tensors", "gguf"} <= set(targets())
    True
    """
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(n.removeprefix(_PREFIX).replace("_", "-") for n in names if n.startswith(_PREFIX))


@undisturbed()
def export(
    path: str | Path,
    output: str | Path,
    to: str = "compressed-tensors",
    *,
    source: str | Path | None = None,
    shard_bytes: int = 5 * 10**9,
    verify: bool = True,
) -> Path:
    """Write a quantized model in a layout that other programs read.

    Parameters
    ----------
    path : str or Path
        A directory that ``quantize`` wrote.
    output : str or Path
        A new or empty directory, or a new file that ends in ``.gguf``.
    to : str
        ``compressed-tensors``, for Transformers and vLLM, or ``gguf``, for llama.cpp.
    source : str or Path, optional
        The model that was quantized, for ``gguf`` alone: a GGUF file's metadata and tokenizer are
        carried over, a directory's tokenizer is translated. By default the tokenizer in ``path``
        is, which takes byte-level BPE.
    shard_bytes : int
        Largest size of a file of weights for ``compressed-tensors``; a single tensor may be larger.
    verify : bool
        Compare the files in ``path`` with the digests that were written with them.

    Returns
    -------
    Path
        Path of the output.

    Raises
    ------
    ArchitectureError, RecipeError, SpecError
        If the target can't hold the model, its rotations or its quantizers.
    CheckpointError
        If the directory or the source can't be read, or a file isn't as it was written.
    OutputError
        If the output can't be written or doesn't read back equal; nothing is left then.

    Examples
    --------
    >>> import tempfile, numpy as np, corequant_transformers as cqhf
    >>> from pathlib import Path
    >>> from corequant.recipe import Recipe
    >>> recipe = Recipe(rotation="offline", weights="int4:group16", activations="none")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tokens = np.arange(64).reshape(2, 32)
    ...     _ = cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens, f"{folder}/own")
    ...     sorted(f.name for f in cqhf.export(f"{folder}/own", f"{folder}/other").iterdir())
    ['config.json', 'corequant.sha256', 'model.safetensors']
    """
    if to not in targets():
        raise OutputError(f"to must be one of {', '.join(targets())}, got {to!r}")
    found = importlib.import_module(f"{__package__}.{_PREFIX}{to.replace('-', '_')}")
    written: Path = found.write(
        Stored(path, verify=verify), output, source=source, shard_bytes=shard_bytes
    )
    return written
