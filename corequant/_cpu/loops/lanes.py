"""32 numbers of float32 at a time as LLVM vectors: what all kernels of short groups need.

Groups of 16 or 32 are shorter than what the compiler's own vector loops start at, so that plain
loops over them spent most of their time in remainders: 15 against 6 ms for 4096 by 4096 float32.
Outside compiled code the same definitions run on NumPy vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array

__all__ = [
    "HALF",
    "LANES",
    "Lanes",
    "address_of",
    "ask_for",
    "largest_bits",
    "prefetch",
]

LANES = 32
"""Numbers at a time: as many groups as two."""

HALF = LANES // 2

_I8, _I32, _F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()


def ask_for(x: Any, at: Any) -> None:
    """Have float32 ``x[at : at + 32]`` brought into the cache, wherever that is."""


def largest_bits(x: Any, at: Any, count: Any) -> Any:
    """Return the bits of the largest magnitude of ``x[at:at + count]``, in sixteens."""
    return (x[at : at + count].view(np.uint32) & np.uint32(0x7FFFFFFF)).max()


class Lanes:
    """A few operations on vectors of 32."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def splat(self, value: Any, count: int = LANES) -> Any:
        kind = ir.VectorType(value.type, count)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
        zeros = ir.Constant(ir.VectorType(_I32, count), [0] * count)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)

    def words(self, value: Any) -> Any:
        return self.b.bitcast(value, ir.VectorType(_I32, LANES))

    def floats(self, value: Any) -> Any:
        return self.b.bitcast(value, ir.VectorType(_F32, LANES))

    def join(self, low: Any, high: Any) -> Any:
        """Return a vector of 16 times ``low`` and 16 times ``high``."""
        return self.pick(self.splat(low), self.splat(high), [0] * HALF + [LANES] * HALF)

    def pick(self, one: Any, other: Any, places: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(_I32, len(places)), places)
        return self.b.shuffle_vector(one, other, mask)


def address_of(context: Any, builder: Any, kind: Any, array: Any, at: Any, element: Any) -> Any:
    """Return a pointer to ``array[at]`` as a pointer to ``element``."""
    data = make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), element.as_pointer())


def prefetch(builder: Any, address: Any, bytes_: int) -> None:
    """Ask for what is read a little later; beyond an array's end that does nothing."""
    first = builder.bitcast(address, _I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [first.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # To be read, into every level of the cache, as data.
    how = [ir.Constant(_I32, value) for value in (0, 3, 1)]
    builder.call(function, [builder.gep(first, [ir.Constant(_I32, bytes_)]), *how])


@intrinsic
def _ask_for(typing: Any, x: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = address_of(context, builder, signature.args[0], values[0], values[1], _F32)
        for line in range(0, 4 * LANES, 64):
            prefetch(builder, address, line)
        return context.get_dummy_value()

    return types.void(x, at), generate


@intrinsic
def _largest(typing: Any, x: Any, at: Any) -> Any:
    """Bits of the largest magnitudes of 16 numbers, reduced."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        words = ir.VectorType(_I32, HALF)
        loaded = builder.load(
            address_of(context, builder, signature.args[0], values[0], values[1], words)
        )
        loaded.align = 4
        bits = builder.and_(loaded, ir.Constant(words, [0x7FFFFFFF] * HALF))
        name = f"llvm.vector.reduce.umax.v{HALF}i32"
        kind = ir.FunctionType(_I32, [words])
        reduce = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(reduce, [bits])

    return types.uint32(x, at), generate


@overload(ask_for)
def _ask_for_compiled(x, at):  # type: ignore[no-untyped-def]
    return lambda x, at: _ask_for(x, at)  # type: ignore[call-arg]


@overload(largest_bits)
def _largest_bits(x, at, count):  # type: ignore[no-untyped-def]
    def run(x, at, count):  # type: ignore[no-untyped-def]
        most = np.uint32(0)
        for k in range(at, at + count, 16):
            most = max(most, _largest(x, k))  # type: ignore[call-arg]
        return most

    return run
