"""The choice of kernels by a tensor's device, and checks of devices and memory."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from corequant._validation import check_places
from corequant.errors import BackendError
from corequant_torch.kernels.cpu import CpuKernels

if TYPE_CHECKING:
    from corequant_torch.kernels.device import DeviceKernels

__all__ = ["check_apart", "check_devices", "engine_for", "is_plain_call"]


# Private names, in 2.9 to 2.13; torch.autograd.Function and torch.utils use them too.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active


_cpu = CpuKernels()


@cache
def _device() -> DeviceKernels:
    from corequant_torch.kernels.device import DeviceKernels

    return DeviceKernels()


def engine_for(x: torch.Tensor) -> CpuKernels | DeviceKernels:
    """Return the kernels for the device of ``x``; BackendError for tensors without data."""
    if x.is_cpu:
        return _cpu
    if x.is_meta:
        raise BackendError("the tensor must hold data, got one on device meta")
    if x.layout is not torch.strided:
        raise BackendError(f"the tensor must be dense, got layout {x.layout}")
    return _device()


def check_devices(x: torch.Tensor, own: str, /, **others: torch.Tensor | None) -> None:
    """Raise BackendError unless all tensors are on the device of ``x``, an argument ``own``."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise BackendError(
                f"all tensors must be on one device, got {own} on {x.device} and {name} on "
                f"{other.device}; move one yourself, tensors are never copied silently"
            )


def check_apart(x: torch.Tensor, out: torch.Tensor) -> None:
    """Raise ValueError unless ``out`` is ``x`` or their memory is disjoint.

    Entries of ``out`` must not overlap either. Tensors that interleave without sharing an entry
    count as overlapping.
    """
    if out.layout is torch.strided and not out.is_contiguous():
        check_places(tuple(out.shape), out.stride())
    if out is x:
        return
    start, other = x.data_ptr(), out.data_ptr()
    if start == other and out.stride() == x.stride() and out.dtype == x.dtype:
        return
    if x.is_contiguous() and out.is_contiguous():
        size = x.nbytes
        if start + size <= other or other + size <= start:
            return
    a, b = _extent(x), _extent(out)
    if x.device == out.device and a[0] < b[1] and b[0] < a[1]:
        raise ValueError("out must be x itself or share no memory with it, got an overlap")


def _extent(x: torch.Tensor) -> tuple[int, int]:
    if not x.numel():
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def is_plain_call(x: torch.Tensor) -> bool:
    """Return whether nothing records, traces or transforms the call, so that kernels may run.

    An operator would add tens of microseconds to each call.
    """
    kind = type(x)
    return not (
        (x.requires_grad and torch.is_grad_enabled())
        or (kind is not torch.Tensor and kind is not torch.nn.Parameter)
        or _dispatch_modes()
        or _transforms()
    )
