"""Files of unknown origin, opened with care, and JSON that every reader accepts.

Only regular files are opened. A pipe, a socket or a device in a file's place would be waited for
without end, or never come to one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

__all__ = ["json_text", "json_value", "open_regular", "read_text", "version_of"]

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading, without waiting for anything else.

    Raises
    ------
    OSError
        If it is missing, can't be read, or isn't a regular file.

    Examples
    --------
    >>> import os
    >>> from corequant.storage.files import open_regular
    >>> open_regular(os.devnull)
    Traceback (most recent call last):
    ...
    OSError: [Errno 22] a device, where a regular file is expected: '...'
    """
    try:
        # Opening a pipe waits for its other end unless it is told not to.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise _irregular(path, "a socket") from None
        raise
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise _irregular(path, _KINDS.get(stat.S_IFMT(mode), "a special file"))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _irregular(path: str | Path, kind: str) -> OSError:
    return OSError(errno.EINVAL, f"{kind}, where a regular file is expected", str(path))


def read_text(path: str | Path) -> str:
    """Read a regular file of UTF-8, without the byte order mark that some editors begin it with.

    Raises
    ------
    OSError
        As ``open_regular``.
    UnicodeDecodeError
        If it isn't UTF-8.
    """
    with open_regular(path) as file:
        return file.read().decode("utf-8-sig")


def json_value(path: str | Path) -> Any:
    """Read a regular file of JSON.

    Raises
    ------
    OSError
        As ``open_regular``.
    ValueError, RecursionError
        If it isn't JSON in UTF-8, or nested too deeply.
    """
    return json.loads(read_text(path))


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Write a value as JSON; numbers that are not finite, which JSON lacks, become ``null``.

    Examples
    --------
    >>> from corequant.storage.files import json_text
    >>> json_text({"loss": float("inf"), "tries": (1, 2)}, indent=None)
    '{"loss": null, "tries": [1, 2]}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def version_of(package: str) -> str:
    """Return a package's version, or ``unknown`` for one that runs without being installed.

    Examples
    --------
    >>> from corequant.storage.files import version_of
    >>> version_of("a package that is nowhere")
    'unknown'
    """
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
