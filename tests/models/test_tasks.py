"""Zero-shot tasks: scores against plain passes, accuracies by hand, files, comparisons."""

from __future__ import annotations

import functools
import json
import math
import warnings
from itertools import accumulate, pairwise, takewhile

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.evaluation import continuations
from corequant_transformers.evaluation.comparison import compare
from corequant_transformers.evaluation.continuations import Pair, score_pairs
from corequant_transformers.evaluation.encoding import encode
from corequant_transformers.evaluation.families import divide, families
from corequant_transformers.evaluation.measurement import replica_of
from corequant_transformers.evaluation.perplexity import token_log_probabilities
from corequant_transformers.evaluation.task_files import Item, Task
from corequant_transformers.model.quantized_linear import QuantizedLinear
from tests.models.test_architectures import DESCRIBED, SPARSE
from tests.models.test_described import VARIANTS

WINDOWS = {"mistral": {"sliding_window": 12}, "gemma2": {"sliding_window": 12}}


class Letters:
    """A token for each character, and one before each text where it is asked for."""

    bos_token_id, eos_token_id = None, 0

    def __init__(self, begin=None):
        self.bos_token_id = begin

    def __call__(self, text, add_special_tokens=True, verbose=True):
        begin = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": begin + [ord(c) % 128 for c in text]}

    def decode(self, token):
        return chr(token)


def plainly(model, pair):
    """Return a continuation's log-likelihood by one pass over one row."""
    ids = torch.tensor([[*pair.context, *pair.continuation]])
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0].double()
    rows = logits.log_softmax(-1)[-len(pair.continuation) :].numpy()
    greedy = (rows.argmax(-1) == pair.continuation).all()
    return rows[np.arange(len(rows)), list(pair.continuation)].sum(), greedy


def random_pairs(seed=0):
    """Return pairs of which some share a context that is worth a pass of its own."""
    generator = np.random.default_rng(seed)
    pairs = []
    for choices, length in ((4, 70), (2, 1), (2, 9), (1, 30), (3, 45), (1, 1)):
        context = tuple(generator.integers(0, 128, length).tolist())
        lengths = generator.integers(1, 12, choices)
        pairs += [Pair(context, tuple(generator.integers(0, 128, n).tolist())) for n in lengths]
    return pairs


@pytest.fixture(name="readings")
def _readings(monkeypatch):
    """Return shapes of what was read, and whether it was to be kept, or gone on from."""
    found = []

    class Noted(continuations.Reading):
        def __init__(self, model, ids, **arguments):
            found.append((tuple(ids.shape), frozenset(arguments)))
            super().__init__(model, ids, **arguments)

    monkeypatch.setattr(continuations, "Reading", Noted)
    return found


KEPT = frozenset({"use_cache"})


@pytest.mark.parametrize("kind", DESCRIBED)
def test_scores_are_those_of_plain_passes_whatever_is_in_a_batch(kind, readings):
    model = cqhf.tiny_model(kind, **WINDOWS.get(kind, {}))
    # Grouped products of experts are there in float32 alone, as is the softmax of soft caps.
    exact = 1e-5 if kind in SPARSE else 1e-7 if kind == "gemma2" else 1e-11
    model = model if kind in SPARSE else model.double()
    pairs = random_pairs()
    wanted = [plainly(model, pair) for pair in pairs]
    for tokens in (1, 40, 2048):
        readings.clear()
        with warnings.catch_warnings(action="error"):
            found = score_pairs(replica_of(model), pairs, 256, batch_tokens=tokens)
        assert [shape for shape, how in readings if how == KEPT] == [(1, 16), (1, 70), (1, 45)]
        for score, (total, greedy) in zip(found, wanted, strict=True):
            assert score.total == pytest.approx(total, rel=exact)
            assert score.greedy == greedy


@pytest.mark.parametrize("kind", ["mamba2", "falcon_h1", "lfm2", "minimax", "qwen3_next"])
def test_states_that_are_not_keys_and_values(kind):
    model = cqhf.tiny_model(kind, **VARIANTS[kind])
    pairs = random_pairs()
    for score, pair in zip(score_pairs(replica_of(model), pairs, 256), pairs, strict=True):
        assert score.total == pytest.approx(plainly(model, pair)[0], rel=1e-5)


