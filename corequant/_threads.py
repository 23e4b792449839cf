"""Split rows over threads.

Kernels release the interpreter lock, so ordinary threads run them at once. One pool serves the
whole process: however many threads of the caller's ask at a time, no more than the pool's size
compute. Rows are independent, so results don't depend on how they are split.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["for_rows", "thread_count"]

_LEAST_WORK = 1 << 16
"""Elements below which another thread costs more than it saves (measured: about 30 µs)."""

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_owner = 0


def thread_count() -> int:
    """Return how many threads kernels use: NUMBA_NUM_THREADS, or the processors given to us."""
    wanted = os.environ.get("NUMBA_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def for_rows(
    rows: int, row_length: int, work: Callable[[int, int], None], threads: int | None = None
) -> None:
    """Call ``work(start, stop)`` on ranges that cover ``range(rows)``.

    Parameters
    ----------
    rows : int
        Independent rows.
    row_length : int
        Elements per row, to judge whether another thread is worth its cost.
    work : callable
        Must release the interpreter lock and write rows ``start..stop-1`` only.
    threads : int, optional
        At most so many; ``thread_count()`` by default.
    """
    parts = min(rows, max(1, rows * row_length // _LEAST_WORK))
    if parts > 1:
        parts = min(parts, thread_count() if threads is None else threads)
    if parts <= 1:
        work(0, rows)
        return
    edges = [rows * k // parts for k in range(parts + 1)]
    waiting = [_executor().submit(work, edges[k], edges[k + 1]) for k in range(1, parts)]
    work(edges[0], edges[1])
    for future in waiting:
        future.result()


def _executor() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    global _pool, _pool_owner
    with _lock:
        # A forked child inherits the object but none of its threads.
        if _pool is None or _pool_owner != os.getpid():
            _pool = ThreadPoolExecutor(max(1, thread_count()), thread_name_prefix="corequant")
            _pool_owner = os.getpid()
        return _pool
