"""Forward passes of token windows through a model in parts: before, through, after its blocks.

The arguments of blocks other than hidden states, such as masks and rotary embeddings, and all that
happens before the first block and after the last, are computed by the model's own classes;
functions replace modules without weights meanwhile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import ArchitectureError, CalibrationError, CorequantError
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.dimensions import Dimensions
from corequant_transformers.model.parts import ENTRY, Parts, part_plan
from corequant_transformers.model.replicas import standing_in
from corequant_transformers.model.surroundings import device_of

__all__ = [
    "Crossing",
    "HiddenStates",
    "PerWindow",
    "Windows",
    "block_arguments",
    "check_ids",
    "check_positions",
    "check_tokens",
    "enter",
    "follow_block",
    "leaving",
    "run_block",
]

Tokens = npt.NDArray[np.int64]


class Windows(Protocol):
    """Hidden states (windows, length, hidden), in memory as a torch tensor or in a file."""

    @property
    def shape(self) -> Any:
        """Windows, length, hidden."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> torch.Tensor: ...

    def __setitem__(self, index: int, value: torch.Tensor, /) -> None: ...


class Crossing:
    """Hidden states that are read from one place while new ones are written to another."""

    def __init__(self, before: Windows, after: Windows) -> None:
        self.before, self.after = before, after

    @property
    def shape(self) -> Any:
        """Windows, length, hidden."""
        return self.before.shape

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, index: slice) -> torch.Tensor:
        return self.before[index]

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        self.after[index] = value


@dataclass(frozen=True, eq=False)
class PerWindow:
    """An argument of blocks that differs from window to window.

    Attributes
    ----------
    states : Windows (windows, length, hidden)
    """

    states: Windows


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """Inputs of a decoder block in both networks.

    Attributes
    ----------
    quantized : Windows (windows, length, hidden), float32
        In the network whose earlier blocks are quantized.
    float_states : Windows (windows, length, hidden), float32, optional
        In the float network, in the same rotated basis. None where the method compares nothing, or
        with what the float block makes of ``quantized``.
    """

    quantized: Windows
    float_states: Windows | None


def check_tokens(tokens: Any) -> Tokens:
    """Return integer token windows (n, length) as int64; anything else is a CalibrationError."""
    try:
        if isinstance(tokens, torch.Tensor):
            tokens = tokens.detach().cpu().numpy()
        array = np.asarray(tokens)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        # Rows of different lengths, dtypes that NumPy lacks, tensors without data.
        raise CalibrationError(
            f"token windows must be an array of integers (windows, length), got a "
            f"{type(tokens).__name__} that can't be converted ({error})"
        ) from None
    if array.ndim != 2 or array.dtype.kind not in "iu" or array.size == 0 or array.shape[1] < 2:
        raise CalibrationError(
            "token windows must be integers (windows, length) with at least one window of two "
            f"tokens, got dtype {array.dtype} and shape {array.shape}"
        )
    most = int(array.max())
    if most > np.iinfo(np.int64).max:
        raise CalibrationError(f"token ids must be those of a vocabulary, got {most}")
    return array.astype(np.int64)


def check_ids(tokens: Tokens, vocabulary: int) -> None:
    """Raise CalibrationError for token ids that a model has no row for.

    Parameters
    ----------
    tokens : numpy.ndarray (windows, length), int64
    vocabulary : int
        Rows of the model's embedding.
    """
    outside = (tokens < 0) | (tokens >= vocabulary)
    if not outside.any():
        return
    ids = np.unique(tokens[outside])
    named = ", ".join(map(str, ids[:8].tolist())) + (", ..." if len(ids) > 8 else "")
    window, position = (int(k) for k in np.argwhere(outside)[0])
    raise CalibrationError(
        f"token ids must be in 0..{vocabulary - 1}, the model's vocabulary of {vocabulary}, got "
        f"{named} ({int(outside.sum())} of {tokens.size} tokens, the first in window {window} at "
        f"position {position}): leave out padding and labels such as -100, and text with tokens "
        "that were added to the tokenizer but not to the model"
    )


def check_positions(architecture: Architecture, dimensions: Dimensions, tokens: Tokens) -> None:
    """Raise CalibrationError for windows longer than a model with learned positions can read."""
    length, a = tokens.shape[1], architecture
    most = dimensions.positions - a.extra_positions - a.reserved_positions
    if architecture.positions is not None and length > most:
        raise CalibrationError(
            f"sequence_length must be at most {most}, the model's max_position_embeddings, "
            f"got {length}"
        )


