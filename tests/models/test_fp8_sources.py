"""Models that are published as float8 numbers with scales, read as float models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.model.surroundings import quiet_transformers

SIZES = {"hidden_size": 48, "intermediate_size": 80, "head_dim": 16}
BLOCK = 32


def scaled(weight, block):
    """Return a matrix as float8 numbers, scales by block, and the numbers that these stand for."""
    rows, columns = weight.shape
    step = (block, block) if block else (rows, columns)
    scales = torch.empty(-(-rows // step[0]), -(-columns // step[1]))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = np.s_[i * step[0] : (i + 1) * step[0], j * step[1] : (j + 1) * step[1]]
            scales[i, j] = weight[place].abs().max() / 448 * 2**0.5
            codes[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[place] = codes[place].float() * scales[i, j]
    return codes, scales, meant


def published(folder, kind="llama", block=BLOCK, form="block", suffix="_scale_inv", shards=1):
    """Write a tiny model with float8 weights, and return the float state that it stands for."""
    with quiet_transformers():
        cqhf.tiny_model(kind, **SIZES).save_pretrained(folder)
    state, tensors, expected = load_file(folder / "model.safetensors"), {}, {}
    for name, value in state.items():
        if value.ndim != 2 or "embed" in name or "lm_head" in name or name.endswith("gate.weight"):
            tensors[name] = expected[name] = value.bfloat16()
            continue
        codes, scales, meant = scaled(value, block)
        tensors[name] = codes
        if form == "scalar":
            scales = scales.reshape(())
        if form == "row":
            scales = scales.reshape(1, 1).repeat(len(value), 1)
        tensors[f"{name}{suffix}"], expected[name] = scales, meant
        if form == "scalar":
            tensors[name.replace(".weight", ".activation_scale")] = torch.tensor(0.5)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    size = [block, block] if block else None
    config["quantization_config"] = {
        **{"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}
    }
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return expected
    # A scale may be in another file than its weight.
    homes = {n: f"model-{1 + n.endswith(suffix)}.safetensors" for n in tensors}
    for file in set(homes.values()):
        save_file({n: t for n, t in tensors.items() if homes[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return expected


@pytest.mark.parametrize(
    ("kind", "block", "form", "suffix", "shards"),
    [
        ("llama", BLOCK, "block", "_scale_inv", 1),
        ("llama", BLOCK, "block", "_scale_inv", 2),
        ("llama", 0, "scalar", "_scale_inv", 1),
        ("llama", 0, "row", "_scale", 1),
        ("qwen3_moe", BLOCK, "block", "_scale_inv", 1),
    ],
)
def test_numbers_are_codes_times_scales(kind, block, form, suffix, shards, tmp_path):
    expected = published(tmp_path, kind, block, form, suffix, shards)
    model = cqhf.Source(tmp_path).load()
    assert not hasattr(model.config, "quantization_config")
    with quiet_transformers():
        float_model = cqhf.tiny_model(kind, **SIZES)
        float_model.save_pretrained(tmp_path / "float")
    save_file({n: t.float() for n, t in expected.items()}, tmp_path / "float/model.safetensors")
    reference = cqhf.Source(tmp_path / "float").load()
    found = model.state_dict()
    for name, value in reference.state_dict().items():
        assert torch.equal(found[name], value), name


def test_they_are_quantized_from_disk_as_the_float_model_that_they_are(tmp_path):
    expected = published(tmp_path / "fp8", shards=2)
    with quiet_transformers():
        cqhf.tiny_model("llama", **SIZES).save_pretrained(tmp_path / "float")
    save_file({n: t.float() for n, t in expected.items()}, tmp_path / "float/model.safetensors")
    tokens, recipe = np.arange(48).reshape(2, 24), Recipe(block_size=16, dtype="float32")
    for name in ("fp8", "float"):
        cqhf.quantize(tmp_path / name, recipe, tokens, tmp_path / f"{name}-4")
    files = [(tmp_path / f"{n}-4/corequant.safetensors").read_bytes() for n in ("fp8", "float")]
    assert files[0] == files[1]
    loaded = cqhf.load(tmp_path / "fp8-4")
    assert "quantization_config" not in json.loads(
        (tmp_path / "fp8-4/float_config.json").read_text()
    )
    assert cqhf.evaluate(loaded, tokens).perplexity > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks 1 weights"),
        (
            lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"),
            r"up_proj.weight of .* must be one of F64, F32, F16, BF16, got F8_E4M3",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2, 2)}),
            r"the scale of .*up_proj.weight must have shape \(3, 2\) for a weight of \(80, 48\)",
        ),
        (lambda t: t.update({"a.weight_scale_inv": torch.ones(1)}), "has no place for"),
    ],
)
def test_missing_and_wrong_scales_are_refused(change, words, tmp_path):
    published(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(cq.CheckpointError, match=words):
        cqhf.Source(tmp_path).load()


@pytest.mark.parametrize("block", [[128], [0, 128], "128", [128.0, 128]])
def test_blocks_are_two_positive_integers(block, tmp_path):
    published(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["weight_block_size"] = block
    file.write_text(json.dumps(config))
    with pytest.raises(cq.CheckpointError, match="weight_block_size of .* two positive integers"):
        cqhf.Source(tmp_path)
