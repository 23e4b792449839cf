"""Compiled code on disk: where it lies, what is there, and how to fill it beforehand.

``python -m corequant.compiled [--warm] [FOLDER]`` does the same from a shell, and so does the
adapter's ``corequant cache``.

Examples
--------
>>> from corequant.compiled import cache_contents
>>> all(entry.files >= 0 for entry in cache_contents())
True
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CacheFolder", "cache_contents", "use_folder", "warm_cache"]

_BLOCKS = (16, 32, 64, 128, 256)
_SPECS = """
    int4:token int4:token:asymmetric int8:token int4:group128 int8:channel
    int4:channel:symmetric:mse mxfp4 nvfp4 float8_e4m3fn:channel
""".split()


@dataclass(frozen=True)
class CacheFolder:
    """A folder that may hold compiled code.

    Attributes
    ----------
    path : Path
    files, nbytes : int
        What it holds; zero where it doesn't exist.
    writable : bool
        Whether code can be added; the first such folder is written to.
    """

    path: Path
    files: int
    nbytes: int
    writable: bool

    def __str__(self) -> str:
        """Return one line."""
        how = "writable" if self.writable else "read-only"
        return f"{self.path}: {self.files} files, {self.nbytes / 1024:.0f} KiB, {how}"


def cache_contents() -> list[CacheFolder]:
    """Return the folders that compiled code is read from, the first choice first."""
    from corequant._cpu.codegen.compiler import cache_folders

    found = []
    for path in cache_folders():
        sizes = [file.stat().st_size for file in path.glob("*.o")] if path.is_dir() else []
        nearest = next(p for p in (path, *path.parents) if p.exists())
        writable = os.access(nearest, os.W_OK) and nearest.is_dir()
        found.append(CacheFolder(path, len(sizes), sum(sizes), writable))
    return found


def warm_cache() -> int:
    """Compile what common calls need, unless it is there; return the number of calls made.

    Block sizes 16 to 256 in float32 and bfloat16, the usual formats and the rounding methods.
    Whatever else is needed later is compiled then.
    """
    made = 0
    for call in itertools.chain(_rotations(), _quantizers(), _methods()):
        call()
        made += 1
    return made


def _rotations() -> Iterator[Callable[[], Any]]:
    import ml_dtypes

    import corequant as cq

    signs, permutation = np.ones(1024, np.int8), np.arange(1024)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        x = np.ones((64, 1024), dtype)
        yield partial(cq.ActivationStats(1024).update, x)
        for b in (*_BLOCKS, 1024):
            yield partial(cq.block_hadamard, x, b)
            yield partial(cq.block_hadamard, x, b, signs=signs)
            # Large enough that its stores bypass the processor's cache.
            yield partial(cq.block_hadamard, np.ones((1 << 14, 1024), dtype), b)
        for b in _BLOCKS[:3]:
            yield partial(cq.block_hadamard, x, b, axis=0)
        for b, text in itertools.product(_BLOCKS, ("int4:token", "int8:token", "mxfp4")):
            yield partial(cq.rotate_quantize, x, b, text)
            yield partial(cq.rotate_quantize, x, b, text, permutation=permutation)


def _quantizers() -> Iterator[Callable[[], Any]]:
    import corequant as cq

    x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    for text in _SPECS:
        quantized, packed = cq.quantize(x, text), cq.quantize_packed(x, text)
        yield partial(cq.dequantize, quantized)
        yield partial(cq.fake_quantize, x, text)
        yield partial(cq.pack_quantized, quantized)
        yield partial(cq.dequantize_packed, packed)


def _methods() -> Iterator[Callable[[], Any]]:
    import corequant as cq

    x = np.random.default_rng(0).standard_normal((512, 256)).astype(np.float32)
    W, H = x[:64], x.T @ x / len(x)
    for spec in ("int4:channel:symmetric:mse", "int4:group128", "mxfp4"):
        yield partial(cq.round_to_nearest, W, spec)
        yield partial(cq.gptq, W, H, spec)
        yield partial(cq.gpfq, W, H, H, spec)
        yield partial(cq.qronos, W, H, H, spec)
    accumulator = cq.AccumulatorSpec(20, activation=cq.formats["int8"])
    yield partial(cq.gptq, W, H, "int4:channel", accumulator=accumulator)
    yield partial(cq.fit_scales, W, H, "int4:channel:symmetric:mse")
    yield partial(cq.magr, W, H)
    yield partial(cq.massdiff, np.abs(x).mean(0), 32)
    yield partial(cq.energydiff, np.square(x).T @ np.square(x), 32)


def use_folder(folder: str | Path) -> None:
    """Read and write compiled code in a folder of its own in this process and its children."""
    os.environ["NUMBA_CACHE_DIR"] = str(folder)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m corequant.compiled")
    parser.add_argument("folder", nargs="?", help="to use instead of the default ones")
    parser.add_argument("--warm", action="store_true", help="compile what common calls need")
    given = parser.parse_args()
    if given.folder:
        use_folder(given.folder)
    if given.warm:
        warm_cache()
    for entry in cache_contents():
        print(entry)


if __name__ == "__main__":
    main()
