"""The conformance suite: the requirements on a backend, as checks to run.

``python -m corequant.testing --backend NAME`` runs it on an installed backend. Codes, scales and
zero points must equal the golden vectors and NumPy's at every entry; rotations and products may err
twice as much as the naive method in the same dtype against a float64 one; of solvers only the
reconstruction error counts.

In pytest::

    @pytest.mark.parametrize("check", corequant.testing.checks(), ids=lambda c: c.name)
    def test_my_backend(check):
        check.run(corequant.testing.find_target("mine"))
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import get_backend
from corequant.errors import BackendError, NonFiniteError
from corequant.formats import formats
from corequant.protocols import Backend, ColumnSolver
from corequant.rounding import gpfq, gptq, qronos
from corequant.specs import QuantSpec

__all__ = [
    "GOLDEN_SPECS",
    "Check",
    "Target",
    "check_error",
    "checks",
    "find_target",
    "golden_vectors",
    "main",
]

Array = npt.NDArray[Any]

GOLDEN_SPECS = (
    "int2:channel:symmetric",
    "int4:token:asymmetric",
    "int4:group16:symmetric",
    "int8:tensor:asymmetric",
    "e3m2:group16",
    "nf4:group16",
    "mxfp4",
    "mxfp4:even",
    "mxfp8_e4m3",
    "nvfp4",
)
"""Quantizers that the golden vectors hold."""

_BLOCKS = (2, 16, 64, 12, 48, 192)
_SOLVERS = (gptq, gpfq, qronos)


@dataclass(frozen=True)
class Target:
    """A backend and its way in and out.

    Attributes
    ----------
    backend : Backend
    array : callable
        Makes the backend's array of a NumPy array.
    numpy : callable
        The way back.
    """

    backend: Backend
    array: Callable[[Array], Any]
    numpy: Callable[[Any], Array]


@dataclass(frozen=True)
class Check:
    """One named requirement; ``run(target)`` raises AssertionError where it isn't met."""

    name: str
    run: Callable[[Target], None]


def find_target(name: str) -> Target:
    """Return an installed backend by name: numpy, torch, cuda (torch's on a GPU) or another one.

    Raises
    ------
    BackendError
        If it isn't there, or can't bring arrays in and out; never passed over in silence.

    Examples
    --------
    >>> from corequant.testing import find_target
    >>> find_target("numpy").backend.name
    'numpy'
    """
    backend: Any = get_backend("torch" if name == "cuda" else name)
    if name == "numpy":
        return Target(backend, np.asarray, np.asarray)
    missing = [m for m in ("from_numpy", "to_numpy") if not hasattr(backend, m)]
    if missing:
        raise BackendError(f"the backend {name!r} must have {' and '.join(missing)} to be checked")
    if name == "cuda":
        backend.from_numpy(np.zeros(1), "cuda")  # an absent GPU is an error now, not in every check
        return Target(backend, lambda x: backend.from_numpy(x, "cuda"), backend.to_numpy)
    return Target(backend, backend.from_numpy, backend.to_numpy)


def golden_vectors() -> dict[str, Array]:
    """Return the golden vectors by name, their sha256 compared with the manifest's.

    Raises
    ------
    BackendError
        If the file isn't the one that the manifest describes.

    Examples
    --------
    >>> from corequant.testing import golden_vectors
    >>> golden_vectors()["x"].shape
    (6, 64)
    """
    folder = files("corequant") / "golden"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    data = (folder / manifest["file"]).read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != manifest["sha256"]:
        raise BackendError(f"{manifest['file']} must have sha256 {manifest['sha256']}, got {found}")
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def checks() -> list[Check]:
    """Return every check.

    Examples
    --------
    >>> from corequant.testing import checks
    >>> checks()[0].name
    'golden int2:channel:symmetric'
    """
    found = [Check(f"golden {t}", partial(_golden, text=t)) for t in GOLDEN_SPECS]
    found += [Check(f"decode and encode {n}", partial(_codes, name=n)) for n in formats]
    found += [Check(f"rotation by {b}", partial(_rotation, block_size=b)) for b in _BLOCKS]
    found += [Check(f"solver {f.__name__}", partial(_solver, function=f)) for f in _SOLVERS]
    found += [
        Check("statistics", _statistics),
        Check("inputs are left alone", _untouched),
        Check("NaN and infinity are named", _nonfinite),
    ]
    return found


def _require(condition: Any, message: str) -> None:
    # Not an assert statement: python -O would leave those out.
    if not condition:
        raise AssertionError(message)


