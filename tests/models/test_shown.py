"""What the command prints of files that others may have written, in one process."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_cli import app
from corequant_cli.tables import plans
from corequant_cli.tables.console import marked, plain
from corequant_transformers.checkpoint.reports import read_report
from corequant_transformers.files.digests import DIGESTS
from corequant_transformers.model.surroundings import limit_memory
from tests import capabilities
from tests.models.test_checkpoint import word_level
from tests.models.test_sources import edit, write

RECIPE = Recipe(block_size=16, rounding="gptq")
# The preset's groups of 32 don't divide a tiny model's width.
FITTING = ("--weights", "int4:group16")


@pytest.fixture(scope="module")
def saved(tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown") / "out"
    cqhf.quantize(cqhf.tiny_model("llama"), RECIPE, tokens, folder)
    word_level(folder)
    return folder


@pytest.fixture
def copy_of(saved, tmp_path):
    """A directory from before there were digests: what its report says is shown."""
    folder = tmp_path / "out"
    shutil.copytree(saved, folder)
    (folder / DIGESTS).unlink()
    file = folder / "config.json"
    values = json.loads(file.read_text())
    del values["quantization_config"]["digests"]
    file.write_text(json.dumps(values))
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command and return its exit status, what it printed, and its errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["corequant", *map(str, arguments)])
        capsys.readouterr()
        status = app.run()
        return status, *capsys.readouterr()

    return run


def is_printable(text):
    return all(line.isprintable() for line in text.split("\n"))


_SAMPLED = {
    "files": [{"name": "a.txt", "format": "text"}],
    "documents": 2,
    "documents_used": 2,
    "empty": 1,
    "separators": 1,
    "separator": "</s>",
    "sampling": "random",
    "seed": 0,
}
NASTY = "[/x] [bold] \x1b[31m \x07 \u202e"


@pytest.mark.filterwarnings("ignore:.*was written before:UserWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["regions"][0].update(name=NASTY, tokens=NASTY),
        lambda r: r["matrices"][0].update(name=NASTY, method=NASTY, dead_columns=3),
        lambda r: r["verification"].update(matrices_changed=NASTY),
        lambda r: r["matrices"][0].update(loss=None, loss_nearest=None),
        lambda r: r["matrices"][0].update(loss_nearest=None, relative_damping=None),
        lambda r: r["regions"][0].update(mean_block_mass=0),
        lambda r: r["regions"][0].update(unrouted=True, mean_block_mass=None),
        lambda r: r.update(extra=NASTY, notes=[NASTY]),
        lambda r: r["calibration"].update(_SAMPLED, separator=NASTY, sampling=NASTY),
        lambda r: r["calibration"].update(_SAMPLED, files=[{"name": NASTY, "format": NASTY}] * 9),
        lambda r: r.pop("calibration"),
    ],
)
def test_words_of_a_report_are_words(change, copy_of, command):
    report = json.loads((copy_of / "report.json").read_text())
    change(report)
    (copy_of / "report.json").write_text(json.dumps(report))
    for options in ((), ("--json",)):
        status, printed, _ = command("inspect", copy_of, *options)
        assert status == 0
        assert is_printable(printed)
    if "[/x]" in json.dumps([report["regions"], report["matrices"]]):
        assert "[/x]" in command("inspect", copy_of)[1].replace("\n", "")


@pytest.mark.filterwarnings("ignore:.*was written before:UserWarning")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["regions"][0].update(mean_block_mass=None), r"regions\[0\].mean_block_mass"),
        (lambda r: r["regions"][0].update(largest_block_mass="9"), "must be a number, got '9'"),
        (lambda r: r["regions"][0].pop("name"), r"regions\[0\].name of .* must be a string"),
        (lambda r: r["matrices"][1].update(loss="x"), r"matrices\[1\].loss .* a number or null"),
        (lambda r: r["matrices"][1].update(seconds=None), r"matrices\[1\].seconds"),
        (lambda r: r["matrices"][1].update(seconds=True), "must be a number, got 'True'"),
        (lambda r: r["matrices"][1].update(seconds=10**400), r"matrices\[1\].seconds"),
        (lambda r: r.update(matrices={}), "matrices of .* must be a list"),
        (lambda r: r.update(regions=[1]), r"regions\[0\] of .* must be an object"),
        (lambda r: r.update(verification=[]), "verification of .* must be an object"),
        (lambda r: r.update(verification={}), "logits_error"),
        (lambda r: r.update(calibration=None), "calibration of .* must be an object, got 'None'"),
        (lambda r: r["calibration"].update(windows="9"), "calibration.windows of"),
        (lambda r: r["calibration"].update(files=3), "calibration.files of .* must be a list"),
        (lambda r: r["calibration"].update(files=[3]), "calibration.documents of"),
        (lambda r: r["calibration"].update(_SAMPLED, skipped=1), "calibration.skipped of"),
        (lambda r: r["calibration"].update(_SAMPLED, files=[3]), r"calibration.files\[0\] of"),
        (lambda r: r["calibration"].update(_SAMPLED, seed=None), "calibration.seed of"),
    ],
)
def test_reports_of_other_values_are_refused(change, words, copy_of, command):
    report = json.loads((copy_of / "report.json").read_text())
    change(report)
    (copy_of / "report.json").write_text(json.dumps(report))
    with pytest.raises(cq.CheckpointError, match=words):
        read_report(copy_of)
    status, printed, errors = command("inspect", copy_of)
    assert (status, printed, len(errors.splitlines())) == (1, "", 1)


def test_inspecting_compares_files(saved, command, tmp_path):
    folder = tmp_path / "out"
    cqhf.quantize(cqhf.tiny_model("llama"), Recipe(block_size=16), [[1, 2, 3]] * 2, folder)
    assert "6 files match their digests" in command("inspect", folder)[1]
    (folder / "report.json").write_text((folder / "report.json").read_text() + " ")
    status, _, errors = command("inspect", folder)
    assert status == 1
    assert "report.json is not as it was written" in errors
    status, printed, _ = command("inspect", folder, "--no-verify")
    assert status == 0
    assert "match their digests" not in printed


@capabilities.names
@pytest.mark.filterwarnings("always::UserWarning")
def test_a_warning_is_one_line_that_a_terminal_may_see(copy_of, command, tmp_path):
    nasty = tmp_path / "a\x1b[31m\nb"
    copy_of.rename(nasty)
    status, _, errors = command("inspect", nasty)
    assert status == 0
    assert "was written before corequant kept digests" in errors
    assert is_printable(errors)
    assert len(errors.splitlines()) == 1


# ---- names and errors


def test_text_is_printable():
    assert plain("plain é ×") == "plain é ×"
    assert plain("\x1b[2J\r\n\u2028\udc80") == r"\x1b[2J\r\n\u2028\udc80"
    assert marked("[/x]\x07") == r"\[/x]\x07"


@pytest.mark.parametrize("name", ["a\x1b[31mb", "two\nlines", "\udc80", "[/x]", "\u202e"])
def test_names_of_files_are_printable(name, command, tmp_path):
    folder = tmp_path / name
    for arguments in (
        ("plan", folder),
        ("inspect", folder),
        ("evaluate", folder, "--text", tmp_path / name),
        ("plan", folder, "--recipe", tmp_path / name),
    ):
        status, printed, errors = command(*arguments)
        assert (status, printed) == (1, "")
        assert len(errors.splitlines()) == 1
        assert is_printable(errors)
        assert plain(name).strip("\n") in errors or "\n" in name


@capabilities.names
@pytest.mark.filterwarnings("ignore:.*was written before:UserWarning")
def test_names_of_directories_and_types_are_printable(copy_of, command, tmp_path):
    nasty = tmp_path / "a\x1b[31m[x]\u202e"
    copy_of.rename(nasty)
    (nasty / "added\x07.txt").write_text("")
    status, printed, _ = command("inspect", nasty)
    assert status == 0
    assert is_printable(printed)
    folder = edit(write(tmp_path / "model"), model_type="x\x1b]0;title\x07")
    status, printed, errors = command("plan", folder)
    assert status == 1
    assert is_printable(printed + errors)


def test_plans_and_reports_of_directories_with_brackets(command, tmp_path):
    folder = write(tmp_path / "[red]" / "[" / "red]")
    assert command("plan", folder, *FITTING)[0] == 0


# ---- what is read and written


@capabilities.pipes
def test_pipes_are_not_waited_for(command, tmp_path):
    folder, pipe = write(tmp_path / "model"), tmp_path / "pipe"
    os.mkfifo(pipe)
    output = ("-o", tmp_path / "out", "--calibration", pipe)
    for arguments in (
        ("quantize", folder, *output),
        ("quantize", folder, *output, "--recipe", pipe),
        ("evaluate", folder, "--text", pipe),
        ("evaluate", folder, "--text", "/dev/zero"),
        ("inspect", folder, "--text", pipe),
        ("plan", folder, "--recipe", pipe),
    ):
        status, _, errors = command(*arguments)
        assert status == 1
        assert "where a regular file is expected" in errors


def test_a_byte_order_mark_changes_nothing(command, tmp_path):
    folder = write(tmp_path / "model")
    text = "a b c d e f g h " * 20
    (tmp_path / "plain").write_text(text, encoding="utf-8")
    (tmp_path / "marked").write_text(text, encoding="utf-8-sig")
    (tmp_path / "recipe").write_text(Recipe(block_size=32).to_toml(), encoding="utf-8-sig")
    found = [
        json.loads(command("evaluate", folder, "--text", tmp_path / name, "--sequence-length", 32,
                           "--json")[1])
        for name in ("plain", "marked")
    ]  # fmt: skip
    assert [f.pop("data")["files"][0]["name"] for f in found] == ["plain", "marked"]
    assert found[0] == found[1]
    plan = json.loads(command("plan", folder, "--recipe", tmp_path / "recipe", "--json")[1])
    assert plan["recipe"]["block_size"] == 32


@capabilities.limits
@pytest.mark.parametrize("size", ["9" * 20 + "GiB", "9" * 400, "8589934592GiB"])
def test_more_memory_than_there_can_be_is_refused(size):
    table = cqhf.plan(cqhf.tiny_model("llama"), Recipe(block_size=16))
    with pytest.raises(cq.RecipeError, match="memory must be below"):
        limit_memory(size, table)


@pytest.mark.parametrize("report", [".", "none/report.html", "model"])
def test_a_report_that_cant_be_written_is_refused_before_any_work(
    report, command, tmp_path, monkeypatch
):
    folder = write(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cqhf.Source, "load", pytest.fail)
    status, _, errors = command("inspect", folder, "--report", report)
    assert status == 1
    assert "the report can't be written: output" in errors


def test_the_command_works_on_the_directory_that_it_is_in(saved, command, tmp_path, monkeypatch):
    source = write(tmp_path / "model")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "text").write_text("a b c d e f g h " * 20)
    small = ("--samples", 1, "--sequence-length", 32, "--block-size", 16, *FITTING)
    status, printed, _ = command(
        "quantize", "../model", "-o", ".", "--calibration", "../text", *small
    )
    assert status == 0, printed
    assert command("inspect", ".")[0] == 0
    arguments = ("evaluate", ".", "--text", "../text", "--sequence-length", 32)
    assert command(*arguments)[0] == 0
    monkeypatch.chdir(source)
    assert command("plan", ".", *FITTING)[0] == 0


def test_outputs_of_every_command_are_json_to_others(command, tmp_path, monkeypatch):
    values = {"perplexity": float("inf"), "rows": [float("nan")]}
    monkeypatch.setattr(plans, "plan_dict", lambda table: values)
    printed = command("plan", write(tmp_path / "model"), *FITTING, "--json")[1]
    found = json.loads(printed, parse_constant=pytest.fail)
    assert {name: found[name] for name in values} == {"perplexity": None, "rows": [None]}


@pytest.mark.parametrize("name", ["quantize", "export", "demo"])
def test_an_empty_output_is_refused(name, command, tmp_path, monkeypatch):
    folder = write(tmp_path / "model")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = {"quantize": (folder, "--calibration", folder / "config.json"), "export": (folder,)}
    status, _, errors = command(name, *given.get(name, ()), "-o", "")
    assert status == 1
    assert "--output must be a path, got ''" in errors
    assert list((tmp_path / "here").iterdir()) == []
