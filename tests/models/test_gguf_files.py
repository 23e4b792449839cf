"""GGUF files of tiny models, run by llama.cpp; the real one is in test_readers."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant.storage.gguf import decode_blocks
from corequant_cli.app import app
from corequant_transformers.exports import to_gguf as gguf_file
from corequant_transformers.exports.gguf_tokenizers import _WORDS
from corequant_transformers.model.surroundings import quiet_transformers
from tests.models.llamacpp import serving

VOCABULARY = 320
TEXT = "Hello, World! It's 1234 o'clock.\n\n  She'LL   say: naïve café 北京 12\t34 -- "
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS % digits), "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
        for name, digits in (("llama-bpe", r"\p{N}{1,3}"), ("qwen2", r"\p{N}"))
    },
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tokenizer_of(name):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = SPLITS[name]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 3, "1234 12 123 say it's", "  \n\n"], trainer)
    if name == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ messages }}",
    )


def write_model(folder, kind="llama", split="gpt-2", **config):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY}
    with quiet_transformers():
        cqhf.tiny_model(kind, **{**sizes, **config}).save_pretrained(folder)
        tokenizer_of(split).save_pretrained(folder)
    return folder


def quantized(folder, source, **recipe):
    tokens = np.random.default_rng(0).integers(2, 300, (2, 24))
    values = {"rotation": "offline", "weights": "int8:group32:symmetric:float16"}
    cqhf.quantize(
        source,
        Recipe(**{**values, "activations": "int8:group32:symmetric:float16", **recipe}),
        tokens,
        folder,
    )
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return quantized(folder / "own", write_model(folder / "source"))


@torch.no_grad()
def log_probabilities(model, ids):
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return torch.log_softmax(logits.float(), -1).numpy()


def spoken(model, tokenizer):
    """A text after which clearly one token comes, and is text of its own.

    llama.cpp gives no probabilities with special tokens and parts of characters.
    """
    for end in range(len(TEXT), 20, -1):
        ids = tokenizer(TEXT[:end]).input_ids
        (first, second) = np.argsort(-(p := log_probabilities(model, ids)))[:2]
        written = 2 <= first < VOCABULARY - 8 and "\ufffd" not in tokenizer.decode([first])
        if written and p[first] > p[second] + 0.3:
            return TEXT[:end], ids
    raise AssertionError("the model prefers special tokens everywhere")


@pytest.mark.parametrize(
    ("kind", "config", "split"),
    [
        ("llama", {}, "smollm"),
        ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, "llama-bpe"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
            "gpt-2",
        ),
        ("qwen2", {}, "qwen2"),
    ],
)
def test_llama_cpp_computes_the_same_from_ids_and_text(kind, config, split, tmp_path):
    source = write_model(tmp_path / "source", kind, split, **config)
    own = quantized(tmp_path / "own", source)
    file = cqhf.export(own, tmp_path / "model.gguf", "gguf")
    model, tokenizer = cqhf.load(own), cqhf.load_tokenizer(own)
    text, ids = spoken(model, tokenizer)
    assert (ids[0] == 0) == (split == "llama-bpe")
    expected = log_probabilities(model, ids)
    if "rope_parameters" in config:
        # Other frequencies would be noticed.
        model.model.rotary_emb.inv_freq = 100.0 ** -(torch.arange(0, 16, 2) / 16)
        other = log_probabilities(model, ids)
        assert np.abs(other - expected).mean() >= 0.2
    with serving(file, VOCABULARY) as next_token:
        found = next_token(ids)
        assert np.abs(found - expected).max() <= 0.2
        assert np.abs(found - expected).mean() <= 0.05
        # Its own tokenizer arrives at the same tokens.
        np.testing.assert_array_equal(next_token(text), found)


def fields(file):
    return {k: f.contents() for k, f in gguf.GGUFReader(file).fields.items()}


def test_a_gguf_source_is_carried_over(own, tmp_path):
    first = cqhf.export(own, tmp_path / "first.gguf", "gguf")
    again = quantized(tmp_path / "again", first)
    with pytest.raises(cq.CheckpointError, match="source must be given.*first.gguf"):
        cqhf.export(again, tmp_path / "second.gguf", "gguf")
    second = cqhf.export(again, tmp_path / "second.gguf", "gguf", source=first)
    old, new = fields(first), fields(second)
    for key in old:
        if key.startswith(("general.", "tokenizer.", "llama.")):
            assert new[key] == old[key], key
    assert new["tokenizer.chat_template"] == "{{ messages }}"
    assert new["general.name"] == "source"
    other = write_model(tmp_path / "other", vocab_size=VOCABULARY + 1)
    own = quantized(tmp_path / "larger", other)
    with pytest.raises(cq.CheckpointError, match="must have 321 tokens .*, got 320"):
        cqhf.export(own, tmp_path / "third.gguf", "gguf", source=first)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(first.read_bytes()[:1000])
    with pytest.raises(cq.CheckpointError, match=r"broken.gguf can't be read"):
        cqhf.export(again, tmp_path / "third.gguf", "gguf", source=broken)
    assert sorted(tmp_path.glob("*.gguf*")) == [broken, first, second]


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        ("int4:group32:symmetric:float16:mse", "Q4_0"),
        ("int4:group32:asymmetric:float16", "Q4_1"),
        ("int8:group32:symmetric:float16", "Q8_0"),
        ("mxfp4", "MXFP4"),
    ],
)
def test_blocks_hold_the_codes_of_the_directory(weights, kind, tmp_path):
    from corequant_transformers.checkpoint.reader import Stored

    own = quantized(tmp_path / "own", write_model(tmp_path / "source"), weights=weights)
    file = cqhf.export(own, tmp_path / "model.gguf", "gguf")
    stored, found = Stored(own), {t.name: t for t in gguf.GGUFReader(file).tensors}
    down, query = found["blk.1.ffn_down.weight"], found["blk.0.attn_q.weight"]
    assert {down.tensor_type.name, query.tensor_type.name} == {kind}
    rows = {m.name: cq.dequantize(stored.quantized(m)) for m in stored.plan.quantized}
    tolerance = 2e-4 if kind == "Q4_1" else 0
    meant = rows["model.layers.1.mlp.down_proj"]
    np.testing.assert_allclose(decode_blocks(down.data, kind), meant, rtol=0, atol=tolerance)
    # Channels 0 and 8 of the first head turn against each other; there they are neighbours.
    meant = rows["model.layers.0.self_attn.q_proj"][[0, 8, 1, 9]]
    np.testing.assert_allclose(decode_blocks(query.data, kind)[:4], meant, rtol=0, atol=tolerance)
    assert found["output.weight"].tensor_type.name == "F16"
    assert found["output_norm.weight"].data.tolist() == [1.0] * 64


EXPERTS = {"mixtral": {"sliding_window": None}, "qwen3_moe": {"norm_topk_prob": True}}


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_experts_of_a_layer_are_one_tensor(kind, tmp_path):
    from corequant_transformers.checkpoint.reader import Stored

    source = write_model(tmp_path / "source", kind, moe_intermediate_size=64, **EXPERTS[kind])
    down = {"pattern": r"re:model\.layers\.1\..*down_proj", "weights": "int8:group32"}
    recipe = {
        "weights": "int4:group32:symmetric:float16",
        "layers": [down],
        "keep": [r"re:model\.layers\.0\..*experts.*up_proj"],
    }
    own = quantized(tmp_path / "own", source, **recipe)
    file = cqhf.export(own, tmp_path / "model.gguf", "gguf")
    stored, found = Stored(own), {t.name: t for t in gguf.GGUFReader(file).tensors}
    types = {n: t.tensor_type.name for n, t in found.items() if ".ffn_" in n and "norm" not in n}
    assert types == {
        "blk.0.ffn_gate_inp.weight": "F32",
        "blk.0.ffn_gate_exps.weight": "Q4_0",
        "blk.0.ffn_up_exps.weight": "F16",
        "blk.0.ffn_down_exps.weight": "Q4_0",
        "blk.1.ffn_gate_inp.weight": "F32",
        "blk.1.ffn_gate_exps.weight": "Q4_0",
        "blk.1.ffn_up_exps.weight": "Q4_0",
        "blk.1.ffn_down_exps.weight": "Q8_0",
    }
    kept = found["blk.0.ffn_up_exps.weight"].data
    for expert in range(4):
        for name, kind in (("gate", "Q4_0"), ("down", "Q8_0")):
            path = f"model.layers.1.mlp.experts.{expert}.{name}_proj"
            row = next(m for m in stored.plan.quantized if m.name == path)
            blocks = found[f"blk.1.ffn_{name}_exps.weight"].data[expert]
            np.testing.assert_array_equal(
                decode_blocks(blocks, kind), cq.dequantize(stored.quantized(row))
            )
        expected = stored.read(f"model.layers.0.mlp.experts.{expert}.up_proj.weight").array()
        np.testing.assert_array_equal(kept[expert], expected.astype(np.float16))


def test_blocks_without_experts_are_refused(tmp_path):
    config = {"moe_intermediate_size": 64, "norm_topk_prob": True, "mlp_only_layers": [1]}
    own = quantized(tmp_path / "own", write_model(tmp_path / "source", "qwen3_moe", **config))
    with pytest.raises(cq.ArchitectureError, match=r"experts in every block, .* in block 1"):
        cqhf.export(own, tmp_path / "model.gguf", "gguf")


def test_experts_of_a_layer_must_be_of_one_type(tmp_path):
    source = write_model(tmp_path / "source", "mixtral", sliding_window=None)
    other = {"pattern": "model.layers.1.mlp.experts.3", "weights": "int8:group32"}
    own = quantized(
        tmp_path / "own", source, weights="int4:group32:symmetric:float16", layers=[other]
    )
    with pytest.raises(cq.SpecError, match=r"of one type, got Q8_0 for .*\.1\.mlp\.experts\.3\."):
        cqhf.export(own, tmp_path / "model.gguf", "gguf")


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        ({"rotation": "merged", "block_size": 16}, cq.RecipeError, "rotation 'offline'"),
        ({"weights": "int4:group16"}, cq.SpecError, "GGUF has no block type"),
        ({"activations": "int4:token"}, cq.SpecError, "must be none or int8:group32"),
    ],
)
def test_what_llama_cpp_lacks_is_refused_and_nothing_is_left(recipe, error, words, own, tmp_path):
    shutil.copytree(own, tmp_path / "own")
    values = {"rotation": "offline", "weights": "mxfp4", "activations": "none", **recipe}
    (tmp_path / "own/recipe.toml").write_text(Recipe(**values).to_toml())
    with pytest.raises(error, match=words):
        cqhf.export(tmp_path / "own", tmp_path / "model.gguf", "gguf")
    assert [f.name for f in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("helium", {}, r"GGUF files are written for llama, .*, got 'helium'"),
        ("mistral", {"sliding_window": 16}, "sliding_window must be null, got 16"),
        ("llama", {"hidden_act": "gelu"}, "computes silu, so hidden_act must be that, got 'gelu'"),
        ("qwen3", {"attention_bias": True}, "attention_bias must be false"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob must be true, got False"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be default, linear or llama3",
        ),
    ],
)
def test_other_architectures_are_refused(kind, config, words, own, tmp_path):
    shutil.copytree(own, tmp_path / "own")
    file = tmp_path / "own/float_config.json"
    values = {**json.loads(file.read_text()), "model_type": kind, **config}
    file.write_text(json.dumps(values))
    with pytest.raises(cq.ArchitectureError, match=words):
        cqhf.export(tmp_path / "own", tmp_path / "model.gguf", "gguf")


def test_other_tokenizers_are_refused(own, tmp_path):
    def refused(words, **changes):
        shutil.copytree(own, tmp_path / "changed")
        file = tmp_path / "changed/tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}))
        with pytest.raises(cq.CheckpointError, match=words):
            cqhf.export(tmp_path / "changed", tmp_path / "model.gguf", "gguf")
        shutil.rmtree(tmp_path / "changed")

    words = "one that llama.cpp has a name for"
    spaced = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    refused(words, pre_tokenizer=spaced)
    refused(words, pre_tokenizer={"type": "Whitespace"})
    refused(words, pre_tokenizer=None)
    refused("tokenizer that loads|byte-level BPE", model={"type": "WordLevel", "vocab": {}})
    shutil.copytree(own, tmp_path / "changed", ignore=lambda *_: ["tokenizer.json"])
    with pytest.raises(cq.CheckpointError, match="tokenizer"):
        cqhf.export(tmp_path / "changed", tmp_path / "model.gguf", "gguf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer of .* must be null, .*got NFC"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": " "}},
            "Replace",
        ),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}, "Sequence"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix of .* null or false"),
        ({"model": {"dropout": 0.5}}, "dropout of"),
        ({"model": {"ignore_merges": True}}, "ignore_merges of"),
        ({"added_tokens": {"lstrip": True}}, "lstrip of the added token '<s>'"),
        ({"normalizer": {"type": "Sequence", "normalizers": []}}, None),
        ({"normalizer": None}, None),
    ],
)
def test_what_llama_cpp_does_to_no_text_is_refused(changes, words, own, tmp_path):
    shutil.copytree(own, tmp_path / "changed")
    file = tmp_path / "changed/tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    for name, change in changes.items():
        if name == "model":
            values[name].update(change)
        elif name == "added_tokens":
            values[name][0].update(change)
        else:
            values[name] = change
    file.write_text(json.dumps(values))
    options = {"to": "gguf", "verify": False}
    if words is None:
        cqhf.export(tmp_path / "changed", tmp_path / "model.gguf", **options)
        return
    with pytest.raises(cq.CheckpointError, match=words):
        cqhf.export(tmp_path / "changed", tmp_path / "model.gguf", **options)
    # Also where it comes from the model that was quantized.
    (tmp_path / "source").mkdir()
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copy(own.parent / "source" / name, tmp_path / "source")
    shutil.copy(file, tmp_path / "source")
    with pytest.raises(cq.CheckpointError, match=words):
        cqhf.export(own, tmp_path / "model.gguf", "gguf", source=tmp_path / "source")
    assert not (tmp_path / "model.gguf").exists()


def test_a_gguf_file_carries_its_digest(own, tmp_path):
    file = cqhf.export(own, tmp_path / "model.gguf", "gguf")
    assert cqhf.check_digests(file) == 1
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    again = tmp_path / "again.gguf"
    for read in (
        cqhf.check_digests,
        lambda path: cqhf.Source(path).load(),
        lambda path: cqhf.export(own, again, "gguf", source=path),
    ):
        with pytest.raises(cq.CheckpointError, match="model.gguf is not as it was written"):
            read(file)
    plain = bytes(data).replace(b"corequant.sha256", b"corequant.sha255")
    file.write_bytes(plain)
    with pytest.raises(cq.CheckpointError, match="lacks its corequant.sha256"):
        cqhf.check_digests(file)
    file.write_bytes(plain.replace(b"corequant.version", b"corequant.vercion"))
    assert cqhf.check_digests(file) is None


def test_outputs_that_can_not_be_are_refused(own, tmp_path):
    (tmp_path / "there.gguf").touch()
    for name in ("there.gguf", "model.bin", "missing/model.gguf"):
        with pytest.raises(cq.OutputError, match="output"):
            cqhf.export(own, tmp_path / name, "gguf")
    with pytest.raises(cq.OutputError, match="to must be one of compressed-tensors, gguf"):
        cqhf.export(own, tmp_path / "out", "onnx")
    with pytest.raises(cq.OutputError, match="source must be left out for compressed-tensors"):
        cqhf.export(own, tmp_path / "out", source=tmp_path / "source")


def test_the_command_writes_a_file_and_says_so(own, tmp_path):
    file = tmp_path / "model.gguf"
    command = ["export", str(own), "-o", str(file), "--to", "gguf", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    sizes = {"model.gguf": file.stat().st_size}
    assert json.loads(done.stdout) == {"output": str(file), "to": "gguf", "files": sizes}
    assert fields(file)["tokenizer.ggml.pre"] == "gpt-2"


def test_a_lost_bit_is_noticed(own, tmp_path, monkeypatch):
    write = gguf.GGUFWriter.write_tensor_data

    def damaging(writer, tensor):
        changed = tensor.copy()
        changed.view(np.uint8).reshape(-1)[5] ^= 1
        write(writer, changed)

    monkeypatch.setattr(gguf_file.gguf.GGUFWriter, "write_tensor_data", damaging)
    with pytest.raises(cq.OutputError, match="did not read back as it was written"):
        cqhf.export(own, tmp_path / "model.gguf", "gguf")
    assert not list(tmp_path.glob("*.gguf*"))
