"""Work in several processes, each with its part of the processors."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from corequant.errors import CorequantError, RunError

__all__ = ["side_by_side"]

Share = TypeVar("Share")
Result = TypeVar("Result")
Report = Callable[..., None]

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def side_by_side(
    work: Callable[[Share, Report], Result],
    shares: Sequence[Share],
    report: Report,
    processors: int,
) -> list[Result]:
    """Return ``work(share, report)`` for each share, computed at the same time.

    Parameters
    ----------
    work : callable
        Module-level function, which other processes can import. Its arguments and its result must
        be picklable.
    shares : sequence
    report : callable
        Called in this process with the arguments that ``work`` passes to its own ``report``.
    processors : int
        Number of processors. If there are fewer than shares, the shares are computed in this
        process, one after the other.

    Raises
    ------
    CorequantError
        If ``work`` raises one; it has the same message.
    RunError
        If a process ends without a result or an error.
    """
    if processors < len(shares):
        return [work(share, report) for share in shares]
    # Not forked: libraries with threads in this process would wait for them in the new one.
    context = multiprocessing.get_context("spawn")
    results: dict[int, Result] = {}
    pipes: dict[Connection, int] = {}
    processes = []
    try:
        with _threads(processors // len(shares)):
            for index, share in enumerate(shares):
                # On Windows, a pipe's end has another class with the same methods.
                ends: Any = context.Pipe(duplex=False)
                ours, theirs = ends
                process = context.Process(target=_serve, args=(work, share, theirs), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes[ours] = index
        while pipes:
            ready: list[Any] = wait(list(pipes))
            for pipe in ready:
                _receive(pipe, pipes, results, report)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return [results[index] for index in range(len(shares))]


def _receive(
    pipe: Connection, pipes: dict[Connection, int], results: dict[int, Any], report: Report
) -> None:
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise RunError(
            f"the process of share {pipes[pipe] + 1} must return a result, but it ended: it was "
            "killed, or ran out of memory"
        ) from None
    if kind == "report":
        report(*value)
    elif kind == "result":
        results[pipes.pop(pipe)] = value
        pipe.close()
    elif kind == "refused":
        raise CorequantError(value)
    else:
        raise RuntimeError(value)


def _serve(work: Callable[[Any, Report], Any], share: Any, pipe: Connection) -> None:
    """Work on a share and send the result, or the error."""
    # The parent process is interrupted, too, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        message = ("result", work(share, lambda *event: pipe.send(("report", event))))
    except CorequantError as error:
        message = ("refused", str(error))
    except Exception:
        message = ("failed", traceback.format_exc())
    pipe.send(message)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let new processes use ``count`` threads each, unless the user has set their number."""
    added = [name for name in _THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, str(max(1, count))))
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
