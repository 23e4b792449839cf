"""Widths that a budget chooses: within it, for the better, and by rules like any others."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_cli.app import app
from corequant_transformers.run.directory import RunDirectory
from tests.models.test_gguf_files import VOCABULARY, tokenizer_of
from tests.models.test_streaming import digest, write

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
PLAIN = {"weights": "int4:group16:float16", "activations": "none"}
STEPS = ["measure-00001", "gradient-00001", "allocate"]


def budget(bits=3.5, **fields):
    return Recipe(**{**PLAIN, "bits": bits, **fields})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("float") / "model", **SIZES)


@pytest.fixture(scope="module")
def whole(source, tokens, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "own"
    result = cqhf.quantize(source, budget(), tokens, output)
    return output, result


def widths_of(result):
    return {row["name"]: row["weights"] for row in result.report["widths"]["layers"]}


def bits_of(folder, names):
    """Return the bits that layers take in a file."""
    with open(folder / "corequant.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    ranges = [e["data_offsets"] for name, e in header.items() if name.startswith(tuple(names))]
    return 8 * sum(last - first for first, last in ranges)


def test_bits_are_those_of_the_file(whole):
    output, result = whole
    found, layers = result.report["widths"], result.plan.quantized
    weights = sum(m.shape[0] * m.shape[1] for m in layers)
    assert found["bits"] == bits_of(output, [f"{m.name}." for m in layers]) / weights
    assert found["asked"] == 3.5
    # The next step of any layer would not fit.
    steps = []
    for row, matrix in zip(found["layers"], layers, strict=True):
        at = found["candidates"].index(row["weights"])
        if at + 1 < len(found["candidates"]) and row["losses"][at + 1] < row["losses"][at]:
            formats = [cq.QuantSpec.parse(found["candidates"][k]).format.bits for k in (at, at + 1)]
            steps.append((formats[1] - formats[0]) * matrix.shape[0] * matrix.shape[1] / weights)
    assert 0 <= 3.5 - found["bits"] < min(steps)
    assert found["gap"] == 0
    assert len({row["weights"] for row in found["layers"]}) > 1


def test_chosen_widths_are_rules_like_any_others(whole, source, tokens, tmp_path):
    output, result = whole
    recipe = Recipe.from_toml((output / "recipe.toml").read_text())
    assert recipe == result.plan.recipe
    assert recipe.bits is None
    assert {m.name: str(m.weights) for m in result.plan.quantized} == widths_of(result)
    loaded = {m.name: str(m.weights) for m in cqhf.plan(source, recipe).quantized}
    assert loaded == widths_of(result)
    # What a directory's recipe says, makes the directory.
    cqhf.quantize(source, recipe, tokens, tmp_path / "again")
    assert digest(tmp_path / "again") == digest(output)
    model = cqhf.load(output)
    for name, text in widths_of(result).items():
        assert str(model.get_submodule(name).quantized.spec) == text


def stopped_after(step, source, tokens, output, monkeypatch):
    """Run until a step is done."""

    def stopping(self, name, *rest):
        commit(self, name, *rest)
        if name == step:
            raise KeyboardInterrupt

    commit = RunDirectory.commit
    with monkeypatch.context() as context:
        context.setattr(RunDirectory, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            cqhf.quantize(source, budget(), tokens, output)


@pytest.mark.parametrize("step", STEPS)
def test_a_run_that_is_stopped_chooses_the_same(step, whole, source, tokens, tmp_path, monkeypatch):
    stopped_after(step, source, tokens, tmp_path / "out", monkeypatch)
    steps = []
    options = {"resume": True, "events": lambda event: steps.append(event["step"])}
    result = cqhf.quantize(source, budget(), tokens, tmp_path / "out", **options)
    assert step not in steps
    assert steps[-1] == "exit"
    assert digest(tmp_path / "out") == digest(whole[0])
    assert result.report["widths"] == whole[1].report["widths"]


def test_another_budget_is_another_run(source, tokens, tmp_path, monkeypatch):
    stopped_after("calibrate-00000", source, tokens, tmp_path / "out", monkeypatch)
    with pytest.raises(cq.RunError, match=r"recipe.bits must be as when the run was begun, 3.5"):
        cqhf.quantize(source, budget(4), tokens, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("sensitivity", "rounding"),
    [("kl", "nearest"), ("kl", "gptq"), ("output", "gptq"), ("weights", "nearest")],
)
def test_widths_lose_less_than_one_for_all(sensitivity, rounding, tokens):
    model = cqhf.tiny_model("llama", **SIZES)
    uniform = Recipe(**PLAIN, rounding=rounding)
    one = cqhf.plan(model, uniform).cost()["quantized_mib"]
    count = sum(m.shape[0] * m.shape[1] for m in cqhf.plan(model, uniform).quantized)
    # Each layer has 16 bytes of its own beside codes and scales.
    bits = (8 * (one * 2**20 + 16 * 14)) / count
    recipe = budget(bits, sensitivity=sensitivity, rounding=rounding)
    found = cqhf.quantize(model, recipe, tokens).report["widths"]
    four = found["candidates"].index("int4:group16:symmetric:mse:float16")
    assert found["bits"] <= bits
    one_for_all = sum(row["losses"][four] for row in found["layers"])
    assert found["loss"] <= one_for_all * (1 + 1e-9)
    # Random weights are all alike.
    assert sensitivity == "weights" or found["loss"] < 0.97 * one_for_all
    for row in found["layers"]:
        assert all(a > b for a, b in zip(row["losses"], row["losses"][1:], strict=False)), row


def test_more_bits_lose_less(tokens):
    model = cqhf.tiny_model("llama", **SIZES)
    found = [cqhf.quantize(model, budget(bits), tokens).report["widths"] for bits in (3.2, 9.5)]
    losses = [each["loss"] for each in found]
    assert losses == sorted(losses, reverse=True)
    assert all(each["bits"] <= each["asked"] for each in found)
    # More than all of the widest is not to be had.
    assert {row["weights"] for row in found[-1]["layers"]} == {"int8:group16:symmetric:mse:float16"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_expected_divergence_is_what_a_layer_alone_causes(kind):
    tokens = np.random.default_rng(1).integers(0, 128, (8, 64))
    model = cqhf.tiny_model(kind)
    recipe = budget(7.1, dtype="float32", candidates=["int6:group16"], rounding="nearest")
    result = cqhf.quantize(model, recipe, tokens)
    expected = {row["name"]: row["losses"][0] for row in result.report["widths"]["layers"]}
    measured = {row.name: row.kl for row in cqhf.layer_errors(result, model, tokens).layers}
    ratios = [expected[name] / measured[name] for name in expected]
    assert 0.5 < min(ratios)
    assert max(ratios) < 2
    names = list(expected)
    ranks = [np.argsort(np.argsort([table[n] for n in names])) for table in (expected, measured)]
    assert np.corrcoef(ranks)[0, 1] > 0.8


def test_rules_and_kept_layers_are_respected(tokens):
    model = cqhf.tiny_model("llama", **SIZES)
    recipe = budget(
        4.5, layers=["v_proj=int8:group16", "o_proj=rounding=gptq"], keep=["model.layers.1"]
    )
    result = cqhf.quantize(model, recipe, tokens)
    given = {m.name: str(m.weights) for m in result.plan.quantized}
    assert not any(name.startswith("model.layers.1.") for name in given)
    assert {text for name, text in given.items() if "v_proj" in name} == {
        "int8:group16:symmetric:mse:float16"
    }
    assert not any("v_proj" in name for name in widths_of(result))
    assert {m.options.method for m in result.plan.quantized if "o_proj" in m.name} == {"gptq"}
    bits = result.report["widths"]["bits"]
    assert 4 < bits <= 4.5
    with pytest.raises(cq.RecipeError, match="require a layer without a rule for its weights"):
        cqhf.plan(model, budget(layers=["re:.*=int4:channel"]))


def test_experts_of_a_block_get_one_width(tokens):
    model = cqhf.tiny_model("mixtral")
    result = cqhf.quantize(model, budget(4), tokens)
    given = {m.name: str(m.weights) for m in result.plan.quantized}
    assert given == widths_of(result)
    for block in range(2):
        for part in ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"):
            own = {t for n, t in given.items() if f"layers.{block}." in n and f".{part}" in n}
            assert len(own) <= 1
    one = result.plan.quantized[-1].name
    with pytest.raises(cq.RecipeError, match="must apply to all layers that get the same width"):
        cqhf.plan(model, budget(4, layers=[f"{one}=int8:group16"]))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("bert", {"sensitivity": "output"}),
        ("t5", {"sensitivity": "output"}),
        ("gemma2", {}),
        ("llama", {"rotation": "online", "block_size": 16}),
        ("opt", {"block_size": "auto", "sensitivity": "weights"}),
    ],
)
def test_other_architectures_and_rotations(kind, fields, tokens):
    model = cqhf.tiny_model(kind)
    result = cqhf.quantize(model, budget(4.5, **fields), tokens)
    found = result.report["widths"]
    assert 4 < found["bits"] <= 4.5
    assert {m.name: str(m.weights) for m in result.plan.quantized} == widths_of(result)
    assert len({row["weights"] for row in found["layers"]}) > 1


def test_no_probabilities_no_divergence():
    with pytest.raises(cq.RecipeError, match="sensitivity must be output or weights for 'bert'"):
        cqhf.plan(cqhf.tiny_model("bert"), budget())


def test_budgets_out_of_reach():
    model = cqhf.tiny_model("llama", **SIZES)
    with pytest.raises(cq.BudgetError, match=r"bits must be at least 3\.0\d+, .* more than 9\.\d+"):
        cqhf.plan(model, budget(2.9))
    with pytest.raises(cq.BudgetError, match=r"size must be at least \d+ bytes, .* \d+ gains"):
        cqhf.plan(model, Recipe(**PLAIN, size="10kB"))
    with pytest.raises(cq.RecipeError, match="groups must divide the 64 inputs of model"):
        cqhf.plan(model, budget(candidates=["int4:group24"]))
    with pytest.raises(cq.RecipeError, match="candidates must be weights that vllm can load"):
        cqhf.plan(model, budget(candidates=["int3:group16", "int5:group16"]), reader="vllm")
    with pytest.raises(cq.RecipeError, match="candidates must be named for weights of nf4"):
        cqhf.plan(model, budget(weights="nf4:group16"))


def test_a_plan_shows_widths_within_the_budget(source):
    table = cqhf.plan(source, budget())
    assert table.recipe.bits == 3.5
    assert len({m.weights for m in table.quantized}) > 1
    assert any("within 3.5 bits per weight on average" in note for note in table.notes)
    count = sum(m.shape[0] * m.shape[1] for m in table.quantized)
    assert 3.2 < 8 * 2**20 * table.cost()["quantized_mib"] / count <= 3.5


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaking") / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY}
    cqhf.tiny_model("llama", **sizes).save_pretrained(folder)
    tokenizer_of("gpt-2").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("reader", "recipe", "shares"),
    [
        ("corequant", {**PLAIN, "weights": "int4:group16:asymmetric:bfloat16"}, (0.4,)),
        ("vllm", {**PLAIN, "rotation": "offline", "weights": "int4:group32:bfloat16"}, (0.3,)),
        ("llama.cpp", {"rotation": "heads", "weights": "int4:group32:float16",
                       "activations": "int8:group32"}, (0.3,)),
    ],
)  # fmt: skip
def test_sizes_are_not_exceeded(reader, recipe, shares, speaking, tmp_path):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY - 8, (2, 48))
    name = "model.safetensors" if reader in ("transformers", "vllm") else "corequant.safetensors"
    text = Recipe(**recipe, size=1)
    with pytest.raises(cq.BudgetError) as refused:
        cqhf.plan(speaking, text, reader=reader)
    least, most = (int(word) for word in str(refused.value).replace(",", "").split() if
                   word.isdigit() and int(word) > 1)  # fmt: skip
    for share in shares:
        size = int(least + share * (most - least))
        output = tmp_path / f"{share}.gguf" if reader == "llama.cpp" else tmp_path / str(share)
        result = cqhf.quantize(speaking, Recipe(**recipe, size=size), tokens, output, reader=reader)
        written = output if output.is_file() else output / name
        # What is left over is less than a step of the smallest layer, and the slack.
        assert size - 12000 < written.stat().st_size <= size
        by_name = widths_of(result)
        if reader == "vllm":
            assert {cq.QuantSpec.parse(text).format.bits for text in by_name.values()} == {4, 8}
            for block in range(2):
                for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
                    own = {t for n, t in by_name.items() if f"layers.{block}." in n and
                           n.endswith(names)}  # fmt: skip
                    assert len(own) == 1
        shutil.rmtree(output, ignore_errors=True)


def test_the_command(source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 400)
    options = ["--calibration", str(text), "--samples", "2", "--sequence-length", "32"]
    options += ["--weights", "int4:group16", "--rounding", "nearest", "--bits", "4.5"]
    run = CliRunner()
    done = run.invoke(app, ["quantize", str(source), "-o", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    assert "bits per weight with scales, of 4.5" in done.output
    assert "nats per token" in " ".join(done.output.split())
    options = [*options[:-2], "--size", "110kB", "--candidates", "int4:group16", "--candidates",
               "int8:group16", "--sensitivity", "output", "--json"]  # fmt: skip
    done = run.invoke(app, ["plan", str(source), *options])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["sizes"]["corequant"] <= 110_000
    assert {m["weights"] for m in shown["matrices"] if m["quantized"]} <= {
        "int4:group16:symmetric:mse", "int8:group16:symmetric:mse"
    }  # fmt: skip
    done = run.invoke(app, ["plan", str(source), "--bits", "1"])
    assert done.exit_code != 0
