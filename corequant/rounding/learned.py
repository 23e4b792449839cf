"""Learned rounding: up or down for each weight, by gradient descent on the output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import is_elsewhere, round_elsewhere
from corequant._validation import check_index, check_matrix, check_number, working_dtype
from corequant.quantization import as_spec, dequantize
from corequant.rounding.hessian import check_cross_moment, check_hessian, check_tokens, shrunk
from corequant.rounding.loop import Scales, column_grid
from corequant.rounding.methods import RoundingMethod
from corequant.rounding.problem import RoundedTensor, RoundingReport, loss_of
from corequant.specs import QuantSpec

__all__ = ["Descent", "Search", "learned_rounding"]

Array = npt.NDArray[Any]

_STRETCH = 1.2
_OFFSET = -0.1
_SETTLED = 30.0
_FIDELITY = 1e-3
"""Weight of the outputs' error against the penalty that hardens choices. Of correlated inputs, such
as a model's, errors add up to a hundred steps: with 1e-1 their choices stay soft until the end, and
1e-6 leaves those of uncorrelated inputs to the penalty."""
_CHECKS = 10
_RATES = {"adaround": 0.02, "signround": 0.005}


def learned_rounding(
    W: Any,
    H: Any,
    spec: QuantSpec | str,
    *,
    G: Any = None,
    objective: str = "adaround",
    steps: int = 400,
    rate: float | None = None,
    scales: Any = None,
    zero_points: Any = None,
    global_scale: Any = None,
    dtype: npt.DTypeLike | None = None,
    tokens: int | None = None,
    name: str = "W",
) -> RoundedTensor:
    """Quantize a weight by learning, for each entry, which of its two neighbours to take.

    Parameters
    ----------
    W : array (out_features, in_features)
        NumPy array or torch tensor, finite, of a floating dtype; all other arrays are of its kind.
    H : array (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    spec : QuantSpec or str
        The quantizer; any.
    G : array (in_features, in_features), optional
        ``XᵀX̃ / n`` with the float network's inputs X; by default they are X̃ themselves.
    objective : str
        ``"adaround"`` moves a soft choice between the neighbours by Adam, with a penalty that
        hardens it; ``"signround"`` shifts what is rounded to nearest by up to half a step, by the
        sign of the gradient.
    steps : int
        Each takes one product with H.
    rate : float, optional
        Step size; 0.02 for ``adaround`` and 0.005 for ``signround``, which decays to zero.
    scales, zero_points, global_scale, dtype, tokens, name
        As for ``gptq``.

    Returns
    -------
    RoundedTensor
        The best of the choices met on the way, by each row's output error, rounding to nearest
        among them. It carries a ``report``; its arrays are where W is.

    Raises
    ------
    BackendError, BlockSizeError, HessianError, NonFiniteError, ShapeError, SpecError
        If an argument breaks its rule.
    TypeError, ValueError
        If an argument breaks its rule.

    Notes
    -----
    The gradient of the output error by Q is ``2 (Q H - W G)``, so nothing has to be traced.
    AdaRound, arXiv 2004.10568, equations 21 to 25, interpolating between a format's neighbouring
    numbers; SignRound, arXiv 2309.05516. Gradients are taken in steps of the grid and relative to
    H's diagonal, so that neither the unit of W nor that of the inputs matters.

    With few tokens H and G get the same addition as GPTQ's.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.9, -1.5, 0.4], [0.1, 0.3, -0.7]])
    >>> H = np.array([[1.0, 0.8, 0.8], [0.8, 1.0, 0.8], [0.8, 0.8, 1.0]])
    >>> found = cq.learned_rounding(W, H, "int2:channel")
    >>> bool(found.report.loss <= found.report.nearest_loss)
    True
    """
    if is_elsewhere(W):
        arrays = {"W": W, "H": H, "G": G, "scales": scales, "zero_points": zero_points}
        how = {"objective": objective, "steps": steps, "rate": rate, "dtype": dtype, "name": name}
        how |= {"spec": spec, "global_scale": global_scale, "tokens": tokens}
        rounded: RoundedTensor = round_elsewhere("learned_rounding", **arrays, **how)
        return rounded
    W, spec = check_matrix("W", W), as_spec(spec)
    working = working_dtype(W, dtype)
    H = check_hessian(H, W.shape[1], name)
    G = None if G is None else check_cross_moment(G, H, name)
    used, cross, shrinkage = shrunk(H, G, check_tokens(tokens))
    descent = Descent.of(objective, steps, rate)
    chosen = Scales.choose(W, spec, scales, zero_points, global_scale)
    nearest = chosen.encode(W)
    w = np.ascontiguousarray(W, dtype=working)
    curvature = used.astype(working, copy=False)
    pull = w @ (curvature if cross is None else cross.astype(working, copy=False))
    start = np.asarray(dequantize(nearest), working)
    search = Search(np, w, curvature, pull, _neighbours(w, chosen), start)
    quantized = chosen.encode(descent.run(search))
    report = RoundingReport(
        objective,
        name,
        loss_of(W, dequantize(quantized), H, G),
        loss_of(W, dequantize(nearest), H, G),
        None,
        tuple(int(j) for j in np.flatnonzero(np.diagonal(H) == 0)),
        shrinkage=shrinkage,
    )
    return RoundedTensor.of(quantized, report)


def _neighbours(w: Array, scales: Scales) -> tuple[Array, Array]:
    """Return the numbers of the grid next to each weight, below or equal, and above or equal."""
    steps, zeros = scales.steps(len(w), w.dtype)
    steps, zeros = (np.repeat(a, scales.group, axis=1) for a in (steps, zeros))
    grid = column_grid(scales.spec.format, w.dtype)
    v = w / steps
    if not len(grid.table):
        low, high = (np.clip(f(v) + zeros, grid.least, grid.most) for f in (np.floor, np.ceil))
        return (low - zeros) * steps, (high - zeros) * steps
    last = len(grid.table) - 1
    low = grid.table[np.clip(np.searchsorted(grid.table, v, "right") - 1, 0, last)]
    high = grid.table[np.clip(np.searchsorted(grid.table, v, "left"), 0, last)]
    return low * steps, high * steps


class Search:
    """The neighbours of each weight, the objective, and the best rows so far.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``torch``, whose arrays all others are.
    w : array (rows, d)
        The weights, in the working dtype as all arrays.
    H : array (d, d)
    pull : array (rows, d)
        ``w G``, or ``w H``.
    neighbours : pair of arrays (rows, d)
        The numbers of the grid below and above each weight.
    start : array (rows, d)
        What is best so far; overwritten.
    """

    def __init__(
        self, xp: Any, w: Any, H: Any, pull: Any, neighbours: tuple[Any, Any], start: Any
    ) -> None:
        self.xp, self.w, self.H, self.pull = xp, w, H, pull
        self.low, self.high = neighbours
        # Outside of the grid both neighbours are its end, and on it the number itself.
        self.reach = self.high - self.low
        self.gap = xp.where(self.reach > 0, self.reach, xp.ones_like(self.reach))
        diagonal = xp.diagonal(H)
        living = diagonal > 0
        ones = xp.ones_like(diagonal)
        self.weight = xp.where(living, ones / xp.where(living, diagonal, ones), 0 * ones)
        self.best, self._losses = start, self._rows(start, start @ H)

    def gradient(self, Q: Any, hard: bool) -> Any:
        """Return the gradient by the share of the upper neighbour, of order one."""
        product = Q @ self.H
        if hard:
            self._keep(Q, product)
        return (product - self.pull) * self.weight / self.gap

    def keep(self, Q: Any) -> None:
        """Remember the rows of Q that are better than all before."""
        self._keep(Q, Q @ self.H)

    def _keep(self, Q: Any, product: Any) -> None:
        losses = self._rows(Q, product)
        better = losses < self._losses
        self.best[better], self._losses[better] = Q[better], losses[better]

    def _rows(self, Q: Any, product: Any) -> Any:
        return self.xp.sum(Q * (product - 2 * self.pull), 1, dtype=self.xp.float64)


@dataclass(frozen=True)
class Descent:
    """The gradient descent that learns the choices."""

    objective: str
    steps: int
    rate: float

    @classmethod
    def of(cls, objective: str, steps: Any, rate: Any) -> Descent:
        """Check the public arguments."""
        if objective not in _RATES:
            raise ValueError(f"objective must be one of {', '.join(_RATES)}, got {objective!r}")
        count = check_index("steps", steps, 0)
        pace = _RATES[objective] if rate is None else check_number("rate", rate)
        if not 0 < pace < float("inf"):
            raise ValueError(f"rate must be positive and finite, got {rate!r}")
        return cls(objective, count, pace)

    def run(self, search: Search) -> Any:
        """Return the best rows (rows, d) that were met."""
        (self._adaround if self.objective == "adaround" else self._signround)(search)
        return search.best

    def _adaround(self, search: Search) -> None:
        xp, steps = search.xp, self.steps
        share = xp.clip((search.w - search.low) / search.gap, 0, 1)
        soft = (share - _OFFSET) / _STRETCH
        V = xp.log(soft / (1 - soft))
        first, second = xp.zeros_like(V), xp.zeros_like(V)
        for t in range(1, steps + 1):
            sigmoid = 1 / (1 + xp.exp(-V))
            h = xp.clip(_STRETCH * sigmoid + _OFFSET, 0, 1)
            slope = xp.where(
                (h > 0) & (h < 1), _STRETCH * sigmoid * (1 - sigmoid), xp.zeros_like(V)
            )
            gradient = search.gradient(search.low + h * search.reach, False)
            gradient *= _FIDELITY
            done = t / steps
            if done > 0.2:
                beta = 20 - 18 * (done - 0.2) / 0.8
                side = 2 * h - 1
                gradient -= done * 2 * beta * xp.sign(side) * abs(side) ** (beta - 1)
            gradient *= slope
            first += (gradient - first) * 0.1
            second += (gradient**2 - second) * 0.001
            scale = xp.sqrt(second / (1 - 0.999**t)) + float(xp.finfo(V.dtype).tiny)
            V -= (self.rate / (1 - 0.9**t)) * first / scale
            # Further out a choice is made, and the exponential function overflows.
            xp.clip(V, -_SETTLED, _SETTLED, out=V)
            if t % max(1, steps // _CHECKS) == 0 or t == steps:
                search.keep(xp.where(V >= 0, search.high, search.low))

    def _signround(self, search: Search) -> None:
        xp, steps = search.xp, self.steps
        share = (search.w - search.low) / search.gap
        shift = xp.zeros_like(search.w)
        for t in range(steps):
            Q = xp.where(share + shift > 0.5, search.high, search.low)
            gradient = search.gradient(Q, True)
            shift -= self.rate * (1 - t / steps) * xp.sign(gradient)
            xp.clip(shift, -0.5, 0.5, out=shift)
        search.keep(xp.where(share + shift > 0.5, search.high, search.low))


METHOD = RoundingMethod(
    "learned", learned_rounding, ("steps",), needs_cross=True, optional_cross=True
)
