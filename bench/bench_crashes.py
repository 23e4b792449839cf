"""Runs that are killed at random moments, and runs on a disk that is full, to the same bytes.

Usage: python bench/bench_crashes.py [--model M --text T] [--kills 100] [--seed 0] [--write]

A run is killed with SIGKILL after a random part of the time that it takes, looked at, gone on
with, and compared. Meanwhile and afterwards every file that has its final name must be whole, and
the run that goes on may only repeat the step that was under way. By default a random model of two
blocks is rounded by qronos, which passes through every phase. As root on Linux the same is done on
file systems (tmpfs) of growing sizes, from one page to what a run needs. Any difference ends the
program with an error. ``--write`` puts the counts into bench/README.md.
"""

from __future__ import annotations

import os

# A child that is forked must not inherit the threads of a library.
os.environ.update(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from markdown import write_section
from safetensors.torch import load_file

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.run.ledger import steps_of
from corequant_transformers.run.output import run_directory

FULL, FAILED = 7, 9
# What is about the run itself: times and peaks.
OWN = ("report.json", "log.jsonl")


class Case:
    """A model, a recipe and tokens, and the bytes that a run must end in."""

    def __init__(self, model: Path, recipe: Recipe, tokens: np.ndarray, folder: Path) -> None:
        self.model, self.recipe, self.tokens = model, recipe, tokens
        self.steps = steps_of(cqhf.plan(model, recipe))
        started = time.monotonic()
        if self.wait(self.start(folder / "out")) != 0:
            raise SystemExit("a run that nothing happens to must succeed")
        self.seconds = time.monotonic() - started
        self.bytes = sum(f.stat().st_size for f in (folder / "out").iterdir())
        self.digest = digest(folder / "out")

    def start(self, output: Path) -> int:
        """Begin or go on with a run in a child and return the child's number."""
        process = os.fork()
        if process:
            return process
        try:
            cqhf.quantize(self.model, self.recipe, self.tokens, output, resume=True)
        except cq.OutputError:
            os._exit(FULL)
        except BaseException as error:
            print("unexpected", repr(error), flush=True)
            os._exit(FAILED)
        os._exit(0)

    @staticmethod
    def wait(process: int) -> int:
        """Wait for a child and return its exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def check_end(self, output: Path, where: str) -> None:
        """Compare what a run ended in, and see that it left nothing else."""
        expect(digest(output) == self.digest, f"the bytes differ: {where}")
        left = [p.name for p in output.parent.iterdir() if p != output]
        expect(not left, f"left over {left}: {where}")


def expect(good: bool, what: str) -> None:
    if not good:
        raise SystemExit(f"FAILED: {what}")


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for name in sorted(f.name for f in folder.iterdir() if f.name not in OWN):
        found.update(name.encode() + (folder / name).read_bytes())
    return found.hexdigest()


def check_whole(folder: Path) -> None:
    """Read every file that has its final name."""
    for file in folder.rglob("*"):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        try:
            if file.suffix == ".json":
                json.loads(file.read_text())
            if file.suffix == ".safetensors":
                load_file(file)
        except FileNotFoundError:
            continue


def done_steps(case: Case, output: Path) -> list[str]:
    """Return the steps with a record, in their order."""
    folder = run_directory(output)
    return [s for s in case.steps if (folder / f"{s}.json").exists()]


def log_of(output: Path) -> list[str]:
    """Return the steps that the log of a run tells of."""
    folder = run_directory(output)
    file = (folder if folder.exists() else output) / "log.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines() if line]


def kill_one(case: Case, folder: Path, generator: random.Random) -> str | None:
    """Kill a run, go on with it, and return the step that was under way; None if it had ended."""
    output = folder / "out"
    started = time.monotonic()
    process = case.start(output)
    until = started + generator.uniform(0, case.seconds)
    while time.monotonic() < until:
        # Readers at any moment see whole files only.
        if output.exists():
            expect(digest(output) == case.digest, "half of an output is visible")
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            # The machine has become faster since.
            case.seconds = time.monotonic() - started
            break
        time.sleep(min(0.02, max(0.0, until - time.monotonic())))
    os.kill(process, signal.SIGKILL)
    status = case.wait(process)
    check_whole(folder)
    spent = time.monotonic() - started
    if status == 0:
        where = None
    elif output.exists():
        expect(digest(output) == case.digest, "half of an output is visible")
        where = "clearing up"
    else:
        done = done_steps(case, output)
        expect(done == case.steps[: len(done)], f"steps out of order: {done}")
        where = case.steps[len(done)] if len(done) < len(case.steps) else "saving"
        begun = run_directory(output).exists()
        where = where if begun else "before the run's directory"
        again = time.monotonic()
        expect(case.wait(case.start(output)) == 0, f"going on failed: {where}")
        case.seconds = 0.7 * case.seconds + 0.3 * (spent + time.monotonic() - again)
        # Every step is in the log once; one whose record came just before the end may lack.
        logged = Counter(log_of(output))
        repeated = [s for s in case.steps if logged[s] > 1]
        missing = [s for s in case.steps if logged[s] == 0]
        expect(not repeated and len(missing) <= 1, f"{where}: again {repeated}, not {missing}")
        expect(set(missing) <= set(done[-1:]), f"{where}: {missing} not done")
    if status != 0 and run_directory(output).exists():
        expect(case.wait(case.start(output)) == 0, f"clearing up failed: {where}")
    hidden = output.with_name(f".{run_directory(output).name}.ended")
    if where == "clearing up" and hidden.exists():
        # Half removed: there is no run to go on with, and the next one to this output removes it.
        expect(case.wait(case.start(output)) == FULL, "a finished output was not refused")
    case.check_end(output, str(where))
    shutil.rmtree(output)
    return None if where is None else where.partition("-")[0]


def fill_disks(case: Case, step: int) -> tuple[int, Counter[str]]:
    """Run on file systems of growing size; return the size that sufficed and what failed where."""
    with tempfile.TemporaryDirectory() as name:
        mounted = Path(name) / "disk"
        mounted.mkdir()
        pages, stopped = 1, Counter[str]()
        while True:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "tmpfs", str(mounted)]
            subprocess.run(mount, check=True)
            try:
                output = mounted / "out"
                status = case.wait(case.start(output))
                if status == 0:
                    case.check_end(output, f"{pages} pages")
                    return 4 * pages, stopped
                expect(status == FULL, f"{pages} pages: no clear error but status {status}")
                expect(not output.exists(), f"{pages} pages: an output is there")
                check_whole(mounted)
                done = done_steps(case, output)
                expect(done == case.steps[: len(done)], f"steps out of order: {done}")
                where = case.steps[len(done)] if len(done) < len(case.steps) else "saving"
                stopped[where.partition("-")[0]] += 1
                subprocess.run(["mount", "-o", "remount,size=1g", str(mounted)], check=True)
                expect(case.wait(case.start(output)) == 0, f"{pages} pages: going on failed")
                case.check_end(output, f"{pages} pages")
            finally:
                subprocess.run(["umount", str(mounted)], check=True)
            pages += step


def random_case(folder: Path) -> Case:
    """Return a run of a random model through every phase."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    source = folder / "model"
    cqhf.tiny_model("llama").save_pretrained(source)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(source)
    recipe = Recipe(block_size=16, rounding="qronos")
    tokens = np.random.default_rng(0).integers(0, 128, (3, 48))
    return prepared(source, recipe, tokens)


def given_case(model: Path, text: Path) -> Case:
    """Return a run of a real model, rounded to nearest."""
    recipe = Recipe(block_size=16, samples=2, sequence_length=256)
    tokenizer = cqhf.Source(model).tokenizer()
    tokens = cqhf.token_windows(text.read_text(encoding="utf-8"), tokenizer, 256, 2)
    return prepared(model, recipe, tokens)


def prepared(model: Path, recipe: Recipe, tokens: np.ndarray) -> Case:
    with tempfile.TemporaryDirectory() as name:
        return Case(model, recipe, tokens, Path(name))


def counts(found: Counter[str]) -> str:
    return ", ".join(f"{step} {count}" for step, count in found.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=1e6, help="for kills, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pages", type=int, default=1, help="by which file systems grow")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.model is None:
            case = random_case(folder)
            label = "a random Llama of 2 blocks, qronos"
        else:
            case = given_case(options.model, options.text)
            label = f"{options.model.stem}, rounded to nearest, seed {options.seed}"
        work = folder / "work"
        work.mkdir()
        killed = Counter[str]()
        until = time.monotonic() + 60 * options.minutes
        while killed.total() < options.kills and time.monotonic() < until:
            if (where := kill_one(case, work, generator)) is not None:
                killed[where] += 1
                print(killed.total(), counts(killed), flush=True)
        body = [
            f"- {label}: {killed.total()} of {killed.total()} runs that were killed at random "
            "moments ended in the bytes of an uninterrupted one, repeating no step that was done. "
            f"Killed during: {counts(killed)}.",
        ]
        if options.model is None and os.getuid() == 0:
            size, stopped = fill_disks(case, options.pages)
            total = sum(stopped.values())
            body.append(
                f"- The same on file systems of {total} sizes below {size} KiB, which are full too "
                f"soon: {total} of {total} ended in an OutputError, left whole files only, and "
                f"went on to the same bytes once there was room. Full during: {counts(stopped)}."
            )
    print("\n".join(body))
    if options.write:
        head = ["## Crashes", "", "Written by `bench_crashes.py`.", ""]
        name = "crashes" if options.model is None else f"crashes, seed {options.seed}"
        write_section(name, "\n".join([*(head if options.model is None else []), *body]))


if __name__ == "__main__":
    main()
