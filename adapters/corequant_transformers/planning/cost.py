"""Memory: what quantizing takes at its peak, and a limit that the system holds it to."""

from __future__ import annotations

import ctypes
import math
import re
import resource
import sys
from typing import TYPE_CHECKING, Any

from corequant.errors import RecipeError

if TYPE_CHECKING:
    from corequant_transformers.planning.model_plan import ModelPlan

__all__ = [
    "fates",
    "limit_memory",
    "peak_bytes",
    "peak_rss_mib",
    "trim_memory",
]

_BASE = 600 * 2**20
"""What Python, torch, Transformers and compiled kernels take before any weight is read."""

_BLOCK_BYTES = 26
"""For each weight of a decoder block: in float64, as it was and as codes, decoded, and in search of
scales."""

_VOCABULARY_BYTES = 12
"""For each weight of the embedding or the head: as it was read, in float32, and transformed."""

_VERIFIED_TOKENS = 128
_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def peak_rss_mib() -> float:
    """Return the most memory that this program has had in use so far, in MiB.

    Examples
    --------
    >>> from corequant_transformers.planning.cost import peak_rss_mib
    >>> 10 < peak_rss_mib() < 10**6
    True
    """
    try:
        # What getrusage says begins with the peak of the process that started this one.
        with open("/proc/self/status", encoding="ascii") as status:
            found = re.search(r"^VmHWM:\s+(\d+) kB", status.read(), re.M)
        if found is not None:
            return int(found[1]) / 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def trim_memory(above: int = 0) -> None:
    """Return freed memory to the system, where it can be told to: holes among what is held stay.

    Getting it back page by page takes longer than many a computation, so that a process that has no
    more than ``above`` bytes keeps it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None and (above == 0 or _resident() > above):
        trim(0)


def _resident() -> float:
    """Return the bytes that the process has in memory now; infinity where nothing says so."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return math.inf


def peak_bytes(plan: ModelPlan) -> int:
    """Return the estimated peak memory of quantizing a model on disk.

    Depth has no part in it where the model is read a part at a time.
    """
    recipe, sizes = plan.recipe, plan.dimensions
    blocks: dict[int, int] = {}
    edge = 0
    for matrix in plan.matrices:
        count = matrix.shape[0] * matrix.shape[1]
        if matrix.block is None:
            edge = max(edge, count)
        else:
            blocks[matrix.block] = blocks.get(matrix.block, 0) + count
    block = max(blocks.values())
    logits = 4 * 8 * _VERIFIED_TOKENS * sizes.vocabulary
    widest = max(m.shape[1] for m in plan.quantized)
    # Activations of one window, and the second moments of one input.
    window = 4 * recipe.sequence_length * (6 * sizes.hidden + 4 * widest)
    moments = 8 * 3 * widest**2
    running = 4 * block + window + moments
    rounding = _BLOCK_BYTES * block
    if recipe.rounding_options().needs_moments:
        rounding += moments + window
    return _BASE + plan.whole_bytes + max(running, rounding, _VOCABULARY_BYTES * edge + logits)


def limit_memory(size: str, plan: ModelPlan) -> int:
    """Have the system refuse this process more memory than ``size``; return it in bytes.

    The limit is on private memory (``RLIMIT_DATA``): weights, activations and results count, the
    code of libraries does not.

    Parameters
    ----------
    size : str
        Such as ``900MiB`` or ``2GiB``.
    plan : ModelPlan
        What is to be done.

    Raises
    ------
    RecipeError
        If the plan needs more.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[kmg]ib)", size.strip().lower())
    if found is None:
        raise RecipeError(f"memory must be a size such as 900MiB or 2GiB, got {size!r}")
    wanted = float(found[1]) * _UNITS[found[2]]
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = 2**63 - 1 if hard == resource.RLIM_INFINITY else hard
    if wanted >= most:
        raise RecipeError(
            f"memory must be below {most // 2**20}MiB, what the system allows, got {size[:40]}"
        )
    limit = int(wanted)
    needed = peak_bytes(plan)
    if needed > limit:
        raise RecipeError(
            f"memory must be at least {needed / 2**20:.0f}MiB for this model and recipe, got {size}"
        )
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return limit


def fates(plan: ModelPlan) -> list[dict[str, Any]]:
    """Return what becomes of every tensor that a plan knows: name, shape and a sentence.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> from corequant.recipe import Recipe
    >>> table = cqhf.plan(cqhf.tiny_model("llama"), Recipe(block_size=16))
    >>> cqhf.fates(table)[0]
    {'name': 'model.embed_tokens.weight', 'shape': [128, 48], 'fate': 'rotated in columns, float'}
    """
    rows = []
    for matrix in plan.matrices:
        parts = []
        if plan.folds and matrix.norm is not None:
            parts.append("norm folded")
        for side, where in (
            (matrix.input, "columns"),
            *((part.output, "rows") for part in matrix.outputs),
        ):
            acts = [
                word
                for word, acted in (
                    ("centered", side.centered),
                    ("permuted", side.permutation is not None),
                    ("scaled", side.factors not in (None, "residual")),
                    ("rotated", side.rotation is not None),
                )
                if acted
            ]
            if acts and (text := f"{' and '.join(acts)} in {where}") not in parts:
                parts.append(text)
        if matrix.online:
            parts.append(f"input rotated at run time by {matrix.input.rotation}")
        parts.append(f"rounded to {plan.recipe.weights}" if matrix.quantized else "float")
        rows.append(
            {
                "name": f"{matrix.name}.weight",
                "shape": list(matrix.shape),
                "fate": ", ".join(parts),
            }
        )
    fate = "becomes neutral" if plan.folds else "follows the residual stream"
    width = [plan.dimensions.hidden]
    return rows + [{"name": f"{n}.weight", "shape": width, "fate": fate} for n in plan.norms]
