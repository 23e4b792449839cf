"""Products and causal attention of float32 CPU tensors by oneDNN, where it is faster than MKL.

torch multiplies float32 matrices by MKL, which leaves AVX-512 unused on some vendors' processors.
oneDNN, also a part of torch, uses it wherever it is available. Both accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from corequant.errors import ShapeError

__all__ = ["QuickForward", "attends_quickly", "causal_attention", "linear", "multiplies_quickly"]

Tensor = torch.Tensor

_ROWS = 256
"""Query positions whose scores are held at once: 2 MiB for 2048 keys."""

_STEP = 32
"""A layer's tokens are filled up to a multiple of this with zeros if they come in a matrix. oneDNN
keeps code for each number of rows, and experts get all numbers of tokens: that came to hundreds of
MiB."""

_LEAST_ROWS = 8
_LEAST_PRODUCTS = 1 << 21
"""Below these the overhead of a call exceeds what it saves."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` (..., out), like ``torch.nn.functional.linear``.

    Parameters
    ----------
    x : torch.Tensor (..., in)
    weight : torch.Tensor (out, in)
    bias : torch.Tensor (out,), optional

    Examples
    --------
    >>> import torch
    >>> from corequant_torch.device.onednn import linear
    >>> linear(torch.ones(2, 3), torch.eye(3)[:1])
    tensor([[1.],
            [1.]])
    """
    if multiplies_quickly(x, weight, bias):
        # Other layouts would take oneDNN's reference implementation, which is slow.
        given = (x.contiguous(), weight.contiguous(), bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(*given, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


def multiplies_quickly(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether ``linear`` uses oneDNN: for large float32 operands without gradients."""
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        return False
    rows = x.numel() // max(1, x.shape[-1])
    return (
        rows >= _LEAST_ROWS
        and rows * weight.numel() >= _LEAST_PRODUCTS
        and (bias is None or bias.shape == weight.shape[:1])
        and _is_plain(x, weight, bias)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _has_operator()
        and bool(torch.backends.mkldnn.enabled)
    )


def _is_plain(*tensors: Tensor | None) -> bool:
    """Return whether all are float32 CPU tensors without gradients."""
    given = [t for t in tensors if t is not None]
    return all(
        type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu and t.dtype == torch.float32
        for t in given
    ) and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))


@cache
def _has_operator() -> bool:
    """Return whether torch has oneDNN's product and the processor AVX-512."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    available: Any = torch.backends.mkldnn.is_available
    return bool(available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def attends_quickly(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether ``causal_attention`` applies and is faster than torch's.

    It needs one key per query, and a number of query heads divisible by the number of key heads.
    """
    return (
        _fit(query, key, value)
        and query.shape[2] >= 2 * _ROWS
        and _is_plain(value)
        and multiplies_quickly(query, key[0, 0])
    )


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if not all(t.ndim == 4 and t.numel() > 0 for t in (query, key, value)):
        return False
    batch, heads, length, width = query.shape
    return (
        key.shape[:3] == value.shape[:3]
        and key.shape[0] == batch
        and key.shape[2:] == (length, width)
        and heads % key.shape[1] == 0
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Return causal scaled dot-product attention (batch, heads, length, value width).

    Parameters
    ----------
    query : torch.Tensor (batch, heads, length, width)
    key : torch.Tensor (batch, key heads, length, width)
    value : torch.Tensor (batch, key heads, length, value width)
    scale : float, optional
        Factor of the scores; by default 1/√width.

    Raises
    ------
    ShapeError
        If the three shapes don't match, or one is empty.

    Notes
    -----
    Like ``torch.nn.functional.scaled_dot_product_attention`` with ``is_causal``, for as many keys
    as queries. Scores beyond a chunk's last position are not computed; a NaN in a chunk reaches all
    of its positions.

    Examples
    --------
    >>> import torch
    >>> from corequant_torch.device.onednn import causal_attention
    >>> x = torch.tensor([[[[1.0], [3.0]]]])
    >>> causal_attention(torch.zeros_like(x), x, x, None).flatten()
    tensor([1., 2.])
    """
    if not _fit(query, key, value):
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ShapeError(
            "query, key and value must be non-empty (batch, heads, length, width) of equal batch "
            f"and length, with query heads a multiple of key heads, got {shapes}"
        )
    batch, heads, length, width = query.shape
    shared = heads // key.shape[1]
    scale = width**-0.5 if scale is None else scale
    result = query.new_empty(batch, heads, length, value.shape[-1])
    later = query.new_full((_ROWS, _ROWS), -torch.inf).triu_(1)
    for b in range(batch):
        for group in range(key.shape[1]):
            keys, values = key[b, group].contiguous(), value[b, group].T.contiguous()
            for start in range(0, length, _ROWS):
                stop = min(start + _ROWS, length)
                known, seen = keys[:stop], values[:, :stop].contiguous()
                for head in range(group * shared, (group + 1) * shared):
                    scores = linear(query[b, head, start:stop] * scale, known)
                    scores[:, start:] += later[: stop - start, : stop - start]
                    result[b, head, start:stop] = linear(scores.softmax(-1), seen)
    return result


class QuickForward(TorchFunctionMode):
    """Replace linear layers and causal attention of any model where oneDNN is faster.

    Examples
    --------
    >>> import torch
    >>> from corequant_torch.device.onednn import QuickForward
    >>> layer = torch.nn.Linear(3, 1)
    >>> with QuickForward():
    ...     layer(torch.ones(2, 3)).shape
    torch.Size([2, 1])
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a torch function or its replacement."""
        instead: Callable[..., Any] = _INSTEAD.get(function, function)
        return instead(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    plain = is_causal and attn_mask is None and dropout_p == 0
    same = enable_gqa or query.shape[-3] == key.shape[-3]
    if plain and same and attends_quickly(query, key, value):
        return causal_attention(query, key, value, scale)
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    result: Tensor = attend(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return result


def _layer(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.ndim != 2 or not multiplies_quickly(input, weight, bias):
        return linear(input, weight, bias)
    tokens, width = input.shape
    filled = torch.cat([input, input.new_zeros(-tokens % _STEP, width)])
    return linear(filled, weight, bias)[:tokens]


_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.linear: _layer,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}
