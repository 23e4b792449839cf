"""The effect of exchanged layers on a model's predictions, computed from the changed block on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant_torch.device.onednn import QuickForward
from corequant_transformers.evaluation.divergence import compare_positions
from corequant_transformers.model.logits import window_logits
from corequant_transformers.model.replicas import standing_in
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["Forward", "Passes", "exchanged"]

Tokens = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
Forward = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def exchanged(model: Any, forwards: Mapping[str, Forward]) -> Iterator[None]:
    """Replace layers by functions, by their paths, within the context.

    They get what the layers' hooks leave of the input.
    """
    with ExitStack() as stack:
        for path, forward in forwards.items():
            stack.enter_context(standing_in(model.get_submodule(path), forward))
        yield


class Passes:
    """A reference's predictions on some windows, and how far those of others are from them.

    What each block reads is kept, so that a change in one needs the blocks from there on only.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The reference, which no one else runs.
    plan : ModelPlan
    tokens : numpy.ndarray (windows, length), int64
    progress : callable
        Called as ``progress(done, total)``, counting windows.
    """

    def __init__(
        self,
        model: Any,
        plan: ModelPlan,
        tokens: Tokens,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._model, self._tokens = model, tokens
        path = plan.architecture.block
        self._blocks = [model.get_submodule(path.format(i)) for i in range(plan.dimensions.blocks)]
        self._states: list[list[torch.Tensor]] = []
        self._logits: list[list[torch.Tensor]] = []
        for done, window in enumerate(tokens):
            states: list[torch.Tensor] = []
            with self._recording(states), QuickForward():
                # The first of several calls is that of the blocks.
                self._logits.append([part.clone() for part in window_logits(model, window)])
            self._states.append(states)
            progress(done + 1, len(tokens))

    @contextmanager
    def _recording(self, states: list[torch.Tensor]) -> Iterator[None]:
        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append((args[0] if args else kwargs["hidden_states"]).clone())

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            states.append((output[0] if isinstance(output, tuple) else output).clone())

        with ExitStack() as stack:
            for block in self._blocks:
                handle = block.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(self._blocks[-1].register_forward_hook(after).remove)
            yield

    def divergence(self, first: int = 0) -> Values:
        """Return the divergence of the model, with what was exchanged in it, from the reference.

        Parameters
        ----------
        first : int
            The first block in which something was; the number of blocks where it is the head.

        Returns
        -------
        numpy.ndarray (windows, positions), float64
            In nats.
        """
        found = []
        for window, states in enumerate(self._states):
            with ExitStack() as stack:
                for index, block in enumerate(self._blocks[:first]):
                    forward = _giving(states[first]) if index == 0 else _same
                    stack.enter_context(standing_in(block, forward))
                found.append(self._compared(window, self._model))
        return np.stack(found)

    def divergence_of(self, other: Any) -> Values:
        """Return the divergence of another model from the reference, as ``divergence``."""
        return np.stack([self._compared(window, other) for window in range(len(self._tokens))])

    def _compared(self, window: int, model: Any) -> Values:
        tokens = self._tokens[window]
        following = torch.from_numpy(tokens[1:])
        rows: list[Values] = []
        with QuickForward():
            logits: Iterable[torch.Tensor] = window_logits(model, tokens)
            for theirs, ours in zip(self._logits[window], logits, strict=True):
                targets, following = following[: len(ours)], following[len(ours) :]
                rows.append(compare_positions(theirs, ours, targets)["kl"])
        return np.concatenate(rows)


def _giving(state: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: state


def _same(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states
