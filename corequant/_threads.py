"""Split rows over threads.

Kernels release the interpreter lock, so ordinary threads run them at once. The caller works too,
and takes over what no helper has begun by then. Rows are independent, so results don't depend on
who works on them.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["for_rows", "one_part", "thread_count"]

Work = Callable[[int, int], None]

_LEAST_WORK = 1 << 16
"""Elements that are worth a thread of their own where a number costs some nanoseconds."""


def thread_count() -> int:
    """Return how many threads kernels use: NUMBA_NUM_THREADS, or the processors given to us."""
    wanted = os.environ.get("NUMBA_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def for_rows(
    rows: int,
    row_length: int,
    work: Work,
    threads: int | None = None,
    least_work: int = _LEAST_WORK,
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
    least_work : int
        Elements that are worth a thread of their own.
    """
    parts = _most_parts(rows, row_length, least_work)
    if parts > 1:
        parts = min(parts, thread_count() if threads is None else threads)
    if parts <= 1:
        work(0, rows)
        return
    with _crew.helpers(parts - 1) as count:
        if count:
            _Share(rows, work, count + 1).finish(_crew)
        else:
            work(0, rows)


def one_part(rows: int, row_length: int, threads: int | None, least_work: int) -> bool:
    """Tell whether ``for_rows`` doesn't split such rows, whatever ``thread_count()`` is."""
    return threads == 1 or _most_parts(rows, row_length, least_work) == 1


def _most_parts(rows: int, row_length: int, least_work: int) -> int:
    return min(rows, max(1, rows * row_length // least_work))


class _Share:
    """A range of rows for each thread.

    More and smaller pieces would be fairer, but each waits for the interpreter's lock.
    """

    def __init__(self, rows: int, work: Work, threads: int) -> None:
        edges = [rows * k // threads for k in range(threads + 1)]
        self.pieces = deque(itertools.pairwise(edges))
        self.work = work
        self.left = threads
        self.lock = threading.Lock()
        self.done = threading.Lock()
        self.done.acquire()
        self.errors: list[BaseException] = []

    def finish(self, crew: _Crew) -> None:
        """Ask the crew for help, work too, and wait until all is done."""
        for _ in range(len(self.pieces) - 1):
            crew.tasks.put(self)
        self.take_part()
        self.done.acquire()
        if self.errors:
            raise self.errors[0]

    def take_part(self, most: int | None = None) -> None:
        """Do pieces that nobody has begun, at most so many."""
        while most is None or most > 0:
            try:
                piece = self.pieces.popleft()
            except IndexError:
                return
            try:
                self.work(*piece)
            except BaseException as error:
                self.errors.append(error)
            with self.lock:
                self.left -= 1
                last = not self.left
            if last:
                self.done.release()
            most = None if most is None else most - 1


class _Crew:
    """The process's helping threads, started when they are first needed.

    No more than ``thread_count()`` threads work at a time, callers included: where callers are as
    many already, as under joblib or in a pool, each does its own work alone.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tasks: SimpleQueue[_Share] = SimpleQueue()
        self.working = 0
        self.started = 0

    @contextmanager
    def helpers(self, wanted: int) -> Iterator[int]:
        """Count the caller, and as many helpers as may join it."""
        with self.lock:
            count = max(0, min(wanted, thread_count() - self.working - 1))
            self.working += 1 + count
            while self.started < count:
                self.started += 1
                name = f"corequant-{self.started}"
                threading.Thread(target=self._help, name=name, daemon=True).start()
        try:
            yield count
        finally:
            with self.lock:
                self.working -= 1 + count

    def _help(self) -> None:
        while True:
            self.tasks.get().take_part(1)


_crew = _Crew()


def _start_anew() -> None:
    # A forked child has none of its parent's threads, and locks as they happened to be.
    global _crew
    _crew = _Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
