"""Zero-shot accuracy of a model, alone or beside the one that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index
from corequant.errors import TaskError
from corequant_transformers.evaluation.comparison import Comparison, compare
from corequant_transformers.evaluation.continuations import BATCH_TOKENS, Pair, score_pairs
from corequant_transformers.evaluation.encoding import encode_item, longest_input
from corequant_transformers.evaluation.measurement import (
    check_vocabulary,
    reference_model,
    replica_of,
)
from corequant_transformers.evaluation.statistics import mean_with_error
from corequant_transformers.evaluation.task_files import CHOICE, Task, read_task
from corequant_transformers.model.replicas import check_given
from corequant_transformers.model.surroundings import device_of, undisturbed

__all__ = ["Accuracy", "TaskResult", "evaluate_tasks"]

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Accuracy:
    """Share of questions that a model has right, and beside a reference.

    Attributes
    ----------
    value : float
    se : float or None
        Standard error of the mean over questions; None for a single one.
    reference, reference_se : float or None
        The same of the reference, if there is one.
    comparison : Comparison or None
        The two on the same questions.
    """

    value: float
    se: float | None
    reference: float | None = None
    reference_se: float | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True, eq=False)
class TaskResult:
    """What a model has right of a task.

    Attributes
    ----------
    name, kind : str
        The task's.
    count : int
        Questions.
    acc : Accuracy
        By the greatest sum of log-probabilities of a choice's tokens.
    acc_norm : Accuracy or None
        By the greatest sum divided by the choice's length in characters; None for minimal pairs.
    likelihoods : tuple of numpy.ndarray (choices,), float64
        Each question's sums of log-probabilities, in nats, of the model.
    """

    name: str
    kind: str
    count: int
    acc: Accuracy
    acc_norm: Accuracy | None
    likelihoods: tuple[Values, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the log-likelihoods."""
        found: dict[str, Any] = {"name": self.name, "kind": self.kind, "count": self.count}
        for name, accuracy in (("acc", self.acc), ("acc_norm", self.acc_norm)):
            if accuracy is None:
                continue
            found |= {name: accuracy.value, f"{name}_se": accuracy.se}
            if accuracy.comparison is not None:
                found |= {
                    f"{name}_reference": accuracy.reference,
                    f"{name}_reference_se": accuracy.reference_se,
                    f"{name}_comparison": accuracy.comparison.to_dict(),
                }
        return found


@undisturbed()
def evaluate_tasks(
    model: Any,
    tasks: Iterable[str | Path | Task],
    tokenizer: Any,
    *,
    against: Any = None,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[TaskResult]:
    """Measure zero-shot accuracy on multiple choice and minimal pairs.

    A choice's score is the sum of the log-probabilities of its tokens after the context and a
    space. Where there is no context, as for minimal pairs, the tokenizer's token for the beginning
    of a text, or else for its end, stands for it. Tokens, accuracies and standard errors are those
    of lm-evaluation-harness.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As for ``evaluate``.
    tasks : iterable of str, Path or Task
        Files of JSON lines, as ``read_task`` takes them.
    tokenizer : transformers tokenizer
    against : transformers.PreTrainedModel or str or Path, optional
        As for ``evaluate``. It answers the same questions, from the same tokens.
    limit : int, optional
        Number of questions of each task, the first ones; all by default.
    batch_tokens : int
        Tokens that are read at once at most, padding included; has no influence on results beyond
        rounding.
    seed : int
        Of the comparison's bootstrap.
    progress : callable
        Called as ``progress(task's name, done, total)``, counting choices, of both models.

    Returns
    -------
    list of TaskResult

    Raises
    ------
    ArchitectureError, BackendError, CalibrationError, CheckpointError, NonFiniteError
        As ``evaluate``.
    TaskError
        If a file can't be read, a line of it is malformed, or a choice is longer than what the
        model can read.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> from corequant_transformers.evaluation.task_files import Item, Task
    >>> class Letters:
    ...     bos_token_id, eos_token_id = None, 0
    ...     def __call__(self, text, **options):
    ...         return {"input_ids": [ord(c) for c in text]}
    ...     def decode(self, token):
    ...         return chr(token)
    >>> task = Task("animals", "multiple choice", (Item("A cat says", ("woof.", "meow."), 1),))
    >>> (found,) = cqhf.evaluate_tasks(cqhf.tiny_model("llama"), [task], Letters())
    >>> found.count, found.acc.value in (0, 1)
    (1, True)
    """
    model = check_given(model, floating=False)
    budget = check_index("batch_tokens", batch_tokens)
    given = [_first(task, limit) for task in tasks]
    encoded = [[encode_item(tokenizer, item) for item in task.items] for task in given]
    models = [model]
    if against is not None:
        models.append(reference_model(against, device_of(model)))
    for one in models:
        for items in encoded:
            ids = [token for pairs in items for p in pairs for token in p.context + p.continuation]
            check_vocabulary(one, np.array([ids]))
    results = []
    for task, items in zip(given, encoded, strict=True):
        total = len(models) * sum(map(len, items))
        scores: list[list[Values]] = []
        for one in models:
            before = len(scores) * total // len(models)
            report = partial(_report, progress, task.name, before, total)
            scores.append(_scores(one, items, budget, report))
        results.append(_result(task, scores, seed))
    return results


def _first(task: str | Path | Task, limit: int | None) -> Task:
    if not isinstance(task, Task):
        return read_task(task, limit)
    items = task.items if limit is None else task.items[: check_index("limit", limit)]
    if not items:
        raise TaskError(f"the task {task.name} must have questions, got none")
    return replace(task, items=items)


def _report(
    progress: Callable[[str, int, int], None], name: str, before: int, total: int, done: int, _: int
) -> None:
    progress(name, before + done, total)


def _scores(
    model: Any, items: list[list[Pair]], budget: int, progress: Callable[[int, int], None]
) -> list[Values]:
    """Return each question's sums of log-probabilities (choices,)."""
    pairs = [pair for choices in items for pair in choices]
    longest = longest_input(model.config)
    found = score_pairs(replica_of(model), pairs, longest, batch_tokens=budget, progress=progress)
    totals = np.array([score.total for score in found])
    ends = np.cumsum([len(choices) for choices in items])[:-1]
    return [np.array(part) for part in np.split(totals, ends)]


def _result(task: Task, scores: list[list[Values]], seed: int) -> TaskResult:
    """Return the accuracies of the model, and of the reference if there are its scores."""
    lengths = [np.array([len(c) for c in item.choices], np.float64) for item in task.items]
    accs: list[Values] = []
    norms: list[Values] = []
    for own in scores:
        accs.append(_right(task, own))
        norms.append(_right(task, [s / n for s, n in zip(own, lengths, strict=True)]))
    norm = _accuracy(norms, seed) if task.kind == CHOICE else None
    acc = _accuracy(accs, seed)
    return TaskResult(task.name, task.kind, len(task.items), acc, norm, tuple(scores[0]))


def _right(task: Task, scores: list[Values]) -> Values:
    """Return 1 for each question whose right choice has the greatest score, and 0 elsewhere."""
    # Of equal scores the first counts, as in lm-evaluation-harness.
    pairs = zip(task.items, scores, strict=True)
    return np.array([float(int(score.argmax()) == item.gold) for item, score in pairs])


def _accuracy(right: list[Values], seed: int) -> Accuracy:
    (value, se), *others = (mean_with_error(answers[:, None]) for answers in right)
    if not others:
        return Accuracy(value, se)
    return Accuracy(value, se, *others[0], compare(right[0], right[1], seed))
