"""Launch of the Triton kernels of rotations."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.hadamard import hadamard_factors, hadamard_matrix
from corequant_torch.device.tables import kept_table
from corequant_torch.gpu.runtime import interpreted, on_device

__all__ = [
    "KINDS",
    "LARGEST_TILE",
    "TILE",
    "core_signs",
    "mixing_tile",
    "power_of_two",
    "rotate",
    "turning_tile",
]

Tensor = torch.Tensor

KINDS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that the kernels read."""

TILE = 4096
"""Numbers that a program turns at least, if there are as many."""

LARGEST_TILE = 32768
"""Numbers that the registers of a program hold."""

_NUMBERS_PER_WARP = 512
"""16 in the registers of a thread: with 32 it takes up to all 255, so that few threads fit."""

_MOST_WARPS = 32


def power_of_two(n: int) -> int:
    """Return the smallest power of two from ``n`` on."""
    return 1 << max(0, n - 1).bit_length()


def _warps(numbers: int) -> int:
    return min(max(4, numbers // _NUMBERS_PER_WARP), _MOST_WARPS)


def turning_tile(power: int) -> tuple[dict[str, int], int]:
    """Return the constants of ``rotate_powers`` for blocks of a power of two, and its warps."""
    rows = max(1, TILE // power)
    return {"L": rows, "P": power}, _warps(rows * power)


def mixing_tile(core: int, power: int) -> tuple[dict[str, int], int]:
    """Return the constants of ``mix_cores`` for blocks of core · power, and its warps."""
    rows = power_of_two(core)
    columns = max(16, TILE // rows)
    constants = {"K": core, "L": rows, "P": power, "C": columns}
    return constants, _warps(rows * columns)


def core_signs(order: int, inverse: bool) -> npt.NDArray[np.int8]:
    """Return what ``mix_cores`` multiplies (order/4, 4, order): by fours of the core's rows.

    Of rows with the signs s, t, u and v these are s, s·t, s·u and u·v: the sum of the four is
    s·((a + st·b) + su·(c + uv·d)), as in ``corequant._cpu.codegen.cores``, whose zeros have these
    signs.
    """
    matrix = hadamard_matrix(order)
    s, t, u, v = np.moveaxis((matrix.T if inverse else matrix).reshape(-1, 4, order), 1, 0)
    return np.stack([s, s * t, s * u, u * v], axis=1)


_factors = lru_cache(maxsize=512)(hadamard_factors)


def rotate(
    x: Tensor, block_size: int, inverse: bool, signs: Tensor | None, out: Tensor | None
) -> Tensor | None:
    """Rotate blocks of the last axis, NumPy's bits; None where no kernel fits."""
    core, power = _factors(block_size)
    if power > LARGEST_TILE or x.dtype not in KINDS or not x.numel():
        return None
    source = x.contiguous()
    direct = out is not None and out.is_contiguous()
    target = out if out is not None and direct else torch.empty_like(source)
    scale, d = 1 / math.sqrt(block_size), int(x.shape[-1])
    if core == 1:
        _turn(source, target, power, d, scale, signs, inverse)
    else:
        # What the core reads of a block is all over it, so that the butterflies end first.
        turned = torch.empty_like(source, dtype=torch.float32)
        _turn(source, turned, power, d, 1.0, None if inverse else signs, False)
        _mix(turned, target, core, power, d, scale, inverse, signs if inverse else None)
    return target if out is None or direct else out.copy_(target)


def _turn(
    x: Tensor, out: Tensor, power: int, d: int, scale: float, signs: Tensor | None, after: bool
) -> None:
    from corequant_torch.gpu.rotation_kernels import rotate_powers

    constants, warps = turning_tile(power)
    blocks = x.numel() // power
    table = x if signs is None else signs
    arguments = (x, out, table, blocks, d // power, scale)
    where = 0 if signs is None else (2 if after else 1)
    _launch(rotate_powers, -(-blocks // constants["L"]), arguments, constants, where, warps)


def _mix(
    x: Tensor,
    out: Tensor,
    core: int,
    power: int,
    d: int,
    scale: float,
    inverse: bool,
    signs: Tensor | None,
) -> None:
    from corequant_torch.gpu.rotation_kernels import mix_cores

    constants, warps = mixing_tile(core, power)
    columns = x.numel() // core
    core_table = kept_table(
        ("core's fours", core, inverse), x.device, partial(core_signs, core, inverse)
    )
    table = x if signs is None else signs
    arguments = (x, out, table, core_table, columns, d // (core * power), scale)
    where = 0 if signs is None else 2
    _launch(mix_cores, -(-columns // constants["C"]), arguments, constants, where, warps)


def _launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: dict[str, int],
    signs: int,
    warps: int,
) -> None:
    # Warps by a table: an autotuner would run the kernel on the caller's memory to choose.
    with on_device(arguments[0]):
        kernel[(programs,)](
            *arguments,
            **constants,
            SIGNS=signs,
            INTERPRETED=interpreted(),
            num_warps=warps,
            enable_fp_fusion=False,
        )
