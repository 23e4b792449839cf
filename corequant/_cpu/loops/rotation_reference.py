"""What a block rotation is, step by step, in NumPy.

The compiled kernels do the same operations in the same order and give the same bits. This path
runs where compilation is switched off (``NUMBA_DISABLE_JIT=1``).

Bit-exact twin: `corequant._cpu.codegen.generator`, `corequant_torch.device.rotation`,
`corequant_torch.gpu.rotation`.
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
    """Multiply axis 1 by the core: inputs in fours, two and two, then from left to right.

    Each four is added with its first input's sign taken out, as in ``cores.py``, so that sums that
    are zero have the same sign as there.
    """
    order = y.shape[1]
    matrix = hadamard_matrix(order)
    signs = (matrix.T if inverse else matrix).astype(y.dtype)
    a, b, c, d = (y[:, i::4] for i in range(4))
    mixed = np.empty_like(y)
    for k in range(order):
        s, t, u, v = (signs[i::4, k, None] for i in range(4))
        fours = s * ((a + s * t * b) + s * u * (c + u * v * d))
        total = fours[:, 0]
        for i in range(1, fours.shape[1]):
            total = total + fours[:, i]
        mixed[:, k] = total
    return mixed
