"""Descriptions as files, in directories, and given to the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from typer.testing import CliRunner

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_cli.app import app
from corequant_transformers.architectures.described import described
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.files import registered
from corequant_transformers.architectures.known import known_architectures
from corequant_transformers.architectures.serialization import from_plain, to_plain
from tests.models import foreign
from tests.models.test_checkpoint import word_level

TEXT = "a b c d e f g h i j k l m n o p " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tower")
    foreign.tower().save_pretrained(path / "model")
    word_level(path / "model")
    (path / "text.txt").write_text(TEXT)
    (path / "tower.toml").write_text(foreign.ARCHITECTURE.to_toml())
    return path


# ---- plain values


@pytest.mark.parametrize("architecture", [*described()], ids=lambda a: a.model_type)
def test_every_description_survives_toml(architecture):
    for whole in (False, True):
        assert Architecture.from_toml(architecture.to_toml(whole=whole)) == architecture
    assert Architecture.from_dict(json.loads(json.dumps(architecture.to_dict()))) == architecture


@dataclass(frozen=True)
class One:
    width: int = 1
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Other:
    width: int = 2
    pair: tuple[str, float] = ("x", 0.5)


@dataclass(frozen=True)
class All:
    name: str
    part: One | Other | None = None
    parts: tuple[One, ...] = ()
    several: tuple[tuple[str, Any], ...] = ()
    by_name: Mapping[str, int | str] = field(default_factory=dict)
    kind: Literal["a", "b"] = "a"
    share: float = 0.5
    is_on: bool = False
    free: str | tuple[int, ...] | None = "free"


def test_any_dataclass_of_plain_fields_is_read_and_written():
    value = All(
        "n",
        part=Other(3, ("y", 2.0)),
        parts=(One(5), One(names=())),
        several=(("f", False), ("g", None), ("h", ("i", 1))),
        by_name={"one": 1, "two": "2"},
        kind="b",
        is_on=True,
        free=(1, 2),
    )
    plain = to_plain(value)
    assert plain["part"] == {"kind": "Other", "width": 3, "pair": ["y", 2.0]}
    assert plain["parts"] == [{"width": 5}, {"names": []}]
    assert "share" not in plain
    assert from_plain(All, plain) == value
    assert from_plain(All, json.loads(json.dumps(to_plain(value, whole=True)))) == value
    assert to_plain(All("n", free=None)) == {"name": "n", "free": "none"}
    assert from_plain(All, {"name": "n", "free": "none", "share": 1}) == All(
        "n", None, free=None, share=1
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "name must be given, got nothing"),
        ({"name": 3}, "name must be a string, got '3'"),
        ({"name": "n", "nome": 1}, "nome must be one of name, part, .*got 'nome'; did you mean"),
        ({"name": "n", "part": {"width": 1}}, "part.kind must be one of One, Other, got 'None'"),
        ({"name": "n", "part": {"kind": "One", "width": True}}, "part.width must be an integer"),
        ({"name": "n", "part": 3}, "part must be a table, got '3'"),
        ({"name": "n", "parts": {"width": 1}}, "parts must be a list, got"),
        ({"name": "n", "parts": [{"names": "ab"}]}, r"parts\[0\].names must be a list, got 'ab'"),
        ({"name": "n", "parts": [{}, {"width": "2"}]}, r"parts\[1\].width must be an integer"),
        ({"name": "n", "several": [["f"]]}, r"several\[0\] must be a list of 2, got"),
        ({"name": "n", "by_name": 1}, "by_name must be a table, got '1'"),
        ({"name": "n", "by_name": {"a": 1.5}}, "by_name.a must be an integer or a string, got"),
        ({"name": "n", "kind": "c"}, "kind must be one of 'a', 'b', got 'c'"),
        ({"name": "n", "share": "1"}, "share must be a number, got '1'"),
        ({"name": "n", "is_on": 1}, "is_on must be true or false, got '1'"),
        ({"name": "n", "free": 1.5}, "free must be a string or a list, got '1.5'"),
        ([], r"a description must be a table, got '\[\]'"),
    ],
)
def test_wrong_values_are_refused_by_place_rule_and_value(values, words):
    with pytest.raises(cq.ArchitectureError, match=words):
        from_plain(All, values)


def test_what_is_no_data_is_not_written():
    with pytest.raises(cq.ArchitectureError, match="All.name must be plain data .*got a function"):
        to_plain(All(lambda: 1))
    with pytest.raises(cq.ArchitectureError, match="All.name must not be 'none', which stands for"):
        to_plain(All("none"))


# ---- files


def test_files_are_named_in_errors(tmp_path):
    file = tmp_path / "tower.toml"
    for text, words in (
        ("model_type = ", "must be valid TOML"),
        ('norm = "rms"', "model_type must be given"),
        ('model_type = "t"\nnorm = "median"', "norm must be one of rms, .*got 'median'"),
        ('model_type = "t"\nquerry = "q"', "querry must be one of .*did you mean 'query'"),
        (
            'model_type = "t"\n[experts]\nwhere = [{field = "f"}]',
            r"experts.where\[0\].relation must",
        ),
        (
            'model_type = "t"\n[[experts.where]]\nfield = "f"\nrelation = "is"',
            r"experts.where\[0\]: relation must be one of equals",
        ),
    ):
        file.write_text(text)
        with pytest.raises(cq.ArchitectureError, match=words) as caught:
            cqhf.read_architecture(file)
        assert str(caught.value).startswith(str(file))
    with pytest.raises(cq.ArchitectureError, match="absent.toml must be a readable UTF-8 file"):
        cqhf.read_architecture(tmp_path / "absent.toml")
    with pytest.raises(cq.ArchitectureError, match=r"must be in a \.toml or \.py file, got .*json"):
        cqhf.read_architecture(tmp_path / "tower.json")


def test_python_files_leave_a_description(tmp_path):
    file = tmp_path / "tower.py"
    file.write_text("import corequant_transformers as cqhf\nARCHITECTURE = cqhf.Architecture('t')")
    assert cqhf.read_architecture(file) == Architecture("t")
    file.write_text("ARCHITECTURE = 3")
    with pytest.raises(cq.ArchitectureError, match="ARCHITECTURE must be an Architecture, got int"):
        cqhf.read_architecture(file)
    file.write_text("1 / 0")
    with pytest.raises(cq.ArchitectureError, match="without an error: ZeroDivisionError: division"):
        cqhf.read_architecture(file)
    with pytest.raises(cq.ArchitectureError, match="must be a readable"):
        cqhf.read_architecture(tmp_path / "absent.py")


def test_a_description_is_known_for_a_while():
    before = dict(known_architectures())
    with registered(Architecture("llama", norm="layer")), registered(Architecture("tower")):
        assert known_architectures()["llama"].norm == "layer"
        assert "tower" in known_architectures()
    with registered(None):
        assert known_architectures() == before


# ---- the command


def invoke(folder, *arguments):
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_somebody_elses_model_goes_through_the_whole_command(folder, tmp_path):
    model, text, out = folder / "model", folder / "text.txt", tmp_path / "out"
    given = ("--architecture", folder / "tower.toml")
    recipe = ("--rotation", "heads", "--samples", 2, "--sequence-length", 64)
    with pytest.raises(cq.ArchitectureError, match="model_type must be one of .*got 'tower'"):
        invoke(folder, "plan", model)
    plan = invoke(folder, "plan", model, *recipe, *given)
    assert plan["model_type"] == "tower"
    made = invoke(folder, "quantize", model, "-o", out, *recipe, *given, "--calibration", text)
    assert made["verification"]["logits_error"] < 1e-10
    assert made["rehearsal"]["logits_error"] < 1e-10
    assert Architecture.from_dict(made["architecture"]) == foreign.ARCHITECTURE
    # From here on the directory itself knows.
    measured = invoke(
        folder, "evaluate", out, "--text", text, "--against", model, "--sequence-length", 64, *given
    )
    assert 0 < measured["kl"] < 1
    alone = invoke(folder, "evaluate", out, "--text", text, "--sequence-length", 64)
    assert alone["perplexity"] == measured["perplexity"]
    layers = invoke(
        folder, "inspect", out, "--against", model, "--text", text, "--sequence-length", 32, *given
    )
    assert layers["layers"]
    with pytest.raises(cq.SpecError, match="zero points; .* by --for or reader=transformers or"):
        invoke(folder, "export", out, "-o", tmp_path / "export")
    symmetric = (*recipe, "--weights", "int4:group32", "--calibration", text)
    invoke(folder, "quantize", model, "-o", tmp_path / "other", *symmetric, *given)
    alone = invoke(folder, "evaluate", tmp_path / "other", "--text", text, "--sequence-length", 64)
    invoke(folder, "export", tmp_path / "other", "-o", tmp_path / "export")
    exported = invoke(
        folder, "evaluate", tmp_path / "export", "--text", text, "--sequence-length", 64, *given
    )
    assert exported["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-3)
    assert "tower" not in known_architectures()


def test_a_python_file_brings_the_models_class_along(folder):
    command = [sys.executable, "-m", "corequant", "plan", folder / "model", "--json"]
    options = ["--block-size", "16", "--architecture", Path(foreign.__file__)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_type"] == "tower"


# ---- in directories


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens)).logits


def test_a_description_travels_with_its_directory(tokens, tmp_path):
    model = foreign.tower()
    with registered(foreign.ARCHITECTURE):
        result = cqhf.quantize(model, Recipe(block_size=16), tokens, tmp_path / "out")
    own = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert Architecture.from_dict(own["architecture"]) == foreign.ARCHITECTURE
    expected = logits(result.model, tokens)
    loaded = cqhf.load(tmp_path / "out")
    assert torch.equal(logits(loaded, tokens), expected)
    assert torch.equal(logits(load_by_transformers(tmp_path / "out"), tokens), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(cqhf.load(tmp_path / "again"), tokens), expected)
    assert (
        cqhf.evaluate(loaded, tokens).perplexity == cqhf.evaluate(result.model, tokens).perplexity
    )


def load_by_transformers(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_description_that_comes_with_the_package_is_not_written(tokens, tmp_path):
    cqhf.quantize(cqhf.tiny_model("llama"), Recipe(block_size=16), tokens, tmp_path / "out")
    own = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "architecture" not in own
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not {"architecture", "rehearsal"} & set(report)


def test_a_damaged_description_is_refused(tokens, tmp_path):
    with registered(foreign.ARCHITECTURE):
        cqhf.quantize(foreign.tower(), Recipe(block_size=16), tokens, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    for changes, words in (
        ({"model_type": "llama"}, "architecture.model_type of .*must be 'tower', .*got 'llama'"),
        ({"norm": 3}, "architecture of .*config.json: norm must be a string, got '3'"),
        ({"up": "absent"}, "the model has no module|must have shape"),
    ):
        values = foreign.ARCHITECTURE.to_dict() | changes
        config["quantization_config"]["architecture"] = values
        file.write_text(json.dumps(config))
        with pytest.raises(cq.CorequantError, match=words):
            cqhf.load(tmp_path / "out", verify=False)


def test_a_run_is_not_resumed_with_another_description(folder, tokens, tmp_path):
    out, recipe = tmp_path / "out", Recipe(block_size=16)

    def stop(phase, done, total):
        if phase == "quantize" and done == 2:
            raise KeyboardInterrupt

    with registered(foreign.ARCHITECTURE):
        with pytest.raises(KeyboardInterrupt):
            cqhf.quantize(folder / "model", recipe, tokens, out, progress=stop)
    other = replace(foreign.ARCHITECTURE, requires=(("vocab_size", 128),))
    with registered(other), pytest.raises(cq.RunError, match="architecture"):
        cqhf.quantize(folder / "model", recipe, tokens, out, resume=True)
    with registered(foreign.ARCHITECTURE):
        result = cqhf.quantize(folder / "model", recipe, tokens, out, resume=True)
    with registered(foreign.ARCHITECTURE):
        whole = cqhf.quantize(foreign.tower(), recipe, tokens)
    assert torch.equal(logits(cqhf.load(result.path), tokens), logits(whole.model, tokens))
