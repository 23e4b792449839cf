"""Calibration data on the command line, in reports and in runs that are resumed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.files.digests import DIGESTS
from tests.models.test_data import CHATML, CHATS, TEXTS, byte_level, lines, rows_of
from tests.models.test_shown import command  # noqa: F401

RECIPE = Recipe(block_size=16, samples=3, sequence_length=32)
SMALL = ("--samples", 3, "--sequence-length", 32, "--block-size", 16)
SMALL = (*SMALL, "--weights", "int4:channel", "--rounding", "nearest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a chat template, and data of several kinds."""
    folder = tmp_path_factory.mktemp("data")
    special = ("<|endoftext|>",)
    tokenizer = byte_level(*special, eos_token=special[0], chat_template=CHATML)
    cqhf.tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for name, text in zip("abc", TEXTS, strict=True):
        (folder / "texts" / f"{name}.txt").write_text(text, "utf-8")
    (folder / "texts" / "notes.md").write_text("no data")
    (folder / "chats.jsonl").write_text(lines(rows_of("messages", CHATS)), "utf-8")
    (folder / "empty.jsonl.gz").write_bytes(gzip.compress(b'{"text": ""}\n'))
    (folder / "mixed.txt").write_text('{"text": "x"}\nprose\n')
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def flat(printed):
    return " ".join(printed.split())


def test_quantize_evaluate_and_plan_say_what_they_take(command, tmp_path):  # noqa: F811
    given = ("--calibration", "texts", "--calibration", "chats.jsonl", *SMALL)
    status, printed, _ = command("plan", "model", *given, "--sampling", "random", "--seed", 2)
    wanted = (
        "calibrated on 3 windows of 32 tokens from a.txt (text), b.txt (text), c.txt (text) and 1 "
        "more files; "
    )
    assert status == 0
    assert f"to be {wanted}" in flat(printed)
    out = tmp_path / "out"
    given = (*given, "--sampling", "random", "--seed", 2)
    status, printed, errors = command("quantize", "model", "-o", out, *given)
    assert status == 0
    assert wanted in flat(printed)
    assert " of 5 documents" in flat(printed)
    assert "drawn with seed 2; other files left out: 1" in flat(printed)
    assert "no --calibration" not in errors
    data = json.loads((out / "report.json").read_text())["calibration"]
    assert data["documents"] == 5
    assert data["skipped"] == ["notes.md"]
    assert [file["format"] for file in data["files"]] == ["text"] * 3 + ["JSON lines"]
    assert data == json.loads(command("plan", "model", *given, "--json")[1])["calibration"]
    assert wanted in flat(command("inspect", out)[1])
    text = ("--text", "chats.jsonl", "--text", "empty.jsonl.gz", "--sequence-length", 16)
    status, printed, _ = command("evaluate", out, *text)
    assert status == 0
    assert "evaluated on" in flat(printed)
    assert "2 of 2 documents; 1 empty ones left out" in flat(printed)
    printed = command("evaluate", out, "--text", "texts", "--sequence-length", 16)[1]
    assert "3 of 3 documents, separated by '<|endoftext|>'; other files left" in flat(printed)
    found = json.loads(command("evaluate", out, *text, "--json")[1])
    tokenizer = cqhf.load_tokenizer(out)
    wanted = sum(len(tokenizer.apply_chat_template(chat)["input_ids"]) for chat in CHATS)
    assert found["data"]["tokens_read"] == wanted
    assert found["windows"] == wanted // 16


