"""Tokenizers of SentencePiece's kind in GGUF files."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import corequant as cq
import corequant_transformers as cqhf
from corequant_transformers.exports.gguf_pieces import check_pieces
from corequant_transformers.model.surroundings import quiet_transformers
from tests.models.llamacpp import serving
from tests.models.test_gguf_files import VOCABULARY, fields, log_probabilities, quantized

SPACE = "\u2581"
WORDS = ["the", "there", "then", "he", "her", "here", "in", "ing", "thing", "think", "1", "12", "é"]
TEXT = "  There is a thing: the  others think 12 + 3 in café 北京, then\nhere."


def vocabulary():
    """Return tokens in the order of their scores, as a SentencePiece model lists them."""
    whole = [SPACE + word for word in WORDS] + WORDS
    letters = sorted({letter for word in whole for letter in word} | set("aisor"))
    parts = {word[:end] for word in whole for end in range(2, len(word) + 1)}
    longer = sorted(parts | {SPACE * 2}, key=lambda part: (len(part), part))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return [*special, *longer, *letters][:VOCABULARY]


def pieces(form):
    tokens = {token: index for index, token in enumerate(vocabulary())}
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        if not token.startswith("<")
        for cut in range(1, len(token))
        if token[:cut] in tokens and token[cut:] in tokens
    ]
    model = models.BPE(
        vocab=tokens, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    replace = normalizers.Replace(" ", SPACE)
    if form == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    elif form == "gemma":
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("form", ["llama", "gemma", "metaspace"])
def test_llama_cpp_arrives_at_the_same_tokens(form, tmp_path):
    size = len(vocabulary())
    with quiet_transformers():
        model = cqhf.tiny_model("llama", vocab_size=size, hidden_size=64, intermediate_size=128)
        # After any text the same token comes, which is one of a text.
        model.lm_head.weight.data[size - 1] *= 3
        model.save_pretrained(tmp_path / "source")
        pieces(form).save_pretrained(tmp_path / "source")
    own = quantized(tmp_path / "own", tmp_path / "source", rotation="heads")
    file = cqhf.export(own, tmp_path / "model.gguf", "gguf")
    written, tokenizer, loaded = fields(file), cqhf.load_tokenizer(own), cqhf.load(own)
    assert written["tokenizer.ggml.model"] == "llama"
    assert written["tokenizer.ggml.add_space_prefix"] == (form == "llama")
    assert written["tokenizer.ggml.add_bos_token"] is True
    texts = []
    for end in range(len(TEXT), 10, -1):
        ids = tokenizer(TEXT[:end]).input_ids
        found = log_probabilities(loaded, ids)
        second, first = np.argsort(found)[-2:]
        if first > 258 and found[first] > found[second] + 0.3:
            texts.append((TEXT[:end], ids))
    assert len(texts) >= 3
    with serving(file, size) as next_token:
        for text, ids in texts[:3]:
            assert any(3 <= i < 259 for i in ids)
            assert (next_token(text) == next_token(ids)).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["model"]["merges"].pop(0), "every pair that gives a token"),
        (lambda v: v["model"]["merges"].append(v["model"]["merges"].pop(0)), None),
        (
            lambda v: v["model"]["merges"].append(
                v["model"]["merges"].pop(
                    next(
                        k
                        for k, (a, b) in enumerate(itertools.pairwise(v["model"]["merges"]))
                        if "".join(a) == "".join(b)
                    )
                )
            ),
            "those that give one token in a row",
        ),
        (lambda v: v["model"].update(ignore_merges=True), "ignore_merges of"),
        (lambda v: v.update(normalizer={"type": "NFC"}), "and nothing else, got NFC"),
        (lambda v: v.update(normalizer=None), "and nothing else, got none"),
        (
            lambda v: v.update(
                normalizer=None,
                pre_tokenizer={
                    "type": "Metaspace",
                    "replacement": SPACE,
                    "prepend_scheme": "always",
                    "split": True,
                },
            ),
            "got Metaspace always, words",
        ),
    ],
)
def test_what_gives_other_tokens_is_refused(change, words, tmp_path):
    file = tmp_path / "tokenizer.json"
    values = json.loads(pieces("llama").backend_tokenizer.to_str())
    change(values)
    if words is None:
        assert check_pieces(file, values)[0]
        return
    with pytest.raises(cq.CheckpointError, match=words):
        check_pieces(file, values)
