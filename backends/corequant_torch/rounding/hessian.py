"""The matrices that describe a layer's inputs, on any device: checks and the damped factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from corequant._validation import check_array
from corequant.errors import NonFiniteError, ShapeError
from corequant.protocols import Backend
from corequant.quantization import QuantizedTensor
from corequant.rounding import hessian
from corequant.rounding.eigenvalues import lanczos
from corequant.rounding.hessian import (
    ENOUGH,
    LEAST_CHANNELS,
    Damping,
    added,
    check_tokens,
    probes,
    rank_of,
    rank_tolerance,
)
from corequant_torch.device.rotation import working

__all__ = [
    "Moments",
    "check_cross_moment",
    "check_hessian",
    "check_matrix",
    "damped_factor",
    "largest_eigenvalue",
    "values_of",
    "working_dtype",
]

Tensor = torch.Tensor

_ROWS = 512


def check_matrix(kernels: Backend, name: str, w: Any) -> Tensor:
    """Return ``w`` if it is a finite floating tensor with two axes."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(w).__name__}")
    check_array(name, w)
    if w.ndim != 2:
        raise ShapeError(f"{name} must be (out_features, in_features), got {tuple(w.shape)}")
    bad = kernels.first_nonfinite(w)
    if bad is not None:
        raise NonFiniteError(name, *bad)
    checked: Tensor = w.detach()
    return checked


def working_dtype(W: Tensor, dtype: Any) -> torch.dtype:
    """Return float32, or float64 on request or for float64 weights."""
    if dtype is None:
        return torch.float64 if W.dtype == torch.float64 else torch.float32
    for name, kind in (("float32", torch.float32), ("float64", torch.float64)):
        if dtype is kind or (not isinstance(dtype, torch.dtype) and np.dtype(dtype) == name):
            return kind
    raise ValueError(f"dtype must be float32 or float64, got {dtype}")


def values_of(kernels: Backend, q: QuantizedTensor) -> Tensor:
    """Return what codes stand for."""
    values: Tensor = kernels.dequantize(q.codes, q.spec, q.scales, q.zero_points, q.global_scale)
    return values


def _check_square(kernels: Backend, argument: str, matrix: Any, d: int, name: str) -> Tensor:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor, got {type(matrix).__name__}")
    if not matrix.is_floating_point():
        raise TypeError(f"{argument} must have a real floating dtype, got {matrix.dtype}")
    if tuple(matrix.shape) != (d, d):
        raise hessian.misshapen(argument, name, matrix.shape, d)
    bad = kernels.first_nonfinite(matrix)
    if bad is not None:
        raise NonFiniteError(f"{argument} of {name}", *bad)
    return working(matrix.detach())


@dataclass(frozen=True, eq=False)
class Moments:
    """H and G on a device, with what the host needs of them.

    Attributes
    ----------
    H : torch.Tensor (d, d)
        What a method works with; so is G.
    G : torch.Tensor (d, d) or None
    measured : tuple of torch.Tensor
        H and G as given, from which losses are computed.
    shrinkage : float
        Addition for lack of tokens, as in ``corequant.rounding.hessian``.
    diagonal : numpy.ndarray (d,), float64
        Diagonal of H.
    dead : numpy.ndarray (d,), bool
        Columns that no input reached.
    """

    H: Tensor
    G: Tensor | None
    measured: tuple[Tensor, Tensor | None]
    shrinkage: float
    diagonal: Any
    dead: Any

    @classmethod
    def of(
        cls, kernels: Backend, H: Any, G: Any, d: int, name: str, tokens: Any = ENOUGH
    ) -> Moments:
        """Check both; the errors are those of ``corequant.rounding``."""
        matrix = check_hessian(kernels, H, d, name)
        diagonal = matrix.diagonal().double().cpu().numpy()
        dead = diagonal == 0
        cross = None
        if G is not None:
            cross = check_cross_moment(kernels, G, dead, d, name)
        used, moved, shrinkage = shrunk(matrix, cross, diagonal, check_tokens(tokens))
        if shrinkage:
            diagonal = used.diagonal().double().cpu().numpy()
        return cls(used, moved, (matrix, cross), shrinkage, diagonal, dead)

    def loss(self, W: Tensor, Q: Tensor) -> float:
        """Return the loss of Q for W; products in H's dtype, sums in float64, as NumPy's."""
        H, G = self.measured
        total = torch.zeros((), dtype=torch.float64, device=W.device)
        for start in range(0, len(W), _ROWS):
            rows = slice(start, start + _ROWS)
            D = (W[rows].double() - Q[rows].double()).to(H.dtype)
            P = D @ H
            if G is not None:
                w = W[rows].to(H.dtype)
                P += 2 * (w @ G.to(H.dtype) - w @ H)
            total += (D.double() * P).sum()
        return float(total)


