"""Cost of a plan: additions and traffic at run time, bytes of the weights, block sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from corequant.hadamard import hadamard_factors, valid_block_sizes
from corequant.specs import ScaleFormat
from corequant_transformers.planning.matrix_plan import MatrixPlan

__all__ = ["cost_of"]


def cost_of(plan: Any) -> dict[str, Any]:
    """Return the cost of a ``ModelPlan``; see its method ``cost``."""
    rotations = [(plan.share(m), m) for m in plan.online]
    additions = sum(
        share * m.shape[1] * _additions_per_channel(m.input.rotation or 1) for share, m in rotations
    )
    # Each rotated channel is read and written once, in float16 as models run.
    traffic = sum(share * 2 * 2 * m.shape[1] for share, m in rotations)
    layers = [m for m in plan.quantized if m.role != "embedding"]
    products = sum(m.shape[0] * m.shape[1] for m in layers)
    used = sum(plan.share(m) * m.shape[0] * m.shape[1] for m in layers)
    stored = sum(_stored_bytes(m) for m in layers)
    return {
        "online_rotations": len(rotations),
        "online_additions_per_token": round(additions),
        "online_bytes_per_token": round(traffic),
        "online_share": additions / used,
        "quantized_mib": stored / 2**20,
        "float_mib": 4 * products / 2**20,
        "peak_mib": plan.peak_bytes() / 2**20,
        "block_sizes": _possible_block_sizes(plan),
    }


def _possible_block_sizes(plan: Any) -> list[int]:
    rotated = plan.mlp_outputs or plan.online
    if plan.recipe.rotation == "online":
        rotated = plan.online
    else:
        rotated = tuple(m for m in rotated if m.quantized) or rotated
    return list(valid_block_sizes(math.gcd(*(m.shape[1] for m in rotated)) or 1))


def _additions_per_channel(block_size: int) -> int:
    core, power = hadamard_factors(block_size)
    return power.bit_length() - 1 + (core if core > 1 else 0)


def _stored_bytes(matrix: MatrixPlan) -> float:
    """Return the bytes of a quantized matrix: codes, scales and zero points."""
    spec, (rows, columns) = matrix.weights, matrix.shape
    # A whole tensor's single scale is not worth a special case.
    groups = columns / (spec.group_size or columns)
    # NumPy has no bfloat16.
    own = spec.scale_format is ScaleFormat.BFLOAT16
    scale = 2 if own else np.dtype(spec.scale_format.dtype).itemsize
    zero_point = 0 if spec.symmetric else spec.format.bits / 8
    return rows * (columns * spec.format.bits / 8 + groups * (scale + zero_point))
