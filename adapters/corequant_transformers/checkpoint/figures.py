"""Results of ``evaluate`` as flat values for a report, and as a section of a model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["SECTION", "Figure", "evaluation_section", "figures", "flat", "merged", "plain_name"]

SECTION = "## Evaluation\n"
"""The last section of a model card."""

_TASK = "task."
_OF_FLOAT = "  of the float model"

_ROWS = (
    ("perplexity", "perplexity", 3, 1),
    ("reference_perplexity", _OF_FLOAT, 3, 1),
    ("excess", "  excess loss, nats per token", 4, 1),
    ("kl", "KL divergence, nats per token", 4, 1),
    ("kl_median", "  median", 4, 1),
    ("kl_p999", "  99.9 % of tokens below", 3, 1),
    ("top1", "same most probable token, %", 2, 100),
    ("top5", "same five most probable, %", 2, 100),
)
"""Key, name, digits after the point, and factor of the unit that it is shown in."""

_UNKNOWN = (
    "Perplexity and distance from the float model were not measured yet; `corequant evaluate . "
    "--against MODEL --text FILE` measures them and writes them here.\n"
)


@dataclass(frozen=True)
class Figure:
    """A measured number as it is shown.

    Attributes
    ----------
    name : str
        What it is; it begins with two spaces where it belongs to the figure above.
    value : str
    error : str
        Its standard error, or nothing.
    """

    name: str
    value: str
    error: str


def flat(
    measured: Mapping[str, Any] | None,
    tasks: list[dict[str, Any]],
    *,
    text: str = "",
    against: str = "",
) -> dict[str, Any]:
    """Return results as flat values, with the names of the data that they were measured on.

    Parameters
    ----------
    measured : mapping, optional
        ``Evaluation.to_dict()``.
    tasks : list of dict
        ``TaskResult.to_dict()`` of each.
    text, against : str
        Names of the text and of the float model, without their folders.

    Examples
    --------
    >>> from corequant_transformers.checkpoint.figures import flat
    >>> flat({"perplexity": 18.5}, [{"name": "quiz", "acc": 0.5}], text="test.txt")
    {'perplexity': 18.5, 'text': 'test.txt', 'task.quiz.acc': 0.5}
    """
    found: dict[str, Any] = {}
    if measured is not None:
        found |= {**measured, "text": text} | ({"against": against} if "kl" in measured else {})
    for task in tasks:
        start = f"{_TASK}{task['name']}."
        for key, value in task.items():
            if key == "name":
                continue
            if isinstance(value, Mapping):
                nested = key.removesuffix("comparison")
                found |= {f"{start}{nested}{k}": v for k, v in value.items()}
            else:
                found[start + key] = value
        if "acc_comparison" in task:
            found[f"{start}against"] = against
    return found


def merged(before: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Merge new figures into earlier ones: those of a text replace all of a text, a task's its own.

    Parameters
    ----------
    before : dict
        What a report holds; anything else counts as nothing.
    found : mapping
        As ``flat`` returns.

    Examples
    --------
    >>> from corequant_transformers.checkpoint.figures import merged
    >>> merged({"perplexity": 19.0, "kl": 0.1, "task.quiz.acc": 0.5}, {"perplexity": 18.5})
    {'perplexity': 18.5, 'task.quiz.acc': 0.5}
    """
    replaced = {_part(name) for name in found}
    kept = before if isinstance(before, Mapping) else {}
    both = {**{k: v for k, v in kept.items() if _part(k) not in replaced}, **found}
    # Those of a text come first, whichever was measured last.
    return {k: both[k] for k in sorted(both, key=lambda k: k.startswith(_TASK))}


def figures(values: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the figures measured on a text, in display order."""
    for key, name, digits, unit in _ROWS:
        if _is_number(values.get(key)):
            yield _figure(values, key, name, digits, unit)


def evaluation_section(values: Any) -> str:
    """Return the section of a model card.

    Parameters
    ----------
    values : dict
        As ``merged`` returns; anything else, and nothing, counts as not measured.
    """
    found = values if isinstance(values, Mapping) else {}
    parts = [*_on_text(found), *_on_tasks(found)]
    if not parts:
        return f"{SECTION}\n{_UNKNOWN}"
    told = "Measured by `corequant evaluate`; ± is a standard error.\n"
    return "\n".join([SECTION, told, *parts])


def _on_text(values: Mapping[str, Any]) -> Iterator[str]:
    rows = list(figures(values))
    if not rows:
        return
    count, length = (values.get(key) for key in ("windows", "sequence_length"))
    on = ""
    if _is_number(count) and _is_number(length):
        on = f"{count} window{'' if count == 1 else 's'} of {length} tokens"
    text, against = (_name(values.get(key)) for key in ("text", "against"))
    yield _table(
        f"On {on} of `{text}`" if on and text else f"On {on or 'a text'}",
        f", against `{against}`" if against else "",
        rows,
    )


def _on_tasks(values: Mapping[str, Any]) -> Iterator[str]:
    suffix = ".acc"
    for key in values:
        if not (key.startswith(_TASK) and key.endswith(suffix) and _is_number(values[key])):
            continue
        start = key.removesuffix("acc")
        rows = []
        for name in ("acc", "acc_norm"):
            if _is_number(values.get(start + name)):
                rows.append(_figure(values, start + name, f"{name}, %", 2, 100))
            if _is_number(values.get(f"{start}{name}_reference")):
                rows.append(_figure(values, f"{start}{name}_reference", _OF_FLOAT, 2, 100))
        count, title = values.get(f"{start}count"), _name(start[len(_TASK) : -1])
        against = _name(values.get(f"{start}against"))
        yield _table(
            f"On {count} questions of `{title}`" if _is_number(count) else f"On `{title}`",
            f", against `{against}`" if against else "",
            rows,
        )


def _table(title: str, more: str, rows: list[Figure]) -> str:
    lines = [f"{title}{more}:", "", "| | value | ± |", "|---|--:|--:|"]
    # Markdown drops the spaces of what belongs to the figure above.
    names = ["&emsp;" * row.name.startswith("  ") + row.name.strip() for row in rows]
    lines += [f"| {n} | {r.value} | {r.error} |" for n, r in zip(names, rows, strict=True)]
    return "\n".join(lines) + "\n"


def _figure(values: Mapping[str, Any], key: str, name: str, digits: int, unit: int) -> Figure:
    value, error = values[key], values.get(f"{key}_se", "")
    spread = f"{unit * error:.{digits}f}" if _is_number(error) else ""
    return Figure(name, f"{unit * value:.{digits}f}", spread)


def _part(name: str) -> str:
    """Return the task that a key is about; nothing for those of a text."""
    return name.rpartition(".")[0] if name.startswith(_TASK) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(value: Any) -> str:
    return plain_name(value) if isinstance(value, str) else ""


def plain_name(text: str) -> str:
    """Return a name without characters that are special in Markdown, HTML or terminals."""
    kept = "".join(c if c.isprintable() and c not in "`<>|[]*#\\" else "_" for c in text)
    return kept.encode("utf-8", "replace").decode()[:80]
