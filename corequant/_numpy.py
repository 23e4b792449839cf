"""The NumPy backend: brings arrays into the form that the compiled loops want, and back."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._threads import for_rows, thread_count
from corequant.formats import NumberFormat
from corequant.hadamard import hadamard_factors, hadamard_matrix
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
        inverse: bool,
        signs: npt.NDArray[np.int8] | None,
        out: Array | None,
    ) -> Array:
        """Rotate blocks of the last axis; see ``corequant.block_hadamard``."""
        from corequant._numba.hadamard import rotate_blocks

        result = np.empty(x.shape, x.dtype) if out is None else out
        if x.size == 0:
            return result
        rows = _rows(x)
        target = result.reshape(rows.shape) if _direct(result, rows.dtype) else np.empty_like(rows)
        core, power = _core(block_size, rows.dtype.name, inverse)
        one = np.ones(x.shape[-1], rows.dtype)
        sign = one if signs is None else signs.astype(rows.dtype)
        before, after = (one, sign) if inverse else (sign, one)
        scale = rows.dtype.type(1 / np.sqrt(block_size))
        for_rows(
            len(rows),
            rows.shape[1],
            lambda first, last: rotate_blocks(
                first, last, rows, target, core, power, scale, before, after
            ),
        )
        if not np.shares_memory(target, result):
            result[...] = target.reshape(x.shape)
        return result

    def token_normalize(self, x: Array) -> Array:
        """Return rows scaled to mean square 1, in float32 or float64; rows of zeros stay."""
        rows = _rows(x)
        largest = np.abs(rows).max(-1, keepdims=True, initial=0)
        rows = rows / np.where(largest > 0, largest, 1)
        root = np.sqrt(np.square(rows).mean(-1, keepdims=True))
        np.divide(rows, root, out=rows, where=root > 0)
        return rows

    def moments(self, x: Array) -> Moments:
        """Return float64 sums of |x| and x² and the largest |x| of each channel (d,)."""
        from corequant._numba.statistics import channel_moments

        sums = tuple(np.zeros(x.shape[-1]) for _ in range(3))
        channel_moments(_rows(x), *sums)
        return sums  # type: ignore[return-value]

    def gram(self, x: Array) -> Array:
        """Return XᵀX (d, d) of the rows of ``x``."""
        rows = _rows(x)
        product: Array = np.matmul(rows.T, rows)
        return product

    def encode(self, x: Array, form: NumberFormat) -> Array:
        """Return the codes nearest to ``x``, which is finite, without any scale."""
        from corequant import _quantize_numpy

        return _quantize_numpy.encode(x, form)

    def decode(self, codes: Array, form: NumberFormat) -> Array:
        """Return what codes stand for, float32."""
        bits = codes.view(np.uint8) if codes.dtype.itemsize == 1 else codes.astype(np.uint8)
        if form.bits < 8:
            bits = bits & np.uint8(2**form.bits - 1)
        values: Array = np.take(_float32_values(form), bits)
        return values

    def choose_global_scale(self, x: Array, spec: QuantSpec) -> Array:
        """Return the divisor of all scales of a tensor, float32 (1,)."""
        from corequant import _quantize_numpy

        return _quantize_numpy.choose_global_scale(x, spec)

    def choose_qparams(
        self, x: Array, spec: QuantSpec, global_scale: Array | None = None
    ) -> tuple[Array, Array | None]:
        """Return scales and zero points, shaped as ``qparams_shape`` says."""
        from corequant import _quantize_numpy

        return _quantize_numpy.choose_qparams(x, spec, global_scale)

    def quantize(
        self,
        x: Array,
        spec: QuantSpec,
        scales: Array | None = None,
        zero_points: Array | None = None,
        global_scale: Array | None = None,
    ) -> tuple[Array, Array, Array | None]:
        """Return codes in the shape of ``x``, scales and zero points."""
        from corequant import _quantize_numpy

        return _quantize_numpy.quantize(x, spec, scales, zero_points, global_scale)

    def dequantize(
        self,
        codes: Array,
        spec: QuantSpec,
        scales: Array,
        zero_points: Array | None = None,
        global_scale: Array | None = None,
    ) -> Array:
        """Return the numbers that codes stand for, in the dtype of the scales."""
        from corequant import _quantize_numpy

        return _quantize_numpy.dequantize(codes, spec, scales, zero_points, global_scale)

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
        from corequant import _quantize_numpy

        return _quantize_numpy.fake_quantize(x, spec, global_scale, out, propagate=propagate)


def _working_dtype(x: Array) -> np.dtype[Any]:
    return np.dtype(np.float64 if x.dtype.itemsize == 8 else np.float32)


def _working(x: Array) -> Array:
    """Return x C-contiguous in native float32, or float64 for float64; a copy only if needed."""
    return np.ascontiguousarray(x, dtype=_working_dtype(x))


def _rows(x: Array) -> Array:
    return _working(x).reshape(-1, x.shape[-1]) if x.size else np.empty((0, x.shape[-1]))


def _direct(out: Array, dtype: np.dtype[Any]) -> bool:
    return bool(out.dtype == dtype and out.dtype.isnative and out.flags.c_contiguous)


@lru_cache(maxsize=64)
def _float32_values(form: NumberFormat) -> Array:
    values: Array = form.values.astype(np.float32)
    return values


@lru_cache(maxsize=64)
def _core(order: int, dtype: str, inverse: bool) -> tuple[Array, int]:
    core_order, power = hadamard_factors(order)
    core = hadamard_matrix(core_order)
    # Sylvester's factor is symmetric, so only the core has to be transposed.
    return np.ascontiguousarray(core.T if inverse else core, dtype=dtype), power
