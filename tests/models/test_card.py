"""Model cards: what they say, that their commands work, and that nothing private is in them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import gguf
import numpy as np
import pytest
import yaml

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.checkpoint.card import exported_card, own_card
from corequant_transformers.model.origins import origin_of
from tests.models.test_checkpoint import word_level
from tests.models.test_gguf_files import VOCABULARY, tokenizer_of

RECIPE = Recipe(rotation="offline", weights="int4:group16", activations="none", rounding="gptq")
ROOT = Path(__file__).parents[2]
LICENCE = "---\nlanguage: en\nlicense: apache-2.0  \n---\n\n# Words\n\n---\nlicense: mit\n---\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokens):
    """A model from a snapshot of a hub's cache, and its export."""
    place = tmp_path_factory.mktemp("private-name")
    source = place / "models--some--tiny-llama" / "snapshots" / "0f"
    source.mkdir(parents=True)
    cqhf.tiny_model("llama").save_pretrained(source)
    word_level(source)
    (source / "README.md").write_text(LICENCE)
    cqhf.quantize(source, RECIPE, tokens, place / "own")
    cqhf.export(place / "own", place / "exported")
    return place


def card_of(folder):
    return (folder / "README.md").read_text()


def front(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("kind", ["own", "exported"])
def test_the_front_matter_is_what_the_hub_reads(made, kind):
    assert front(card_of(made / kind)) == {
        "base_model": "some/tiny-llama",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["corequant", "int4"],
    }


def test_the_python_code_runs_in_the_directory(made, monkeypatch, capsys):
    """That of the own directory in a process that has imported nothing yet."""
    (code,) = blocks(card_of(made / "own"), "python")
    places = [ROOT, ROOT / "backends", ROOT / "adapters"]
    path = os.pathsep.join([*map(str, places), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=made / "own",
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is")
    (code,) = blocks(card_of(made / "exported"), "python")
    monkeypatch.chdir(made / "exported")
    exec(code, {})
    assert capsys.readouterr().out.startswith("The capital of France is")


@pytest.mark.parametrize("kind", ["own", "exported"])
def test_sizes_and_counts_are_those_of_the_files(made, kind):
    text = card_of(made / kind)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    layers = next(row for row in rows if row[0] == "14 linear layers")
    assert layers[1:4] == ["`int4:group16:symmetric:mse`", "float", "46,080"]
    # Four bits, and a scale of 32 for each 16 weights.
    assert 6.0 <= float(layers[4]) < 6.2
    weights = next((made / kind).glob("*.safetensors"))
    total = float(re.search(r"Its weights take ([\d.]+) MB", text)[1])
    assert abs(total - weights.stat().st_size / 1e6) < 0.15 * total
    (recipe,) = blocks(text, "toml")
    written = Recipe.from_toml((made / "own" / "recipe.toml").read_text())
    assert Recipe.from_dict(tomllib.loads(recipe)) == written


def test_what_was_measured_is_told(made):
    text = card_of(made / "own")
    report = json.loads((made / "own" / "report.json").read_text())
    assert f"by {report['verification']['logits_error']:.1e} of the largest" in text
    ratios = [m["loss"] / m["loss_nearest"] for m in report["matrices"] if m.get("loss_nearest")]
    assert f"Rounding by `gptq` left {np.median(ratios):.2g} of the squared error" in text
    assert text.rpartition("## Evaluation")[2].startswith("\n\nPerplexity and distance")
    plan = cqhf.plan(cqhf.tiny_model("llama"), RECIPE)
    measured = {"evaluation": {"perplexity": 18.25, "kl": 0.0412, "kl_se": 0.001}}
    text = own_card(plan, measured, made / "own" / "corequant.safetensors")
    assert "| perplexity | 18.250 |  |\n| KL divergence, nats per token | 0.0412 | 0.0010 |" in text
    assert "were not measured" not in text
    assert "Measured on the way" not in text


def test_nothing_of_the_machine_is_in_it(made):
    for kind in ("own", "exported"):
        text = card_of(made / kind)
        assert "private-name" not in text
        assert str(Path.home()) not in text
        assert "/tmp" not in text


def test_two_runs_write_the_same_card(made, tokens, tmp_path):
    source = made / "models--some--tiny-llama" / "snapshots" / "0f"
    cqhf.quantize(source, RECIPE, tokens, tmp_path / "other")
    assert card_of(tmp_path / "other") == card_of(made / "own")


@pytest.mark.parametrize("kind", ["own", "exported"])
def test_digests_cover_it_and_a_change_of_it_stops_no_reader(made, kind, tmp_path):
    folder = shutil.copytree(made / kind, tmp_path / "copy")
    count = cqhf.check_digests(folder)
    with (folder / "README.md").open("a") as file:
        file.write("Evaluated by hand.\n")
    with pytest.raises(cq.CheckpointError, match="README.md is not as it was written"):
        cqhf.check_digests(folder)
    read = cqhf.load if kind == "own" else lambda f: cqhf.Source(f).load()
    read(folder)
    (folder / "README.md").unlink()
    read(folder)
    with pytest.raises(cq.CheckpointError, match="README.md is missing"):
        cqhf.check_digests(folder)
    assert count == len([f for f in (made / kind).iterdir() if f.name != "corequant.sha256"])


def test_a_model_without_a_name_or_a_licence(tokens, tmp_path):
    cqhf.quantize(cqhf.tiny_model("llama"), Recipe(block_size=16), tokens, tmp_path / "out")
    text = card_of(tmp_path / "out")
    assert "license" not in front(text)
    assert "base_model" not in front(text)
    assert "# A llama model, quantized to int4\n" in text
    assert "This is a model of the type `llama` with" in text
    assert "The inputs of 2 layers are rotated at run time, by blocks of 16." in text


def test_names_cannot_change_the_page(made, tokens):
    plan = cqhf.plan(cqhf.tiny_model("llama"), RECIPE)
    report = {"source": "a`|<script>\n---\n# x\x1b[31m" + "y" * 500}
    text = own_card(plan, report, made / "own" / "corequant.safetensors")
    assert "<script>" not in text
    assert "\x1b" not in text
    assert front(text)["library_name"] == "transformers"
    assert len(next(line for line in text.splitlines() if line.startswith("# "))) < 120


@pytest.mark.parametrize("tied", [False, True])
def test_quantized_embeddings_are_rows_of_their_own(tied, tokens, tmp_path):
    recipe = Recipe(
        rotation="heads",
        weights="int4:group16",
        activations="none",
        embeddings="int8:channel",
        head="int8:channel",
    )
    model = cqhf.tiny_model("llama", tie_word_embeddings=tied)
    cqhf.quantize(model, recipe, tokens, tmp_path / "out")
    text = card_of(tmp_path / "out")
    assert "quantized to int4 and int8" in text
    assert "the weights of 14 linear layers in 6" in text
    rows = [line for line in text.splitlines() if "`int8:channel" in line]
    names = ["embedding and head"] if tied else ["embedding", "head"]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in names]
    # Eight bits, a scale of 32 for each row of 48, and the shape.
    assert all(" | 6,144 | 8.69 | " in row for row in rows)


def test_the_export_names_what_its_reader_needs(made, tokens, tmp_path):
    assert "pip install transformers accelerate compressed-tensors" in card_of(made / "exported")
    assert "vllm serve ." in card_of(made / "exported")
    rotated = Recipe(block_size=16, weights="int4:group16", activations="none")
    cqhf.quantize(cqhf.tiny_model("llama"), rotated, tokens, tmp_path / "own")
    text = card_of(cqhf.export(tmp_path / "own", tmp_path / "exported"))
    assert "import corequant_transformers" in text
    assert "vllm" not in text
    plan = cqhf.plan(cqhf.tiny_model("llama"), RECIPE)
    weights = made / "exported" / "model.safetensors"
    assert "vllm" not in exported_card(plan, {}, [weights], {"nvfp4-pack-quantized"})


def test_a_saved_model_has_a_card(made, tmp_path):
    cqhf.load(made / "own").save_pretrained(tmp_path / "new")
    assert card_of(tmp_path / "new") == card_of(made / "own")


# ---- where a model comes from


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        (LICENCE, {"license": "apache-2.0"}),
        ('---\nlicense: "llama3.2"\n---\n', {"license": "llama3.2"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("license: mit\n", {}),
        ("---\nlicense:\n  - mit\n---\n", {}),
        ("---\nlicense: [mit]\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\nlicense: ../../etc\n---\n", {}),
        (b"---\nlicense: mit\xff\n---\n", {}),
    ],
)
def test_licences_of_cards(text, licence, tmp_path):
    cqhf.tiny_model("llama").save_pretrained(tmp_path)
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "README.md").write_bytes(data)
    assert origin_of(cqhf.Source(tmp_path)) == licence


def gguf_with(file, **fields):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_array("general.languages", ["en", "de"])
    writer.add_array("general.some", [1, 2])
    for key, value in fields.items():
        writer.add_string(f"general.{key.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, {}),
        ({"license": "apache-2.0"}, {"license": "apache-2.0"}),
        (
            {"base_model__0__repo_url": "https://huggingface.co/some/model"},
            {"base_model": "some/model"},
        ),
        ({"base_model__0__repo_url": "https://elsewhere.org/some/model"}, {}),
        ({"license": "a b\nc"}, {}),
    ],
)
def test_origins_of_gguf_files(fields, found, tmp_path):
    file = gguf_with(tmp_path / "model.gguf", **fields)
    assert origin_of(cqhf.Source(file)) == found
    for size in range(0, file.stat().st_size, 7):
        os.truncate(file, file.stat().st_size - min(7, file.stat().st_size))
        assert origin_of(cqhf.Source(file)).items() <= found.items(), size


def test_a_gguf_file_says_it_in_its_fields(tokens, tmp_path):
    source = tmp_path / "models--some--tiny" / "snapshots" / "0f"
    source.mkdir(parents=True)
    model = cqhf.tiny_model("llama", hidden_size=64, vocab_size=VOCABULARY)
    model.save_pretrained(source)
    tokenizer_of("gpt-2").save_pretrained(source)
    (source / "README.md").write_text(LICENCE)
    recipe = Recipe(rotation="offline", weights="int4:group32:float16", activations="none")
    cqhf.quantize(source, recipe, tokens, tmp_path / "own")
    file = cqhf.export(tmp_path / "own", tmp_path / "out.gguf", "gguf")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(file).fields.items()}
    assert fields["general.quantized_by"] == "corequant"
    assert fields["general.license"] == "apache-2.0"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/some/tiny"
    assert fields["general.tags"] == ["corequant", "int4"]
    assert Recipe.from_toml(fields["corequant.recipe"]).weights == recipe.weights
    assert not (tmp_path / "README.md").exists()
