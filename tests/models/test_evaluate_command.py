"""``corequant evaluate`` against the float model and on tasks, in one process."""

from __future__ import annotations

import json
import sys

import pytest

import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_cli import app
from corequant_cli.tables import console
from tests.models.test_checkpoint import word_level

TEXT = "a b c d e f g h i j k l m n o p " * 20
CHOICE = [
    {"query": "a b c", "choices": ["d e", "f", "g h i"], "gold": k % 3, "extra": k}
    for k in range(7)
]
PAIRS = [{"good": "a b c", "bad": "c b a"}, {"good": "d a e", "bad": "a a a"}]


@pytest.fixture(scope="module")
def folder(tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate")
    model = cqhf.tiny_model("llama", eos_token_id=1)
    model.save_pretrained(path / "float")
    word_level(path / "float")
    file = path / "float" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "z"}))
    cqhf.quantize(path / "float", Recipe(weights="int3:channel"), tokens, path / "own")
    (path / "text.txt").write_text(TEXT)
    (path / "tasks").mkdir()
    for name, lines in (("choice", CHOICE), ("pairs", PAIRS)):
        file = path / "tasks" / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Run the command in the folder, on so many columns, and return status, output and errors."""

    def run(*arguments, columns=80):
        monkeypatch.setattr(sys, "argv", ["corequant", "evaluate", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.chdir(folder)
        console.console.cache_clear()
        capsys.readouterr()
        status = app.run()
        console.console.cache_clear()
        return status, *capsys.readouterr()

    return run


WINDOWS = ("--text", "text.txt", "--sequence-length", 64)
TASKS = ("--tasks", "tasks/choice.jsonl", "--tasks", "tasks/pairs.jsonl")


def test_one_json_object_has_everything(command, folder):
    status, printed, _ = command("own", *WINDOWS, "--against", "float", *TASKS, "--json")
    assert status == 0
    found = json.loads(printed)
    model, tokenizer = cqhf.load(folder / "own"), cqhf.load_tokenizer(folder / "own")
    wanted = cqhf.evaluate(
        model, TEXT, tokenizer, against=folder / "float", sequence_length=64
    ).to_dict()
    assert {"perplexity", "kl", "top1", "top5", "kl_p999"} <= set(wanted)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
    tasks = cqhf.evaluate_tasks(
        model, [folder / "tasks" / "choice.jsonl", folder / "tasks" / "pairs.jsonl"], tokenizer,
        against=folder / "float",
    )  # fmt: skip
    for own, other in zip(found["tasks"], tasks, strict=True):
        assert own == json.loads(json.dumps(other.to_dict()))
    assert [task["name"] for task in found["tasks"]] == ["tasks/choice", "tasks/pairs"]
    assert (found["model"], found["against"]) == ("own", "float")


def test_each_part_alone(command):
    found = json.loads(command("own", *WINDOWS, "--json")[1])
    assert "perplexity" in found
    assert not {"kl", "tasks", "against"} & set(found)
    found = json.loads(command("float", *TASKS, "--limit", 2, "--json")[1])
    assert not {"perplexity", "kl"} & set(found)
    assert [task["count"] for task in found["tasks"]] == [2, 2]
    assert "acc_comparison" not in found["tasks"][0]


@pytest.mark.parametrize("columns", [60, 120])
def test_tables_fit_the_terminal(columns, command):
    status, printed, _ = command("own", *WINDOWS, "--against", "float", *TASKS, columns=columns)
    assert status == 0
    lines = printed.splitlines()
    assert max(map(len, lines)) <= columns
    for words in (
        "perplexity", "of the float model", "KL divergence", "99.9 %", "same most probable",
        "tasks/choice: 7 questions, multiple choice", "difference", "McNemar", "standard error",
    ):  # fmt: skip
        assert any(words in line for line in lines), words
    # No figure is cut short or wrapped.
    assert "…" not in printed
    (line,) = (line for line in lines if "acc_norm" in line)
    assert len(line.split()) == 7
    alone = command("own", *WINDOWS, *TASKS, columns=columns)[1]
    assert "perplexity" in alone
    assert "KL" not in alone
    assert "McNemar" not in alone


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["own"], 2, "--text or --tasks must be given. See 'corequant evaluate --help'."),
        (["own", "--tasks", "text.txt"], 1, "line 1 of text.txt must be a JSON object"),
        (["own", "--tasks", "none.jsonl"], 1, "tasks must be a readable UTF-8 file"),
        (["own", *TASKS, "--limit", "0"], 2, "limit"),
        (["own", *WINDOWS, "--against", "nowhere"], 1, "must be a directory with config.json"),
    ],
)
def test_errors_are_one_line(arguments, status, words, command):
    found, printed, errors = command(*arguments)
    assert (found, printed) == (status, "")
    assert words in errors
    assert len(errors.splitlines()) == 1
