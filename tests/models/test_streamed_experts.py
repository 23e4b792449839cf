"""Experts that are read few at a time: the results of whole blocks, in a fraction of the memory."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.model.shards import FileWeights
from corequant_transformers.model.streamed_experts import StreamedExperts
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.run.directory import RunDirectory
from corequant_transformers.run.output import run_directory
from corequant_transformers.transforms import experts as expert_transforms
from tests import capabilities
from tests.models.test_described import VARIANTS
from tests.models.test_export import check_equal
from tests.models.test_gguf_files import quantized as quantized_for_gguf
from tests.models.test_gguf_files import write_model
from tests.models.test_streaming import digest, write

TIMES = ("seconds", "peak_rss_mib")


def at_once(monkeypatch, count):
    """Have so many experts open at a time; 0 is a whole block."""
    own = ModelPlan.experts_at_once
    monkeypatch.setattr(
        ModelPlan, "experts_at_once", lambda plan, block: count if own(plan, block) else 0
    )


def rows_of(folder):
    report = json.loads((folder / "report.json").read_text())
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in report["matrices"]]
    return report["regions"], rows, report["verification"]["matrices_changed"]


def check_streamed(source, recipe, tokens, folder, monkeypatch, count=3):
    """Quantize with experts three at a time and with all of them: files and reports are equal."""
    seen = []
    opened = StreamedExperts._fill

    def note(self, index, layers):
        seen.append(len(self._opened))
        return opened(self, index, layers)

    for name, few in (("streamed", count), ("whole", 0)):
        with monkeypatch.context() as patch:
            at_once(patch, few)
            patch.setattr(StreamedExperts, "_fill", note)
            cqhf.quantize(source, recipe, tokens, folder / name)
        assert bool(seen) == (name == "streamed")
        assert max(seen, default=0) <= few
        seen.clear()
    assert digest(folder / "streamed") == digest(folder / "whole")
    assert rows_of(folder / "streamed") == rows_of(folder / "whole")
    return folder / "streamed"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mixtral", {}),
        ("mixtral", {"rounding": "qronos", "reference": "model"}),
        ("qwen3_moe", {"rounding": "gptq", "weights": "nvfp4", "activations": "nvfp4"}),
        ("qwen3_moe", {"rounding": "gpfq", "reference": "block", "dtype": "float32"}),
        ("qwen3_moe", {"factors": "scales", "permutation": "auto", "block_size": "auto"}),
        # A shared MLP before the experts, and one after them.
        ("qwen2_moe", {"rounding": "gptq"}),
        ("glm4_moe", {"rounding": "qronos", "reference": "model"}),
        # One tensor for all experts in the file, transposed, with biases.
        ("gpt_oss", {"rounding": "qronos", "keep": [r"re:.*layers\.0.*experts\.1\.down_proj"]}),
        # Norms whose biases go into the experts.
        ("phimoe", {"rounding": "gptq", "keep": [r"re:.*layers\.1.*experts.*"]}),
    ],
)
def test_results_are_those_of_whole_blocks(kind, fields, tokens, tmp_path, monkeypatch):
    source = write(tmp_path / "float", kind, **VARIANTS.get(kind, {}))
    recipe = Recipe(**{"block_size": 16, **fields})
    check_streamed(source, recipe, tokens, tmp_path, monkeypatch)


@pytest.mark.parametrize("how", ["shared", "nearest"])
def test_experts_with_no_token_and_with_one(how, tokens, tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    source = write(tmp_path / "float", "mixtral", num_local_experts=16, num_experts=16, **sizes)
    recipe = Recipe(block_size=16, rounding="qronos", expert_tokens=2, rare_experts=how)
    out = check_streamed(source, recipe, tokens[:2, :6], tmp_path, monkeypatch)
    rows = [row for row in rows_of(out)[1] if ".experts." in row["name"]]
    assert {0, 1} <= {row["tokens"] for row in rows}
    assert {row.get("rare") for row in rows if row["tokens"] < 2} == {how}


def test_experts_of_a_gguf_file(tmp_path, monkeypatch):
    plain = write_model(tmp_path / "plain", "mixtral", sliding_window=None)
    own = quantized_for_gguf(tmp_path / "own", plain, rotation="offline", activations="none")
    source = cqhf.export(own, tmp_path / "model.gguf", "gguf")
    tokens = np.random.default_rng(0).integers(2, 300, (2, 24))
    recipe = Recipe(block_size=16, rounding="gptq")
    check_streamed(source, recipe, tokens, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "rounding"),
    [("mixtral", {}), ("qwen3_moe", {"rounding": "qronos", "reference": "model"})],
)
def test_exports_of_64_experts_load_in_transformers(kind, rounding, tokens, tmp_path, monkeypatch):
    """To the bit what is saved here; some experts were calibrated on no token, some on one."""
    at_once(monkeypatch, 1)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32}
    sizes |= {"num_experts": 64, "num_local_experts": 64, "num_hidden_layers": 1}
    source = write(tmp_path / "float", kind, **sizes)
    recipe = Recipe(
        rotation="offline", weights="int4:group16", activations="none", dtype="float32", **rounding
    )
    cqhf.quantize(source, recipe, tokens[:1], tmp_path / "own")
    exported = cqhf.export(tmp_path / "own", tmp_path / "exported", "compressed-tensors")
    loaded = check_equal(tmp_path / "own", exported, tokens)
    assert loaded.dtype is torch.float32
    if rounding:
        rows = [row for row in rows_of(tmp_path / "own")[1] if ".experts." in row["name"]]
        assert {0, 1} <= {row["tokens"] for row in rows}


def test_an_expert_is_read_a_few_times_whatever_the_windows(tokens, tmp_path, monkeypatch):
    at_once(monkeypatch, 1)
    source, read = write(tmp_path / "float", "mixtral"), []
    expert = FileWeights.expert

    def note(self, key, index):
        read.append((key, index))
        return expert(self, key, index)

    monkeypatch.setattr(FileWeights, "expert", note)
    counts = {}
    for fields in ({}, {"rounding": "qronos", "reference": "model"}):
        rounding = fields.get("rounding", "nearest")
        cqhf.quantize(source, Recipe(block_size=16, **fields), tokens, tmp_path / rounding)
        counts[rounding] = max(read.count(key) for key in set(read))
        read.clear()
    # Two look at the first ones when a block is opened, for calibration and for rounding; then
    # calibration, verification before and after, and rounding; with it the float block's own pass.
    assert counts == {"nearest": 6, "qronos": 7}


@pytest.mark.parametrize("left", [1, 5])
def test_a_run_that_dies_inside_a_block_leaves_nothing_of_it(left, tokens, tmp_path, monkeypatch):
    source, recipe = write(tmp_path / "float", "mixtral"), Recipe(block_size=16, rounding="gptq")
    at_once(monkeypatch, 1)
    cqhf.quantize(source, recipe, tokens, tmp_path / "whole")
    keep, kept = RunDirectory.keep, []

    def die(self, step, tensors):
        keep(self, step, tensors)
        kept.append(step)
        if len(kept) == left:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "keep", die)
        with pytest.raises(KeyboardInterrupt):
            cqhf.quantize(source, recipe, tokens, tmp_path / "out")
    step = f"block-{0 if left == 1 else 1:05d}"
    run = run_directory(tmp_path / "out")
    assert list(run.glob(f"{step}.*.safetensors"))
    # Other groups of experts than those that are left there.
    at_once(monkeypatch, 3)
    events = []
    cqhf.quantize(source, recipe, tokens, tmp_path / "out", resume=True, events=events.append)
    assert events[0]["step"] == step
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_lost_piece_of_a_block_costs_its_step(tokens, tmp_path, monkeypatch):
    source, recipe = write(tmp_path / "float", "mixtral"), Recipe(block_size=16)
    at_once(monkeypatch, 1)
    cqhf.quantize(source, recipe, tokens, tmp_path / "whole")

    def stop(event):
        if event["step"] == "block-00000":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cqhf.quantize(source, recipe, tokens, tmp_path / "out", events=stop)
    piece = run_directory(tmp_path / "out") / "block-00000.00002.safetensors"
    piece.write_bytes(piece.read_bytes()[:-3])
    events = []
    cqhf.quantize(source, recipe, tokens, tmp_path / "out", resume=True, events=events.append)
    assert [e["step"] for e in events] == ["block-00000", "block-00001", "exit"]
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_number_that_is_none_is_named(tokens, tmp_path):
    model = cqhf.tiny_model("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[3, 2, 5] = np.inf
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(
        cq.NonFiniteError, match=r"layers\.1\.mlp\.experts\.3\.down_proj\.weight.*\(2, 5\)"
    ):
        cqhf.quantize(tmp_path / "float", Recipe(block_size=16), tokens)


def test_an_expert_that_stays_as_it_was_is_noticed(tokens, tmp_path, monkeypatch):
    source = write(tmp_path / "float", "mixtral")
    transform = expert_transforms.transform_module

    def forget(module, matrix, norm, choices):
        if matrix.name != "model.layers.0.mlp.experts.2.up_proj":
            transform(module, matrix, norm, choices)

    monkeypatch.setattr(expert_transforms, "transform_module", forget)
    words = r"1 of 12 matrices .* did not change, the first is .*\.0\..*experts\.2\.up_proj"
    with pytest.raises(cq.VerificationError, match=words):
        cqhf.quantize(source, Recipe(block_size=16), tokens)
    model = cqhf.tiny_model("mixtral")
    model.model.layers[0].mlp.experts.down_proj.data[2] = 0
    model.save_pretrained(tmp_path / "zeros")
    monkeypatch.undo()
    # One of zeros is given back by its transform.
    assert cqhf.quantize(tmp_path / "zeros", Recipe(block_size=16), tokens).verification


def test_a_wrong_wire_in_an_expert_is_noticed(tokens, tmp_path, monkeypatch):
    source = write(tmp_path / "float", "mixtral")
    transform = expert_transforms.transform_module

    def swap(module, matrix, norm, choices):
        transform(module, matrix, norm, choices)
        module.weight.data = module.weight.data.flip(0)

    monkeypatch.setattr(expert_transforms, "transform_module", swap)
    with pytest.raises(cq.VerificationError, match="differs from the float model from .*block 0"):
        cqhf.quantize(source, Recipe(block_size=16), tokens)


def test_the_plan_says_how_many_are_open(tmp_path):
    sizes = {"num_local_experts": 64, "num_experts": 64, "intermediate_size": 256}
    source = write(tmp_path / "float", "mixtral", **sizes)

    def planned(**fields):
        return cqhf.plan(source, Recipe(block_size=16, **fields))

    plan = planned()
    # Query, output, key and value, and the router, beside three matrices of each expert.
    rest, each = 48 * (2 * 64 + 2 * 32 + 64), 3 * 48 * 256
    assert plan.experts_at_once(0) == max(1, rest // each) == 1
    assert planned(sign_trials=2).experts_at_once(0) == 0
    online = {"rotation": "online", "permutation": "massdiff"}
    assert planned(**online).experts_at_once(0) == 0
    assert cqhf.plan(cqhf.tiny_model("llama"), Recipe(block_size=16)).experts_at_once(0) == 0
    more = write(tmp_path / "more", "mixtral", **{**sizes, "num_local_experts": 128})
    wider = cqhf.plan(more, Recipe(block_size=16))
    assert wider.peak_bytes() < 1.01 * plan.peak_bytes()


MEASURE = """
import re, resource, sys
import numpy as np, corequant_transformers as cqhf
from corequant.recipe import Recipe

