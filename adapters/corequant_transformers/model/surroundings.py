"""What a program has switched on around a call, kept from influencing it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import transformers
from transformers import modeling_gguf_pytorch_utils

__all__ = ["quiet_transformers", "undisturbed"]


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
    back what nobody else has changed meanwhile.
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
