"""Comparing directories with their digests while Transformers, which knows nothing of it, reads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corequant_transformers.files.digests import DIGESTS, check_digests, is_read

__all__ = ["Comparison", "comparing"]


class _Comparing(threading.local):
    wanted = True


_comparing = _Comparing()


@contextmanager
def comparing(wanted: bool) -> Iterator[None]:
    """Have directories that this thread reads by way of Transformers compared, or not."""
    before, _comparing.wanted = _comparing.wanted, wanted
    try:
        yield
    finally:
        _comparing.wanted = before


class Comparison:
    """The comparison of a directory of ours with its digests, while Transformers reads it.

    Parameters
    ----------
    files : sequence of str, optional
        Files of weights.
    required : bool
        Whether a directory without digests is refused if its config says that it has some. Of a
        repository on the Hub Transformers fetches only the files that it reads, and the Hub has
        digests of its own.
    """

    def __init__(self, files: Sequence[str] | None, *, required: bool = False) -> None:
        self._found: Future[Any] | None = None
        folder = Path(files[0]).parent if files else None
        if folder is None or not _comparing.wanted:
            return
        if os.path.lexists(folder / DIGESTS) or (required and folder.parent.name != "snapshots"):
            pool = ThreadPoolExecutor(1)
            self._found = pool.submit(check_digests, folder, is_read)
            pool.shutdown(wait=False)

    def __deepcopy__(self, memo: Any) -> Comparison:
        # Transformers copies its quantizer while it loads; there is one comparison for all.
        return self

    def finish(self) -> None:
        """Raise CheckpointError if a file isn't as it was written."""
        if self._found is not None:
            self._found.result()