def of_process(name):
    found = re.search(rf"^{name}:\\s+(\\d+) kB", open("/proc/self/status").read(), re.M)
    return int(found[1]) * 1024

tiny, model, output, rounding, allowed = sys.argv[1:]
recipe, tokens = Recipe(block_size=32, rounding=rounding), np.arange(128).reshape(2, 64)
# What it costs to import everything, and to compile or load the code that is needed.
cqhf.quantize(tiny, recipe, tokens, f"{output}-tiny")
planned = cqhf.plan(model, recipe).peak_bytes() - cqhf.plan(tiny, recipe).peak_bytes()
open("/proc/self/clear_refs", "w").write("5")
before = of_process("VmRSS")
limit = of_process("VmData") + int(allowed)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
cqhf.quantize(model, recipe, tokens, output, memory=limit)
print(of_process("VmHWM") - before, planned)
"""


@capabilities.procfs
@capabilities.limits
@pytest.mark.parametrize(("kind", "rounding"), [("mixtral", "nearest")])
def test_a_model_is_quantized_in_a_third_of_its_file(kind, rounding, tmp_path):
    """Beyond the private memory of a process that has quantized a model with four experts.

    ``bench/bench_experts.py`` does so with larger models, and with rounding that looks at data.
    """
    sizes = {"num_hidden_layers": 3, "num_local_experts": 64, "num_experts": 64}
    wide = {"hidden_size": 128, "intermediate_size": 384, "moe_intermediate_size": 384}
    write(tmp_path / "tiny", kind, num_hidden_layers=1, **wide)
    write(tmp_path / "float", kind, **{**wide, **sizes})
    file = (tmp_path / "float" / "model.safetensors").stat().st_size
    assert file > 3 * 64 * 3 * 128 * 384 * 4
    folders = [tmp_path / name for name in ("tiny", "float", "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders), rounding, str(file // 3)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[0])
    assert peak < file / 3
    assert cqhf.load(tmp_path / "out").config.num_hidden_layers == 3
