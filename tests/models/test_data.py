"""Calibration data: what files are taken for, and which windows come of them."""

from __future__ import annotations

import bz2
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.calibration.data.documents import carried_documents
from corequant_transformers.calibration.data.formats import Document, parse
from corequant_transformers.calibration.data.given import take_windows
from corequant_transformers.calibration.data.separators import Separators
from tests import capabilities

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why is the sky blue?\n\nAnd the sea?"},
        {"role": "assistant", "content": "Rayleigh scattering: \u2028 4th power of 1/λ."},
    ],
]
TEXTS = [
    "The first document, which is short.",
    "A second one\nof two lines, with \u2028 and \x85 in it: ünïcödé 漢字.",
    "A third. " * 40,
]


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes and a few special tokens, with a chat template; it adds nothing around a text."""
    return byte_level("<|endoftext|>", eos_token="<|endoftext|>", chat_template=CHATML)


def byte_level(*special, adds=None, **options):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[*special, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    if adds:
        names = [name for name in adds.split() if name != "$A"]
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=adds, special_tokens=[(name, model.token_to_id(name)) for name in names]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **options)


def lines(rows, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def rows_of(column, values):
    return [{column: value} for value in values]


def as_parquet(file, column, values):
    parquet.write_table(pyarrow.table({column: values}), file)
    return file


FORMATS = {
    "lines": ("a.jsonl", lambda rows: lines(rows).encode()),
    "windows lines": ("a.jsonl", lambda rows: lines(rows, "\r\n\r\n").encode("utf-8-sig")),
    "lines in a text": ("a.txt", lambda rows: lines(rows).encode()),
    "no name": ("data", lambda rows: lines(rows).encode()),
    "array": ("a.json", lambda rows: json.dumps(rows).encode()),
    "indented array": ("a.json", lambda rows: b"\n" + json.dumps(rows, indent=1).encode()),
    "array of lines": ("a", lambda rows: ("[\n" + lines(rows, ",\n")[:-2] + "\n]").encode()),
    "gzip": ("a.jsonl.gz", lambda rows: gzip.compress(lines(rows).encode())),
    "gzip by content": ("a.jsonl", lambda rows: gzip.compress(lines(rows).encode())),
}


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize(("column", "values"), [("text", TEXTS), ("messages", CHATS)])
def test_records_are_the_same_in_every_format(how, column, values, tmp_path):
    name, write = FORMATS[how]
    (tmp_path / name).write_bytes(write([{"id": 1, column: v} for v in values]))
    documents = cqhf.read_documents(tmp_path / name)
    assert held(documents) == values
    assert documents.files[0].documents == len(values)
    assert documents.files[0].format.startswith("JSON")
    as_parquet(tmp_path / "b.parquet", column, values)
    assert held(cqhf.read_documents(tmp_path / "b.parquet")) == values


def held(documents):
    return [
        d.text if d.messages is None else [dict(m) for m in d.messages] for d in documents.entries
    ]


@pytest.mark.parametrize("column", ["text", "messages"])
def test_token_counts_are_those_of_datasets_and_the_chat_template(column, tokenizer, tmp_path):
    """Files of each format, read by the library ``datasets`` and tokenized by Transformers."""
    import datasets

    values = (TEXTS if column == "text" else CHATS) * 7
    (tmp_path / "a.jsonl").write_text(lines(rows_of(column, values)), "utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows_of(column, values)), "utf-8")
    as_parquet(tmp_path / "a.parquet", column, values)
    for name, builder in (("a.jsonl", "json"), ("a.json", "json"), ("a.parquet", "parquet")):
        loaded = datasets.load_dataset(
            builder, data_files=str(tmp_path / name), cache_dir=tmp_path / "cache", split="train"
        )
        if column == "text":
            wanted = [tokenizer(row["text"])["input_ids"] for row in loaded]
        else:
            wanted = [tokenizer.apply_chat_template(row["messages"])["input_ids"] for row in loaded]
        sample = cqhf.sample_windows(cqhf.read_documents(tmp_path / name), tokenizer, 16)
        assert sample.tokens_read == sum(map(len, wanted))
        assert len(sample.documents) == len(loaded)
        end = [tokenizer.eos_token_id] if column == "text" else []
        joined = [i for k, ids in enumerate(wanted) for i in ([*end] if k else []) + ids]
        assert sample.tokens.ravel().tolist() == joined[: len(joined) // 16 * 16]
        assert sample.separators == (len(wanted) - 1 if end else 0)


def test_lines_of_a_text_are_counted_as_datasets_counts_them(tokenizer, tmp_path):
    """``sample_by="document"`` is what one file of text is to it, too."""
    import datasets

    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n".join(TEXTS) + name, "utf-8")
    loaded = datasets.load_dataset(
        "text",
        data_files=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")],
        sample_by="document",
        cache_dir=tmp_path / "cache",
        split="train",
    )
    documents = cqhf.read_documents([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert held(documents) == loaded["text"][:]
    sample = cqhf.sample_windows(documents, tokenizer, 8)
    assert sample.tokens_read == sum(len(tokenizer(t)["input_ids"]) for t in loaded["text"])


@pytest.mark.real_model
def test_the_real_chat_template(smollm2_path, tmp_path):
    tokenizer = cqhf.Source(smollm2_path).tokenizer()
    (tmp_path / "a.jsonl").write_text(lines(rows_of("messages", CHATS * 9)), "utf-8")
    sample = cqhf.sample_windows(cqhf.read_documents(tmp_path), tokenizer, 32)
    wanted = [i for c in CHATS * 9 for i in tokenizer.apply_chat_template(c)["input_ids"]]
    assert sample.tokens_read == len(wanted)
    assert sample.tokens.ravel().tolist() == wanted[: len(wanted) // 32 * 32]
    assert "You are a helpful AI assistant" in tokenizer.decode(sample.tokens[0])


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b'{"text": "x"}\nprose\n', "line 1 is a record, and line 2 is not a JSON object"),
        ("a.txt", b'prose\n\n{"text": "x"}\n', "line 3 is a record.* line 1 is not a JSON object"),
        ("a.txt", b'{"text": "x"}\n{"text": "y\n', "line 2 is not a JSON object: .*Unterminated"),
        ("a.txt", b'{"text": "x', "its beginning is that of JSON, but line 1"),
        ("a.txt", b"{'text': 'x'}", "its beginning is that of JSON"),
        ("a.txt", b'{"text": "x"} {"text": "y"}', "its beginning is that of JSON.*Extra data"),
        ("a.txt", b'[{"text": "x"},', "its beginning is that of JSON"),
        ("a.txt", b'{"a": 1}\n{"b": 2}', "a.txt:1 must have either 'text' or 'messages', got a"),
        ("a.txt", b'{\n"text": "x"\n}', "got one object that spans several lines.*keys text"),
        ("a.jsonl", b"prose\n", "name is that of JSON, but line 1 is not a JSON object: 'prose'"),
        ("a.jsonl", b'"x"\n', "'\"x\"' is a JSON str"),
        ("a.json.gz", gzip.compress(b"prose", mtime=0), "its name is that of JSON"),
        ("a.jsonl", b'{"text": "x", "messages": []}', "got both"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}', "of a.jsonl:2 must be a string, got null"),
        ("a.jsonl", b'{"text": ["x"]}', "must be a string, got list"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1 must be valid Unicode, got an unpaired"),
        ("a.jsonl", b'{"messages": "x"}', "must be a non-empty list, got str 'x'"),
        ("a.jsonl", b'{"messages": []}', "must be a non-empty list, got list"),
        ("a.jsonl", b'{"messages": [{"from": "human", "value": "x"}]}', "must have a role and con"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', r"\[0\] of a.jsonl:1 must have content"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}',
            r"content of messages\[0\] of a.jsonl:1 must be a string, got list",
        ),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "\\udc00"}]}', "unpaired surrog"),
        ("a.jsonl", b'{"messages": [{"role": "u", "content": "x"}], "tools": 1}', "tools of"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"messages": [{"role": "user", "content": "x"}]}',
            "a.jsonl:2 must have 'text' as a.jsonl:1 does, got 'messages'",
        ),
        ("a.json", b'["x"]', r"a.json\[0\] must be an object with 'text' or 'messages', got str"),
        ("a.txt", "héllo".encode("latin-1"), r"a.txt must be readable UTF-8, got .* \(line 1\)"),
        ("a.txt", b"a\nb\xff", r"\(line 2\)"),
        ("a.txt", "x".encode("utf-16"), "is UTF-16"),
        ("a.txt", b"a\n\0b", "a zero byte in line 2"),
        ("a.parquet", b"text", "must be Parquet, got a file that begins with b'text'"),
        ("a.parquet", b"PAR1 and so on", "must be a complete Parquet file, got a truncated one"),
        ("a.parquet", b"PAR1 and so on PAR1", "must be readable Parquet, got"),
        ("a.csv", b"text\nx\n", "has the suffix of a table"),
        ("a.txt.gz", gzip.compress(b"a" * 999, mtime=0)[:20], "must be complete gzip data"),
        ("a.txt", b"PK\x03\x04...", "is a ZIP archive"),
        ("a.txt.bz2", bz2.compress(b"a" * 999), "a.txt.bz2 must be readable UTF-8"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd...", "is compressed with zstd"),
        ("a.txt", b'{"text": ' + b"[" * 100_000, "its beginning is that of JSON"),
    ],
)  # fmt: skip
def test_what_is_refused(name, data, words, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(cq.CalibrationError, match=words):
        cqhf.read_documents(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "[Illustration]\n\nprose",
        "[1] A note.\n[2] Another.",
        'A dictionary:\n{}\n{"a": 1}\nand so on',
        "{ braces }",
        "BZh",
        "{% raw %}",
        '\n  "quoted", she said',
        "def f():\n    return {'text': 1}\n",
    ],
)
def test_prose_stays_prose(text, tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())
    assert held(cqhf.read_documents(file)) == [text]
    file.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert held(cqhf.read_documents(file)) == [text.replace("\n", "\r\n")]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
@settings(max_examples=25)
def test_any_strings_come_back(texts):
    rows = rows_of("text", texts)
    for ascii in (True, False):
        data = "\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows)
        kind, found = parse("a", data.encode())
        assert (kind, [d.text for d in found]) == ("JSON lines", texts)
    kind, found = parse("a", json.dumps(rows).encode())
    assert (kind, [d.text for d in found]) == ("JSON array", texts)


@given(st.binary(max_size=200))
@settings(max_examples=150)
def test_any_bytes_are_read_or_refused(data):
    for name in ("a", "a.json", "a.parquet", "a.gz"):
        try:
            kind, found = parse(name, data)
        except cq.CalibrationError:
            continue
        assert kind == "text" or found or data.strip()[:1] == b"["
        if name == "a" and kind == "text" and found:
            assert found[0].text.encode() in data


def test_huge_lines(tmp_path):
    long = "word " * 400_000
    (tmp_path / "a.jsonl").write_text(lines(rows_of("text", [long, "short"])))
    assert held(cqhf.read_documents(tmp_path)) == [long, "short"]


def test_columns_of_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    words = pyarrow.array(["x", "y", "x"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": words}), file, row_group_size=2)
    assert held(cqhf.read_documents(file)) == ["x", "y", "x"]
    parquet.write_table(pyarrow.table({"content": ["x"]}), file)
    with pytest.raises(cq.CalibrationError, match="must have either 'text' or 'messages', got con"):
        cqhf.read_documents(file)
    parquet.write_table(pyarrow.table({"text": ["x", None]}), file)
    with pytest.raises(cq.CalibrationError, match="text of a.parquet:2 must be a string, got null"):
        cqhf.read_documents(file)
    parquet.write_table(pyarrow.table({"text": [1]}), file)
    with pytest.raises(cq.CalibrationError, match="text of a.parquet:1 must be a string, got int"):
        cqhf.read_documents(file)


def test_keys_that_parquet_adds_to_messages_are_left_out(tmp_path):
    calls = [{"role": "assistant", "tool_calls": ["f"]}, {"role": "tool", "content": "1"}]
    as_parquet(tmp_path / "a.parquet", "messages", [calls])
    (tmp_path / "a.jsonl").write_text(lines(rows_of("messages", [calls])))
    documents = cqhf.read_documents([tmp_path / "a.parquet", tmp_path / "a.jsonl"])
    assert held(documents) == [calls, calls]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    file = as_parquet(tmp_path / "a.parquet", "text", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        cq.MissingPackageError, match=r'a.parquet needs .*install "corequant\[data\]"'
    ):
        cqhf.read_documents(file)


@capabilities.links
def test_folders(tmp_path):
    inner = tmp_path / "data" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "data" / "b.txt").write_text("b")
    (tmp_path / "data" / "a.jsonl").write_text(lines(rows_of("text", ["a", " \n", ""])))
    (inner / "c.TXT.gz").write_bytes(gzip.compress(b"c"))
    (inner / "README.md").write_text("no data")
    (inner / "dataset_info.json").write_text("{}")
    (inner / "empty.txt").write_text("\n")
    (tmp_path / "data" / ".hidden.txt").write_text("hidden")
    (inner / "round").symlink_to(tmp_path / "data")
    documents = cqhf.read_documents(tmp_path / "data")
    assert held(documents) == ["a", "b", "c"]
    assert [f.name for f in documents.files] == [
        "a.jsonl", "b.txt", "inner/c.TXT.gz", "inner/empty.txt"
    ]  # fmt: skip
    assert documents.skipped == ("inner/README.md", "inner/dataset_info.json")
    assert documents.to_dict()["empty"] == 2
    again = cqhf.read_documents([inner / "c.TXT.gz", tmp_path / "data" / "b.txt"])
    assert held(again) == ["c", "b"]


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ([], "at least one file or folder"),
        (["none.txt"], "none.txt must be a readable UTF-8 or Parquet file.*found none of these$"),
        (["an/id"], "get it with: hf download an/id --repo-type dataset$"),
        (["empty"], "must hold files whose names end in .*got none"),
        (["code"], r"must hold files whose names end in .*got a.py"),
        (["a.txt", "./a.txt"], "given only once, got it as"),
        (["splits"], "got test and train; pass the files.*splits/data/test-00000-of-00001.jsonl"),
        (["blank.txt"], "must not be empty, got only white space in blank.txt"),
        (["x" * 5000], "must be a readable UTF-8 file or a folder"),
    ],
)
def test_paths_that_are_refused(paths, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "code", "splits/data"):
        Path(folder).mkdir(parents=True)
    Path("a.txt").write_text("a")
    Path("blank.txt").write_text(" \n")
    Path("code/a.py").write_text("a")
    for split in ("train", "test"):
        Path(f"splits/data/{split}-00000-of-00001.jsonl").write_text('{"text": "x"}')
    with pytest.raises(cq.CalibrationError, match=words):
        cqhf.read_documents(paths)


def documents_of(tmp_path, *texts):
    (tmp_path / "made.jsonl").write_text(lines(rows_of("text", texts)), "utf-8")
    return cqhf.read_documents(tmp_path / "made.jsonl")


def test_one_text_is_cut_as_before(tokenizer, tmp_path):
    text = "\n".join(TEXTS) + "\n"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    documents = cqhf.read_documents(tmp_path / "a.txt")
    for windows in (None, 3):
        found = cqhf.sample_windows(documents, tokenizer, 16, windows)
        assert np.array_equal(found.tokens, cqhf.token_windows(text, tokenizer, 16, windows))
        assert found.separators == 0
        assert found.used == 1
    with_begin = byte_level("<s>", bos_token="<s>", adds="<s> $A")
    assert with_begin("a")["input_ids"][0] == 0
    found = cqhf.sample_windows(documents, with_begin, 16)
    assert np.array_equal(found.tokens, cqhf.token_windows(text, with_begin, 16))


SEPARATORS = {
    "end": (("<s>", "</s>"), {"eos_token": "</s>"}, [1], []),
    "begin": (
        ("<s>", "</s>"),
        {"eos_token": "</s>", "bos_token": "<s>", "adds": "<s> $A"},
        [0],
        [0],
    ),
    "after": (("<s>", "</s>"), {"eos_token": "</s>", "adds": "$A </s>"}, [1], []),
    "both": (("<s>", "</s>"), {"eos_token": "</s>", "adds": "<s> $A </s>"}, [1, 0], [0]),
    "none": ((), {}, None, []),
}


@pytest.mark.parametrize("kind", SEPARATORS)
def test_separators_are_the_tokenizers_own(kind, tmp_path):
    special, options, between, after_chat = SEPARATORS[kind]
    tokenizer = byte_level(*special, chat_template=CHATML, **options)
    if between is None:
        between = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
    found = cqhf.sample_windows(documents_of(tmp_path, *TEXTS), tokenizer, 2)
    wanted = [*ids[0], *between, *ids[1], *between, *ids[2]]
    assert found.tokens.ravel().tolist() == wanted[: len(wanted) // 2 * 2]
    assert found.separators == 2 * len(between)
    assert found.separator == tokenizer.decode(between)
    # A template ends a conversation itself, and the next text begins as the tokenizer has it.
    (tmp_path / "chat.jsonl").write_text(lines(rows_of("messages", CHATS[:1])), "utf-8")
    paths = [tmp_path / "chat.jsonl", tmp_path / "made.jsonl"]
    found = cqhf.sample_windows(cqhf.read_documents(paths), tokenizer, 2)
    chat = tokenizer(
        tokenizer.apply_chat_template(CHATS[0], tokenize=False), add_special_tokens=False
    )["input_ids"]
    wanted = [*chat, *after_chat, *wanted]
    assert found.tokens.ravel().tolist() == wanted[: len(wanted) // 2 * 2]


def test_a_template_that_begins_as_the_tokenizer_does_begins_once(tmp_path):
    options = {"eos_token": "</s>", "bos_token": "<s>", "adds": "<s> $A"}
    tokenizer = byte_level("<s>", "</s>", chat_template="<s>" + CHATML, **options)
    (tmp_path / "chat.jsonl").write_text(lines(rows_of("messages", CHATS)), "utf-8")
    (tmp_path / "a.txt").write_text("prose")
    documents = cqhf.read_documents([tmp_path / "a.txt", tmp_path / "chat.jsonl"])
    found = cqhf.sample_windows(documents, tokenizer, 2).tokens.ravel().tolist()
    assert found.count(0) == 2
    assert Separators(tokenizer).between(Document("x"), [0, 5]) == []


@pytest.mark.parametrize("case", ["no template", "refused", "broken"])
def test_templates_that_fail(case, tmp_path):
    template = {
        "no template": None,
        "refused": "{{ raise_exception('roles must alternate') }}",
        "broken": "{{ messages[9]['content'] }}",
    }[case]
    tokenizer = byte_level("</s>", eos_token="</s>", chat_template=template)
    (tmp_path / "c.jsonl").write_text(lines(rows_of("messages", CHATS)), "utf-8")
    words = "has no chat template" if template is None else "messages of c.jsonl:1 must fit the mod"
    with pytest.raises(cq.CalibrationError, match=words):
        cqhf.sample_windows(cqhf.read_documents(tmp_path), tokenizer, 4)


def test_tools_reach_the_template(tmp_path):
    tokenizer = byte_level(
        "</s>", eos_token="</s>", chat_template="{{ tools[0]['name'] }} " + CHATML
    )
    row = {"messages": CHATS[0], "tools": [{"name": "weather"}]}
    (tmp_path / "c.jsonl").write_text(lines([row]), "utf-8")
    found = cqhf.sample_windows(cqhf.read_documents(tmp_path), tokenizer, 4)
    assert tokenizer.decode(found.tokens.ravel()).startswith("weather <|im_start|>user")


class Numbered:
    """A tokenizer of numbers, which end a text with -1."""

    eos_token_id = 9_999

    def __call__(self, text, **options):
        return {"input_ids": [int(word) for word in text.split() if word.isdigit()]}

    def decode(self, ids):
        return " ".join(map(str, ids))


def numbered(tmp_path, *lengths):
    """Documents of consecutive numbers, from 100 times their index."""
    texts = [" ".join(str(100 * k + i) for i in range(n)) for k, n in enumerate(lengths)]
    return documents_of(tmp_path, *texts)


def test_random_windows(tmp_path):
    """Each window is a stretch of one document, or short ones joined; none overlap."""
    lengths = [40, 3, 17, 5, 8, 95, 2, 7, 9]
    documents = numbered(tmp_path, *lengths)
    whole = cqhf.sample_windows(documents, Numbered(), 8, sampling="random", seed=3)
    seen = whole.tokens[whole.tokens != 9_999]
    assert len(np.unique(seen)) == seen.size
    stretches = 0
    for window in whole.tokens:
        steps = np.diff(window)
        ends = window[1:] == 9_999
        begins = window[:-1] == 9_999
        assert (steps[~ends & ~begins] == 1).all()
        stretches += not (ends.any() or begins.any())
    # 40, 17, 8, 95 and 9 hold 5, 2, 1, 11 and 1 windows; the rest, 17 with 3 separators, 2.
    assert stretches >= 20
    assert len(whole.tokens) == 22
    assert whole.used == len(set((seen // 100).tolist()))
    for windows in (1, 5, 22):
        fewer = cqhf.sample_windows(documents, Numbered(), 8, windows, sampling="random", seed=3)
        assert np.array_equal(fewer.tokens, whole.tokens[:windows])
    # Every document has a turn before one has a second.
    first = {int(w[w != 9_999][0]) // 100 for w in whole.tokens[:5]}
    assert len(first) >= 5
    other = cqhf.sample_windows(documents, Numbered(), 8, sampling="random", seed=4)
    assert not np.array_equal(other.tokens, whole.tokens)
    with pytest.raises(cq.CalibrationError, match="must fill 23 windows of 8 tokens"):
        cqhf.sample_windows(documents, Numbered(), 8, 23, sampling="random", seed=3)


def test_random_windows_of_one_text_lie_anywhere(tmp_path):
    documents = numbered(tmp_path, 100)
    starts = {
        int(
            cqhf.sample_windows(documents, Numbered(), 10, 1, sampling="random", seed=s).tokens[
                0, 0
            ]
        )
        for s in range(60)
    }
    assert min(starts) < 20
    assert max(starts) > 70
    assert len({s % 10 for s in starts}) == 1  # the text is ten windows long
    documents = numbered(tmp_path, 99)
    found = [
        cqhf.sample_windows(documents, Numbered(), 10, sampling="random", seed=s).tokens
        for s in range(30)
    ]
    assert {int(tokens.min()) for tokens in found} == set(range(10))


def test_no_more_is_read_than_is_needed(tmp_path):
    documents = numbered(tmp_path, *[10] * 50)
    found = cqhf.sample_windows(documents, Numbered(), 16, 2)
    assert found.tokens_read == 30
    assert found.used == 3
    assert found.to_dict()["documents"] == 50
    assert found.separators == 2


def test_wrong_arguments(tmp_path):
    documents = numbered(tmp_path, 10)
    with pytest.raises(cq.CalibrationError, match="sampling must be one of consecutive, random"):
        cqhf.sample_windows(documents, Numbered(), 4, sampling="all")
    with pytest.raises(cq.RecipeError, match="sampling must be one of consecutive, random"):
        Recipe(sampling="all")
    with pytest.raises(ValueError, match="seed must be at least 0"):
        cqhf.sample_windows(documents, Numbered(), 4, sampling="random", seed=-1)
    with pytest.raises(
        cq.CalibrationError, match="one window of sequence_length=16 tokens, got 10"
    ):
        cqhf.sample_windows(documents, Numbered(), 16)


SMALL = {"block_size": 16, "samples": 2, "sequence_length": 16}


def test_whatever_quantize_takes_comes_to_the_same(tokenizer, tmp_path):
    model = cqhf.tiny_model("llama", vocab_size=len(tokenizer))
    for name, text in zip("abc", TEXTS, strict=True):
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
    paths = sorted(tmp_path.glob("*.txt"))
    recipe = Recipe(**SMALL, sampling="random", seed=5)
    documents = cqhf.read_documents(paths)
    sample = cqhf.sample_windows(documents, tokenizer, 16, 2, sampling="random", seed=5)
    for more in (tuple(paths), documents):
        assert np.array_equal(take_windows(more, recipe, tokenizer).tokens, sample.tokens)
    states = []
    for calibration in (
        tmp_path, paths, sample, sample.tokens,
        cqhf.calibrate(model, recipe, tmp_path, tokenizer),
    ):  # fmt: skip
        result = cqhf.quantize(model, recipe, calibration, tokenizer=tokenizer)
        states.append(result.model.state_dict())
        data = result.report["calibration"]
        assert (data["windows"], data["sequence_length"]) == (2, 16)
        if calibration is not sample.tokens:
            assert [f["name"] for f in data["files"]] == ["a.txt", "b.txt", "c.txt"]
            assert data["sampling"] == "random"
            assert data["seed"] == 5
    for state in states[1:]:
        assert all((state[name] == tensor).all() for name, tensor in states[0].items())


@pytest.mark.parametrize(
    ("calibration", "error", "words"),
    [
        (["a", "b"], TypeError, "got a list with the str 'a'"),
        ([Path("a.txt"), "b"], TypeError, "got a list with the str 'b'"),
        ([Path("a.txt"), 3], TypeError, "got a list with the int '3'"),
        ("a.txt", cq.CalibrationError, r"to read that file, pass Path\('a.txt'\)"),
        (Path("none.txt"), cq.CalibrationError, "none.txt must be a readable"),
        ([], cq.CalibrationError, "token windows must be"),
        ({"text": "x"}, cq.CalibrationError, "token windows must be"),
    ],
)
def test_what_quantize_refuses(calibration, error, words, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text " * 99)
    model = cqhf.tiny_model("llama", vocab_size=len(tokenizer))
    with pytest.raises(error, match=words):
        cqhf.quantize(model, Recipe(**SMALL), calibration, tokenizer=tokenizer)
    with pytest.raises(error, match=words):
        cqhf.evaluate(model, calibration, tokenizer)


def test_evaluate_takes_the_same(tokenizer, tmp_path):
    model = cqhf.tiny_model("llama", vocab_size=len(tokenizer))
    for name, text in zip("abc", TEXTS, strict=True):
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
    documents = cqhf.read_documents(tmp_path)
    sample = cqhf.sample_windows(documents, tokenizer, 16, 3)
    found = {
        cqhf.evaluate(model, text, tokenizer, windows=3, sequence_length=16)
        for text in (tmp_path, sorted(tmp_path.iterdir()), documents, sample, sample.tokens)
    }
    assert len(found) == 1
    assert found.pop().windows == 3


def test_without_calibration_the_carried_text_is_taken(tokenizer):
    model = cqhf.tiny_model("llama", vocab_size=len(tokenizer))
    result = cqhf.quantize(model, Recipe(**SMALL), tokenizer=tokenizer)
    data = result.report["calibration"]
    assert data["files"][0]["name"] == "the public-domain text that corequant carries"
    wanted = cqhf.sample_windows(carried_documents(), tokenizer, 16, 2)
    assert data == wanted.to_dict()
    with pytest.raises(cq.CalibrationError, match="fills .*; give more text, or take fewer or sho"):
        cqhf.quantize(model, Recipe(**{**SMALL, "samples": 99_999}), tokenizer=tokenizer)
    with pytest.raises(TypeError, match="tokenizer must be given to calibrate on the built-in"):
        cqhf.quantize(model, Recipe(**SMALL))


def test_the_carried_text():
    documents = carried_documents()
    texts = [d.text for d in documents.entries]
    assert len(set(texts)) == len(texts) == 56
    assert 200_000 < sum(map(len, texts)) < 230_000
    assert all(len(text) > 1000 and text == text.strip() for text in texts)
    # Any beginning of it mixes its sources.
    assert "Ghana" in texts[0]
    assert "Mr. Holmes" in texts[1]
    assert not any("Gutenberg" in text or "<" in text or "&" in text for text in texts)
