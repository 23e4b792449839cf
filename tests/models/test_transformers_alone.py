"""What Transformers itself makes of compressed-tensors files: what docs/exports.md says of it."""

from __future__ import annotations

import json

import compressed_tensors.quantization as ct
import pytest
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from packaging.version import Version
from safetensors.torch import save_file
from transformers.utils.quantization_config import CompressedTensorsConfig

import corequant_transformers as cqhf

IDS = torch.arange(32)[None]


def test_transformers_drops_transform_config():
    """Were it kept, it might be applied, and the hook would rotate a second time."""
    rotation = {"type": "hadamard", "apply": [{"location": "input", "targets": ["Linear"]}]}
    weights = ct.QuantizationArgs(num_bits=4, strategy="channel")
    group = ct.QuantizationScheme(targets=["Linear"], weights=weights)
    config = CompressedTensorsConfig(
        config_groups={"g": group.model_dump()},
        format="pack-quantized",
        transform_config={"config_groups": {"r": rotation}},
    )
    assert "num_bits" in json.dumps(config.to_dict(), default=str)
    assert "hadamard" not in json.dumps(config.to_dict(), default=str)
    assert not hasattr(config, "transform_config")
    assert getattr(config.quantization_config, "transform_config", None) is None


def write_asymmetric(folder, form, group):
    """Write a model with weights of four bits and zero points, and return its logits."""
    model = cqhf.tiny_model("llama")
    kind = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = ct.QuantizationArgs(num_bits=4, type="int", symmetric=False, **kind)
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    config = ct.QuantizationConfig(
        config_groups={"g": scheme}, ignore=["lm_head"], format=form, quantization_status="frozen"
    )
    model.config.save_pretrained(folder)
    ct.apply_quantization_config(model, config)
    plain = {}
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            blocks = layer.weight.data.unflatten(-1, (-1, group or layer.in_features))
            low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
            scale = (high - low) / 15
            zero = (-8 - (low / scale).round()).clamp(-8, 7)
            codes = ((blocks / scale[..., None]).round() + zero[..., None]).clamp(-8, 7)
            layer.weight.data = ((codes - zero[..., None]) * scale[..., None]).flatten(-2)
            layer.weight_scale.data = scale
            layer.weight_zero_point.data = zero.to(layer.weight_zero_point.dtype)
    plain = cqhf.tiny_model("llama")
    plain.load_state_dict(model.state_dict(), strict=False)
    ModelCompressor(quantization_config=config).compress_model(model)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    page = folder / "config.json"
    values = {**config.model_dump(mode="json"), "quant_method": "compressed-tensors"}
    values["quantization_status"] = "compressed"
    everything = {**json.loads(page.read_text()), "quantization_config": values}
    page.write_text(json.dumps({**everything, "architectures": ["LlamaForCausalLM"]}))
    with torch.no_grad():
        return plain(IDS).logits


def loaded(folder, **config):
    given = {"quantization_config": CompressedTensorsConfig(**config)} if config else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("form", ["int-quantized", "pack-quantized"])
def test_zero_points_are_read_or_refused(form, group, tmp_path):
    expected = write_asymmetric(tmp_path, form, group)
    torch.testing.assert_close(loaded(tmp_path, dequantize=True), expected)
    if form == "pack-quantized" and Version(transformers.__version__) >= Version("5.23"):
        with pytest.raises(RuntimeError, match="mismatched"):
            loaded(tmp_path)
    else:
        torch.testing.assert_close(loaded(tmp_path), expected)
