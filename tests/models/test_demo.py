"""The demo on a tiny model, and what is printed of it and of presets on a narrow terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from typer.testing import CliRunner

import corequant_transformers as cqhf
from corequant.recipe import PRESETS, Recipe
from corequant_cli.app import _EPILOGS, _EXAMPLES, app
from corequant_cli.commands import demonstration
from corequant_cli.tables import console
from corequant_transformers.calibration.data.documents import carried_documents
from tests.models.test_gguf_files import tokenizer_of, write_model


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    console.console.cache_clear()
    yield
    console.console.cache_clear()


def run(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 60 or "--json" in arguments
    return done.stdout


def test_the_demo(narrow, tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    tokenizer_of("gpt-2").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(demonstration, "fetch_model", lambda: tmp_path / "model")
    monkeypatch.setattr(demonstration, "LENGTH", 32)
    monkeypatch.setattr(demonstration, "SAMPLES", 2)
    monkeypatch.setattr(demonstration, "processor_count", lambda: 1)
    monkeypatch.chdir(tmp_path)
    shown = run("demo", "--windows", 2, "-o", "out")
    names = ["float", *(v.name for v in demonstration.variants())]
    places = [shown.index(name) for name in names]
    assert places == sorted(places)
    words = " ".join(shown.split())
    for text in ("for small files", "for speed", "out/w4a16, saved", "out/w4a4, saved", "KL"):
        assert text in words
    for name, recipe in (("w4a16", "w4a16"), ("w4a4", "w4a4")):
        model = cqhf.load(tmp_path / "out" / name)
        layer = model.model.layers[1].mlp.down_proj
        assert layer.quantized.spec == Recipe.preset(recipe).weights


@pytest.mark.parametrize("best", [1, 2])
def test_the_demo_saves_the_w4a4_model_that_is_closest(best, tmp_path, monkeypatch):
    """Whichever of them that is."""
    write_model(tmp_path / "model")
    tokenizer_of("gpt-2").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(demonstration, "fetch_model", lambda: tmp_path / "model")
    monkeypatch.setattr(demonstration, "LENGTH", 32)
    monkeypatch.setattr(demonstration, "SAMPLES", 2)
    everything, real = demonstration.variants(), demonstration.evaluate
    made = (everything[0], *everything[2:4])
    monkeypatch.setattr(demonstration, "variants", lambda: made)
    calls = iter(range(len(made)))

    def evaluate(*arguments, **options):
        found = real(*arguments, **options)
        kl = 0.01 if next(calls) == best else 0.02
        return replace(found, divergence=replace(found.divergence, kl=kl))

    monkeypatch.setattr(demonstration, "evaluate", evaluate)
    result = demonstration.run(tmp_path / "out", carried_documents(), windows=1, processors=1)
    assert [row.rounding for row in result.rows] == ["", *(v.recipe.rounding for v in made)]
    written = Recipe.from_toml((tmp_path / "out" / "w4a4" / "recipe.toml").read_text())
    assert replace(written, dtype="auto") == made[best].recipe
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["w4a16", "w4a4"]


def test_the_demo_in_two_processes(tmp_path, monkeypatch):
    """Rows, progress and what is saved are those of one."""
    write_model(tmp_path / "model")
    tokenizer_of("gpt-2").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(demonstration, "fetch_model", lambda: tmp_path / "model")
    monkeypatch.setattr(demonstration, "LENGTH", 32)
    monkeypatch.setattr(demonstration, "SAMPLES", 2)
    made = (demonstration.Variant("W4A16", Recipe.preset("w4a16")), demonstration.variants()[2])
    monkeypatch.setattr(demonstration, "variants", lambda: made)
    found = []
    for processors in (1, 2):
        seen = set()
        result = demonstration.run(
            tmp_path / str(processors),
            carried_documents(),
            windows=2,
            progress=lambda phase, done, total, seen=seen: seen.add((phase, done, total)),
            processors=processors,
        )
        assert {name for name, done, total in seen if done == total} >= {v.name for v in made}
        folders = sorted(f.name for f in (tmp_path / str(processors)).iterdir())
        assert folders == ["w4a16", "w4a4"]
        assert len(result.spoken) == 2
        found.append((result.rows, seen, result.tokens))
    assert found[0] == found[1]


def test_the_demos_best_needs_all_that_is_calibrated():
    made = demonstration.variants()
    assert made[-1].recipe == Recipe.preset("w4a4")
    assert {v.folder for v in made} == {"w4a16", "w4a8", "w4a4"}


def test_presets_are_listed(narrow):
    shown = run("presets")
    for name in PRESETS:
        assert f"{name}" in shown
    listed = json.loads(run("presets", "--json"))
    assert list(listed) == list(PRESETS)
    assert Recipe.from_dict(listed["w4a16"]["recipe"]) == Recipe.preset("w4a16")


def test_a_presets_recipe_is_shown_as_toml(narrow):
    shown = run("presets", "w4a4")
    lines = [line for line in shown.splitlines() if " = " in line]
    assert Recipe.from_toml("\n".join(lines)) == Recipe.preset("w4a4")


def test_formats_are_listed_with_who_takes_them(narrow):
    shown = run("formats")
    for word in ("e4m3", "group<n>", "four_over_six", "llama.cpp"):
        assert word in shown
    found = json.loads(run("formats", "--json"))["weights"]
    assert found["int4:group32:float16"] == ["corequant", "transformers", "vllm", "llama.cpp"]
    assert found["int4:group32:asymmetric:float16"] == ["corequant", "llama.cpp"]
    assert found["int3:group32"] == ["corequant", "transformers"]


def test_an_unknown_preset_is_an_error():
    done = CliRunner().invoke(app, ["presets", "w4"])
    assert "preset must be one of" in str(done.exception)


def test_examples_of_the_help_name_what_there_is():
    text = "\n".join([_EXAMPLES, *_EPILOGS.values()])
    lines = [line.split() for line in text.splitlines() if line.startswith("  corequant")]
    assert len(lines) > 8
    commands = {command.callback.__name__ for command in app.registered_commands}
    for words in lines:
        assert words[1] in commands
        options = dict(pairwise(words))
        if words[1] in ("plan", "quantize"):
            weights = {"weights": options["--weights"]} if "--weights" in options else {}
            Recipe.preset(options.get("--preset", "w4a16"), reader=options.get("--for"), **weights)
