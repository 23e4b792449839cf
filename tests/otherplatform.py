"""Windows in name only: what it lacks is gone from Python, and files behave as they do there.

What forgets about it fails here as it would there: modules and functions of POSIX are missing,
directories can't be opened, nor files synchronised that are open for reading; what is open or
mapped can't be removed, renamed or replaced; texts have the system's own encoding and ends of lines
unless something else is asked for; some names can't be given, and letters of both cases are one.
Libraries are imported before, since they have branches of their own for Windows.

``python -m tests.otherplatform PROGRAM ARGUMENT ...`` runs the text of a program there, and
``pytest -p tests.otherplatform`` a test.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import functools
import importlib.util
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["REMOVED", "install"]

MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
FUNCTIONS = (
    "chown chroot eventfd fchdir fchmod fchown fdatasync fork forkpty fwalk getegid geteuid "
    "getgid getgroups getloadavg getpgid getxattr killpg lchown lockf memfd_create mkfifo mknod "
    "nice openpty pipe2 posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev "
    "readv register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile setsid "
    "setuid setxattr statvfs sync uname wait3 wait4 waitid writev O_ACCMODE O_CLOEXEC "
    "O_DIRECT O_DIRECTORY O_DSYNC O_NOATIME O_NOFOLLOW O_NONBLOCK O_SYNC O_TMPFILE"
).split()
"""Of ``os``; ``getuid`` is left, which pytest asks."""

SIGNALS = (
    "ITIMER_REAL SIGALRM SIGBUS SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGXFSZ alarm "
    "getitimer pause pthread_kill setitimer sigwait"
).split()
ENCODING = "cp1252"
REMOVED = 1 << 30
"""Stands for ``os.O_TEMPORARY``, which has a file removed when it is closed."""

_RESERVED = re.compile(
    r"[\x00-\x1f<>:\"|?*\\]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE
)
_UNKNOWN = ("/proc/", "/sys/", "/dev/shm/")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def install() -> None:
    """Take away what Windows lacks, for good; libraries are imported first."""
    if importlib.util.find_spec("fcntl") is None:
        return
    import fcntl
    import resource
    import tempfile

    import filelock
    import platformdirs  # noqa: F401
    import psutil
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    import transformers.core_model_loading
    import transformers.modeling_utils  # noqa: F401

    # Locks of files are the library's own, which has others on Windows.
    filelock.lock_descriptor  # noqa: B018
    files = _Files(lambda handle: not fcntl.fcntl(handle, fcntl.F_GETFL) & _WRITING)
    usage, own = resource.getrusage, resource.RUSAGE_SELF
    psutil._common.open, info = builtins.open, psutil.Process.memory_info

    @functools.wraps(info)
    def with_peak(process: Any) -> Any:
        return SimpleNamespace(**info(process)._asdict(), peak_wset=1024 * usage(own).ru_maxrss)

    psutil.Process.memory_info = with_peak

    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in ((os, FUNCTIONS), (signal, SIGNALS)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    os.O_TEMPORARY = REMOVED
    # What these do by descriptors of directories and system calls, they do otherwise there.
    shutil._use_fd_functions = False
    shutil._USE_CP_SENDFILE = False
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile
    for name in ("open", "fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir"):
        setattr(os, name, getattr(files, name))
    builtins.open = io.open = files.open_text
    ctypes.CDLL = _Library


class _Library(ctypes.CDLL):
    """A library, which must have a name."""

    def __init__(self, name: Any, *arguments: Any, **options: Any) -> None:
        if name is None:
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        super().__init__(name, *arguments, **options)


class _Files:
    """The functions of ``os`` that behave otherwise, and ``open``."""

    def __init__(self, is_read_only: Callable[[int], bool]) -> None:
        self._is_read_only = is_read_only
        self._os = SimpleNamespace(**vars(os))
        self._open: Any = io.open

    def open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if self._os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        if flags & _WRITING:
            self._check_name(path)
        handle: int = self._os.open(path, flags & ~REMOVED, mode, **options)
        if flags & REMOVED:
            self._os.unlink(path)
        return handle

    def open_text(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None,
        errors: Any = None, newline: Any = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if not isinstance(file, int):
            self._check_known(file)
            if set(mode) & set("wax+"):
                self._check_name(file)
        if "b" not in mode:
            encoding = ENCODING if encoding in (None, "locale") else encoding
            if newline is None and set(mode) & set("wax"):
                newline = "\r\n"
        return self._open(file, mode, buffering, encoding, errors, newline, closefd, opener)

    def fsync(self, handle: int) -> None:
        if self._is_read_only(handle):
            raise OSError(errno.EBADF, "Bad file descriptor")
        self._os.fsync(handle)

    def rename(self, source: Any, target: Any) -> None:
        if self._os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "File exists", str(source), None, str(target))
        self._move(source, target)

    def replace(self, source: Any, target: Any) -> None:
        if self._os.path.isdir(target):
            raise PermissionError(errno.EACCES, "Permission denied", str(source), None, str(target))
        self._move(source, target)

    def _move(self, source: Any, target: Any) -> None:
        self._check_free(source)
        self._check_free(target)
        self._check_name(target)
        self._os.replace(source, target)

    def unlink(self, path: Any, **options: Any) -> None:
        self._check_free(path)
        self._os.unlink(path, **options)

    remove = unlink

    def mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        self._check_name(path)
        self._os.mkdir(path, mode, **options)

    def rmdir(self, path: Any, **options: Any) -> None:
        self._check_free(path)
        self._os.rmdir(path, **options)

    def _check_known(self, path: Any) -> None:
        if str(path).startswith(_UNKNOWN):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    def _check_name(self, path: Any) -> None:
        folder, name = self._os.path.split(self._os.path.abspath(self._os.fsdecode(path)))
        if _RESERVED.search(name):
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        if self._os.path.isdir(folder):
            for other in self._os.listdir(folder):
                if other != name and other.lower() == name.lower():
                    raise AssertionError(f"{path} and {other} are one file on Windows")

    def _check_free(self, path: Any) -> None:
        """Refuse what is open or mapped here, or holds such a file."""
        if not self._os.path.lexists(path):
            return
        # The name itself, if it is a link.
        folder, name = self._os.path.split(self._os.path.abspath(self._os.fsdecode(path)))
        real = self._os.path.join(self._os.path.realpath(folder), name)
        for held in self._held():
            if held == real or held.startswith(f"{real}/"):
                error = PermissionError(errno.EACCES, "Permission denied", str(path))
                error.winerror = 32
                raise error

    def _held(self) -> Iterator[str]:
        if not self._os.path.exists("/proc/self/maps"):
            return
        for handle in self._os.listdir("/proc/self/fd"):
            try:
                yield self._os.readlink(f"/proc/self/fd/{handle}")
            except OSError:
                continue
        with self._open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                _, _, _, _, _, *name = line.rstrip("\n").split(None, 5)
                yield from name


def pytest_configure() -> None:
    """Take everything away from the tests of a process that has the module as a plugin."""
    import distributed  # noqa: F401

    install()


if __name__ == "__main__":
    install()
    program, sys.argv = Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[1:]
    exec(compile(program, sys.argv[0], "exec"), {"__name__": "__main__"})