def test_activations_of_4_bits_with_a_scale_for_each_token(tokens, readings):
    recipe = Recipe(block_size=16, weights="int4:channel", activations="int4:token:asymmetric")
    model = cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens).model.double()
    pairs = random_pairs()
    replica = replica_of(model)
    found = score_pairs(replica, pairs, 256)
    # What is tried out with activations in float leaves no trace.
    layers = [layer for layer in replica.modules() if isinstance(layer, QuantizedLinear)]
    assert layers
    assert all(layer.activations == recipe.activations for layer in layers)
    assert {shape for shape, how in readings if how == KEPT} == {(1, 16), (1, 70), (1, 45)}
    for score, pair in zip(found, pairs, strict=True):
        assert score.total == pytest.approx(plainly(model, pair)[0], abs=1e-5)


@pytest.mark.parametrize("left_out", ["use_cache", "past", "a tenth"])
def test_models_that_cannot_go_on_read_whole_rows(left_out, readings):
    """One keeps nothing of what it reads, one ignores what it is given, one alters it a little."""
    model = cqhf.tiny_model("llama").double()
    altered = []
    names = {"use_cache"} if left_out == "use_cache" else {"cache", "past_key_values"}

    class Forgetful(type(model)):
        @functools.wraps(type(model).forward)
        def forward(self, *args, **kwargs):
            kept = {name: value for name, value in kwargs.items() if name not in names}
            if left_out == "use_cache":
                kept["use_cache"] = False
            if left_out == "a tenth":
                kept = kwargs
                given = [value for name, value in kwargs.items() if name in names and value]
                for cache in given:
                    cache.layers[-1].values *= 0.9
                altered.extend(given)
            return super().forward(*args, **kept)

    pairs = random_pairs()
    wanted = [plainly(model, pair)[0] for pair in pairs]
    model.__class__ = Forgetful
    found = score_pairs(replica_of(model), pairs, 256)
    assert [score.total for score in found] == pytest.approx(wanted, rel=1e-11)
    assert [shape for shape, how in readings if how == KEPT] == [(1, 16)]
    assert len(altered) == (left_out == "a tenth")
    assert max(shape[1] for shape, _ in readings) == max(len(pair.row) for pair in pairs)


def test_what_questions_have_in_common_is_read_once(readings):
    generator = np.random.default_rng(0)

    def ids(count):
        return tuple(generator.integers(0, 128, count).tolist())

    contexts = [ids(20 + 7 * (k % 3)) for k in range(30)]
    ends = [[ids(generator.integers(4, 12)) for _ in range(4)] for _ in contexts]
    pairs = [Pair(c, end) for c, four in zip(contexts, ends, strict=True) for end in four]
    model = cqhf.tiny_model("llama").double()
    found = score_pairs(replica_of(model), pairs, 256)
    for score, pair in list(zip(found, pairs, strict=True))[::7]:
        assert score.total == pytest.approx(plainly(model, pair)[0], rel=1e-11)
    read = sum(rows * width for (rows, width), _ in readings[4:])
    needed = sum(map(len, contexts)) + sum(len(p.continuation) - 1 for p in pairs)
    assert needed <= read < 1.15 * needed
    # Each length of contexts once, all of them together.
    assert [shape for shape, how in readings if how == KEPT][1:] == [(10, 34), (10, 27), (10, 20)]
    # A choice that is a single token needs no reading of its own.
    readings.clear()
    letters = [Pair(context, (k,)) for context in contexts for k in (1, 2, 3, 4)]
    found = score_pairs(replica_of(model), letters, 256)
    assert sum(rows * width for (rows, width), _ in readings[4:]) == sum(map(len, contexts))
    assert found[5].total == pytest.approx(plainly(model, letters[5])[0], rel=1e-11)


def test_what_sentences_have_in_common_is_read_once(readings):
    generator = np.random.default_rng(1)
    stems = generator.integers(1, 128, (40, 6)).tolist()
    pairs = [Pair((0,), (*stem, end, 5)) for stem in stems for end in (3, 4)]
    model = cqhf.tiny_model("llama").double()
    found = score_pairs(replica_of(model), pairs, 256)
    for score, pair in zip(found, pairs, strict=True):
        total, greedy = plainly(model, pair)
        assert score.total == pytest.approx(total, rel=1e-11)
        assert score.greedy == greedy
    assert sum(rows * width for (rows, width), _ in readings[4:]) == 40 * 7 + 80


