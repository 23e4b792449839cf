"""BiLLM: salient columns in two planes of signs, the others in one, split by magnitude."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index
from corequant.rounding.binary.alphabet import Alphabet
from corequant.rounding.binary.coding import Coding, Form
from corequant.rounding.binary.planes import alternate
from corequant.rounding.binary.published import published_billm
from corequant.rounding.binary.start import start_parameters
from corequant.rounding.binary.target import Measured, Target
from corequant.rounding.codebooks.coded import RoundedWeight

__all__ = ["billm"]

Array = npt.NDArray[Any]

_COUNTS = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 49, 64)
"""Numbers of salient columns of a block to try."""

_REFITS, _ROUNDS = 2, 2


def billm(
    W: Any,
    H: Any,
    *,
    G: Any = None,
    published: bool = False,
    block: int = 128,
    damping: float | None = None,
    act_order: bool = True,
    tokens: int | None = None,
    name: str = "W",
) -> RoundedWeight:
    """Binarize a weight, salient columns twice and the others once in two parts (BiLLM).

    Each row has a mean and a scale for each part and each block of columns.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
        Finite, of a floating dtype.
    H : numpy.ndarray (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    G : numpy.ndarray (in_features, in_features), optional
        ``XᵀX̃ / n`` with the float network's inputs X; makes ``W X`` the target (Qronos's
        correction).
    published : bool
        Use the method as published, without G; see Notes.
    block : int
        Number of columns of a block; the last block may have fewer.
    damping : float, optional
        Addition to the diagonal of H, relative to its mean, or, with G, to the largest eigenvalue
        of H; 0.01 by default, with G 1e-4.
    act_order : bool
        Code the blocks with large H_jj first; as published, they keep their order.
    tokens : int, optional
        Number of tokens that H and G were computed from, as for ``gptq``.
    name : str
        Name of the layer for errors and the report.

    Returns
    -------
    RoundedWeight
        The weight is an ``Additive``.

    Raises
    ------
    HessianError
        If H is asymmetric or not positive semidefinite.
    NonFiniteError, ShapeError, TypeError, ValueError
        If an argument is invalid.

    Notes
    -----
    Source: arXiv 2402.04291. As published, a block of columns is binarized at once, after searches
    for its salient columns, 1 to 49, and for the magnitude that splits the others, one of 81
    percentiles. Details of the published code that the paper doesn't mention are reproduced: the
    saliency ``w²/U_jj²`` uses the Cholesky factor U of the inverse of H instead of the inverse;
    both searches binarize the saliencies instead of the weights; percentiles count the salient
    columns as zeros; and the error of a column is diffused as if earlier columns of its block had
    no error.

    By default, each weight outside of the salient columns takes the nearest of the four values of
    its row, which determines the bitmap, too, after the errors of earlier columns have been
    compensated for, also within a block. Then means and scales are fitted to the signs, and signs
    to means and scales, in the metric of the outputs. The number of salient columns, which may be
    0, is searched by the error of the weights.

    Published bit counts, 1.07 to 1.11, leave out the bitmap, means and scales. With them, blocks of
    128 take 2.9 bits, the value of ``bits_per_weight``.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> generator = np.random.default_rng(0)
    >>> W, X = generator.normal(size=(64, 128)), generator.normal(size=(512, 128))
    >>> found = cq.billm(W, X.T @ X / 512)
    >>> round(found.bits_per_weight, 2)
    2.89
    """
    measured, block = Measured.of(W, H, G, tokens, name), check_index("block", block)
    if published:
        if G is not None:
            raise ValueError("G must be None for billm as published, got a matrix")
        target = Target.of(measured, block, damping, act_order=False)
        return target.result("billm, published", measured, published_billm(target, block))
    target = Target.of(measured, block, damping, bool(act_order))
    form = Form(orders=(1, 2), split=True, mean=True, group=block)
    coding = _Salient(target, form, np.zeros(W.shape[1], np.bool_))
    coding.code(_REFITS)
    coding.refine(_ROUNDS)
    return target.result("billm", measured, coding.weight(None))


class _Salient(Coding):
    """A coding that chooses a block's salient columns when the block is reached."""

    def start(self, first: int, last: int, values: Array, weights: Array, steps: int) -> None:
        """Choose the salient columns of a block, and its parameters."""
        living = np.flatnonzero(self.live[first:last])
        inside, inside_weights = values[:, living], weights[living]
        errors = np.stack([_errors(inside, a, inside_weights) for a in self.alphabets])
        # A salient column is worth the error that two planes would save.
        order = np.argsort(errors[1] - errors[0], kind="stable")
        best, found = np.inf, 0
        for count in _COUNTS:
            if count <= len(living):
                error, sides = 0.0, (order[count:], order[:count])
                for alphabet, side in zip(self.alphabets, sides, strict=True):
                    error += _errors(inside[:, side], alphabet, inside_weights[side]).sum()
                if error < best:
                    best, found = error, count
        self.kinds[first:last] = 0
        self.kinds[first + living[order[:found]]] = 1
        super().start(first, last, values, weights, steps)


def _errors(values: Array, alphabet: Alphabet, weights: Array) -> Array:
    """Return the weighted squared error of each column (n,) after a few steps of fitting."""
    if not values.shape[1]:
        return np.zeros(0)
    parameters = start_parameters(values, alphabet)
    parameters, codes = alternate(values, alphabet, parameters, weights, 2)
    gap = values - alphabet.values(codes, parameters)
    found: Array = np.einsum("ij,ij->j", gap, gap, dtype=np.float64) * weights
    return found
