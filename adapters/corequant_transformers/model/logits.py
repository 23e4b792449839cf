"""A model's logits over a window of tokens, a few hundred positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant_transformers.architectures.known import architecture_of
from corequant_transformers.model.replicas import standing_in

__all__ = ["window_logits"]

_MOST_ROWS = 256
_MOST_LOGITS = 1 << 24
"""The vocabulary is wide: logits of a few hundred positions at a time, 64 MiB, bound the memory."""


def window_logits(model: Any, window: npt.NDArray[np.int64]) -> Iterator[torch.Tensor]:
    """Yield the logits at all positions of a window but the last, in order.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A replica or a skeleton with open parts, which no other thread runs. Its modules have
        other forward passes until the iterator ends.
    window : numpy.ndarray (length,), int64

    Yields
    ------
    torch.Tensor (positions, vocabulary)
        In the dtype and on the device of the model.
    """
    architecture = architecture_of(model.config)
    trunk = model.get_submodule(architecture.embedding.rpartition(".")[0])
    head: Any = model.get_submodule(architecture.head).weight
    # Layers of torch's own quantization have a method of that name, and run on the CPU.
    ids = torch.from_numpy(window).to(getattr(head, "device", "cpu"))[None]
    found: list[Any] = []
    forward = trunk.forward

    def once(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        found.append((output, output.last_hidden_state))
        output.last_hidden_state = output.last_hidden_state[:, :1]
        return output

    # Through the whole model: what its own forward and its hooks do before the trunk counts.
    with torch.no_grad(), standing_in(trunk, once):
        whole = model(input_ids=ids, use_cache=False).logits[0]
    rows = max(1, min(_MOST_ROWS, _MOST_LOGITS // whole.shape[-1]))
    if not found:
        # A function in the place of the model's forward found another trunk by itself.
        yield from whole[:-1].split(rows)
        return
    output, hidden = found[0]
    del whole
    # What stands between the last hidden states and the logits besides the head, such as a soft
    # cap, is the model's own affair: it runs with a trunk that has its answer already.
    with standing_in(trunk, lambda *args, **kwargs: output):
        for part in hidden[:, :-1].split(rows, dim=1):
            output.last_hidden_state = part
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0]
            yield logits
