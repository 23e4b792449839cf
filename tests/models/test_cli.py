"""The command, as a person or a script would use it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

import pytest

import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_cli import app
from tests import capabilities
from tests.models.test_checkpoint import word_level
from tests.models.test_gguf_files import write_model

ROOT = Path(__file__).parents[2]
COMMAND = shutil.which("corequant", path=Path(sys.executable).parent)
TEXT = "a b c d e f g h i j k l m n o p " * 40


def run(*arguments, cwd=None, check=True):
    done = subprocess.run(
        [COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    cqhf.tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(path / "model")
    word_level(path / "model")
    (path / "text.txt").write_text(TEXT)
    return path


SMALL = ("--samples", "2", "--sequence-length", "64", "--block-size", "16")


@pytest.fixture
def run_here(monkeypatch, capfd):
    """``run`` in this process, which has imported everything."""

    def run_here(*arguments, cwd=None, check=True):
        monkeypatch.chdir(cwd or Path.cwd())
        monkeypatch.setattr(sys, "argv", ["corequant", *map(str, arguments)])
        status, shown = app.run(), capfd.readouterr()
        assert not (check and status), shown.err
        return subprocess.CompletedProcess(sys.argv, status, shown.out, shown.err)

    return run_here


def test_plan_json(folder, run_here):
    plan = json.loads(run_here("plan", "model", "--block-size", "16", "--json", cwd=folder).stdout)
    down = next(m for m in plan["matrices"] if m["name"].endswith("0.mlp.down_proj"))
    assert down["online"]
    assert down["input_rotation"] == 16
    assert plan["online_rotations"] == 2
    table = run_here("plan", "model", "--block-size", "16", cwd=folder).stdout
    assert "valid block sizes for" in table


def test_plan_of_layers_that_differ(folder, run_here):
    rules = ("--layer", "re:.*down_proj=int8:channel,rounding=gptq", "--layer", "layers.1=keep")
    given = (*rules, "--keep", "lm_head", "--keep", "layers.0.self_attn", *SMALL)
    plan = json.loads(run_here("plan", "model", *given, "--json", cwd=folder).stdout)
    found = {m["name"]: (m["weights"], m["rounding"]) for m in plan["matrices"] if m["quantized"]}
    default = Recipe.from_dict({**plan["recipe"], "layers": [], "keep": []})
    other = ("int6:group64:symmetric:mse:bfloat16", default.rounding)
    assert found == {
        "model.layers.0.mlp.gate_proj": other,
        "model.layers.0.mlp.up_proj": other,
        "model.layers.0.mlp.down_proj": ("int8:channel:symmetric:mse:bfloat16", "gptq"),
    }
    recipe = Recipe.from_dict(plan["recipe"])
    assert [str(rule) for rule in recipe.layers][-2:] == [
        "re:.*down_proj=int8:channel:symmetric:mse:bfloat16,rounding=gptq",
        "layers.1=keep",
    ]
    assert recipe.keep == ("lm_head", "layers.0.self_attn")
    table = run_here("plan", "model", *given, cwd=folder).stdout
    assert re.search(r"block 0 .*down_proj .* int8 .*block 1 .*after the blocks", table, re.S)
    assert "2 × weights int6" in table
    assert "1 × weights int8:channel:symmetric:mse" in table
    wrong = run_here("plan", "model", "--keep", "head", cwd=folder, check=False)
    assert wrong.returncode == 1
    assert "keep must name layers, got 'head'" in wrong.stderr


def test_plan_of_an_online_model(folder, run_here):
    online = ("--rotation", "online", "--block-size", "16")
    plan = json.loads(run_here("plan", "model", *online, "--json", cwd=folder).stdout)
    assert plan["online_rotations"] == 14
    query = next(m for m in plan["matrices"] if m["name"].endswith("0.self_attn.q_proj"))
    assert query["online"]
    assert query["input_permuted"]
    assert query["norm"] is None
    assert "all rotated widths" in run_here("plan", "model", *online, cwd=folder).stdout
    heads = run_here("plan", "model", "--head-block-size", "8", "--json", cwd=folder).stdout
    output = next(
        m for m in json.loads(heads)["matrices"] if m["name"].endswith("0.self_attn.o_proj")
    )
    assert output["input_rotation"] == 8
    assert output["input_permuted"]


def test_quantize_with_rounding_options(folder, tmp_path, run_here):
    out = tmp_path / "out"
    options = ("--rounding", "gptq", "--damping", "0.05", "--no-act-order", "--correction", "0.25")
    more = ("--reference", "model", "--magr", "0.001", "--accumulator", "16x16")
    more += ("--weights", "int4:channel", "--activations", "int4:token:asymmetric")
    arguments = ("quantize", "model", "-o", out, "--calibration", "text.txt", *SMALL)
    done = run_here(*arguments, *options, *more, "--json", cwd=folder)
    report = json.loads(done.stdout)
    wanted = {
        "rounding": "gptq", "damping": 0.05, "act_order": False, "correction": 0.25,
        "reference": "model", "magr": 0.001, "accumulator": "16x16",
    }  # fmt: skip
    assert {k: report["recipe"][k] for k in wanted} == wanted
    assert {row["method"] for row in report["matrices"]} == {"gptaq"}
    shown = run_here("inspect", out).stdout
    assert "gptaq" in shown


def test_quantize_evaluate_inspect(folder, tmp_path):
    out = tmp_path / "out"
    done = run(
        "quantize", "model", "-o", out, "--calibration", "text.txt", *SMALL, "--json", cwd=folder
    )
    report = json.loads(done.stdout)
    assert report["verification"]["logits_error"] < 1e-9
    expected = Recipe.preset(
        "w4a16", block_size=16, samples=2, sequence_length=64, dtype="bfloat16"
    )
    assert Recipe.from_dict(report["recipe"]) == expected
    evaluation = json.loads(
        run(
            "evaluate", out, "--text", "text.txt", "--sequence-length", "64", "--windows", "3",
            "--json", cwd=folder,
        ).stdout
    )  # fmt: skip
    assert evaluation["predicted"] == 3 * 63
    expected = cqhf.evaluate(
        cqhf.load(out), TEXT, cqhf.load_tokenizer(out), windows=3, sequence_length=64
    )
    assert evaluation["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert "before and after permuting" in run("inspect", out).stdout
    assert json.loads(run("inspect", out, "--json").stdout)["files"]["corequant.safetensors"] > 0


def test_float_models_are_evaluated_too(folder):
    done = run(
        "evaluate", "model", "--text", "text.txt", "--sequence-length", "64", "--json", cwd=folder
    )
    assert json.loads(done.stdout)["windows"] == 10


def test_a_recipe_file(folder, tmp_path):
    recipe = Recipe(block_size=32, permutation="zigzag", samples=1, sequence_length=32)
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    done = run(
        "quantize", "model", "-o", tmp_path / "out", "--calibration", "text.txt",
        "--recipe", tmp_path / "r.toml", "--json", cwd=folder,
    )  # fmt: skip
    assert Recipe.from_dict(json.loads(done.stdout)["recipe"]) == replace(recipe, dtype="bfloat16")


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_every_field_of_a_recipe_is_an_option_with_a_help_text(command, columns):
    environment = {**os.environ, "COLUMNS": str(columns)}
    done = subprocess.run(
        [COMMAND, command, "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert max(map(len, done.stdout.splitlines())) <= columns
    words = " ".join(done.stdout.split())
    for field in fields(Recipe):
        name = {"layers": "layer"}.get(field.name, field.name.replace("_", "-"))
        assert re.search(rf" --{name} (/ --no-{name}|[<\[]\S+) [A-Z][a-z]+ ", words), name
    assert "``" not in words
    assert "online) or none (offline, heads)." in words


def test_without_a_command_the_help_is_shown():
    done = run()
    assert done.stdout == run("--help").stdout
    assert done.stderr == ""


def test_version():
    assert run("--version").stdout == f"corequant {version('corequant')}\n"


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "corequant", "backends", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == run("backends", "--json").stdout


def test_backends():
    rows = json.loads(run("backends", "--json").stdout)
    assert set(rows) == {"numpy", "torch"}
    assert "numpy" in run("backends").stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["plan", "nowhere"], 1, "must be a directory with config.json or a .gguf file"),
        (["plan", "model", "--block-size", "7"], 1, "block_size must divide d=128, got 7"),
        (["plan", "model", "--permutation", "x"], 1, "permutation must be one of"),
        (["plan", "model", "--weights", "int4:chanel"], 1, "did you mean 'channel'"),
        (["plan"], 2, "Missing argument"),
        (["plan", "model", "--nonsense"], 2, "No such option"),
        (["plan"], 2, "'model'. See 'corequant plan --help'.\n"),
        (["verify"], 2, "No such command 'verify'. See 'corequant --help'.\n"),
        (["plans"], 2, "Did you mean 'plan'? See 'corequant --help'.\n"),
        (["plan", "model", "--samples", "0"], 1, "samples must be at least 1, got 0"),
        (["quantize", "model", "-o", "out", "--calibration", "none.txt"], 1, "readable UTF-8"),
        (["quantize", "model", "-o", "out", "--calibration", "text.txt"], 1, "must fill"),
        (["quantize", "model", "-o", "model", "--calibration", "text.txt"], 1, "new or empty"),
        (["quantize", "model", "-o", "a/b", "--calibration", "text.txt"], 1, "parent folder"),
        (["evaluate", "model", "--text", "empty.txt"], 1, "must not be empty"),
        (["evaluate", "model", "--text", "text.txt", "--device", "cuda:9"], 1, "got cuda:9"),
        (
            ["quantize", "model", "-o", "out", "--calibration", "text.txt", "--device", "gpu"],
            1,
            "device must be one",
        ),
        (["inspect", "nowhere"], 1, "must be a directory"),
    ],
)
def test_errors_are_one_line(folder, run_here, arguments, status, words):
    (folder / "empty.txt").write_text("")
    done = run_here(*arguments, cwd=folder, check=False)
    assert done.returncode == status
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr
    assert not (folder / "out").exists()


def test_an_error_ends_the_process_with_its_status(folder):
    done = run("plan", "model", "--block-size", "7", cwd=folder, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "block_size must divide d=128, got 7" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@capabilities.forks
def test_interrupt(folder, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 200)
    log = tmp_path / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [COMMAND, "quantize", "model", "-o", tmp_path / "out", "--calibration", long,
             "--samples", "900", "--sequence-length", "128", "--block-size", "16"],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=errors,
            # Bars are drawn live on terminals only.
            env={**os.environ, "FORCE_COLOR": "1"},
            # Where the tests run in the background, the child would inherit that it is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        until = time.monotonic() + 120
        while b"calibrate" not in log.read_bytes() and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in log.read_text()
    assert not (tmp_path / "out").exists()
    assert {p.name for p in tmp_path.iterdir()} <= {"log", "long.txt", "out.run"}


def test_dry_run_lists_every_tensor(folder, tmp_path, run_here):
    arguments = ("quantize", "model", "-o", tmp_path / "out", "--calibration", "none.txt")
    done = run_here(*arguments, *SMALL, "--dry-run", "--json", cwd=folder)
    names = {row["name"] for row in json.loads(done.stdout)["tensors"]}
    assert names == set(cqhf.tiny_model("llama").state_dict())
    assert list(tmp_path.iterdir()) == []
    table = run_here(*arguments, *SMALL, "--dry-run", cwd=folder).stdout
    assert "norm folded" in table


@capabilities.limits
def test_memory_is_limited(folder, tmp_path):
    arguments = ("quantize", "model", "-o", tmp_path / "out", "--calibration", "text.txt", *SMALL)
    done = run(*arguments, "--memory", "100MiB", cwd=folder, check=False)
    assert done.returncode == 1
    assert "memory must be at least" in done.stderr
    done = run(*arguments, "--memory", "lots", cwd=folder, check=False)
    assert "memory must be a size such as" in done.stderr
    run(*arguments, "--memory", "3GiB", "--resume", cwd=folder)
    assert (tmp_path / "out" / "corequant.safetensors").is_file()


def readme_commands():
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line for line in lines if line.startswith("corequant ")]


QUICK = {
    "quantize": ("--rounding", "nearest", "--samples", "2", "--sequence-length", "256"),
    "evaluate": ("--windows", "2", "--sequence-length", "256"),
    "inspect": ("--windows", "2", "--sequence-length", "256"),
}
"""What makes the README's commands quick."""


