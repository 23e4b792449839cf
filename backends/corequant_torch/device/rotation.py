"""Rotations and statistics as torch operations, for any device.

The butterflies and the core's sums run in NumPy's order.

Bit-exact twin: `corequant._cpu.loops.rotation_reference`, `corequant_torch.gpu.rotation`.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from corequant.hadamard import hadamard_factors, hadamard_matrix
from corequant_torch.device.tables import kept_table

__all__ = ["core_signs", "moments", "rotate", "token_normalize", "working"]

Tensor = torch.Tensor


def working(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or float64 for float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rotate(x: Tensor, block_size: int, axis: int, inverse: bool, signs: Tensor | None) -> Tensor:
    """Return ``x`` with blocks of ``axis`` rotated, in its dtype; ``signs`` on the same device."""
    y = working(x).movedim(axis, -1)
    shape = y.shape
    core, power = hadamard_factors(block_size)
    if signs is not None:
        signs = signs.to(y.dtype)
        if not inverse:
            y = y * signs
    y = y.reshape(-1, block_size)
    half = 1
    while half < power:
        pairs = y.reshape(len(y), -1, 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack([a + b, a - b], 2).reshape(len(y), block_size)
        half *= 2
    if core > 1:
        blocks = y.reshape(-1, core, power)
        y = _mix(blocks, inverse).reshape(-1, block_size)
    # Filled on the device: a copy from the host would synchronize.
    scale = torch.full((), 1 / math.sqrt(block_size), dtype=y.dtype, device=y.device)
    y = y.reshape(shape)
    y = y * (signs * scale if signs is not None and inverse else scale)
    return y.to(x.dtype).movedim(-1, axis).contiguous()


def core_signs(order: int, inverse: bool, device: torch.device) -> Tensor:
    """Return the signs by which a core's inputs are multiplied, int8 (order/4, 4, order).

    For each four of the core's rows, with the signs s, t, u and v, these are s, s·t, s·u and u·v:
    the sum of the four is s·((a + st·b) + su·(c + uv·d)), as in ``corequant._cpu.codegen.cores``,
    whose zeros have these signs.
    """
    return kept_table(("core's fours", order, inverse), device, partial(_fours, order, inverse))


def _fours(order: int, inverse: bool) -> npt.NDArray[np.int8]:
    matrix = hadamard_matrix(order)
    s, t, u, v = np.moveaxis((matrix.T if inverse else matrix).reshape(-1, 4, order), 1, 0)
    return np.stack([s, s * t, s * u, u * v], axis=1)


def _mix(y: Tensor, inverse: bool) -> Tensor:
    """Multiply axis 1 by the core, as ``corequant_torch.gpu.rotation.mix_cores``."""
    order = y.shape[1]
    signs = core_signs(order, inverse, y.device).to(y.dtype)
    mixed = torch.empty_like(y)
    a, b, c, d = y[:, 0::4], y[:, 1::4], y[:, 2::4], y[:, 3::4]
    for k in range(order):
        whole, second, right, fourth = signs[:, :, k, None].unbind(1)
        fours = whole * ((a + second * b) + right * (c + fourth * d))
        total = fours[:, 0]
        for i in range(1, order // 4):
            total = total + fours[:, i]
        mixed[:, k] = total
    return mixed


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return float64 sums of |x| and x² and the largest |x| of each channel (d,)."""
    rows = x.reshape(-1, x.shape[-1])
    if not len(rows):
        nothing = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
        return nothing, nothing.clone(), nothing.clone()
    size = rows.abs().double()
    return size.sum(0), size.square().sum(0), size.amax(0)


def token_normalize(x: Tensor) -> Tensor:
    """Return rows (tokens, d) scaled to mean square 1; zero rows are unchanged."""
    rows = working(x).reshape(-1, x.shape[-1])
    if not rows.numel():
        return rows
    largest = rows.abs().amax(-1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, torch.ones_like(largest))
    root = rows.square().mean(-1, keepdim=True).sqrt()
    return torch.where(root > 0, rows / root, rows)
