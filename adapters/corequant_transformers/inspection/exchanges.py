"""Exchanging single layers between two models, and the effect on the layers' outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from corequant.diagnostics import mass_concentration
from corequant.errors import NonFiniteError
from corequant.quantization import fake_quantize
from corequant.rotation import block_hadamard
from corequant_torch.device.onednn import linear
from corequant_transformers.inspection.clipping import clipped_tokens, clipped_weights
from corequant_transformers.inspection.passes import Forward
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.surroundings import to_host

__all__ = ["Tally", "exchange", "float_forward"]


class Tally:
    """Sums over the tokens that reach a layer.

    Attributes
    ----------
    tokens : int
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._power = self._wrong = self._by_weight = self._by_input = 0.0
        self._weight_power = self._weight_wrong = self._weights = self._clipped_weights = 0.0
        self._clipped_inputs = 0.0
        self._deltas: list[Any] = []

    def add_weight(self, W: torch.Tensor, layer: Any) -> None:
        """Compare a layer's weight with the float one."""
        self._weight_power += _power(W)
        self._weight_wrong += _power(layer.weight - W)
        self._weights += W.numel()
        self._clipped_weights += W.numel() * clipped_weights(to_host(W), layer.quantized)

    def add(self, y: torch.Tensor, given: torch.Tensor) -> None:
        """Accumulate the outputs of the float layer and of the quantized one."""
        self.tokens += y.numel() // y.shape[-1]
        self._power += _power(y)
        self._wrong += _power(given - y)

    def add_parts(self, by_weight: torch.Tensor, by_input: torch.Tensor) -> None:
        """Accumulate output errors due to the weight alone and to the input alone."""
        self._by_weight += _power(by_weight)
        self._by_input += _power(by_input)

    def add_input(self, x: torch.Tensor, layer: QuantizedLinear) -> None:
        """Accumulate the input of a layer's activation quantizer."""
        tokens = to_host(x).reshape(-1, x.shape[-1])
        if not len(tokens):
            return
        self._deltas.append(mass_concentration(tokens))
        if layer.activations is not None:
            self._clipped_inputs += len(tokens) * clipped_tokens(tokens, layer.activations)

    @classmethod
    def of(cls, tallies: Iterable[Tally]) -> Tally:
        """Return the sums of several."""
        total = cls()
        for each in tallies:
            for name, value in vars(each).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    @property
    def output_error(self) -> float:
        """‖y' - y‖ / ‖y‖; 0 of a layer that no token reached."""
        return math.sqrt(_ratio(self._wrong, self._power))

    @property
    def weight_share(self) -> float:
        """Share of the weight in the squared errors of weight and input, each alone."""
        return _ratio(self._by_weight, self._by_weight + self._by_input, 1.0)

    @property
    def weight_error(self) -> float:
        """‖W' - W‖ / ‖W‖."""
        return math.sqrt(_ratio(self._weight_wrong, self._weight_power))

    @property
    def weights_clipped(self) -> float:
        """Share of weights that are clipped."""
        return _ratio(self._clipped_weights, self._weights)

    @property
    def activations_clipped(self) -> float:
        """Share of inputs that are clipped."""
        return _ratio(self._clipped_inputs, self.tokens)

    @property
    def concentration(self) -> float | None:
        """Median of δ."""
        return float(np.median(np.concatenate(self._deltas))) if self._deltas else None


def exchange(own: Any, reference: Any, path: str, tally: Tally) -> Forward:
    """Return a function that computes a layer of the reference as the quantized model does.

    Parameters
    ----------
    own, reference : transformers.PreTrainedModel
        The quantized model, and the float one, transformed. The latter's hooks rotate.
    path : str
        Path of the layer.
    tally : Tally
        Gets the weight now, and each input and output when it is called.
    """
    plain, layer = reference.get_submodule(path), own.get_submodule(path)
    W, bias = plain.weight.detach(), getattr(plain, "bias", None)
    tally.add_weight(W, layer)

    def look_up(ids: torch.Tensor) -> torch.Tensor:
        given: torch.Tensor = layer(ids)
        tally.add(type(plain).forward(plain, ids), given)
        return given

    def multiply(x: torch.Tensor) -> torch.Tensor:
        y, z = linear(x, W, bias), x
        tally.add_input(x, layer)
        if layer.activations is not None:
            try:
                z = fake_quantize(x, layer.activations)
            except NonFiniteError as error:
                name = f"the input of {path}"
                raise NonFiniteError(name, error.count, error.index, error.value) from None
        given = linear(z, layer.weight, layer.bias)
        by_weight = linear(x, layer.weight, layer.bias) - y
        by_input = torch.zeros_like(y) if z is x else linear(z, W, bias) - y
        tally.add(y, given)
        tally.add_parts(by_weight, by_input)
        return given

    return multiply if isinstance(layer, QuantizedLinear) else look_up


def float_forward(own: Any, reference: Any, path: str) -> Forward:
    """Return a function that computes a layer of the quantized model as the reference does.

    Parameters
    ----------
    own, reference, path
        As for ``exchange``.
    """
    plain, layer = reference.get_submodule(path), own.get_submodule(path)

    def look_up(ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = type(plain).forward(plain, ids)
        return found

    def multiply(x: torch.Tensor) -> torch.Tensor:
        if layer.rotation is not None:
            x = block_hadamard(x, layer.rotation)
        return linear(x, plain.weight, plain.bias)

    return multiply if isinstance(layer, QuantizedLinear) else look_up


def _power(x: torch.Tensor) -> float:
    return float(x.double().square().sum())


def _ratio(part: float, whole: float, empty: float = 0.0) -> float:
    return part / whole if whole else empty
