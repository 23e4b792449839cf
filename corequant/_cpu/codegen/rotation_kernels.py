"""Kernels of rotations: one for each plan, made when it is first asked for."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from corequant._cpu.codegen.compiler import address_of_code, build
from corequant._cpu.codegen.cores import choices
from corequant._cpu.codegen.generator import Body
from corequant._cpu.codegen.plans import Plan
from corequant._cpu.codegen.vectors import Vectors, int64

__all__ = ["Context", "kernel_for", "piece", "settings", "sign_bits"]

_WORD = ir.IntType(64)
_WORDS = struct.Struct("8qd")
_UNITS, _PERIOD, _PHASE = 0, 4, 5
_BEFORE = struct.Struct("5q")
_NO_CHOICES = np.empty(0, np.uint64)


@lru_cache(maxsize=512)
def kernel_for(plan: Plan) -> Callable[[int, int, bytes, int], None]:
    """Return the kernel of a plan.

    Its parameters are the addresses of source and result, ``settings``, and the address of the
    plan's bytes of scratch. Its attribute ``choices`` is the table that the settings ask for.
    """
    kernel: Any = build(f"rotate {plan}", "iisi", lambda b, given: _emit(b, plan, given))
    kernel.choices = choices(plan.core, plan.inverse) if plan.core > 1 else _NO_CHOICES
    return kernel  # type: ignore[no-any-return]


def settings(
    units: int,
    scale: float,
    *,
    choices: int,
    steps: tuple[int, int] = (0, 0),
    signs: tuple[int, int, int] = (0, 0, 0),
) -> bytes:
    """Pack what a kernel needs in addition to the arrays; one argument costs less than nine.

    Parameters
    ----------
    units : int
        How many units of the plan to rotate.
    scale : float
        Factor of the result.
    choices : int
        Address of what ``choices`` returns for the core.
    steps : tuple of int
        Bytes from row to row of source and result, for a rotation down columns.
    signs : tuple of int
        Address of ``sign_bits``, how many there are, and the first to be used; for columns the
        address of the rows' factors.
    """
    return _WORDS.pack(units, *steps, *signs, 0, choices, scale)


class Context:
    """What ``piece`` needs to rotate some units out of many.

    Parameters
    ----------
    kernel : callable
        Of ``kernel_for``.
    step, numbers : int
        Bytes and numbers of a unit.
    """

    def __init__(self, kernel: Callable[..., None], step: int, numbers: int) -> None:
        # The address alone wouldn't keep the code.
        self.kernel, self.address = kernel, address_of_code(kernel)
        self.step, self.numbers = step, numbers

    def __call__(self, source: int, target: int, given: bytes) -> bytes:
        """Put together the context of a call, from the addresses and ``settings`` of all units."""
        return _BEFORE.pack(self.address, source, target, self.step, self.numbers) + given


@cache
def piece() -> Callable[..., None]:
    """Return the function that rotates units; one for all plans.

    Its parameters are the address of a ``Context``'s bytes, the first unit, how many units, and a
    scratch for the plan.
    """
    return build("piece of a rotation", "siii", _emit_piece)


def _emit_piece(b: Any, given: Any) -> None:
    """Emit a call of the kernel with settings of these units' own."""
    context, first, count, scratch = given
    words = b.inttoptr(context, _WORD.as_pointer())
    at = [b.gep(words, [int64(i)]) for i in range(5 + _WORDS.size // 8)]
    kernel, source, target, step, numbers, *read = map(b.load, at)
    signed = b.icmp_unsigned("!=", read[_PERIOD], int64(0))
    divisor = b.select(signed, read[_PERIOD], int64(1))
    read[_PHASE] = b.urem(b.add(read[_PHASE], b.mul(first, numbers)), divisor)
    read[_UNITS] = count
    own = b.alloca(_WORD, len(read))
    for i, value in enumerate(read):
        b.store(value, b.gep(own, [int64(i)]))
    moved = b.mul(first, step)
    kind = ir.FunctionType(ir.VoidType(), [_WORD] * 4)
    arguments = [b.add(source, moved), b.add(target, moved), b.ptrtoint(own, _WORD), scratch]
    b.call(b.inttoptr(kernel, kind.as_pointer()), arguments)


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
    src, dst, place, scratch = given
    words = b.inttoptr(place, _WORD.as_pointer())
    read = [b.load(b.gep(words, [int64(i)])) for i in range(8)]
    units, src_step, dst_step, signs, period, phase, nothing, choices = read
    end = b.inttoptr(b.add(place, int64(64)), ir.DoubleType().as_pointer())
    scale = Vectors(b, plan.dtype).narrow(b.load(end))
    # LLVM doesn't know that it adds zero: see Vectors.load_butterfly.
    twin = b.add(src, nothing)
    numbers = (src_step, dst_step, units, signs, period, phase, scale, scratch, choices)
    Body(b, plan, (src, twin, dst, *numbers)).emit()
