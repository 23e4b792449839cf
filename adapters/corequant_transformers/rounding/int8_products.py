"""Linear layers as products of codes: exact, and faster than in float with instructions for int8.

Calibration sends every window through layers whose inputs and weights are codes. What such a layer
gives is ``(codes - zero points) @ weight codesᵀ``, times one scale for each token and one for each
output. The sums are whole numbers that 32 bits hold, so their order changes nothing; the product of
the decoded numbers in float32 differs from it by its own rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from corequant.errors import NonFiniteError
from corequant.formats import FormatKind
from corequant.quantization import dequantize, fake_quantize, quantize
from corequant.specs import Granularity, QuantSpec
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.surroundings import check_finite

__all__ = ["CodeInput", "RoundedInputs", "input_codes", "linear_on_codes", "multiplies_codes"]


@dataclass(frozen=True, eq=False)
class CodeInput:
    """The input of a layer as integers.

    Attributes
    ----------
    steps : torch.Tensor (..., in_features), int8
        Codes without their zero points.
    scales : torch.Tensor
        One for each token, or one for all.
    """

    steps: torch.Tensor
    scales: torch.Tensor


class RoundedInputs:
    """Inputs of layers, rounded as at run time; always finite.

    Parameters
    ----------
    path : str
        Path of the decoder block, for error messages.
    specs : mapping of str to QuantSpec or None
        Quantizers by the layers' paths in the block; without one nothing is rounded.
    on_codes : container of str
        Layers that read codes.

    Attributes
    ----------
    codes : CodeInput
        The last rounded input of a layer that reads codes.
    """

    codes: CodeInput

    def __init__(
        self, path: str, specs: Mapping[str, QuantSpec | None], on_codes: Container[str] = ()
    ) -> None:
        self.path, self.specs, self.on_codes = path, specs, on_codes

    def __call__(
        self, name: str, x: torch.Tensor, window: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the layer ``name`` of the block is called with instead of ``x``, and values.

        The two are the same but where the layer reads codes: then it needs no values, and is given
        their shape only.

        Raises
        ------
        NonFiniteError
            If ``x`` holds NaN or infinity; names the layer and the window.
        """
        spec = self.specs.get(name)
        try:
            if spec is None:
                check_finite("x", x)
                return x, x
            if name in self.on_codes:
                rounded, self.codes = input_codes(x, spec)
                return rounded.new_empty(1).expand(rounded.shape), rounded
            simulated: torch.Tensor = fake_quantize(x, spec)
            return simulated, simulated
        except NonFiniteError as error:
            where = f"the input of {self.path}.{name} in calibration window {window}"
            raise NonFiniteError(where, error.count, error.index, error.value) from None


def multiplies_codes(
    weights: QuantSpec, activations: QuantSpec | None, device: torch.device
) -> bool:
    """Return whether layers with these quantizers multiply faster as codes than in float.

    Both must be integers that a signed byte holds without their zero points; weights symmetric with
    a scale for each output, activations with one for each token. The instructions are those that
    add to 32 bits at once (VNNI): older ones saturate at 16.
    """
    if activations is None or device.type != "cpu" or not _has_instructions():
        return False
    return (
        weights.symmetric
        and weights.granularity in (Granularity.CHANNEL, Granularity.TENSOR)
        and activations.granularity in (Granularity.TOKEN, Granularity.TENSOR)
        and _fits_byte(weights)
        and _fits_byte(activations)
    )


@cache
def _has_instructions() -> bool:
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return hasattr(torch, "_int_mm") and supported is not None and bool(supported())


def _fits_byte(spec: QuantSpec) -> bool:
    form = spec.format
    if form.kind is not FormatKind.INTEGER or form.fraction_bits:
        return False
    least, most = form.least_code, form.most_code
    if not spec.symmetric:
        # The zero point may be any of the codes.
        least, most = least - most, most - least
    return least >= -128 and most <= 127


def input_codes(x: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, CodeInput]:
    """Return a layer's input as rounded numbers, those of ``fake_quantize``, and as codes.

    Raises
    ------
    NonFiniteError
        If ``x`` holds NaN or infinity.
    """
    quantized = quantize(x, spec)
    steps = quantized.codes.view(torch.int8)
    if quantized.zero_points is not None:
        steps = steps - quantized.zero_points.view(torch.int8)
    values: torch.Tensor = dequantize(quantized)
    return values, CodeInput(steps, quantized.scales)


def linear_on_codes(layer: QuantizedLinear) -> Callable[[CodeInput], torch.Tensor]:
    """Return the function that gives a layer's output (..., out_features) for its input's codes.

    The layer's quantizers must be some for which ``multiplies_codes``.
    """
    codes = torch.from_numpy(layer.quantized.codes).view(torch.int8).t()
    scales = torch.from_numpy(layer.quantized.scales).reshape(-1).float()

    def multiply(x: CodeInput) -> torch.Tensor:
        sums = torch._int_mm(x.steps.reshape(-1, codes.shape[0]), codes)
        y = sums.view(*x.steps.shape[:-1], len(layer.weight)).float().mul_(x.scales).mul_(scales)
        return y if layer.bias is None else y.add_(layer.bias)

    return multiply