def divisions(count):
    """Yield all ways to divide a sequence, as sizes of the parts."""
    if not count:
        yield ()
    for size in range(1, count + 1):
        for rest in divisions(count - size):
            yield (size, *rest)


@pytest.mark.parametrize("seed", range(20))
def test_families_save_the_most_tokens(seed):
    generator = np.random.default_rng(seed)
    rows = [tuple(generator.integers(0, 2, generator.integers(1, 7)).tolist()) for _ in range(8)]
    found = families(rows)
    assert sorted(index for family in found for index in family.members) == list(range(8))
    for family in found:
        assert len({rows[index][: family.shared] for index in family.members}) == 1
        assert (family.shared > 0) == (len(family.members) > 1)
    ordered = sorted(rows)

    def saved(sizes):
        parts, start = [], 0
        for size in sizes:
            parts.append(ordered[start : start + size])
            start += size
        alike = [
            takewhile(lambda column: len({*column}) == 1, zip(*part, strict=False))
            for part in parts
        ]
        return sum((len(p) - 1) * len(list(a)) for p, a in zip(parts, alike, strict=True))

    most = max(map(saved, divisions(8)))
    assert sum((len(family.members) - 1) * family.shared for family in found) == most


@pytest.mark.parametrize("seed", range(5))
def test_parts_cost_the_least(seed):
    generator = np.random.default_rng(seed)
    widths = sorted(generator.integers(1, 30, 8).tolist(), reverse=True)

    def cost(start, end):
        read = (end - start) * widths[start]
        return None if read > 90 else read + 11

    def whole(bounds):
        costs = [cost(start, end) for start, end in bounds]
        return math.inf if None in costs else sum(costs)

    found = divide(8, cost)
    ends = [tuple(accumulate(sizes, initial=0)) for sizes in divisions(8)]
    assert whole(found) == min(whole(tuple(pairwise(each))) for each in ends)
    # One element that is too large by itself is a part all the same.
    assert divide(3, lambda start, end: None) == [(0, 1), (1, 2), (2, 3)]


def test_log_probabilities_of_tokens_are_those_of_all():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(5, 300)) * 20
    logits[1, 3] = -np.inf
    tokens, rows = torch.tensor([7, 3, 0, 299]), torch.tensor([4, 1, 1, 0])
    wanted = log_softmax(logits, axis=-1)[rows, tokens]
    given = torch.from_numpy(logits.copy())
    found = token_log_probabilities("x", given, tokens, rows)
    np.testing.assert_allclose(found, wanted, rtol=1e-14)
    # Logits in float64 are the model's own, and stay as they are.
    assert (given.numpy() == logits).all()
    narrow = token_log_probabilities("x", given.float(), tokens, rows)
    np.testing.assert_allclose(narrow, wanted, rtol=1e-5)


def test_greedy_continuations_are_noticed():
    model = cqhf.tiny_model("llama")
    ids = [3, 7, 11]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    pairs = [Pair((3, 7, 11), tuple(ids[3:])), Pair((3, 7, 11), (*ids[3:6], (ids[6] + 1) % 128))]
    assert [s.greedy for s in score_pairs(replica_of(model), pairs, 256)] == [True, False]
    with torch.no_grad():
        model.lm_head.weight.zero_()
    pairs = [Pair((3,), (0, 0)), Pair((3,), (0, 1))]
    assert [s.greedy for s in score_pairs(replica_of(model), pairs, 256)] == [True, False]


