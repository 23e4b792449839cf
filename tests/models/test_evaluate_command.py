"""``corequant evaluate`` against the float model and on tasks, in one process."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest

import corequant as cq
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
    shutil.copytree(path / "own", path / "untouched")
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


@pytest.fixture
def copy(folder):
    """A directory of its own."""
    shutil.rmtree(folder / "copy", ignore_errors=True)
    return shutil.copytree(folder / "untouched", folder / "copy")


def files_of(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def evaluation_of(folder):
    return json.loads((folder / "report.json").read_text())["evaluation"]


def test_what_was_measured_is_in_the_directory(command, copy):
    before = files_of(copy)
    shown = command("copy", *WINDOWS, "--against", "float")[1]
    assert "written into report.json and the model card" in " ".join(shown.split())
    after = files_of(copy)
    assert {n for n in after if before.get(n) != after[n]} == {"report.json", "README.md"}
    assert cqhf.check_digests(copy) == len(after) - 1
    found = json.loads(command("copy", *WINDOWS, "--against", "float", "--json", "--no-record")[1])
    held = evaluation_of(copy)
    assert (held["text"], held["against"]) == ("text.txt", "float")
    numbers = {name: value for name, value in held.items() if name not in ("text", "against")}
    assert numbers == {name: found[name] for name in numbers}
    report = json.loads(before["report.json"])
    assert {**json.loads(after["report.json"]), "digests": 0, "evaluation": 0} == {
        **report, "digests": 0, "evaluation": 0,
    }  # fmt: skip
    card, old = after["README.md"].decode(), before["README.md"].decode()
    assert card.partition("## Evaluation")[0] == old.partition("## Evaluation")[0]
    (row,) = re.findall(r"^\| KL divergence.* \| ([\d.]+) \| ([\d.]+) \|$", card, re.M)
    assert row == (f"{found['kl']:.4f}", f"{found['kl_se']:.4f}")
    # As it is printed.
    assert f" {row[0]} " in shown
    cqhf.load(copy)


def test_figures_of_other_texts_and_tasks_are_kept_apart(command, copy):
    command("copy", *WINDOWS, "--against", "float", *TASKS)
    held = evaluation_of(copy)
    assert held["task.tasks/choice.count"] == 7
    assert held["task.tasks/choice.acc_only_model"] >= 0
    assert all(isinstance(value, int | float | str | None) for value in held.values())
    command("copy", *WINDOWS, "--windows", 2)
    new = evaluation_of(copy)
    assert new["windows"] == 2
    assert "kl" not in new
    assert {k: v for k, v in new.items() if k[:5] == "task."} == {
        k: v for k, v in held.items() if k[:5] == "task."
    }
    command("copy", *TASKS[2:], "--limit", 1)
    last = evaluation_of(copy)
    assert (last["task.tasks/pairs.count"], last["task.tasks/choice.count"]) == (1, 7)
    assert last["perplexity"] == new["perplexity"]
    card = (copy / "README.md").read_text()
    assert card.count("## Evaluation") == 1
    assert "On 7 questions of `tasks/choice`, against `float`:\n\n| | value | ± |" in card
    cqhf.check_digests(copy)


@pytest.mark.parametrize("options", [["--no-record"], ["--json", "--no-record"]])
def test_nothing_is_written_where_it_isnt_wanted(options, command, copy):
    before = files_of(copy)
    status, printed, errors = command("copy", *WINDOWS, *options)
    assert status == 0
    assert "recorded" not in errors
    assert "written into" not in printed
    assert files_of(copy) == before


def test_a_card_that_was_changed_stays(command, copy):
    with (copy / "README.md").open("a") as file:
        file.write("Evaluated by hand.\n")
    card = (copy / "README.md").read_bytes()
    status, printed, _ = command("copy", *WINDOWS)
    assert status == 0
    assert "not into README.md, which was changed" in " ".join(printed.split())
    assert (copy / "README.md").read_bytes() == card
    assert evaluation_of(copy)["perplexity"] > 0
    # It is still known as changed.
    with pytest.raises(cq.CheckpointError, match="README.md is not as it was written"):
        cqhf.check_digests(copy)


@pytest.mark.filterwarnings("default")
def test_a_report_that_was_changed_is_not_sealed_again(command, copy):
    file = copy / "report.json"
    file.write_text(file.read_text().replace('"seconds"', '"Seconds"', 1))
    before = files_of(copy)
    status, printed, errors = command("copy", *WINDOWS, "--no-verify")
    assert status == 0
    assert "perplexity" in printed
    assert "figures were not recorded (--no-record)" in errors
    assert "report.json is not as it was written" in errors
    assert files_of(copy) == before


@pytest.mark.filterwarnings("default")
def test_a_disk_that_is_full_leaves_everything_as_it_was(command, copy, monkeypatch):
    before = files_of(copy)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("corequant_transformers.checkpoint.record.sealed_report", full)
    status, printed, errors = command("copy", *WINDOWS)
    assert status == 0
    assert "perplexity" in printed
    assert "No space left on device" in errors
    assert files_of(copy) == before


def test_links_of_a_cache_are_left_alone(command, copy, folder):
    (copy / "report.json").rename(folder / "blob")
    (copy / "report.json").symlink_to(folder / "blob")
    before = files_of(copy)
    assert command("copy", *WINDOWS, "--no-verify")[0] == 0
    assert files_of(copy) == before


def test_a_model_that_is_saved_again_has_no_old_figures(command, copy, folder, tmp_path):
    command("copy", *WINDOWS)
    cqhf.load(copy).save_pretrained(tmp_path / "again")
    assert "evaluation" not in json.loads((tmp_path / "again" / "report.json").read_text())
    assert "were not measured" in (tmp_path / "again" / "README.md").read_text()
