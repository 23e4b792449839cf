"""Log-likelihoods of continuations of contexts, with common prefixes read once.

Rows that begin with the same tokens, such as a question with each of its choices, form a family.
Their common prefix is read once, in a batch with prefixes of the same length, and each row goes on
from there. Rows of a batch end in padding, which no token of a row sees in causal attention, so
that results don't depend on the rest of the batch, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import torch

from corequant._validation import check_index
from corequant.errors import TaskError
from corequant.specs import Granularity
from corequant_torch.device.onednn import QuickForward
from corequant_transformers.evaluation.families import Family, divide, families
from corequant_transformers.evaluation.perplexity import few_rows, token_log_probabilities
from corequant_transformers.model.logits import Reading, placed
from corequant_transformers.model.quantized_linear import QuantizedLinear

__all__ = ["BATCH_TOKENS", "Likelihood", "Pair", "score_pairs"]

BATCH_TOKENS = 2048
"""Number of tokens read at once, padding included."""

_WORTHWHILE = 64
"""Tokens that a separate pass must save, since reading all weights takes about as long as these."""

_TRIED = 32
"""Number of tokens on which a model is tested for continuing from what it has read."""

_ROUNDING = 16
"""Rounding errors of logits, in units of the dtype's epsilon times the largest logit, are below
this: up to 7 were measured, over small models of all described types and SmolLM2-135M."""

_NOTICEABLE = 0.1
"""In 16-bit dtypes, that much rounding might be as large as the effect of what was read before; of
this effect, rounding errors were at most 0.04."""


@dataclass(frozen=True)
class Pair:
    """A context and its continuation, as token ids; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """Tokens that the model reads, all but the last one."""
        return self.tokens[:-1]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of the context and the continuation."""
        return (*self.context, *self.continuation)


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of a continuation.

    Attributes
    ----------
    total : float
        Sum of its tokens' log-probabilities, in nats.
    greedy : bool
        Whether each token is the most probable one at its position.
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
        Contexts and continuations. Common prefixes are read once if that saves time and the model
        can continue from them.
    longest : int
        Number of tokens that the model can read; longer contexts lose their beginning.
    batch_tokens : int
        Largest number of tokens read at once, padding included, unless one row has more. A model
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
    rows = [pair.row for pair in cut]
    if _couples_rows(model):
        jobs = [_Job([Family((index,), 0)], 0) for index in range(len(cut))]
    elif _goes_on(model, max(rows, key=len, default=())):
        jobs = list(_jobs(rows, families(rows), budget))
    else:
        jobs = list(_jobs(rows, [Family((index,), 0) for index in range(len(cut))], budget))
    scores = _Scores(cut)
    done = 0
    for job in jobs:
        with QuickForward():
            _run(model, scores, job, budget)
        done += sum(len(family.members) for family in job.families)
        progress(done, len(cut))
    return [Likelihood(*each) for each in zip(scores.totals, scores.greedy, strict=True)]


@dataclass(frozen=True)
class _Job:
    """Families that are read at once, and the number of tokens of their rows read before."""

    families: list[Family]
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
    """Return whether the values of one row affect the rounding of another."""
    return any(map(_has_one_scale, model.modules()))


def _has_one_scale(module: Any) -> bool:
    """Return whether a layer rounds its input with a scale that depends on the whole input."""
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


def _goes_on(model: Any, row: tuple[int, ...]) -> bool:
    """Return whether continuing from what a model has read is as good as reading all at once.

    Some models keep nothing of what they read, or a state that continues only by single tokens. So
    a short row is read both ways. The logits may differ by rounding errors of the dtype, and by
    less than a tenth of what omitting the beginning of the row changes. In float32, a single layer
    that forgets is noticed; in 16-bit dtypes, it may look like rounding. A model that does not pass
    reads whole rows, which takes longer and gives the same result.

    Activations are not rounded to codes here: at 4 bits, a difference in the last bit grows with
    every code that it changes, up to the size of all rounding errors together.
    """
    with _activations_in_float(model):
        return _agrees(model, row)


@contextmanager
def _activations_in_float(model: Any) -> Iterator[None]:
    """Let a replica's quantized layers use their inputs unrounded within the context."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    before = [layer.activations for layer in layers]
    for layer in layers:
        layer.activations = None
    try:
        yield
    finally:
        for layer, activations in zip(layers, before, strict=True):
            layer.activations = activations


def _agrees(model: Any, row: tuple[int, ...]) -> bool:
    """Return whether a row has the same logits, up to rounding, read in two steps and at once."""
    row = row[-_TRIED:]
    begin, end = row[: len(row) // 2], row[len(row) // 2 :]
    if not begin:
        return False

    def last(ids: tuple[int, ...], times: int = 1, **arguments: Any) -> torch.Tensor:
        reading = Reading(model, placed(model, torch.tensor([ids] * times)), **arguments)
        return torch.cat(list(reading.logits(lambda x: x[:, -1]))).double()

    whole, alone = last(row), last(end)
    try:
        reading = Reading(model, placed(model, torch.tensor([begin])), use_cache=True)
        arguments = reading.onward(placed(model, torch.tensor([0, 0])))
        went = last(end, 2, **arguments) if arguments else alone
    except Exception:  # of whatever a model does that can't
        return False
    difference, effect = (each.sub(whole).abs().max() for each in (went, alone))
    # Some models compute parts of a layer in float32 whatever their dtype is.
    epsilon = max(torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32))
    rounding = _ROUNDING * epsilon * whole.abs().max()
    return bool(difference <= rounding and difference < _NOTICEABLE * effect)


