"""The layers of a quantized model: what all have in common, and the linear one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from corequant.errors import CheckpointError, NonFiniteError, SpecError
from corequant.quantization import QuantizedTensor, dequantize, fake_quantize
from corequant.rotation import block_hadamard
from corequant.specs import QuantSpec
from corequant.storage.arrays import from_arrays, to_arrays
from corequant_torch.device.onednn import linear
from corequant_transformers.planning.matrix_plan import MatrixPlan

__all__ = ["QuantizedLinear", "QuantizedWeight"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class QuantizedWeight(torch.nn.Module):
    """A module whose weight is decoded once, from arrays that no cast changes.

    A module that was cast and is cast back decodes them again. A state dict holds what is stored of
    them, under the names that files have. Subclasses have a buffer ``weight``.

    Parameters
    ----------
    quantized : QuantizedTensor
        The weight (rows, columns), NumPy arrays.
    name : str
        Path of the module, for error messages.
    """

    weight: torch.Tensor

    def __init__(self, quantized: QuantizedTensor, name: str) -> None:
        super().__init__()
        self.quantized = quantized
        self.name = name

    def decode(self, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Decode the weight from codes and scales."""
        self.weight = self.decoded(device, dtype)

    def decoded(self, device: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of codes and scales."""
        return torch.from_numpy(dequantize(self.quantized)).to(device, dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = self.weight.dtype
        # Of a tensor without elements, so that a refusal comes before any change.
        after = fn(self.weight.new_empty(0)).dtype
        if after not in _DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
            raise SpecError(f"{self.name} must compute in one of {names}, got {after}")
        result: Any = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if after != before != torch.float32 and not self.weight.is_meta:
            self.decode(self.weight.device, after)
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, array in self._stored().items():
            destination[prefix + name] = torch.tensor(array)

    def _stored(self) -> dict[str, Any]:
        arrays = to_arrays(self.name, self.quantized)
        return {key.removeprefix(f"{self.name}."): array for key, array in arrays.items()}

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        names = list(self._stored())
        found = {n: state_dict.pop(prefix + n) for n in names if prefix + n in state_dict}
        if found:
            arrays = {f"{self.name}.{n}": _array(f"{prefix}{n}", t) for n, t in found.items()}
            rows, columns = self.quantized.shape
            self.quantized = from_arrays(self.name, arrays, self.quantized.spec, (rows, columns))
            self.decode(self.weight.device, self.weight.dtype)
        elif strict:
            lists[0].extend(prefix + name for name in names)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)


def _array(name: str, tensor: torch.Tensor) -> Any:
    try:
        return tensor.detach().cpu().numpy().copy()
    except TypeError:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"the tensor {name} must hold codes or scales, got {kind}") from None


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
