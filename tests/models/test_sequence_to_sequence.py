"""T5: encoder, decoder, and what the one gives to the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.architectures.known import architecture_of
from corequant_transformers.model.parts import ENTRY, part_of
from corequant_transformers.transforms.matrices import transform_model

NAMES = {
    "T5Model": {},
    "T5ForConditionalGeneration": {
        "feed_forward_proj": "gated-gelu",
        "num_decoder_layers": 1,
        "tie_word_embeddings": True,
    },
}


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(3, 128, (3, 20))


def tiny(name):
    return cqhf.tiny_model("t5", architectures=[name], **NAMES[name])


def pairs(tokens):
    """Return a padded batch of which the two sides differ in length."""
    ids = torch.from_numpy(tokens).clone()
    mask = torch.ones_like(ids)
    ids[1, 9:], mask[1, 9:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, 2:9].flip(1)}


def outputs(model, given):
    with torch.no_grad():
        return model(**given)[0]


@pytest.mark.parametrize("name", NAMES)
def test_exact_in_float64_and_equal_after_and_from_a_file(name, tokens, tmp_path):
    model, given = tiny(name), pairs(tokens)
    recipe = Recipe(block_size=16, dtype="float32")
    result = cqhf.quantize(model, recipe, tokens, tmp_path / "out")
    blocks = 2 + model.config.num_decoder_layers
    assert len(result.verification.block_errors) == blocks
    assert max(result.verification.block_errors) < 1e-10
    own = outputs(result.model, given)
    assert torch.equal(outputs(cqhf.load(tmp_path / "out"), given), own)
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(loaded, given), own)
    model.save_pretrained(tmp_path / "float")
    read = cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "read")
    assert torch.equal(outputs(read.model, given), own)
    assert 1e-3 < float((own - outputs(model, given)).norm() / own.norm()) < 0.9
    if name == "T5ForConditionalGeneration":
        assert result.model.lm_head.weight is result.model.shared.weight
        options = {"max_new_tokens": 4, "do_sample": False, "decoder_start_token_id": 0}
        made = loaded.generate(given["input_ids"], **options)
        assert torch.equal(made, result.model.generate(given["input_ids"], **options))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("T5Model", Recipe(block_size=16, head_block_size=4)),
        ("T5ForConditionalGeneration", Recipe(rotation="online", block_size=4)),
    ],
    ids=["merged", "online"],
)
def test_outputs_of_pairs_in_float64(name, recipe, tokens):
    model, given = tiny(name), pairs(tokens)
    result = cqhf.quantize(model, recipe, tokens)
    model.double()
    expected = outputs(model, given)
    transform_model(model, result.plan, result.choices)
    assert float((outputs(model, given) - expected).abs().max()) < 1e-10 * float(expected.max())


@pytest.mark.parametrize("reference", ["model", "block"])
def test_rounding_sees_what_the_quantized_encoder_gives(reference, tokens):
    model, given = tiny("T5Model"), pairs(tokens)
    expected = outputs(model, given)
    errors = {}
    for method in ("nearest", "qronos"):
        recipe = Recipe(
            weights="int3:channel",
            activations=None,
            rounding=method,
            block_size=16,
            reference="block" if method == "nearest" else reference,
        )
        errors[method] = float(
            (outputs(cqhf.quantize(model, recipe, tokens).model, given) - expected).norm()
        )
    assert errors["qronos"] < errors["nearest"]


def test_blocks_and_rows_of_both_stacks():
    config = tiny("T5ForConditionalGeneration").config
    a = architecture_of(config)
    paths = ["encoder.block.0", "encoder.block.1", "decoder.block.0"]
    assert [a.block_path(i) for i in range(3)] == paths
    assert [a.block_index(f"{path}.layer.0") for path in paths] == [0, 1, 2]
    assert a.block_index("shared.weight") is None
    recipe = Recipe(block_size=16, head_block_size=4)
    plan = cqhf.plan(tiny("T5ForConditionalGeneration"), recipe)
    assert part_of("encoder.final_layer_norm.weight", plan) == ENTRY
    rows = {m.name: m for m in plan.matrices if m.block == 2}
    path = "decoder.block.0.layer.1.EncDecAttention"
    assert rows[f"{path}.k"].reads == rows[f"{path}.v"].reads != rows[f"{path}.q"].reads
    assert rows[f"{path}.o"].input.permutation == f"{path}.o"
    assert not any("EncDec" in m.name for m in plan.matrices if m.block < 2)


def test_resumed_between_the_stacks(tokens, tmp_path):
    tiny("T5Model").save_pretrained(tmp_path / "float")
    recipe = Recipe(block_size=16, rounding="qronos")
    cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "whole")
    seen = []

    def stop(event):
        seen.append(event["step"])
        if event["step"] == "block-00002" and len(seen) < 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "out", events=stop)
    cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "out", resume=True)
    name = "corequant.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_encoder_of_its_own_is_refused(tokens):
    model = transformers.T5EncoderModel(tiny("T5Model").config).eval()
    with pytest.raises(cq.CorequantError):
        cqhf.quantize(model, Recipe(block_size=16), tokens)
