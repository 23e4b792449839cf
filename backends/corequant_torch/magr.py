"""MagR on tensors of any device."""

from __future__ import annotations

from typing import Any

import torch

from corequant._validation import check_divides, check_index
from corequant.protocols import Backend
from corequant.rounding.problem import check_damping
from corequant_torch.moments import check_hessian, check_matrix, largest_eigenvalue, working_dtype
from corequant_torch.tiles import excess_thresholds

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
    v: Tensor = W.to(dtype, copy=True)
    if sigma == 0 or strength == 0 or not W.numel():
        same: Tensor = v.to(W.dtype)
        return same
    gram, start = H.to(dtype) / sigma, v.clone()
    radius = strength * sigma / float(H.abs().sum(1, dtype=torch.float64).max())
    for _ in range(steps):
        moved = (v - (v - start) @ gram).reshape(-1, size)
        limits = excess_thresholds(moved.abs().double(), radius)[:, None].to(dtype)
        v = torch.minimum(torch.maximum(moved, -limits), limits).reshape(W.shape)
    smaller: Tensor = v.to(W.dtype)
    return smaller
