"""Encoders: their blocks are quantized with rotations inside, what surrounds them is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.architectures.enclosed import class_of
from corequant_transformers.architectures.known import architecture_of
from corequant_transformers.model.layouts import standardize
from corequant_transformers.transforms.matrices import transform_model

HEADS = (
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "RobertaForMaskedLM",
    "ModernBertForMaskedLM",
)
KINDS = {"BertForMaskedLM": "bert", "BertForSequenceClassification": "bert"}
KINDS |= {"RobertaForMaskedLM": "roberta", "ModernBertForMaskedLM": "modernbert"}


def padded(tokens):
    """Return ids and the mask of a batch of which two sentences are shorter than the third."""
    ids, mask = torch.from_numpy(tokens).clone(), torch.ones(tokens.shape, dtype=torch.long)
    for row, length in ((0, 31), (2, 7)):
        ids[row, length:], mask[row, length:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model, given):
    with torch.no_grad():
        return model(**given)[0]


def headed(name, **config):
    return cqhf.tiny_model(KINDS[name], architectures=[name], **config)


@pytest.mark.parametrize("name", HEADS)
def test_with_any_head_from_memory_and_disk(name, tokens, tmp_path):
    # Heads that predict tokens share the embedding's matrix.
    tied = "Masked" in name
    model, given = headed(name, tie_word_embeddings=tied), padded(tokens)
    assert type(model).__name__ == name
    result = cqhf.quantize(model, Recipe(block_size=16, dtype="float32"), tokens, tmp_path / "out")
    assert max(result.verification.block_errors) < 1e-10
    assert result.verification.logits_error == result.verification.block_errors[-1]
    own = outputs(result.model, given)
    assert torch.equal(outputs(cqhf.load(tmp_path / "out"), given), own)
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(loaded, given), own)
    model.save_pretrained(tmp_path / "float")
    read = cqhf.quantize(tmp_path / "float", Recipe(block_size=16, dtype="float32"), tokens)
    assert torch.equal(outputs(read.model, given), own)
    assert 1e-3 < float((own - outputs(model, given)).norm() / own.norm()) < 0.8
    # Embeddings, poolers and heads are what they were.
    quantized = {m.name for m in result.plan.quantized}
    state, kept = model.state_dict(), result.model.state_dict()
    for key, tensor in state.items():
        if key.rpartition(".")[0] not in quantized:
            assert torch.equal(tensor, kept[key])
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(cqhf.load(tmp_path / "again"), given), own)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(block_size=16, permutation="massdiff"),
        Recipe(rotation="online", block_size=4),
        Recipe(rotation="heads", head_block_size=4),
        Recipe(rotation="offline"),
    ],
    ids=["merged", "online", "heads", "offline"],
)
def test_hidden_states_in_float64_with_padding(kind, recipe, tokens):
    model = cqhf.tiny_model(kind)
    result = cqhf.quantize(model, recipe, tokens)
    plan, given = result.plan, padded(tokens)
    model.double()
    expected = outputs(model, given)
    reference = cqhf.trace(model, plan, tokens)
    standardize(model, plan)
    transform_model(model, plan, result.choices)
    assert float((outputs(model, given) - expected).abs().max()) < 1e-10
    found = cqhf.verify(reference, model, plan, result.choices, 1e-10)
    assert found.rotations_online == len(plan.online)
    reads = {m.name.rpartition(".")[2]: m for m in plan.matrices if m.block == 0}
    query = reads.get("query", reads.get("Wqkv"))
    assert query.online == (recipe.rotation in ("merged", "online"))
    assert query.input.rotation == {"merged": 48, "online": 4}.get(recipe.rotation)
    assert any("stays as it is" in note for note in plan.notes) == (recipe.rotation != "heads")


def test_rounding_that_sees_the_data_does_better(tokens):
    model, given = cqhf.tiny_model("bert"), padded(tokens)
    expected = outputs(model, given)
    errors = {}
    for method in ("nearest", "gptq", "qronos"):
        recipe = Recipe(weights="int3:channel", activations=None, rounding=method, block_size=16)
        found = outputs(cqhf.quantize(model, recipe, tokens).model, given)
        errors[method] = float((found - expected).norm())
    assert errors["gptq"] < errors["nearest"]
    assert errors["qronos"] < errors["nearest"]


def test_what_an_encoder_is_refused(tokens, tmp_path):
    model = cqhf.tiny_model("bert")
    for field in ("embeddings", "head"):
        with pytest.raises(cq.RecipeError, match=f"{field} must be None for 'bert'"):
            cqhf.plan(model, Recipe(**{field: "int8:channel"}))
    with pytest.raises(cq.ArchitectureError, match="must predict the next token"):
        cqhf.evaluate(model, tokens)
    with pytest.raises(cq.CalibrationError, match="at most 256"):
        cqhf.quantize(model, Recipe(), np.ones((1, 257), np.int64))
    with pytest.raises(cq.CalibrationError, match="at most 254"):
        cqhf.quantize(cqhf.tiny_model("roberta"), Recipe(), np.ones((1, 255), np.int64))
    with pytest.raises(cq.ArchitectureError, match="is_decoder is False, got True"):
        cqhf.plan(cqhf.tiny_model("bert", is_decoder=True), Recipe())
    cqhf.quantize(headed("BertForMaskedLM"), Recipe(block_size=16), tokens, tmp_path / "out")
    with pytest.raises(cq.CorequantError):
        transformers.AutoModel.from_pretrained(tmp_path / "out")


def test_paths_by_class():
    config = transformers.BertConfig(architectures=["BertForMaskedLM"])
    assert architecture_of(config).block == "bert.encoder.layer.{}"
    assert architecture_of(transformers.BertConfig()).block == "encoder.layer.{}"
    for wrong in ("NoSuchModel", "LlamaModel", "AutoModel"):
        with pytest.raises(cq.ArchitectureError, match=f"got '{wrong}'"):
            class_of(transformers.BertConfig(architectures=[wrong]))


def test_the_given_model_is_left_alone(tokens):
    model = cqhf.tiny_model("bert")
    before = model.config.to_dict()
    cqhf.quantize(model, Recipe(block_size=16), tokens)
    assert model.config.to_dict() == before


def test_the_card_and_the_table(tokens, tmp_path, capsys):
    from corequant_cli.tables.plans import plan_table

    result = cqhf.quantize(
        cqhf.tiny_model("modernbert"), Recipe(block_size=16), tokens, tmp_path / "out"
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "feature-extraction" in card
    assert "text-generation" not in card
    plan_table(result.plan)
    assert "what surrounds the blocks is copied" in capsys.readouterr().out


def test_exported_with_its_head_where_transformers_can_load_that(tokens, tmp_path):
    recipe = Recipe(block_size=16, weights="int4:group16", activations="int8:token")
    model, given = headed("BertForMaskedLM", tie_word_embeddings=True), padded(tokens)
    result = cqhf.quantize(model, recipe, tokens, tmp_path / "own")
    cqhf.export(tmp_path / "own", tmp_path / "export", "compressed-tensors")
    exported = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "export")
    assert torch.equal(outputs(exported, given), outputs(result.model, given))
    cqhf.quantize(headed("ModernBertForMaskedLM"), recipe, tokens, tmp_path / "modern")
    with pytest.raises(cq.ArchitectureError, match="ModernBertForMaskedLM sets the weight of"):
        cqhf.export(tmp_path / "modern", tmp_path / "refused", "compressed-tensors")