def shrunk(
    H: Tensor, G: Tensor | None, diagonal: Any, tokens: int | None
) -> tuple[Tensor, Tensor | None, float]:
    """Return H and G with what is added for lack of tokens; see NumPy's of the same name."""
    living = diagonal > 0
    count, trace = int(living.sum()), float(diagonal.sum())
    if not count or tokens == ENOUGH:
        return H, G, 0.0
    place = torch.from_numpy(np.flatnonzero(living)).to(H.device)
    known = _tokens_of(H, place) if tokens is None else tokens
    if known is None:
        return H, G, 0.0
    parts = (H[i : i + _ROWS].double().square().sum() for i in range(0, len(H), _ROWS))
    squares = float(torch.stack([*parts]).sum())
    value = added(trace, squares, count, known, torch.finfo(H.dtype).max)
    if not value:
        return H, G, 0.0
    moved = [None if M is None else M.clone() for M in (H, G)]
    for matrix in moved:
        if matrix is not None:
            matrix[place, place] += value * (trace / count)
    assert moved[0] is not None
    return moved[0], moved[1], value


def _tokens_of(H: Tensor, place: Tensor) -> int | None:
    """Return the rank of H where it lacks more than one direction."""
    count = len(place)
    if count < LEAST_CHANNELS:
        return None
    A = H[place][:, place].float()
    root = A.diagonal().rsqrt()
    A = A * root * root[:, None]
    A.diagonal().fill_(1 + rank_tolerance(count))
    L, info = torch.linalg.cholesky_ex(A)
    if int(info):
        return None
    z = torch.from_numpy(probes(count)).to(H.device)
    solved = torch.linalg.solve_triangular(L.T, z, upper=True, left=False)
    return rank_of(float(solved.double().square().sum()), count)


def check_hessian(kernels: Backend, H: Any, d: int, name: str) -> Tensor:
    """Return H if it can be a matrix of second moments (d, d)."""
    matrix = _check_square(kernels, "H", H, d, name)
    if not d:
        return matrix
    diagonal = matrix.diagonal().double()
    if bool((diagonal < 0).any()):
        j = int(diagonal.argmin())
        raise hessian.indefinite(name, diagonal[j], j, j)
    root = diagonal.sqrt()
    found: list[tuple[int, int] | None] = [None, None]
    for start in range(0, d, _ROWS):
        rows = matrix[start : start + _ROWS].double()
        bound = root[start : start + _ROWS, None] * root
        gap = (rows - matrix[:, start : start + _ROWS].T.double()).abs() > hessian.SLACK * bound
        wide = rows.abs() > (1 + hessian.SLACK) * bound
        for kind, fault in enumerate((gap, wide)):
            if found[kind] is None and bool(fault.any()):
                at = int(fault.flatten().int().argmax())
                found[kind] = (start + at // d, at % d)
    asymmetric, wide_at = found
    if asymmetric is not None:
        i, j = asymmetric
        raise hessian.asymmetric(name, matrix[i, j], matrix[j, i], i, j)
    if wide_at is not None:
        i, j = wide_at
        raise hessian.indefinite(name, matrix[i, j], i, j, diagonal)
    return matrix


def check_cross_moment(kernels: Backend, G: Any, dead: Any, d: int, name: str) -> Tensor:
    """Return G if it is a finite (d, d) matrix that fits H."""
    matrix = _check_square(kernels, "G", G, d, name)
    if dead.any():
        columns = np.flatnonzero(dead)
        lost = (matrix[:, torch.from_numpy(columns).to(matrix.device)] != 0).any(0).cpu().numpy()
        if lost.any():
            raise hessian.foreign(name, int(columns[int(lost.argmax())]))
    return matrix


def damped_factor(
    moments: Moments, order: Tensor, value: float, dtype: torch.dtype, name: str
) -> tuple[Tensor, Damping]:
    """Return L of ``L Lᵀ = H[order][:, order] + damping`` and the damping that it took."""
    mean = hessian.mean_diagonal(moments.diagonal, moments.dead)
    living = torch.from_numpy(np.where(moments.dead, mean, moments.diagonal)).to(order.device)

    def attempt(value: float) -> Tensor | None:
        A = moments.H[order][:, order].to(dtype)
        A.diagonal().copy_(living[order] + value)
        L, info = torch.linalg.cholesky_ex(A)
        good = (info == 0) & L.isfinite().all()
        return L if bool(good) else None

    return hessian.damped(attempt, value, mean, torch.finfo(dtype).eps, name)


def largest_eigenvalue(H: Tensor) -> float:
    """Return the largest eigenvalue of H; see ``corequant.rounding.eigenvalues``."""
    if not bool(H.any()):
        return 0.0
    sums = H.abs().sum(1, dtype=torch.float64) / H.abs().max()

    def product(vector: Any) -> Any:
        return (H @ torch.from_numpy(vector).to(H.device, H.dtype)).double().cpu().numpy()

    return lanczos(product, sums.cpu().numpy())
