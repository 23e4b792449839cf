"""``describe``: of a known type, of a recognized one, and of one that nobody knows."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import corequant_transformers as cqhf
from corequant_cli.app import app
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.known import known_architectures
from corequant_transformers.inspection.guess import guess
from corequant_transformers.model.parts import skeleton
from tests.models import foreign
from tests.models.test_recognition import renamed
from tests.models.wired import wired


def test_known_types_are_shown_whole():
    found = cqhf.describe(cqhf.tiny_model("gemma2"))
    assert found.origin == "described"
    text = found.to_toml()
    assert Architecture.from_toml(text) == known_architectures()["gemma2"]
    assert 'query = "self_attn.q_proj"' in text


def test_recognized_types_are_shown_whole_and_tried():
    found = cqhf.describe(renamed(cqhf.tiny_model("granite")))
    assert found.origin == "recognized"
    assert found.verified < 1e-10
    assert found.architecture.model_type == "other_granite"
    text = found.to_toml()
    assert text.startswith("# the model type 'other_granite' has no description")
    assert "# Verified on random weights" in text
    assert Architecture.from_toml(text) == found.architecture


@pytest.mark.parametrize(
    "kind",
    ["llama", "gemma", "gemma2", "olmo2", "qwen3", "phi3", "gpt2", "opt", "starcoder2", "nemotron"],
)
def test_guesses_of_usual_names_are_right(kind):
    found, unclear = guess(skeleton(cqhf.tiny_model(kind)))
    known = known_architectures()[kind]
    fields = ("embedding", "positions", "final_norm", "head", "block", "norm", "query", "key")
    fields += ("value", "attention_output", "gate", "up", "down", "transposed", "mlp_post_norm")
    fields += ("attention_norm", "attention_post_norm", "mlp_norm")
    assert {f: getattr(found, f) for f in fields} == {f: getattr(known, f) for f in fields}
    fused = "rows of" in " ".join(unclear)
    assert fused == (kind in ("phi3", "gpt2"))


def test_a_guess_is_tried_and_says_what_is_unclear():
    model = foreign.tower()
    found = cqhf.describe(model)
    assert found.origin == "guessed"
    assert found.verified is None
    assert (found.architecture.embedding, found.architecture.head) == ("tower.words", "view")
    assert found.architecture.block == "tower.floors.{}"
    text = found.to_toml()
    assert text.startswith("# Draft of a description. Omitted fields are those of Llama.\n")
    assert "# query was not found; linear layers are asks, answers, tells" in text
    assert "yet: " in text
    assert Architecture.from_toml(text) == found.architecture


def test_a_wrong_wire_is_not_called_verified():
    found = cqhf.describe(wired("norms exchanged"))
    assert found.origin == "recognized"
    assert found.verified is None
    assert "# Its modules are connected differently: the description" in found.to_toml()


def test_a_model_without_blocks_has_no_guess():
    class Flat(torch.nn.Module):
        config = foreign.TowerConfig()

    found, unclear = guess(Flat())
    assert found is None
    assert unclear == ["no list of blocks with linear layers was found"]


def test_the_command_prints_what_architecture_takes(tmp_path):
    cqhf.tiny_model("qwen3").save_pretrained(tmp_path / "model")
    shown = CliRunner().invoke(app, ["describe", str(tmp_path / "model")], catch_exceptions=False)
    (tmp_path / "mine.toml").write_text(shown.stdout)
    assert cqhf.read_architecture(tmp_path / "mine.toml") == known_architectures()["qwen3"]
    done = CliRunner().invoke(app, ["describe", str(tmp_path / "model"), "--json"])
    values = json.loads(done.stdout[done.stdout.index("{") :])
    assert values["origin"] == "described"
    assert Architecture.from_dict(values["architecture"]) == known_architectures()["qwen3"]
