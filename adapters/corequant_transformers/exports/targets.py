"""From a directory that ``quantize`` wrote to one that other programs read."""

from __future__ import annotations

from pathlib import Path

from corequant.errors import OutputError
from corequant.storage.arrays import TARGETS
from corequant_transformers.checkpoint.reader import Stored
from corequant_transformers.exports.compressed import SHARD_BYTES, write_compressed
from corequant_transformers.exports.gguf_file import write_gguf
from corequant_transformers.model.sources import Source
from corequant_transformers.model.surroundings import undisturbed

__all__ = ["export"]


@undisturbed()
def export(
    path: str | Path,
    output: str | Path,
    to: str = "compressed-tensors",
    *,
    source: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = True,
) -> Path:
    """Write a quantized model in a layout that other programs read.

    Parameters
    ----------
    path : str or Path
        A directory that ``quantize`` wrote.
    output : str or Path
        A new or empty directory; of ``gguf``, a new file that ends so.
    to : str
        One of ``corequant.storage.arrays.TARGETS``: ``compressed-tensors``, for Transformers and
        vLLM, or ``gguf``, for llama.cpp.
    source : str or Path, optional
        The model that was quantized, for ``gguf`` alone: a GGUF file's metadata and tokenizer are
        carried over, a directory's tokenizer is translated. By default the tokenizer in ``path``
        is, which takes byte-level BPE.
    shard_bytes : int
        Largest size of one file of weights, of ``compressed-tensors``.
    verify : bool
        Compare the files in ``path`` with the digests that were written with them.

    Returns
    -------
    Path
        What was written.

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
    if to not in TARGETS:
        raise OutputError(f"to must be one of {', '.join(TARGETS)}, got {to!r}")
    if to != "gguf" and source is not None:
        raise OutputError(f"source must be left out for {to}, got {str(source)!r}")
    stored = Stored(path, verify=verify)
    if to == "gguf":
        return write_gguf(stored, output, None if source is None else Source(source))
    return write_compressed(stored, output, shard_bytes=shard_bytes)
