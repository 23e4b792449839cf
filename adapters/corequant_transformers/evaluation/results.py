"""A model's accuracy on a task, alone or compared with another model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.errors import TaskError
from corequant_transformers.evaluation.comparison import Comparison, compare
from corequant_transformers.evaluation.statistics import mean_with_error
from corequant_transformers.evaluation.task_files import CHOICE, Task

__all__ = ["Accuracy", "TaskResult", "judged"]

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered correctly, alone and compared with a reference.

    Attributes
    ----------
    value : float
    se : float or None
        Standard error of the mean over questions; None for a single one.
    right : numpy.ndarray (questions,), float64
        1 for each that is right, 0 for each other.
    reference, reference_se : float or None
        Value and error of the reference, if there is one.
    comparison : Comparison or None
        The two on the same questions.
    """

    value: float
    se: float | None
    right: Values = field(repr=False, compare=False)
    reference: float | None = None
    reference_se: float | None = None
    comparison: Comparison | None = None

    @classmethod
    def of(cls, right: Values) -> Accuracy:
        """Return the accuracy of answers."""
        return cls(*mean_with_error(right[:, None]), right)

    def beside(self, reference: Accuracy, seed: int) -> Accuracy:
        """Return this accuracy compared with that of a reference on the same questions."""
        return Accuracy(
            self.value,
            self.se,
            self.right,
            reference.value,
            reference.se,
            compare(self.right, reference.right, seed),
        )


@dataclass(frozen=True, eq=False)
class TaskResult:
    """A model's result on a task.

    Attributes
    ----------
    task : Task
    acc : Accuracy
        By the greatest sum of log-probabilities of a choice's tokens.
    acc_norm : Accuracy or None
        By the greatest sum divided by the choice's length in characters; None for minimal pairs.
    likelihoods : tuple of numpy.ndarray (choices,), float64
        Each question's sums of log-probabilities, in nats.
    """

    task: Task = field(repr=False)
    acc: Accuracy
    acc_norm: Accuracy | None
    likelihoods: tuple[Values, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def kind(self) -> str:
        """The task's kind."""
        return self.task.kind

    @property
    def count(self) -> int:
        """Number of questions."""
        return len(self.task.items)

    def beside(self, reference: TaskResult, seed: int = 0) -> TaskResult:
        """Return this result compared with that of another model, which may be reused.

        Parameters
        ----------
        reference : TaskResult
            Result of another model on the same questions.
        seed : int
            Random seed of the comparison's bootstrap.

        Raises
        ------
        TaskError
            If the questions differ.
        """
        if self.task.items != reference.task.items:
            raise TaskError(
                f"reference must answer the same questions, got {reference.count} of "
                f"{reference.name} and {self.count} of {self.name}"
            )
        norm = None
        if self.acc_norm is not None and reference.acc_norm is not None:
            norm = self.acc_norm.beside(reference.acc_norm, seed)
        return replace(self, acc=self.acc.beside(reference.acc, seed), acc_norm=norm)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without those of single questions."""
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


def judged(task: Task, likelihoods: Sequence[Values]) -> TaskResult:
    """Return the accuracy by sums of log-probabilities (choices,) of each question."""
    lengths = [np.array([len(choice) for choice in item.choices]) for item in task.items]
    norms = [sums / length for sums, length in zip(likelihoods, lengths, strict=True)]
    norm = Accuracy.of(_right(task, norms)) if task.kind == CHOICE else None
    return TaskResult(task, Accuracy.of(_right(task, likelihoods)), norm, tuple(likelihoods))


def _right(task: Task, scores: Sequence[Values]) -> Values:
    """Return 1 for each question whose right choice has the greatest score, and 0 elsewhere."""
    # Of equal scores the first counts, as in lm-evaluation-harness.
    pairs = zip(task.items, scores, strict=True)
    return np.array([float(int(score.argmax()) == item.gold) for item, score in pairs])
