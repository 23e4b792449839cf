"""What a block rotation is, step by step, in NumPy.

The compiled kernels do the same operations in the same order and give the same bits. This path
runs where compilation is switched off (``NUMBA_DISABLE_JIT=1``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.hadamard import hadamard_factors, hadamard_matrix

__all__ = ["rotate_blocks"]

Array = npt.NDArray[Any]


def rotate_blocks(blocks: Array, inverse: bool, scale: Array) -> Array:
    """Multiply ``blocks`` (n, b), float32 or float64, by H or its transpose, then by ``scale``."""
    core, power = hadamard_factors(blocks.shape[1])
    y = blocks
    half = 1
    while half < power:
        pairs = y.reshape(len(y), -1, 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = np.stack([a + b, a - b], axis=2).reshape(blocks.shape)
        half *= 2
    if core > 1:
        y = _mix(y.reshape(len(y), core, power), inverse).reshape(blocks.shape)
    result: Array = y * scale
    return result


def _mix(y: Array, inverse: bool) -> Array:
    """Multiply axis 1 by the core: inputs in fours, two and two, then from left to right."""
    matrix = hadamard_matrix(y.shape[1])
    signs = (matrix.T if inverse else matrix).astype(y.dtype)
    mixed = np.empty_like(y)
    for k in range(y.shape[1]):
        # As the kernels do it: of two numbers or sums the first as it is, then both negated.
        sign = signs[:, k, None]
        pairs = y[:, 0::2] + y[:, 1::2] * (sign[0::2] * sign[1::2])
        sign = sign[0::2]
        fours = (pairs[:, 0::2] + pairs[:, 1::2] * (sign[0::2] * sign[1::2])) * sign[0::2]
        total = fours[:, 0]
        for i in range(1, fours.shape[1]):
            total = total + fours[:, i]
        mixed[:, k] = total
    return mixed
