"""Statistics of the channels of NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.arrays import is_plain, name_of
from corequant._cpu.codegen.compiler import compiled_away
from corequant._cpu.codegen.moments import moments_kernel
from corequant._cpu.codegen.vectors import compute_dtype, lanes_of
from corequant._cpu.threads import for_rows
from corequant.protocols import Moments

__all__ = ["moments"]

Array = npt.NDArray[Any]


def moments(x: Array) -> Moments:
    """Return float64 sums of |x| and x² and the largest |x| of each channel of ``x`` (..., d)."""
    d = x.shape[-1]
    sums, squares, largest = (np.zeros(d) for _ in range(3))
    if not x.size:
        return sums, squares, largest
    plain = x if is_plain(x) else np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
    rows = plain.reshape(-1, d)
    name = name_of(x.dtype)
    lanes = lanes_of(name)
    vectors = 0 if compiled_away() else d // lanes
    if vectors:
        tops = np.zeros(d, compute_dtype(name))
        kernel = moments_kernel(name)
        starts = (sums.ctypes.data, squares.ctypes.data, tops.ctypes.data)
        source, size = rows.ctypes.data, rows.dtype.itemsize

        def work(first: int, last: int) -> None:
            at = first * lanes
            a, b, c = starts
            kernel(
                source + at * size,
                d * size,
                len(rows),
                last - first,
                a + at * 8,
                b + at * 8,
                c + at * tops.dtype.itemsize,
            )

        # Threads share out the channels: each adds its own in the order of the rows.
        for_rows(vectors, lanes * len(rows), work)
        largest[:] = tops
    rest = slice(vectors * lanes, None)
    if vectors * lanes < d:
        from corequant._cpu.loops.moments import channel_moments

        left = np.ascontiguousarray(rows[:, rest], dtype=compute_dtype(name))
        channel_moments(left, sums[rest], squares[rest], largest[rest])
    return sums, squares, largest
