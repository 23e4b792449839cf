"""The NumPy backend: brings arrays into the form that the compiled loops want, and back."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._threads import for_rows, thread_count
from corequant.protocols import Moments
from corequant.specs import Granularity, QuantSpec, ScaleSearch

__all__ = ["NumpyBackend"]

Array = npt.NDArray[Any]

_SHRINKS = np.linspace(0.2, 1.0, 100)
"""Fractions of the full range that the MSE search tries; 0.2 suffices for INT2 on heavy tails."""


class NumpyBackend:
    """Kernels on NumPy arrays of any stride and byte order, float16, bfloat16, float32, float64."""

    name = "numpy"

    def describe(self) -> dict[str, str]:
        """Return versions and the number of threads."""
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
        axis: int,
        inverse: bool,
        signs: npt.NDArray[np.int8] | None,
        out: Array | None,
        threads: int | None,
    ) -> Array:
        """Rotate blocks of one axis; see ``corequant.block_hadamard``."""
        rotated: Array = _rotations().rotate(
            x, block_size, axis=axis, inverse=inverse, signs=signs, out=out, threads=threads
        )
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
    ) -> tuple[Array, Array, Array | None]:
        """Return codes, scales and zero points; see ``corequant.rotate_quantize``."""
        from corequant._rotate_quantize import rotate_quantize

        return rotate_quantize(self, x, block_size, spec, permutation, signs, out, threads)

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
    ) -> Array:
        """Return the codes' values; see ``corequant.rotate_fake_quantize``."""
        from corequant._rotate_quantize import rotate_fake_quantize

        return rotate_fake_quantize(self, x, block_size, spec, permutation, signs, out, threads)

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
        from corequant._statistics import moments

        return moments(x)

    def gram(self, x: Array) -> Array:
        """Return XᵀX (d, d) of the rows of ``x``."""
        rows = _rows(x)
        product: Array = np.matmul(rows.T, rows)
        return product

    def choose_qparams(self, x: Array, spec: QuantSpec) -> tuple[Array, Array | None]:
        """Return scales and zero points, shaped as ``qparams_shape`` says."""
        from corequant._numba.quantize import affine_parameters, search_shrink

        groups = _groups(x, spec)
        scales = np.ones(len(groups), groups.dtype)
        zeros = np.zeros(len(groups), groups.dtype)
        if groups.size:
            grid = _grid(spec, groups.dtype)
            search = spec.scale_search is ScaleSearch.MSE
            shrinks = (_SHRINKS.astype(groups.dtype),) if search else ()
            kernel = search_shrink if search else affine_parameters
            for_rows(
                len(groups),
                groups.shape[1] * (len(_SHRINKS) if search else 1),
                lambda first, last: kernel(first, last, groups, *grid, *shrinks, scales, zeros),
            )
        shape = qparams_shape(x.shape, spec)
        if spec.symmetric:
            return scales.reshape(shape), None
        return scales.reshape(shape), zeros.astype(np.int8).reshape(shape)

    def quantize(
        self, x: Array, spec: QuantSpec, scales: Array, zero_points: Array | None
    ) -> Array:
        """Return int8 codes of ``x``, in its shape."""
        from corequant._numba.quantize import encode

        groups = _groups(x, spec)
        codes = np.empty(groups.shape, np.int8)
        least, most = _grid(spec, groups.dtype)[:2]
        flat = _flat_qparams(scales, zero_points, groups.dtype)
        for_rows(
            len(groups),
            groups.shape[1],
            lambda first, last: encode(first, last, groups, least, most, *flat, codes),
        )
        return codes.reshape(x.shape)

    def dequantize(
        self, codes: Array, spec: QuantSpec, scales: Array, zero_points: Array | None
    ) -> Array:
        """Return ``(codes - zero_points) * scales`` in the dtype of the scales."""
        from corequant._numba.quantize import decode

        groups = np.ascontiguousarray(codes).reshape(_group_shape(codes.shape, spec))
        out = np.empty(groups.shape, scales.dtype)
        flat = _flat_qparams(scales, zero_points, scales.dtype)
        for_rows(
            len(groups),
            groups.shape[1],
            lambda first, last: decode(first, last, groups, *flat, out),
        )
        return out.reshape(codes.shape)

    def fake_quantize(self, x: Array, spec: QuantSpec) -> Array:
        """Return ``x`` rounded to the grid that it chooses for itself, in x's dtype."""
        from corequant._numba.quantize import fake

        groups = _groups(x, spec)
        if spec.scale_search is not ScaleSearch.ABSMAX or not groups.size:
            qparams = self.choose_qparams(x, spec)
            values = self.dequantize(self.quantize(x, spec, *qparams), spec, *qparams)
            return values.astype(x.dtype)
        out = np.empty_like(groups)
        grid = _grid(spec, groups.dtype)
        for_rows(
            len(groups), groups.shape[1], lambda first, last: fake(first, last, groups, *grid, out)
        )
        return out.reshape(x.shape).astype(x.dtype, copy=False)


def qparams_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    """Return the shape of the scales: one per group on the last axis, or one for the tensor."""
    if spec.granularity is Granularity.TENSOR:
        return (1,) * len(shape)
    if spec.granularity is Granularity.GROUP:
        assert spec.group_size is not None
        return (*shape[:-1], shape[-1] // spec.group_size)
    return (*shape[:-1], 1)


@cache
def _rotations() -> ModuleType:
    # Found once: an import statement takes a microsecond each time it is met.
    from corequant import _rotation

    return _rotation


def _group_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, int]:
    size = int(np.prod(shape))
    if spec.granularity is Granularity.TENSOR:
        return 1, size
    length = spec.group_size or shape[-1]
    return (size // length if length else int(np.prod(shape[:-1]))), length


def _groups(x: Array, spec: QuantSpec) -> Array:
    return _working(x).reshape(_group_shape(x.shape, spec))


def _working_dtype(x: Array) -> np.dtype[Any]:
    return np.dtype(np.float64 if x.dtype.itemsize == 8 else np.float32)


def _working(x: Array) -> Array:
    """Return x C-contiguous in native float32, or float64 for float64; a copy only if needed."""
    return np.ascontiguousarray(x, dtype=_working_dtype(x))


def _rows(x: Array) -> Array:
    return _working(x).reshape(-1, x.shape[-1]) if x.size else np.empty((0, x.shape[-1]))


def _direct(out: Array, dtype: np.dtype[Any]) -> bool:
    return bool(out.dtype == dtype and out.dtype.isnative and out.flags.c_contiguous)


def _grid(spec: QuantSpec, dtype: np.dtype[Any]) -> tuple[Any, Any, bool, Array]:
    tiny = np.array([np.finfo(dtype).smallest_subnormal], dtype)
    least, most = dtype.type(spec.format.minimum), dtype.type(spec.format.maximum)
    return least, most, spec.symmetric, tiny


def _flat_qparams(
    scales: Array, zero_points: Array | None, dtype: np.dtype[Any]
) -> tuple[Array, Array]:
    flat = np.ascontiguousarray(scales, dtype=dtype).reshape(-1)
    if zero_points is None:
        return flat, np.zeros_like(flat)
    return flat, np.ascontiguousarray(zero_points, dtype=dtype).reshape(-1)
