"""Split work over threads.

Two kinds of work are split. Compiled code that needs nothing of the interpreter goes through
``Units``: a helper that has just worked looks for more for a moment before it falls asleep,
since waking it takes longer than turning a few mebibytes. Everything else that releases the
interpreter's lock goes through ``for_rows``. In both the caller works too, and takes over what no
helper has begun. Rows are independent, so results don't depend on who works on them.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue

import numpy as np

from corequant._cpu.codegen.compiler import address_of_code, compiled_away
from corequant._cpu.codegen.team import (
    ASLEEP,
    LINE,
    LOOKING,
    MOST_MEMBERS,
    Word,
    dismiss,
    job_words,
    lead,
    serve,
)
from corequant._cpu.processors import processor_count

__all__ = ["Units", "for_rows", "one_part", "thread_count"]

Work = Callable[[int, int], None]

_ADDRESS, _PAIR = struct.Struct("q"), struct.Struct("2q")
_LINE, _CONTEXT, _RANGES = 8 * LINE, 8 * Word.CONTEXT, 8 * Word.RANGES
"""In bytes."""

_LEAST_WORK = 1 << 16
"""Elements that are worth a thread of their own where a number costs some nanoseconds."""

_CHUNK = 1 << 15
"""Elements that a thread takes at a time: few enough that all are done at about the same time."""

_AWAKE = 100e-6
"""Seconds for which a helper looks for more to do; about as long as it takes to wake one."""

_WORTH_WAKING = 1 << 21
"""Elements that are worth waking helpers for, where a number costs some nanoseconds."""

_PATIENCE = 1e-3
"""Seconds for which a caller waits for helpers before it lets other threads work."""


def thread_count() -> int:
    """Return how many threads kernels use: NUMBA_NUM_THREADS, at most the processors we have."""
    wanted = os.environ.get("NUMBA_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return min(int(wanted), processor_count())
    return processor_count()


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
        Maximum number of threads; ``thread_count()`` by default.
    least_work : int
        Elements that are worth a thread of their own.
    """
    parts = _most_parts(rows, row_length, least_work)
    if threads is not None:
        parts = min(parts, threads)
    if parts <= 1:
        work(0, rows)
        return
    helpers = _crew.claim(parts - 1)
    try:
        if helpers:
            _Share(rows, work, len(helpers) + 1).finish(helpers)
        else:
            work(0, rows)
    finally:
        _crew.release(helpers)


