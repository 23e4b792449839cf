"""How many processors may run this process's threads.

A container with 1.5 of a machine's 64 processors sees all 64: its share is a quota of its control
groups, of time, and threads beyond it only stop each other. See "CPU Controller" in the kernel's
``cgroup-v2`` and "CFS Bandwidth Control" for version 1; ``proc_pid_mountinfo(5)`` for where they
are.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

__all__ = ["cpu_quota", "processor_count"]

_KEPT = 10.0
"""Seconds for which a quota is taken to hold; it may be changed while we run."""

_PYTHONS: Callable[[], int | None] | None = getattr(os, "process_cpu_count", None)
"""From Python 3.13 on: with ``PYTHON_CPU_COUNT`` and ``-X cpu_count``."""


def processor_count() -> int:
    """Return the least of affinity, Python's own count and the quota rounded up; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
        if _PYTHONS is not None:
            count = min(count, _PYTHONS() or 1)
    else:
        count = (_PYTHONS or os.cpu_count)() or 1
    quota = _quota_in(int(time.monotonic() / _KEPT))
    return count if quota >= count else math.ceil(quota)


@lru_cache(1)
def _quota_in(period: int) -> float:
    return cpu_quota()


def cpu_quota(process: Path = Path("/proc/self")) -> float:
    """Return for how many processors' time a process's control groups let it run.

    Parameters
    ----------
    process : Path
        Its folder in /proc.

    Returns
    -------
    float
        The least quota between its group and the outermost one that it can see; infinite without.
    """
    try:
        groups, mounts = (
            os.fsdecode(process.joinpath(name).read_bytes()).splitlines()
            for name in ("cgroup", "mountinfo")
        )
    except OSError:  # no Linux, or no /proc
        return math.inf
    # Lines are "4:cpu,cpuacct:/a/b", in version 2 "0::/a/b".
    paths = dict(line.split(":", 2)[1:] for line in groups)
    cpu = next((path for names, path in paths.items() if "cpu" in names.split(",")), None)
    least = math.inf
    for line in mounts:
        root, mount, *rest = line.split()[3:]
        kind, options = rest[rest.index("-") + 1], rest[-1].split(",")
        if kind == "cgroup2":
            path = paths.get("")
        else:
            path = cpu if kind == "cgroup" and "cpu" in options else None
        if path is not None:
            folders = _folders(Path(_unescaped(mount)), _unescaped(root), path)
            least = min(least, min(map(_quota_of, folders)))
    return least


def _folders(mount: Path, root: str, path: str) -> Iterator[Path]:
    """Yield the folders of a group and those above it, down from where they are mounted."""
    yield mount
    inside = Path(path)
    # Another namespace's groups have names that lead nowhere here.
    if ".." not in inside.parts and inside.is_relative_to(root):
        for name in inside.relative_to(root).parts:
            mount /= name
            yield mount


def _quota_of(group: Path) -> float:
    try:
        if group.joinpath("cpu.max").exists():
            quota, period = group.joinpath("cpu.max").read_text().split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = (group.joinpath(name).read_text() for name in names)
        found = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # none for this group, or "max"
        return math.inf
    return found if found > 0 else math.inf


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
