"""The NumPy backend: brings arrays into the form that the compiled loops want, and back."""

from __future__ import annotations

from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.threads import thread_count
from corequant._validation import working_dtype
from corequant.formats import NumberFormat
from corequant.protocols import Moments
from corequant.specs import QuantSpec

__all__ = ["NumpyBackend"]

Array = npt.NDArray[Any]


class NumpyBackend:
    """Kernels on NumPy arrays of any stride and byte order, float16, bfloat16, float32, float64."""

    name = "numpy"

    def describe(self) -> dict[str, str]:
        """Return versions and the number of threads."""
        import importlib.metadata

        packages = ("numpy", "numba", "scipy")
        versions = {p: importlib.metadata.version(p) for p in packages}
        return {**versions, "threads": str(thread_count())}

    def from_numpy(self, array: Array) -> Array:
        """Return the array itself."""
        return array

    def to_numpy(self, x: Array) -> Array:
        """Return the array itself."""
        return x

    def first_nonfinite(self, x: Array) -> tuple[int, tuple[int, ...], float] | None:
        """Return count, first index and value of NaN and Inf, or None without any."""
        good = np.isfinite(x)
        if good.all():
            return None
        index = np.unravel_index(int(np.argmin(good)), x.shape)
        count = good.size - int(np.count_nonzero(good))
        return count, tuple(int(i) for i in index), float(x[index])

    def block_hadamard(
        self,
        x: Array,
        block_size: int,
        *,
        axis: int,
        inverse: bool,
        signs: npt.NDArray[np.int8] | None,
        out: Array | None,
        threads: int | None,
    ) -> Array:
        """Rotate blocks of one axis; see ``corequant.block_hadamard``."""
        rotated: Array = _rotations().rotate(x, block_size, axis, inverse, signs, out, threads)
        return rotated

    def rotate_quantize(
        self,
        x: Array,
        block_size: int,
        spec: QuantSpec,
        *,
        permutation: npt.NDArray[np.int64] | None,
        signs: npt.NDArray[np.int8] | None,
        out: Array | None,
        threads: int | None,
    ) -> tuple[Array, Array, Array | None] | None:
        """Return codes, scales and zero points in one pass, or None where it can't."""
        from corequant._cpu.fusion import rotate_quantize

        return rotate_quantize(x, block_size, spec, permutation, signs, out, threads)

    def rotate_fake_quantize(
        self,
        x: Array,
        block_size: int,
        spec: QuantSpec,
        *,
        permutation: npt.NDArray[np.int64] | None,
        signs: npt.NDArray[np.int8] | None,
        out: Array | None,
        threads: int | None,
    ) -> Array | None:
        """Return the codes' values in one pass, or None where it can't."""
        from corequant._cpu.fusion import rotate_fake_quantize

        return rotate_fake_quantize(x, block_size, spec, permutation, signs, out, threads)

    def token_normalize(self, x: Array) -> Array:
        """Return rows scaled to mean square 1, in float32 or float64; rows of zeros stay."""
        rows = _working_rows(x)
        largest = np.abs(rows).max(-1, keepdims=True, initial=0)
        rows = rows / np.where(largest > 0, largest, 1)
        root = np.sqrt(np.square(rows).mean(-1, keepdims=True))
        np.divide(rows, root, out=rows, where=root > 0)
        return rows

    def moments(self, x: Array) -> Moments:
        """Return float64 sums of |x| and x² and the largest |x| of each channel (d,)."""
        from corequant._cpu.statistics import moments

        return moments(x)

    def add_gram(
        self, total: Array | None, x: Array, other: Array | None = None, *, double: bool = False
    ) -> Array:
        """Return ``total`` + XᵀY (d, d) of the rows of ``x`` and ``other``, or of ``x`` alone."""
        left, right = (_working_rows(a) for a in (x, x if other is None else other))
        if double:
            left, right = left.astype(np.float64), right.astype(np.float64)
        if other is None:
            # Of one matrix with itself BLAS does half the work.
            right = left
        with np.errstate(over="ignore", invalid="ignore"):
            product: Array = np.matmul(left.T, right)
        if total is None:
            return product
        total += product
        return total

    def encode(self, x: Array, form: NumberFormat) -> Array:
        """Return the codes nearest to ``x``, which is finite, without any scale."""
        from corequant._cpu import quantization

        return quantization.encode(x, form)

    def decode(self, codes: Array, form: NumberFormat) -> Array:
        """Return what codes stand for, float32."""
        bits = codes.view(np.uint8) if codes.dtype.itemsize == 1 else codes.astype(np.uint8)
        if form.bits < 8:
            bits = bits & np.uint8(2**form.bits - 1)
        values: Array = np.take(_float32_values(form), bits)
        return values

    def choose_global_scale(self, x: Array, spec: QuantSpec) -> Array:
        """Return the divisor of all scales of a tensor, float32 (1,)."""
        from corequant._cpu import quantization

        return quantization.choose_global_scale(x, spec)

    def choose_qparams(
        self, x: Array, spec: QuantSpec, global_scale: Array | None = None
    ) -> tuple[Array, Array | None]:
        """Return scales and zero points, shaped as ``qparams_shape`` says."""
        from corequant._cpu import quantization

        return quantization.choose_qparams(x, spec, global_scale)

    def quantize(
        self,
        x: Array,
        spec: QuantSpec,
        scales: Array | None = None,
        zero_points: Array | None = None,
        global_scale: Array | None = None,
    ) -> tuple[Array, Array, Array | None]:
        """Return codes in the shape of ``x``, scales and zero points."""
        from corequant._cpu import quantization

        return quantization.quantize(x, spec, scales, zero_points, global_scale)

    def dequantize(
        self,
        codes: Array,
        spec: QuantSpec,
        scales: Array,
        zero_points: Array | None = None,
        global_scale: Array | None = None,
    ) -> Array:
        """Return the numbers that codes stand for, in the dtype of the scales."""
        from corequant._cpu import quantization

        return quantization.dequantize(codes, spec, scales, zero_points, global_scale)

    def fake_quantize(
        self,
        x: Array,
        spec: QuantSpec,
        global_scale: Array | None = None,
        *,
        out: Array | None = None,
        propagate: bool = False,
    ) -> Array:
        """Return ``x`` rounded to the grid that it chooses for itself, in x's dtype."""
        from corequant._cpu import quantization

        return quantization.fake_quantize(x, spec, global_scale, out, propagate=propagate)


@cache
def _rotations() -> ModuleType:
    # Found once: an import statement takes a microsecond each time it is met.
    from corequant._cpu import rotation

    return rotation


def _working_rows(x: Array) -> Array:
    """Return the rows of ``x``, C-contiguous in its working dtype; a copy only if needed."""
    if not x.size:
        return np.empty((0, x.shape[-1]))
    return np.ascontiguousarray(x, dtype=working_dtype(x)).reshape(-1, x.shape[-1])


@lru_cache(maxsize=64)
def _float32_values(form: NumberFormat) -> Array:
    values: Array = form.values.astype(np.float32)
    return values
