"""Kernels for CPU tensors: NumPy's, on the same memory, and the conversion to its arrays and back.

NumPy lacks bfloat16 and float8: these are passed as integers and viewed as ml_dtypes, without a
copy in either direction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from corequant._dispatch import get_backend
from corequant.errors import BackendError
from corequant.formats import NumberFormat
from corequant.protocols import Moments
from corequant.quantization import QuantizedTensor
from corequant.specs import QuantSpec
from corequant_torch.device.grams import token_products

__all__ = ["CpuKernels", "to_numpy", "to_torch"]

Signs = npt.NDArray[np.int8] | None
Permutation = npt.NDArray[np.int64] | None

Array = npt.NDArray[Any]


class View(NamedTuple):
    """The dtypes by which a dtype that NumPy lacks is converted."""

    bits: torch.dtype
    plain: np.dtype[Any]
    array: np.dtype[Any]


def _view(bits: torch.dtype, plain: Any, array: Any) -> View:
    return View(bits, np.dtype(plain), np.dtype(array))


VIEWS: dict[torch.dtype, View] = {
    torch.bfloat16: _view(torch.int16, np.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: _view(torch.uint8, np.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e4m3fnuz: _view(torch.uint8, np.uint8, ml_dtypes.float8_e4m3fnuz),
    torch.float8_e5m2: _view(torch.uint8, np.uint8, ml_dtypes.float8_e5m2),
    torch.float8_e5m2fnuz: _view(torch.uint8, np.uint8, ml_dtypes.float8_e5m2fnuz),
    torch.float8_e8m0fnu: _view(torch.uint8, np.uint8, ml_dtypes.float8_e8m0fnu),
}
_BACK = {view.array: (view.plain, tensor) for tensor, view in VIEWS.items()}


def to_numpy(x: torch.Tensor) -> Array:
    """Return an array on a CPU tensor's memory; BackendError if it has none that is dense.

    Examples
    --------
    >>> import torch
    >>> from corequant_torch.kernels.cpu import to_numpy
    >>> to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype.name
    'bfloat16'
    """
    if not x.is_cpu:
        raise BackendError(
            f"the tensor must be on the CPU, got {x.device}; move it yourself with .cpu(), tensors "
            "are never copied silently"
        )
    if x.requires_grad:
        x = x.detach()
    view = VIEWS.get(x.dtype)
    try:
        array: Array = x.numpy() if view is None else x.view(view.bits).numpy().view(view.array)
    except (RuntimeError, TypeError) as error:
        raise BackendError(
            f"the tensor must be dense and in ordinary memory, got layout {x.layout} "
            f"and dtype {x.dtype} ({error})"
        ) from None
    return array


def to_torch(array: Array) -> torch.Tensor:
    """Return a tensor on an array's memory.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from corequant_torch.kernels.cpu import to_torch
    >>> to_torch(np.ones(2, ml_dtypes.bfloat16))
    tensor([1., 1.], dtype=torch.bfloat16)
    """
    view = _BACK.get(array.dtype)
    if view is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(view[0])).view(view[1])


def to_numpy_or_none(x: torch.Tensor | None) -> Array | None:
    """Return ``to_numpy(x)``, or None for None."""
    return None if x is None else to_numpy(x)


def to_torch_or_none(array: Array | None) -> torch.Tensor | None:
    """Return ``to_torch(array)``, or None for None."""
    return None if array is None else to_torch(array)


class CpuKernels:
    """The NumPy backend's kernels on the memory of CPU tensors, and torch's matrix products."""

    name = "torch"

    def __init__(self) -> None:
        self._numpy = get_backend("numpy")
        self._rotate = self._numpy.block_hadamard

    def describe(self) -> dict[str, str]:
        """Return the NumPy backend's description."""
        return self._numpy.describe()

    def first_nonfinite(self, x: torch.Tensor) -> tuple[int, tuple[int, ...], float] | None:
        """Return the count of NaN and Inf in ``x``, the first index and its value, or None."""
        return self._numpy.first_nonfinite(to_numpy(x))

    def block_hadamard(
        self,
        x: torch.Tensor,
        block_size: int,
        *,
        axis: int,
        inverse: bool,
        signs: Signs,
        out: torch.Tensor | None,
        threads: int | None,
    ) -> torch.Tensor:
        """Rotate blocks of one axis."""
        array = to_numpy(x)
        target = array if out is x else to_numpy_or_none(out)
        rotated = self._rotate(
            array, block_size, axis=axis, inverse=inverse, signs=signs, out=target, threads=threads
        )
        return to_torch(rotated) if out is None else out

    def rotate_quantize(
        self,
        x: torch.Tensor,
        block_size: int,
        spec: QuantSpec,
        *,
        permutation: Permutation,
        signs: Signs,
        out: torch.Tensor | None,
        threads: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """Return codes, scales and zero points; None without a fused kernel."""
        array, target = to_numpy(x), to_numpy_or_none(out)
        fused = self._numpy.rotate_quantize(
            array,
            block_size,
            spec,
            permutation=permutation,
            signs=signs,
            out=target,
            threads=threads,
        )
        if fused is None:
            return None
        codes, scales, zeros = fused[:3]
        written = to_torch(codes) if out is None else out
        return written, to_torch(scales), to_torch_or_none(zeros)

    def rotate_fake_quantize(
        self,
        x: torch.Tensor,
        block_size: int,
        spec: QuantSpec,
        *,
        permutation: Permutation,
        signs: Signs,
        out: torch.Tensor | None,
        threads: int | None,
    ) -> torch.Tensor | None:
        """Return the dequantized codes; None without a fused kernel."""
        array, target = to_numpy(x), to_numpy_or_none(out)
        values = self._numpy.rotate_fake_quantize(
            array,
            block_size,
            spec,
            permutation=permutation,
            signs=signs,
            out=target,
            threads=threads,
        )
        if values is None:
            return None
        return to_torch(values) if out is None else out

    def token_normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows scaled to mean square 1; zero rows are unchanged."""
        return to_torch(self._numpy.token_normalize(to_numpy(x)))

    def moments(self, x: torch.Tensor) -> Moments:
        """Return float64 sums of |x| and x² and the largest |x| of each channel (d,)."""
        return self._numpy.moments(to_numpy(x))

    def add_gram(
        self,
        total: Any,
        x: torch.Tensor,
        other: torch.Tensor | None = None,
        *,
        double: bool = False,
    ) -> npt.NDArray[Any]:
        """Return ``total`` + XᵀY (d, d) of the rows of ``x`` and ``other``, or of ``x`` alone."""
        for tensor in (x, other):
            # Raises unless its memory is dense and on the CPU.
            to_numpy_or_none(tensor)
        # By torch's threads: NumPy's would keep spinning while the model computes the next x.
        product = to_numpy(token_products(x, other, double))
        if total is None:
            return product
        summed = to_numpy(total.cpu()) if isinstance(total, torch.Tensor) else total
        with np.errstate(over="ignore", invalid="ignore"):
            summed += product
        return summed

    def encode(self, x: torch.Tensor, form: NumberFormat) -> torch.Tensor:
        """Return the codes nearest to a finite ``x``, unscaled."""
        return to_torch(self._numpy.encode(to_numpy(x), form))

    def decode(self, codes: torch.Tensor, form: NumberFormat) -> torch.Tensor:
        """Return the values of codes, unscaled, float32."""
        return to_torch(self._numpy.decode(to_numpy(codes), form))

    def choose_global_scale(self, x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        """Return the global scale, by which all scales are divided, float32 (1,)."""
        return to_torch(self._numpy.choose_global_scale(to_numpy(x), spec))

    def choose_qparams(
        self, x: torch.Tensor, spec: QuantSpec, global_scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scales and zero points in the shape of ``spec``."""
        divisor = to_numpy_or_none(global_scale)
        scales, zeros = self._numpy.choose_qparams(to_numpy(x), spec, divisor)
        return to_torch(scales), to_torch_or_none(zeros)

    def quantize(
        self,
        x: torch.Tensor,
        spec: QuantSpec,
        scales: torch.Tensor | None = None,
        zero_points: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the codes of ``x``, scales and zero points."""
        given = (to_numpy_or_none(t) for t in (scales, zero_points, global_scale))
        codes, chosen, zeros = self._numpy.quantize(to_numpy(x), spec, *given)
        if scales is not None:
            return to_torch(codes), scales, to_torch_or_none(zeros)
        return to_torch(codes), to_torch(chosen), to_torch_or_none(zeros)

    def dequantize(
        self,
        codes: torch.Tensor,
        spec: QuantSpec,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the values of codes, in the dtype of the scales."""
        given = (to_numpy_or_none(t) for t in (zero_points, global_scale))
        return to_torch(self._numpy.dequantize(to_numpy(codes), spec, to_numpy(scales), *given))

    def fake_quantize(
        self,
        x: torch.Tensor,
        spec: QuantSpec,
        global_scale: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
        propagate: bool = False,
    ) -> torch.Tensor:
        """Return ``x`` quantized and dequantized with scales chosen from it, in its dtype."""
        array = to_numpy(x)
        target = array if out is x else to_numpy_or_none(out)
        rounded = self._numpy.fake_quantize(
            array, spec, to_numpy_or_none(global_scale), out=target, propagate=propagate
        )
        return to_torch(rounded) if out is None else out

    def round_columns(self, method: str, **arguments: Any) -> Any:
        """Return the result of NumPy's solver of that name, as tensors."""
        from corequant import rounding

        given = {name: _as_numpy(value) for name, value in arguments.items()}
        result = getattr(rounding, method)(**given)
        if isinstance(result, np.ndarray):
            return to_torch(result)
        if not isinstance(result, QuantizedTensor):
            return result
        codes, scales, zeros, divisor = (to_torch_or_none(a) for a in _arrays(result))
        q = QuantizedTensor(codes, scales, zeros, result.spec, divisor)
        if isinstance(result, rounding.RoundedTensor):
            return rounding.RoundedTensor.of(q, result.report)
        return q


def _arrays(q: QuantizedTensor) -> tuple[Any, ...]:
    return q.codes, q.scales, q.zero_points, q.global_scale


def _as_numpy(value: Any) -> Any:
    """Return the equivalent argument of a NumPy function."""
    if isinstance(value, torch.Tensor):
        return to_numpy(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, QuantizedTensor):
        codes, scales, zeros, divisor = (to_numpy_or_none(t) for t in _arrays(value))
        return QuantizedTensor(codes, scales, zeros, value.spec, divisor)
    return value
