"""From a directory that ``quantize`` wrote to one that other programs read.

Each module of this folder whose name begins with ``to_`` is a target, with a function ``write``
that takes a ``Stored``, the output, ``source``, ``shard_bytes``, ``within`` and ``complete`` and
returns the output's path, and a function ``check`` that takes what can be known beforehand.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corequant.errors import OutputError, SpecError
from corequant.recipe import READERS
from corequant_transformers.checkpoint.reader import Stored
from corequant_transformers.exports.prospect import Candidate
from corequant_transformers.model.surroundings import undisturbed

__all__ = ["check_target", "export", "targets", "write_layout"]

_PREFIX = "to_"
SHARD_BYTES = 5 * 10**9
"""Largest size of a file of weights by default."""


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
    shard_bytes: int = SHARD_BYTES,
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
        is, which takes BPE, byte-level or SentencePiece's.
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
    ['README.md', 'config.json', 'corequant.sha256', 'model.safetensors']
    """
    try:
        return write_layout(path, output, to, source=source, shard_bytes=shard_bytes, verify=verify)
    except SpecError as error:
        readers = [name for name, layout in READERS.items() if layout == to]
        raise SpecError(
            f"{error}; codes stay as they are in an export, but the float model can be quantized "
            f"for the program that is to read it, by --for or reader={' or '.join(readers)}"
        ) from None


def write_layout(
    path: str | Path,
    output: str | Path,
    to: str,
    *,
    source: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = True,
    within: Path | None = None,
    complete: Callable[[Path], object] = lambda made: None,
) -> Path:
    """Do what ``export`` does, for a run that may be killed and resumed.

    Parameters
    ----------
    path, output, to, source, shard_bytes, verify
        As for ``export``.
    within : Path, optional
        Folder of what isn't whole yet, on the output's disk, whose owner removes what a process
        that was killed has left there.
    complete : callable
        Called with what was written when it is whole, before it gets its name.
    """
    written: Path = _target(to).write(
        Stored(path, verify=verify),
        output,
        source=source,
        shard_bytes=shard_bytes,
        within=within,
        complete=complete,
    )
    return written


def check_target(to: str, candidate: Candidate, source: str | Path | None = None) -> None:
    """Raise the error that ``export`` would, as far as it is known before a model is quantized."""
    _target(to).check(candidate, source)


def _target(to: str) -> Any:
    if to not in targets():
        raise OutputError(f"to must be one of {', '.join(targets())}, got {to!r}")
    return importlib.import_module(f"{__package__}.{_PREFIX}{to.replace('-', '_')}")
