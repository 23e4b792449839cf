"""ARB-LLM: planes of signs with scales of rows and columns, refined alternately."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index, check_number
from corequant.hadamard import valid_block_sizes
from corequant.rounding.binary.additive import MOST_PLANES
from corequant.rounding.binary.coding import Coding, Form
from corequant.rounding.binary.published import published_arb
from corequant.rounding.binary.target import Measured, Target
from corequant.rounding.codebooks.coded import RoundedWeight

__all__ = ["arb"]

Array = npt.NDArray[Any]

_REFITS = 2
_LARGEST_BLOCK = 128
"""Largest block size of the rotations that are tried, the group size of most formats."""

_PUBLISHED_GROUP = 128


def arb(
    W: Any,
    H: Any,
    *,
    order: int = 1,
    salient: float = 0.0,
    ternary: bool = False,
    bitmap: bool = False,
    mean: bool = False,
    group: int | None = None,
    rotation: int | str | None = "auto",
    rounds: int = 3,
    G: Any = None,
    published: bool = False,
    damping: float | None = None,
    act_order: bool = True,
    tokens: int | None = None,
    name: str = "W",
) -> RoundedWeight:
    """Approximate a weight by a sum of planes of signs with scales of rows and columns (ARB-LLM).

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
        Finite, of a floating dtype.
    H : numpy.ndarray (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    order : int
        Number of planes, 1 to 4, which is also about the number of bits per weight.
    salient : float
        Share of the columns, 0 to 1, with one more plane: those with the largest errors.
    ternary : bool
        Use the digits -1, 0, 1, which take 1.6 bits, instead of -1, 1.
    bitmap : bool
        Store a bit for each weight that selects one of two sets of scales.
    mean : bool
        Whether rows have means.
    group : int, optional
        Number of columns that share the scales of a row; all by default.
    rotation : int or "auto" or None
        Size of the blocks in which columns are rotated first. ``"auto"`` tries the largest power of
        two up to 128 that columns can be rotated by, and rotates if that leaves less loss.
    rounds : int
        Number of alternating refinements of scales and signs after the column loop.
    G : numpy.ndarray (in_features, in_features), optional
        ``XᵀX̃ / n`` with the float network's inputs X; makes ``W X`` the target (Qronos's
        correction).
    published : bool
        Use ARB-RC with its column-group bitmap as published: ``order`` 1, groups of 128, 15 steps;
        see Notes. Of the options above, only ``group`` may be changed; ``rounds`` is ignored.
    damping : float, optional
        Addition to the diagonal of H, relative to its mean, or, with G, to the largest eigenvalue
        of H; 0.01 by default, with G 1e-4.
    act_order : bool
        Code columns, or groups, with large H_jj first; as published, they keep their order.
    tokens : int, optional
        Number of tokens that H and G were computed from, as for ``gptq``.
    name : str
        Name of the layer for errors and the report.

    Returns
    -------
    RoundedWeight
        The weight is an ``Additive``; ``weight.rotation`` is the block size of its rotation.

    Raises
    ------
    BlockSizeError, HadamardOrderError
        If columns can't be rotated in blocks of that size.
    HessianError
        If H is asymmetric or not positive semidefinite.
    NonFiniteError, ShapeError, TypeError, ValueError
        If an argument is invalid.

    Notes
    -----
    Source: arXiv 2410.03129. As published, each block of 128 columns has salient columns with two
    planes, found as in ``billm`` and with the same errors, and a bitmap of large weights in all
    columns. This makes four parts, each with its own scales of rows and columns and without means.
    The errors of a block are diffused as in BiLLM. This takes 2.9 bits or more, not 1.1.

    By default, the column loop of GPTQ chooses signs column by column. Then three steps alternate,
    each optimal in the metric of the outputs with everything else fixed: the column scales, by one
    system of ``in_features`` equations; the scales and means of each row together; and the signs of
    each weight. Rotated weights are close to normal, so that signs and a single scale leave ``1 -
    2/π`` of the squared error, as much as scales of rows and columns leave without a rotation.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> generator = np.random.default_rng(0)
    >>> W, X = generator.normal(size=(64, 128)), generator.normal(size=(512, 128))
    >>> found = cq.arb(W, X.T @ X / 512)
    >>> round(found.bits_per_weight, 3)
    1.375
    """
    measured = Measured.of(W, H, G, tokens, name)
    order = check_index("order", order)
    if order > MOST_PLANES:
        raise ValueError(f"order must be at most {MOST_PLANES}, got {order}")
    share, rounds = _check_share(salient), check_index("rounds", rounds, 0)
    if share and order == MOST_PLANES:
        raise ValueError(f"salient must be 0 with {MOST_PLANES} planes, got {salient}")
    d = measured.W.shape[1]
    size = None if group is None else check_index("group", group)
    if published:
        plain = {
            "G": G is None,
            "order": order == 1,
            "salient": not share,
            "ternary": not ternary,
            "bitmap": not bitmap,
            "mean": not mean,
            "rotation": rotation in ("auto", None),
        }
        if not all(plain.values()):
            changed = ", ".join(option for option, same in plain.items() if not same)
            raise ValueError(f"published must not come with other options, got {changed}")
        block = size or _PUBLISHED_GROUP
        target = Target.of(measured, block, damping, act_order=False)
        return target.result("arb, published", measured, published_arb(target, block, 15))
    form = Form(
        (order, min(order + 1, MOST_PLANES)),
        bool(bitmap),
        bool(bitmap),
        bool(mean),
        True,
        3 if ternary else 2,
        size,
    )
    found = []
    for rotated in _rotations(measured, rotation):
        # Columns of a group stay together; without groups, each column is ordered alone.
        target = Target.of(measured.rotated(rotated), size or 1, damping, bool(act_order))
        coding = Coding(target, form, _salient(target, share))
        coding.start_columns()
        if size is None:
            weights = np.diagonal(target.H)
            coding.start(0, d, target.values, weights, 10)
        coding.code(_REFITS)
        coding.refine(rounds)
        found.append(target.result("arb", measured, coding.weight(rotated)))
    return min(found, key=lambda result: result.report.loss or 0.0)


def _rotations(measured: Measured, rotation: Any) -> list[int | None]:
    """Return the sizes of blocks to try."""
    if rotation is None:
        return [None]
    if not isinstance(rotation, str):
        return [measured.check_rotation(rotation)]
    if rotation != "auto":
        raise ValueError(f"rotation must be an integer, None or 'auto', got {rotation!r}")
    sizes = [b for b in valid_block_sizes(measured.W.shape[1]) if b <= _LARGEST_BLOCK]
    powers = [b for b in sizes if b & (b - 1) == 0]
    return [None, max(powers)] if powers else [None]


def _check_share(value: Any) -> float:
    share = check_number("salient", value)
    if not 0 <= share <= 1:
        raise ValueError(f"salient must lie in [0, 1], got {value!r}")
    return share


def _salient(target: Target, share: float) -> npt.NDArray[np.bool_]:
    """Return the columns (columns,) with the largest errors after compensation."""
    salient = np.zeros(len(target.order), np.bool_)
    count = round(share * len(salient))
    if count:
        curvature = np.diagonal(target.factor.L) ** 2
        score = np.square(target.values).sum(0, dtype=np.float64) * curvature
        salient[target.order[np.argsort(-score, kind="stable")[:count]]] = True
    return salient
