"""Runs where POSIX is missing, as on Windows, and where a system promises less than Linux."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.files import atomic, outputs
from corequant_transformers.model import surroundings as memory
from corequant_transformers.run.directory import RunDirectory
from tests.models.test_streaming import digest, write

RECIPE = Recipe(block_size=16, rotation="online", permutation="energydiff")
TEXT = "a b c d e f g h i j k l m n o p " * 40

BEGINNING = """
import json, os, sys
import numpy as np
import corequant as cq, corequant_transformers as cqhf
from corequant.recipe import Recipe

source, output, last = sys.argv[1:4]
tokens = np.random.default_rng(0).integers(0, 128, (3, 48))
# Statistics of the residual stream are kept on the way, under the names of regions.
recipe = Recipe(block_size=16, rotation="online", permutation="energydiff")
"""

KILLED = """
def die(name, arguments):
    if name == "os.rename" and str(arguments[1]).endswith(last):
        os._exit(77)

sys.addaudithook(die)
cqhf.quantize(source, recipe, tokens, output, resume=True)
"""

RESUMED = """
import io, pathlib, shutil
import pytest
from corequant_cli.app import run
from corequant_transformers.run.directory import RunDirectory

other = RunDirectory(f"{output}.run", json.loads(open(f"{output}.run/manifest.json").read()),
                     resume=True)
with pytest.raises(cq.RunError, match="another process is working"):
    cqhf.quantize(source, recipe, tokens, output, resume=True)
other.close()
result = cqhf.quantize(source, recipe, tokens, output, resume=True)
assert 50 < result.report["peak_rss_mib"] < 10_000
first = cqhf.load(output).state_dict()
assert first and all(bool(tensor.isfinite().all()) for tensor in first.values())
with pytest.raises(cq.RecipeError, match="must be left out.* got 2GiB"):
    cqhf.limit_memory("2GiB", cqhf.plan(source, recipe))

def command(*arguments):
    sys.argv = ["corequant", *arguments]
    sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    status = run()
    sys.stdout.seek(0)
    text, sys.stdout = sys.stdout.read(), sys.__stdout__
    return status, text

text, made = f"{last}/text.txt", f"{last}/made"
small = ("--samples", "2", "--sequence-length", "64")
merged = ("--rotation", "offline", "--activations", "none", "--weights", "int4:group16")
status, shown = command("quantize", source, "-o", made, "--calibration", text, *small, *merged)
assert status == 0 and "logits" in shown, shown
assert command("evaluate", made, "--text", text, "--sequence-length", "64")[0] == 0
assert command("export", made, "-o", f"{last}/exported", "--json")[0] == 0
assert cqhf.Source(f"{last}/exported").tensor_names()
status, shown = command(
    "inspect", source, "--text", text, "--sequence-length", "64", "--report", f"{last}/x.html"
)
# A letter that the encoding lacks.
assert status == 0 and "\\\\u03b4" in shown, shown
assert command("quantize", source, "-o", f"{last}/no", "--calibration", text, *small,
               "--block-size", "16", "--memory", "2GiB")[0] == 1
