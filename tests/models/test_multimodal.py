"""Language models that read images: the decoder is quantized, images mean what they meant."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.architectures.composite import Composite
from corequant_transformers.architectures.known import architecture_of
from corequant_transformers.architectures.multimodal import COMPOSITES
from corequant_transformers.architectures.writer import Writer
from corequant_transformers.model.layouts import standardize
from corequant_transformers.model.parts import ENTRY, OUTSIDE, part_of, untie
from corequant_transformers.transforms.matrices import transform_model
from corequant_transformers.transforms.outside import check_writers, transform_writers
from corequant_transformers.transforms.verification import KeepFloat64

KINDS = ("llava", "mistral3", "gemma3", "qwen2_5_vl", "qwen3_vl")
RECIPES = {
    "blocks": Recipe(block_size=16),
    "full": Recipe(block_size=None, random_signs=False),
    "heads": Recipe(rotation="heads", head_block_size=4),
    "online": Recipe(rotation="online", block_size=4),
}
IMAGE = 5
"""The token that stands for a piece of an image."""


def with_image(kind, dtype=torch.float32):
    """Return the arguments of a forward pass over text around one image."""
    generator = torch.Generator().manual_seed(0)
    pieces, side = {"llava": (4, 28), "mistral3": (4, 56), "gemma3": (4, 28)}.get(kind, (4, 56))
    ids = torch.randint(8, 128, (1, 20), generator=generator)
    ids[0, 4 : 4 + pieces] = IMAGE
    pixels = torch.randn(1, 3, side, side, generator=generator, dtype=torch.float64)
    given = {"input_ids": ids, "pixel_values": pixels.to(dtype)}
    if kind == "mistral3":
        given["image_sizes"] = torch.tensor([[side, side]])
    if kind.startswith("qwen"):
        ids[0, 3] = 6
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        given["mm_token_type_ids"] = (ids == IMAGE).long()
        patches = torch.randn(16, 3 * 2 * 14 * 14, generator=generator, dtype=torch.float64)
        given["pixel_values"] = patches.to(dtype)
    return given


def logits(model, given):
    with torch.no_grad():
        return model(**given, use_cache=False).logits


def transformed(model, recipe):
    """Return a float64 copy with everything that the recipe does but rounding, and its plan."""
    result = cqhf.quantize(model, recipe, np.random.default_rng(1).integers(8, 128, (2, 24)))
    plan, choices = result.plan, result.choices
    copied = copy.deepcopy(model).double()
    standardize(copied, plan)
    untie(copied, plan)
    transform_model(copied, plan, choices)
    changed, error = transform_writers(copied, plan, choices)
    return copied, plan, changed, error


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        *((kind, "blocks") for kind in KINDS),
        ("qwen3_vl", "full"),
        ("llava", "heads"),
        ("gemma3", "online"),
        ("mistral3", "online"),
    ],
)
def test_outputs_with_an_image_are_the_float_models(kind, recipe):
    model = cqhf.tiny_model(kind)
    given = with_image(kind, torch.float64)
    copied, plan, changed, error = transformed(model, RECIPES[recipe])
    assert error < 1e-14
    with KeepFloat64():
        expected, found = logits(model.double(), given), logits(copied, given)
        # The image counts, so that what it says would show.
        other = logits(model, {**given, "pixel_values": given["pixel_values"].flip(-1) * 2})
    scale = float(expected.abs().max())
    assert float((expected - found).abs().max()) < 1e-10 * scale
    assert float((expected - other).abs().max()) > 1e-3 * scale
    writes = plan.written != type(plan.written)()
    assert bool(changed) == writes
    if writes:
        # Without the writers' part the image would be garbled.
        for name, parameter in model.named_parameters():
            if name in changed:
                path, _, key = name.rpartition(".")
                copied.get_submodule(path)._parameters[key] = parameter
        with KeepFloat64():
            garbled = logits(copied, given)
        assert float((expected - garbled).abs().max()) > 1e-4 * scale


@pytest.mark.parametrize(
    ("kind", "where"), [*((kind, "disk") for kind in KINDS), ("llava", "memory")]
)
def test_quantized_saved_and_loaded(kind, where, tokens, tmp_path):
    model = cqhf.tiny_model(kind)
    origin = model
    if where == "disk":
        model.save_pretrained(tmp_path / "float", max_shard_size="100KB")
        (tmp_path / "float" / "preprocessor_config.json").write_text('{"size": 28}')
        origin = tmp_path / "float"
    recipe = Recipe(block_size=16, dtype="bfloat16")
    result = cqhf.quantize(origin, recipe, tokens, tmp_path / "out")
    assert result.verification.logits_error < 1e-10
    assert max(result.verification.block_errors) < 1e-10
    # The text part alone is quantized.
    assert {m.name.partition(".layers")[0] for m in result.plan.quantized} == {
        "model.language_model"
    }
    loaded = cqhf.load(tmp_path / "out")
    given = with_image(kind)
    assert type(loaded) is type(model)
    assert torch.equal(logits(result.model, given), logits(loaded, given))
    difference = logits(model, given) - logits(loaded, given)
    assert 0.01 < float(difference.norm() / logits(model, given).norm()) < 1
    # The tower is what it was, bit for bit, however the rest is rounded.
    state, kept = model.state_dict(), loaded.state_dict()
    written = check_writers(result.plan, {n: tuple(t.shape) for n, t in state.items()})
    writers = {n.removesuffix(".weight") for n in written}
    outside = [n for n in state if part_of(n, result.plan) == OUTSIDE]
    assert len(outside) > 10
    for name in outside:
        same = torch.equal(state[name], kept[name])
        assert same == (name.removesuffix(".weight").removesuffix(".bias") not in writers)
    if where == "disk":
        assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 28}'
    assert "image-text-to-text" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_transformers_loads_and_generates(kind, tokens, tmp_path):
    result = cqhf.quantize(cqhf.tiny_model(kind), Recipe(block_size=16), tokens, tmp_path / "out")
    own = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    given = with_image(kind)
    assert torch.equal(logits(own, given), logits(result.model, given))
    made = own.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=0)
    again = result.model.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 24)
    assert torch.equal(made, again)
    own.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(cqhf.load(tmp_path / "again"), given), logits(own, given))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_heads_are_those_of_the_whole_model(tied, tokens, tmp_path):
    model = cqhf.tiny_model("llava", tie_word_embeddings=tied)
    recipe = Recipe(rotation="heads", head_block_size=4)
    result = cqhf.quantize(model, recipe, tokens, tmp_path / "out")
    assert result.plan.tied == tied
    loaded = cqhf.load(tmp_path / "out")
    embedding = loaded.model.language_model.embed_tokens.weight
    assert (loaded.lm_head.weight is embedding) == tied


def test_a_decoder_of_any_described_type(tokens):
    for decoder in ("qwen2", "gpt2"):
        model = cqhf.tiny_model("llava", decoder=decoder)
        assert architecture_of(model.config).block.startswith("model.language_model.")
        result = cqhf.quantize(model, Recipe(block_size=16), tokens)
        assert result.verification.logits_error < 1e-10
    # GPT-2's LayerNorms subtract the mean of what the projector writes as well.
    copied, plan, _, _ = transformed(model, Recipe(block_size=16))
    given = with_image("llava", torch.float64)
    with KeepFloat64():
        expected, found = logits(model.double(), given), logits(copied, given)
    assert plan.written.centered
    assert float((expected - found).abs().max()) < 1e-10 * float(expected.abs().max())


def test_parts_and_notes(tokens):
    plan = cqhf.plan(cqhf.tiny_model("qwen3_vl"), Recipe(block_size=16))
    assert part_of("model.visual.merger.norm.weight", plan) == OUTSIDE
    assert part_of("model.language_model.embed_tokens.weight", plan) == ENTRY
    note = next(n for n in plan.notes if "model.visual" in n)
    assert "stay as they are" in note
    assert "deepstack_merger_list" in note
    assert "only text" in note


def test_writers_that_are_not_as_described():
    model = cqhf.tiny_model("llava")
    plan = cqhf.plan(model, Recipe(block_size=16))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    name = "model.multi_modal_projector.linear_2.weight"
    assert list(check_writers(plan, shapes)) == [name]
    with pytest.raises(cq.ArchitectureError, match="no parameter .*linear_2.weight"):
        check_writers(plan, {n: s for n, s in shapes.items() if n != name})
    with pytest.raises(cq.ArchitectureError, match="must write the 48 channels"):
        check_writers(plan, {**shapes, name: (47, 48)})


def test_a_config_without_a_decoder_is_refused():
    composite = Composite("llava", ("tower",), (Writer("tower.weight"),), config="absent")
    with pytest.raises(cq.ArchitectureError, match="must have a absent|must have the field absent"):
        composite.decoder(transformers.LlavaConfig())
    assert set(KINDS) == set(COMPOSITES)


def test_evaluated_on_text(tokens):
    model = cqhf.tiny_model("gemma3")
    made = cqhf.quantize(model, Recipe(weights="int8:channel", activations=None), tokens)
    found = cqhf.evaluate(made.model, tokens, against=model).divergence
    assert 0 < found.kl < 1e-2


def test_resumed_after_any_step(tokens, tmp_path, monkeypatch):
    model = cqhf.tiny_model("llava")
    model.save_pretrained(tmp_path / "float")
    recipe = Recipe(block_size=16)
    cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "whole")
    steps = 0

    def stop(event):
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "out", events=stop)
    cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "out", resume=True)
    name = "corequant.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_exported_for_transformers_and_refused_for_llama_cpp(tokens, tmp_path):
    model = cqhf.tiny_model("llava")
    model.save_pretrained(tmp_path / "float")
    recipe = Recipe(block_size=16, weights="int4:group16", activations="int8:token")
    result = cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "own")
    cqhf.export(tmp_path / "own", tmp_path / "export", "compressed-tensors")
    exported = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    given = with_image("llava")
    assert torch.equal(logits(exported, given), logits(result.model, given))
    recipe = Recipe(rotation="offline", weights="int4:group32:symmetric:float16", activations=None)
    model = cqhf.tiny_model("llava", hidden_size=64, intermediate_size=128)
    cqhf.quantize(model, recipe, tokens, tmp_path / "other")
    with pytest.raises(cq.CorequantError, match="llava"):
        cqhf.export(tmp_path / "other", tmp_path / "model.gguf", "gguf")
