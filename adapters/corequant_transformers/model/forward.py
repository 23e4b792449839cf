"""Forward passes through a model that is opened in parts: before, through and after its blocks.

What a block gets besides its hidden states, such as masks and rotary embeddings, and what happens
before the first block and after the last, is computed by the model's own classes; functions replace
modules without weights meanwhile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import ArchitectureError
from corequant_transformers.model.parts import ENTRY, Parts, part_plan
from corequant_transformers.model.replicas import standing_in
from corequant_transformers.model.surroundings import device_of

__all__ = ["block_arguments", "enter", "leaving", "run_block"]

Window = npt.NDArray[np.int64]


@torch.no_grad()
def block_arguments(parts: Parts, window: Window, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the keyword arguments that each block gets besides its hidden states.

    Parameters
    ----------
    parts : Parts
        No part needs to be open.
    window : numpy.ndarray (length,), int64
        They are those of every window of this length.
    dtype : torch.dtype
        float32 or float64.

    Raises
    ------
    ArchitectureError
        If the model gives its blocks more arguments than they name.
    """
    found: list[dict[str, Any]] = [{} for _ in parts.blocks]
    parts.model.to(dtype)
    with ExitStack() as stack:
        for path in _embeddings(parts):
            stack.enter_context(_stand_in(parts, path, _no_embedding(parts, dtype)))
        stack.enter_context(_blocks_pass(parts, lambda index, kwargs: found[index].update(kwargs)))
        stack.enter_context(_stand_in(parts, parts.plan.architecture.final_norm, _same))
        _trunk(parts)(input_ids=_ids(parts, window), use_cache=False)
    parts.model.float()
    return found


@torch.no_grad()
def enter(parts: Parts, window: Window) -> torch.Tensor:
    """Return what the first block reads (1, length, hidden); the entry must be open."""
    seen: list[torch.Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(_blocks_pass(parts, lambda index, kwargs: None, seen))
        stack.enter_context(_stand_in(parts, parts.plan.architecture.final_norm, _same))
        _trunk(parts)(input_ids=_ids(parts, window), use_cache=False)
    return seen[0]


@contextmanager
def leaving(parts: Parts, hidden: torch.Tensor) -> Iterator[Any]:
    """Yield the model, which takes the output of its last block from ``hidden``.

    The exit must be open. Token ids are still asked for, of the same length, and are not looked at.
    """
    with ExitStack() as stack:
        for path in _embeddings(parts):
            stack.enter_context(_stand_in(parts, path, _no_embedding(parts, hidden.dtype)))
        result = hidden.to(parts.device)
        stack.enter_context(_blocks_pass(parts, lambda index, kwargs: None, result=result))
        yield parts.model


@torch.no_grad()
def run_block(block: Any, hidden: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Return what a decoder block makes of hidden states (1, length, hidden), where it is."""
    output: Any = block(hidden.to(device_of(block)), **arguments)
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _ids(parts: Parts, window: Window) -> torch.Tensor:
    return torch.from_numpy(window)[None].to(parts.device)


def _trunk(parts: Parts) -> Any:
    return parts.model.get_submodule(parts.plan.architecture.embedding.rpartition(".")[0])


def _embeddings(parts: Parts) -> list[str]:
    return [m.name for m in part_plan(parts.plan, ENTRY).matrices]


def _same(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return x


def _no_embedding(parts: Parts, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    width = parts.plan.dimensions.hidden

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        ids = [*args, *kwargs.values()][0]
        return torch.zeros(*ids.shape, width, dtype=dtype, device=ids.device)

    return forward


def _stand_in(parts: Parts, path: str, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    return standing_in(parts.model.get_submodule(path), forward)


@contextmanager
def _blocks_pass(
    parts: Parts,
    notice: Callable[[int, dict[str, Any]], None],
    entered: list[torch.Tensor] | None = None,
    result: torch.Tensor | None = None,
) -> Iterator[None]:
    """Let all blocks hand on what they get, or the first one give ``result``."""

    def stand_in(index: int) -> Callable[..., torch.Tensor]:
        names = [*inspect.signature(type(parts.block(index)).forward).parameters][2:]

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if len(args) > len(names):
                raise ArchitectureError(
                    f"decoder block {index} must name the arguments that it takes, {names}, got "
                    f"{len(args)} besides hidden states"
                )
            if index == 0 and entered is not None:
                entered.append(hidden_states)
            notice(index, {**dict(zip(names, args, strict=False)), **kwargs})
            return result if result is not None else hidden_states

        return forward

    with ExitStack() as stack:
        for index in parts.blocks:
            path = parts.plan.architecture.block.format(index)
            stack.enter_context(_stand_in(parts, path, stand_in(index)))
        yield
