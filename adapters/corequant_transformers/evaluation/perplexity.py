"""Negative log-likelihoods of tokens, and their mean as a perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import NonFiniteError
from corequant_torch.device.onednn import QuickForward
from corequant_transformers.evaluation.statistics import mean_with_error
from corequant_transformers.model.logits import window_logits

__all__ = [
    "few_rows",
    "log_probabilities",
    "perplexity",
    "perplexity_with_error",
    "token_log_probabilities",
    "window_losses",
]

Tokens = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

_EXACT = 1 << 19
"""Logits that are held in float64 at once: 4 MiB, near the processor."""


def perplexity(model: Any, tokens: Tokens) -> float:
    """Return the perplexity over windows of a model that no other thread runs.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A replica or a skeleton with open parts.
    tokens : numpy.ndarray (windows, length), int64
    """
    losses = [window_losses(model, window) for window in tokens]
    return perplexity_with_error(np.stack(losses))[0]


def perplexity_with_error(losses: Values) -> tuple[float, float | None]:
    """Return exp of the mean over tokens, and its standard error over windows.

    Parameters
    ----------
    losses : numpy.ndarray (windows, positions)
        Negative log-likelihoods in nats.

    Returns
    -------
    perplexity : float
    error : float or None
        To first order: the perplexity times the standard error of the mean loss.
    """
    mean, error = mean_with_error(losses)
    with np.errstate(over="ignore"):
        value = float(np.exp(mean))
    return value, None if error is None else value * error


def window_losses(model: Any, window: Tokens) -> Values:
    """Return the negative log-likelihood (length - 1,) of each token of a window but the first.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As for ``perplexity``.
    window : numpy.ndarray (length,), int64

    Returns
    -------
    numpy.ndarray (length - 1,), float64
        In nats; the softmax is computed in float64.

    Raises
    ------
    NonFiniteError
        If logits hold NaN or infinity.
    """
    found = []
    following = torch.from_numpy(window[1:])
    with QuickForward():
        for logits in window_logits(model, window):
            targets, following = following[: len(logits)], following[len(logits) :]
            for part, own in few_rows(logits, targets):
                chosen = token_log_probabilities("logits", part, own.to(part.device))
                found.append(-chosen.cpu().numpy())
    return np.concatenate(found)


def few_rows(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield as many rows of each tensor as may be held in float64, the first one's width wide."""
    rows = max(1, _EXACT // tensors[0].shape[-1])
    for start in range(0, len(tensors[0]), rows):
        yield tuple(tensor[start : start + rows] for tensor in tensors)


def log_probabilities(name: str, logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the softmax (positions, vocabulary) in float64.

    Raises
    ------
    NonFiniteError
        If a logit of a row is NaN or infinite upwards, or all are infinite downwards.
    """
    total = _normalizers(name, logits)
    return _on_host(logits).to(torch.float64, copy=True).sub_(total)


def token_log_probabilities(
    name: str, logits: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Return elements (tokens,) of ``log_probabilities``, without all others.

    Parameters
    ----------
    name : str
    logits : torch.Tensor (positions, vocabulary)
    tokens : torch.Tensor (tokens,), int64
        On the device of the logits.
    rows : torch.Tensor (tokens,), int64, optional
        Position of each token; by default there is one at each.

    Raises
    ------
    NonFiniteError
        As ``log_probabilities``.
    """
    total = _normalizers(name, logits)[:, 0]
    if rows is None:
        rows = torch.arange(len(logits), device=logits.device)
    chosen = _on_host(logits[rows, tokens]).double()
    return chosen.sub_(total[rows.to(total.device)])


def _on_host(x: torch.Tensor) -> torch.Tensor:
    # Metal has no float64.
    return x.cpu() if x.device.type == "mps" else x


def _normalizers(name: str, logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the sum of exponentials (positions, 1) in float64."""
    given = _on_host(logits)
    top = given.amax(dim=-1, keepdim=True).double()
    top.masked_fill_(~top.isfinite(), 0.0)
    powers = given.to(torch.float64, copy=True).sub_(top).exp_()
    total = powers.sum(dim=-1, keepdim=True).log_().add_(top)
    bad = ~total[:, 0].isfinite()
    if bad.any():
        exact = given[bad].double()
        faults = ~(exact < torch.inf)
        row, column = int(bad.to(torch.int8).argmax()), int(faults[0].to(torch.int8).argmax())
        value = float(exact[0, column])
        raise NonFiniteError(name, int(faults.sum()), (row, column), value)
    return total
