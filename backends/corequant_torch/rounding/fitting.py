"""Scales for the least error of outputs, on tensors of any device.

The method and its constants are those of ``corequant.rounding.fitting``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from corequant._validation import check_index
from corequant.protocols import Backend
from corequant.quantization import QuantizedTensor
from corequant.rounding.fitting import CHUNK, FACTORS, SWEEPS, check_fitted, leading_pairs
from corequant.specs import QuantSpec
from corequant_torch.rounding.hessian import check_hessian, check_matrix

__all__ = ["fit_scales"]

Tensor = torch.Tensor


@torch.no_grad()
def fit_scales(
    kernels: Backend, *, W: Any, H: Any, spec: QuantSpec | str, rank: int
) -> QuantizedTensor:
    """Round to nearest with scales chosen for the outputs; see ``corequant.fit_scales``."""
    spec = check_fitted(spec)
    W = check_matrix(kernels, "W", W)
    d = W.shape[1]
    H = check_hessian(kernels, H, d, "W")
    codes, scales, zeros = kernels.quantize(W, spec)
    if not W.numel():
        return QuantizedTensor(codes, scales, zeros, spec, None)
    U, diagonal = _leading(H, min(check_index("rank", rank), d))
    size = d if spec.group_size is None else spec.group_size
    factors = torch.from_numpy(FACTORS).to(W.device)
    fitted = scales.clone()
    rows = max(1, CHUNK // (len(FACTORS) * (d // size) * (U.shape[1] + 1)))
    for first in range(0, len(W), rows):
        part = slice(first, first + rows)
        own = None if zeros is None else zeros[part]
        squares, projected = _trials(kernels, W[part], spec, scales[part], own, U, diagonal, size)
        fitted[part] *= factors[_choose(squares, projected)].reshape(fitted[part].shape)
    codes, fitted, zeros = kernels.quantize(W, spec, fitted, zeros)
    return QuantizedTensor(codes, fitted, zeros, spec, None)


def _leading(H: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return eigenvectors scaled by roots of eigenvalues (d, rank), and what is left of diag(H)."""
    d, wide = len(H), H.double()
    wide = torch.ldexp(wide, -torch.frexp(wide.abs().max())[1])
    if rank < d:

        def product(block: Any) -> Any:
            there = torch.from_numpy(np.array(block)).to(H.device)
            return (wide @ there).cpu().numpy()

        found = leading_pairs(product, d, rank)
        values, vectors = (torch.from_numpy(a).to(H.device) for a in found)
    else:
        values, vectors = torch.linalg.eigh(wide)
    U = vectors * values.clamp(min=0).sqrt()
    rest = (wide.diagonal() - U.square().sum(1)).clamp(min=0)
    return U.float(), rest.float()


def _trials(
    kernels: Backend,
    W: Tensor,
    spec: QuantSpec,
    scales: Tensor,
    zeros: Tensor | None,
    U: Tensor,
    diagonal: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Return each factor's errors: on the diagonal (k, rows, n), along U (k, rows, n, rank)."""
    blocks, rows = len(U) // size, len(W)
    squares = U.new_empty(len(FACTORS), rows, blocks)
    projected = U.new_empty(len(FACTORS), rows, blocks, U.shape[1])
    directions = U.reshape(blocks, size, -1)
    exponent = torch.frexp(W.abs().max().double())[1]
    for k, factor in enumerate(FACTORS):
        codes, tried, _ = kernels.quantize(W, spec, scales * float(factor), zeros)
        E = torch.ldexp(kernels.dequantize(codes, spec, tried, zeros) - W, -exponent).float()
        squares[k] = (E.square() * diagonal).reshape(rows, blocks, size).sum(-1)
        split = E.reshape(rows, blocks, size).transpose(0, 1)
        projected[k] = (split @ directions).transpose(0, 1)
    return squares, projected


def _choose(squares: Tensor, projected: Tensor) -> Tensor:
    """Return the index of each group's factor (rows, n)."""
    _, rows, blocks = squares.shape
    chosen = torch.zeros((rows, blocks), dtype=torch.int64, device=squares.device)
    every = torch.arange(rows, device=squares.device)
    numbers = torch.arange(len(squares), device=squares.device)[:, None]
    total = projected[0].sum(1)
    for _ in range(SWEEPS if blocks > 1 else 1):
        for g in range(blocks):
            others = total - projected[chosen[:, g], every, g]
            outcomes = others + projected[:, :, g]
            loss = squares[:, :, g] + outcomes.square().sum(-1)
            # The first of equals; argmin may take any.
            best = torch.where(loss == loss.amin(0), numbers, len(squares))
            chosen[:, g] = best.amin(0)
            total = outcomes[chosen[:, g], every]
    return chosen