# A directory that is loaded can be removed.
kept = cqhf.load(made)
shutil.rmtree(made)
assert not [f for f in pathlib.Path(last).rglob("*") if f.suffix == ".tmp"]
"""


@pytest.fixture
def elsewhere(tmp_path):
    """Run a program where POSIX is missing."""

    def run(text, *arguments):
        (tmp_path / "program.py").write_text(BEGINNING + text, encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-m", "tests.otherplatform", tmp_path / "program.py", *arguments],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_model_is_quantized_saved_resumed_and_loaded_without_posix(elsewhere, tokens, tmp_path):
    source, folder = write(tmp_path / "float"), tmp_path / "elsewhere"
    cqhf.quantize(source, RECIPE, tokens, tmp_path / "wanted")
    folder.mkdir()
    (tmp_path / "text.txt").write_text(TEXT)
    # In the middle of a step, and when all but the result's name is there.
    for last in ("calibrate-00001.json", "out"):
        done = elsewhere(KILLED, source, folder / "out", last)
        assert done.returncode == 77, done.stderr
        assert [f.name for f in folder.iterdir()] == ["out.run"]
    done = elsewhere(RESUMED, source, folder / "out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [f.name for f in folder.iterdir()] == ["out"]
    # The same bytes as here, ends of lines and all.
    assert digest(folder / "out") == digest(tmp_path / "wanted")
    assert cqhf.check_digests(folder / "out") == cqhf.check_digests(tmp_path / "wanted")
    exported = (tmp_path / "exported" / "corequant.sha256").read_bytes()
    assert exported.endswith(b"\n")
    assert b"\r" not in exported
    cqhf.check_digests(tmp_path / "exported")


# ---- what systems promise


def test_disks_are_asked_to_empty_their_own_cache(tmp_path, monkeypatch):
    calls, answers = [], [None, OSError(errno.ENOTSUP, "not this disk")]

    def control(handle, command):
        calls.append(command)
        if error := answers.pop(0):
            raise error

    monkeypatch.setitem(
        sys.modules, "fcntl", types.SimpleNamespace(fcntl=control, F_FULLFSYNC="all")
    )
    synchronised = []
    monkeypatch.setattr(os, "fsync", synchronised.append)
    (tmp_path / "x").write_bytes(b"x")
    atomic.sync(tmp_path / "x")
    assert (calls, synchronised) == (["all"], [])
    atomic.sync(tmp_path)
    assert calls == ["all", "all"]
    assert len(synchronised) == 1


def test_a_file_that_another_program_has_open_is_waited_for(tmp_path, monkeypatch):
    real, refusals = os.replace, [32, 32, None]

    def replace(source, target):
        if refusals:
            error = PermissionError(errno.EACCES, "being used by another process")
            if (code := refusals.pop(0)) is not None:
                error.winerror = code
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "x").write_bytes(b"x")
    # Two that pass, and one that isn't Windows' own.
    with pytest.raises(PermissionError):
        atomic.move(tmp_path / "x", tmp_path / "y")
    assert refusals == []
    atomic.move(tmp_path / "x", tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == b"x"
    refusals += [5] * 20
    monkeypatch.setattr(atomic, "_WAITS", (0, 0))
    with pytest.raises(PermissionError):
        atomic.move(tmp_path / "y", tmp_path / "x")
    assert len(refusals) == 17


def test_a_limit_that_is_not_enforced_is_refused(tmp_path, monkeypatch):
    """macOS takes a limit of private memory and lets a process have more."""
    limits = [(2**62, 2**62)]
    system = types.SimpleNamespace(
        RLIMIT_DATA=2,
        RLIM_INFINITY=-1,
        getrlimit=lambda kind: limits[-1],
        setrlimit=lambda kind, pair: limits.append(pair),
    )
    monkeypatch.setattr(memory, "_resource", lambda: system)
    plan = cqhf.plan(cqhf.tiny_model("llama"), RECIPE)
    with pytest.raises(cq.RecipeError, match="enforces no limit on private memory, got 2GiB"):
        memory.limit_memory("2GiB", plan)
    assert limits == [(2**62, 2**62), (2**31, 2**62), (2**62, 2**62)]


def test_trimming_does_nothing_where_libraries_have_names(monkeypatch):
    def library(name):
        raise TypeError("must be str, not None")

    monkeypatch.setattr(ctypes, "CDLL", library)
    memory.trim_memory()


def test_a_volume_of_any_system_counts_as_empty(tmp_path, monkeypatch):
    for name in ("System Volume Information", "$RECYCLE.BIN", ".fseventsd", "lost+found"):
        (tmp_path / name).mkdir()
    assert len(outputs.contents(tmp_path)) == 4
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    assert outputs.contents(tmp_path) == []
    (tmp_path / "mine").mkdir()
    assert [f.name for f in outputs.contents(tmp_path)] == ["mine"]


def test_a_folder_is_tried_without_many_names(tmp_path, monkeypatch):
    """Windows refuses a folder as it refuses a name that is taken."""
    tried = []

    def refuse(path, flags, mode=0o777):
        tried.append((path, flags))
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "O_TEMPORARY", 1 << 30, raising=False)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(cq.OutputError, match="parent folder can't be written.*Permission denied"):
        outputs.check_output(tmp_path / "out")
    assert len(tried) == 1
    assert tried[0][1] & (1 << 30)


def test_a_run_is_locked_for_other_processes(tmp_path):
    script = (
        "import sys; from corequant_transformers.run.directory import RunDirectory\n"
        "try: RunDirectory(sys.argv[1], {}, resume=True)\n"
        "except Exception as error: print(error)"
    )
    run = RunDirectory(tmp_path / "x.run", {}, resume=False)
    arguments = [sys.executable, "-c", script, str(tmp_path / "x.run")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "another process is working" in done.stdout
    run.close()
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout == ""
