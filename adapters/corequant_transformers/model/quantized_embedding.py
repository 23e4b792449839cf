"""The embedding of a quantized model, where it is quantized."""

from __future__ import annotations

import copy
from typing import Any

import torch

from corequant.quantization import QuantizedTensor
from corequant_transformers.model.quantized_linear import QuantizedWeight

__all__ = ["QuantizedEmbedding", "without_rows"]


class QuantizedEmbedding(QuantizedWeight):
    """An embedding whose rows are codes.

    Parameters
    ----------
    quantized : QuantizedTensor
        The rows (vocabulary, hidden), NumPy arrays.
    table : torch.nn.Module
        The float embedding, which may do more than look rows up, such as scale them. It is left as
        it is.
    name : str
        Path of the module, for error messages.
    """

    def __init__(self, quantized: QuantizedTensor, table: Any, name: str) -> None:
        super().__init__(quantized, name)
        self.table = without_rows(table)
        self.decode()

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The decoded rows (vocabulary, hidden)."""
        rows: torch.Tensor = self.table.weight
        return rows

    def decode(self, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Decode the rows from codes and scales."""
        self.table.weight = self.decoded(device, dtype)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return what the embedding gives for token ids (...): (..., hidden)."""
        found: torch.Tensor = self.table(input_ids)
        return found

    def extra_repr(self) -> str:
        """Describe the embedding in one line."""
        return f"{self.quantized.shape}, {self.quantized.spec}"


def without_rows(table: Any) -> Any:
    """Return a copy of an embedding whose rows, None so far, are a buffer that isn't stored."""
    own: Any = copy.copy(table)
    # A shallow copy has the dictionaries of its original.
    own._parameters = {k: p for k, p in table._parameters.items() if k != "weight"}
    own._buffers = dict(table._buffers)
    own._non_persistent_buffers_set = set(table._non_persistent_buffers_set)
    own.register_buffer("weight", None, persistent=False)
    return own
