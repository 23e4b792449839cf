"""Where results go: looked at before any work, and written whole or not at all.

A directory that is new gets its name when everything in it is on the disk. One that is there
already and empty (a mounted volume, the shell's own directory, or where a link leads) stays the
same directory: files are moved into it when they are on the disk, those that make a reader take it
for a model last.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors

from corequant.errors import CorequantError, OutputError
from corequant_transformers.files.atomic import move, sync, umask

__all__ = [
    "UNFINISHED",
    "check_file_output",
    "check_output",
    "contents",
    "new_directory",
    "real_path",
]

UNFINISHED = ".corequant.*.tmp"
"""Pattern of the names that files in an existing directory have until they are complete."""

_SYSTEMS = {
    *("lost+found", "System Volume Information", "$RECYCLE.BIN"),
    *(".fseventsd", ".Spotlight-V100", ".Trashes"),
}
"""Directories at the root of a volume that is empty otherwise: of ext4, Windows and macOS."""

_LAST = ("config.json", "corequant.safetensors")


def check_output(path: str | Path, *, allow_full: bool = False) -> Path:
    """Return the path of a directory that can be written, before any work is done.

    Parameters
    ----------
    path : str or Path
        Links are followed.
    allow_full : bool
        Whether the directory may hold something.

    Raises
    ------
    OutputError
        If it holds something already, or can't be written, or its parent is missing or can't be.
    """
    target = real_path(path)
    there = target.is_dir()
    try:
        held = next(iter(contents(target)), None) if there else None
        if (target.exists() and not there) or (held is not None and not allow_full):
            holds = "" if held is None else f", which holds {held.name}"
            raise OutputError(f"output must be a new or empty directory, got {target}{holds}")
        if not target.parent.is_dir():
            raise OutputError(f"output's parent folder must exist, got {target.parent}")
    except OSError as error:
        if isinstance(error, CorequantError):
            raise
        raise OutputError(f"output can't be accessed: {error}") from error
    _try(target if there else target.parent, "output" if there else "output's parent folder")
    return target


def contents(folder: Path) -> list[Path]:
    """Return what a directory holds, other than what its file system put there."""
    mounted = os.path.ismount(folder)
    return [f for f in folder.iterdir() if not (mounted and f.name in _SYSTEMS and f.is_dir())]


def _try(folder: Path, what: str) -> None:
    """Raise OutputError unless a folder can be written to.

    Permission bits don't tell for a superuser or a read-only file system; trying does. A temporary
    file has no name where the system allows that, so that a process which is killed leaves none.
    """
    # Windows' own. Its tempfile, before Python 3.13, takes a refusal for a name that is taken, and
    # tries two billion others.
    removed = getattr(os, "O_TEMPORARY", None)
    try:
        if removed is None:
            tempfile.TemporaryFile(dir=folder).close()
        else:
            name = folder / f".{secrets.token_hex(8)}.tmp"
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | removed))
    except OSError as error:
        raise OutputError(f"{what} can't be written: {folder}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    """Return what an error says without the names of temporary files."""
    return error.strerror or str(error)


def check_file_output(path: str | Path, ending: str = "", *, new: bool = True) -> Path:
    """Return the path of a file that can be written, before any work is done.

    Parameters
    ----------
    path : str or Path
        Links are followed.
    ending : str
        Suffix that its name must have.
    new : bool
        Whether the file must not exist yet.

    Raises
    ------
    OutputError
        If it is there, or no file, or its parent is missing or can't be written.
    """
    target = real_path(path)
    named = Path(path).name.endswith(ending)
    if not named or (target.exists() and (new or not target.is_file())):
        wanted = f"a {'new ' if new else ''}file" + (f" that ends in {ending}" if ending else "")
        raise OutputError(f"output must be {wanted}, got {target}")
    if not target.parent.is_dir():
        raise OutputError(f"output's parent folder must exist, got {target.parent}")
    _try(target.parent, "output's parent folder")
    return target


def real_path(path: str | Path) -> Path:
    """Return where a path leads, links followed.

    Raises
    ------
    OutputError
        If it is empty, or leads nowhere.
    """
    if not os.fspath(path):
        raise OutputError("output must be a path, got an empty one; . is the working directory")
    try:
        target = Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise OutputError(f"output can't be accessed: {error}") from error
    if target.is_symlink():
        raise OutputError(f"output must not be a link that leads back to itself, got {target}")
    return target


@contextmanager
def new_directory(target: Path, within: Path | None = None) -> Iterator[Path]:
    """Yield a temporary directory whose files ``target`` gets on success; remove it on failure.

    Parameters
    ----------
    target : Path
        Path that ``check_output`` returned.
    within : Path, optional
        Another directory on the same disk, whose owner removes what a process that was killed has
        left there; by default the temporary directory is next to a new ``target``, and inside
        an existing one.

    Raises
    ------
    OutputError
        If it can't be written. Nothing is left then.
    """
    there = target.is_dir()
    place = target if there else within or target.parent
    prefix = ".corequant." if there else f".{target.name}."
    try:
        folder = Path(tempfile.mkdtemp(".tmp", prefix, place))
    except OSError as error:
        raise OutputError(f"output can't be written: {target}: {_reason(error)}") from error
    try:
        yield folder
        for file in folder.rglob("*"):
            sync(file)
        if there:
            _move(folder, target)
            folder.rmdir()
            sync(target)
        else:
            folder.chmod(0o777 & ~umask())
            sync(folder)
            move(folder, target)
            sync(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        if isinstance(error, CorequantError):
            raise
        raise OutputError(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path) -> None:
    """Move a directory's files to another, all or none."""
    names = sorted((f.name for f in folder.iterdir()), key=lambda n: (n in _LAST, n))
    moved: list[Path] = []
    try:
        for name in names:
            if os.path.lexists(target / name):
                raise OutputError(f"{target / name} appeared meanwhile and was not replaced")
            moved.append(target / name)
            move(folder / name, target / name)
    except BaseException:
        for file in moved:
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            with suppress(OSError):
                file.unlink()
        raise
