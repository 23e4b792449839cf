"""The torch backend: CPU tensors are handed to the NumPy kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant._dispatch import get_backend
from corequant.errors import BackendError
from corequant.formats import NumberFormat
from corequant.protocols import Moments
from corequant.specs import QuantSpec

__all__ = ["TorchBackend"]


class TorchBackend:
    """Kernels on torch tensors on the CPU; results are tensors, without gradients."""

    name = "torch"

    def __init__(self) -> None:
        self._numpy = get_backend("numpy")

    def describe(self) -> dict[str, str]:
        """Return torch's version and the devices that it sees."""
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {"torch": torch.__version__, "devices": ", ".join(["cpu", *gpus])}

    def first_nonfinite(self, x: torch.Tensor) -> tuple[int, tuple[int, ...], float] | None:
        """Return count, first index and value of NaN and Inf, or None without any."""
        return self._numpy.first_nonfinite(_to_numpy(x))

    def block_hadamard(
        self,
        x: torch.Tensor,
        block_size: int,
        *,
        inverse: bool,
        signs: npt.NDArray[np.int8] | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """Rotate blocks of the last axis; see ``corequant.block_hadamard``."""
        rotated = self._numpy.block_hadamard(
            _to_numpy(x), block_size, inverse=inverse, signs=signs, out=None
        )
        result = _to_torch(rotated, x.dtype)
        return result if out is None else out.copy_(result)

    def token_normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows scaled to mean square 1; rows of zeros stay."""
        return torch.from_numpy(self._numpy.token_normalize(_to_numpy(x)))

    def moments(self, x: torch.Tensor) -> Moments:
        """Return float64 sums of |x| and x² and the largest |x| of each channel (d,)."""
        return self._numpy.moments(_to_numpy(x))

    def gram(self, x: torch.Tensor) -> npt.NDArray[Any]:
        """Return XᵀX (d, d) of the rows of ``x``."""
        return self._numpy.gram(_to_numpy(x))

    def encode(self, x: torch.Tensor, form: NumberFormat) -> torch.Tensor:
        """Return the codes nearest to ``x``, which is finite, without any scale."""
        return torch.from_numpy(self._numpy.encode(_to_numpy(x), form))

    def decode(self, codes: torch.Tensor, form: NumberFormat) -> torch.Tensor:
        """Return what codes stand for, float32."""
        return torch.from_numpy(self._numpy.decode(_to_numpy(codes), form))

    def choose_global_scale(self, x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        """Return the divisor of all scales of a tensor, float32 (1,)."""
        return torch.from_numpy(self._numpy.choose_global_scale(_to_numpy(x), spec))

    def choose_qparams(
        self, x: torch.Tensor, spec: QuantSpec, global_scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scales and zero points, shaped as ``spec`` asks."""
        scales, zeros = self._numpy.choose_qparams(
            _to_numpy(x), spec, _to_numpy_or_none(global_scale)
        )
        return torch.from_numpy(scales), None if zeros is None else torch.from_numpy(zeros)

    def quantize(
        self,
        x: torch.Tensor,
        spec: QuantSpec,
        scales: torch.Tensor | None = None,
        zero_points: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return codes of ``x``, scales and zero points."""
        given = (_to_numpy_or_none(t) for t in (scales, zero_points, global_scale))
        codes, chosen, zeros = self._numpy.quantize(_to_numpy(x), spec, *given)
        return (
            torch.from_numpy(codes),
            torch.from_numpy(chosen) if scales is None else scales,
            zero_points if scales is not None or zeros is None else torch.from_numpy(zeros),
        )

    def dequantize(
        self,
        codes: torch.Tensor,
        spec: QuantSpec,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what codes stand for, in the dtype of the scales."""
        given = (_to_numpy_or_none(t) for t in (zero_points, global_scale))
        return torch.from_numpy(
            self._numpy.dequantize(_to_numpy(codes), spec, _to_numpy(scales), *given)
        )

    def fake_quantize(
        self,
        x: torch.Tensor,
        spec: QuantSpec,
        global_scale: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
        propagate: bool = False,
    ) -> torch.Tensor:
        """Return ``x`` rounded to the grid that it chooses for itself, in x's dtype."""
        rounded = self._numpy.fake_quantize(
            _to_numpy(x), spec, _to_numpy_or_none(global_scale), propagate=propagate
        )
        result = _to_torch(rounded, x.dtype)
        return result if out is None else out.copy_(result)


def _to_numpy(x: torch.Tensor) -> npt.NDArray[Any]:
    if x.device.type != "cpu":
        raise BackendError(
            f"tensors must be on the CPU for this version of the torch backend, got {x.device}; "
            "move them yourself with .cpu(), nothing is copied between devices silently"
        )
    x = x.detach()
    # NumPy has no bfloat16; every bfloat16 is a float32.
    array: npt.NDArray[Any] = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return array


def _to_numpy_or_none(x: torch.Tensor | None) -> npt.NDArray[Any] | None:
    return None if x is None else _to_numpy(x)


def _to_torch(array: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(array).to(dtype)
