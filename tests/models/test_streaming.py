"""Runs that are kept on the disk: the same bytes as in memory, whatever happens on the way."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from safetensors.torch import load_file

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.run.directory import RunDirectory
from corequant_transformers.run.output import run_directory
from tests import capabilities
from tests.models.test_checkpoint import word_level

RECIPE = Recipe(block_size=16)


def digest(folder):
    """Hash all files that a run may not change, its report and log being about the run itself."""
    files = [str(f.relative_to(folder)) for f in folder.rglob("*") if not f.is_dir()]
    names = sorted(name for name in files if name not in ("report.json", "log.jsonl"))
    found = hashlib.sha256()
    for name in names:
        found.update(name.encode() + (folder / name).read_bytes())
    return found.hexdigest()


def write(folder, kind="llama", **config):
    cqhf.tiny_model(kind, **config).save_pretrained(folder)
    word_level(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("float") / "model")


@pytest.fixture(scope="module")
def whole(source, tokens, tmp_path_factory):
    """The hash of a run that nothing happens to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    cqhf.quantize(source, RECIPE, tokens, output)
    return digest(output)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen3", {"block_size": "auto", "permutation": "auto"}),
        ("llama", {"rotation": "online", "permutation": "energydiff"}),
        ("qwen2", {"rounding": "qronos", "sign_trials": 2}),
        ("gpt2", {}),
        ("mixtral", {"rounding": "gptq"}),
    ],
)
def test_a_model_on_disk_equals_the_one_in_memory(kind, fields, tokens, tmp_path):
    recipe = Recipe(**{"block_size": 16, **fields})
    folder = write(tmp_path / "float", kind)
    memory = cqhf.quantize(cqhf.tiny_model(kind), recipe, tokens, tmp_path / "memory")
    disk = cqhf.quantize(folder, recipe, tokens, tmp_path / "disk")
    for name in ("corequant.safetensors", "recipe.toml"):
        wanted = (tmp_path / "memory" / name).read_bytes()
        assert (tmp_path / "disk" / name).read_bytes() == wanted, name
    for field in ("recipe", "verification", "signs", "regions"):
        assert disk.report[field] == memory.report[field]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "float", "memory"]


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {}])
def test_shards_and_half_precision_are_read(config, tokens, tmp_path):
    model = cqhf.tiny_model("llama", **config).bfloat16()
    model.save_pretrained(tmp_path / "float", max_shard_size="20KB")
    assert len(list((tmp_path / "float").glob("*.safetensors"))) > 2
    word_level(tmp_path / "float")
    loaded = cqhf.Source(tmp_path / "float").load()
    cqhf.quantize(loaded, RECIPE, tokens, tmp_path / "memory")
    cqhf.quantize(tmp_path / "float", RECIPE, tokens, tmp_path / "disk")
    found = [(tmp_path / k / "corequant.safetensors").read_bytes() for k in ("memory", "disk")]
    assert found[0] == found[1]


@pytest.mark.real_model
def test_real_weights_on_disk_equal_those_in_memory(smollm2, help_tokens, tmp_path):
    """Three blocks of SmolLM2; ``bench/bench_streaming.py`` takes all."""
    model = copy.deepcopy(smollm2[0])
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers, model.config.layer_types = 3, ["full_attention"] * 3
    model.save_pretrained(tmp_path / "float", max_shard_size="60MB")
    smollm2[1].save_pretrained(tmp_path / "float")
    recipe, tokens = Recipe(block_size=16), help_tokens[:2]
    cqhf.quantize(model, recipe, tokens, tmp_path / "memory")
    cqhf.quantize(tmp_path / "float", recipe, tokens, tmp_path / "disk")
    found = [(tmp_path / k / "corequant.safetensors").read_bytes() for k in ("memory", "disk")]
    assert found[0] == found[1]


def test_workers_elsewhere_give_the_same_bytes(source, tokens, whole, tmp_path):
    """A whole run over dask's workers, two processes with nothing in common but what is sent."""
    from distributed import Client, LocalCluster

    adaptive = Recipe(block_size=16, rounding="qronos")
    cqhf.quantize(source, adaptive, tokens, tmp_path / "alone")
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True}
    used = set()
    with LocalCluster(dashboard_address=None, **options) as cluster, Client(cluster) as client:
        executor = client.get_executor(pure=False)
        for recipe, name in ((RECIPE, "nearest"), (adaptive, "adaptive")):
            cqhf.quantize(source, recipe, tokens, tmp_path / name, executor=executor)
        story = client.run(lambda dask_worker: dask_worker.state.executed_count)
        used = {worker for worker, count in story.items() if count}
    assert digest(tmp_path / "nearest") == whole
    assert digest(tmp_path / "adaptive") == digest(tmp_path / "alone")
    assert len(used) == 2


