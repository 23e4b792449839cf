"""bench_tasks.py: a run that was ended goes on, and its table has the figures of ``evaluate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import corequant_transformers as cqhf
from corequant.recipe import Recipe
from tests.models.test_checkpoint import word_level

BENCH = str(Path(__file__).parents[2] / "bench")


@pytest.fixture(name="script")
def _script(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import bench_tasks

    monkeypatch.setattr(bench_tasks, "PIECE", 3)
    yield bench_tasks
    for name in ("bench_tasks", "markdown"):
        sys.modules.pop(name, None)


@pytest.fixture(name="given")
def _given(tokens, tmp_path):
    """Return options: a float model, a preset's and another one, and questions."""
    model = cqhf.tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 30
    model.save_pretrained(tmp_path / "float")
    word_level(tmp_path / "float")
    tokenizer = json.loads((tmp_path / "float" / "tokenizer_config.json").read_text())
    tokenizer["eos_token"] = "a"
    (tmp_path / "float" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    recipe = Recipe(block_size=16, weights="int2:channel", activations=None)
    cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "two")
    generator = np.random.default_rng(0)

    def text(count):
        return " ".join(map(chr, generator.integers(97, 123, count)))

    lines = [
        {"ctx": text(9), "endings": [text(4) for _ in range(4)], "label": k % 4} for k in range(10)
    ]
    pairs = [{"good": text(5), "bad": text(5)} for _ in range(7)]
    for name, rows in (("choice", lines), ("pairs", pairs)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [
        "--model", tmp_path / "float", "--json", tmp_path / "J",
        "--tasks", tmp_path / "pairs" / "test.jsonl", "--tasks", tmp_path / "choice" / "test.jsonl",
        f"int2={tmp_path / 'two'}",
    ]  # fmt: skip


def run(script, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["bench_tasks.py", *map(str, options)])
    script.main()


def test_a_run_that_was_ended_goes_on(script, given, tmp_path, monkeypatch, capsys):
    read, calls = cqhf.evaluate_tasks, []

    def ended(model, tasks, tokenizer):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(len(tasks[0].items))
        return read(model, tasks, tokenizer)

    monkeypatch.setattr(cqhf, "evaluate_tasks", ended)
    with pytest.raises(KeyboardInterrupt):
        run(script, monkeypatch, *given)
    assert calls == [3, 3, 1, 3, 3]
    capsys.readouterr()
    run(script, monkeypatch, *given, "--table")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| pairs |")]
    assert [row.split(" | ")[1:3] for row in rows] == [["float", "7"], ["int2", "6"]]
    assert calls == [3, 3, 1, 3, 3]
    monkeypatch.setattr(
        cqhf, "evaluate_tasks", lambda *a: calls.append(len(a[1][0].items)) or read(*a)
    )
    run(script, monkeypatch, *given)
    assert calls == [3, 3, 1] * 2 + [3, 3, 3, 1] * 2
    capsys.readouterr()
    run(script, monkeypatch, *given)
    assert len(calls) == 14
    printed = capsys.readouterr().out
    loaded, tokenizer = cqhf.load(tmp_path / "two"), cqhf.load_tokenizer(tmp_path / "two")
    for name, kind in (("pairs", ("acc",)), ("choice", ("acc", "acc_norm"))):
        file = tmp_path / name / "test.jsonl"
        (result,) = read(loaded, [file], tokenizer, against=tmp_path / "float")
        (row,) = (line for line in printed.splitlines() if line.startswith(f"| {name} | int2 "))
        for metric in kind:
            accuracy = getattr(result, metric)
            other = accuracy.comparison
            assert other.only_model + other.only_reference > 0
            assert (
                f"| {100 * accuracy.value:.2f} ± {100 * accuracy.se:.2f} | "
                f"{100 * other.difference:.2f} ± {100 * other.difference_se:.2f} | {other.p:.2g} |"
            ) in row
        assert f"| {name} | float | {result.count} | {100 * result.acc.reference:.2f} ±" in printed


def test_what_is_refused(script, given, tokens, tmp_path, monkeypatch):
    preset = f"w4a16={tmp_path / 'two'}"
    with pytest.raises(SystemExit, match="made by preset w4a16, got another recipe"):
        run(script, monkeypatch, *given, preset)
    run(script, monkeypatch, *given, "--limit", 2)
    file = tmp_path / "choice" / "test.jsonl"
    file.write_text(file.read_text().replace('"label": 0', '"label": 1'))
    with pytest.raises(SystemExit, match="answers of the same choice/test, got other ones"):
        run(script, monkeypatch, *given)
    with pytest.raises(SystemExit):
        run(script, monkeypatch, *given, tmp_path / "two")


def test_the_section_names_the_tasks_that_were_measured_and_no_others(script):
    answers = {"blimp/1": {"float": {"acc": "10"}}, "hellaswag/2": {"float": {"acc": ""}}}
    section = script.report(answers)
    assert "has right. BLiMP's questions are" in section
    assert "HellaSwag" not in section
    answers["hellaswag/2"]["float"]["acc"] = "1"
    assert "paradigms. HellaSwag's questions are" in script.report(answers)
    assert "has right.\n" in script.report({})
    readme = (Path(BENCH) / "README.md").read_text(encoding="utf-8")
    measured = {"blimp": {"float": {"acc": "1"}}, "hellaswag": {"float": {"acc": "1"}}}
    shown = {task: cells for task, cells in measured.items() if f"\n| {task} |" in readme}
    assert script.report(shown).split("\n\n")[1] in readme