def check_error(name: str, found: Array, naive: Array, exact: Array) -> None:
    """Raise AssertionError unless ``found`` errs at most twice as much as ``naive``.

    Parameters
    ----------
    name : str
        What is judged, for the message.
    found, naive : numpy.ndarray
        Arrays of one dtype.
    exact : numpy.ndarray, float64
        The oracle. Where it is no better than the dtype, 16 units of its last place are allowed.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.testing import check_error
    >>> third = np.ones(1) / 3
    >>> half = third.astype(np.float16)
    >>> check_error("a third", half, half, third)
    """
    exact = exact.astype(np.float64)
    error, allowed = (float(np.linalg.norm(a.astype(np.float64) - exact)) for a in (found, naive))
    floor = float(np.finfo(np.float64).eps * 16 * np.linalg.norm(exact))
    allowed = max(2 * allowed, floor)
    _require(error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}")


def _equal(name: str, found: Array, expected: Array) -> None:
    _require(found.shape == expected.shape, f"{name}: shape {found.shape}, not {expected.shape}")
    _require(found.dtype == expected.dtype, f"{name}: dtype {found.dtype}, not {expected.dtype}")
    differing = found != expected
    if differing.any():
        at = np.unravel_index(int(np.argmax(differing)), found.shape)
        raise AssertionError(
            f"{name}: {int(differing.sum())} of {found.size} differ, the first at "
            f"{tuple(map(int, at))}: {found[at]}, not {expected[at]}"
        )


def _golden(target: Target, text: str) -> None:
    golden, spec = golden_vectors(), QuantSpec.parse(text)
    x = target.array(golden["x"])
    divisor = None
    if f"{text} global_scale" in golden:
        divisor = target.backend.choose_global_scale(x, spec)
        _equal("global scale", target.numpy(divisor), golden[f"{text} global_scale"])
    codes, scales, zeros = target.backend.quantize(x, spec, global_scale=divisor)
    _equal("codes", target.numpy(codes), golden[f"{text} codes"])
    _equal("scales", target.numpy(scales), golden[f"{text} scales"])
    if zeros is not None:
        _equal("zero points", target.numpy(zeros), golden[f"{text} zero_points"])
    values = target.numpy(target.backend.dequantize(codes, spec, scales, zeros, divisor))
    _equal("decoded numbers", values, golden[f"{text} values"])
    _equal(
        "fake-quantized",
        target.numpy(target.backend.fake_quantize(x, spec, divisor)),
        golden[f"{text} values"],
    )


def _codes(target: Target, name: str) -> None:
    form = formats[name]
    codes = np.arange(form.least_code, form.most_code + 1).astype(form.code_dtype)
    values = target.numpy(target.backend.decode(target.array(codes), form))
    expected = form.values[codes.view(np.uint8) & np.uint8(2**form.bits - 1)].astype(np.float32)
    _require(np.array_equal(values, expected, equal_nan=True), "decoded codes differ")
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    x = halves[np.isfinite(halves)]
    if not _takes_halves(target):
        x = x.astype(np.float32)
    encoded = target.numpy(target.backend.encode(target.array(x), form))
    _equal("codes of all float16", encoded, get_backend("numpy").encode(x, form))


def _takes_halves(target: Target) -> bool:
    try:
        target.array(np.ones(1, np.float16))
    except TypeError:
        return False
    return True


def _rotation(target: Target, block_size: int) -> None:
    generator = np.random.default_rng(block_size)
    signs = generator.choice(np.array([-1, 1], np.int8), 192)
    wide = generator.normal(size=(4, 192))
    numpy = get_backend("numpy")
    for dtype in (np.float16, np.float32, np.float64):
        x = wide.astype(dtype)
        if dtype == np.float16 and not _takes_halves(target):
            continue
        for inverse in (False, True):
            how: dict[str, Any] = {"axis": 1, "inverse": inverse, "signs": signs, "threads": None}
            exact = numpy.block_hadamard(x.astype(np.float64), block_size, out=None, **how)
            naive = numpy.block_hadamard(x, block_size, out=None, **how)
            y = target.backend.block_hadamard(target.array(x), block_size, out=None, **how)
            found = target.numpy(y)
            _require(found.dtype == dtype, f"dtype {found.dtype}, not {np.dtype(dtype)}")
            check_error(f"rotated {np.dtype(dtype)}", found, naive, exact)
            undone = target.backend.block_hadamard(
                y, block_size, out=None, **{**how, "inverse": not inverse}
            )
            gap = np.abs(target.numpy(undone) - x).max()
            _require(gap <= 64 * np.finfo(dtype).eps, f"undone to {gap:.3g}")


