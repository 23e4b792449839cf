"""A run's directory: finished steps on the disk, so that a killed run can be resumed.

It holds ``manifest.json`` (what the run is about), ``log.jsonl``, and for each step that is done a
record with the SHA-256 of the step's files. The record is written last: without it a step counts as
not done. Hidden states of the last two steps are kept, so that a step whose files were lost with
the machine's power is done again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import torch
from filelock import lock_descriptor

from corequant.errors import CorequantError, OutputError, RunError
from corequant.storage.files import json_text, json_value
from corequant_transformers.files.atomic import (
    file_sha256,
    move,
    read_tensors,
    sync,
    write_json,
    write_tensors,
)
from corequant_transformers.model.forward import Windows

__all__ = ["RunDirectory", "WindowFile", "ended"]

MANIFEST = "manifest.json"
LOG = "log.jsonl"
_LOCK = "lock"
_KEPT_STATES = 2
_TENSORS = ".safetensors"


class WindowFile:
    """Hidden states in a file, read and written a window at a time.

    Parameters
    ----------
    path : Path
    shape : tuple of int
    dtype : torch.dtype
    write : bool
        Make the file; otherwise it is there.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, write: bool = False
    ) -> None:
        self.path, self.shape, self.dtype = path, torch.Size(shape), dtype
        self._bytes = dtype.itemsize
        for size in self.shape[1:]:
            self._bytes *= size
        if write:
            path.touch(exist_ok=True)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice) -> torch.Tensor:
        first, last, _ = index.indices(len(self))
        shape = (last - first, *self.shape[1:])
        data = bytearray((last - first) * self._bytes)
        if not data:
            return torch.empty(shape, dtype=self.dtype)
        with self.path.open("rb") as file:
            file.seek(first * self._bytes)
            if file.readinto(data) != len(data):
                raise RunError(f"{self.path} ends before window {last}")
        return torch.frombuffer(data, dtype=self.dtype).reshape(shape)

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        flat = value.detach().cpu().to(self.dtype).contiguous().reshape(-1)
        try:
            with self.path.open("r+b") as file:
                file.seek(index * self._bytes)
                data: Any = flat.view(torch.uint8).numpy()
                file.write(data)
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {error}") from error


def ended(path: Path) -> Path:
    """Return the name that a run's directory has while it is removed."""
    return path.with_name(f".{path.name}.ended")


