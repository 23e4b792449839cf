"""Block rotations of NumPy arrays: choose the plan, hand addresses to its kernel.

Along the last axis an array is one run of numbers, cut into units of whole blocks; along any other
axis rows are combined, a strip of columns at a time. Leftovers go through a small padded copy.
"""

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.arrays import IN_PLACE, address_of, forget, keep, storing
from corequant._cpu.codegen.compiler import compiled_away
from corequant._cpu.codegen.plans import Plan, fitted, plan_columns, plan_rows
from corequant._cpu.codegen.rotation_kernels import Context, kernel_for, piece, settings, sign_bits
from corequant._cpu.codegen.vectors import VECTOR_BYTES, compute_dtype, lanes_of
from corequant._cpu.loops.rotation_reference import rotate_blocks
from corequant._cpu.threads import Units, for_rows, one_part
from corequant.hadamard import hadamard_factors

__all__ = [
    "aligned",
    "is_plain",
    "name_of",
    "new",
    "repeated_bits",
    "rotate",
    "scale_of",
    "scratch",
    "where_signs",
]

Array = npt.NDArray[Any]
Signs = npt.NDArray[np.int8] | None

_PER_THREAD = 1 << 18
"""Numbers that are worth a thread: to share takes 8 µs, to turn 1 MiB takes 18."""

_SMALL = 1 << 16
"""Numbers of an array below which smaller units are better than a few left over: those are copied,
and such a call can't be repeated without being looked at."""

_TRANSPOSED = 256
"""Blocks that are turned into columns at a time."""


def rotate(
    x: Array,
    block_size: int,
    *,
    axis: int,
    inverse: bool,
    signs: Signs,
    out: Array | None,
    threads: int | None,
) -> Array:
    """Rotate blocks of ``x`` along ``axis``, counted from the front, into ``out`` if given."""
    result = new(x.shape, x.dtype) if out is None else out
    if x.size == 0:
        return result
    source = x if is_plain(x) else np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
    target = result if result is source or is_plain(result) else np.empty_like(source)
    core, power = _factors(block_size)
    # The kernels of other axes combine rows: a block of one has none to combine.
    if compiled_away() or (block_size == 1 and axis < x.ndim - 1):
        _rotate_plainly(source, target, block_size, axis, inverse, signs)
    elif axis < x.ndim - 1:
        _rotate_columns(source, target, block_size, axis, inverse, signs, threads)
    elif core > 1 and power < lanes_of(name_of(x.dtype)):
        _rotate_transposed(source, target, block_size, inverse, signs, threads)
    else:
        _rotate_rows(source, target, block_size, inverse, signs, threads)
    if target is not result:
        result[...] = target
    return result


_factors = lru_cache(maxsize=4096)(hadamard_factors)


@lru_cache(maxsize=64)
def name_of(dtype: np.dtype[Any]) -> str:
    """Return ``dtype.name``, which NumPy puts together anew each time."""
    return dtype.name


def is_plain(x: Array) -> bool:
    """Tell whether an array is C-contiguous and of the processor's byte order."""
    return bool(x.flags.c_contiguous and x.dtype.isnative)


class _Scratch(threading.local):
    """A thread's own scratch, kept from call to call.

    What a larger one replaces is kept too: a signal's handler may ask for more between the moment
    when its thread was told the address and the kernel that writes there. Sizes at least double, so
    that all of it is at most twice the largest.
    """

    def __init__(self) -> None:
        self.size = 0
        self.address = 0
        self.memory: list[Array] = []

    def at_least(self, size: int) -> int:
        """Return the address of at least so many bytes, 64-aligned."""
        if size > self.size:
            # Remembered calls go on with the scratch that they know; new ones share the larger.
            forget()
            size = max(size, 2 * self.size)
            self.memory.append(aligned(size))
            self.size, self.address = size, address_of(self.memory[-1])
        return self.address


scratch = _Scratch()


def aligned(size: int, dtype: Any = np.uint8) -> Array:
    """Return an uninitialised vector that starts on a line of cache."""
    kind = np.dtype(dtype)
    raw = np.empty(size * kind.itemsize + VECTOR_BYTES, np.uint8)
    start = -address_of(raw) % VECTOR_BYTES
    return raw[start : start + size * kind.itemsize].view(kind)