def test_the_log_tells_the_time_that_remains(source, tokens, tmp_path):
    events = []
    cqhf.quantize(source, RECIPE, tokens, tmp_path / "out", events=events.append)
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert [e["step"] for e in logged] == [e["step"] for e in events]
    assert [e["step"] for e in events[:3]] == ["calibrate-00000", "calibrate-00001", "choose"]
    assert [e["remaining_seconds"] for e in events] == [None] * 5 + [0, 0]
    assert events[-1]["steps_left"] == 0


# ---- runs that are stopped

SERVER = textwrap.dedent(
    """
    import errno, os, resource, signal, sys
    import numpy as np
    import corequant as cq, corequant_transformers as cqhf
    from corequant.recipe import Recipe

    source, output, action = sys.argv[1:4]
    tokens = np.random.default_rng(0).integers(0, 128, (3, 48))
    events, limit, armed = [0], [0], [""]

    def hook(name, args):
        # Everything that a run does to names and files of its own.
        if not armed[0] or name not in ("open", "os.rename", "os.remove", "os.mkdir"):
            return
        if str(args[0]).startswith(output) or "/.out" in str(args[0]):
            writes = name != "open" or args[2] & (os.O_WRONLY | os.O_RDWR)
            if armed[0] == "full" and not (writes and name in ("open", "os.mkdir")):
                return
            events[0] += 1
            if events[0] == limit[0]:
                if armed[0] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                armed[0] = ""
                raise OSError(errno.ENOSPC, "No space left on device")

    sys.addaudithook(hook)

    def child(mode, at, resume):
        process = os.fork()
        if process:
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        armed[0], limit[0] = mode if mode != "size" else "", at
        if mode == "size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
        try:
            cqhf.quantize(source, Recipe(block_size=16), tokens, output, resume=resume)
        except cq.OutputError as error:
            os._exit(7)
        except BaseException as error:
            print("unexpected", repr(error), flush=True)
            os._exit(9)
        if mode == "count":
            print("events", events[0], flush=True)
        os._exit(0)

    for line in sys.stdin:
        mode, at, resume = line.split()
        print(child(mode, int(at), resume == "resume"), flush=True)
    """
)


