"""Arguments of blocks other than hidden states, and the transition to a second stack of blocks.

Blocks of a second stack read what the first one gave, which differs from window to window and from
network to network: its states are kept with the hidden states, under names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant_transformers.model.forward import (
    Crossing,
    HiddenStates,
    PerWindow,
    Windows,
    block_arguments,
    enter,
)
from corequant_transformers.model.parts import ENTRY, Parts
from corequant_transformers.rounding.layers import round_unquantized
from corequant_transformers.run.ledger import Ledger
from corequant_transformers.transforms.verification import KeepFloat64

__all__ = ["Stacks"]

Tokens = npt.NDArray[np.int64]

_KEPT = "memory-"
_VERIFIED = ("reference", "transformed")
_ROUNDED = ("quantized", "float")


class Stacks:
    """The stacks of a model's blocks: one, or that of an encoder and that of a decoder.

    Parameters
    ----------
    parts : Parts
    tokens : numpy.ndarray (windows, length), int64
    verified : numpy.ndarray (length,), int64
        Tokens on which the model is compared in float64.
    """

    def __init__(self, parts: Parts, tokens: Tokens, verified: Tokens) -> None:
        self._parts, self._tokens, self._verified = parts, tokens, verified
        self._fixed: dict[torch.dtype, list[dict[str, Any]]] = {}

    def prepare(self) -> None:
        """Record the arguments of the blocks other than hidden states."""
        parts = self._parts
        self._fixed[torch.float32] = block_arguments(parts, self._tokens[0], torch.float32)
        with KeepFloat64():
            verified = block_arguments(parts, self._verified, torch.float64)
        self._fixed[torch.float64] = verified

    def arguments(
        self, dtype: torch.dtype, index: int, state: Mapping[str, Windows], name: str
    ) -> dict[str, Any]:
        """Return a block's arguments other than the hidden states kept under ``name``."""
        fixed, second = self._fixed[dtype][index], self._parts.plan.architecture.second
        memory = state.get(f"{_KEPT}{name}")
        if second is None or memory is None:
            return fixed
        return {**fixed, second.states: PerWindow(memory)}

    def rounded_arguments(
        self, index: int, state: Mapping[str, Windows]
    ) -> tuple[dict[str, Any], ...]:
        """Return a block's arguments in the quantized network and in the float one."""
        return tuple(self.arguments(torch.float32, index, state, name) for name in _ROUNDED)

    def rounded(
        self, state: Mapping[str, Windows], following: dict[str, Windows], ledger: Ledger
    ) -> HiddenStates | None:
        """Return the hidden states that rounding reads, with room in ``following`` for the next."""
        crossing = {}
        for name in _ROUNDED:
            if name in state:
                shape = tuple(state[name].shape)
                following[name] = ledger.windows(f"{name}-next", shape, torch.float32)
                crossing[name] = Crossing(state[name], following[name])
        if not crossing:
            return None
        return HiddenStates(crossing["quantized"], crossing.get("float"))

    def carried(self, state: Mapping[str, Windows]) -> dict[str, Windows]:
        """Return the states that later blocks read as well."""
        return {name: windows for name, windows in state.items() if name.startswith(_KEPT)}

    @torch.no_grad()
    def arrive(
        self, index: int, state: Mapping[str, Windows], ledger: Ledger
    ) -> dict[str, Windows]:
        """Return the hidden states that a block reads, which another stack may begin with."""
        second = self._parts.plan.architecture.second
        if second is None or index != second.first or not state:
            return dict(state)
        found = dict(state)
        with self._parts.open(ENTRY) as model:
            model.double()
            with KeepFloat64():
                for name in _VERIFIED:
                    found |= self._crossed(name, state, self._verified[None], ledger)
            model.float()
            found |= self._crossed("hidden", state, self._tokens, ledger)
            # What surrounds the blocks of the rounded network is rounded to its dtype.
            round_unquantized(model, self._parts.plan, ENTRY)
            for name in _ROUNDED:
                found |= self._crossed(name, state, self._tokens, ledger)
        return found

    def _crossed(
        self, name: str, state: Mapping[str, Windows], tokens: Tokens, ledger: Ledger
    ) -> dict[str, Windows]:
        second = self._parts.plan.architecture.second
        if second is None or name not in state:
            return {}
        given = state[name]
        shape, dtype = tuple(given.shape), given[0:1].dtype
        memory = ledger.windows(f"{_KEPT}{name}", shape, dtype)
        first = ledger.windows(f"first-{name}", shape, dtype)
        between = self._parts.model.get_submodule(second.norm)
        for k, window in enumerate(tokens):
            memory[k] = between(given[k : k + 1].to(self._parts.device))[0]
            first[k] = enter(self._parts, window, second.first)[0]
        return {f"{_KEPT}{name}": memory, name: first}
