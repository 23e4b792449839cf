"""Numbers to integers of a byte, four vectors at a time, where the processor saturates them.

Narrowed one by one, vectors make four stores of what is one line of the cache, and the ends of the
grid are looked at in four vectors instead of one.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from corequant._cpu.codegen.compiler import saturates
from corequant._cpu.codegen.vectors import VECTOR_BYTES, Vectors

__all__ = ["TOGETHER", "integers_of", "narrows"]

TOGETHER = 4
"""Vectors whose integers fill one."""

_INT32 = ir.IntType(32)
_WORDS, _SHORTS, _BYTES = (
    ir.VectorType(ir.IntType(bits), 8 * VECTOR_BYTES // bits) for bits in (32, 16, 8)
)
_ROUNDED_AS_SET = ir.Constant(_INT32, 4)


def narrows(v: Vectors) -> bool:
    """Tell whether ``integers_of`` can be had."""
    return v.scalar_bytes == 4 and saturates()


def integers_of(v: Vectors, four: list[Any], shift: Any, least: Any, most: Any) -> Any:
    """Round four vectors half to even, add ``shift`` and clip, to a vector of 64 bytes.

    ``shift``, ``least`` and ``most`` are numbers of int8.
    """
    b = v.builder
    wholes = [_rounded(v, x) for x in four]
    # Each of 128 bits by itself: first four numbers of the first vector, then of the second, ...
    halves = [_packed(v, "packssdw", _SHORTS, wholes[k : k + 2]) for k in (0, 2)]
    wide = _splat(v, b.sext(shift, _SHORTS.element), _SHORTS)
    bytes_ = _packed(v, "packsswb", _BYTES, [b.add(half, wide) for half in halves])
    for relation, end in ((">", least), ("<", most)):
        bound = _splat(v, end, _BYTES)
        bytes_ = b.select(b.icmp_signed(relation, bytes_, bound), bytes_, bound)
    order = [TOGETHER * (k % TOGETHER) + k // TOGETHER for k in range(_WORDS.count)]
    words = b.bitcast(bytes_, _WORDS)
    return b.shuffle_vector(words, words, ir.Constant(_WORDS, order))


def _rounded(v: Vectors, x: Any) -> Any:
    mask = ir.IntType(v.lanes)
    function = v.declared(
        "llvm.x86.avx512.mask.cvtps2dq.512", _WORDS, [v.kind, _WORDS, mask, _INT32]
    )
    nothing, all_lanes = ir.Constant(_WORDS, ir.Undefined), ir.Constant(mask, -1)
    return v.builder.call(function, [x, nothing, all_lanes, _ROUNDED_AS_SET])


def _packed(v: Vectors, name: str, result: Any, two: list[Any]) -> Any:
    function = v.declared(f"llvm.x86.avx512.{name}.512", result, [x.type for x in two])
    return v.builder.call(function, two)


def _splat(v: Vectors, value: Any, kind: Any) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    single = v.builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
    places = ir.Constant(ir.VectorType(_INT32, kind.count), [0] * kind.count)
    return v.builder.shuffle_vector(single, undefined, places)
