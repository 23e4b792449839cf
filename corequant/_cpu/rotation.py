"""Block rotations of NumPy arrays: choose the plan, hand addresses to its kernel.

Along the last axis an array is one run of numbers, cut into units of whole blocks; along any other
axis rows are combined, a strip of columns at a time. Leftovers go through a small padded copy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.arrays import aligned, is_plain, name_of, new, scratch, storing
from corequant._cpu.codegen.compiler import address_of, compiled_away
from corequant._cpu.codegen.plans import Plan, fitted, plan_columns, plan_rows
from corequant._cpu.codegen.rotation_kernels import Context, kernel_for, piece, settings, sign_bits
from corequant._cpu.codegen.vectors import VECTOR_BYTES, compute_dtype, lanes_of
from corequant._cpu.loops.rotation_reference import rotate_blocks
from corequant._cpu.threads import Units, for_rows, one_part
from corequant.hadamard import hadamard_factors

__all__ = ["repeated_bits", "rotate", "scale_of", "where_signs"]

Array = npt.NDArray[Any]
Signs = npt.NDArray[np.int8] | None

_PER_THREAD = 1 << 18
"""Numbers that are worth a thread: to share takes 8 µs, to turn 1 MiB takes 18."""

_SMALL = 1 << 16
"""Numbers of an array below which smaller units are better than a few left over."""

_TRANSPOSED = 256
"""Blocks that are turned into columns at a time."""


def rotate(
    x: Array,
    block_size: int,
    axis: int,
    inverse: bool,
    signs: Signs,
    out: Array | None,
    threads: int | None,
) -> Array:
    """Rotate blocks of ``x`` along ``axis``, counted from the front, into ``out`` if given."""
    result = new(x.shape, x.dtype) if out is None else out
    if not x.size:
        return result
    way = _way(x.dtype, block_size, axis == x.ndim - 1)
    # Written out, for these lines stand before every call.
    if x.flags.c_contiguous and result.flags.c_contiguous and x.dtype.isnative:
        way(x, result, block_size, axis, inverse, signs, threads)
        return result
    source = x if is_plain(x) else np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
    target = result if result is source or is_plain(result) else np.empty_like(source)
    way(source, target, block_size, axis, inverse, signs, threads)
    if target is not result:
        result[...] = target
    return result


_factors = lru_cache(maxsize=4096)(hadamard_factors)


@lru_cache(maxsize=4096)
def _way(dtype: np.dtype[Any], block_size: int, last: bool) -> Callable[..., None]:
    """Return the function that rotates blocks of the last axis, or of another one."""
    core, power = _factors(block_size)
    # The kernels of other axes combine rows: a block of one has none to combine.
    if compiled_away() or (block_size == 1 and not last):
        return _rotate_plainly
    if not last:
        return _rotate_columns
    if core > 1 and power < lanes_of(name_of(dtype)):
        return _rotate_transposed
    return _rotate_rows


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

    def settings(self, units: int, signs: tuple[int, int, int] = (0, 0, 0)) -> bytes:
        """Return the settings for a number of units."""
        return settings(units, self.scale, choices=address_of(self.call.choices), signs=signs)


@lru_cache(maxsize=512)
def _row_kernel(
    dtype: str, block_size: int, inverse: bool, signs: str, stores: str, fit: int = 0
) -> _RowKernel:
    """Return the kernel; one whose units make up ``fit`` numbers, if there is such a one."""
    plan = plan_rows(dtype, *_factors(block_size), inverse, signs, stores)
    plan = fitted(plan, fit) or plan
    scale = float(scale_of(dtype, block_size))
    return _RowKernel(kernel_for(plan), plan, plan.unit, plan.scratch, scale)


class _Rows:
    """What arrays of one dtype and size share: kernel, settings, team, and what is left over."""

    def __init__(
        self,
        dtype: np.dtype[Any],
        size: int,
        block_size: int,
        inverse: bool,
        signs: str,
        stores: str,
        threads: int | None,
    ) -> None:
        given = (name_of(dtype), block_size, inverse, signs)
        kernel = _row_kernel(*given, stores)
        if size % kernel.unit and size < _SMALL:
            kernel = _row_kernel(*given, stores, size)
        self.kernel, self.scratch = kernel, kernel.scratch
        self.units, self.rest = divmod(size, kernel.unit)
        self.settings = kernel.settings(self.units)
        # Units of the rest may be longer or shorter than those of a kernel that streams.
        self.small = _row_kernel(*given, "ordinary") if self.rest else kernel
        self.call = kernel.call if self.units else _nothing
        if not one_part(self.units, kernel.unit, threads, _PER_THREAD):
            self.call = self._share
            self.context = Context(kernel.call, kernel.unit * dtype.itemsize, kernel.unit)
            self.team = Units(
                piece(), self.units, kernel.unit, kernel.scratch, threads, _PER_THREAD
            )

    def _share(self, source: int, target: int, given: bytes, room: int) -> None:
        """Do what the kernel does, together with other threads."""
        self.team.run(self.context(source, target, given), room)

    def finish(self, x: Array, out: Array, signs: Signs) -> None:
        """Rotate the numbers that make up no whole unit, in a padded copy."""
        rest, small = self.rest, self.small
        count = -(-rest // small.unit)
        tail = np.zeros(count * small.unit, x.dtype)
        tail[:rest] = x.reshape(-1)[-rest:]
        bits = None if signs is None else repeated_bits(small.plan, signs)
        given = small.settings(count, _sign_settings(bits, x.size - rest))
        address = address_of(tail)
        small.call(address, address, given, scratch.at_least(small.scratch))
        out.reshape(-1)[-rest:] = tail[:rest]


_rows = lru_cache(maxsize=1024)(_Rows)


def _nothing(source: int, target: int, given: bytes, room: int) -> None:
    """Stand for a kernel where there is no whole unit."""


def _sign_settings(bits: Array | None, first: int) -> tuple[int, int, int]:
    """Return what settings say of sign bits, the first of them to be used being given."""
    return (0, 0, 0) if bits is None else (address_of(bits), 8 * bits.size, first % (8 * bits.size))


def _rotate_rows(
    x: Array,
    out: Array,
    block_size: int,
    axis: int,
    inverse: bool,
    signs: Signs,
    threads: int | None,
) -> None:
    where = "none" if signs is None else where_signs(signs, inverse)
    source = address_of(x)
    target = source if out is x else address_of(out)
    stores = storing(x.nbytes, target)
    within = target % x.dtype.itemsize
    if stores != "ordinary" and (within or np.may_share_memory(x, out)):
        stores = "ordinary"
    if stores == "ordinary" and target % VECTOR_BYTES and not within:
        stores = "across"
    rows = _rows(x.dtype, x.size, block_size, inverse, where, stores, threads)
    given = rows.settings
    if signs is not None:
        bits = repeated_bits(rows.kernel.plan, signs)
        given = rows.kernel.settings(rows.units, _sign_settings(bits, 0))
    rows.call(source, target, given, rows.scratch and scratch.at_least(rows.scratch))
    if rows.rest:
        rows.finish(x, out, signs)


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
    streamed = whole_lines and storing(out.nbytes, address_of(out)) != "ordinary"
    streamed = streamed and not np.may_share_memory(x, out)
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
        given = settings(count, float(scale), choices=at, steps=(row, row), signs=signs)
        kernel(src, dst, given, room)

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
    x: Array,
    out: Array,
    block_size: int,
    axis: int,
    inverse: bool,
    signs: Signs,
    threads: int | None,
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
    x: Array,
    out: Array,
    block_size: int,
    axis: int,
    inverse: bool,
    signs: Signs,
    threads: int | None,
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
