"""Log-likelihoods of continuations of contexts, what contexts share read once.

Rows of a batch end in padding, which causal attention lets no token of a row see, so that results
don't depend on what else is in a batch, beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from corequant._validation import check_index
from corequant.errors import TaskError
from corequant.specs import Granularity
from corequant_torch.cpu.onednn import QuickForward
from corequant_transformers.evaluation.perplexity import few_rows, log_probabilities
from corequant_transformers.model.logits import chosen_logits, placed, read_ahead
from corequant_transformers.model.quantized_linear import QuantizedLinear

__all__ = ["BATCH_TOKENS", "Likelihood", "Pair", "score_pairs"]

BATCH_TOKENS = 2048
"""Tokens that are read at once, padding included."""

_WORTHWHILE = 64
"""Tokens that reading a shared context once must save: it takes a pass of its own."""


@dataclass(frozen=True)
class Pair:
    """A context and its continuation, as token ids; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """What the model reads: all but the last token."""
        return (*self.context, *self.continuation[:-1])


@dataclass(frozen=True)
class Likelihood:
    """How probable a continuation is.

    Attributes
    ----------
    total : float
        Sum of its tokens' log-probabilities, in nats.
    greedy : bool
        Whether each token is the most probable one at its place.
    """

    total: float
    greedy: bool


def score_pairs(
    model: Any,
    pairs: Sequence[Pair],
    longest: int,
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Likelihood]:
    """Return the log-likelihood of each continuation, in order.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A replica, which no other thread runs.
    pairs : sequence of Pair
        Those with the same context, next to each other, share its computation where that pays.
    longest : int
        Tokens that the model can read; longer contexts lose their beginning.
    batch_tokens : int
        Tokens that are read at once at most, padding included, unless one row has more. A model
        that quantizes activations with one scale for several rows reads each row alone.
    progress : callable
        Called as ``progress(done, total)``, counting pairs.

    Raises
    ------
    NonFiniteError
        If logits hold NaN or infinity.
    TaskError
        If a context or a continuation has no tokens, or a continuation more than the model can
        read.
    """
    budget = check_index("batch_tokens", batch_tokens)
    cut = [_cut(pair, longest) for pair in pairs]
    if _couples_rows(model):
        jobs = [_Job([index], 0) for index in range(len(cut))]
    else:
        jobs = list(_jobs(cut, budget))
    found: dict[int, Likelihood] = {}
    for job in jobs:
        with QuickForward():
            scores = _run(model, [cut[index] for index in job.members], job.shared)
        found.update(zip(job.members, scores, strict=True))
        progress(len(found), len(cut))
    return [found[index] for index in range(len(cut))]


@dataclass(frozen=True)
class _Job:
    """Pairs that are read at once, and how many tokens of their contexts are read before."""

    members: list[int]
    shared: int


def _cut(pair: Pair, longest: int) -> Pair:
    if not pair.context or not pair.continuation:
        raise TaskError("a context and its continuation must have tokens, got one without")
    if len(pair.continuation) > longest:
        raise TaskError(
            f"a continuation must have at most {longest} tokens, what the model can read, got "
            f"{len(pair.continuation)}"
        )
    # The last token is predicted, not read.
    return Pair(pair.context[-(longest + 1 - len(pair.continuation)) :], pair.continuation)


def _couples_rows(model: Any) -> bool:
    """Return whether the values of one row have influence on how another is rounded."""
    return any(map(_has_one_scale, model.modules()))


def _has_one_scale(module: Any) -> bool:
    """Return whether a layer rounds its whole input with a scale that depends on all of it."""
    coupled = (Granularity.TENSOR, Granularity.TENSOR_GROUP)
    if isinstance(module, QuantizedLinear):
        return module.activations is not None and module.activations.granularity in coupled
    # Layers of torch's own dynamic quantization, and those of compressed-tensors.
    if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic"):
        return True
    scheme = getattr(module, "quantization_scheme", None)
    given = getattr(scheme, "input_activations", None)
    names = [granularity.value for granularity in coupled]
    return given is not None and bool(given.dynamic) and given.strategy in names


def _jobs(pairs: list[Pair], budget: int) -> Iterator[_Job]:
    """Yield groups of pairs with long contexts in common, then all others by length."""
    single: list[int] = []
    for _, group in groupby(range(len(pairs)), key=lambda index: pairs[index].context):
        members = list(group)
        shared = len(pairs[members[0]].context) - 1
        if (len(members) - 1) * shared < _WORTHWHILE:
            single += members
            continue
        # A row has the shared tokens in its cache, which takes memory if no time.
        for part in _by_length(pairs, members, budget, shared, budget + 4 * shared):
            yield _Job(part, shared)
    for part in _by_length(pairs, single, budget, 0, budget):
        yield _Job(part, 0)


def _by_length(
    pairs: list[Pair], members: list[int], budget: int, shared: int, held: int
) -> Iterator[list[int]]:
    """Cut pairs, the longest first, into parts of few tokens to read and to hold."""
    part: list[int] = []
    widest = 0
    for index in sorted(members, key=lambda index: -len(pairs[index].row)):
        rows = len(part) + 1
        widest = widest or len(pairs[index].row)
        if part and (rows * (widest - shared) > budget or rows * widest > held):
            yield part
            part, widest, rows = [], len(pairs[index].row), 1
        part.append(index)
    if part:
        yield part


def _run(model: Any, pairs: list[Pair], shared: int) -> list[Likelihood]:
    arguments: dict[str, Any] = {}
    if shared:
        context = placed(model, torch.tensor([pairs[0].context[:shared]]))
        arguments = read_ahead(model, context, len(pairs))
        shared = shared if arguments else 0
    rows = [pair.row[shared:] for pair in pairs]
    width = max(map(len, rows))
    # Padding that no model takes for padding, and warns of.
    ids = torch.tensor([[*row, *([row[0]] * (width - len(row)))] for row in rows])
    counts = [len(pair.continuation) for pair in pairs]
    lines = torch.tensor([k for k, count in enumerate(counts) for _ in range(count)])
    places = torch.tensor(
        [
            place
            for row, count in zip(rows, counts, strict=True)
            for place in range(len(row) - count, len(row))
        ]
    )
    targets = torch.tensor([token for pair in pairs for token in pair.continuation])
    chosen: list[torch.Tensor] = []
    agreed: list[torch.Tensor] = []
    batch = placed(model, ids)
    for logits in chosen_logits(model, batch, lambda x: x[lines, places], **arguments):
        wanted, targets = targets[: len(logits)], targets[len(logits) :]
        for part, own in few_rows(logits, wanted.to(logits.device)):
            exact = log_probabilities("logits", part)
            chosen.append(exact.gather(1, own.to(exact.device)[:, None])[:, 0].cpu())
            agreed.append((part.argmax(dim=-1) == own).cpu())
    sums = torch.split(torch.cat(chosen), counts)
    matches = torch.split(torch.cat(agreed), counts)
    return [
        Likelihood(float(values.sum()), bool(same.all()))
        for values, same in zip(sums, matches, strict=True)
    ]
