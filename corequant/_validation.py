"""Checks that several public functions share; each names the argument, the rule and the value."""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.errors import (
    BackendError,
    BlockSizeError,
    MissingPackageError,
    NonFiniteError,
    PermutationError,
    ShapeError,
)

__all__ = [
    "check_array",
    "check_dense",
    "check_divides",
    "check_dtype",
    "check_finite",
    "check_floating",
    "check_generator",
    "check_index",
    "check_matrix",
    "check_number",
    "check_numpy",
    "check_permutation",
    "check_places",
    "check_positive",
    "check_range",
    "check_scores",
    "check_writeable",
    "divisors",
    "is_floating",
    "is_on_host",
    "is_plain_type",
    "join_some",
    "need_packages",
    "working_dtype",
]


_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
"""Names of these dtypes in every framework, after the framework's own name."""


@lru_cache(maxsize=64)
def _is_named_floating(dtype: Any) -> bool:
    return str(dtype).rpartition(".")[2] in _FLOATS


def check_index(name: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` as int, or raise TypeError or ValueError below ``minimum``."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an integer, got the bool {value}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def check_number(name: str, value: Any) -> float:
    """Return ``value`` as float; TypeError unless it is a real number."""
    if isinstance(value, bool | np.bool_ | str | bytes):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None


def check_generator(name: str, seed: Any) -> np.random.Generator:
    """Return the generator that a seed stands for, or the one given: never an unknown state."""
    if isinstance(seed, np.random.Generator):
        return seed
    return np.random.default_rng(check_index(name, seed, 0))


def is_plain_type(kind: type) -> bool:
    """Return whether a type's arrays follow ndarray semantics: masked ones and np.matrix don't."""
    return not issubclass(kind, np.ma.MaskedArray | np.matrix)


def check_numpy(name: str, value: Any) -> npt.NDArray[Any]:
    """Return ``value`` if it is a NumPy array that follows ndarray semantics."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a numpy.ndarray, got {type(value).__name__}")
    if not is_plain_type(type(value)):
        raise TypeError(f"{name} must be a plain numpy.ndarray, got {type(value).__name__}")
    return value


def check_writeable(out: npt.NDArray[Any]) -> None:
    """Raise unless ``out`` is writeable and no two of its entries share memory."""
    flags = out.flags
    if not flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    if not flags.c_contiguous:
        check_places(out.shape, out.strides, out.itemsize)


def check_places(shape: tuple[int, ...], strides: tuple[int, ...], unit: int = 1) -> None:
    """Raise unless entries ``unit`` long at these strides lie apart from each other."""
    if 0 in shape:
        return
    end = unit
    axes = zip(strides, shape, strict=True)
    for step, length in sorted((abs(step), n) for step, n in axes if n > 1):
        if step < end:
            raise ValueError(
                f"out must not overlap itself, got strides {strides} for shape {shape}"
            )
        end += step * (length - 1)


def check_array(name: str, x: Any) -> None:
    """Raise unless ``x``, of any backend, is of a real floating dtype with at least one axis."""
    check_dense(name, x)
    check_dtype(name, x.dtype, x.ndim)


def check_dense(name: str, x: Any) -> None:
    """Raise unless ``x``, of any backend, is one array and not a list of arrays of other shapes."""
    if getattr(x, "is_nested", False):
        raise BackendError(f"{name} must be one dense tensor, got a nested one")


def check_dtype(name: str, dtype: Any, ndim: int) -> None:
    """Raise unless an array of this dtype and number of axes passes ``check_array``."""
    if ndim == 0:
        raise ShapeError(f"{name} must have at least 1 axis, got a scalar")
    real = is_floating(dtype) if isinstance(dtype, np.dtype) else _is_named_floating(dtype)
    if not real:
        raise TypeError(f"{name} must have a real floating dtype, got {dtype}")


def check_floating(name: str, x: npt.NDArray[Any], minimum_ndim: int = 1) -> None:
    """Raise unless ``x`` is an array of a real floating type with enough axes."""
    if x.ndim < minimum_ndim:
        axes = "1 axis" if minimum_ndim == 1 else f"{minimum_ndim} axes"
        raise ShapeError(f"{name} must have at least {axes}, got shape {x.shape}")
    if not is_floating(x.dtype):
        raise TypeError(f"{name} must have a real floating dtype, got {x.dtype}")


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Return whether ``dtype`` is NumPy's or ml_dtypes' real floating type of at least 16 bits."""
    if dtype.kind == "f":
        return dtype.itemsize in (2, 4, 8)
    return dtype.name == "bfloat16"


def working_dtype(x: npt.NDArray[Any], dtype: npt.DTypeLike | None = None) -> np.dtype[Any]:
    """Return the dtype that ``x`` is computed in: ``dtype``, or float64 for float64, or float32."""
    if dtype is None:
        return np.dtype(np.float64 if x.dtype.itemsize == 8 else np.float32)
    working = np.dtype(dtype)
    if working not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"dtype must be float32 or float64, got {working}")
    return working


def check_finite(name: str, x: npt.NDArray[Any]) -> None:
    """Raise NonFiniteError if the NumPy array ``x`` holds NaN or infinity."""
    good = np.isfinite(x)
    if good.all():
        return
    index = np.unravel_index(int(np.argmin(good)), x.shape)
    raise NonFiniteError(
        name, int(good.size - np.count_nonzero(good)), tuple(map(int, index)), float(x[index])
    )


def check_matrix(name: str, w: Any) -> npt.NDArray[Any]:
    """Return ``w`` if it is a finite floating NumPy array (out_features, in_features)."""
    matrix = check_numpy(name, w)
    check_floating(name, matrix)
    if matrix.ndim != 2:
        raise ShapeError(f"{name} must be (out_features, in_features), got shape {matrix.shape}")
    check_finite(name, matrix)
    return matrix


def check_range(name: str, values: Any, least: int, most: int) -> None:
    """Raise ValueError unless all entries of an integer array lie in a range.

    Arrays without the methods ``min`` and ``max``, of other backends, are not looked at.
    """
    if 0 in tuple(values.shape) or not hasattr(values, "min"):
        return
    for value in (int(values.min()), int(values.max())):
        if not least <= value <= most:
            raise ValueError(f"{name} must lie in [{least}, {most}], got {value}")


def check_positive(name: str, values: Any) -> None:
    """Raise ValueError unless all entries are positive and finite; as ``check_range`` otherwise."""
    if 0 in tuple(values.shape) or not hasattr(values, "min"):
        return
    # Both are NaN where an entry is.
    for value in (float(values.min()), float(values.max())):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def is_on_host(x: Any) -> bool:
    """Return whether an array's values can be read without waiting for another device."""
    return getattr(getattr(x, "device", None), "type", "cpu") == "cpu"


def check_scores(name: str, score: Any) -> npt.NDArray[np.float64]:
    """Return a finite, non-negative vector (d,) in float64."""
    check_numpy(name, score)
    if score.ndim != 1 or score.size == 0:
        raise ShapeError(f"{name} must be a vector (d,) with d at least 1, got {score.shape}")
    check_floating(name, score)
    check_finite(name, score)
    values: npt.NDArray[np.float64] = score.astype(np.float64)
    if (values < 0).any():
        where = int(np.argmax(values < 0))
        raise ValueError(f"{name} must not be negative, got {values[where]} at index {where}")
    return values


def check_permutation(name: str, p: Any, d: int | None = None) -> npt.NDArray[np.int64]:
    """Return ``p`` as int64 if it is a permutation of ``0..len(p)-1`` of length ``d``."""
    check_numpy(name, p)
    if p.dtype.kind not in "iu":
        raise TypeError(f"{name} must have an integer dtype, got {p.dtype}")
    if p.ndim != 1:
        raise ShapeError(f"{name} must be a vector (d,), got shape {p.shape}")
    if d is not None and len(p) != d:
        raise PermutationError(f"{name} must have length d={d}, got {len(p)}")
    if p.size and (int(p.max()) >= len(p) or int(p.min()) < 0):
        bad = int(np.argmax((p < 0) | (p >= len(p))))
        raise PermutationError(
            f"{name} must hold indices 0..{len(p) - 1}, got {p[bad]} at position {bad}"
        )
    counts = np.bincount(p.astype(np.int64), minlength=len(p))
    if (counts != 1).any():
        twice, never = int(np.argmax(counts)), int(np.argmin(counts))
        raise PermutationError(
            f"{name} must hold every index once, got {twice} {counts[twice]} times "
            f"and {never} never"
        )
    order: npt.NDArray[np.int64] = p.astype(np.int64)
    return order


def check_divides(name: str, size: int, d: int) -> None:
    """Raise BlockSizeError unless ``size`` divides the axis length ``d``."""
    if d % size:
        works = join_some([b for b in divisors(d) if b > 1])
        raise BlockSizeError(f"{name} must divide d={d}, got {size}; these do: {works}")


def divisors(n: int) -> list[int]:
    """Return all divisors of ``n`` in ascending order."""
    small = [k for k in range(1, int(n**0.5) + 1) if n % k == 0]
    return sorted({*small, *(n // k for k in small)})


def join_some(items: list[Any] | tuple[Any, ...], most: int = 16) -> str:
    """Join items by commas, the middle left out where they are more than ``most``."""
    if not items:
        return "none"
    if len(items) <= most:
        return ", ".join(map(str, items))
    half = most // 2
    return f"{', '.join(map(str, items[:half]))}, ..., {', '.join(map(str, items[-half:]))}"


def need_packages(name: str, extra: str, *packages: str) -> None:
    """Raise MissingPackageError, which says how to get them, unless packages are installed."""
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingPackageError(
            f"{name} needs {' and '.join(missing)}; install what is missing with: "
            f'pip install "corequant[{extra}]"'
        )
