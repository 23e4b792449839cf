"""Exported directories, loaded by Transformers with compressed-tensors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import transformers
import transformers.quantizers.auto

import corequant as cq
import corequant_transformers as cqhf
import corequant_vllm
from corequant.recipe import Recipe
from corequant.storage.tensor_file import RawTensor, TensorFile, write_tensors
from corequant_transformers.checkpoint.reader import Stored
from corequant_transformers.exports import weight_files
from corequant_transformers.exports.transformers_hook import BlockTransform
from corequant_transformers.model.surroundings import quiet_transformers

OFFLINE = {
    "w4a16": ("int4:group16", "none"),
    "w8a8": ("int8:channel", "int8:token:symmetric"),
    "w4a8": ("int4:group16", "int8:token:symmetric"),
    "w4a4": ("int4:channel", "int4:token:asymmetric"),
    "w4a16bf16": ("int4:channel:bfloat16", "none"),
    "mxfp4a16": ("mxfp4", "none"),
    "mxfp4": ("mxfp4", "mxfp4:even"),
    "nvfp4a16": ("nvfp4", "none"),
}


def quantized(folder, tokens, kind="llama", **recipe):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    cqhf.quantize(cqhf.tiny_model(kind, **sizes), Recipe(**recipe), tokens, folder / "own")
    cqhf.export(folder / "own", folder / "out")
    return folder / "own", folder / "out"


def load(folder, left=(), **options):
    with quiet_transformers():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, **options
        )
    # What may be there in vain.
    info["unexpected_keys"] = [k for k in info["unexpected_keys"] if not k.endswith(left)]
    assert not any(info.values()), info
    return model


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.float()


def weight_of(model, matrix, experts):
    """A matrix of the plan in Transformers' class, which has those of all experts in one."""
    if matrix.expert is None:
        return model.get_submodule(matrix.name).weight
    path, name = matrix.name.rsplit(f".{matrix.expert}.", 1)
    fused = model.get_submodule(path)
    if name == experts.down:
        return getattr(fused, experts.fused_down)[matrix.expert]
    gate, up = getattr(fused, experts.fused_gate_up)[matrix.expert].chunk(2)
    return gate if name == experts.gate else up


def check_equal(own, other, tokens):
    """Weights to the bit, logits as near as the file's dtype lets them be."""
    ours, theirs = cqhf.load(own), load(other)
    expected, found = logits(ours, tokens), logits(theirs, tokens)
    plan = Stored(own).plan
    for matrix in plan.quantized:
        weight = weight_of(theirs, matrix, plan.architecture.experts)
        assert torch.equal(weight, ours.get_submodule(matrix.name).weight.to(weight.dtype))
    measured = [cqhf.evaluate(m, tokens).perplexity for m in (ours, load(other))]
    if theirs.dtype is torch.float32:
        assert measured[1] == pytest.approx(measured[0], rel=1e-4)
        assert (expected - found).abs().max() <= 1e-4 * expected.abs().max()
    else:
        # Everything between the weights is computed in bfloat16 there, in float32 by us.
        assert measured[1] == pytest.approx(measured[0], rel=0.05)
    return theirs


@pytest.mark.parametrize("asked", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", ["mxfp4", "nvfp4"])
def test_four_bit_floats_are_loaded_in_the_dtype_in_which_they_run(
    weights, asked, tokens, tmp_path
):
    recipe = {"rotation": "offline", "weights": weights, "activations": "none"}
    own, out = quantized(tmp_path, tokens, **recipe)
    expected = cqhf.evaluate(cqhf.load(own), tokens).perplexity
    with quiet_transformers():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=asked)
    for model in (cqhf.Source(out).load(asked), theirs):
        assert model.dtype is model.config.dtype is torch.bfloat16
        assert cqhf.evaluate(model, tokens).perplexity == pytest.approx(expected, rel=0.05)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_a_dtype_that_was_asked_for_is_kept_elsewhere(tokens, tmp_path):
    fp4 = {"rotation": "offline", "weights": "mxfp4", "activations": "none"}
    for name, recipe in {"fp4": fp4, "int4": {**fp4, "weights": "int4:group16"}}.items():
        (tmp_path / name).mkdir()
        _, out = quantized(tmp_path / name, tokens, **recipe)
        # Decoded while it is loaded, it runs in any dtype.
        config = transformers.CompressedTensorsConfig(dequantize=True) if name == "fp4" else None
        with quiet_transformers():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                out, dtype=torch.float32, quantization_config=config
            )
        assert model.dtype is torch.float32
        assert np.isfinite(cqhf.evaluate(model, tokens).perplexity)