@pytest.mark.parametrize("activations", ["int8:tensor", "nvfp4"])
def test_rows_that_share_a_scale_are_read_alone(activations, tokens):
    recipe = Recipe(block_size=16, weights="int8:channel", activations=activations)
    model = cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens).model
    pairs = random_pairs()
    found = score_pairs(replica_of(model), pairs, 256)
    for score, pair in zip(found, pairs, strict=True):
        assert score.total == pytest.approx(plainly(model, pair)[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_rows_are_read_alone_by_torchs_own_layers():
    model = cqhf.tiny_model("llama")
    # All but the head, which would see less of a row here than in a plain pass.
    layers = {torch.nn.Linear}
    model.model = torch.ao.quantization.quantize_dynamic(model.model, layers, torch.qint8)
    pairs = random_pairs()
    found = score_pairs(replica_of(model), pairs, 256)
    for score, pair in zip(found, pairs, strict=True):
        assert score.total == pytest.approx(plainly(model, pair)[0], rel=1e-5)


def test_long_contexts_lose_their_beginning():
    model = cqhf.tiny_model("gpt2", max_position_embeddings=16).double()
    context, continuation = tuple(range(20)), (5, 6, 7)
    (found,) = score_pairs(replica_of(model), [Pair(context, continuation)], 16)
    assert found.total == pytest.approx(plainly(model, Pair(context[-14:], continuation))[0])
    (found,) = score_pairs(replica_of(model), [Pair(context, tuple(range(16)))], 16)
    assert found.total == pytest.approx(plainly(model, Pair((19,), tuple(range(16))))[0])
    for pair, words in (
        (Pair(context, tuple(range(17))), "at most 16 tokens, what the model can read, got 17"),
        (Pair((), (1,)), "must have tokens"),
        (Pair((1,), ()), "must have tokens"),
    ):
        with pytest.raises(cq.TaskError, match=words):
            score_pairs(replica_of(model), [pair], 16)


@pytest.mark.parametrize(
    ("context", "continuation", "begin", "left", "right"),
    [
        ("ab", " c", None, "ab", " c"),
        ("ab  ", "c", None, "ab", "  c"),
        ("", " c", None, "\0", " c"),
        ("ab", " c", 36, "$ab", " c"),
        ("", " c", 36, "$", " c"),
        ("", "$c", 36, "$", "c"),
        ("$ab", " c", 36, "$ab", " c"),
    ],
)
def test_where_a_text_is_split(context, continuation, begin, left, right):
    found = encode(Letters(begin), context, continuation)
    assert found == Pair(tuple(map(ord, left)), tuple(map(ord, right)))


def test_a_tokenizer_without_special_tokens():
    letters = Letters()
    letters.eos_token_id = None
    with pytest.raises(cq.TaskError, match="token for the beginning or the end of a text"):
        encode(letters, "", " c")


# ---- accuracies


def questions():
    generator = np.random.default_rng(3)

    def words(least, most):
        return "".join(map(chr, generator.integers(97, 123, generator.integers(least, most))))

    choice = [
        Item(words(20, 60), tuple(words(1, 15) for _ in range(4)), int(generator.integers(4)))
        for _ in range(12)
    ]
    pairs = [Item("", (words(5, 20), words(5, 20)), 0) for _ in range(9)]
    return [Task("c", "multiple choice", tuple(choice)), Task("p", "minimal pairs", tuple(pairs))]


def by_hand(model, task):
    """Return for each question whether it is right, without and with length."""
    answers = []
    for item in task.items:
        context = tuple(map(ord, item.context)) or (0,)
        sums = np.array(
            [plainly(model, Pair(context, tuple(map(ord, f" {c}"))))[0] for c in item.choices]
        )
        lengths = np.array([len(choice) for choice in item.choices])
        answers.append((sums.argmax() == item.gold, (sums / lengths).argmax() == item.gold))
    return np.array(answers, float).T


def test_accuracies_are_those_by_hand(tokens):
    model = cqhf.tiny_model("llama")
    recipe = Recipe(weights="int2:channel", activations=None)
    other = cqhf.quantize(model, recipe, tokens).model
    calls = []
    found = cqhf.evaluate_tasks(
        other, questions(), Letters(), against=model, progress=lambda *call: calls.append(call)
    )
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert {call[0]: call for call in calls} == {"c": ("c", 96, 96), "p": ("p", 36, 36)}
    for task, result in zip(questions(), found, strict=True):
        ours, theirs = by_hand(other, task), by_hand(model, task)
        assert (ours != theirs).any()
        count = len(task.items)
        assert (result.name, result.kind, result.count) == (task.name, task.kind, count)
        measured = [result.acc, result.acc_norm]
        if task.kind == "minimal pairs":
            assert measured.pop() is None
        for accuracy, right, reference in zip(measured, ours, theirs, strict=False):
            assert accuracy.value == pytest.approx(right.mean(), abs=1e-12)
            assert accuracy.se == pytest.approx(right.std(ddof=1) / math.sqrt(count), abs=1e-12)
            assert accuracy.reference == pytest.approx(reference.mean(), abs=1e-12)
            assert accuracy.comparison == compare(right, reference, 0)
        assert "acc_comparison" in result.to_dict()
        json.dumps(result.to_dict())
    (alone, _) = cqhf.evaluate_tasks(other, questions(), Letters(), limit=5)
    assert alone.count == 5
    assert alone.acc.value == pytest.approx(by_hand(other, questions()[0])[0, :5].mean())
    assert set(alone.to_dict()) == {
        "name", "kind", "count", "acc", "acc_se", "acc_norm", "acc_norm_se"
    }  # fmt: skip


def test_a_result_serves_for_several_comparisons(tokens):
    model = cqhf.tiny_model("llama")
    recipe = Recipe(weights="int2:channel", activations=None)
    other = cqhf.quantize(model, recipe, tokens).model
    wanted = cqhf.evaluate_tasks(other, questions(), Letters(), against=model, seed=5)
    ours, theirs = (cqhf.evaluate_tasks(m, questions(), Letters()) for m in (other, model))
    for own, reference, result in zip(ours, theirs, wanted, strict=True):
        assert own.beside(reference, 5).to_dict() == result.to_dict()
    with pytest.raises(cq.TaskError, match="same questions, got 9 of p and 12 of c"):
        ours[0].beside(theirs[1])


def test_questions_that_a_model_has_no_tokens_for():
    narrow = cqhf.tiny_model("llama", vocab_size=100)
    with pytest.raises(cq.CalibrationError, match=r"token ids must be in 0\.\.99"):
        cqhf.evaluate_tasks(narrow, questions(), Letters())
    with pytest.raises(cq.TaskError, match="must have questions"):
        cqhf.evaluate_tasks(narrow, [Task("none", "minimal pairs", ())], Letters())
    with pytest.raises(ValueError, match="limit must be at least 1"):
        cqhf.evaluate_tasks(narrow, questions(), Letters(), limit=0)


# ---- files


def write(tmp_path, *lines):
    file = tmp_path / "some" / "task.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return file


HELLASWAG = {
    "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is  on a roof. [title] He",
    "ctx_b": "starts", "ctx": "A man is  on a roof. He starts", "label": "3",
    "endings": ["is using [substeps] wrap.", " is ripping  tiles. ", "holds a cube.", "pulls up."],
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "kind", "item"),
    [
        ({"context": "a", "endings": ["b", "c"], "label": 1}, "multiple choice", ("a", 1)),
        ({"query": "a", "ctx": "x", "choices": ["b", "c"], "gold": 0}, "multiple choice", ("a", 0)),
        ({"ctx": "a", "choices": ["b", "c"], "label": "1"}, "multiple choice", ("a", 1)),
        ({"ctx": "", "choices": ["yes", "no"], "gold": "no"}, "multiple choice", ("", 1)),
        ({"sentence_good": "b", "sentence_bad": "c", "UID": 3}, "minimal pairs", ("", 0)),
        ({"good": "b", "bad": "c", "paradigm": "x"}, "minimal pairs", ("", 0)),
    ],
)
def test_fields_tell_what_a_line_is(line, kind, item, tmp_path):
    task = cqhf.read_task(write(tmp_path, line, "", line))
    assert (task.name, task.kind, len(task.items)) == ("some/task", kind, 2)
    assert (task.items[0].context, task.items[0].gold) == item
    assert len(task.items[0].choices) == 2


def test_hellaswags_own_lines_are_cleaned(tmp_path):
    (item,) = cqhf.read_task(write(tmp_path, HELLASWAG)).items
    assert item.context == "Roof shingle removal: A man is on a roof.. He Starts"
    assert item.choices == ("is using wrap.", "is ripping tiles.", "holds a cube.", "pulls up.")
    assert item.gold == 3


def test_a_line_separator_within_a_string(tmp_path):
    line = '{"good": "one\u2028two", "bad": "three"}'
    assert cqhf.read_task(write(tmp_path, line, line), 1).items[0].choices[0] == "one\u2028two"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "one JSON object per line, got an empty file"),
        (["{"], "line 1 of .*task.jsonl must be a JSON object"),
        (["[1]"], "must be a JSON object, got '.1.'"),
        (["[" * 100_000], "must be a JSON object"),
        ([{"text": "prose"}], "line 1 of .* must have one of query, ctx, context.*got text"),
        ([{}], "got none"),
        ([{"choices": ["a", "b"], "gold": 0}], "must have one of query"),
        ([{"ctx": "a", "choices": ["a", "b"]}], "must have one of query"),
        ([{"ctx": "a", "choices": ["a", "b"], "gold": 0, "good": "a", "bad": "b"}], "must have"),
        ([{"ctx": "a", "choices": ["a"], "gold": 0}], "choices in line 1 .* two or more"),
        ([{"ctx": "a", "choices": "ab", "gold": 0}], "list of two or more, got 'ab'"),
        ([{"ctx": "a", "choices": ["a", " "], "gold": 0}], "choices in .* must be text, got ' '"),
        ([{"ctx": " ", "choices": ["a", "b"], "gold": 0}], "ctx in .* must be empty or text, got"),
        ([{"ctx": None, "choices": ["a", "b"], "gold": 0}], "must be empty or text, got 'None'"),
        ([{"ctx": "a", "choices": ["a", "b"], "gold": 2}], "one of the 2 choices, .* got '2'"),
        ([{"ctx": "a", "choices": ["a", "b"], "gold": -1}], "got '-1'"),
        ([{"ctx": "a", "choices": ["a", "b"], "gold": True}], "got 'True'"),
        ([{"ctx": "a", "choices": ["a", "b"], "gold": ""}], "got ''"),
        ([{"ctx": "a", "choices": ["a", "b"], "gold": 0.0}], "got '0.0'"),
        ([{"ctx": "a", "choices": ["7", "0"], "gold": "0"}], "by its index from 0 or its text"),
        ([{"good": "a", "bad": 3}], "bad in line 1 .* must be text, got '3'"),
        ([{"good": "a", "bad": "b"}, HELLASWAG], "line 2 .* the first line, minimal pairs, got m"),
        ([HELLASWAG | {"ctx_b": 1}], "ctx_b in line 1"),
        ([HELLASWAG | {"endings": ["[a]", "b"]}], "endings in line 1 .* must be text, got ''"),
    ],
)
def test_lines_that_are_no_task(lines, words, tmp_path):
    with pytest.raises(cq.TaskError, match=words):
        cqhf.read_task(write(tmp_path, *lines))


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(cq.TaskError, match="readable UTF-8 file"):
        cqhf.read_task(tmp_path / "nothing.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(cq.TaskError, match="readable UTF-8 file"):
        cqhf.read_task(tmp_path / "bytes.jsonl")


# ---- comparisons


@pytest.mark.parametrize(
    ("better", "worse"), [(0, 0), (1, 0), (3, 3), (2, 9), (30, 51), (700, 640), (0, 1500)]
)
def test_mcnemars_test_is_a_binomial_one(better, worse):
    ours = np.repeat([1, 0, 1, 0], [better, worse, 40, 13])
    theirs = np.repeat([0, 1, 1, 0], [better, worse, 40, 13])
    found = compare(ours, theirs)
    assert (found.only_model, found.only_reference) == (better, worse)
    tosses = better + worse
    wanted = stats.binomtest(better, tosses).pvalue if tosses else 1.0
    assert found.p == pytest.approx(wanted, rel=1e-9)
    assert found.difference == pytest.approx(ours.mean() - theirs.mean(), abs=1e-12)


def test_the_interval_is_that_of_drawn_questions():
    generator = np.random.default_rng(5)
    ours, theirs = generator.random((2, 300)) < [[0.6], [0.5]]
    found = compare(ours, theirs, 1)
    assert found == compare(ours, theirs, 1) != compare(ours, theirs, 2)
    differences = ours.astype(float) - theirs
    drawn = differences[generator.integers(0, 300, (10_000, 300))].mean(axis=1)
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.007)
    assert found.difference_se == pytest.approx(drawn.std(), rel=0.05)


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1], [1, 0]), ([[1]], [[1]])])
def test_answers_that_cannot_be_compared(ours, theirs):
    with pytest.raises(cq.ShapeError, match="same number of answers"):
        compare(ours, theirs)
