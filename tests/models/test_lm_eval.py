"""The model for lm-evaluation-harness, with a stand-in for the little that it uses of it.

``tests/harness.py`` runs it with the harness itself.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.evaluation.continuations import Pair
from tests.models.test_checkpoint import word_level
from tests.models.test_tasks import Letters, plainly, questions


class TemplateLM:
    """Tokens as the harness makes them of contexts and continuations."""

    def __init__(self):
        self.cached = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *given: self.cached.append(given))

    def loglikelihood(self, requests):
        rows = []
        for context, continuation in (request.args for request in requests):
            if context:
                both, before = self.tok_encode(context + continuation), self.tok_encode(context)
            else:
                before = [self.prefix_token_id]
                both = before + self.tok_encode(continuation, add_special_tokens=False)
            rows.append(((context, continuation), before, both[len(before) :]))
        return self._loglikelihood_tokens(rows, disable_tqdm=True)


def rolling(token_list, prefix_token, max_seq_len, context_len):
    """Yield inputs and what they predict: the first as many as fit, then with all context."""
    assert context_len == 1
    text = [prefix_token, *token_list]
    for start in range(0, len(token_list), max_seq_len):
        end = min(start + max_seq_len, len(token_list))
        yield text[max(0, end - max_seq_len) : end], token_list[start:end]


@pytest.fixture(scope="module")
def adapter():
    names = ["lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry", "lm_eval.utils"]
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
    registered = {}
    modules["lm_eval.api.model"].TemplateLM = TemplateLM
    modules["lm_eval.api.registry"].register_model = lambda name: (
        lambda kind: registered.setdefault(name, kind)
    )
    modules["lm_eval.utils"].get_rolling_token_windows = rolling
    modules["lm_eval.utils"].make_disjoint_window = lambda pair: (
        pair[0][: len(pair[0]) - len(pair[1]) + 1],
        pair[1],
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "corequant_transformers.lm_eval", raising=False)
        found = importlib.import_module("corequant_transformers.lm_eval")
        assert registered == {"corequant": found.CorequantLM}
        yield found.CorequantLM
        sys.modules.pop("corequant_transformers.lm_eval")


@dataclass
class Request:
    args: tuple


class Text(Letters):
    """Letters that can be decoded, and a chat template."""

    name_or_path = "some/letters"

    def decode(self, tokens, skip_special_tokens=False):
        tokens = [tokens] if isinstance(tokens, int) else [int(t) for t in tokens]
        return "".join(chr(t) for t in tokens if t or not skip_special_tokens)

    def get_chat_template(self, name):
        return f"template {name}"

    def apply_chat_template(self, messages, **options):
        return f"{messages} {sorted(options.items())}"


def test_likelihoods_are_those_of_our_own_tasks(adapter):
    model = cqhf.tiny_model("llama")
    lm = adapter(model, Text(), batch_tokens=100, batch_size="auto", max_batch_size=64)
    for task, result in zip(
        questions(), cqhf.evaluate_tasks(model, questions(), Letters()), strict=True
    ):
        requests = [Request((i.context, f" {choice}")) for i in task.items for choice in i.choices]
        found = lm.loglikelihood(requests)
        wanted = np.concatenate(result.likelihoods)
        assert [total for total, _ in found] == pytest.approx(wanted, rel=1e-5)
        assert lm.cached[-1] == ("loglikelihood", requests[-1].args, found[-1])
    assert {type(greedy) for _, greedy in found} == {bool}


def test_whole_texts_are_cut_into_what_the_model_reads(adapter):
    model = cqhf.tiny_model("llama").double()
    lm = adapter(model, Text(), max_length=16)
    texts = ["abcdefg", "".join(map(chr, range(65, 100))), "x"]
    found = lm.loglikelihood_rolling([Request((text,)) for text in texts])
    for text, total in zip(texts, found, strict=True):
        ids = [0, *map(ord, text)]
        wanted = 0.0
        for start in range(1, len(ids), 16):
            end = min(start + 16, len(ids))
            read = ids[max(0, end - 17) : start]
            wanted += plainly(model, Pair(tuple(read), tuple(ids[start:end])))[0]
        assert total == pytest.approx(wanted, rel=1e-9)
    assert lm.cached[1] == ("loglikelihood_rolling", (texts[1],), found[1])
    assert lm.loglikelihood_rolling([]) == []


def greedily(model, context, count):
    ids = [ord(c) for c in context]
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return "".join(map(chr, ids[len(context) :]))


def test_generation_ends_at_stops(adapter, tokens):
    recipe = Recipe(block_size=16, weights="int8:channel")
    model = cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens).model
    lm = adapter(model, Text())
    whole = greedily(model, "abc", 12)
    assert len(set(whole)) > 3
    stop = whole[4:6]
    cut = whole.index(stop)
    found = lm.generate_until(
        [
            Request(("abc", {"max_gen_toks": 12})),
            Request(("abc", {"max_tokens": 12, "until": stop})),
            Request(("abc", {"max_new_tokens": 12, "until": ["~~~", stop], "temperature": 0.0})),
            Request(("abc", {"max_gen_toks": 3, "do_sample": False})),
        ]
    )
    assert found == [whole, whole[:cut], whole[:cut], whole[:3]]
    with pytest.raises(cq.TaskError, match="max_gen_toks must be less than the 256 tokens"):
        lm.generate_until([Request(("abc", {"max_gen_toks": 256}))])


def test_generation_needs_an_end(adapter):
    letters = Text()
    letters.eos_token_id = None
    with pytest.raises(cq.TaskError, match="token for the end of a text"):
        adapter(cqhf.tiny_model("llama"), letters).generate_until([Request(("abc", {}))])


def test_a_directory(adapter, tokens, tmp_path):
    cqhf.tiny_model("llama").save_pretrained(tmp_path / "float")
    word_level(tmp_path / "float")
    cqhf.quantize(tmp_path / "float", Recipe(block_size=16), tokens, tmp_path / "own")
    request = Request(("a b c", " d e"))
    for folder in ("float", "own"):
        (found,) = adapter(str(tmp_path / folder)).loglikelihood([request])
        read = cqhf.load if folder == "own" else lambda path: cqhf.Source(path).load()
        wanted = plainly(read(tmp_path / folder), Pair((1, 2, 3), (4, 5)))
        assert found[0] == pytest.approx(wanted[0], rel=1e-5)


def test_chats(adapter):
    lm = adapter(cqhf.tiny_model("llama"), Text())
    assert lm.chat_template() == ""
    assert lm.chat_template(True) == "template None"
    assert lm.chat_template("tools") == "template tools"
    assert "('continue_final_message', False)" in lm.apply_chat_template([{"role": "user"}])
    assert lm.tokenizer_name == "some__letters"


def test_special_tokens_are_the_tokenizers_own(adapter):
    lm = adapter(cqhf.tiny_model("llama"), Text(begin=36))
    assert lm.tok_encode("ab") == [36, 97, 98]
    assert lm.tok_encode("$ab") == [36, 97, 98]
    assert lm.tok_encode("ab", add_special_tokens=False) == [97, 98]
    assert (lm.prefix_token_id, lm.eot_token_id, lm.max_length) == (36, 0, 256)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, TypeError, "tokenizer must be given with a model in memory"),
        ({"tokenizer": Text(), "batch_tokens": 0}, ValueError, "batch_tokens must be at least 1"),
        ({"tokenizer": Text(), "max_length": 1}, ValueError, "max_length must be at least 2"),
    ],
)
def test_what_is_refused(arguments, error, words, adapter):
    with pytest.raises(error, match=words):
        adapter(cqhf.tiny_model("llama"), **arguments)
