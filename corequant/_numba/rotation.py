"""Kernels of rotations: one for each plan, made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from importlib import resources
from zlib import crc32

from corequant._numba.generator import PARAMETERS, Body
from corequant._numba.machine import build
from corequant._numba.plans import Plan

__all__ = ["edition", "kernel_for"]


@lru_cache(maxsize=512)
def kernel_for(plan: Plan) -> Callable[..., None]:
    """Return the kernel of a plan; see ``generator.Body`` for what it takes."""
    kinds = PARAMETERS.format(real="d" if plan.dtype == "float64" else "f")
    return build(
        f"rotate {edition()} {plan}",
        kinds,
        lambda builder, given: Body(builder, plan, given).emit(),
    )


@cache
def edition() -> str:
    """Digest of the generator's own sources: code that an older one made must not be used."""
    folder = resources.files("corequant._numba")
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".py"))
    return f"{crc32(b''.join((folder / name).read_bytes() for name in names)):08x}"
