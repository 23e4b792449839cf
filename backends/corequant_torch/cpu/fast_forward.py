"""A context in which torch's linear layers and causal attention run by oneDNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from corequant_torch.cpu.onednn import attends_quickly, causal_attention, linear

__all__ = ["QuickForward"]

Tensor = torch.Tensor


class QuickForward(TorchFunctionMode):
    """Replace linear layers and causal attention of any model where oneDNN is faster.

    Examples
    --------
    >>> import torch
    >>> from corequant_torch.cpu.fast_forward import QuickForward
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


_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.linear: linear,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}