@torch.no_grad()
def block_arguments(parts: Parts, window: Tokens, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the keyword arguments of each block other than its hidden states.

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
        If the model gives its blocks more arguments than they name, or does something else with
        hidden states before, between or after them.
    """
    found: list[dict[str, Any]] = [{} for _ in parts.blocks]
    with ExitStack() as stack:
        for index in first_blocks(parts):
            stack.enter_context(parts.open(index))
        parts.model.to(dtype)
        for path in _embeddings(parts):
            stack.enter_context(_stand_in(parts, path, _no_embedding(parts, dtype)))
        for path in _entry_norms(parts):
            stack.enter_context(_stand_in(parts, path, _same))
        second = parts.plan.architecture.second
        if second is not None:
            stack.enter_context(_stand_in(parts, second.norm, _same))
        notice = lambda index, kwargs: found[index].update(kwargs)  # noqa: E731
        stack.enter_context(_blocks_pass(parts, notice, opening=True))
        try:
            _run_trunk(parts, window)
        except CorequantError:
            raise
        except Exception as error:
            raise ArchitectureError(
                f"the forward pass of {type(_trunk(parts)).__name__} must lead from the embedding "
                f"through the decoder blocks to the final norm, got {type(error).__name__}: {error}"
            ) from error
    parts.model.float()
    return found


@torch.no_grad()
def enter(parts: Parts, window: Tokens, first: int = 0) -> torch.Tensor:
    """Return what a stack's first block reads (1, length, hidden); the entry must be open."""
    seen: list[torch.Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(_blocks_pass(parts, lambda index, kwargs: None, seen, first=first))
        _run_trunk(parts, window)
    return seen[0]


@contextmanager
def leaving(parts: Parts, hidden: torch.Tensor) -> Iterator[Any]:
    """Yield the model, which takes the output of its last block from ``hidden``.

    The exit must be open. Token ids are still asked for, of the same length, and are not looked at.
    """
    with ExitStack() as stack:
        for path in _embeddings(parts):
            stack.enter_context(_stand_in(parts, path, _no_embedding(parts, hidden.dtype)))
        for path in _entry_norms(parts):
            stack.enter_context(_stand_in(parts, path, _same))
        result = hidden.to(parts.device)
        stack.enter_context(_blocks_pass(parts, lambda index, kwargs: None, result=result))
        yield parts.model


@torch.no_grad()
def run_block(
    block: Any, hidden: torch.Tensor, arguments: Mapping[str, Any], window: int = 0
) -> torch.Tensor:
    """Return what a decoder block makes of hidden states (1, length, hidden), where it is.

    Parameters are those of ``follow_block``.
    """
    return follow_block(block, hidden, arguments, window)


def follow_block(
    block: Any, hidden: torch.Tensor, arguments: Mapping[str, Any], window: int = 0
) -> torch.Tensor:
    """Return what a decoder block makes of hidden states, as ``run_block``, with gradients.

    Parameters
    ----------
    block : torch.nn.Module
    hidden : torch.Tensor (1, length, hidden)
    arguments : mapping
        Its further arguments; of one that is ``PerWindow``, that of the window is taken.
    window : int
    """
    device = device_of(block)
    given = {
        name: value.states[window : window + 1].to(device)
        if isinstance(value, PerWindow)
        else value
        for name, value in arguments.items()
    }
    output: Any = block(hidden.to(device), **given)
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def first_blocks(parts: Parts) -> list[int]:
    """Return the blocks that compute the arguments handed on within their stack."""
    a = parts.plan.architecture
    if not a.hands_on:
        return []
    return [0, *([] if a.second is None else [a.second.first])]


def _ids(parts: Parts, window: Tokens) -> torch.Tensor:
    return torch.from_numpy(window)[None].to(parts.device)


class _Through(BaseException):
    """Ends a pass after the last block; not an Exception, so that no model catches it."""


def _run_trunk(parts: Parts, window: Tokens) -> None:
    """Run the model up to the blocks, and the code that passes them their arguments."""
    a = parts.plan.architecture
    # What is behind an enclosed model's blocks has no weights here.
    final = nullcontext() if a.enclosed else _stand_in(parts, a.final_norm, _same)
    with suppress(_Through), final:
        _trunk(parts)(**_inputs(parts, window), use_cache=False)


def _inputs(parts: Parts, window: Tokens) -> dict[str, torch.Tensor]:
    ids, second = _ids(parts, window), parts.plan.architecture.second
    # Text for both sides.
    return {"input_ids": ids} | ({} if second is None else {second.ids: ids})


def _trunk(parts: Parts) -> Any:
    a = parts.plan.architecture
    path = a.trunk if a.enclosed else a.embedding.rpartition(".")[0]
    return parts.model.get_submodule(path)


def _embeddings(parts: Parts) -> list[str]:
    a = parts.plan.architecture
    if a.enclosed:
        return [a.stem, *([] if a.second is None else [a.second.stem])]
    return [m.name for m in part_plan(parts.plan, ENTRY).matrices]


def _entry_norms(parts: Parts) -> list[str]:
    return [m.norm for m in part_plan(parts.plan, ENTRY).matrices if m.norm is not None]


def _same(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return x


def _no_embedding(parts: Parts, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    width = parts.plan.dimensions.hidden

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        ids = [*args, *kwargs.values()][0]
        return torch.zeros(*ids.shape, width, dtype=dtype, device=parts.device)

    return forward


def _stand_in(parts: Parts, path: str, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    return standing_in(parts.model.get_submodule(path), forward)


def _takes_tuples(parts: Parts) -> bool:
    """Return whether the model takes hidden states out of a tuple that a block gives."""
    if parts.plan.architecture.hands_on:
        return True
    if parts.takes_tuples is None:
        seen: list[int] = []

        def note(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(hidden.ndim)
            return hidden

        def end(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            note(hidden)
            raise _Through

        a, ids = parts.plan.architecture, torch.zeros(1, 2, dtype=torch.int64, device=parts.device)
        with ExitStack() as stack, torch.no_grad():
            for path in _embeddings(parts):
                stand_in = _no_embedding(parts, parts.model.dtype)
                stack.enter_context(_stand_in(parts, path, stand_in))
            after = (*_entry_norms(parts), *(a.block_path(i) for i in parts.blocks))
            for path in (*after, a.final_norm) if a.final_norm else after:
                stack.enter_context(_stand_in(parts, path, note))
            if a.enclosed:
                stack.enter_context(_stand_in(parts, after[-1], end))
            try:
                _trunk(parts)(input_ids=ids, use_cache=False)
            except _Through:
                pass
            except Exception:  # whatever the model does with something other than a tuple
                seen.append(0)
        parts.takes_tuples = set(seen) != {3}
    return parts.takes_tuples


@contextmanager
def _blocks_pass(
    parts: Parts,
    notice: Callable[[int, dict[str, Any]], None],
    entered: list[torch.Tensor] | None = None,
    result: torch.Tensor | None = None,
    *,
    opening: bool = False,
    first: int = 0,
) -> Iterator[None]:
    """Let all blocks hand on what they get, or the first one give ``result``.

    What block ``first`` gets is entered; with ``opening``, blocks that make what others are handed
    on are run.
    """
    tuples = _takes_tuples(parts)
    makers = first_blocks(parts) if opening else []

    def stand_in(index: int) -> Callable[..., Any]:
        names = [*inspect.signature(type(parts.block(index)).forward).parameters][2:]

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if len(args) > len(names):
                raise ArchitectureError(
                    f"decoder block {index} must name the arguments that it takes, {names}, got "
                    f"{len(args)} in addition to hidden states"
                )
            if index == first and entered is not None:
                entered.append(hidden_states)
            notice(index, {**dict(zip(names, args, strict=False)), **kwargs})
            if parts.plan.architecture.enclosed and index == parts.blocks[-1]:
                raise _Through
            output = result if result is not None else hidden_states
            if index in makers:
                made = type(parts.block(index)).forward(parts.block(index), output, *args, **kwargs)
                return (output, *made[1:])
            if parts.plan.architecture.hands_on:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                return (output, *(given.get(n) for n in parts.plan.architecture.hands_on))
            return (output, None) if tuples else output

        return forward

    with ExitStack() as stack:
        for index in parts.blocks:
            path = parts.plan.architecture.block_path(index)
            stack.enter_context(_stand_in(parts, path, stand_in(index)))
        yield