def new(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an uninitialised array as ``storing`` likes it best."""
    size = math.prod(shape)
    if storing(size * dtype.itemsize, 0) == "ordinary":
        return np.empty(shape, dtype)
    # Streamed stores are at their best where rows start on lines of cache.
    return aligned(size, dtype).reshape(shape)


def where_signs(signs: Signs, inverse: bool) -> str:
    """Say where a plan multiplies signs."""
    if signs is None:
        return "none"
    return "after" if inverse else "before"


def repeated_bits(plan: Plan, signs: npt.NDArray[np.int8]) -> Array:
    """Return the bits of signs for whole rows and whole units of the plan."""
    times = math.lcm(len(signs), plan.unit) // len(signs)
    return sign_bits(plan, signs if times == 1 else np.tile(signs, times))


def scale_of(dtype: str, block_size: int) -> Any:
    """Return 1/√b in the computed dtype."""
    return np.dtype(compute_dtype(dtype)).type(1 / math.sqrt(block_size))


def _factors_of(signs: Signs, scale: Any, inverse: bool) -> Array:
    """Return what numbers are multiplied by where the signs are; afterwards that is scaled, too."""
    if signs is None:
        return np.empty(0, scale.dtype)
    multipliers: Array = signs.astype(scale.dtype)
    return multipliers * scale if inverse else multipliers


@dataclass(frozen=True)
class _RowKernel:
    """A plan for rows, and all of it that a call needs."""

    call: Any
    plan: Plan
    unit: int
    scratch: int
    scale: float


@lru_cache(maxsize=512)
def _row_kernel(
    dtype: str, block_size: int, inverse: bool, signs: str, stores: str, fit: int = 0
) -> _RowKernel:
    """Return the kernel; one whose units make up ``fit`` numbers, if there is such a one."""
    plan = plan_rows(dtype, *_factors(block_size), inverse, signs, stores)
    plan = fitted(plan, fit) or plan
    scale = float(scale_of(dtype, block_size))
    return _RowKernel(kernel_for(plan), plan, plan.unit, plan.scratch, scale)


def _rotate_rows(
    x: Array, out: Array, block_size: int, inverse: bool, signs: Signs, threads: int | None
) -> None:
    name, size = name_of(x.dtype), x.dtype.itemsize
    where = where_signs(signs, inverse)
    stores = _stores(x, out)
    kernel = _row_kernel(name, block_size, inverse, where, stores)
    if x.size % kernel.unit and x.size < _SMALL:
        kernel = _row_kernel(name, block_size, inverse, where, stores, x.size)
    bits = None if signs is None else repeated_bits(kernel.plan, signs)
    source = address_of(x)
    target = source if out is x else address_of(out)
    units, rest = divmod(x.size, kernel.unit)

    def settings_of(kernel: _RowKernel, bits: Array | None, first: int, count: int) -> bytes:
        room = scratch.at_least(kernel.scratch)
        table = address_of(kernel.call.choices)
        if bits is None:
            return settings(count, kernel.scale, room, choices=table)
        period = 8 * bits.size
        own = (address_of(bits), period, first % period)
        return settings(count, kernel.scale, room, choices=table, signs=own)

    given = settings_of(kernel, bits, 0, units)
    alone = one_part(units, kernel.unit, threads, _PER_THREAD)
    call = kernel.call if alone else _Team(kernel, units, size, threads)
    if units:
        call(source, target, given)
    if rest:
        # Whose units may be longer or shorter than those of a kernel that streams.
        small = _row_kernel(name, block_size, inverse, where, "ordinary")
        count = -(-rest // small.unit)
        tail = np.zeros(count * small.unit, x.dtype)
        tail[:rest] = x.reshape(-1)[-rest:]
        address = address_of(tail)
        own = None if signs is None else repeated_bits(small.plan, signs)
        small.call(address, address, settings_of(small, own, x.size - rest, count))
        out.reshape(-1)[-rest:] = tail[:rest]
    elif signs is None:
        keep(
            x,
            block_size,
            inverse,
            threads,
            IN_PLACE if source == target else stores,
            call,
            given,
        )


class _Team:
    """A kernel for all units, whose threads share them out; called as the kernel itself is."""

    def __init__(self, kernel: _RowKernel, units: int, size: int, threads: int | None) -> None:
        self.context = Context(kernel.call, kernel.unit * size, kernel.unit)
        self.units = Units(piece(), units, kernel.unit, kernel.scratch, threads, _PER_THREAD)

    def __call__(self, source: int, target: int, given: bytes) -> None:
        context = self.context(source, target, given)
        self.units.run(context, scratch.at_least(self.units.scratch_size))


def _rotate_columns(
    x: Array,
    out: Array,
    block_size: int,
    axis: int,
    inverse: bool,
    signs: Signs,
    threads: int | None,
) -> None:
    core, power = _factors(block_size)
    name, size = name_of(x.dtype), x.dtype.itemsize
    where, scale = where_signs(signs, inverse), scale_of(name, block_size)
    multipliers = _factors_of(signs, scale, inverse)
    columns = math.prod(x.shape[axis + 1 :])
    step = columns * size
    # The first columns are left out so that the strips start on lines of cache.
    whole_lines = step % VECTOR_BYTES == 0 and address_of(out) % size == 0
    lead = -address_of(out) % VECTOR_BYTES // size if whole_lines else 0
    streamed = whole_lines and _stores(x, out) != "ordinary"
    plan = plan_columns(name, core, power, inverse, where, "streamed" if streamed else "ordinary")
    kernel: Any = kernel_for(plan)
    width = plan.strip * plan.lanes
    strips = max(0, columns - lead) // width
    covered = lead + strips * width if strips else 0
    blocks = x.size // (block_size * columns)
    per_axis = x.shape[axis] // block_size

    factors_at = address_of(multipliers)

    def turn(src: int, dst: int, row: int, block: int, count: int, room: int) -> None:
        table = factors_at + block % per_axis * block_size * multipliers.dtype.itemsize
        at = address_of(kernel.choices)
        signs = (table, 0, 0)
        given = settings(count, float(scale), room, choices=at, steps=(row, row), signs=signs)
        kernel(src, dst, given)

    def work(first: int, last: int) -> None:
        room = scratch.at_least(plan.scratch)
        while first < last:
            block, strip = divmod(first, strips)
            count = min(last - first, strips - strip)
            at = block * block_size * step + (lead + strip * width) * size
            turn(address_of(x) + at, address_of(out) + at, step, block, count, room)
            first += count

    if strips:
        for_rows(blocks * strips, block_size * width, work, threads, _PER_THREAD)
    source, target = (a.reshape(blocks, block_size, columns) for a in (x, out))
    left_out = [(0, lead), (covered, columns)] if strips else [(0, columns)]
    room = scratch.at_least(plan.scratch)
    copied = aligned(block_size * width, x.dtype).reshape(block_size, width)
    for start, end in left_out:
        for block, at in itertools.product(range(blocks), range(start, end, width)):
            count = min(width, end - at)
            copied[:, :count] = source[block, :, at : at + count]
            copied[:, count:] = 0
            address = address_of(copied)
            turn(address, address, width * size, block, 1, room)
            target[block, :, at : at + count] = copied[:, :count]


def _rotate_transposed(
    x: Array, out: Array, block_size: int, inverse: bool, signs: Signs, threads: int | None
) -> None:
    """Rotate blocks that are no whole number of vectors, as columns of a copy."""
    if signs is not None and not inverse:
        x = x * signs.astype(x.dtype)
    source, target = x.reshape(-1, block_size), out.reshape(-1, block_size)

    def work(first: int, last: int) -> None:
        for start in range(first, last, _TRANSPOSED):
            stop = min(start + _TRANSPOSED, last)
            columns = source[start:stop].T.copy()
            _rotate_columns(columns, columns, block_size, 0, inverse, None, 1)
            target[start:stop] = columns.T

    for_rows(len(source), block_size, work, threads)
    if signs is not None and inverse:
        out *= signs.astype(out.dtype)


def _rotate_plainly(
    x: Array, out: Array, block_size: int, axis: int, inverse: bool, signs: Signs
) -> None:
    where, scale = where_signs(signs, inverse), scale_of(x.dtype.name, block_size)
    multipliers = _factors_of(signs, scale, inverse)
    wide = np.moveaxis(x, axis, -1).astype(scale.dtype)
    if where == "before":
        wide *= multipliers
    # Compiled code doesn't warn either.
    with np.errstate(over="ignore", invalid="ignore"):
        turned = rotate_blocks(wide.reshape(-1, block_size), inverse, np.ones_like(scale))
        turned = turned.reshape(wide.shape) * (multipliers if where == "after" else scale)
        out[...] = np.moveaxis(turned, -1, axis).astype(x.dtype)


def _stores(x: Array, out: Array) -> str:
    if out is x or np.may_share_memory(x, out):
        return "ordinary"
    return storing(out.nbytes, address_of(out))