def _open_plain(name: str, flags: int) -> int:
    # A pipe in its place would be waited for.
    opened = os.open(name, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(f"{name} must be a regular file")
    return opened


def _remove(path: Path) -> None:
    """Remove anything at the path of a step's file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(record).encode()).hexdigest()


class RunDirectory:
    """A ledger on the disk.

    Parameters
    ----------
    path : str or Path
    manifest : mapping
        What the run depends on, as plain values; a run resumes only with the same ones.
    resume : bool
        Whether an existing run is resumed; otherwise it is refused. Without one, a run begins.

    Raises
    ------
    OutputError
        If it can't be written.
    RunError
        If a run is there and ``resume`` is false, or was about something else, or is being worked
        on by another process.
    """

    def __init__(self, path: str | Path, manifest: Mapping[str, Any], *, resume: bool) -> None:
        self.path = Path(path).absolute()
        self._spare: dict[str, WindowFile] = {}
        self._asked: set[str] = set()
        self._lock = self._acquire()
        try:
            self._begin(json.loads(json_text(manifest)), resume)
        except BaseException:
            self.close()
            raise
        self._records: dict[str, dict[str, Any]] = {}
        self._order: list[str] = []
        self._kept: dict[str, str] = {}

    def _acquire(self) -> IO[bytes]:
        try:
            while True:
                self.path.mkdir(exist_ok=True)
                # The system frees the lock when its holder ends, however it ends.
                lock = open(self.path / _LOCK, "ab", opener=_open_plain)
                if not lock_descriptor(lock.fileno(), blocking=False):
                    lock.close()
                    raise RunError(f"another process is working on the run in {self.path}")
                if self._is_current(lock):
                    return lock
                lock.close()
        except OSError as error:
            if isinstance(error, CorequantError):
                raise
            raise OutputError(f"the run's directory can't be written: {error}") from error

    def _is_current(self, lock: IO[bytes]) -> bool:
        # Another run may have ended and removed the directory since the file was opened.
        try:
            return os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path / _LOCK))
        except FileNotFoundError:
            return False

    def _begin(self, manifest: dict[str, Any], resume: bool) -> None:
        self._clear()
        file = self.path / MANIFEST
        if not file.exists():
            if any(self.path.glob("*.json")):
                raise RunError(f"{self.path} is not empty and holds no run")
            write_json(file, manifest)
            return
        if not resume:
            raise RunError(
                f"a run was begun in {self.path}; resume it (resume=True, --resume) or remove "
                "the directory"
            )
        try:
            found = json_value(file)
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{file} can't be read: {error}") from error
        if not isinstance(found, dict):
            raise RunError(
                f"{file} must hold a JSON object, got {type(found).__name__}; remove {self.path} "
                "to start again"
            )
        self._refuse_other(found, manifest)

    def _refuse_other(self, found: dict[str, Any], wanted: dict[str, Any], field: str = "") -> None:
        for key in sorted(set(found) | set(wanted)):
            name, before, now = f"{field}{key}", found.get(key), wanted.get(key)
            if isinstance(before, dict) and isinstance(now, dict):
                self._refuse_other(before, now, f"{name}.")
            elif before != now:
                raise RunError(
                    f"{name} must be as when the run was begun, {before!r}, to go on, got {now!r}; "
                    f"remove {self.path} to start again"
                )

    # ---- the ledger

    def windows(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> WindowFile:
        """Return room for hidden states that the next commit will hand on under ``name``."""
        path = self.path / f".{quote(name, safe='')}.tmp"
        try:
            path.unlink(missing_ok=True)
            return WindowFile(path, shape, dtype, write=True)
        except OSError as error:
            raise OutputError(f"{path} could not be written: {error}") from error

    def spare(self, name: str, shape: tuple[int, ...]) -> WindowFile | None:
        """Return room for float32 numbers, kept while each step asks for it, if there is plenty."""
        found = self._spare.get(name)
        if found is not None and found.shape == shape:
            # Writing over a file is several times as fast as making one.
            self._asked.add(name)
            return found
        try:
            free = shutil.disk_usage(self.path).free
        except (OSError, AttributeError):
            # Not every file system, nor every system, says.
            return None
        needed = math.prod(shape) * torch.float32.itemsize
        if 8 * needed > free:
            return None
        self._asked.add(name)
        self._spare[name] = self.windows(name, shape, torch.float32)
        return self._spare[name]

    def keep(self, step: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors of a step to a file of their own, which the next commit makes count."""
        if tensors:
            file = self.path / f"{step}.{len(self._kept):05d}.safetensors"
            self._kept[file.name] = write_tensors(file, tensors, settled=False)

    def commit(
        self,
        step: str,
        report: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Windows],
    ) -> None:
        """Write a step's files, and its record when they are on the disk."""
        record: dict[str, Any] = {"report": report, "state": {}, "files": {}}
        for name, windows in state.items():
            record["state"][name] = self._keep(step, name, windows, record["files"])
        record["files"] |= self._kept
        self._kept = {}
        if tensors:
            file = self.path / f"{step}.safetensors"
            record["files"][file.name] = write_tensors(file, tensors, settled=False)
        # It waits for the names of all of them; a record that is there before them doesn't count.
        write_json(self.path / f"{step}.json", {**record, "sha256": _digest(record)})
        self._records[step] = json.loads(json_text(record))
        self._order.append(step)
        self._forget(self._order[:-_KEPT_STATES])
        self._clear()

    def _clear(self) -> None:
        # Files of a step, or the output itself, of a process that was killed meanwhile.
        self._spare = {name: self._spare[name] for name in self._asked}
        self._asked = set()
        kept = {windows.path for windows in self._spare.values()}
        for left in self.path.glob(".*.tmp"):
            if left in kept:
                continue
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()

    def _keep(self, step: str, name: str, windows: Windows, files: dict[str, str]) -> Any:
        """Rename a file of hidden states after the step; others are copied to one."""
        if not isinstance(windows, WindowFile) or not windows.path.name.startswith("."):
            written = self.windows(name, tuple(windows.shape), windows[0:1].dtype)
            for k in range(len(windows)):
                written[k] = windows[k : k + 1]
            windows = written
        target = self._state_file(step, name)
        try:
            sync(windows.path)
            move(windows.path, target)
            windows.path = target
            files[target.name] = file_sha256(target)
        except OSError as error:
            raise OutputError(f"{target} could not be written: {error}") from error
        return [list(windows.shape), str(windows.dtype).removeprefix("torch.")]

    def _forget(self, steps: list[str]) -> None:
        for step in steps:
            for name in self._records[step]["state"]:
                self._state_file(step, name).unlink(missing_ok=True)

    def resume(self, steps: list[str]) -> int:
        """Return how many of the steps are done and whole; what lies after them is removed."""
        whole, usable = 0, 0
        for position, step in enumerate(steps):
            record = self._read(step)
            if record is None or not self._has(record["files"], states=False):
                break
            self._records[step] = record
            whole = position + 1
        for count in range(whole, 0, -1):
            if self._has(self._records[steps[count - 1]]["files"], states=True):
                usable = count
                break
        self._order = steps[:usable]
        for step in steps[usable:]:
            self._records.pop(step, None)
            for file in (self.path / f"{step}.json", *self.path.glob(f"{step}.*")):
                _remove(file)
        return usable

    def _read(self, step: str) -> dict[str, Any] | None:
        try:
            record = json_value(self.path / f"{step}.json")
        except (OSError, ValueError, RecursionError):
            return None
        # One that isn't as it was written is as good as none: its step is done again.
        whole = isinstance(record, dict) and record.pop("sha256", None) == _digest(record)
        return record if whole else None

    def _has(self, files: Mapping[str, str], *, states: bool) -> bool:
        """Return whether a step's hidden states, or its other files, are complete."""
        try:
            return all(
                file_sha256(self.path / name) == digest
                for name, digest in files.items()
                if name.endswith(".bin") == states
            )
        except OSError:
            return False

    def report(self, step: str) -> dict[str, Any]:
        """Return the report of a step that is done."""
        found: dict[str, Any] = self._records[step]["report"]
        return found

    def tensors(self, step: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a step that is done."""
        found: dict[str, torch.Tensor] = {}
        for file in self.tensor_files([step]):
            found |= read_tensors(file)
        return found

    def state(self) -> dict[str, Windows]:
        """Return the hidden states of the last step that is done."""
        if not self._order:
            return {}
        step = self._order[-1]
        return {
            name: WindowFile(self._state_file(step, name), tuple(shape), getattr(torch, dtype))
            for name, (shape, dtype) in self._records[step]["state"].items()
        }

    # ---- what goes beyond a ledger

    def _state_file(self, step: str, name: str) -> Path:
        return self.path / f"{step}.{quote(name, safe='')}.bin"

    def tensor_files(self, steps: list[str]) -> list[Path]:
        """Return the files with the tensors of steps."""
        names = (name for step in steps for name in self._records[step]["files"])
        return [self.path / name for name in names if name.endswith(_TENSORS)]

    def log(self, event: Mapping[str, Any]) -> None:
        """Append an event to the log, one JSON object a line."""
        try:
            with open(self.path / LOG, "ab", opener=_open_plain) as file:
                line = json_text({"time": round(time.time(), 3), **event}, indent=None)
                file.write(f"{line}\n".encode())
        except OSError as error:
            raise OutputError(f"{self.path / LOG} could not be written: {error}") from error

    def mark(self, name: str, value: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Write a record next to those of the steps, or read it."""
        if value is None:
            try:
                found = json_value(self.path / name)
            except (OSError, ValueError, RecursionError):
                return None
            return found if isinstance(found, dict) else None
        write_json(self.path / name, value)
        return dict(value)

    @property
    def begun(self) -> bool:
        """Whether a step is done."""
        return bool(self._order)

    def close(self) -> None:
        """Free the directory for other processes."""
        self._lock.close()

    def remove(self) -> None:
        """Remove the directory: the run has ended."""
        # It loses its name first, so that half of it is never found.
        rest = ended(self.path)
        shutil.rmtree(rest, ignore_errors=True)
        try:
            self.path.rename(rest)
        except PermissionError:
            # Windows renames no directory with an open file in it.
            self.close()
            move(self.path, rest)
        shutil.rmtree(rest, ignore_errors=True)
        self.close()
