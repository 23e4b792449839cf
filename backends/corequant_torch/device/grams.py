"""Gram matrices of tokens, XᵀX and XᵀY, on any device."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from corequant_torch.device.onednn import linear, multiplies_quickly
from corequant_torch.device.rotation import working

__all__ = ["token_products"]

Tensor = torch.Tensor

_PANEL = 256
"""Rows of a panel of XᵀX, which is computed from its diagonal on."""


def token_products(x: Tensor, other: Tensor | None, double: bool) -> Tensor:
    """Return XᵀY (d, d) of the rows of ``x`` and ``other`` (..., d), or XᵀX of ``x`` alone.

    Computed in float32, or float64 for float64 tensors or ``double``, even under autocast.
    """
    kind = x.device.type
    lowered = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if lowered else nullcontext():
        rows = _rows(x, double)
        return _square(rows) if other is None else linear(rows.T, _rows(other, double).T)


def _rows(x: Tensor, double: bool) -> Tensor:
    rows = working(x.detach()).reshape(-1, x.shape[-1])
    return rows.double() if double else rows


def _square(x: Tensor) -> Tensor:
    """Return XᵀX; the part below the diagonal panels is mirrored, not computed."""
    if not x.is_cpu:
        # One large product uses a GPU better than half as many operations in small ones.
        return x.T @ x
    d = x.shape[1]
    product = x.new_empty(d, d)
    turned = x.T
    if multiplies_quickly(turned[:_PANEL], turned):
        # Once, instead of in each of the products.
        turned = turned.contiguous()
    for start in range(0, d, _PANEL):
        stop = start + _PANEL
        product[start:stop, start:] = linear(turned[start:stop], turned[start:])
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product
