"""Models and data sets of a hub by their ids: those of the local cache, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.files.hub import locate
from tests import capabilities
from tests.models.test_checkpoint import word_level
from tests.models.test_cli import run
from tests.models.test_shown import command  # noqa: F401

pytestmark = capabilities.links
TEXT = "a b c d e f g h i j k l m n o p " * 40
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(cache, kind, name, folder):
    """Lay a folder out as the hub's client does: blobs, and links to them in a snapshot."""
    home = cache / f"{kind}s--{name.replace('/', '--')}"
    for part in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (home / part).mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(f for f in folder.rglob("*") if f.is_file())):
        blob = home / "blobs" / f"{number:040x}"
        shutil.copyfile(file, blob)
        link = home / "snapshots" / COMMIT / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(os.path.relpath(blob, link.parent)))
    return home / "snapshots" / COMMIT


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """HF_HOME with a model, its quantized form and a data set."""
    home = tmp_path_factory.mktemp("home")
    model, data = home / "model", home / "data"
    cqhf.tiny_model("llama").save_pretrained(model)
    word_level(model)
    made = Recipe(block_size=16, samples=2, sequence_length=64)
    cqhf.quantize(model, made, TEXT, home / "made")
    (data / "data").mkdir(parents=True)
    (data / "README.md").write_text("no data")
    for split, text in (("train", TEXT), ("test", "x " * 200)):
        (data / "data" / f"{split}-0.jsonl").write_text(json.dumps({"text": text}))
    put(home / "hub", "model", "maker/tiny", model)
    put(home / "hub", "model", "maker/tiny-int4", home / "made")
    put(home / "hub", "dataset", "maker/words", data)
    put(home / "hub", "dataset", "words", data / "data")
    return home


@pytest.fixture
def cache(home, monkeypatch, tmp_path):
    """The cache in this process, from a folder where no path has an id's name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.chdir(tmp_path)
    return home / "hub"


def test_ids_lead_to_snapshots(cache):
    found = locate("maker/tiny")
    assert found == cache / "models--maker--tiny" / "snapshots" / COMMIT
    assert locate(Path("maker/tiny/config.json")) == found / "config.json"
    assert locate("words", "dataset").name == COMMIT
    for other in (
        "words",
        "maker/none",
        "maker",
        "/maker/tiny",
        "../maker/tiny",
        "a--b/c",
        "a b/c",
    ):
        assert locate(other) == Path(other)


def test_a_path_is_never_an_id(cache):
    Path("maker/tiny").mkdir(parents=True)
    assert locate("maker/tiny") == Path("maker/tiny")
    with pytest.raises(cq.CheckpointError, match="config.json"):
        cqhf.Source("maker/tiny")


def test_a_snapshot_without_its_reference_is_none(cache, tmp_path):
    (tmp_path / "hub" / "models--maker--part" / "snapshots" / COMMIT).mkdir(parents=True)
    assert locate("maker/part") == Path("maker/part")


def test_models_by_id(cache):
    source = cqhf.Source("maker/tiny")
    assert source.name == "maker/tiny"
    assert cqhf.plan("maker/tiny", Recipe(block_size=16)).online
    recipe = Recipe(block_size=16, samples=2, sequence_length=64)
    data = Path("maker/words/data/train-0.jsonl")
    result = cqhf.quantize("maker/tiny", recipe, data)
    assert result.report["source"] == "maker/tiny"
    assert result.report["calibration"]["files"][0]["name"] == "train-0.jsonl"
    stored = cqhf.load("maker/tiny-int4").state_dict()
    wanted = result.model.state_dict()
    assert all((stored[name] == tensor).all() for name, tensor in wanted.items())
    assert cqhf.load_tokenizer("maker/tiny-int4")("a b")["input_ids"] == [1, 2]


def test_what_is_not_in_the_cache_is_named_with_its_command(cache):
    with pytest.raises(cq.CheckpointError, match="get it with: hf download maker/none$"):
        cqhf.Source("maker/none")
    with pytest.raises(cq.CheckpointError, match="Hugging Face cache, got none$"):
        cqhf.Source("none")
    with pytest.raises(cq.CalibrationError, match="hf download maker/none --repo-type dataset$"):
        cqhf.read_documents("maker/none")


def test_data_sets_by_id(cache):
    with pytest.raises(cq.CalibrationError, match="maker/words must hold files of one split"):
        cqhf.read_documents("maker/words")
    documents = cqhf.read_documents("maker/words/data/test-0.jsonl")
    assert documents.entries[0].text == "x " * 200


def test_part_of_a_model_says_how_to_get_the_rest(cache, home, tmp_path):
    folder = tmp_path / "part"
    folder.mkdir()
    shutil.copyfile(home / "model" / "config.json", folder / "config.json")
    shutil.rmtree(cache / "models--maker--part", ignore_errors=True)
    put(cache, "model", "maker/part", folder)
    with pytest.raises(cq.CheckpointError, match="is missing.*get all of it with: hf download mak"):
        cqhf.Source("maker/part")


def test_the_cache_of_the_environment(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    options = ("--weights", "int4:channel", "--json")
    assert json.loads(run("plan", "maker/tiny", *options, cwd=tmp_path).stdout)["matrices"]


def test_commands(cache, command):  # noqa: F811
    data = ("--text", "maker/words/data/train-0.jsonl", "--sequence-length", 64)
    status, printed, _ = command("evaluate", "maker/tiny-int4", *data, "--json")
    assert status == 0
    assert json.loads(printed)["data"]["files"][0]["format"] == "JSON lines"
    assert "recipe" in json.loads(command("inspect", "maker/tiny-int4", "--json")[1])
    status, printed, errors = command("plan", "maker/none")
    assert (status, printed) == (1, "")
    assert errors.endswith("get it with: hf download maker/none\n")
