"""Products of float32 matrices on a CPU by oneDNN, where torch's own are slower.

torch multiplies float32 matrices by MKL, which leaves AVX-512 unused on some vendors' processors.
oneDNN, which torch has too, asks only what instructions there are. Both add in float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

__all__ = ["is_plain", "linear", "multiplies_quickly"]

Tensor = torch.Tensor

_LEAST_ROWS = 8
_LEAST_PRODUCTS = 1 << 21
"""Below these the call itself takes longer than what it saves."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` (..., out), as ``torch.nn.functional.linear`` does.

    Parameters
    ----------
    x : torch.Tensor (..., in)
    weight : torch.Tensor (out, in)
    bias : torch.Tensor (out,), optional

    Examples
    --------
    >>> import torch
    >>> from corequant_torch.cpu.products import linear
    >>> linear(torch.ones(2, 3), torch.eye(3)[:1])
    tensor([[1.],
            [1.]])
    """
    if multiplies_quickly(x, weight, bias):
        # Other layouts than these would go through a reference implementation, which is slow.
        given = (x.contiguous(), weight.contiguous(), bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(*given, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


def multiplies_quickly(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether ``linear`` is oneDNN's: of plain float32 numbers, without gradients, and worth it."""
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        return False
    rows = x.numel() // max(1, x.shape[-1])
    return (
        rows >= _LEAST_ROWS
        and rows * weight.numel() >= _LEAST_PRODUCTS
        and (bias is None or bias.shape == weight.shape[:1])
        and is_plain(x, weight, bias)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _has_operator()
        and bool(torch.backends.mkldnn.enabled)
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all are float32 numbers in memory of which nobody wants a gradient."""
    given = [t for t in tensors if t is not None]
    return all(
        type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu and t.dtype == torch.float32
        for t in given
    ) and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))


@cache
def _has_operator() -> bool:
    """Whether this torch has oneDNN's product, and the processor the wider instructions."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    available: Any = torch.backends.mkldnn.is_available
    return bool(available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
