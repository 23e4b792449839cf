"""Weights of eight-bit floats with scales, as some models are published, decoded to float32.

A matrix's numbers are those of its float8 tensor times the scale of their block, of their row, or
of the whole matrix. Files call the scale ``weight_scale_inv`` although nothing is divided by it.

Source: DeepSeek-V3's inference/kernel.py (weight_dequant), Transformers' finegrained_fp8.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from corequant.errors import CheckpointError

__all__ = ["FLOAT8", "ScaledWeights", "block_of"]

FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""Names of the dtypes of such weights in safetensors files."""

_METHOD = "fp8"
_SCALES = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = ("activation_scale", "input_scale")
_MOST_BLOCK = 2**16


def block_of(settings: Any, where: Any) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; (0, 0) for whole rows or matrices.

    Parameters
    ----------
    settings
        ``quantization_config`` of a ``config.json``.
    where
        That file, for error messages.

    Returns
    -------
    tuple of int, or None
        None if the weights aren't float8 numbers with scales.

    Raises
    ------
    CheckpointError
        If the block isn't two positive integers.
    """
    if not isinstance(settings, dict) or settings.get("quant_method") != _METHOD:
        return None
    block = settings.get("weight_block_size")
    if block is None:
        return 0, 0
    plain = isinstance(block, list) and len(block) == 2
    if not plain or not all(type(n) is int and 0 < n <= _MOST_BLOCK for n in block):
        raise CheckpointError(
            f"weight_block_size of {where} must be two positive integers, got {str(block)[:40]}"
        )
    return block[0], block[1]


class ScaledWeights:
    """Which tensors of a file are scales, and of what.

    Parameters
    ----------
    block : tuple of int, optional
        As ``block_of`` returns it; None if weights are plain numbers.
    """

    def __init__(self, block: tuple[int, int] | None) -> None:
        self._block = block

    def scale_of(self, name: str, names: Collection[str]) -> str | None:
        """Return the name of a weight's scale; None without one.

        Parameters
        ----------
        name : str
            Name of a weight.
        names : collection of str
            Names of all tensors.
        """
        if self._block is None:
            return None
        return next((name + end for end in _SCALES if name + end in names), None)

    def is_scale(self, name: str, names: Collection[str]) -> bool:
        """Return whether a tensor is a weight's scale, or belongs to quantized activations."""
        if self._block is None:
            return False
        if name.rpartition(".")[2] in _OF_ACTIVATIONS:
            return True
        return any(name.endswith(end) and name.removesuffix(end) in names for end in _SCALES)

    def check(self, name: str, shape: tuple[int, ...], scale: tuple[int, ...]) -> None:
        """Raise CheckpointError unless a scale's shape is right for its weight."""
        rows, columns = self._block or (0, 0)
        if rows and len(shape) >= 2:
            wanted = [(*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))]
        else:
            wanted = [(), (1,), (1, 1), shape[:1], (*shape[:-1], 1)]
        if scale not in wanted:
            raise CheckpointError(
                f"the scale of {name} must have shape {wanted[-1]} for a weight of {shape}, got "
                f"{scale}"
            )

    def decode(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return a weight's numbers.

        Parameters
        ----------
        weight : torch.Tensor
            Weight of a float8 type.
        scale : torch.Tensor
            Scale of a shape that ``check`` accepts.

        Returns
        -------
        torch.Tensor of the weight's shape, float32
        """
        numbers, factors = weight.to(torch.float32), scale.to(torch.float32)
        rows, columns = self._block or (0, 0)
        if rows and numbers.ndim >= 2:
            factors = factors.repeat_interleave(rows, -2)[..., : numbers.shape[-2], :]
            factors = factors.repeat_interleave(columns, -1)[..., : numbers.shape[-1]]
        elif factors.numel() == 1:
            factors = factors.reshape(())
        elif factors.ndim == 1:
            factors = factors.reshape(-1, *[1] * (numbers.ndim - 1))
        return numbers * factors
