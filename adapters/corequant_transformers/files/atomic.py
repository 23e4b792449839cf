"""Files that are written whole or not at all, also if the machine stops in between."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from corequant.errors import CheckpointError, CorequantError, OutputError
from corequant.storage.files import json_text, json_value, open_regular

__all__ = [
    "compare",
    "concatenate",
    "file_sha256",
    "move",
    "read_json",
    "read_tensors",
    "replacing",
    "sync",
    "umask",
    "write_json",
    "write_tensors",
]

_CHUNK = 2**20
_BACKEND = "pread" if hasattr(os, "O_TEMPORARY") else "mmap"
"""Windows, whose own flag this is, neither removes nor replaces what is mapped, and reserves memory
for all of it. Elsewhere mapping is quicker."""

_WAITS = (0.01, 0.05, 0.2, 0.5, 1.0)
"""Seconds between attempts to rename what another program has open."""

# Order of the format's own writer: wide types first, so that every tensor is aligned.
_WIDTHS = (
    "BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ I16 U16 F16 "
    "BF16 I32 U32 F32 C64 F64 I64 U64"
).split()


def sync(path: Path) -> None:
    """Wait until a file or the names in a directory are on the disk, where the system can tell."""
    folder = path.is_dir()
    try:
        # Windows waits for files that are open for writing, and for no directory.
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder:
            return
        raise
    try:
        _flush(handle)
    finally:
        os.close(handle)


def _flush(handle: int) -> None:
    # To macOS a file is synchronised when the disk's own cache has it; this empties that as well,
    # where the disk can.
    with suppress(ImportError, AttributeError, OSError):
        fcntl = importlib.import_module("fcntl")
        fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
        return
    os.fsync(handle)


def move(source: Path, target: Path) -> None:
    """Rename a file or a directory; a file that has the name already is replaced."""
    for seconds in _WAITS:
        try:
            source.replace(target)
            return
        except PermissionError as error:
            # Windows refuses as long as a program, such as a virus scanner, has it open.
            if getattr(error, "winerror", None) is None:
                raise
            time.sleep(seconds)
    source.replace(target)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path, within: Path | None = None, *, settled: bool = True) -> Iterator[Path]:
    """Yield the name of a temporary file; it gets its real name once it is on the disk.

    Parameters
    ----------
    path : Path
    within : Path, optional
        Folder of the temporary file, on the same disk, whose owner removes what a process that was
        killed has left there; by default that of ``path``.
    settled : bool
        Whether to wait until the name is on the disk, too; otherwise that is the caller's to do,
        for many files of a folder at once.

    Raises
    ------
    OutputError
        If it can't be written. What had the name before is as it was then.
    """
    try:
        folder = within or path.parent
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=folder)
        os.close(handle)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error}") from error
    part = Path(name)
    try:
        yield part
        sync(part)
        part.chmod(0o666 & ~umask())
        move(part, path)
        if settled:
            sync(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        if isinstance(error, CorequantError):
            raise
        raise OutputError(f"{path} could not be written: {error}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; anything else is a CheckpointError."""
    try:
        value = json_value(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    text = json_text(value).encode()
    with replacing(path) as part:
        part.write_bytes(text)
        if part.read_bytes() != text:
            raise OutputError(f"{path} did not read back as it was written")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, settled: bool = True) -> str:
    """Write tensors to a safetensors file, whole or not at all, and return its SHA-256.

    ``settled`` is that of ``replacing``.

    Raises
    ------
    OutputError
        If it can't be written or doesn't read back equal.
    """
    stored = {name: t.detach().contiguous() for name, t in tensors.items()}
    with replacing(path, settled=settled) as part:
        safetensors.torch.save_file(stored, part, metadata={"format": "pt"})
        compare(part, stored)
        return file_sha256(part)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file."""
    return safetensors.torch.load_file(path, backend=_BACKEND)


def compare(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise OutputError unless a file holds exactly these tensors, bit for bit."""
    with safetensors.safe_open(path, framework="pt", device="cpu", backend="pread") as file:
        names = set(file.keys())
        for name, tensor in tensors.items():
            # Bits are compared, so that a changed sign of zero counts.
            same = name in names and torch.equal(_bytes(tensor), _bytes(file.get_tensor(name)))
            if not same:
                raise OutputError(f"{name} did not read back as it was written to {path}")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def concatenate(path: Path, files: Iterable[Path]) -> str:
    """Write the tensors of several safetensors files to one, a piece at a time.

    The result has the bytes that the format's own writer gives it. It is read back.

    Parameters
    ----------
    path : Path
        Overwritten.
    files : iterable of Path
        Trusted: written by ``write_tensors``.

    Returns
    -------
    str
        SHA-256 of the result.

    Raises
    ------
    OSError
        If it can't be written.
    OutputError
        If it doesn't read back as it was written.
    """
    entries = [(name, file, *place) for file in files for name, place in _header(file).items()]
    entries.sort(key=lambda e: (-_WIDTHS.index(e[2]), e[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, _, dtype, shape, first, last in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + last - first]}
        end += last - first
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for piece in _pieces(text, entries):
            digest.update(piece)
            out.write(piece)
    if file_sha256(path) != digest.hexdigest():
        raise OutputError(f"{path} did not read back as it was written")
    return digest.hexdigest()


def _pieces(text: bytes, entries: list[Any]) -> Iterator[bytes]:
    yield len(text).to_bytes(8, "little") + text
    for name, file, _, _, first, last in entries:
        with file.open("rb") as source:
            source.seek(first)
            left = last - first
            while left:
                piece = source.read(min(left, _CHUNK))
                if not piece:
                    raise OutputError(f"{file} ends inside the tensor {name}")
                left -= len(piece)
                yield piece


def _header(file: Path) -> dict[str, tuple[str, list[int], int, int]]:
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        values = json.loads(source.read(length))
    values.pop("__metadata__", None)
    start = 8 + length
    return {
        name: (v["dtype"], v["shape"], *(start + offset for offset in v["data_offsets"]))
        for name, v in values.items()
    }


def umask() -> int:
    """Return the process's umask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
