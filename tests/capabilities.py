"""What the system that runs the tests can do: a test that needs more of it says what."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

__all__ = ["forks", "limits", "links", "modes", "pipes", "procfs", "protection"]


def _links() -> bool:
    """Return whether links can be made; on Windows most users may not."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
        (Path(folder) / "link").symlink_to("x")
        return True
    return False


def _modes() -> bool:
    """Return whether directories can be their owner's alone."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x").mkdir(mode=0o700)
        return (Path(folder) / "x").stat().st_mode & 0o777 == 0o700


def _protection() -> bool:
    with contextlib.suppress(TypeError, AttributeError):
        return ctypes.CDLL(None).mprotect is not None
    return False


def _needs(able: bool, what: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not able, reason=f"the system has no {what}")


forks = _needs(hasattr(os, "fork"), "fork")
limits = _needs(importlib.util.find_spec("resource") is not None, "limits of resources")
links = _needs(_links(), "links that anybody may make")
modes = _needs(_modes(), "permissions by owner")
pipes = _needs(hasattr(os, "mkfifo"), "pipes with names")
procfs = _needs(Path("/proc/self/statm").exists(), "/proc")
protection = _needs(_protection(), "mprotect")
