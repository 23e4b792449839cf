"""Paired comparison of two models on the same questions."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_generator
from corequant.errors import ShapeError

__all__ = ["Comparison", "compare"]

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """How a model's accuracy differs from the reference's on the same questions.

    Attributes
    ----------
    difference, difference_se : float
        Mean over questions of right (1) or wrong (0), the model's less the reference's, and its
        standard error, that of the differences.
    low, high : float
        Interval of 95 %: percentiles of the difference over 10,000 bootstrap samples of the
        questions.
    only_model, only_reference : int
        Questions that one of them alone has right.
    p : float
        Two-sided p-value of McNemar's exact test: the probability that coin tosses split these
        questions at least as unevenly. 1 if there are none.
    """

    difference: float
    difference_se: float | None
    low: float
    high: float
    only_model: int
    only_reference: int
    p: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def compare(
    model: npt.ArrayLike, reference: npt.ArrayLike, seed: int | np.random.Generator = 0
) -> Comparison:
    """Compare the answers of two models.

    Parameters
    ----------
    model, reference : array_like (questions,), bool
    seed : int or numpy.random.Generator
        Random seed of the bootstrap.

    Raises
    ------
    ShapeError
        If there are no questions, or not the same number for both.

    Examples
    --------
    >>> from corequant_transformers.evaluation.comparison import compare
    >>> found = compare([1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1])
    >>> found.only_model, found.only_reference, found.p
    (1, 4, 0.375)
    """
    generator = check_generator("seed", seed)
    ours, theirs = np.asarray(model, bool), np.asarray(reference, bool)
    if ours.ndim != 1 or ours.shape != theirs.shape or not ours.size:
        raise ShapeError(
            "model and reference must hold the same number of answers, at least 1, got shapes "
            f"{ours.shape} and {theirs.shape}"
        )
    count = ours.size
    better, worse = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    differences = ours.astype(np.float64) - theirs
    # A sample of the questions matters by how many of each of three sorts are in it.
    sorts = np.array([better, worse, count - better - worse]) / count
    drawn = generator.multinomial(count, sorts, _RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / count, [0.025, 0.975])
    return Comparison(
        float(differences.mean()),
        None if count < 2 else float(differences.std(ddof=1)) / math.sqrt(count),
        float(low),
        float(high),
        better,
        worse,
        _mcnemar(better, worse),
    )


def _mcnemar(better: int, worse: int) -> float:
    """Return twice the probability of as few heads among as many tosses, at most 1."""
    tosses, fewest = better + worse, min(better, worse)
    ways, term = 0, 1
    for heads in range(fewest + 1):
        ways += term
        term = term * (tosses - heads) // (heads + 1)
    # A quotient of integers, however large, is exact to the last bit.
    return float(min(1.0, 2 * ways / (1 << tosses)))
