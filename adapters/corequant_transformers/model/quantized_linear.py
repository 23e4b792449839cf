"""The layer that a quantized model is made of."""

from __future__ import annotations

from typing import Any

import torch

from corequant.errors import NonFiniteError
from corequant.quantization import QuantizedTensor, fake_quantize
from corequant.rotation import block_hadamard
from corequant.specs import QuantSpec
from corequant_torch.cpu.onednn import linear
from corequant_transformers.model.quantized_weight import QuantizedWeight
from corequant_transformers.planning.matrix_plan import MatrixPlan

__all__ = ["QuantizedLinear"]


class QuantizedLinear(QuantizedWeight):
    """A linear layer on codes: rotate the input, round it, multiply by the decoded weight.

    Arithmetic is simulated: codes are decoded once and multiplied in float.

    Parameters
    ----------
    quantized : QuantizedTensor
        The weight (out_features, in_features), NumPy arrays.
    bias : torch.Tensor (out_features,), optional
    rotation : int, optional
        Block length of the run-time rotation of the input.
    activations : QuantSpec, optional
        Quantizer of the input; None leaves it in float.
    name : str
        Path of the module, for error messages.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        quantized: QuantizedTensor,
        bias: torch.Tensor | None,
        rotation: int | None,
        activations: QuantSpec | None,
        name: str,
    ) -> None:
        super().__init__(quantized, name)
        self.rotation = rotation
        self.activations = activations
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", bias)
        self.decode()

    @classmethod
    def of(
        cls, matrix: MatrixPlan, quantized: QuantizedTensor, bias: torch.Tensor | None
    ) -> QuantizedLinear:
        """Return the layer for a matrix of a plan."""
        rotation = matrix.input.rotation if matrix.online else None
        return cls(quantized, bias, rotation, matrix.activations, matrix.name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output (..., out_features) for ``x`` (..., in_features)."""
        if self.rotation is not None:
            x = block_hadamard(x, self.rotation)
        if self.activations is not None:
            try:
                x = fake_quantize(x, self.activations)
            except NonFiniteError as error:
                name = f"the input of {self.name}"
                raise NonFiniteError(name, error.count, error.index, error.value) from None
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        parts: list[Any] = [self.quantized.shape, self.quantized.spec, f"input={self.activations}"]
        if self.rotation is not None:
            parts.append(f"rotation={self.rotation}")
        return ", ".join(map(str, parts))
