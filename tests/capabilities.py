"""What the system that runs the tests can do: a test that needs more of it says what."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

__all__ = ["forks", "limits", "links", "names", "pipes", "procfs", "protection"]


def _links() -> bool:
    """Return whether links can be made; on Windows most users may not."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
        (Path(folder) / "link").symlink_to("x")
        return True
    return False


def _names() -> bool:
    """Return whether names may have characters that aren't printable."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
        (Path(folder) / "a\x1b[31m\n\u202e").mkdir()
        return True
    return False


def _protection() -> bool:
    with contextlib.suppress(TypeError, AttributeError):
        return ctypes.CDLL(None).mprotect is not None
    return False


def _needs(able: bool, what: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not able, reason=f"the system has no {what}")


forks = _needs(hasattr(os, "fork"), "fork")
limits = _needs(importlib.util.find_spec("resource") is not None, "limits of resources")
links = _needs(_links(), "links that anybody may make")
names = _needs(_names(), "names with any character")
pipes = _needs(hasattr(os, "mkfifo"), "pipes with names")
procfs = _needs(Path("/proc/self/statm").exists(), "/proc")
protection = _needs(_protection(), "mprotect")