def _jobs(rows: list[tuple[int, ...]], found: Sequence[Family], budget: int) -> Iterator[_Job]:
    """Yield families with common prefixes of similar lengths, then all other rows by length."""
    single = [family.members[0] for family in found if not family.shared]
    alike = sorted((f for f in found if f.shared), key=lambda family: -family.shared)
    sizes = [len(family.members) for family in alike]
    members = [0, *accumulate(sizes)]
    tokens = [0, *accumulate(n * f.shared for n, f in zip(sizes, alike, strict=True))]

    def cost(start: int, end: int) -> int | None:
        shared, count = alike[end - 1].shared, end - start
        if count * shared > budget:
            return None
        # The rest of a family's common prefix is read by each of its rows.
        besides = tokens[end] - tokens[start] - shared * (members[end] - members[start])
        return count * shared + besides + _WORTHWHILE

    for start, end in divide(len(alike), cost):
        shared = alike[end - 1].shared
        if (members[end] - members[start] - (end - start)) * shared < _WORTHWHILE:
            single += [index for family in alike[start:end] for index in family.members]
        else:
            yield _Job(alike[start:end], shared)
    for part in _by_length(rows, single, budget, 0):
        yield _Job([Family((index,), 0) for index in part], 0)


def _by_length(
    rows: list[tuple[int, ...]], members: list[int], budget: int, shared: int
) -> Iterator[list[int]]:
    """Divide rows, the longest first, so that padding and passes together cost least.

    A part has few enough tokens, padding included, to be read and held in memory.
    """
    order = sorted(members, key=lambda index: -len(rows[index]))
    widths = [len(rows[index]) - shared for index in order]

    def cost(start: int, end: int) -> int | None:
        read = (end - start) * widths[start]
        # Tokens read before are in a row's cache, which takes memory but no time.
        held = read + (end - start) * shared
        return None if read > budget or held > 4 * budget else read + _WORTHWHILE

    for start, end in divide(len(order), cost):
        yield order[start:end]


class _Scores:
    """Log-likelihoods, accumulated as logits are read.

    Parameters
    ----------
    pairs : list of Pair
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self.tokens = [pair.tokens for pair in pairs]
        self.rows = [tokens[:-1] for tokens in self.tokens]
        self._starts = [len(pair.context) - 1 for pair in pairs]
        self.totals = [0.0] * len(pairs)
        self.greedy = [True] * len(pairs)

    def add(
        self, reading: Reading, lines: list[tuple[int, list[int]]], first: int, end: int
    ) -> None:
        """Add the predictions at positions ``first`` to ``end`` of rows.

        Parameters
        ----------
        reading : Reading
            Reading of those positions.
        lines : list of (int, list of int)
            Lines of the batch, each with the rows that it stands for.
        first, end : int
        """
        asked: dict[tuple[int, int], list[int]] = {}
        for line, members in lines:
            for index in members:
                for place in range(
                    max(first, self._starts[index]), min(end, len(self.rows[index]))
                ):
                    asked.setdefault((line, place - first), []).append(index)
        if not asked:
            return
        where, places = (torch.tensor(each) for each in zip(*asked, strict=True))
        waiting = iter(asked.items())
        for logits in reading.logits(lambda x: x[where, places]):
            for (part,) in few_rows(logits):
                wanted = [
                    (row, index, self.tokens[index][place + first + 1])
                    for row, ((_, place), members) in enumerate(islice(waiting, len(part)))
                    for index in members
                ]
                self._take(part, wanted)

    def _take(self, logits: torch.Tensor, wanted: list[tuple[int, int, int]]) -> None:
        """Add logits: for each wanted value, its row, the index of its pair and its token."""
        rows, _, targets = torch.tensor(wanted, device=logits.device).T
        values = token_log_probabilities("logits", logits, targets, rows)
        best = logits[rows, targets] == logits.amax(dim=-1)[rows]
        # Of equally probable tokens, the first is the greedy one.
        if best.any():
            best[best.clone()] = logits[rows[best]].argmax(dim=-1) == targets[best]
        for (_, index, _), value, same in zip(wanted, values.tolist(), best.tolist(), strict=True):
            self.totals[index] += value
            self.greedy[index] &= same


def _run(model: Any, scores: _Scores, job: _Job, budget: int) -> None:
    """Read the common prefixes of families, then the rest of each row."""
    shared = job.shared
    lines = {index: k for k, family in enumerate(job.families) for index in family.members}
    reading = None
    if shared:
        begins = [scores.rows[family.members[0]][:shared] for family in job.families]
        reading = Reading(model, placed(model, torch.tensor(begins)), use_cache=True)
        together = [(k, list(family.members)) for k, family in enumerate(job.families)]
        scores.add(reading, together, 0, shared)
    longer = [index for index in lines if len(scores.rows[index]) > shared]
    for part in _by_length(scores.rows, longer, budget, shared):
        rows = [scores.rows[index][shared:] for index in part]
        width = max(map(len, rows))
        # A token that no model recognizes as padding, which would cause a warning.
        ids = torch.tensor([[*row, *([row[0]] * (width - len(row)))] for row in rows])
        arguments: dict[str, Any] = {}
        if reading is not None:
            origins = torch.tensor([lines[index] for index in part])
            arguments = reading.onward(placed(model, origins))
        further = Reading(model, placed(model, ids), **arguments)
        scores.add(further, [(k, [index]) for k, index in enumerate(part)], shared, shared + width)
