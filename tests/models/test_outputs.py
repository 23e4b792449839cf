"""Where results may go, and that damage to what was written is noticed."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers import pipeline
from corequant_transformers.files import outputs as places
from corequant_transformers.files.companions import TEMPLATES
from corequant_transformers.files.digests import DIGESTS
from corequant_transformers.run.output import run_directory
from tests import capabilities
from tests.flipping import flip, outputs
from tests.models.test_checkpoint import word_level
from tests.models.test_streaming import Stopped, digest, stop_after

RECIPE = Recipe(block_size=16)
OFFLINE = Recipe(rotation="offline", weights="int4:group16", activations="none")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float") / "model"
    cqhf.tiny_model("llama").save_pretrained(folder)
    word_level(folder)
    return folder


@pytest.fixture(scope="module")
def written(source, tokens, tmp_path_factory):
    """A directory that a run wrote, and its hash."""
    folder = tmp_path_factory.mktemp("written") / "out"
    cqhf.quantize(source, RECIPE, tokens, folder)
    return folder


@pytest.fixture
def copy_of(written, tmp_path):
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


# ---- directories that are there already


def link(folder):
    (folder / "real").mkdir(mode=0o700)
    (folder / "out").symlink_to("real")
    return folder / "out"


def dangling(folder):
    (folder / "out").symlink_to("real")
    return folder / "out"


def there(folder):
    (folder / "out").mkdir(mode=0o700)
    return folder / "out"


MAKERS = [
    pytest.param(link, marks=capabilities.links),
    pytest.param(dangling, marks=capabilities.links),
    there,
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("resume", [False, True])
def test_output_goes_where_a_name_leads(make, resume, source, written, tokens, tmp_path):
    output = make(tmp_path)
    before = output.stat() if output.exists() else None
    cqhf.quantize(source, RECIPE, tokens, output, resume=resume)
    assert digest(output) == digest(written)
    assert {p.name for p in tmp_path.iterdir()} <= {"out", "real"}
    if before is not None:
        assert os.path.samestat(before, output.stat())
        assert output.stat().st_mode == before.st_mode
    cqhf.load(output)
    with pytest.raises(cq.OutputError, match="new or empty directory"):
        cqhf.quantize(source, RECIPE, tokens, output, resume=resume)


@pytest.mark.parametrize("make", MAKERS)
def test_exports_and_models_in_memory_go_there_too(make, tokens, tmp_path):
    output = make(tmp_path)
    cqhf.quantize(cqhf.tiny_model("llama"), OFFLINE, tokens, output)
    cqhf.load(output)
    (tmp_path / "below").mkdir()
    export = make(tmp_path / "below")
    cqhf.export(output, export)
    cqhf.Source(export).load()


def test_the_working_directory_stays_what_it_is(source, tokens, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = os.stat(".")
    cqhf.quantize(source, RECIPE, tokens, ".")
    assert os.path.samestat(before, os.stat(tmp_path / "here"))
    assert (tmp_path / "here/corequant.safetensors").is_file()
    cqhf.load(".")
    assert os.listdir(tmp_path) == ["here"]
    with pytest.raises(cq.OutputError, match="new or empty directory, got .*which holds"):
        cqhf.quantize(source, RECIPE, tokens, ".")


def test_a_directory_within_the_model_may_be_the_output(source, tokens, written, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    output = tmp_path / "model" / "tokenizer_out"
    cqhf.quantize(tmp_path / "model", RECIPE, tokens, output)
    assert digest(output) == digest(written)
    with pytest.raises(cq.OutputError, match="new or empty"):
        cqhf.quantize(tmp_path / "model", RECIPE, tokens, tmp_path / "model")
    with pytest.raises(cq.OutputError, match="new or empty"):
        cqhf.quantize(tmp_path / "model", RECIPE, tokens, tmp_path)


def test_a_model_is_named_however_its_path_is_written(source, tokens, monkeypatch):
    monkeypatch.chdir(source)
    assert cqhf.quantize(".", RECIPE, tokens).report["source"] == "model"
    monkeypatch.chdir("/")
    assert cqhf.Source(source / ".." / "model").name == "model"


def test_a_mounted_directory_is_written_into(source, written, tokens, tmp_path):
    """Where mounts can be made; otherwise renaming one is refused by a stand-in."""
    mounted = tmp_path / "out"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "none", str(mounted)]
    made = bool(shutil.which("mount")) and not subprocess.run(mount, capture_output=True).returncode
    try:
        cqhf.quantize(source, RECIPE, tokens, mounted)
        assert digest(mounted) == digest(written)
        assert os.listdir(tmp_path) == ["out"]
    finally:
        if made:
            subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize(
    "name", ["/", "..", "x\0y", pytest.param("loop", marks=capabilities.links)]
)
@pytest.mark.parametrize("resume", [False, True])
def test_outputs_that_can_not_be_are_refused_before_any_work(
    name, resume, source, tokens, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    if name == "loop":
        (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(pipeline, "describe_run", pytest.fail)
    output = tmp_path / "loop" if name == "loop" else name
    with pytest.raises(cq.OutputError, match="output"):
        cqhf.quantize(source, RECIPE, tokens, output, resume=resume)
    assert os.listdir(tmp_path / "here") == []


def test_a_read_only_directory_is_refused_before_any_work(source, tokens, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    real = places.tempfile.mkdtemp

    def refuse(suffix=None, prefix=None, dir=None):
        if str(dir).endswith("out"):
            raise OSError(30, "Read-only file system")
        return real(suffix, prefix, dir)

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(cq.OutputError, match="output can't be written: .*Read-only"):
        cqhf.quantize(source, RECIPE, tokens, tmp_path / "out")


@pytest.mark.parametrize("at", [0, 1, 4, -1])
def test_a_run_that_is_killed_while_it_moves_files_goes_on(
    at, source, written, tokens, tmp_path, monkeypatch
):
    output = there(tmp_path)

    class Killed(BaseException):
        pass

    def killed(folder, target):
        names = sorted(f.name for f in folder.iterdir() if f.name != "corequant.safetensors")
        for name in names[: at % (len(names) + 1)]:
            (folder / name).rename(target / name)
        shutil.copytree(folder, target / ".corequant.left.tmp")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(places, "_move", killed)
        with pytest.raises(Killed):
            cqhf.quantize(source, RECIPE, tokens, output)
    assert run_directory(output).is_dir()
    cqhf.quantize(source, RECIPE, tokens, output, resume=True)
    assert digest(output) == digest(written)
    assert os.listdir(tmp_path) == ["out"]


def test_files_of_others_are_not_removed_from_an_output(source, tokens, tmp_path):
    output = there(tmp_path)
    with pytest.raises(Stopped):
        cqhf.quantize(source, RECIPE, tokens, output, events=stop_after("block-00000"))
    (output / "config.json").write_text("mine")
    with pytest.raises(cq.OutputError, match=r"which holds config\.json"):
        cqhf.quantize(source, RECIPE, tokens, output, resume=True)
    assert (output / "config.json").read_text() == "mine"


def test_a_move_that_fails_leaves_nothing(tokens, tmp_path, monkeypatch):
    output = there(tmp_path)
    real = Path.replace

    def fails(self, target):
        if self.name == "corequant.safetensors":
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(cq.OutputError, match="Input/output error"):
        cqhf.quantize(cqhf.tiny_model("llama"), RECIPE, tokens, output)
    assert os.listdir(output) == []


# ---- digests


@pytest.mark.parametrize("kind", range(3))
def test_flipped_bits_are_noticed(kind, tmp_path):
    """A few; ``bench/bench_flips.py`` flips thousands."""
    _, path, read = outputs(tmp_path)[kind]
    found = flip(path, read, 40, seed=1)
    assert found.noticed + found.harmless == 40
    assert found.noticed >= 36


def changed(file):
    file.write_bytes(file.read_bytes() + b"\n")


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "corequant.safetensors", DIGESTS, "float_config.json", "recipe.toml",
        "generation_config.json", "log.jsonl", "report.json", "tokenizer.json",
    ],
)  # fmt: skip
def test_every_file_is_compared(name, copy_of, tmp_path):
    content = (copy_of / name).read_bytes()
    for damage in (changed, Path.unlink):
        damage(copy_of / name)
        for read in (cqhf.load, cqhf.check_digests):
            with pytest.raises(cq.CheckpointError):
                read(copy_of)
        (copy_of / name).write_bytes(content)
    cqhf.load(copy_of)
    if name not in ("corequant.safetensors", "report.json", DIGESTS):
        (copy_of / name).write_bytes(content + b" \n")
        cqhf.load(copy_of, verify=False)


def test_values_that_were_edited_are_noticed(copy_of, tokens):
    file = copy_of / "recipe.toml"
    file.write_text(file.read_text().replace("block_size = 16", "block_size = 32"))
    with pytest.raises(cq.CheckpointError, match=r"recipe.toml is not as it was written.*verify=F"):
        cqhf.load(copy_of)
    with pytest.raises(cq.CheckpointError, match="recipe.toml is not as it was written"):
        cqhf.load_tokenizer(copy_of)
    assert cqhf.load(copy_of, verify=False) is not None


def test_added_files_are_noticed(copy_of):
    for name in ("notes.md", ".gitattributes", "model.gguf"):
        (copy_of / name).write_text("of the model's page")
    for name in (".cache", "export"):
        (copy_of / name).mkdir()
    cqhf.load(copy_of)
    for name in ("chat_template.jinja", "added_tokens.json", "model.safetensors", "x"):
        (copy_of / name).write_text("{{ messages }}")
        with pytest.raises(cq.CheckpointError, match=f"{name} is not among the files"):
            cqhf.load(copy_of)
        if name == "chat_template.jinja":
            cqhf.load(copy_of, verify=False)
        (copy_of / name).unlink()
    (copy_of / "additional_chat_templates").mkdir()
    cqhf.check_digests(copy_of)
    (copy_of / "additional_chat_templates" / "other.jinja").touch()
    with pytest.raises(cq.CheckpointError, match="templates/other.jinja is not among"):
        cqhf.load(copy_of)


def test_other_programs_can_check_the_list(copy_of):
    command = ["sha256sum", "--check", "--quiet", "--strict", DIGESTS]
    assert subprocess.run(command, cwd=copy_of, check=False).returncode == 0
    changed(copy_of / "tokenizer.json")
    assert subprocess.run(command, cwd=copy_of, check=False, capture_output=True).returncode == 1


def test_lists_of_equal_models_are_equal(written, source, tokens, tmp_path):
    cqhf.quantize(source, RECIPE, tokens, tmp_path / "again")
    assert (tmp_path / "again" / DIGESTS).read_bytes() == (written / DIGESTS).read_bytes()


def test_a_directory_from_before_says_so(copy_of, tokens):
    (copy_of / DIGESTS).unlink()
    file = copy_of / "config.json"
    values = json.loads(file.read_text())
    del values["quantization_config"]["digests"]
    file.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="was written before corequant kept digests"):
        cqhf.load(copy_of)
    assert cqhf.check_digests(copy_of) is None
    cqhf.load(copy_of, verify=False)


def test_exports_are_made_of_whole_directories_and_compared_themselves(tokens, tmp_path):
    own, out = tmp_path / "own", tmp_path / "out"
    cqhf.quantize(cqhf.tiny_model("llama"), OFFLINE, tokens, own)
    report = (own / "report.json").read_bytes()
    changed(own / "report.json")
    for to, target in (("compressed-tensors", out), ("gguf", tmp_path / "out.gguf")):
        with pytest.raises(cq.CorequantError):
            cqhf.export(own, target, to)
        assert not target.exists()
    with pytest.raises(cq.CheckpointError, match="report.json is not as it was written"):
        cqhf.export(own, out)
    (own / "report.json").write_bytes(report)
    cqhf.export(own, out)
    assert cqhf.check_digests(out) == 3
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for read in (cqhf.check_digests, lambda path: cqhf.Source(path).load()):
        with pytest.raises(cq.CheckpointError, match="model.safetensors is not as it was written"):
            read(out)
    (out / DIGESTS).unlink()
    assert cqhf.check_digests(out) is None
    cqhf.Source(out).load()


def test_nan_is_no_json(tokens, tmp_path):
    model = cqhf.tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = 1e25
    result = cqhf.quantize(model, RECIPE, tokens, tmp_path / "out")
    errors = [row["relative_squared_error"] for row in result.report["matrices"]]
    assert all(0 <= error < 1 for error in errors)
    text = (tmp_path / "out/report.json").read_text()
    json.loads(text, parse_constant=pytest.fail)


# ---- what fresh damage there may be


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"max_new_tokens": "x"}'])
def test_generation_settings_that_no_result_could_be_loaded_with_are_found_by_plan(
    content, source, tokens, tmp_path
):
    shutil.copytree(source, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_bytes(content)
    with pytest.raises(cq.CheckpointError, match="generation_config"):
        cqhf.plan(tmp_path / "m", RECIPE)


def test_tokenizers_are_not_read_beside_files_that_were_added(copy_of):
    (copy_of / "chat_template.jinja").write_text("other words")
    with pytest.raises(cq.CheckpointError, match="chat_template.jinja"):
        cqhf.load_tokenizer(copy_of)
    cqhf.load_tokenizer(copy_of, verify=False)


def test_exports_are_compared_as_sources_unless_told_not_to(source, tokens, tmp_path):
    cqhf.quantize(source, OFFLINE, tokens, tmp_path / "q")
    cqhf.export(tmp_path / "q", tmp_path / "ct")
    file = tmp_path / "ct" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(cq.CheckpointError, match="not as it was written"):
        cqhf.Source(tmp_path / "ct").load()
    cqhf.Source(tmp_path / "ct", verify=False).load()
    words = tmp_path / "ct" / "tokenizer.json"
    words.write_text(words.read_text() + " ")
    with pytest.raises(cq.CheckpointError, match="not as it was written"):
        cqhf.Source(tmp_path / "ct").tokenizer()
    cqhf.Source(tmp_path / "ct", verify=False).tokenizer()


def test_a_run_whose_files_became_something_else_goes_on(source, written, tokens, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        cqhf.quantize(source, RECIPE, tokens, output, events=stop_after("calibrate-00000"))
    run = run_directory(output)
    step = next(run.glob("calibrate-*.json"))
    step.unlink()
    step.mkdir()
    log = run / "log.jsonl"
    log.unlink()
    log.mkdir()
    with pytest.raises(cq.OutputError, match="log.jsonl"):
        cqhf.quantize(source, RECIPE, tokens, output, resume=True)
    log.rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(log)
        with pytest.raises(cq.OutputError, match="log.jsonl"):
            cqhf.quantize(source, RECIPE, tokens, output, resume=True)
        log.unlink()
    cqhf.quantize(source, RECIPE, tokens, output, resume=True)
    assert digest(output) == digest(written)


@pytest.mark.parametrize("resume", [False, True])
def test_an_empty_output_is_not_the_working_directory(
    resume, source, tokens, written, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: cqhf.quantize(source, RECIPE, tokens, "", resume=resume),
        lambda: cqhf.quantize(cqhf.tiny_model("llama"), RECIPE, tokens, ""),
        lambda: cqhf.export(written, ""),
        lambda: cqhf.export(written, "", "gguf"),
    ):
        with pytest.raises(cq.OutputError, match="output must be a path, got an empty one"):
            call()
    assert os.listdir(tmp_path) == []


def test_the_root_of_a_volume_is_empty(source, written, tokens, tmp_path, monkeypatch):
    output = there(tmp_path)
    (output / "lost+found").mkdir(mode=0o700)
    with pytest.raises(cq.OutputError, match=r"which holds lost\+found"):
        cqhf.quantize(source, RECIPE, tokens, output)
    # Making a real volume takes a superuser and a block device.
    real = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(output) or real(path))
    cqhf.quantize(source, RECIPE, tokens, output)
    assert (output / "lost+found").is_dir()
    cqhf.load(output)
    (output / "lost+found").rmdir()
    assert digest(output) == digest(written)


def test_a_run_that_was_killed_on_a_volume_goes_on(source, written, tokens, tmp_path, monkeypatch):
    output = there(tmp_path)
    (output / "lost+found").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(output))

    class Killed(BaseException):
        pass

    def die(folder, target):
        (folder / "config.json").rename(target / "config.json")
        raise Killed

    with monkeypatch.context() as broken:
        broken.setattr(places, "_move", die)
        with pytest.raises(Killed):
            cqhf.quantize(source, RECIPE, tokens, output)
    assert (output / "config.json").is_file()
    cqhf.quantize(source, RECIPE, tokens, output, resume=True)
    (output / "lost+found").rmdir()
    assert digest(output) == digest(written)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"{}" * 50])
def test_files_that_are_no_gguf_files_have_no_digests_to_compare(content, tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(
        cq.CheckpointError, match=f"must be a directory or a GGUF file.* of {len(content)} bytes"
    ):
        cqhf.check_digests(file)


# ---- templates of chats in a folder of their own


@pytest.fixture
def chatting(source, tmp_path):
    shutil.copytree(source, tmp_path / "chatting")
    folder = tmp_path / "chatting"
    (folder / "chat_template.jinja").write_text("default")
    (folder / TEMPLATES).mkdir()
    (folder / TEMPLATES / "tool_use.jinja").write_text("with tools")
    (folder / TEMPLATES / "notes.txt").write_text("not read")
    return folder


def templates(folder):
    return cqhf.load_tokenizer(folder).chat_template


@pytest.mark.parametrize("kind", ["directory", "there", "memory"])
def test_templates_of_chats_are_copied_and_compared(kind, chatting, tokens, tmp_path):
    wanted = {"default": "default", "tool_use": "with tools"}
    tokenizer = cqhf.Source(chatting).tokenizer()
    assert tokenizer.chat_template == wanted
    output = there(tmp_path) if kind == "there" else tmp_path / "out"
    model = cqhf.tiny_model("llama") if kind == "memory" else chatting
    cqhf.quantize(model, OFFLINE, tokens, output, tokenizer=tokenizer)
    assert os.listdir(output / TEMPLATES) == ["tool_use.jinja"]
    assert templates(output) == wanted
    assert f"  {TEMPLATES}/tool_use.jinja\n" in (output / DIGESTS).read_text()
    export = cqhf.export(output, tmp_path / "export")
    assert cqhf.Source(export).tokenizer().chat_template == wanted
    for folder in (output, export):
        file = folder / TEMPLATES / "tool_use.jinja"
        file.write_text("with other tools")
        with pytest.raises(cq.CheckpointError, match=r"tool_use\.jinja is not as it was written"):
            cqhf.check_digests(folder)
        file.unlink()
        with pytest.raises(cq.CheckpointError, match=r"tool_use\.jinja is missing"):
            cqhf.check_digests(folder)


@pytest.mark.parametrize("moved", [1, 3])
def test_a_run_that_is_killed_while_it_moves_templates_goes_on(
    moved, chatting, tokens, tmp_path, monkeypatch
):
    cqhf.quantize(chatting, RECIPE, tokens, tmp_path / "wanted")
    output = there(tmp_path)

    class Killed(BaseException):
        pass

    def die(folder, target):
        names = sorted((p.name for p in folder.iterdir()), key=lambda n: (n != TEMPLATES, n))
        assert names[0] == TEMPLATES
        for name in names[:moved]:
            (folder / name).rename(target / name)
        raise Killed

    with monkeypatch.context() as broken:
        broken.setattr(places, "_move", die)
        with pytest.raises(Killed):
            cqhf.quantize(chatting, RECIPE, tokens, output)
    assert (output / TEMPLATES / "tool_use.jinja").is_file()
    cqhf.quantize(chatting, RECIPE, tokens, output, resume=True)
    assert digest(output) == digest(tmp_path / "wanted")
    assert templates(output) == templates(tmp_path / "wanted")


@capabilities.links
def test_templates_may_not_lead_out_of_the_folder(chatting, tokens, tmp_path):
    file = chatting / TEMPLATES / "tool_use.jinja"
    (tmp_path / "elsewhere").mkdir()
    file.rename(tmp_path / "elsewhere" / file.name)
    file.symlink_to(tmp_path / "elsewhere" / file.name)
    with pytest.raises(cq.CheckpointError, match="must be a file of its own folder"):
        cqhf.quantize(chatting, RECIPE, tokens)
    shutil.rmtree(chatting / TEMPLATES)
    (chatting / TEMPLATES).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(cq.CheckpointError, match="must be a file of its own folder"):
        cqhf.quantize(chatting, RECIPE, tokens)


@capabilities.links
def test_templates_of_a_cache_may_be_blobs(chatting, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "0"
    snapshot.parent.mkdir(parents=True)
    chatting.rename(snapshot)
    (tmp_path / "models--x" / "blobs").mkdir()
    file = snapshot / TEMPLATES / "tool_use.jinja"
    file.rename(tmp_path / "models--x" / "blobs" / "0")
    file.symlink_to("../../../blobs/0")
    assert file in cqhf.Source(snapshot).copied_files()


# ---- programs around us


def test_a_warning_points_at_the_line_that_called(written, tokens, tmp_path):
    shutil.copytree(written, tmp_path / "old")
    (tmp_path / "old" / DIGESTS).unlink()
    edited = json.loads((tmp_path / "old" / "config.json").read_text())
    del edited["quantization_config"]["digests"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(edited))
    with pytest.warns(UserWarning, match="before corequant kept digests") as found:
        cqhf.load(tmp_path / "old")
    assert [Path(w.filename).name for w in found] == ["test_outputs.py"]


def test_a_tree_that_is_not_installed_saves(source, tokens, tmp_path, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "corequant":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    cqhf.quantize(source, OFFLINE, tokens, tmp_path / "out")
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings["corequant_version"] == "unknown"
    cqhf.load(tmp_path / "out")


@capabilities.procfs
def test_an_output_that_cannot_be_is_named_without_temporary_files(tokens):
    with pytest.raises(cq.OutputError, match=r"can't be written: /proc: [^/]*$"):
        cqhf.quantize(cqhf.tiny_model("llama"), RECIPE, tokens, "/proc/foo")


def test_a_full_disk_says_that_the_run_goes_on(source, tokens, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("corequant_transformers.run.output.concatenate", full)
        with pytest.raises(cq.OutputError, match=r"No space left.*out\.run.*--resume"):
            cqhf.quantize(source, RECIPE, tokens, tmp_path / "out")
    cqhf.quantize(source, RECIPE, tokens, tmp_path / "out", resume=True)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_token_windows_need_no_tokenizer_that_loads(source, tokens, written, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    (broken / "tokenizer.json").write_text("{")
    result = cqhf.quantize(broken, RECIPE, tokens, tmp_path / "out")
    assert result.tokenizer is None
    weights = "corequant.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (written / weights).read_bytes()
    with pytest.raises(cq.CheckpointError, match="can't be loaded"):
        cqhf.quantize(broken, RECIPE, "a b c d " * 100)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float17", "torch.bfloat16"])
def test_a_dtype_that_torch_lacks_is_named(name, value, source, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = {**json.loads(file.read_text()), name: value}
    file.write_text(json.dumps(config))
    with pytest.raises(
        cq.CheckpointError, match=rf"{name} of .*config.json must be one of .*bfloat16.*'{value}'"
    ):
        cqhf.plan(tmp_path / "model", RECIPE)
