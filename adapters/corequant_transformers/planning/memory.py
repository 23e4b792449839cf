"""Memory of the process: its peak, what it gives back to the system, and an enforced limit."""

from __future__ import annotations

import ctypes
import importlib
import math
import mmap
import re
import sys
from typing import Any

from corequant.errors import RecipeError
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["limit_memory", "peak_rss_mib", "trim_memory"]

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def peak_rss_mib() -> float:
    """Return the most memory that this program has had in use so far, in MiB.

    Examples
    --------
    >>> from corequant_transformers.planning.memory import peak_rss_mib
    >>> 10 < peak_rss_mib() < 10**6
    True
    """
    try:
        # What getrusage says begins with the peak of the process that started this one.
        with open("/proc/self/status", encoding="ascii") as status:
            found = re.search(r"^VmHWM:\s+(\d+) kB", status.read(), re.M)
        if found is not None:
            return int(found[1]) / 1024
    except OSError:
        pass
    resource = _resource()
    if resource is None:
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _resource() -> Any:
    """Return the module ``resource``; None on Windows."""
    try:
        return importlib.import_module("resource")
    except ModuleNotFoundError:
        return None


def trim_memory(above: int = 0) -> None:
    """Return freed memory to the system, if the allocator can.

    Getting it back page by page takes longer than many a computation, so that a process with at
    most ``above`` bytes keeps it.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, TypeError):
        # It is glibc's, and Windows has no name for all that is loaded.
        return
    if above == 0 or _resident() > above:
        trim(0)


def _resident() -> float:
    """Return the bytes that the process has in memory now; infinity where nothing says so."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return math.inf


def limit_memory(size: str, plan: ModelPlan) -> int:
    """Limit this process's memory to ``size`` and return it in bytes.

    The limit is on private memory (``RLIMIT_DATA``): weights, activations and results count, the
    code of libraries does not.

    Parameters
    ----------
    size : str
        Limit, such as ``900MiB`` or ``2GiB``.
    plan : ModelPlan
        Plan that the limit must leave room for.

    Raises
    ------
    RecipeError
        If the plan needs more, or the system is one that doesn't enforce it, as macOS and Windows.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[kmg]ib)", size.strip().lower())
    if found is None:
        raise RecipeError(f"memory must be a size such as 900MiB or 2GiB, got {size!r}")
    wanted = float(found[1]) * _UNITS[found[2]]
    resource = _resource()
    if resource is None:
        raise _unlimited(size)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = 2**63 - 1 if hard == resource.RLIM_INFINITY else hard
    if wanted >= most:
        raise RecipeError(
            f"memory must be below {most // 2**20}MiB, what the system allows, got {size[:40]}"
        )
    limit = int(wanted)
    needed = plan.peak_bytes()
    if needed > limit:
        raise RecipeError(
            f"memory must be at least {needed / 2**20:.0f}MiB for this model and recipe, got {size}"
        )
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    if not _is_refused(limit):
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        raise _unlimited(size)
    return limit


def _unlimited(size: str) -> RecipeError:
    return RecipeError(
        "memory must be left out where the system, unlike Linux, enforces no limit on private "
        f"memory, got {size[:40]}; plan prints the peak to expect"
    )


def _is_refused(size: int) -> bool:
    """Return whether the system refuses that many bytes of private memory."""
    try:
        mmap.mmap(-1, size, access=mmap.ACCESS_COPY).close()
    except OSError:
        return True
    return False
