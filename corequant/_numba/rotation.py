"""Kernels of rotations: one for each plan, made when it is first asked for."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import resources
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from corequant._numba.generator import Body
from corequant._numba.machine import build
from corequant._numba.plans import Plan

__all__ = ["edition", "kernel_for", "settings", "sign_bits"]

_WORD = ir.IntType(64)
_WORDS = struct.Struct("8qd")


@lru_cache(maxsize=512)
def kernel_for(plan: Plan) -> Callable[[int, int, bytes], None]:
    """Return the kernel of a plan. It takes the addresses of source and result, and settings."""
    return build(
        f"rotate {edition()} {plan}", "iis", lambda builder, given: _emit(builder, plan, given)
    )


def settings(
    units: int,
    scale: float,
    scratch: int,
    *,
    steps: tuple[int, int] = (0, 0),
    signs: tuple[int, int, int] = (0, 0, 0),
) -> bytes:
    """Put together what a kernel needs besides the arrays; one argument costs less than nine.

    Parameters
    ----------
    units : int
        How many units of the plan to rotate.
    scale : float
        Factor of the result.
    scratch : int
        Address of the plan's bytes of scratch.
    steps : tuple of int
        Bytes from row to row of source and result, for a rotation down columns.
    signs : tuple of int
        Address of ``sign_bits``, how many there are, and the first to be used; for columns the
        address of the rows' factors.
    """
    return _WORDS.pack(units, *steps, *signs, scratch, 0, scale)


def sign_bits(plan: Plan, signs: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Put signs into bits, 1 for a negative one, in the order that the plan's kernel reads them in.

    Bits take a 32nd of the place of factors, which would push the array out of the cache.
    """
    negative = signs < 0
    if plan.split:
        lanes = plan.lanes // 2 if plan.halved else plan.lanes
        negative = negative.reshape(-1, lanes, 2).swapaxes(1, 2)
    return np.packbits(negative, bitorder="little")


def _emit(b: Any, plan: Plan, given: Any) -> None:
    """Emit the reading of the settings, and the rotation."""
    src, dst, place = given
    words = b.inttoptr(place, _WORD.as_pointer())
    read = [b.load(b.gep(words, [ir.Constant(_WORD, i)])) for i in range(8)]
    units, src_step, dst_step, signs, period, phase, scratch, nothing = read
    end = b.inttoptr(b.add(place, ir.Constant(_WORD, 64)), ir.DoubleType().as_pointer())
    scale = b.load(end)
    if plan.dtype != "float64":
        scale = b.fptrunc(scale, ir.FloatType())
    # LLVM doesn't know that it adds zero: see Vectors.load_butterfly.
    twin = b.add(src, nothing)
    arguments = (src, twin, dst, src_step, dst_step, units, signs, period, phase, scale, scratch)
    Body(b, plan, arguments).emit()


@cache
def edition() -> str:
    """Digest of the generator's own sources: code that an older one made must not be used."""
    folder = resources.files("corequant._numba")
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".py"))
    return f"{crc32(b''.join((folder / name).read_bytes() for name in names)):08x}"
