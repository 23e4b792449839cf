"""Where a model computes: its device, its process's memory, and what is switched on around it.

Whatever transforms a matrix does so in float64 on the CPU. Forward passes, statistics, adaptive
rounding and comparisons happen on the device. What a program has switched on around a call is kept
from influencing it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import mmap
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils

from corequant.errors import BackendError, NonFiniteError, RecipeError
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = [
    "check_device",
    "check_finite",
    "device_for",
    "device_of",
    "limit_memory",
    "peak_rss_mib",
    "quiet_transformers",
    "to_host",
    "trim_memory",
    "undisturbed",
]

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def check_device(device: str | torch.device) -> torch.device:
    """Return a device that tensors can be made on.

    Raises
    ------
    BackendError
        If this machine has no such device.

    Examples
    --------
    >>> from corequant_transformers.model.surroundings import check_device
    >>> check_device("cpu")
    device(type='cpu')
    """
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("tensors of the device meta hold no data")
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        # Unknown names, a torch built without CUDA, a device without kernels, and no name at all.
        reason = str(error).partition("\n")[0]
        raise BackendError(
            f"device must be one that torch finds here, got {device} ({reason})"
        ) from None
    return found


def device_of(module: torch.nn.Module) -> torch.device:
    """Return where a module's first parameter with numbers is; the CPU if it has none."""
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device
    return torch.device("cpu")


def device_for(
    device: str | torch.device | None, model: Any, executor: Executor | None
) -> torch.device:
    """Return the device that was asked for, that of a model, or the CPU.

    Raises
    ------
    BackendError
        If there is no such device, or it is not the CPU although there is an executor.
    """
    if device is None:
        where = torch.device("cpu") if model is None else device_of(model)
    else:
        where = check_device(device)
    if executor is not None and where.type != "cpu":
        raise BackendError(
            f"executor must be left out where the device is not the CPU, got device {where}: its "
            "workers would share the device"
        )
    return where


def to_host(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return a tensor's numbers as an array: a CPU tensor's memory, or a copy of another's."""
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def check_finite(name: str, x: torch.Tensor) -> None:
    """Raise NonFiniteError, about ``name``, where a tensor holds NaN or infinity."""
    # A sum with one of them is neither; a sum of large numbers may not be, and is looked at.
    if math.isfinite(float(x.sum())):
        return
    good = to_host(torch.isfinite(x))
    if not good.all():
        index = tuple(int(i) for i in np.unravel_index(int(good.argmin()), good.shape))
        raise NonFiniteError(name, int((~good).sum()), index, float(x[index]))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute without the caller's autocast, inference mode and default device.

    All of that belongs to the thread, so that other threads keep theirs. What belongs to the
    process, such as the default dtype, is not touched: tensors are made with explicit dtypes.

    Examples
    --------
    >>> import torch
    >>> from corequant_transformers.model.surroundings import undisturbed
    >>> with torch.device("meta"), undisturbed():
    ...     torch.zeros(1).device
    device(type='cpu')
    """
    with ExitStack() as stack:
        # Leaving inference mode switches gradients on, so they come after it.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in {"cpu", _accelerator()}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.device("cpu"))
        yield


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


class _Quiet:
    """Transformers' switches for progress bars and reports, off as long as one thread wants it.

    They belong to the process: the first who comes switches them off, and the last who goes puts
    back those that were not changed meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: tuple[int, bool, Any] = (0, False, None)
        self._within: tuple[int, Any] = (0, None)

    def __enter__(self) -> None:
        log: Any = transformers.utils.logging
        # The GGUF reader draws its bar without asking the switch.
        reader: Any = modeling_gguf_pytorch_utils
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            self._before = log.get_verbosity(), log.is_progress_bar_enabled(), reader.tqdm
            log.set_verbosity_error()
            log.disable_progress_bar()
            reader.tqdm = functools.partial(reader.tqdm, disable=True)
            self._within = log.get_verbosity(), reader.tqdm

    def __exit__(self, *error: object) -> None:
        log: Any = transformers.utils.logging
        reader: Any = modeling_gguf_pytorch_utils
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            verbosity, bars, gguf_bar = self._before
            if log.get_verbosity() == self._within[0]:
                log.set_verbosity(verbosity)
            if reader.tqdm is self._within[1]:
                reader.tqdm = gguf_bar
            if bars:
                log.enable_progress_bar()


_QUIET = _Quiet()


def quiet_transformers() -> AbstractContextManager[None]:
    """Keep Transformers' progress bars and reports off the terminal within the context."""
    return _QUIET


# ---- memory of the process: its peak, what it gives back to the system, and an enforced limit


def peak_rss_mib() -> float:
    """Return the most memory that this program has had in use so far, in MiB.

    Examples
    --------
    >>> from corequant_transformers.model.surroundings import peak_rss_mib
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