@pytest.mark.parametrize("name", OFFLINE)
def test_transformers_loads_merged_directories(name, tokens, tmp_path):
    weights, activations = OFFLINE[name]
    recipe = {"rotation": "offline", "weights": weights, "activations": activations}
    if name == "w4a4":
        # Numbers of bfloat16 lie at ties more often, where readers' last bits choose another code.
        recipe["dtype"] = "float32"
    own, out = quantized(tmp_path, tokens, **recipe)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["format"] == config["format"]
    assert config["quantization_status"] == "compressed"
    check_equal(own, out, tokens)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_layers_that_are_fused_share_a_global_scale(rounding, tokens, tmp_path):
    recipe = {"weights": "nvfp4", "activations": "none", "rounding": rounding}
    _, out = quantized(tmp_path, tokens, rotation="offline", **recipe)
    file = TensorFile(out / "model.safetensors")
    found = {n: file.read(n).array() for n in file.names if n.endswith("weight_global_scale")}
    assert len(found) == 2 * 7
    for block in ("model.layers.0", "model.layers.1"):
        own = {n.split(".")[-2]: float(a[0]) for n, a in found.items() if n.startswith(block)}
        assert own["q_proj"] == own["k_proj"] == own["v_proj"]
        assert own["gate_proj"] == own["up_proj"]
        assert len(set(own.values())) == 4


def rewrite(file, change):
    """Write a file of tensors anew; nothing of it is mapped when it is replaced."""
    there, anew = TensorFile(file), file.with_name("anew")
    write_tensors(anew, change({name: there.read(name) for name in there.names}))
    anew.replace(file)


def test_global_scales_that_differ_are_refused(tokens, tmp_path):
    """A directory of another program, say: readers that fuse layers would take one for all."""
    recipe = {"rotation": "offline", "weights": "nvfp4", "activations": "none"}
    own, _ = quantized(tmp_path, tokens, **recipe)
    key = "model.layers.1.self_attn.k_proj.weight_global_scale"
    rewrite(
        own / "corequant.safetensors",
        lambda tensors: {**tensors, key: RawTensor.of(tensors[key].array() * 2)},
    )
    with pytest.raises(
        cq.SpecError, match="q_proj and .*k_proj read the same input and must share"
    ):
        cqhf.export(own, tmp_path / "again")


@pytest.mark.parametrize("block", [16, 12])
def test_transformers_rotates_at_run_time_after_the_import(block, tokens, tmp_path):
    own, out = tmp_path / "own", tmp_path / "out"
    recipe = Recipe(block_size=block, weights="int4:group16", activations="none")
    cqhf.quantize(cqhf.tiny_model("qwen2"), recipe, tokens, own)
    cqhf.export(own, out)
    model = load(out)
    with quiet_transformers():
        model.save_pretrained(tmp_path / "again")
    check_equal(own, out, tokens)
    check_equal(own, tmp_path / "again", tokens)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("block", [16, 12])
def test_rotations_of_our_matrices_are_ours_to_the_bit(block, ours, tokens, tmp_path):
    """Sums in another order move activations at ties; a matrix of another program is obeyed."""
    own, out = tmp_path / "own", tmp_path / "out"
    recipe = Recipe(block_size=block, weights="int4:group16", activations="none")
    cqhf.quantize(cqhf.tiny_model("qwen2"), recipe, tokens, own)
    cqhf.export(own, out)
    matrix = cq.hadamard_matrix(block).astype(np.float32)
    if not ours:
        matrix = np.ascontiguousarray(matrix[::-1] * matrix[1])
        other = RawTensor.of(matrix, "F32")
        rewrite(
            out / "model.safetensors",
            lambda tensors: {n: other if f"R{block}_input" in n else t for n, t in tensors.items()},
        )
        (out / "corequant.sha256").unlink()
    transforms = [m for m in load(out).modules() if isinstance(m, BlockTransform)]
    assert len(transforms) == 2
    x = torch.randn(7, 8 * block, generator=torch.Generator().manual_seed(1))
    for transform in transforms:
        assert transform.known is ours
        for inverse in (False, True):
            transform.inverse = inverse
            result = transform(x)
            product = x.double().reshape(7, 8, block) @ torch.tensor(
                matrix.T if inverse else matrix, dtype=torch.float64
            )
            product = product.reshape(x.shape) / block**0.5
            torch.testing.assert_close(result, product.float(), rtol=1e-5, atol=1e-5)
            if ours:
                assert torch.equal(result, cq.block_hadamard(x, block, inverse=inverse))


