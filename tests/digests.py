"""Print a digest of every kind of result; every processor must print the same ones.

Usage: python tests/digests.py [PART ...]

Arrays are small and the thresholds above which results are streamed or shared among threads are
lowered, so that nearly all time goes into compiling. ``NUMBA_CPU_NAME`` chooses the processor. The
parts are ``rotated``, ``stored``, ``fused`` and ``looped``; without an argument it is all of them.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator

import ml_dtypes
import numpy as np

import corequant as cq
from corequant._cpu import arrays, threads
from corequant._cpu import rotation as rotations

DTYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]


def drawn(seed: int, dtype: np.dtype, rows: int, d: int) -> np.ndarray:
    """Normal numbers whose channels differ in scale by the same powers of two everywhere.

    Only sums and products of exact numbers: no library's logarithm or cosine decides a bit.
    """
    rng = np.random.default_rng(seed)
    counts = rng.integers(-128, 128, (4, rows, d)).sum(0)
    return np.ldexp(counts, rng.integers(-12, 0, d)).astype(dtype)


def at(x: np.ndarray, offset: int) -> np.ndarray:
    """Room for a result like ``x`` that begins so many bytes into a line of cache."""
    memory = np.full(x.nbytes + 128, 7, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)


def rotated() -> Iterator[tuple[str, list[np.ndarray]]]:
    """Rotations along rows and down columns, with signs and without, of one pass and of several."""
    for dtype in DTYPES:
        for b in (2, 16, 64, 1024, 24, 192, 92 * 16):
            x, signs = drawn(b, dtype, 3, 2 * b), cq.random_signs(2 * b, b)
            yield f"rows {dtype} {b}", [cq.block_hadamard(x, b, signs=signs)]
        for b in (64, 192):
            x, signs = drawn(b, dtype, 3, 2 * b), cq.random_signs(2 * b, b)
            back = cq.block_hadamard(x, b, inverse=True, signs=signs)
            yield f"inverse {dtype} {b}", [back]
        for b in (16, 1024, 192):
            x = drawn(b, dtype, b, 70)
            yield f"columns {dtype} {b}", [cq.block_hadamard(x, b, axis=0)]


def stored() -> Iterator[tuple[str, list[np.ndarray]]]:
    """Results that bypass the cache, where a line begins and off it; in place; by threads."""
    for dtype in DTYPES:
        x = drawn(0, dtype, 16, 8192)
        for b in (64, 4096):
            arrays._STREAMED_BYTES = 0
            outs = [cq.block_hadamard(x, b, out=at(x, offset)) for offset in (0, 16)]
            arrays._STREAMED_BYTES = 1 << 25
            yield f"streamed, shifted {dtype} {b}", outs
        within = at(x, 16)
        within[...] = x
        cq.block_hadamard(within, 64, out=within)
        yield f"in place {dtype}", [within]
        yield f"threads {dtype}", [cq.block_hadamard(x, 64, threads=n) for n in (1, 2)]
    arrays._STREAMED_BYTES = 0
    x = drawn(1, np.dtype(np.float32), 64, 64)
    yield "streamed columns", [cq.block_hadamard(x, 64, axis=0, out=at(x, 0))]
    arrays._STREAMED_BYTES = 1 << 25


def fused() -> Iterator[tuple[str, list[np.ndarray]]]:
    """Rotation and quantization in one pass: affine and microscaled formats, with permutations."""
    p, signs = cq.random_permutation(2048, 0), cq.random_signs(2048, 1)
    for dtype in DTYPES:
        x = drawn(2, dtype, 9, 2048)
        for b, text, permutation in (
            (64, "int4:token:symmetric", None),
            (1024, "int8:token:asymmetric", None),
            (64, "int4:group32", p),
            (64, "mxfp4", p),
            (64, "nvfp4", None),
        ):
            # Of float64, formats with scales of their own are taken by the loops that numba
            # compiles, which have a part of their own.
            if dtype.itemsize == 8 and "fp4" in text:
                continue
            q = cq.rotate_quantize(x, b, text, permutation=permutation, signs=signs)
            yield f"fused {dtype} {b} {text}", [q.codes, q.scales, q.zero_points, q.global_scale]
        x = drawn(3, dtype, 64, 2048)
        values = [cq.rotate_fake_quantize(x, 64, "int4:token", threads=n) for n in (1, 2)]
        yield f"fused values, threads {dtype}", values
    arrays._STREAMED_BYTES = 0
    yield "fused values, streamed", [cq.rotate_fake_quantize(x, 64, "int4:token")]
    arrays._STREAMED_BYTES = 1 << 25


def looped() -> Iterator[tuple[str, list[np.ndarray]]]:
    """Kernels that numba compiles: scales and codes of groups, and the loop over columns."""
    x = drawn(4, DTYPES[0], 16, 128)
    for text in ("int4:token:asymmetric", "mxfp4"):
        q = cq.quantize(x, text)
        yield f"quantized {text}", [q.codes, q.scales, q.zero_points]
    # A diagonal H, that no library's order of summing decides a bit.
    q = cq.gptq(x, np.diag(np.arange(1.0, 129)).astype(np.float32), "int4:channel")
    yield "gptq", [q.codes, q.scales]


PARTS = {part.__name__: part for part in (rotated, stored, fused, looped)}


def main() -> None:
    """Print what every result is called, and its digest."""
    rotations._PER_THREAD = 1 << 12
    threads._WORTH_WAKING = 0
    for part in sys.argv[1:] or PARTS:
        for name, results in PARTS[part]():
            digest = hashlib.sha256()
            for array in results:
                if array is not None:
                    digest.update(array.tobytes())
            print(f"{name}: {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
