"""Results written for other programs: as by a run and an export, whatever happens on the way."""

from __future__ import annotations

import hashlib
from itertools import product

import numpy as np
import pytest

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.exports import destination
from corequant_transformers.exports.destination import Destination
from corequant_transformers.run import output as outputs
from corequant_transformers.run.output import run_directory
from tests.models.test_gguf_files import tokenizer_of, write_model

SMALL = {"samples": 2, "sequence_length": 32}
NAMES = {"corequant": "out", "transformers": "out", "llama.cpp": "out.gguf"}
OTHERS = ["transformers", "llama.cpp"]


def digests(path):
    """Hash a result's files but for those about the run itself."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest()
        for f in files
        if f.name not in ("report.json", "log.jsonl")
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float") / "model"
    write_model(folder)
    tokenizer_of("gpt-2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens():
    return np.arange(2 * 32).reshape(2, 32) % 250


def made(source, tokens, folder, reader, **options):
    output = folder / NAMES[reader]
    recipe = Recipe.preset(reader=reader, **SMALL)
    result = cqhf.quantize(source, recipe, tokens, output, reader=reader, **options)
    return output, result


@pytest.fixture(scope="module")
def exported(source, tokens, tmp_path_factory):
    """The digests of what a run and an export make, by reader."""
    folder, found = tmp_path_factory.mktemp("exported"), {}
    for reader, to in (("transformers", "compressed-tensors"), ("llama.cpp", "gguf")):
        recipe = Recipe.preset(reader=reader, **SMALL)
        cqhf.quantize(source, recipe, tokens, folder / reader)
        origin = source if to == "gguf" else None
        cqhf.export(folder / reader, folder / f"to-{NAMES[reader]}", to, source=origin)
        found[reader] = list(digests(folder / f"to-{NAMES[reader]}").values())
    return found


@pytest.mark.parametrize("reader", OTHERS)
def test_a_result_is_what_an_export_makes(reader, source, tokens, exported, tmp_path):
    output, result = made(source, tokens, tmp_path, reader)
    assert list(digests(output).values()) == exported[reader]
    assert [f.name for f in tmp_path.iterdir()] == [NAMES[reader]]
    assert result.report["matrices"]
    with pytest.raises(cq.CheckpointError, match="written for another program"):
        _ = result.model


def test_a_model_in_memory(source, tokens, exported, tmp_path):
    model = cqhf.Source(source).load()
    output, _ = made(model, tokens, tmp_path, "transformers", tokenizer=tokenizer_of("gpt-2"))
    kept = {k: v for k, v in digests(output).items() if k.endswith(".safetensors")}
    assert set(kept.values()) <= set(exported["transformers"])
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("point", "there", "reader"),
    [
        *product(["own", "convert", "complete", "named", "removed"], [False], OTHERS),
        *product(["complete", "named"], [True], ["transformers"]),
    ],
)
def test_a_stopped_run_is_resumed(
    point, there, reader, source, tokens, exported, tmp_path, monkeypatch
):
    """Stopped before each step from corequant's own directory to a result that is whole."""
    output = tmp_path / NAMES[reader]
    if there:
        output.mkdir()

    def stop(*given, **options):
        raise KeyboardInterrupt

    def stop_after(function):
        def stopped(*given, **options):
            function(*given, **options)
            raise KeyboardInterrupt

        return stopped

    with monkeypatch.context() as patch:
        if point == "own":
            patch.setattr(outputs, "_write_directory", stop)
        elif point == "convert":
            patch.setattr(destination, "write_layout", stop)
        elif point == "complete":
            patch.setattr(outputs, "_found", stop)
        elif point == "named":
            patch.setattr(destination, "write_layout", stop_after(destination.write_layout))
        else:
            patch.setattr(outputs.RunDirectory, "remove", stop_after(outputs.RunDirectory.close))
        with pytest.raises(KeyboardInterrupt):
            made(source, tokens, tmp_path, reader)
    assert run_directory(output).is_dir()
    whole = point in ("named", "removed")
    if not whole:
        assert not output.exists() or not list(output.iterdir())
    with pytest.raises((cq.RunError, cq.OutputError)):
        made(source, tokens, tmp_path, reader)
    again, _ = made(source, tokens, tmp_path, reader, resume=True)
    assert list(digests(again).values()) == exported[reader]
    assert [f.name for f in tmp_path.iterdir()] == [NAMES[reader]]


