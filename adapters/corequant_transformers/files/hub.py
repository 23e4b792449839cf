"""Models and data sets of a hub that are in the local Hugging Face cache, by their ids.

Nothing is downloaded. What isn't there is an error with the command that brings it.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["download_command", "locate"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_KINDS = {"model": "", "dataset": " --repo-type dataset"}


def locate(path: str | Path, kind: str = "model") -> Path:
    """Return a path as it is, or the location of an id in the local cache.

    Parameters
    ----------
    path : str or Path
        A path, or the id of a model or data set such as ``HuggingFaceTB/SmolLM2-135M``, which a
        path within it may follow. What exists as a path is never looked up.
    kind : {"model", "dataset"}

    Returns
    -------
    Path
        A snapshot in the cache, or something in it; ``path`` if the cache lacks it.

    Examples
    --------
    >>> from corequant_transformers.files.hub import locate
    >>> str(locate("."))
    '.'
    """
    given = Path(path)
    parts = given.parts
    # Not only for speed: a folder that has the name of a model is that folder.
    if given.is_absolute() or not parts or _exists(given):
        return given
    for count in (2, 1):
        snapshot = _snapshot("/".join(parts[:count]), kind) if len(parts) >= count else None
        if snapshot is not None:
            return snapshot.joinpath(*parts[count:])
    return given


def download_command(path: str | Path, kind: str = "model") -> str | None:
    """Return the command that downloads an id into the cache; None for another path.

    Examples
    --------
    >>> from corequant_transformers.files.hub import download_command
    >>> download_command("HuggingFaceTB/SmolLM2-135M")
    'hf download HuggingFaceTB/SmolLM2-135M'
    >>> download_command("data/valid.txt", "dataset")
    'hf download data/valid.txt --repo-type dataset'
    """
    given = Path(path)
    name = "/".join(given.parts[:2])
    if given.is_absolute() or len(given.parts) < 2 or not _ID.fullmatch(name):
        return None
    return f"hf download {name}{_KINDS[kind]}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return True


def _snapshot(name: str, kind: str) -> Path | None:
    if not _ID.fullmatch(name):
        return None
    from huggingface_hub import constants, snapshot_download

    # Most names are typing errors: a look at the folder costs nothing.
    folder = f"{kind}s--{name.replace('/', '--')}"
    if not (Path(constants.HF_HUB_CACHE) / folder).is_dir():
        return None
    try:
        found = snapshot_download(
            name, repo_type=kind, cache_dir=constants.HF_HUB_CACHE, local_files_only=True
        )
    except (OSError, ValueError):
        # No revision of the name ``main`` is there.
        return None
    return Path(found)