def test_without_calibration_it_says_what_is_used(command, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    status, printed, errors = command("quantize", "model", "-o", out, *SMALL)
    assert status == 0
    said = "calibrating on the public-domain text that corequant carries"
    assert f"no --calibration: {said}" in flat(errors)
    assert "tokens from the public-domain text that corequant carries; " in flat(printed)
    lines = printed.splitlines()
    assert f"how to load it: {out / 'README.md'}" in lines
    assert f"how good it is: corequant evaluate {out} --against model --text FILE" in lines
    status, printed, errors = command("quantize", "model", "-o", tmp_path / "b", *SMALL, "--json")
    assert said not in flat(errors)
    name = json.loads(printed)["calibration"]["files"][0]["name"]
    assert name == "the public-domain text that corequant carries"
    status, printed, _ = command(
        "inspect", "model", "--sequence-length", 32, "--report", tmp_path / "r.html"
    )
    assert "inspected on 3 windows of 32 tokens from the public-domain text" in flat(printed)


def test_what_is_refused_at_once_is_one_line(command, tmp_path):  # noqa: F811
    (tmp_path / "there").write_text("")
    status, printed, errors = command("quantize", "model", "-o", tmp_path / "there", *SMALL)
    assert (status, printed) == (1, "")
    assert errors.startswith("corequant: output must be a new or empty directory")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(("name", "goes_on"), [("quantize", True), ("inspect", False)])
def test_an_interrupt_says_what_can_go_on(name, goes_on, command, tmp_path, monkeypatch):  # noqa: F811
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("corequant_cli.tables.console.progress", interrupt)
    given = {"quantize": ("-o", tmp_path / "out"), "inspect": ("--sequence-length", 32)}[name]
    status, printed, errors = command(name, "model", *given)
    assert (status, printed) == (130, "")
    assert "interrupted; no partial output was left" in errors
    assert ("--resume" in errors) is goes_on


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "model", "-o", "out", "--calibration", "mixed.txt"),
        ("plan", "model", "--calibration", "mixed.txt"),
        ("evaluate", "model", "--text", "texts", "--text", "mixed.txt"),
        ("inspect", "model", "--text", "mixed.txt"),
    ],
)
def test_mixed_formats_are_one_line_of_error(arguments, command):  # noqa: F811
    status, printed, errors = command(*arguments)
    assert (status, printed) == (1, "")
    assert errors == (
        "corequant: mixed.txt must be either text or JSON lines, got both: line 1 is a record, and "
        "line 2 is not a JSON object: 'prose' (Expecting value: line 1 column 1 (char 0))\n"
    )
    assert not Path("out").exists()


def test_one_file_of_text_gives_the_bytes_that_its_text_gives(command, tmp_path):  # noqa: F811
    text = "\n".join(TEXTS) * 2
    (tmp_path / "a.txt").write_text(text, "utf-8")
    (tmp_path / "a.jsonl").write_text(lines(rows_of("text", [text])), "utf-8")
    tokenizer = cqhf.Source("model").tokenizer()
    digests = set()
    for name, calibration in {
        "text": text,
        "file": tmp_path / "a.txt",
        "lines": [tmp_path / "a.jsonl"],
        "tokens": cqhf.token_windows(text, tokenizer, 32, 3),
    }.items():
        cqhf.quantize("model", RECIPE, calibration, tmp_path / name)
        digests.add((tmp_path / name / DIGESTS).read_text())
    assert len(digests) == 1


class Stopped(Exception):
    pass


def test_a_run_is_resumed_with_the_same_windows_only(command, tmp_path):  # noqa: F811
    """Whatever gives the same windows will do; the text of the package doesn't."""
    data = tmp_path / "a.jsonl"
    data.write_text(lines(rows_of("text", TEXTS)), "utf-8")
    recipe = Recipe(block_size=16, samples=3, sequence_length=32, sampling="random", seed=4)
    whole = cqhf.quantize("model", recipe, data, tmp_path / "whole").path

    def stop(event):
        raise Stopped

    out = tmp_path / "out"
    with pytest.raises(Stopped):
        cqhf.quantize("model", recipe, data, out, events=stop)
    data.write_text(lines(rows_of("text", TEXTS[::-1])), "utf-8")
    for calibration in (data, None, "text " * 99):
        with pytest.raises(cq.RunError, match="data"):
            cqhf.quantize("model", recipe, calibration, out, resume=True)
    with pytest.raises(cq.RunError, match="must be as when the run was begun"):
        cqhf.quantize("model", Recipe(**{**recipe.to_dict(), "seed": 5}), data, out, resume=True)
    data.write_text(json.dumps(rows_of("text", TEXTS)), "utf-8")
    cqhf.quantize("model", recipe, [data], out, resume=True)
    assert (out / DIGESTS).read_text() == (whole / DIGESTS).read_text()
