"""Dispatch to backends: the root module of an array's type is the name of its backend.

NumPy's is built in. Any other is found through the entry point group ``corequant.backends`` the
first time that one of its arrays is seen, so that no framework is imported to ask. A source tree
that is only on the path has no entry points; there the package of our own backend is looked for.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import numpy as np

from corequant._cpu.backend import NumpyBackend
from corequant._validation import check_writeable, is_plain_type
from corequant.errors import BackendError, ShapeError
from corequant.protocols import ColumnSolver, DeviceChecker, RegisteredBackend

__all__ = [
    "available_backends",
    "backend_for",
    "check_out",
    "get_backend",
    "is_elsewhere",
    "owner_of",
    "round_elsewhere",
]

_GROUP = "corequant.backends"
_BUNDLED = {"torch": ("corequant_torch", "TorchBackend")}
"""Backends of this project, by name: package and class, as pyproject.toml registers them."""


def available_backends() -> tuple[str, ...]:
    """Return the names of the installed backends, ``numpy`` first.

    Nothing is imported: a name says that a backend is registered, not that its framework works.

    Returns
    -------
    tuple of str

    Examples
    --------
    >>> import corequant as cq
    >>> cq.available_backends()[0]
    'numpy'
    """
    others = {e.name for e in _registered()} - {"numpy"}
    return ("numpy", *sorted(others))


@cache
def get_backend(name: str) -> RegisteredBackend:
    """Return the backend of that name, importing it now; BackendError says how to get it."""
    if name == "numpy":
        return NumpyBackend()
    found = [e for e in _registered() if e.name == name]
    if not found:
        raise BackendError(
            f"no backend for arrays of {name!r} is installed; installed are: "
            f"{', '.join(available_backends())}"
        )
    try:
        backend: RegisteredBackend = found[0].load()()
    except ImportError as error:
        raise BackendError(
            f"the backend {name!r} can't be imported ({error}); "
            f'install what it needs with: pip install "corequant[{name}]"'
        ) from error
    return backend


def _registered() -> list[Any]:
    # Imported here because it would double the time that importing corequant takes.
    import importlib.metadata
    import importlib.util

    found = list(importlib.metadata.entry_points(group=_GROUP))
    for name, (package, kind) in _BUNDLED.items():
        registered = any(e.name == name for e in found)
        if not registered and importlib.util.find_spec(package) is not None:
            found.append(importlib.metadata.EntryPoint(name, f"{package}:{kind}", _GROUP))
    return found


@cache
def owner_of(kind: Any) -> RegisteredBackend:
    """Return the backend that owns arrays of a type; TypeError says what was expected."""
    if not is_plain_type(kind):
        raise TypeError(f"a plain array, got {kind.__name__}")
    names = [base.__module__.partition(".")[0] for base in kind.__mro__]
    known = available_backends()
    for name in names:
        if name in known:
            return get_backend(name)
    raise TypeError(
        f"an array of one of {', '.join(known)}, got {kind.__module__}.{kind.__qualname__}"
    )


def backend_for(**arrays: Any) -> RegisteredBackend:
    """Return the one backend that owns all the named arrays; None among them is passed over.

    A ``DeviceChecker`` also refuses arrays of several devices.
    """
    # Plain loops: this stands before every call, however small its arrays are.
    found: RegisteredBackend | None = None
    several = False
    for name, array in arrays.items():
        if array is None:
            continue
        kind: Any = type(array)
        try:
            owner = owner_of(kind)
        except TypeError as error:
            raise TypeError(f"{name} must be {error}") from None
        if found is None:
            found = owner
            continue
        several = True
        if owner is not found:
            owners = {n: owner_of(cast(Any, type(a))) for n, a in arrays.items() if a is not None}
            told = ", ".join(f"{name} belongs to {b.name}" for name, b in owners.items())
            raise TypeError(f"arrays must all belong to one backend, but {told}")
    if found is None:
        raise TypeError(f"expected an array for one of {', '.join(arrays)}, got None")
    if several and (checker := _device_checker(cast(Any, found))) is not None:
        checker.check_together(**arrays)
    return found


@cache
def _device_checker(backend: Any) -> DeviceChecker | None:
    return backend if isinstance(backend, DeviceChecker) else None


def check_out(x: Any, out: Any, dtype: Any = None) -> None:
    """Raise unless ``out`` can take a result of the shape of ``x``; None can.

    It must belong to x's backend, have the shape of ``x`` and ``dtype`` (that of ``x`` by default),
    be writeable, and either cover exactly the memory of ``x`` or share none with it.
    """
    if out is None:
        return
    plain = type(x) is type(out) is np.ndarray
    if not plain and out is not x:
        backend_for(x=x, out=out)
    wanted = x.dtype if dtype is None else dtype
    same_dtype = out.dtype is wanted or _kind(out.dtype) == _kind(wanted)
    if not same_dtype or out.shape != x.shape:
        raise ShapeError(
            f"out must have x's shape {tuple(x.shape)} and dtype {wanted}, "
            f"got {tuple(out.shape)} and {out.dtype}"
        )
    if not (plain or isinstance(out, np.ndarray)):
        return
    check_writeable(out)
    # Two arrays that own their memory need no comparison of bounds, which takes .2 µs.
    apart = out.flags.owndata and x.flags.owndata
    if out is x or apart or not np.may_share_memory(out, x):
        return
    same = (
        out.dtype == x.dtype
        and out.__array_interface__["data"][0] == x.__array_interface__["data"][0]
        and out.strides == x.strides
    )
    if not same and np.shares_memory(out, x):
        raise ValueError("out must be x itself or share no memory with it, got an overlap")


def _kind(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def is_elsewhere(W: Any) -> bool:
    """Return whether ``W`` is an array of another backend than NumPy's."""
    return not isinstance(W, np.ndarray) and _is_array(W)


def round_elsewhere(method: str, **arguments: Any) -> Any:
    """Return the result of a rounding function on arrays of another backend.

    Parameters
    ----------
    method : str
        The public function's name.
    **arguments
        All of its arguments, by name.

    Raises
    ------
    BackendError
        If that backend has no adaptive rounding, or the arrays are on several devices.
    TypeError
        If the arrays belong to several backends, or to none.
    """
    arrays = {n: a for n, a in arguments.items() if _is_array(a) and len(a.shape)}
    backend: Any = backend_for(**arrays)
    if not isinstance(backend, ColumnSolver):
        raise BackendError(
            f"{method} must have a backend with round_columns, got arrays of {backend.name!r}, "
            "which has none; convert them to NumPy's"
        )
    return backend.round_columns(method, **arguments)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")