@pytest.mark.parametrize("runs", [0, 1, 2])
@pytest.mark.parametrize(
    "recipe",
    [
        {"rotation": "offline", "activations": None},
        {"block_size": 16, "activations": None},
        {"block_size": 16, "activations": "int8:token:symmetric"},
        {"block_size": 16, "rotation": "online", "activations": None},
    ],
    ids=str,
)
def test_a_model_that_ran_can_be_saved_again(recipe, runs, tokens, tmp_path):
    _, out = quantized(tmp_path, tokens, weights="int4:group16", **recipe)
    expected = logits(load(out), tokens)
    folder = out
    # Of weights that were decoded, compressed-tensors keeps the shape that the codes had.
    left = ("weight_shape",)
    for generation in range(2):
        model = load(folder, left)
        for _ in range(runs):
            logits(model, tokens)
        folder = tmp_path / f"again-{generation}"
        # Transformers decodes the weights of a model when it is first called, and saves them so.
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        status = "decompressed" if runs else "compressed"
        if recipe.get("rotation") == "offline":
            assert config["quantization_status"] == status
        else:
            # A reader that would leave the rotations out stops at it.
            assert config["quantization_status"].startswith("import corequant_transformers first")
        assert torch.equal(logits(load(folder, left), tokens), expected)
        assert torch.equal(logits(model, tokens), expected)


def test_evaluating_leaves_the_weights_of_others_as_they_are(tokens, tmp_path):
    own, out = quantized(tmp_path, tokens, weights="int4:group16", block_size=16, activations=None)
    model = load(out)
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("weight_packed") for name in state)
    found = [cqhf.evaluate(model, tokens).perplexity for _ in range(2)]
    assert found == [cqhf.evaluate(cqhf.load(own), tokens).perplexity] * 2
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    model.save_pretrained(tmp_path / "again")
    expected = logits(model, tokens)
    assert torch.equal(logits(load(tmp_path / "again"), tokens), expected)
    # Decoded by now, and measured the same.
    assert cqhf.evaluate(model, tokens).perplexity == found[0]


@pytest.mark.parametrize("rotation", ["offline", "merged"])
def test_what_was_dequantized_at_loading_is_not_saved_without_its_rotations(
    rotation, tokens, tmp_path
):
    recipe = {"rotation": rotation, "weights": "int4:group16", "activations": None}
    recipe |= {"block_size": 16} if rotation == "merged" else {}
    _, out = quantized(tmp_path, tokens, **recipe)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    with quiet_transformers(), warnings.catch_warnings():
        # Transformers tells that the directory has a config of its own.
        warnings.simplefilter("ignore", UserWarning)
        model = transformers.AutoModelForCausalLM.from_pretrained(out, quantization_config=config)
    expected = logits(load(out), tokens)
    assert torch.allclose(logits(model, tokens), expected, atol=1e-5)
    if rotation == "merged":
        with pytest.raises(cq.OutputError, match="would lose the run-time rotations"):
            model.save_pretrained(tmp_path / "again")
        return
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.allclose(logits(again, tokens), expected, atol=1e-5)


def test_a_missing_rotation_is_an_error(tokens, tmp_path):
    recipe = {"block_size": 16, "weights": "int4:group16", "activations": "none"}
    _, out = quantized(tmp_path, tokens, **recipe)
    left_out = "layers.1.mlp.down_proj.R16"
    rewrite(
        out / "model.safetensors",
        lambda tensors: {n: t for n, t in tensors.items() if left_out not in n},
    )
    with pytest.raises(cq.CheckpointError, match=r"layers\.1\.mlp\.down_proj.*not orthogonal"):
        load(out)


