"""Zero-shot accuracy of a model, alone or compared with its float model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index
from corequant.errors import TaskError
from corequant_transformers.evaluation.continuations import BATCH_TOKENS, Pair, score_pairs
from corequant_transformers.evaluation.encoding import encode_item, longest_input
from corequant_transformers.evaluation.measurement import (
    check_vocabulary,
    reference_model,
    replica_of,
)
from corequant_transformers.evaluation.results import TaskResult, judged
from corequant_transformers.evaluation.task_files import Task, read_task
from corequant_transformers.model.replicas import check_given
from corequant_transformers.model.surroundings import device_of, undisturbed

__all__ = ["evaluate_tasks"]

Values = npt.NDArray[np.float64]


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
        Random seed of the comparison's bootstrap.
    progress : callable
        Called as ``progress(task's name, done, total)``, counting choices, of both models.

    Returns
    -------
    list of TaskResult
        One for each task. ``result.beside(other)`` compares with an existing result.

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
        found: list[TaskResult] = []
        for one in models:
            report = partial(_report, progress, task.name, len(found) * total // len(models), total)
            found.append(judged(task, _scores(one, items, budget, report)))
        results.append(found[0] if against is None else found[0].beside(found[1], seed))
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
