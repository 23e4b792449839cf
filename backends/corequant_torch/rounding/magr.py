"""MagR on tensors of any device."""

from __future__ import annotations

from typing import Any

import torch

from corequant._validation import check_divides, check_index
from corequant.protocols import Backend
from corequant.rounding.problem import check_damping
from corequant_torch.rounding.bounds import excess_thresholds
from corequant_torch.rounding.hessian import (
    check_hessian,
    check_matrix,
    largest_eigenvalue,
    working_dtype,
)

__all__ = ["magr"]

Tensor = torch.Tensor


@torch.no_grad()
def magr(
    kernels: Backend,
    *,
    W: Any,
    H: Any,
    alpha: float,
    steps: int,
    group_size: int | None,
    name: str,
) -> Tensor:
    """Return weights of smaller range with nearly the same outputs; see ``corequant.magr``."""
    W = check_matrix(kernels, "W", W)
    H = check_hessian(kernels, H, W.shape[1], name)
    strength, steps = check_damping(alpha, "alpha"), check_index("steps", steps, 0)
    size = W.shape[1] if group_size is None else check_index("group_size", group_size)
    if W.numel():
        check_divides("group_size", size, W.shape[1])
    dtype = working_dtype(W, None)
    sigma = largest_eigenvalue(H)
    start: Tensor = W.to(dtype, copy=True)
    if sigma == 0 or strength == 0 or not W.numel():
        same: Tensor = start.to(W.dtype)
        return same
    gram = H.to(dtype) / sigma
    radius = strength * sigma / float(H.abs().sum(1, dtype=torch.float64).max())
    v, ahead = start, start
    pace = torch.ones(len(W), 1, dtype=torch.float64, device=W.device)
    for _ in range(steps):
        moved = (ahead - (ahead - start) @ gram).reshape(-1, size)
        limits = excess_thresholds(moved.abs().double(), radius)[:, None].to(dtype)
        clipped = torch.minimum(torch.maximum(moved, -limits), limits).reshape(W.shape)
        change = clipped - v
        uphill = ((ahead - clipped) * change).sum(1, keepdim=True, dtype=torch.float64) > 0
        pace = torch.where(uphill, 1.0, pace)
        following = (1 + torch.sqrt(1 + 4 * pace**2)) / 2
        momentum = (pace - 1) / following
        v, ahead, pace = clipped, clipped + momentum.to(dtype) * change, following
    smaller: Tensor = v.to(W.dtype)
    return smaller
