"""Zero-shot accuracy of quantized models against the float model, question by question.

Usage: python bench/bench_tasks.py --model M --tasks blimp.jsonl --tasks hellaswag.jsonl --json J
       [--limit N] [--table] [--write] NAME=FOLDER ...

M is the float model, a directory or a GGUF file; each FOLDER holds a quantized one. If NAME is a
preset's, the model must have been made with the preset's current recipe. Whether each answer is
right is saved in J after every few questions, so that an interrupted run can be resumed, and the
float model answers only once. J is for one set of questions and models: others under the same names
are refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markdown import write_section

import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.checkpoint.reader import is_quantized
from corequant_transformers.evaluation.comparison import compare
from corequant_transformers.evaluation.results import Accuracy
from corequant_transformers.evaluation.task_files import Task

PIECE = 250
"""Number of questions between two saves of answers."""

FLOAT = "float"

QUESTIONS = {
    "blimp": "BLiMP's questions are 40 pairs of each of its 67 paradigms.",
    "hellaswag": "HellaSwag's questions are the first ones of 2,000 of its validation set.",
}
"""Which questions of a task the section's figures are from."""


def digest(path: Path) -> str:
    """Return a digest of a file, or of a directory's weights."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()[:16]


def check_recipe(name: str, folder: Path) -> None:
    """Raise for a preset's name and a directory that another recipe made."""
    if name not in Recipe.presets():
        return
    made = Recipe.from_toml((folder / "recipe.toml").read_text(encoding="utf-8"))
    # A directory has what "auto" came to.
    if made != Recipe.preset(name, dtype=made.dtype):
        raise SystemExit(f"{folder} must hold a model made by preset {name}, got another recipe")


def load(path: Path) -> tuple[Any, Any]:
    """Return a model and its tokenizer."""
    if is_quantized(path):
        return cqhf.load(path), cqhf.load_tokenizer(path)
    source = cqhf.Source(path)
    return source.load(), source.tokenizer()


def answer(
    model: Any, tokenizer: Any, task: Task, cell: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Add answers to those in ``cell``, as strings of 0 (wrong) and 1 (right), to the last."""
    while (start := len(cell["acc"])) < len(task.items):
        begin = time.process_time()
        piece = Task(task.name, task.kind, task.items[start : start + PIECE])
        (result,) = cqhf.evaluate_tasks(model, [piece], tokenizer)
        cell["acc"] += _digits(result.acc)
        if result.acc_norm is not None:
            cell["acc_norm"] = cell.get("acc_norm", "") + _digits(result.acc_norm)
        cell["seconds"] = round(cell["seconds"] + time.process_time() - begin, 1)
        keep()


def _digits(accuracy: Accuracy) -> str:
    return "".join("01"[int(right)] for right in accuracy.right)


def _right(digits: str, count: int) -> npt.NDArray[np.float64]:
    return np.array([float(digit) for digit in digits[:count]])


def table(found: dict[str, Any]) -> list[str]:
    """Return rows of Markdown: each task, each model that has answered, beside the float one."""
    rows = []
    for task, cells in found.items():
        reference = cells.get(FLOAT)
        for name, cell in cells.items():
            count = len(cell["acc"])
            if name != FLOAT:
                count = min(count, len(reference["acc"]) if reference else 0)
            if not count:
                continue
            row = [task.partition("/")[0], name, str(count)]
            for metric in ("acc", "acc_norm"):
                if metric not in cell:
                    row += ["", "", ""]
                    continue
                right = _right(cell[metric], count)
                own = Accuracy.of(right)
                row.append(_figure(own.value, own.se))
                if name == FLOAT:
                    row += ["", ""]
                    continue
                beside = compare(right, _right(reference[metric], count))
                row += [_figure(beside.difference, beside.difference_se), f"{beside.p:.2g}"]
            rows.append(f"| {' | '.join(row)} |")
    return rows


def _figure(value: float, error: float | None) -> str:
    """Return a share and its error in percent."""
    text = f"{100 * value:.2f}"
    return text if error is None else f"{text} ± {100 * error:.2f}"


def report(found: dict[str, Any]) -> str:
    """Return the section of bench/README.md."""
    names = dict.fromkeys(task.partition("/")[0] for task in found if table({task: found[task]}))
    questions = " ".join(QUESTIONS[name] for name in names if name in QUESTIONS)
    return "\n".join(
        [
            "## Tasks",
            "",
            "Written by `bench_tasks.py`: SmolLM2-135M-Instruct, zero-shot, in percent, each ± its "
            "standard error. A difference is that of a model's accuracy less the float model's on "
            "the same questions; p is McNemar's exact test of the questions that one of the two "
            f"alone has right. {questions}".rstrip(),
            "",
            "| task | | questions | acc | difference | p | acc_norm | difference | p |",
            "|---|---|---|---|---|---|---|---|---|",
            *table(found),
        ]
    )


def check_same(kept: dict[str, Any], names: dict[str, str]) -> None:
    """Note what names stand for, or raise where answers of something else are kept under one."""
    for name, value in names.items():
        if kept.setdefault(name, value) != value:
            raise SystemExit(f"--json must hold answers of the same {name}, got other ones")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", metavar="NAME=FOLDER", help="quantized models")
    parser.add_argument("--model", required=True, type=Path, help="float: a directory or a GGUF")
    parser.add_argument("--tasks", required=True, action="append", type=Path, help="JSON lines")
    parser.add_argument("--json", required=True, type=Path, help="answers; goes on from there")
    parser.add_argument("--limit", type=int, help="questions of each task; all by default")
    parser.add_argument("--table", action="store_true", help="only print what is in --json")
    parser.add_argument("--write", action="store_true", help="write the table to bench/README.md")
    options = parser.parse_args()
    models = {FLOAT: options.model}
    for given in options.folders:
        name, equals, folder = given.partition("=")
        if not equals:
            parser.error(f"a quantized model must be given as NAME=FOLDER, got {given}")
        models[name] = Path(folder)
        check_recipe(name, models[name])
    tasks = {file: cqhf.read_task(file, options.limit) for file in options.tasks}
    found: dict[str, Any] = {"digests": {}, "answers": {}}
    if options.json.exists():
        found = json.loads(options.json.read_text(encoding="utf-8"))
    check_same(found["digests"], {name: digest(path) for name, path in models.items()})
    check_same(found["digests"], {task.name: digest(file) for file, task in tasks.items()})

    def keep() -> None:
        part = options.json.with_name(f"{options.json.name}.part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(part, options.json)

    for task in tasks.values():
        cells = found["answers"].setdefault(task.name, {})
        for name, path in models.items():
            cell = cells.setdefault(name, {"acc": "", "seconds": 0.0})
            if len(cell["acc"]) < len(task.items) and not options.table:
                answer(*load(path), task, cell, keep)
                print("\n".join(table({task.name: cells})), flush=True)
    section = report(found["answers"])
    print(section)
    if options.write:
        write_section("tasks", section)


if __name__ == "__main__":
    main()