@pytest.fixture
def gguf_model(request, tmp_path):
    """A small GGUF file; with ``--whole-model`` that of the README."""
    if request.config.getoption("--whole-model"):
        return request.getfixturevalue("smollm2_path")
    recipe = Recipe.preset("gguf-q8_0", rounding="nearest", samples=1, sequence_length=64)
    source = write_model(tmp_path / "source", split="smollm")
    cqhf.quantize(source, recipe, TEXT, tmp_path / "small.gguf", reader="llama.cpp")
    return tmp_path / "small.gguf"


@capabilities.links
def test_the_readmes_commands(gguf_model, tmp_path):
    from pydoc_data.topics import topics

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(gguf_model)
    (tmp_path / "there" / "test.txt").write_text("\n".join(topics[n] for n in sorted(topics)[-20:]))
    commands = [shlex.split(line)[1:] for line in readme_commands()]
    assert [c[0] for c in commands] == ["quantize", "quantize", "evaluate", "plan", "inspect"]
    for command in commands:
        done = run(*command, *QUICK.get(command[0], ()), cwd=tmp_path / "there")
        assert done.stdout
    assert (tmp_path / "there" / "smollm2-w4a16" / "corequant.safetensors").is_file()
    assert (tmp_path / "there" / "smollm2.gguf").is_file()


def test_a_recipe_file_goes_without_options(folder, tmp_path):
    (tmp_path / "r.toml").write_text(Recipe(block_size=16).to_toml())
    done = run(
        "plan", "model", "--recipe", tmp_path / "r.toml", "--weights", "int8", "--block-size", "8",
        cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--recipe cannot be combined with --block-size, --weights" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("evaluate", "model", "--text", "text.txt", "--windows", "0"),
        ("evaluate", "model", "--text", "text.txt", "--sequence-length", "1"),
        ("inspect", "model", "--windows", "0"),
        ("plan", "model", "--block-size", "abc"),
    ],
)
def test_numbers_out_of_range_are_one_line(folder, run_here, options):
    done = run_here(*options, cwd=folder, check=False)
    assert done.returncode in (1, 2)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert options[-2].lstrip("-").replace("-", "_") in done.stderr.replace("-", "_")
