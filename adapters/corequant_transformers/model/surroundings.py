"""What a program has switched on around a call, and that has no influence on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["undisturbed"]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute as where nothing was switched on: autocast, inference mode, a device by default.

    All of that belongs to the thread, so that other threads keep theirs. What belongs to the
    process, such as the dtype by default, is not touched: whoever makes tensors names their dtype.

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
