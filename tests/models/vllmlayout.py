"""What vLLM makes of a compressed-tensors directory of a Llama, without vLLM.

The parameters that its layers make room for, with their shapes and dtypes, the files' tensors put
into them, and what its kernels then multiply by: after the sources of vLLM 0.32.
"""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import torch
from safetensors.torch import load_file

import corequant_transformers as cqhf

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""Layers that it has, and those in whose place they are."""

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@torch.no_grad()
def check_layout(own, out):
    """Compare all that vLLM would compute with, to the bit, with what corequant's directory holds.

    Parameters
    ----------
    own, out : Path
        Corequant's own directory, and what was exported from it.
    """
    ours, layout = cqhf.load(own), Layout(out)
    for i, layer in product(range(ours.config.num_hidden_layers), FUSED):
        path = f"model.layers.{i}"
        parts = [f"{path}.{part}" for part in FUSED[layer]]
        found = layout.weights(f"{path}.{layer}", parts)
        meant = torch.cat([ours.get_submodule(part).weight for part in parts])
        assert torch.equal(found, meant.to(found.dtype)), f"{path}.{layer}"
    rest = {name for name, _ in ours.named_parameters() if "_proj." not in name}
    assert layout.tensors.keys() - layout.read == rest
    for name in rest:
        found = layout.tensors[name]
        assert torch.equal(found, ours.get_parameter(name).to(found.dtype)), name


class Layout:
    """A directory's files and config, read as vLLM does.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.values = self.config["quantization_config"]
        self.tensors, self.read = {}, set()
        for file in sorted(folder.glob("*.safetensors")):
            self.tensors |= load_file(file, backend="pread")

    def weights(self, path, parts):
        """Return what a layer multiplies by, in float32, of four-bit floats in bfloat16.

        Parameters
        ----------
        path : str
            Its path; of its parts the last names are others.
        parts : sequence of str
            Paths of the float model's layers, in order.
        """
        group = self._group(path, parts)
        if group is None:
            return torch.cat([self._take(f"{part}.weight", 2, None) for part in parts]).float()
        scheme, inputs = group["weights"], group["input_activations"]
        if scheme["type"] == "float":
            return self._fp4(parts, scheme)
        assert scheme["type"] == "int"
        if inputs is None:
            assert group["format"] == "pack-quantized"
            return self._packed(parts, scheme)
        # Integer products, whose scales are float32 in memory.
        assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (8, "token", True)
        assert (group["format"], scheme["num_bits"]) == ("int-quantized", 8)
        assert scheme["strategy"] == "channel"
        codes = torch.cat([self._take(f"{part}.weight", 2, torch.int8) for part in parts])
        scales = torch.cat([self._take(f"{part}.weight_scale", 2) for part in parts])
        assert scales.shape == (len(codes), 1)
        return codes.float() * scales.float()

    def _group(self, path, parts):
        """Return the config group of a layer; None leaves it in float."""
        ignored = [part in self.values["ignore"] for part in parts]
        if any(ignored):
            assert all(ignored), f"the parts of {path} differ"
            return None
        groups = self.values["config_groups"].values()
        found = [
            [i for i, group in enumerate(groups) if _names(group["targets"], part)]
            for part in parts
        ]
        assert all(each == found[0] and len(each) == 1 for each in found), f"{path}: {found}"
        return [*groups][found[0][0]]

    def _take(self, name, dimensions, dtype="computed"):
        """Return a tensor, of the dtype that the model computes in by default; None is any."""
        tensor = self.tensors[name]
        wanted = getattr(torch, self.config["dtype"]) if dtype == "computed" else dtype
        assert tensor.ndim == dimensions, name
        assert wanted in (None, tensor.dtype), name
        self.read.add(name)
        return tensor

    def _packed(self, parts, scheme):
        bits, whole = scheme["num_bits"], 32 // scheme["num_bits"]
        assert 32 % bits == 0
        words = torch.cat([self._take(f"{part}.weight_packed", 2, torch.int32) for part in parts])
        scales = torch.cat([self._take(f"{part}.weight_scale", 2) for part in parts])
        shapes = [self._take(f"{part}.weight_shape", 1, torch.int64).tolist() for part in parts]
        assert {shape[1] for shape in shapes} == {whole * words.shape[1]}
        assert sum(shape[0] for shape in shapes) == len(words) == len(scales)
        assert scheme["symmetric"]
        assert not any(f"{part}.weight_zero_point" in self.tensors for part in parts)
        lanes = words.numpy().view(np.uint32)[..., None] >> np.arange(0, 32, bits, np.uint32)
        codes = (lanes & (2**bits - 1)).astype(np.float32).reshape(len(words), -1) - 2 ** (bits - 1)
        size = scheme["group_size"] if scheme["strategy"] == "group" else codes.shape[1]
        assert scales.shape[1] * size == codes.shape[1]
        return torch.from_numpy(codes) * scales.float().repeat_interleave(size, 1)

    def _fp4(self, parts, scheme):
        assert (scheme["num_bits"], scheme["strategy"], scheme["group_size"]) == (
            4, "tensor_group", 16,
        )  # fmt: skip
        packed = torch.cat([self._take(f"{part}.weight_packed", 2, torch.uint8) for part in parts])
        kind = torch.float8_e4m3fn
        scales = torch.cat([self._take(f"{part}.weight_scale", 2, kind) for part in parts])
        divisors = [self._take(f"{part}.weight_global_scale", 1, torch.float32) for part in parts]
        assert len(set(torch.cat(divisors).tolist())) == 1
        nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
        values = _E2M1[nibbles & 7] * (1.0 - 2.0 * (nibbles >> 3))
        assert scales.shape == (len(packed), values.shape[1] // 16)
        # Products of three numbers, whose order is the kernels' own.
        return (values * scales.float().repeat_interleave(16, 1) / divisors[0]).bfloat16()


def _names(targets, path):
    """Return whether targets name a layer, by its class or by its path."""
    return targets == ["Linear"] or path in targets
