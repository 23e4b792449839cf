"""Compiled rotations: one source for every plan, a kernel each time that a new plan is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from typing import Any
from zlib import crc32

from corequant._numba.generator import rotate
from corequant._numba.jit import jit_signature
from corequant._numba.plans import Plan

__all__ = ["kernel_for"]

Kernel = Callable[..., None]

_WORDS = ", ".join(["intp"] * 9)


@lru_cache(maxsize=512)
def kernel_for(plan: Plan) -> Kernel:
    """Compile the kernel of a plan; see ``generator.rotate`` for what it takes."""
    return _compile(f"{_edition()} {plan}", "float64" if plan.dtype == "float64" else "float32")


@lru_cache(maxsize=1)
def _edition() -> str:
    """Digest of the generator: numba looks at this file alone to tell whether a cache is stale."""
    folder = resources.files(__package__)
    names = ("cores.py", "generator.py", "streaming.py", "vectors.py")
    return f"{crc32(b''.join((folder / name).read_bytes() for name in names)):08x}"


def _compile(plan: str, real: str) -> Kernel:
    @jit_signature(f"void({_WORDS}, {real}, intp)")
    def rotate_units(  # type: ignore[no-untyped-def]
        src, twin, dst, src_step, dst_step, units, signs, period, phase, scale, scratch
    ):
        rotate(
            src, twin, dst, src_step, dst_step, units, signs, period, phase, scale, scratch, plan
        )

    kernel: Any = rotate_units
    return kernel  # type: ignore[no-any-return]
