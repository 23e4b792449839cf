"""Weights of a GGUF file, decoded a few tensors at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from corequant.errors import CheckpointError
from corequant.storage.gguf_file import GgufFile
from corequant_transformers.architectures.dimensions import dimensions_of
from corequant_transformers.architectures.known import architecture_of
from corequant_transformers.model.gguf_files.configs import dialect_in
from corequant_transformers.model.gguf_files.names import (
    ROPE_FREQUENCIES,
    norm_offset,
    row_order,
    translate,
)
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["GgufWeights"]


class GgufWeights:
    """The weights in a GGUF file, by their names in Transformers.

    Parameters
    ----------
    file : GgufFile
    model : transformers.PreTrainedModel
        A skeleton, before its head is untied from the embedding.
    plan : ModelPlan, optional
        Tells whether embedding and head share a matrix; by default the model does.

    Raises
    ------
    CheckpointError
        If the file lacks weights, has them in another shape, or holds tensors that the model has no
        place for.
    """

    def __init__(self, file: GgufFile, model: Any, plan: ModelPlan | None = None) -> None:
        self._file = file
        self._dialect = dialect_in(file)
        self._architecture = architecture_of(model.config)
        self._sizes = dimensions_of(model.config)
        state = model.state_dict()
        a = self._architecture
        tied = self._sizes.tied if plan is None else plan.dimensions.tied
        self.shared: dict[str, str] = {}
        """Parameters that the file doesn't hold, by the tied ones whose numbers they have."""
        if tied and "output.weight" not in file.tensors:
            self.shared[f"{a.head}.weight"] = f"{a.embedding}.weight"
        own = [key for key in state if key not in self.shared]
        self._names = self._find(own)
        linear = (a.query, a.key, a.value, a.attention_output, a.gate, a.up, a.down)
        ends = tuple(f".{name}.weight" for name in linear) if a.transposed else ()
        self._transposed = {key for key in own if key.endswith(ends)} if ends else set()
        self._check(state, own)

    def _find(self, own: list[str]) -> dict[str, list[str]]:
        """Return the tensors that each parameter is made of: gate and up of experts are one."""
        e = self._architecture.experts
        fused = {} if e is None else {e.fused_gate_up: ("gate", "up"), e.fused_down: ("down",)}
        found, plain = {}, []
        for key in own:
            path, _, last = key.rpartition(".")
            if e is not None and last in fused and path.endswith(e.path):
                block = next(part for part in path.split(".") if part.isdigit())
                found[key] = [f"blk.{block}.ffn_{part}_exps.weight" for part in fused[last]]
            else:
                plain.append(key)
        names = translate(self._dialect, plain, self._sizes.blocks)
        return found | {key: [name] for key, name in names.items()}

    def _check(self, state: dict[str, Any], own: list[str]) -> None:
        path, names, tensors = self._file.path, self._names, self._file.tensors
        missing = sorted(name for key in own for name in names[key] if name not in tensors)
        if missing:
            raise CheckpointError(f"{path} lacks {len(missing)} weights, the first is {missing[0]}")
        for key in own:
            wanted, shapes = tuple(state[key].shape), [tensors[n].shape for n in names[key]]
            wanted = wanted[::-1] if key in self._transposed else wanted
            shape = shapes[0]
            if len(shapes) > 1 and shapes[0] == shapes[1] and len(shape) == 3:
                shape = (shape[0], 2 * shape[1], shape[2])
            if shape != wanted:
                raise CheckpointError(
                    f"{names[key][0]} of {path} must have shape {wanted}, got {shape}"
                )
        known = {name for parts in names.values() for name in parts}
        strangers = sorted(set(tensors) - known - {ROPE_FREQUENCIES})
        if strangers:
            raise CheckpointError(
                f"{path} holds {len(strangers)} tensors that llama.cpp's {self._dialect.name!r} "
                f"as it is read has no place for, the first is {strangers[0]}"
            )

    def fill(self, model: Any, keys: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
        """Set the parameters of these names in the modules of ``model``."""
        for key in keys:
            tensor = torch.from_numpy(self._read(self.shared.get(key, key))).to(dtype)
            path, _, name = key.rpartition(".")
            module = model.get_submodule(path)
            if name in module._buffers:
                module._buffers[name] = tensor
            else:
                module._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)

    def has_experts(self, key: str) -> bool:
        """Return whether ``expert`` reads a parameter of several experts."""
        return key in self._names and key not in self._transposed

    def expert(self, key: str, index: int) -> torch.Tensor:
        """Return the part of one expert of a parameter, in float32.

        Parameters
        ----------
        key : str
            For which ``has_experts`` is true.
        index : int
        """
        parts = [self._file.read(name, slice(index, index + 1))[0] for name in self._names[key]]
        return torch.from_numpy(np.concatenate(parts))

    def _read(self, key: str) -> Any:
        parts = [self._file.read(name) for name in self._names[key]]
        numbers = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        order = row_order(self._dialect, self._architecture, self._sizes, key.rpartition(".")[0])
        if order is not None:
            numbers = numbers[np.argsort(order)]
        numbers = numbers.T if key in self._transposed else numbers
        offset = norm_offset(self._architecture, key)
        return np.ascontiguousarray(numbers - np.float32(offset) if offset else numbers)
