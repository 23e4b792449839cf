"""Saved directories: equal to the bit, complete or absent, refused by other readers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.files.digests import write_digests
from corequant_transformers.model.surroundings import peak_rss_mib
from tests import capabilities
from tests.models.conftest import ARCHITECTURES


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokens):
    """A quantized tiny model in memory and the directory it was saved to."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    result = cqhf.quantize(cqhf.tiny_model("qwen2"), Recipe(block_size=16), tokens, folder)
    return result, folder


@pytest.fixture
def copy_of(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved[1], folder)
    return folder


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 16},
        {"block_size": None, "activations": "none"},
        {"block_size": 12, "weights": "int3:group16:asymmetric", "activations": "int8:group8"},
    ],
)
def test_loads_to_the_same_logits(kind, tied, options, tokens, tmp_path):
    model = cqhf.tiny_model(kind, tie_word_embeddings=tied)
    result = cqhf.quantize(model, Recipe(**options), tokens, tmp_path / "out")
    loaded = cqhf.load(tmp_path / "out")
    assert torch.equal(logits(result.model, tokens), logits(loaded, tokens))
    assert not torch.allclose(logits(model, tokens), logits(loaded, tokens), atol=1e-3)


def test_a_directory_model_keeps_its_tokenizer_files_byte_for_byte(tokens, tmp_path):
    source = tmp_path / "float"
    cqhf.tiny_model("llama").save_pretrained(source)
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    word_level(source)
    cqhf.quantize(source, Recipe(block_size=16), tokens, tmp_path / "out")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    original = (source / "config.json").read_bytes()
    assert (tmp_path / "out" / "float_config.json").read_bytes() == original
    assert cqhf.load_tokenizer(tmp_path / "out")("a b").input_ids == [1, 2]


def word_level(folder):
    """Write a tokenizer of one-letter words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0} | {chr(96 + i): i for i in range(1, 27)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_text_calibrates_a_directory_model(tmp_path):
    source = tmp_path / "float"
    cqhf.tiny_model("llama").save_pretrained(source)
    word_level(source)
    text = "a b c d e f g h " * 20
    recipe = Recipe(block_size=16, samples=2, sequence_length=64)
    result = cqhf.quantize(source, recipe, text)
    assert result.report["calibration_tokens"] == 128
    assert result.tokenizer is not None


def test_a_sharded_model_equals_a_single_file(tokens, tmp_path):
    model = cqhf.tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for name in ("one", "many"):
        word_level(tmp_path / name)
    results = [
        cqhf.quantize(tmp_path / name, Recipe(block_size=16), tokens).model
        for name in ("one", "many")
    ]
    assert torch.equal(logits(results[0], tokens), logits(results[1], tokens))


@pytest.mark.parametrize("reader", ["AutoModelForCausalLM", "Qwen2ForCausalLM"])
def test_plain_transformers_refuses_the_directory(saved, reader):
    code = textwrap.dedent(
        f"""
        import transformers
        try:
            transformers.{reader}.from_pretrained({str(saved[1])!r})
        except (ValueError, OSError) as error:
            print(type(error).__name__, error)
        else:
            print("loaded")
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ValueError The transformers file in the config")
    assert done.stdout.endswith(": import corequant_transformers first\n")


def test_the_report_and_recipe_are_there(saved):
    report = json.loads((saved[1] / "report.json").read_text())
    assert report["verification"]["logits_error"] < 1e-9
    assert Recipe.from_toml((saved[1] / "recipe.toml").read_text()) == saved[0].plan.recipe
    row = report["regions"][0]
    assert row["largest_block_mass_permuted"] < row["largest_block_mass"]


def test_files_are_readable_by_others(saved):
    modes = {f.name: f.stat().st_mode & 0o777 for f in saved[1].iterdir()}
    assert len(set(modes.values())) == 1, modes


# ---- damaged files


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    file = folder / "corequant.safetensors"
    tensors = load_file(file, backend="pread")
    change(tensors)
    save_file(tensors, file)


NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "corequant.safetensors").unlink(), "is missing"),
        (lambda f: os.truncate(f / "corequant.safetensors", 5000), "truncated or malformed"),
        (lambda f: os.truncate(f / "corequant.safetensors", 3), "truncated or malformed"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "can't be read as JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "can't be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda f: edit_json(f / "config.json", quantization_config=None), "quant_method"),
        (
            lambda f: edit_json(
                f / "config.json",
                quantization_config={"quant_method": "corequant", "format_version": 99},
            ),
            "format_version",
        ),
        (lambda f: (f / "float_config.json").unlink(), "float_config.json is missing"),
        (lambda f: (f / "recipe.toml").unlink(), "recipe.toml can't be read"),
        (
            lambda f: (f / "recipe.toml").write_text("block_size = 'x'"),
            "block_size must be an integer",
        ),
        (lambda f: edit_tensors(f, lambda t: t.pop(f"{NAME}.weight_packed")), "is missing"),
        (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), "lacks the tensor"),
        (lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))), "unexpected tensor x"),
        (
            lambda f: edit_tensors(f, lambda t: t["lm_head.weight"].view(-1)[3:4].fill_(torch.nan)),
            "NaN or infinity",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(3)})),
            "must have shape",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.pop("model.layers.0.self_attn.q_proj.bias")),
            "q_proj.bias",
        ),
    ],
)
def test_damaged_directories_are_refused(copy_of, damage, words):
    damage(copy_of)
    with pytest.raises(cq.CheckpointError, match=words):
        cqhf.load(copy_of)