class Server:
    """Runs quantize in children of a process that has imported everything and started no thread."""

    def __init__(self, source, output):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(source), str(output), "run"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
        )  # fmt: skip

    def __call__(self, mode, at=0, resume=True):
        self.process.stdin.write(f"{mode} {at} {'resume' if resume else 'new'}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self):
        self.process.communicate()


@pytest.fixture
def server(source, tmp_path):
    server = Server(source, tmp_path / "out")
    yield server
    server.close()


def clear(folder):
    for path in folder.iterdir():
        subprocess.run(["rm", "-r", str(path)], check=True)


def check_whole(folder):
    """Read every file that has its final name."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and file.suffix == ".json":
            json.loads(file.read_text())
        if not hidden and file.suffix == ".safetensors":
            load_file(file)


@capabilities.forks
@pytest.mark.parametrize(("mode", "status"), [("kill", "-9"), ("full", "7")])
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(
    mode, status, server, whole, tmp_path, request
):
    """Runs are stopped at every 61st event or 23rd write; with ``--exhaustive`` far more often."""
    often = request.config.getoption("--exhaustive")
    assert server("count", resume=False).startswith("events")
    assert digest(tmp_path / "out") == whole
    # The count of events differs between modes: runs are stopped until one is not.
    server.process.stdout.readline()
    clear(tmp_path)
    at, stopped = 1, 0
    step = {"kill": 11, "full": 5}[mode] if often else {"kill": 61, "full": 23}[mode]
    while True:
        result = server(mode, at, resume=False)
        if result == "0":
            break
        assert result == status, (at, result)
        check_whole(tmp_path)
        assert not (tmp_path / "out").exists() or digest(tmp_path / "out") == whole
        if not (tmp_path / "out").exists():
            assert server("none") == "0", at
            assert [p.name for p in tmp_path.iterdir()] == ["out"], at
        assert digest(tmp_path / "out") == whole, at
        clear(tmp_path)
        stopped, at = stopped + 1, at + step
    assert stopped >= 5
    assert digest(tmp_path / "out") == whole


@capabilities.forks
def test_a_run_that_is_killed_while_it_saves_leaves_nothing_behind(server, whole, tmp_path):
    total = int(server("count", resume=False).split()[1])
    server.process.stdout.readline()
    clear(tmp_path)
    saving, at = 0, total
    while saving < 3:
        assert server("kill", at, resume=False) == "-9"
        if not (tmp_path / "out").exists():
            saving += sum(p.is_dir() for p in (tmp_path / "out.run").iterdir())
            assert server("none") == "0", at
            assert [p.name for p in tmp_path.iterdir()] == ["out"], at
        assert digest(tmp_path / "out") == whole, at
        clear(tmp_path)
        at -= 5


@capabilities.limits
def test_files_that_may_not_grow_end_a_run_clearly(server, whole, tmp_path):
    """The system itself refuses writes, in the middle of whichever file is the first too long."""
    for largest in (150, 6000, 50_000):
        assert server("size", largest, resume=False) == "7"
        check_whole(tmp_path)
        assert not (tmp_path / "out").exists()
        assert server("none") == "0"
        assert digest(tmp_path / "out") == whole
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        clear(tmp_path)


def test_what_a_kill_leaves_of_a_directory_that_was_being_removed(source, tokens, whole, tmp_path):
    output = tmp_path / "out"
    cqhf.quantize(source, RECIPE, tokens, output)
    left = run_directory(output).with_name(f".{run_directory(output).name}.ended")
    left.mkdir()
    (left / "block-00000.safetensors").write_bytes(b"half")
    # The output is finished, so there is nothing to go on with.
    with pytest.raises(cq.OutputError):
        cqhf.quantize(source, RECIPE, tokens, output, resume=True)
    assert digest(output) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class Stopped(Exception):
    """Stands for whatever ends a run."""


def stop_after(step):
    def listen(event):
        if event["step"] == step:
            raise Stopped

    return listen


def begin(source, tokens, output, step="block-00000", recipe=RECIPE):
    with pytest.raises(Stopped):
        cqhf.quantize(source, recipe, tokens, output, events=stop_after(step))
    return run_directory(output)


def test_no_step_is_done_twice(source, tokens, whole, tmp_path):
    begin(source, tokens, tmp_path / "out")
    events = []
    cqhf.quantize(source, RECIPE, tokens, tmp_path / "out", resume=True, events=events.append)
    assert [e["step"] for e in events] == ["block-00001", "exit"]
    assert digest(tmp_path / "out") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("factors", ["signs", "none"])
def test_statistics_of_the_whole_stream_are_taken_up_again(factors, source, tokens, tmp_path):
    recipe = Recipe(block_size=16, rotation="online", permutation="energydiff", factors=factors)
    cqhf.quantize(source, recipe, tokens, tmp_path / "whole")
    begin(source, tokens, tmp_path / "out", "calibrate-00000", recipe)
    cqhf.quantize(source, recipe, tokens, tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    "lost", ["block-00000.safetensors", "block-00000.json", "block-00000.reference.bin"]
)
def test_a_lost_write_costs_a_step(lost, source, tokens, whole, tmp_path):
    run = begin(source, tokens, tmp_path / "out")
    (run / lost).write_bytes((run / lost).read_bytes()[:-5])
    events = []
    cqhf.quantize(source, RECIPE, tokens, tmp_path / "out", resume=True, events=events.append)
    assert [e["step"] for e in events] == ["block-00000", "block-00001", "exit"]
    assert digest(tmp_path / "out") == whole


def test_changed_inputs_are_refused_by_name(source, tokens, tmp_path):
    output = tmp_path / "out"
    begin(source, tokens, output)

    def refused(words, folder=source, recipe=RECIPE, data=tokens, resume=True):
        with pytest.raises(cq.RunError, match=words):
            cqhf.quantize(folder, recipe, data, output, resume=resume)

    refused(r"recipe\.block_size must be .* 16, to go on, got 32", recipe=Recipe(block_size=32))
    refused(r"recipe\.seed must be", recipe=Recipe(block_size=16, seed=1))
    refused(r"data\.sha256 must be", data=tokens[:, ::-1])
    other = write(tmp_path / "other", seed=1)
    refused(r"model\.model\.safetensors must be", folder=other)
    refused("a run was begun in .*resume", resume=False)
    manifest = run_directory(output) / "manifest.json"
    values = json.loads(manifest.read_text())
    values["versions"]["torch"] = "0.1"
    manifest.write_text(json.dumps(values))
    refused(r"versions\.torch must be as when the run was begun, '0\.1'")


@pytest.mark.parametrize("text", ["[]", "5", "{", "[" * 100_000, "null", '{"format": [1]}', ""])
def test_a_manifest_that_is_none_is_refused(text, source, tokens, tmp_path):
    manifest = begin(source, tokens, tmp_path / "out") / "manifest.json"
    manifest.write_text(text)
    with pytest.raises(cq.RunError, match="manifest.json|must be as when the run was begun"):
        cqhf.quantize(source, RECIPE, tokens, tmp_path / "out", resume=True)


@capabilities.pipes
def test_a_manifest_that_is_a_pipe_is_refused(source, tokens, tmp_path):
    manifest = begin(source, tokens, tmp_path / "out") / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(cq.RunError, match="where a regular file is expected"):
        cqhf.quantize(source, RECIPE, tokens, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"files": [1]},
        {"files": {"x": 5}},
        {"state": 5},
        {"state": {"reference": [5]}},
        {"report": []},
        {"report": {}},
        {"sha256": None},
    ],
)
@pytest.mark.parametrize("step", ["block-00000", "choose"])
def test_a_record_of_other_values_costs_its_step(change, step, source, tokens, whole, tmp_path):
    record = begin(source, tokens, tmp_path / "out") / f"{step}.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **change}))
    events = []
    cqhf.quantize(source, RECIPE, tokens, tmp_path / "out", resume=True, events=events.append)
    assert step in [e["step"] for e in events]
    assert digest(tmp_path / "out") == whole


@pytest.mark.parametrize("text", ["[]", '{"sha256": 5, "files": [1]}', "{", '{"files": 5}'])
def test_a_mark_of_other_values_is_none(text, source, tokens, whole, tmp_path):
    (begin(source, tokens, tmp_path / "out") / "saved.json").write_text(text)
    (tmp_path / "out").mkdir()
    cqhf.quantize(source, RECIPE, tokens, tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == whole


def test_two_runs_exclude_each_other(source, tokens, tmp_path):
    run = begin(source, tokens, tmp_path / "out")
    manifest = json.loads((run / "manifest.json").read_text())
    other = RunDirectory(run, manifest, resume=True)
    with pytest.raises(cq.RunError, match="another process is working"):
        cqhf.quantize(source, RECIPE, tokens, tmp_path / "out", resume=True)
    other.close()
    cqhf.quantize(source, RECIPE, tokens, tmp_path / "out", resume=True)


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tokens, tmp_path):
    model = cqhf.tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[4, 5] = np.nan
    model.save_pretrained(tmp_path / "float")
    word_level(tmp_path / "float")
    with pytest.raises(cq.NonFiniteError, match=r"layers\.0\.mlp\.up_proj\.weight.*\(4, 5\)"):
        cqhf.quantize(tmp_path / "float", RECIPE, tokens, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["float"]


MEASURE = """
import re, sys
import numpy as np, corequant_transformers as cqhf
from corequant.recipe import Recipe
recipe = Recipe(block_size=16, weights="int4:channel:symmetric:absmax")
cqhf.quantize(sys.argv[1], recipe, np.arange(128).reshape(2, 64), sys.argv[2])
# The peak of this program alone: ru_maxrss begins with what the process that started it had.
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(cqhf.plan(sys.argv[1], recipe).cost()["peak_mib"])
"""


def peak_of(folder, output):
    """Quantize in a process of its own and return its peak memory in MiB, planned to 20 %."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, output], capture_output=True, text=True, check=True
    )
    peak, planned = done.stdout.split()
    assert int(peak) / 1024 < 1.2 * float(planned)
    return int(peak) / 1024


@capabilities.procfs
def test_peak_memory_does_not_depend_on_depth(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    shallow, deep = (
        write(tmp_path / str(layers), num_hidden_layers=layers, **sizes) for layers in (4, 16)
    )
    allowed = 1.1 * peak_of(shallow, tmp_path / "shallow")
    # All blocks of the deeper model together would take 200 MiB more in float32 alone. What a block
    # takes for a moment differs by 50 MiB from run to run; what grew with depth would always show.
    peaks = []
    while not peaks or (peaks[-1] >= allowed and len(peaks) < 3):
        peaks.append(peak_of(deep, tmp_path / f"deep{len(peaks)}"))
    assert min(peaks) < allowed, peaks
