"""``corequant inspect`` of quantized directories: layers alone, and two runs side by side."""

from __future__ import annotations

import json
import re
import shlex
import sys

import pytest

import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_cli.app import run as command_line
from corequant_cli.tables.console import console
from corequant_transformers.inspection.words import layer_advice, outlier_advice
from tests.models.test_checkpoint import word_level

FIRST = Recipe(block_size=16, rounding="gptq", samples=2, sequence_length=32)
SECOND = Recipe(block_size=16, weights="int4:group16", activations=None, rounding="qronos")
MEASURED = ("--against", "model", "--text", "text.txt", "--sequence-length", "32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("inspect")
    model = cqhf.tiny_model("llama", hidden_size=64)
    model.save_pretrained(path / "model")
    word_level(path / "model")
    (path / "text.txt").write_text("a b c d e f g h i j k l m n o p q q " * 20)
    for name, recipe in (("first", FIRST), ("second", SECOND)):
        cqhf.quantize(str(path / "model"), recipe, tokens % 20, path / name)
    return path


@pytest.fixture
def command(monkeypatch, capsys, folder):
    """Run the command in the folder and return its exit status, output, and errors."""

    def run(*arguments, columns=100):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["corequant", *map(str, arguments)])
        console.cache_clear()
        capsys.readouterr()
        status = command_line()
        console.cache_clear()
        return status, *capsys.readouterr()

    return run


def test_words_come_first_and_can_be_copied(command, folder, tmp_path):
    status, shown, _ = command("inspect", "first", *MEASURED)
    assert status == 0
    found = json.loads(command("inspect", "first", *MEASURED, "--json")[1])
    words, _, table = shown.partition("What helps:")
    positions = [words.index(f"{k}. {n}") for k, n in enumerate(found["worth_keeping"], 1)]
    assert positions == sorted(positions)
    assert "of the squared error from its weight (int4:channel:symmetric:mse" in words.replace(
        "\n", " "
    )
    lines = table.replace("\\\n", " ").splitlines()
    copied = next(line for line in lines if "corequant quantize" in line)
    arguments = shlex.split(copied)[1:]
    arguments[arguments.index("NEW")] = str(tmp_path / "new")
    assert arguments.count("--keep") == 3
    assert command(*arguments, "--calibration", "text.txt")[0] == 0
    recipe = Recipe.from_toml((tmp_path / "new" / "recipe.toml").read_text())
    assert recipe.keep == tuple(found["worth_keeping"])
    assert recipe.rounding == "gptq"
    rules = [line for line in lines if line.strip().startswith("--layer")]
    assert len(rules) == 3
    options = [option for line in rules for option in shlex.split(line)]
    planned = json.loads(
        command("plan", "model", "--recipe", "first/recipe.toml", *options, "--json")[1]
    )
    assert (
        sum(m["weights"] is not None and "int8" in m["weights"] for m in planned["matrices"]) == 3
    )


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "first", *MEASURED),
        ("inspect", "second", *MEASURED),
        ("inspect", "first", "second"),
        ("inspect", "first"),
        ("inspect", "model", "--text", "text.txt", "--sequence-length", "32"),
    ],
)
def test_what_is_shown_fits_the_page(arguments, columns, command):
    status, shown, _ = command(*arguments, columns=columns)
    assert status == 0
    # Only what is to be copied goes on.
    rest = [line for line in shown.splitlines() if not line.startswith("  ")]
    assert max(map(len, rest)) <= columns
    assert "…" not in shown


