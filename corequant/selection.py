"""Choose permutation, scales and signs before a block rotation by the rounding error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_divides, check_generator, check_index, check_matrix
from corequant.calibration import ActivationStats
from corequant.equalization import balanced_scales
from corequant.errors import CalibrationError
from corequant.permutation import (
    absmax,
    energydiff,
    identity_permutation,
    massdiff,
    random_permutation,
    zigzag,
)
from corequant.quantization import as_spec, dequantize, fake_quantize
from corequant.range_search import rangediff, sign_descent
from corequant.rotation import block_hadamard
from corequant.rounding import round_to_nearest
from corequant.specs import QuantSpec

__all__ = [
    "METHODS",
    "Channels",
    "PermutationMethod",
    "Selection",
    "make_permutation",
    "permutation_needs",
    "rotation_error",
    "select_permutation",
    "select_scales",
]

Array = npt.NDArray[Any]

_SEARCH_TOKENS = 512
"""Tokens that the range search sees: more cost time and gained nothing measurable."""


@dataclass(frozen=True, eq=False)
class Channels:
    """Channels to be permuted among themselves: a ``part`` of those of ``statistics``.

    ``energies`` is the energy Gram matrix of all channels, for methods that need it.
    """

    statistics: ActivationStats
    part: slice
    block_size: int
    symmetric: bool
    generator: np.random.Generator
    energies: Array | None

    @property
    def width(self) -> int:
        """Number of the channels."""
        return int(self.part.stop - self.part.start)

    @property
    def energy_gram(self) -> Array:
        """Energy Gram matrix (width, width) of the channels."""
        assert self.energies is not None
        return self.energies[self.part, self.part]


@dataclass(frozen=True)
class PermutationMethod:
    """A way to make a permutation from statistics.

    Attributes
    ----------
    name : str
    make : callable
        Returns the permutation of ``Channels``, counted from the first of them.
    needs : tuple of str
        Optional statistics that it reads: ``"energy_gram"``, ``"tokens"``.
    is_candidate : bool
        Whether ``select_permutation`` tries it.
    """

    name: str
    make: Callable[[Channels], npt.NDArray[np.int64]]
    needs: tuple[str, ...] = ()
    is_candidate: bool = True


def _rangediff(c: Channels) -> npt.NDArray[np.int64]:
    tokens = c.statistics.tokens[:_SEARCH_TOKENS, c.part]
    _check_tokens("statistics.tokens", tokens)
    start = energydiff(c.energy_gram, c.block_size)
    return rangediff(tokens, c.block_size, start=start, symmetric=c.symmetric, seed=c.generator)


_ROWS = (
    PermutationMethod("identity", lambda c: identity_permutation(c.width)),
    PermutationMethod("massdiff", lambda c: massdiff(c.statistics.mean_abs[c.part], c.block_size)),
    PermutationMethod("zigzag", lambda c: zigzag(c.statistics.absmax[c.part], c.block_size)),
    PermutationMethod(
        "absmax", lambda c: absmax(c.statistics.absmax[c.part], c.block_size), is_candidate=False
    ),
    PermutationMethod(
        "random", lambda c: random_permutation(c.width, c.generator), is_candidate=False
    ),
    PermutationMethod(
        "energy",
        lambda c: massdiff(c.statistics.mean_energy[c.part], c.block_size),
        ("energy_gram",),
    ),
    PermutationMethod(
        "energydiff", lambda c: energydiff(c.energy_gram, c.block_size), ("energy_gram",)
    ),
    PermutationMethod("rangediff", _rangediff, ("energy_gram", "tokens")),
)
METHODS: Mapping[str, PermutationMethod] = MappingProxyType({row.name: row for row in _ROWS})
"""Permutations that can be made from statistics, by name (read-only): a row each."""


def permutation_needs(name: str) -> frozenset[str]:
    """Return the statistics that a permutation needs; ``auto`` needs those of all candidates.

    Examples
    --------
    >>> from corequant.selection import permutation_needs
    >>> permutation_needs("massdiff"), sorted(permutation_needs("auto"))
    (frozenset(), ['energy_gram', 'tokens'])
    """
    if name != "auto":
        return frozenset(METHODS[name].needs)
    rows = [row for row in METHODS.values() if row.is_candidate]
    return frozenset({"tokens"}.union(*(row.needs for row in rows)))


@dataclass(frozen=True, eq=False)
class Selection:
    """The best of several candidates.

    Attributes
    ----------
    permutation : numpy.ndarray (d,), int64
    method : str
        The candidate's name.
    errors : dict of str to float
        ``rotation_error`` of every candidate on the tokens held out.
    """

    permutation: npt.NDArray[np.int64]
    method: str
    errors: dict[str, float] = field(default_factory=dict)


def rotation_error(
    x: Array,
    block_size: int | None,
    spec: QuantSpec | str,
    *,
    permutation: npt.NDArray[np.int64] | None = None,
    factors: Array | None = None,
) -> float:
    """Measure the error of rounding tokens after permuting, scaling and rotating them.

    Parameters
    ----------
    x : numpy.ndarray (tokens, d)
    block_size : int, optional
        Block length of the rotation; the whole axis by default.
    spec : QuantSpec or str
        The activations' quantizer.
    permutation : numpy.ndarray (d,), optional
    factors : numpy.ndarray (d,), optional
        Multiplied before the rotation, in the permuted order; signs or scales.

    Returns
    -------
    float
        Mean over tokens of ``‖Q(z) - z‖² / ‖z‖²``, z being the rotated token; zero tokens count 0.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.selection import rotation_error
    >>> x = np.random.default_rng(0).normal(size=(64, 32)) * np.repeat([8.0, 1], 16)
    >>> rotation_error(x, 32, "int4:token:symmetric") < rotation_error(x, 2, "int4:token:symmetric")
    True
    """
    spec = as_spec(spec)
    z = x if permutation is None else np.ascontiguousarray(x[:, permutation])
    z = z if factors is None else z * factors
    z = block_hadamard(z, block_size)
    wrong = np.square(fake_quantize(z, spec) - z, dtype=np.float64).sum(1)
    power = np.square(z, dtype=np.float64).sum(1)
    return float(np.divide(wrong, power, out=np.zeros_like(power), where=power > 0).mean())


def make_permutation(
    method: str,
    statistics: ActivationStats,
    block_size: int,
    *,
    symmetric: bool = False,
    heads: int = 1,
    seed: int | np.random.Generator = 0,
) -> npt.NDArray[np.int64]:
    """Make a permutation by name from statistics.

    Parameters
    ----------
    method : str
        A key of ``METHODS``.
    statistics : ActivationStats
        With what the method needs, see ``permutation_needs``; tokens come from a ``reservoir``.
    block_size : int
        Must divide the channels of a head.
    symmetric : bool
        Whether the quantizer has no zero point; ``rangediff`` shrinks its range.
    heads : int
        Equal parts whose channels must stay inside them.
    seed : int or numpy.random.Generator
        Seed of random draws.

    Returns
    -------
    numpy.ndarray (d,), int64

    Raises
    ------
    BlockSizeError, CalibrationError, ValueError
        If sizes don't divide, a statistic is missing or the method unknown.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> from corequant.selection import make_permutation
    >>> stats = cq.ActivationStats(8).update(np.array([[9.0, 8, 1, 1, 7, 6, 1, 1]]))
    >>> make_permutation("massdiff", stats, 2, heads=2)
    array([0, 3, 1, 2, 4, 7, 5, 6])
    """
    d = statistics.d
    check_divides("heads", check_index("heads", heads), d)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    generator = check_generator("seed", seed)
    row = METHODS[method]
    # The whole matrix is scaled by the number of tokens when it is asked for: once is enough.
    energies = statistics.energy_gram if "energy_gram" in row.needs else None
    made = []
    for k in range(heads):
        part = slice(k * d // heads, (k + 1) * d // heads)
        channels = Channels(statistics, part, block_size, symmetric, generator, energies)
        made.append(row.make(channels) + part.start)
    return np.concatenate(made)


def select_permutation(
    statistics: ActivationStats,
    held_out: Array,
    block_size: int,
    spec: QuantSpec | str,
    *,
    heads: int = 1,
    seed: int | np.random.Generator = 0,
) -> Selection:
    """Make all candidate permutations and keep the one of least error on held-out tokens.

    Parameters
    ----------
    statistics : ActivationStats
        With ``energy_gram`` and a ``reservoir``, which the range search works on.
    held_out : numpy.ndarray (tokens, d)
        Tokens that the statistics have not seen.
    block_size : int
    spec : QuantSpec or str
        The deployed quantizer of the activations.
    heads : int
        Equal parts whose channels must stay inside them.
    seed : int or numpy.random.Generator
        Seed of the range search.

    Returns
    -------
    Selection

    Raises
    ------
    CalibrationError
        If there are no tokens to search on or to judge by.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> from corequant.selection import select_permutation
    >>> x = np.random.default_rng(0).normal(size=(256, 64)) * np.repeat([8.0, 1], [8, 56])
    >>> stats = cq.ActivationStats(64, energy_gram=True, reservoir=128).update(x[:192])
    >>> chosen = select_permutation(stats, x[192:], 8, "int4:token:asymmetric")
    >>> chosen.errors[chosen.method] < chosen.errors["identity"]
    True
    """
    spec = as_spec(spec)
    _check_tokens("statistics.tokens", statistics.tokens)
    _check_tokens("held_out", held_out)
    made = {
        name: make_permutation(
            name, statistics, block_size, symmetric=spec.symmetric, heads=heads, seed=seed
        )
        for name, row in METHODS.items()
        if row.is_candidate
    }
    errors = {
        name: rotation_error(held_out, block_size, spec, permutation=p) for name, p in made.items()
    }
    best = min(errors, key=lambda name: errors[name])
    return Selection(made[best], best, errors)


def select_scales(
    tokens: Array,
    judge: Array,
    W: Array,
    block_size: int | None,
    activations: QuantSpec | str,
    weights: QuantSpec | str,
    *,
    mean_square: Array | None = None,
    exponents: tuple[float, ...] = (0.35, 0.5, 0.65),
    signs: bool = True,
) -> tuple[npt.NDArray[np.float64], dict[str, float]]:
    """Choose the factors that tokens are multiplied by before they are rotated.

    Scales of every exponent of a grid, and none, are judged by the error of the layer's output with
    both the tokens and the weight rounded; then signs are descended for the best and for none.

    Parameters
    ----------
    tokens : numpy.ndarray (tokens, d)
        Permuted already; signs are searched on them.
    judge : numpy.ndarray (tokens, d)
        Others, permuted likewise, by which candidates are judged.
    W : numpy.ndarray (out_features, d)
        The weight that reads them, permuted already.
    block_size : int, optional
    activations, weights : QuantSpec or str
        The deployed quantizers.
    mean_square : numpy.ndarray (d,), optional
        Mean of x² of each channel over all calibration tokens, permuted likewise; rare tokens with
        massive activations show in it. That of ``tokens`` by default.
    exponents : tuple of float
        The grid, ``alpha`` of ``balanced_scales``; empty to choose signs alone.
    signs : bool
        Whether to choose signs too.

    Returns
    -------
    factors : numpy.ndarray (d,), float64
        For the tokens; the weight's columns are divided by them.
    errors : dict of str to float
        Error of the output for each candidate on the tokens that judge: the geometric mean of the
        relative squared error of all tokens together and of the mean of each token's own, so that
        neither the few largest tokens decide alone nor the many small ones.

    Raises
    ------
    CalibrationError, ShapeError, NonFiniteError, TypeError
        If there are no tokens, or W is not a finite matrix.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.selection import select_scales
    >>> rng = np.random.default_rng(0)
    >>> x, W = rng.normal(size=(128, 32)) * np.exp(rng.normal(size=32)), rng.normal(size=(16, 32))
    >>> A = "int4:token:asymmetric"
    >>> factors, errors = select_scales(x[:64], x[64:], W, 8, A, "int4:channel")
    >>> min(errors.values()) <= errors["none"]
    True
    """
    activation_spec, weight_spec = as_spec(activations), as_spec(weights)
    check_matrix("W", W)
    d = W.shape[1]
    size = d if block_size is None else block_size
    _check_tokens("tokens", tokens)
    _check_tokens("judge", judge)
    seen, judge = tokens.astype(np.float32), judge.astype(np.float32)
    exact = judge @ W.T.astype(np.float32)
    power = np.square(exact, dtype=np.float64).sum(1)
    busy = power > 0

    def output_error(factors: npt.NDArray[np.float64]) -> float:
        z = block_hadamard((judge * factors).astype(np.float32), size)
        rotated = block_hadamard((W / factors).astype(np.float32), size)
        product = (
            fake_quantize(z, activation_spec) @ dequantize(round_to_nearest(rotated, weight_spec)).T
        )
        error = np.square(product - exact, dtype=np.float64).sum(1)
        if not busy.any():
            return float(error.sum())
        together = error.sum() / power.sum()
        return float(np.sqrt(together * (error[busy] / power[busy]).mean()))

    energy = np.square(seen, dtype=np.float64).mean(0) if mean_square is None else mean_square
    candidates: dict[str, npt.NDArray[np.float64]] = {"none": np.ones(d)}
    for exponent in exponents:
        scales = balanced_scales(energy, W, alpha=exponent)
        candidates[f"scales {exponent}"] = 1 / scales
    errors = {name: output_error(factors) for name, factors in candidates.items()}
    if signs:
        for name in dict.fromkeys(["none", min(errors, key=lambda n: errors[n])]):
            factors = candidates[name]
            scaled = (seen[:_SEARCH_TOKENS] * factors).astype(np.float32)
            found = sign_descent(scaled, size, symmetric=activation_spec.symmetric)
            told = "signs" if name == "none" else f"{name}, signs"
            candidates[told] = factors * found
            errors[told] = output_error(candidates[told])
    best = min(errors, key=lambda name: errors[name])
    return candidates[best], errors


def _check_tokens(name: str, tokens: Array) -> None:
    if not len(tokens):
        raise CalibrationError(f"{name} must hold at least one token, got none")