def test_a_result_half_moved_is_made_again(source, tokens, exported, tmp_path, monkeypatch):
    """A directory that was there gets its files one by one; a process may be killed between."""
    output = tmp_path / "out"
    output.mkdir()
    monkeypatch.setattr(destination, "write_layout", _killed_half_way(destination.write_layout))
    with pytest.raises(KeyboardInterrupt):
        made(source, tokens, tmp_path, "transformers")
    assert list(output.iterdir())
    monkeypatch.undo()
    again, _ = made(source, tokens, tmp_path, "transformers", resume=True)
    assert list(digests(again).values()) == exported["transformers"]


def _killed_half_way(write):
    def killed(own, output, to, **options):
        write(own, output, to, **options)
        (output / "config.json").unlink()
        raise KeyboardInterrupt

    return killed


@pytest.mark.parametrize(
    ("reader", "name", "fields", "error", "words"),
    [
        ("llama.cpp", "out", {}, cq.OutputError, "ends in .gguf"),
        ("transformers", "out.gguf", {}, cq.OutputError, "a directory for transformers"),
        ("corequant", "out.gguf", {}, cq.OutputError, "written for llama.cpp"),
        ("vlm", "out", {}, cq.RecipeError, "did you mean 'vllm'"),
        ("llama.cpp", "out.gguf", {"block_size": 32}, cq.RecipeError, "every rotation merged"),
        ("llama.cpp", "out.gguf", {"weights": "int4:group64"}, cq.SpecError, "no block type"),
        (
            "llama.cpp",
            "out.gguf",
            {"activations": "int8:token"},
            cq.SpecError,
            "llama.cpp can't run the result: .*whatever a file says",
        ),
        ("vllm", "out", {"weights": "int4:group32:asymmetric"}, cq.SpecError, "must be symmetric"),
        ("transformers", "out", {"weights": "mxfp6_e2m3"}, cq.SpecError, "transformers can't run"),
        ("vllm", "out", {"keep": ["v_proj"]}, cq.RecipeError, "v_proj into one matrix.*one rule"),
        (
            "transformers",
            "out",
            {"layers": ["down_proj=int8:float32"]},
            cq.SpecError,
            "scales of all layers must be of one format",
        ),
        (
            "llama.cpp",
            "out.gguf",
            {"layers": ["down_proj=int8:channel"]},
            cq.SpecError,
            r"down_proj: GGUF has no block type",
        ),
    ],
)
def test_refused_before_any_work(reader, name, fields, error, words, source, tokens, tmp_path):
    known = "corequant" if reader == "vlm" else reader
    recipe = Recipe.preset(reader=known, **{**SMALL, **fields})
    with pytest.raises(error, match=words):
        cqhf.quantize(source, recipe, tokens, tmp_path / name, reader=reader, progress=_no_progress)
    assert not list(tmp_path.iterdir())


def _no_progress(*given):
    raise AssertionError("work was begun")


@pytest.mark.parametrize(
    ("kind", "reader", "words"),
    [
        ("opt", "transformers", "merging changed which tensors 'opt' has"),
        ("gpt2", "vllm", "not a linear layer of its own"),
        ("helium", "llama.cpp", "written for llama, mistral"),
    ],
)
def test_architectures_are_refused_before_any_work(kind, reader, words, tokens, tmp_path):
    widths = {"word_embed_proj_dim": 64} if kind == "opt" else {}
    model = cqhf.tiny_model(kind, hidden_size=64, **widths)
    recipe = Recipe.preset(reader=reader, rotation="offline", weights="int4:group16", **SMALL)
    if reader == "llama.cpp":
        recipe = Recipe.preset(reader=reader, **SMALL)
    with pytest.raises(cq.ArchitectureError, match=words):
        cqhf.quantize(
            model, recipe, tokens % 128, tmp_path / NAMES.get(reader, "out"),
            reader=reader, progress=_no_progress,
        )  # fmt: skip


def test_tokenizers_are_refused_before_any_work(tokens, tmp_path):
    write_model(tmp_path / "model")
    tokenizer_of("gpt-2").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    file.write_text(file.read_text().replace('"normalizer": null', '"normalizer": {"type": "NFD"}'))
    with pytest.raises(cq.CheckpointError, match="can't run the result: normalizer of"):
        made(tmp_path / "model", tokens, tmp_path, "llama.cpp", progress=_no_progress)


def test_without_an_output_there_is_no_reader(source, tokens):
    with pytest.raises(cq.OutputError, match="output must be given to be written for vllm"):
        cqhf.quantize(source, Recipe.preset(), tokens, reader="vllm")
    assert Destination("x").layout == "corequant"