def test_two_runs(command, folder):
    status, shown, _ = command("inspect", "first", "second")
    assert status == 0
    assert re.search(r"^A first: 0\.\d MB", shown, re.M)
    assert "rounding: gptq → qronos" in shown
    assert "activations: int4:token:asymmetric → none" in shown
    assert "can't be compared where activations differ" in shown.replace("\n", " ")
    found = json.loads(command("inspect", "first", "second", *MEASURED, "--json")[1])
    assert found["recipe"]["rounding"] == ["gptq", "qronos"]
    assert set(found["recipe"]) == {
        "rounding",
        "activations",
        "weights",
        "samples",
        "sequence_length",
    }
    alone = json.loads(command("inspect", "second", *MEASURED, "--json")[1])
    assert found["errors"][1]["layers"] == alone["layers"]
    shown = command("inspect", "first", "second", *MEASURED)[1]
    assert f"{found['errors'][0]['kl']:.4f} → {alone['kl']:.4f} nats" in shown.replace("\n", " ")
    assert "the recipes are equal" in command("inspect", "first", "first")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "model", "--against", "model"), "--against needs directories that quantize"),
        (("inspect", "first", "model"), "two models must both be directories"),
        (("inspect", "first", "first", "first"), "inspect takes one or two models, got 3"),
        (("inspect", "first", "--against", "second"), "is already quantized"),
        (("inspect", "first", "--against", "model", "--windows", "1"), "--windows"),
    ],
)
def test_what_cant_be_inspected(arguments, message, command):
    status, _, errors = command(*arguments)
    assert status != 0
    assert message in re.sub(r"[\s│]+", " ", errors)


def test_a_float_model_is_titled_by_its_name(command, folder, tmp_path):
    arguments = ("inspect", "model", "--text", "text.txt", "--sequence-length", "32")
    shown = command(*arguments, "--report", tmp_path / "r.html")[1]
    assert re.search(r"^model$", shown, re.M)
    assert shown.index("1. model.layers.") < shown.index("What helps:") < shown.index("\nlayer ")
    page = (tmp_path / "r.html").read_text()
    assert "<title>model: " in page
    assert page.index("What helps:") < page.index("data:image")
    assert "width=device-width" in page
    found = json.loads(command(*arguments, "--report", tmp_path / "r.html", "--json")[1])
    assert found["name"] == "model"
    assert found["advice"]["options"][-1][0] == "--activations none"


def test_the_option_that_helps_is_the_best_measured(tokens):
    found = cqhf.inspect(cqhf.tiny_model("llama"), tokens, 16)
    option = outlier_advice(found).options[0][0]
    errors = {name: 1.0 for name in found.layers[0].errors}
    for layer in found.layers:
        errors = {name: errors[name] * error for name, error in layer.errors.items()}
    best = min(errors, key=lambda name: errors[name])
    assert (
        option
        == {
            "unrotated": "--rotation offline",
            "rotated": "--rotation merged --block-size 16 --permutation identity",
            "massdiff": "--rotation merged --block-size 16 --permutation massdiff",
            "energydiff": "--rotation merged --block-size 16 --permutation energydiff",
            "full rotation": "--rotation merged",
        }[best]
    )


def test_an_outlier_is_told(tokens):
    """One channel that is far larger than the others, in one layer of two."""
    model = cqhf.tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[5] *= 20
    found = cqhf.inspect(model, tokens, 16)
    reason = next(r for r in outlier_advice(found).reasons if r.startswith("model.layers.1."))
    assert f"is {found.layers[1].outlier:.3g} times the median one" in reason
    assert found.layers[1].outlier > 4 * found.layers[0].outlier
    assert found.layers[1].block_mass["identity"] > 1.3
    assert "can't enlarge its largest number" in reason


def test_the_input_is_told_from_the_weight(tokens):
    recipe = Recipe(block_size=16, weights="int8:channel", activations="int4:token")
    model = cqhf.tiny_model("llama")
    result = cqhf.quantize(model, recipe, tokens)
    found = cqhf.layer_errors(result, model, tokens)
    assert all(layer.weight_share < 0.05 for layer in found.layers)
    advice = layer_advice(found)
    assert len(advice.options) == 1
    assert all(re.search(r"(9\d|100)% from its input \(int4", reason) for reason in advice.reasons)
