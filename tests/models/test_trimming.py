"""When freed memory goes back to the system."""

from __future__ import annotations

import ctypes

import pytest

import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.model import parts
from corequant_transformers.model import surroundings as memory
from tests.models.test_checkpoint import word_level


@pytest.fixture
def trims(monkeypatch):
    """Count calls of the allocator's function, which other systems than Linux lack."""
    calls = []

    class Library:
        @staticmethod
        def malloc_trim(pad):
            calls.append(pad)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    return calls


def test_a_process_keeps_what_it_may_have(trims):
    resident = memory._resident()
    assert 2**24 < resident < 2**40
    memory.trim_memory(above=int(2 * resident))
    assert trims == []
    memory.trim_memory(above=int(resident / 2))
    assert trims == [0]
    memory.trim_memory()
    assert trims == [0, 0]


def test_where_nothing_says_what_a_process_has(trims, monkeypatch):
    def refuse(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", refuse)
    memory.trim_memory(above=2**60)
    assert trims == [0]


def test_a_model_on_disk_keeps_what_its_plan_foresees(tmp_path, tokens, monkeypatch):
    found = []
    monkeypatch.setattr(parts, "trim_memory", found.append)
    cqhf.tiny_model("llama").save_pretrained(tmp_path / "float")
    word_level(tmp_path / "float")
    recipe = Recipe(block_size=16, samples=2, sequence_length=64)
    table = cqhf.plan(tmp_path / "float", recipe)
    for limit, spare in ((None, table.peak_bytes()), (2**31, 0)):
        found.clear()
        cqhf.quantize(tmp_path / "float", recipe, tokens, memory=limit)
        assert set(found) == {spare}
