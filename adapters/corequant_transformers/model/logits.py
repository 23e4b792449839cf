"""A model's logits at chosen positions, a few hundred at a time."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant_transformers.model.recognition import architecture_in
from corequant_transformers.model.replicas import standing_in

__all__ = ["Reading", "placed", "window_logits"]

_MOST_ROWS = 256
_MOST_LOGITS = 1 << 24
"""Largest number of logits at a time, 64 MiB: a few hundred positions of a wide vocabulary."""


def window_logits(model: Any, window: npt.NDArray[np.int64]) -> Iterator[torch.Tensor]:
    """Yield the logits at all positions of a window but the last, in order.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As for ``Reading``.
    window : numpy.ndarray (length,), int64

    Yields
    ------
    torch.Tensor (positions, vocabulary)
        In the dtype and on the device of the model.
    """
    ids = placed(model, torch.from_numpy(window)[None])
    yield from Reading(model, ids).logits(lambda states: states[0, :-1])


class Reading:
    """Results of a model on a batch of tokens: logits, and a state to continue from.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A replica or a skeleton with open parts, which no other thread runs.
    ids : torch.Tensor (batch, length), int64
        On the model's device.
    **arguments
        Further arguments of the model, such as the result of ``onward``.
    """

    def __init__(self, model: Any, ids: torch.Tensor, **arguments: Any) -> None:
        self._model, self._ids = model, ids
        self._trunk = _trunk(model)
        self._found: list[Any] = []
        watched = _watched(self._trunk.forward, self._found)
        with torch.no_grad(), standing_in(self._trunk, watched):
            self._output = model(input_ids=ids, **{"use_cache": False, **arguments})

    def logits(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the logits at chosen positions, in order.

        The model's modules have other forward passes until the iterator ends.

        Parameters
        ----------
        choose : callable
            Returns the rows (positions, width) of an array (batch, length, width) that are wanted.

        Yields
        ------
        torch.Tensor (positions, vocabulary)
        """
        whole = self._output.logits
        rows = max(1, min(_MOST_ROWS, _MOST_LOGITS // whole.shape[-1]))
        if not self._found:
            # A function that replaces the model's forward found another trunk on its own.
            yield from torch.split(choose(whole), rows)
            return
        output, states = self._found[0]
        # Anything between the last hidden states and the logits in addition to the head, such as a
        # soft cap, is left to the model, which runs with a trunk that already has its result.
        with standing_in(self._trunk, lambda *args, **kwargs: output):
            for part in torch.split(choose(states), rows):
                output.last_hidden_state = part[None]
                with torch.no_grad():
                    logits = self._model(input_ids=self._ids, use_cache=False).logits[0]
                yield logits

    def onward(self, lines: torch.Tensor) -> dict[str, Any]:
        """Return the arguments with which the model continues rows of the batch.

        Parameters
        ----------
        lines : torch.Tensor (rows,), int64
            Row of this batch that each row of the next one continues.

        Returns
        -------
        dict
            Arguments for a single further ``Reading``; empty if the model keeps no state, or
            ``use_cache`` wasn't set.
        """
        # Its name changed in Transformers 5.24.
        taken = inspect.signature(self._model.forward).parameters
        name = "cache" if "cache" in taken else "past_key_values"
        cache = getattr(self._output, name, None)
        if cache is None:
            return {}
        # Continuing changes the cache, and some of its tensors in place.
        cache = copy.deepcopy(cache)
        cache.reorder_cache(lines)
        return {name: cache, "use_cache": True}


def placed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return token ids on the device of a model's head."""
    head: Any = model.get_submodule(architecture_in(model).head).weight
    # Layers of torch's own quantization have a method of that name, and run on the CPU.
    return ids.to(getattr(head, "device", "cpu"))


def _trunk(model: Any) -> Any:
    architecture = architecture_in(model)
    return model.get_submodule(architecture.embedding.rpartition(".")[0])


def _watched(forward: Callable[..., Any], found: list[Any]) -> Callable[..., Any]:
    """Return a forward pass that keeps its output and last hidden states, and passes on few."""

    # Through the whole model: what its own forward and its hooks do before the trunk counts. Its
    # head sees one position.
    def once(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        found.append((output, output.last_hidden_state))
        output.last_hidden_state = output.last_hidden_state[:1, :1]
        return output

    return once
