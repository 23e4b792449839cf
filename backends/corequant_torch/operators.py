"""Custom operators in ``torch.ops.corequant``: gradients, fake tensors and batching rules.

Autograd, ``torch.compile`` and ``torch.func`` see each call as one operator. The rotation is
orthogonal: its gradient is its inverse. Rounding has the straight-through gradient, that of the
identity (Bengio et al., arXiv 1308.3432); codes and scales have none.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.fusion import rotate_fake_quantize as rotate_and_round
from corequant.fusion import rotate_quantize as rotate_to_codes
from corequant.rotation import check_block_size
from corequant.specs import Granularity, QuantSpec, qparams_shape
from corequant_torch.kernels.engines import engine_for

__all__ = ["block_hadamard", "fake_quantize", "rotate_fake_quantize", "rotate_quantize"]

Tensor = torch.Tensor


@lru_cache(maxsize=256)
def _spec(text: str) -> QuantSpec:
    return QuantSpec.parse(text)


def _host(x: Tensor | None) -> npt.NDArray[Any] | None:
    return None if x is None else x.detach().cpu().numpy()


@torch.library.custom_op(
    "corequant::block_hadamard",
    mutates_args=(),
    schema="(Tensor x, int block_size, int axis, bool inverse, Tensor? signs) -> Tensor",
)
def block_hadamard(
    x: Tensor, block_size: int, axis: int, inverse: bool, signs: Tensor | None
) -> Tensor:
    """Rotate blocks along a non-negative axis; ``signs`` is int8 (d,)."""
    check_block_size("block_size", block_size, x.shape[axis])
    return engine_for(x).block_hadamard(
        x, block_size, axis=axis, inverse=inverse, signs=_host(signs), out=None, threads=None
    )


@block_hadamard.register_fake
def _(x: Tensor, block_size: int, axis: int, inverse: bool, signs: Tensor | None) -> Tensor:
    check_block_size("block_size", block_size, int(x.shape[axis]))
    return x.new_empty(x.shape)


def _keep_rotation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.block_size, ctx.axis, ctx.inverse, ctx.signs = inputs


def _undo_rotation(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    back = torch.ops.corequant.block_hadamard(
        grad, ctx.block_size, ctx.axis, not ctx.inverse, ctx.signs
    )
    return back, None, None, None, None


block_hadamard.register_autograd(_undo_rotation, setup_context=_keep_rotation)


@block_hadamard.register_vmap
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    block_size: int,
    axis: int,
    inverse: bool,
    signs: Tensor | None,
) -> tuple[Tensor, int]:
    if in_dims[0] is None or in_dims[4] is not None:
        raise NotImplementedError("vmap of corequant::block_hadamard must map x and not signs")
    first = x.movedim(in_dims[0], 0)
    return torch.ops.corequant.block_hadamard(first, block_size, axis + 1, inverse, signs), 0


@torch.library.custom_op(
    "corequant::fake_quantize",
    mutates_args=(),
    schema="(Tensor x, str spec, Tensor? global_scale, bool propagate) -> Tensor",
)
def fake_quantize(x: Tensor, spec: str, global_scale: Tensor | None, propagate: bool) -> Tensor:
    """Quantize and dequantize ``x`` with scales chosen from it."""
    return engine_for(x).fake_quantize(x.detach(), _spec(spec), global_scale, propagate=propagate)


@fake_quantize.register_fake
def _(x: Tensor, spec: str, global_scale: Tensor | None, propagate: bool) -> Tensor:
    return x.new_empty(x.shape)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, None, None, None


fake_quantize.register_autograd(_straight_through)


@torch.library.custom_op(
    "corequant::rotate_fake_quantize",
    mutates_args=(),
    schema=("(Tensor x, int block_size, str spec, Tensor? permutation, Tensor? signs) -> Tensor"),
)
def rotate_fake_quantize(
    x: Tensor, block_size: int, spec: str, permutation: Tensor | None, signs: Tensor | None
) -> Tensor:
    """Permute, sign and rotate ``x``, then quantize and dequantize it."""
    rounded: Tensor = rotate_and_round(
        x.detach(), block_size, _spec(spec), permutation=_host(permutation), signs=_host(signs)
    )
    return rounded


@rotate_fake_quantize.register_fake
def _(
    x: Tensor, block_size: int, spec: str, permutation: Tensor | None, signs: Tensor | None
) -> Tensor:
    check_block_size("block_size", block_size, int(x.shape[-1]))
    return x.new_empty(x.shape)


def _keep_steps(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.block_size, _, ctx.permutation, ctx.signs = inputs


def _undo_steps(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    axis = grad.ndim - 1
    back = torch.ops.corequant.block_hadamard(grad, ctx.block_size, axis, True, ctx.signs)
    if ctx.permutation is not None:
        order = torch.argsort(ctx.permutation.to(grad.device))
        back = back.index_select(-1, order)
    return back, None, None, None, None


rotate_fake_quantize.register_autograd(_undo_steps, setup_context=_keep_steps)


@torch.library.custom_op(
    "corequant::rotate_quantize",
    mutates_args=(),
    schema=(
        "(Tensor x, int block_size, str spec, Tensor? permutation, Tensor? signs) -> "
        "(Tensor, Tensor, Tensor, Tensor)"
    ),
)
def rotate_quantize(
    x: Tensor, block_size: int, spec: str, permutation: Tensor | None, signs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, scales, zero points and the global scale; absent ones are empty tensors."""
    q = rotate_to_codes(
        x.detach(), block_size, _spec(spec), permutation=_host(permutation), signs=_host(signs)
    )
    zeros = q.codes.new_empty(0) if q.zero_points is None else q.zero_points
    divisor = q.scales.new_empty(0, dtype=torch.float32)
    return q.codes, q.scales, zeros, divisor if q.global_scale is None else q.global_scale


@rotate_quantize.register_fake
def _(
    x: Tensor, block_size: int, spec: str, permutation: Tensor | None, signs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_block_size("block_size", block_size, int(x.shape[-1]))
    parsed = _spec(spec)
    kind = torch.int8 if parsed.format.code_dtype == np.int8 else torch.uint8
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = qparams_shape(tuple(x.shape), parsed)
    whole = parsed.granularity is Granularity.TENSOR_GROUP
    return (
        x.new_empty(x.shape, dtype=kind),
        x.new_empty(shape, dtype=real),
        x.new_empty(0 if parsed.symmetric else shape, dtype=kind),
        x.new_empty(1 if whole else 0, dtype=torch.float32),
    )


def _no_gradient(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return None, None, None, None, None


def _mark_codes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


rotate_quantize.register_autograd(_no_gradient, setup_context=_mark_codes)
