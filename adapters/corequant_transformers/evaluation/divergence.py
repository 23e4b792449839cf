"""The divergence of a model's predictions from another's, position by position."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import ShapeError
from corequant_transformers.evaluation.perplexity import (
    few_rows,
    log_probabilities,
    perplexity_with_error,
)
from corequant_transformers.evaluation.statistics import mean_with_error, quantile_with_error

__all__ = ["Divergence", "compare_positions", "summarize"]

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Divergence:
    """Divergence of a model from its reference.

    Every ``_se`` is a standard error over windows, as in ``Evaluation``, and None for one window.

    Attributes
    ----------
    kl, kl_se : float
        Mean over positions of the Kullback-Leibler divergence KL(reference || model) of the
        predicted distributions, in nats per token.
    kl_median, kl_median_se, kl_p999, kl_p999_se : float
        Median and 99.9 % quantile of the same over positions.
    top1, top1_se : float
        Share of positions where both find the same token most probable.
    top5, top5_se : float
        Share of the reference's five most probable tokens that are among the model's five.
    reference_perplexity, reference_perplexity_se : float
        The reference's own, over the same positions.
    excess, excess_se : float
        Mean over positions of what the model's negative log-likelihood is above the reference's, in
        nats: the logarithm of the ratio of the perplexities. Both see the same tokens, so that its
        error is that of the differences, which is far smaller than either perplexity's.
    """

    kl: float
    kl_se: float | None
    kl_median: float
    kl_median_se: float | None
    kl_p999: float
    kl_p999_se: float | None
    top1: float
    top1_se: float | None
    top5: float
    top5_se: float | None
    reference_perplexity: float
    reference_perplexity_se: float | None
    excess: float
    excess_se: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def compare_positions(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
) -> dict[str, Values]:
    """Return measures at each position, as arrays (positions,).

    Parameters
    ----------
    reference, logits : torch.Tensor (positions, vocabulary)
        Logits of the reference and of the model at the same positions.
    targets : torch.Tensor (positions,), int64
        The tokens that follow.

    Returns
    -------
    dict
        ``kl`` in nats; ``top1`` and ``top5``, agreements between 0 and 1; ``loss`` and
        ``reference_loss``, negative log-likelihoods in nats.

    Raises
    ------
    NonFiniteError
        If logits hold NaN or infinity.
    ShapeError
        If the two don't have logits for the same number of tokens.
    """
    if reference.shape != logits.shape:
        raise ShapeError(
            f"against must predict the model's vocabulary of {logits.shape[-1]} tokens, got "
            f"{reference.shape[-1]}"
        )
    found: dict[str, list[Values]] = {}
    for theirs, ours, following in few_rows(reference.to(logits.device), logits, targets):
        for name, values in _compare(theirs, ours, following).items():
            found.setdefault(name, []).append(values.cpu().numpy())
    return {name: np.concatenate(values) for name, values in found.items()}


def _compare(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    p = log_probabilities("logits of against", reference)
    q = log_probabilities("logits", logits)
    targets = targets.to(p.device)[:, None]
    most = min(5, p.shape[-1])
    first, second = p.topk(most).indices, q.topk(most).indices
    shared = (first[:, :, None] == second[:, None, :]).any(dim=-1)
    found = {
        "loss": -q.gather(1, targets)[:, 0],
        "reference_loss": -p.gather(1, targets)[:, 0],
        "top1": (first[:, 0] == second[:, 0]).double(),
        "top5": shared.double().mean(dim=-1),
    }
    # A token that the reference excludes adds nothing, whatever the model thinks of it.
    weights = p.exp()
    terms = p.sub_(q).mul_(weights).masked_fill_(weights == 0, 0.0)
    # Rounding may leave less than nothing of distributions that are equal.
    found["kl"] = terms.sum(dim=-1).clamp_(min=0.0)
    return found


def summarize(positions: dict[str, Values]) -> Divergence:
    """Return means and quantiles of arrays (windows, positions) of ``compare_positions``."""
    kl, agreement = positions["kl"], (positions["top1"], positions["top5"])
    perplexity, perplexity_se = perplexity_with_error(positions["reference_loss"])
    return Divergence(
        *mean_with_error(kl),
        *quantile_with_error(kl, 0.5),
        *quantile_with_error(kl, 0.999),
        *mean_with_error(agreement[0]),
        *mean_with_error(agreement[1]),
        perplexity,
        perplexity_se,
        *mean_with_error(positions["loss"] - positions["reference_loss"]),
    )
