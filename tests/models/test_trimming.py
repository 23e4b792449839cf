"""When freed memory goes back to the system."""

from __future__ import annotations

import ctypes

import pytest

import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.model import parts
from corequant_transformers.planning import cost
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
    resident = cost._resident()
    assert 2**24 < resident < 2**40
    cost.trim_memory(above=int(2 * resident))
    assert trims == []
    cost.trim_memory(above=int(resident / 2))
    assert trims == [0]
    cost.trim_memory()
    assert trims == [0, 0]


def test_where_nothing_says_what_a_process_has(trims, monkeypatch):
    def refuse(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", refuse)
    cost.trim_memory(above=2**60)
    assert trims == [0]


def test_a_model_on_disk_keeps_what_its_plan_foresees(tmp_path, tokens, monkeypatch):
    found = []
    monkeypatch.setattr(parts, "trim_memory", found.append)
    cqhf.tiny_model("llama").save_pretrained(tmp_path / "float")
    word_level(tmp_path / "float")
    recipe = Recipe(block_size=16, samples=2, sequence_length=64)
    table = cqhf.plan(tmp_path / "float", recipe)
    for memory, spare in ((None, cost.peak_bytes(table)), (2**31, 0)):
        found.clear()
        cqhf.quantize(tmp_path / "float", recipe, tokens, memory=memory)
        assert set(found) == {spare}
