"""Every described architecture: quantized, exported and loaded by Transformers, or refused."""

from __future__ import annotations

import pytest

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from tests.models.test_architectures import DESCRIBED
from tests.models.test_export import check_equal

RECIPE = Recipe(rotation="offline", weights="int8:channel", activations="none")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "word_embed_proj_dim": 64}
OTHERWISE = {
    "gpt2": "is not a linear layer of its own in Transformers",
    "opt": "merging changed which tensors 'opt' has",
}
"""What keeps Transformers' own classes from holding the quantized layers."""


def exported(kind, tokens, folder):
    cqhf.quantize(cqhf.tiny_model(kind, **SIZES), RECIPE, tokens, folder / "own")
    cqhf.export(folder / "own", folder / "out")


@pytest.mark.parametrize("kind", [k for k in DESCRIBED if k not in OTHERWISE])
def test_transformers_loads_what_was_exported(kind, tokens, tmp_path):
    exported(kind, tokens, tmp_path)
    check_equal(tmp_path / "own", tmp_path / "out", tokens)


@pytest.mark.parametrize("kind", OTHERWISE)
def test_what_transformers_could_not_load_is_refused(kind, tokens, tmp_path):
    with pytest.raises(cq.ArchitectureError, match=OTHERWISE[kind]):
        exported(kind, tokens, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]
    cqhf.load(tmp_path / "own")
