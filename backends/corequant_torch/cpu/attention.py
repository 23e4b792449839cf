"""Causal attention of float32 tensors on a CPU, as oneDNN's products."""

from __future__ import annotations

import torch

from corequant.errors import ShapeError
from corequant_torch.cpu.products import is_plain, linear, multiplies_quickly

__all__ = ["attends_quickly", "causal_attention"]

Tensor = torch.Tensor

_ROWS = 256
"""Positions whose scores are held at a time: 2 MiB for 2048 positions before them."""


def attends_quickly(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``causal_attention`` can take the place of torch's, and is faster.

    Keys are as many as queries, and heads of queries a multiple of those of keys and values.
    """
    return (
        _fit(query, key, value)
        and query.shape[2] >= 2 * _ROWS
        and is_plain(value)
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
    """Return what each position makes of the values up to its own (batch, heads, length, width).

    Parameters
    ----------
    query : torch.Tensor (batch, heads, length, width)
    key : torch.Tensor (batch, key heads, length, width)
    value : torch.Tensor (batch, key heads, length, value width)
    scale : float, optional
        Of the scores; by default 1/√width.

    Raises
    ------
    ShapeError
        If the three don't fit each other, or one is empty.

    Notes
    -----
    ``torch.nn.functional.scaled_dot_product_attention`` with ``is_causal``, for as many keys as
    queries. Scores after a chunk's last position are not computed; a NaN in a chunk reaches all of
    the chunk's positions.

    Examples
    --------
    >>> import torch
    >>> from corequant_torch.cpu.attention import causal_attention
    >>> x = torch.tensor([[[[1.0], [3.0]]]])
    >>> causal_attention(torch.zeros_like(x), x, x, None).flatten()
    tensor([1., 2.])
    """
    if not _fit(query, key, value):
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ShapeError(
            "query, key and value must be (batch, heads, length, width), none empty, as many keys "
            f"and values as queries, their heads a divisor of the queries', got {shapes}"
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