class Units:
    """Compiled work on independent units, to be done once or again and again.

    Parameters
    ----------
    piece : callable
        A function of ``corequant._cpu.codegen.compiler.build``. It is given the context, the first
        unit, how many, and a scratch.
    units : int
        How many there are.
    unit_length : int
        Elements per unit.
    scratch_size : int
        Bytes of scratch that each thread needs.
    threads, least_work : int
        As in ``for_rows``.
    """

    def __init__(
        self,
        piece: Callable[[bytes, int, int, int], None],
        units: int,
        unit_length: int,
        scratch_size: int,
        threads: int | None = None,
        least_work: int = _LEAST_WORK,
    ) -> None:
        self.piece, self.units, self.scratch_size = piece, units, scratch_size
        most = MOST_MEMBERS if threads is None else min(threads, MOST_MEMBERS)
        self.most = min(most, _most_parts(units, unit_length, least_work))
        self.chunk = max(1, _CHUNK // unit_length)
        self.large = units * unit_length * _LEAST_WORK // least_work >= _WORTH_WAKING
        self.jobs: list[_Job] = []

    def run(self, context: bytes, scratch: int) -> None:
        """Do all of it.

        Parameters
        ----------
        context : bytes
            At most ``CONTEXT_WORDS`` words.
        scratch : int
            Address of the caller's own scratch; helpers have theirs.
        """
        if self.most <= 1:
            self.piece(context, 0, self.units, scratch)
            return
        awake = time.perf_counter() - _crew.last < _AWAKE
        helpers = _crew.claim(self.most - 1 if awake or self.large else 0)
        try:
            if helpers:
                self._share(helpers, context, scratch)
            else:
                self.piece(context, 0, self.units, scratch)
        finally:
            _crew.release(helpers)
            _crew.last = time.perf_counter()

    def _share(self, helpers: list[_Helper], context: bytes, scratch: int) -> None:
        # A job belongs to one caller at a time; taking it off a list is one step.
        try:
            job = self.jobs.pop()
        except IndexError:
            job = None
        if job is None or job.members != len(helpers) + 1:
            job = _Job(self.piece, self.units, self.chunk, len(helpers) + 1)
        job.finish(helpers, context, scratch, self.scratch_size)
        self.jobs.append(job)


def one_part(rows: int, row_length: int, threads: int | None, least_work: int) -> bool:
    """Return whether such rows stay with one thread for every ``thread_count()``."""
    return threads == 1 or _most_parts(rows, row_length, least_work) <= 1


def _most_parts(rows: int, row_length: int, least_work: int) -> int:
    return min(rows, max(1, rows * row_length // least_work))


class _Job:
    """Compiled work as ``corequant._cpu.codegen.team`` lays it out."""

    def __init__(self, piece: Callable[..., None], units: int, chunk: int, members: int) -> None:
        mailboxes = job_words(members)
        self.members = members
        self.words = _lines(mailboxes + members)
        self.memory = self.words.data.cast("B")
        self.address = self.words.ctypes.data
        self.mailboxes = 8 * mailboxes
        edges = [units * k // members for k in range(members + 1)]
        self.ranges = list(itertools.pairwise(edges))
        struct.pack_into("4q", self.memory, 0, 0, address_of_code(piece), chunk, members)

    def finish(
        self, helpers: list[_Helper], context: bytes, scratch: int, scratch_size: int
    ) -> None:
        """Ask for help, work too, and wait until all is done."""
        memory = self.memory
        memory[_CONTEXT : _CONTEXT + len(context)] = context
        for k, (first, stop) in enumerate(self.ranges):
            _PAIR.pack_into(memory, _RANGES + _LINE * k, first, stop)
        for k, helper in enumerate(helpers):
            helper.prepare(k + 1, scratch_size)
            _ADDRESS.pack_into(memory, self.mailboxes + 8 * k, helper.address)
        given = (self.address, self.address + self.mailboxes, scratch, len(helpers))
        turns = _turns(_PATIENCE)
        interrupted = None
        self.words[Word.UNFINISHED] = len(helpers)
        # What the helpers work on must not be let go before they are done, whatever comes.
        while self.words[Word.UNFINISHED]:
            try:
                lead()(*given, turns)
                if self.words[Word.UNFINISHED]:
                    time.sleep(_AWAKE)
            except BaseException as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


class _Share:
    """A range of rows for each thread.

    More and smaller pieces would be fairer, but each waits for the interpreter's lock.
    """

    def __init__(self, rows: int, work: Work, threads: int) -> None:
        edges = [rows * k // threads for k in range(threads + 1)]
        self.pieces = deque(itertools.pairwise(edges))
        self.work = work
        self.working = 0
        self.changed = threading.Condition()
        self.errors: list[BaseException] = []

    def finish(self, helpers: list[_Helper]) -> None:
        """Ask for help, work too, and wait until all is done."""
        for helper in helpers:
            helper.ask(self)
        try:
            while (piece := self._next()) is not None:
                self.work(*piece)
        except BaseException as error:
            self.errors.insert(0, error)
        # What helpers work on must not be let go before they are done, whatever comes.
        waiting = True
        while waiting:
            try:
                with self.changed:
                    self.pieces.clear()
                    waiting = self.working > 0 and not self.changed.wait_for(self._is_idle)
            except BaseException as error:
                self.errors.insert(0, error)
        if self.errors:
            raise self.errors[0]

    def help(self) -> None:
        """Do one piece that has not begun, if there is one; for helpers."""
        piece = self._next(helping=1)
        if piece is None:
            return
        try:
            self.work(*piece)
        except BaseException as error:
            self.errors.append(error)
        with self.changed:
            self.working -= 1
            self.changed.notify()

    def _next(self, helping: int = 0) -> tuple[int, int] | None:
        with self.changed:
            if not self.pieces:
                return None
            self.working += helping
            return self.pieces.popleft()

    def _is_idle(self) -> bool:
        return not self.working


class _Helper:
    """A thread that helps the caller that claimed it, through its queue or its mailbox."""

    def __init__(self, number: int) -> None:
        self.tasks: SimpleQueue[_Share | None] = SimpleQueue()
        self.mailbox = _lines(LINE)
        self.address = self.mailbox.ctypes.data
        self.mailbox[Word.STATE] = ASLEEP
        self.room = _lines(0)
        name = f"corequant-{number}"
        threading.Thread(target=self._help, name=name, daemon=True).start()

    def prepare(self, member: int, scratch: int) -> None:
        """Set its member number and bytes of scratch, and have it poll its mailbox for a job."""
        if scratch > self.room.nbytes:
            self.room = _lines(scratch // 8)
            self.mailbox[Word.SCRATCH] = self.room.ctypes.data
        self.mailbox[Word.NUMBER] = member
        if self.mailbox[Word.STATE] == ASLEEP:
            self.mailbox[Word.STATE] = LOOKING
            self.tasks.put(None)

    def ask(self, share: _Share) -> None:
        """Give it something of the interpreter's to do."""
        self.tasks.put(share)
        if not compiled_away():
            dismiss()(self.address)

    def _help(self) -> None:
        while True:
            share = self.tasks.get()
            if share is not None:
                share.help()
            if not compiled_away():
                serve()(self.address, _turns(_AWAKE))


class _Crew:
    """The process's helping threads, started when they are first needed.

    No more than ``thread_count()`` threads work at a time, callers included: where callers are as
    many already, as under joblib or in a pool, each does its own work alone.
    """

    def __init__(self) -> None:
        # A signal's handler, or a finalizer, may call while its own thread is in here.
        self.lock = threading.RLock()
        self.idle: list[_Helper] = []
        self.working = 0
        self.started = 0
        self.last = -math.inf

    def claim(self, wanted: int) -> list[_Helper]:
        """Count the caller, and claim as many helpers as may join it, for ``release``."""
        most = thread_count()
        with self.lock:
            count = max(0, min(wanted, most - self.working - 1))
            self.working += 1 + count
            while len(self.idle) < count:
                self.started += 1
                self.idle.append(_Helper(self.started))
            # The one who worked last is the likeliest to be awake.
            return [self.idle.pop() for _ in range(count)]

    def release(self, helpers: list[_Helper]) -> None:
        """Take helpers back from a caller who is done."""
        with self.lock:
            self.working -= 1 + len(helpers)
            self.idle += reversed(helpers)


def _lines(words: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return zeros that start on a line of cache."""
    memory = np.zeros(words + LINE, np.int64)
    start = -memory.ctypes.data % (8 * LINE) // 8
    return memory[start : start + words]


@cache
def _turns(seconds: float) -> int:
    """Return how often a helper polls its mailbox in a number of seconds."""
    look, alone, tried = serve(), _lines(LINE), 1000
    started = time.perf_counter()
    look(alone.ctypes.data, tried)
    return max(100, int(tried * seconds / (time.perf_counter() - started)))


_crew = _Crew()


def _reset() -> None:
    # A forked child has none of its parent's threads, and locks as they happened to be.
    global _crew
    _crew = _Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
