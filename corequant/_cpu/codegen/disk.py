"""Compiled code on disk: where it lies, and one process that compiles while others wait.

Code is read from every folder, so that one filled beforehand serves where nothing can be written.
It is written to the first folder that takes it; without one, each process compiles for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["alone", "folders", "read", "write"]

_DIGEST = hashlib.sha256().digest_size

_PATIENCE = 20.0
"""Seconds after which a process that compiles is taken for dead; none of our kernels takes 3."""

_LOOK = 0.005
"""Seconds between looks at whether another process has finished."""


def folders() -> list[Path]:
    """Return where compiled code may lie, the first choice first.

    ``NUMBA_CACHE_DIR`` where that is set; else beside the package, then the user's cache.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR", "")
    if chosen:
        return [Path(chosen) / "corequant"]
    found = [Path(__file__).parent / "__pycache__"]
    with contextlib.suppress(RuntimeError):  # no home folder
        if sys.platform == "win32":
            found.append(
                Path(os.environ.get("LOCALAPPDATA", Path.home())) / "corequant" / "kernels"
            )
        else:
            home = os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache"
            found.append(Path(home) / "corequant" / "kernels")
    return found


def read(file: str) -> bytes | None:
    """Return what is cached under a name, unless it is damaged."""
    for folder in folders():
        with contextlib.suppress(OSError):
            content = (folder / file).read_bytes()
            digest, code = content[:_DIGEST], content[_DIGEST:]
            if hashlib.sha256(code).digest() == digest:
                return code
    return None


def write(file: str, code: bytes) -> None:
    """Cache in the first folder that can be written."""
    for folder in folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            # Written aside and renamed, so that no other process reads half of it.
            handle, name = tempfile.mkstemp(dir=folder)
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(hashlib.sha256(code).digest() + code)
                os.replace(name, folder / file)
                return
            except OSError:  # a full disk, or on Windows a file that another process reads
                os.unlink(name)
                raise


@contextlib.contextmanager
def alone(file: str) -> Iterator[bool]:
    """Let one process at a time compile what a file will hold; yields whether it had to wait.

    A file beside it marks that a process is at work. Nobody waits where none can be made, nor for
    a process that was killed longer than ``_PATIENCE``.
    """
    mark, waited = _mark(file)
    try:
        yield waited
    finally:
        if mark is not None:
            mark.unlink(missing_ok=True)


def _mark(file: str) -> tuple[Path | None, bool]:
    """Make the file that marks work; returns it, or None, and whether another process had one."""
    for folder in folders():
        mark = folder / (file + ".busy")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return mark, False
        except FileExistsError:
            _wait(mark)
            # What the other compiled is read; if it failed, each one that waited does it itself.
            return None, True
        except OSError:
            continue
    return None, False


def _wait(mark: Path) -> None:
    end = time.monotonic() + _PATIENCE
    with contextlib.suppress(OSError):
        while time.monotonic() < end and time.time() - mark.stat().st_mtime < _PATIENCE:
            time.sleep(_LOOK)
        mark.unlink(missing_ok=True)