def test_shards_have_an_index_and_load(tokens, tmp_path):
    recipe = Recipe(rotation="offline", weights="int4:group16", activations="none")
    cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens, tmp_path / "own")
    cqhf.export(tmp_path / "own", tmp_path / "out", shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    check_equal(tmp_path / "own", tmp_path / "out", tokens)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"weights": "int4:channel:asymmetric"}, "weights must be symmetric"),
        ({"weights": "e3m2:channel"}, "compressed-tensors holds weights of"),
        ({"weights": "mxfp4", "activations": "int8:token"}, "activations must be none or mxfp4"),
        ({"weights": "mxfp4", "activations": "mxfp4"}, "write mxfp4:even"),
        ({"weights": "nvfp4", "activations": "nvfp4"}, "need a scale per layer"),
    ],
)
def test_what_readers_lack_is_refused_and_nothing_is_left(recipe, words, tokens, tmp_path):
    with pytest.raises(cq.SpecError, match=words):
        quantized(tmp_path, tokens, **{"rotation": "offline", "activations": "none", **recipe})
    assert [f.name for f in tmp_path.iterdir()] == ["own"]


def test_a_lost_bit_is_noticed(tokens, tmp_path, monkeypatch):
    def damaging(path, tensors):
        first = next(iter(tensors))
        changed = tensors[first].data.copy()
        changed[0] ^= 1
        write(
            path,
            {
                **tensors,
                first: type(tensors[first])(tensors[first].dtype, tensors[first].shape, changed),
            },
        )

    write = weight_files.write_tensors
    monkeypatch.setattr(weight_files, "write_tensors", damaging)
    with pytest.raises(cq.OutputError, match="did not read back"):
        quantized(tmp_path, tokens, rotation="offline", weights="int4:group16")
    assert [f.name for f in tmp_path.iterdir()] == ["own"]


def test_layers_that_are_not_linear_are_refused(tokens, tmp_path):
    recipe = Recipe(rotation="offline", weights="int4:group16", activations="none")
    cqhf.quantize(cqhf.tiny_model("gpt2"), recipe, tokens, tmp_path / "own")
    with pytest.raises(cq.ArchitectureError, match="not a linear layer"):
        cqhf.export(tmp_path / "own", tmp_path / "out")


@pytest.mark.parametrize(("kind", "size"), [("hadamard", 16), ("random-hadamard", 12)])
def test_the_vllm_plugin_rotates_on_a_cpu(kind, size, rng, monkeypatch):
    """Against a stand-in with the attributes of vLLM's class; vLLM itself is not installed."""

    class HadamardTransform:
        def forward(self, value, part_id=0):
            raise NotImplementedError("needs CUDA")

    module = types.SimpleNamespace(HadamardTransform=HadamardTransform)
    monkeypatch.setitem(sys.modules, corequant_vllm._MODULE, module)
    corequant_vllm.register()
    corequant_vllm.register()
    scheme = types.SimpleNamespace(type=kind, head_dim=size)
    transform = HadamardTransform()
    transform.transforms = {
        0: types.SimpleNamespace(scheme=scheme, args=types.SimpleNamespace(inverse=False))
    }
    matrix = torch.from_numpy(cq.hadamard_matrix(size).astype(np.float32) / math.sqrt(size))
    transform.weight = types.SimpleNamespace(partitions={0: matrix})
    x = torch.from_numpy(rng.normal(size=(3, 48)).astype(np.float32))
    torch.testing.assert_close(transform.forward(x), cq.block_hadamard(x, size))
    assert transform.forward(x, 1) is x


def test_the_vllm_plugin_brings_no_compiled_kernels_along():
    # vLLM 0.32 on a CPU stops at an object of llvmlite's in front of its workers' start.
    code = (
        "import sys; from importlib.metadata import entry_points;"
        "(found,) = entry_points(group='vllm.general_plugins', name='corequant');"
        "assert found.load().__name__ == 'register';"
        "print([m for m in ('llvmlite', 'numba', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
