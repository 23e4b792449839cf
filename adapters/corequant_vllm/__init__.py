"""Plugin with which vLLM runs rotations on a CPU; vLLM finds ``register`` by its entry point.

vLLM reads ``transform_config``, but its rotations need CUDA kernels: on a CPU the first forward
pass ends in an error. Source: ``HadamardTransform`` of vLLM 0.32.

It is a package of its own that imports next to nothing: on a CPU vLLM 0.32 looks through all
modules that are loaded before its workers start, and stumbles over an object of llvmlite, which
compiled kernels need.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch

__all__ = ["register", "rotate"]

_MODULE = "vllm.model_executor.layers.quantization.compressed_tensors.transform.module"


def register() -> None:
    """Let vLLM rotate tensors on a CPU; on other devices everything stays as it is."""
    transform: Any = importlib.import_module(_MODULE).HadamardTransform
    if getattr(transform.forward, "corequant", False):
        return
    original = transform.forward

    @functools.wraps(original)
    def forward(self: Any, value: torch.Tensor, part_id: int = 0) -> torch.Tensor:
        if value.device.type != "cpu":
            result: torch.Tensor = original(self, value, part_id)
            return result
        return rotate(self, value, part_id)

    forward.corequant = True  # type: ignore[attr-defined]
    transform.forward = forward


def rotate(transform: Any, value: torch.Tensor, part_id: int = 0) -> torch.Tensor:
    """Return what vLLM's transform should: blocks of ``value`` (..., d) times the matrix.

    Parameters
    ----------
    transform : HadamardTransform
        vLLM's; its matrix is already divided by the root of its length.
    value : torch.Tensor (..., d)
    part_id : int
        Which of several fused layers is meant.
    """
    if part_id not in transform.weight.partitions:
        return value
    chosen = transform.transforms[part_id]
    if chosen.scheme.type == "hadamard":
        # By this name a file needs no matrix: readers know it, and it equals its transpose.
        matrix = _sylvester(chosen.scheme.head_dim or value.shape[-1])
    else:
        matrix = transform.weight.partitions[part_id].float()
        matrix = matrix.T if chosen.args.inverse else matrix
    blocks = value.float().reshape(*value.shape[:-1], -1, matrix.shape[0])
    return (blocks @ matrix).reshape(value.shape).to(value.dtype)


@functools.cache
def _sylvester(n: int) -> torch.Tensor:
    from corequant import hadamard_matrix

    return torch.from_numpy(hadamard_matrix(n).astype("float32")) / math.sqrt(n)
