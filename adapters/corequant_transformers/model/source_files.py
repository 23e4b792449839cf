"""The files next to a model's weights: which are read, which are copied, and their locations."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers

from corequant.errors import CheckpointError
from corequant_transformers.files.companions import TEMPLATES, is_copied
from corequant_transformers.model.surroundings import quiet_transformers

__all__ = ["check_inside", "copy_files", "files_to_copy", "place_of", "read_generation"]


def read_generation(folder: Path) -> Any:
    """Return what a directory says about generating text; None where it says nothing.

    Raises
    ------
    CheckpointError
        If the file is malformed.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        with quiet_transformers():
            return transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} can't be loaded: {error}") from error


def files_to_copy(folder: Path) -> list[Path]:
    """Return the files of a folder that belong to the tokenizer or to generation.

    Raises
    ------
    CheckpointError
        If one isn't a regular file of the folder: whatever it leads to would be copied.
    """
    # Folders may have such a name; their contents are neither read nor copied.
    found = sorted(f for f in folder.iterdir() if is_copied(f.name) and not f.is_dir())
    templates = folder / TEMPLATES
    if templates.is_dir():
        found += sorted(f for f in templates.iterdir() if f.suffix == ".jinja" and not f.is_dir())
    for file in found:
        if not file.name.isprintable():
            raise CheckpointError(
                f"{folder} must have files with printable names, got {file.name!r}"
            )
        check_inside(folder, file)
    return found


def place_of(file: Path) -> str:
    """Return the name of one of a model's files within the model's folder."""
    # A model's own folder may have any name.
    inner = file.parent.name == TEMPLATES and not (file.parent / "config.json").exists()
    return f"{TEMPLATES}/{file.name}" if inner else file.name


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy a model's files, as ``files_to_copy`` gives them, to their places in a new folder."""
    for file in files:
        target = folder / place_of(file)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def check_inside(folder: Path, file: Path) -> None:
    """Raise CheckpointError unless a regular file lies in a folder, or in its store of blobs.

    A link may lead to ``../../blobs`` of a Hugging Face cache, nowhere else.
    """
    try:
        found, there = file.is_file(), file.exists()
        inside, real = folder.resolve(), file.resolve()
        # Not resolved on its own: a folder of templates that is a link leads elsewhere.
        own = inside / file.parent.relative_to(folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the model's file {file} can't be read: {error}") from None
    if not there:
        raise CheckpointError(f"the model's file {file} is missing")
    if not found:
        raise CheckpointError(f"the model's file {file} must be a regular file")
    blobs = inside.parent.parent / "blobs"
    if real.parent != own and not (inside.parent.name == "snapshots" and real.parent == blobs):
        raise CheckpointError(f"{file} must be a file of its own folder, it leads to {real}")