def _statistics(target: Target) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 64, 32)).astype(np.float32)
    given, other, numpy = target.array(x), target.array(y), get_backend("numpy")
    for ours, theirs in zip(target.backend.moments(given), numpy.moments(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    total = target.backend.add_gram(np.zeros((32, 32), np.float32), given)
    found = target.backend.add_gram(total, given, other)
    naive, exact = np.zeros((32, 32), np.float32), np.zeros((32, 32))
    for a, b in ((x, x), (x, y)):
        exact += a.astype(np.float64).T @ b
        for i in range(len(a)):
            naive += np.outer(a[i], b[i])
    check_error("sums of products", _as_array(target, found), naive, exact)
    wide = _as_array(target, target.backend.add_gram(None, given, double=True))
    _require(wide.dtype == np.float64, f"a double sum has dtype {wide.dtype}")
    np.testing.assert_allclose(wide, x.astype(np.float64).T @ x, rtol=1e-12, atol=1e-12)
    rows = target.numpy(target.backend.token_normalize(given))
    np.testing.assert_allclose(np.square(rows).mean(1), 1, rtol=1e-5)


def _as_array(target: Target, x: Any) -> Array:
    return x if isinstance(x, np.ndarray) else target.numpy(x)


def _solver(target: Target, function: Callable[..., Any]) -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(size=(300, 48)) * np.exp(generator.normal(0, 0.5, 48))
    x[:, 1:] += 0.5 * x[:, :-1]
    q = x + 0.1 * generator.normal(size=x.shape)
    W = generator.normal(size=(6, 48))
    arrays = {"W": W, "H": q.T @ q / len(q), "G": x.T @ q / len(q)}
    bound = inspect.signature(function).bind(**arrays, spec="int4:group16")
    bound.apply_defaults()
    expected = function(**bound.arguments)
    _require(expected.report.loss < expected.report.nearest_loss, "no better than to nearest")
    if target.backend.name == "numpy":
        return
    given = {n: target.array(a) for n, a in arrays.items()}
    if not isinstance(target.backend, ColumnSolver):
        # It may have none, but must say so.
        try:
            function(**{**bound.arguments, **given})
        except (BackendError, TypeError):
            return
        raise AssertionError(f"{function.__name__} took arrays without a solver of their own")
    method: str = function.__name__
    found = target.backend.round_columns(method, **{**bound.arguments, **given})
    gap = abs(found.report.loss / expected.report.loss - 1)
    _require(gap <= 1e-6, f"reconstruction error {found.report.loss}, not {expected.report.loss}")


def _untouched(target: Target) -> None:
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    given = target.array(x.copy())
    for text in GOLDEN_SPECS:
        target.backend.fake_quantize(given, QuantSpec.parse(text))
    how: dict[str, Any] = {"axis": 1, "inverse": False, "signs": None, "threads": None}
    target.backend.block_hadamard(given, 16, out=None, **how)
    _equal("the input afterwards", target.numpy(given), x)


def _nonfinite(target: Target) -> None:
    x = np.ones((4, 64), np.float32)
    x[2, 5], x[3, 0] = np.nan, np.inf
    given = target.array(x)
    bad = target.backend.first_nonfinite(given)
    if bad is None:
        raise AssertionError("first_nonfinite found none")
    _require(bad[:2] == (2, (2, 5)), f"first_nonfinite gave {bad[:2]}, not (2, (2, 5))")
    for text in GOLDEN_SPECS:
        try:
            target.backend.quantize(given, QuantSpec.parse(text))
        except NonFiniteError as error:
            index = error.index
        else:
            raise AssertionError(f"{text} took NaN without an error")
        _require(index == (2, 5), f"index {index}, not (2, 5)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks on a backend, print a line each, and return how many failed (at most 1).

    Examples
    --------
    >>> from corequant.testing import main
    >>> main(["--backend", "numpy", "--quiet"])
    numpy: 76 of 76 checks passed
    0
    """
    parser = argparse.ArgumentParser(prog="corequant.testing", description=__doc__)
    parser.add_argument("--backend", required=True, help="numpy, torch, cuda or another backend")
    parser.add_argument("--quiet", action="store_true", help="print failures and the sum only")
    options = parser.parse_args(arguments)
    target, failed, every = find_target(options.backend), 0, checks()
    for check in every:
        try:
            check.run(target)
        except Exception as error:
            failed += 1
            print(f"FAIL  {check.name}: {type(error).__name__}: {error}")
        else:
            if not options.quiet:
                print(f"ok    {check.name}")
    print(f"{options.backend}: {len(every) - failed} of {len(every)} checks passed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