def test_sources_that_cant_be_read(saved, tokens, tmp_path):
    recipe = Recipe(block_size=16)
    with pytest.raises(cq.CheckpointError, match="must be a directory"):
        cqhf.quantize(tmp_path / "nowhere", recipe, tokens)
    with pytest.raises(cq.CheckpointError, match="already quantized"):
        cqhf.quantize(saved[1], recipe, tokens)
    source = tmp_path / "float"
    cqhf.tiny_model("llama").save_pretrained(source, max_shard_size="40KB")
    word_level(source)
    shard = sorted(source.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    os.truncate(shard, len(content) // 2)
    with pytest.raises(cq.CheckpointError, match=f"{shard.name} is malformed"):
        cqhf.quantize(source, recipe, tokens, tmp_path / "out")
    shard.unlink()
    with pytest.raises(cq.CheckpointError, match="is missing"):
        cqhf.quantize(source, recipe, tokens, tmp_path / "out")
    shard.write_bytes(content)
    index = source / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())
    name, home = next(iter(mapping["weight_map"].items()))
    edit_json(index, weight_map={**mapping["weight_map"], name: "../" + home})
    with pytest.raises(cq.CheckpointError, match="files of its own folder"):
        cqhf.quantize(source, recipe, tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_missing_from_its_file(tokens, tmp_path):
    source = tmp_path / "float"
    cqhf.tiny_model("llama").save_pretrained(source)
    word_level(source)
    file = source / "model.safetensors"
    tensors = load_file(file, backend="pread")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(cq.CheckpointError, match=r"lacks 1 weights.*up_proj"):
        cqhf.quantize(source, Recipe(block_size=16), tokens)


# ---- outputs that can't be written


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir())


def test_output_not_empty(tokens, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(cq.OutputError, match="new or empty directory"):
        cqhf.quantize(cqhf.tiny_model("llama"), Recipe(), tokens, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"
    with pytest.raises(cq.OutputError, match="new or empty"):
        cqhf.quantize(cqhf.tiny_model("llama"), Recipe(), tokens, tmp_path / "out" / "mine")
    with pytest.raises(cq.OutputError, match="parent folder must exist"):
        cqhf.quantize(cqhf.tiny_model("llama"), Recipe(), tokens, tmp_path / "a" / "b")


def test_an_empty_directory_is_filled(tokens, tmp_path):
    (tmp_path / "out").mkdir()
    cqhf.quantize(cqhf.tiny_model("llama"), Recipe(block_size=16), tokens, tmp_path / "out")
    cqhf.load(tmp_path / "out")
    assert leftovers(tmp_path) == ["out"]


def test_read_only_output(tokens, tmp_path, monkeypatch):
    # A superuser may write anywhere, so the refusal is made to come from the system call.
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(cq.OutputError, match="can't be written.*Permission denied"):
        cqhf.quantize(cqhf.tiny_model("llama"), Recipe(), tokens, tmp_path / "out")
    assert leftovers(tmp_path) == []


@capabilities.limits
def test_a_full_disk_leaves_nothing(saved, tmp_path):
    # A limit on the size of files stands in for a full disk.
    code = textwrap.dedent(
        f"""
        import resource, signal, sys, numpy as np
        import corequant as cq, corequant_transformers as cqhf
        from corequant.recipe import Recipe
        result = cqhf.quantize(
            cqhf.tiny_model("qwen2"), Recipe(block_size=16), np.arange(128).reshape(2, 64))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            result.save({str(tmp_path / "out")!r})
        except cq.OutputError as error:
            print("refused:", error)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "refused:" in done.stdout
    assert leftovers(tmp_path) == []


def test_what_does_not_read_back_is_not_kept(saved, tmp_path, monkeypatch):
    real = save_file

    def lossy(tensors, file, metadata):
        flipped = {k: -v if k == "lm_head.weight" else v for k, v in tensors.items()}
        real(flipped, file, metadata=metadata)

    monkeypatch.setattr("safetensors.torch.save_file", lossy)
    with pytest.raises(cq.OutputError, match=r"lm_head\.weight did not read back"):
        saved[0].save(tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.fixture
def interruptible():
    """Make SIGINT interrupt here too where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("phase", ["calibrate", "quantize", "save"])
def test_interrupting_leaves_nothing(tokens, tmp_path, phase):
    def progress(name, done, total):
        if name == phase:
            signal.raise_signal(signal.SIGINT)

    model, recipe = cqhf.tiny_model("llama"), Recipe(block_size=16)
    with pytest.raises(KeyboardInterrupt):
        cqhf.quantize(model, recipe, tokens, tmp_path / "out", progress=progress)
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("interruptible")
def test_interrupting_in_the_middle_of_writing_leaves_nothing(saved, tmp_path, monkeypatch):
    def interrupted(tensors, file, metadata):
        save_file(tensors, file, metadata=metadata)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved[0].save(tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_peak_memory_is_reported(saved):
    assert 50 < saved[0].report["peak_rss_mib"] <= peak_rss_mib() + 1


@capabilities.limits
def test_the_peak_is_at_most_what_the_system_says():
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    assert 50 < peak_rss_mib() <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit + 1


@pytest.mark.real_model
def test_the_real_model_is_saved_and_loaded_bit_for_bit(
    smollm2, smollm2_path, help_tokens, tmp_path
):
    recipe = Recipe(block_size=16)
    help_tokens = help_tokens[:, :512]
    result = cqhf.quantize(smollm2_path, recipe, help_tokens[:2], tmp_path / "out")
    found = result.verification
    assert found.logits_error < 1e-9
    assert len(found.block_errors) == 30
    assert max(found.block_errors) < 1e-9
    assert (found.matrices_changed, found.rotations_online, found.permutations) == (212, 30, 30)
    loaded = cqhf.load(tmp_path / "out")
    ids = help_tokens[5:6]
    assert torch.equal(logits(result.model, ids), logits(loaded, ids))
    tokenizer = cqhf.load_tokenizer(tmp_path / "out")
    text = "Rotations spread outliers."
    assert tokenizer(text).input_ids == smollm2[1](text).input_ids
    size = (tmp_path / "out" / "corequant.safetensors").stat().st_size
    embeddings = 2 * 49152 * 576 * 4
    assert size < embeddings + 60 * 2**20
    quantized = cqhf.evaluate(loaded, help_tokens[4:5]).perplexity
    exact = cqhf.evaluate(smollm2[0], help_tokens[4:5]).perplexity
    assert exact < quantized < 10 * exact
    assert np.isfinite(quantized)


# ---- shards that lead elsewhere


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "a\0b", "x" * 300])
def test_an_index_may_not_name_files_elsewhere(name, tmp_path):
    cqhf.tiny_model("llama").save_pretrained(tmp_path)
    index = {"weight_map": {"lm_head.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(cq.CheckpointError):
        cqhf.Source(tmp_path)


@capabilities.links
def test_a_link_may_not_lead_out_of_the_directory(tmp_path):
    cqhf.tiny_model("llama").save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(cq.CheckpointError, match="own folder"):
        cqhf.Source(tmp_path / "model")


def other_files(folder, change):
    """Save a tiny model with its tensors changed by ``change``."""
    cqhf.tiny_model("llama").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors", backend="pread")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    word_level(folder)
    return folder


QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_codes_of_another_quantizer_are_not_read_as_numbers(kind, tokens, tmp_path):
    def change(tensors):
        tensors[QUERY] = (tensors[QUERY] * 50).to(kind)

    folder = other_files(tmp_path / "model", change)
    with pytest.raises(cq.CheckpointError, match=f"{QUERY} of .* must be one of F64, F32"):
        cqhf.quantize(folder, Recipe(block_size=16), tokens)


def test_a_model_that_is_quantized_already_is_refused(tokens, tmp_path):
    folder = other_files(tmp_path / "model", lambda tensors: None)
    edit_json(folder / "config.json", quantization_config={"quant_method": "awq"})
    for call in (cqhf.plan, lambda m, r: cqhf.quantize(m, r, tokens)):
        with pytest.raises(cq.CheckpointError, match="quantized already"):
            call(folder, Recipe(block_size=16))
    model = cqhf.tiny_model("llama")
    model.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(cq.CheckpointError, match="LlamaForCausalLM has a quantization_config"):
        cqhf.quantize(model, Recipe(block_size=16), tokens)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.extra.weight"])
def test_a_tensor_that_the_model_has_no_place_for_is_named(name, tokens, tmp_path):
    def change(tensors):
        tensors[name] = torch.zeros(8)

    folder = other_files(tmp_path / "model", change)
    with pytest.raises(cq.CheckpointError, match=f"has no place for, the first is {name}"):
        cqhf.quantize(folder, Recipe(block_size=16), tokens)


def test_buffers_of_older_files_are_no_obstacle(tokens, tmp_path):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    folder = other_files(tmp_path / "model", change)
    plain = cqhf.quantize(cqhf.tiny_model("llama"), Recipe(block_size=16), tokens)
    found = cqhf.quantize(folder, Recipe(block_size=16), tokens)
    assert torch.equal(logits(plain.model, tokens), logits(found.model, tokens))


def test_what_is_said_about_generation_is_kept(tokens, tmp_path):
    model = cqhf.tiny_model("llama")
    wanted = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=[1, 5], max_new_tokens=17
    )
    model.generation_config = wanted
    model.save_pretrained(tmp_path / "source")
    word_level(tmp_path / "source")
    results = []
    for number, source in enumerate((model, tmp_path / "source")):
        results.append(cqhf.quantize(source, Recipe(block_size=16), tokens))
        results[-1].save(tmp_path / f"memory{number}")
        cqhf.quantize(source, Recipe(block_size=16), tokens, tmp_path / f"disk{number}")
    models = [result.model for result in results]
    models += [cqhf.load(tmp_path / f"{k}{n}") for k in ("memory", "disk") for n in (0, 1)]
    for found in models:
        config = found.generation_config
        assert (config.temperature, config.top_p, config.max_new_tokens) == (0.7, 0.9, 17)
        assert config.eos_token_id == [1, 5]
    (tmp_path / "disk1" / "generation_config.json").write_text("{")
    with pytest.raises(cq.CheckpointError, match="generation_config.json can't be loaded"):
        cqhf.load(tmp_path / "disk1")


def test_save_pretrained_does_not_lose_layers(saved, tmp_path):
    """Of a model that was loaded it writes all; see ``test_loading``."""
    with pytest.raises(cq.OutputError, match="would lose the quantized layers"):
        saved[0].model.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_directories_of_earlier_versions_still_load(saved, copy_of):
    """Their model type was one that Transformers doesn't know."""
    told = "corequant_qwen2 (load it with corequant_transformers.load)"
    edit_json(copy_of / "config.json", model_type=told, transformers_weights=None)
    write_digests(copy_of)
    ids = np.arange(12)[None]
    assert torch.equal(logits(cqhf.load(copy_of), ids), logits(cqhf.load(saved[1]), ids))
    with pytest.raises(ValueError, match="load it with corequant_transformers.load"):
        transformers.AutoModelForCausalLM.from_pretrained(copy_of)
    with pytest.raises(cq.CheckpointError, match="already quantized"):
        cqhf.Source(copy_of)


def test_windows_longer_than_learned_positions_are_refused():
    model = cqhf.tiny_model("gpt2")
    most = model.config.max_position_embeddings
    long = np.zeros((2, most + 1), np.int64)
    for call in (
        lambda: cqhf.quantize(model, Recipe(block_size=16), long),
        lambda: cqhf.evaluate(model, long),
        lambda: cqhf.inspect(model, long, 16),
    ):
        with pytest.raises(cq.CalibrationError, match=f"sequence_length must be at most {most}"):
            call()
    assert cqhf.evaluate(model, long[:1, :-1]).predicted == most - 1
