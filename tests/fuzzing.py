"""Mutated files of every kind that is read, and what may come of them: a value or a typed error."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant.storage.tensor_file import TensorFile, parse_header
from corequant_transformers.checkpoint.reader import Stored
from corequant_transformers.model.parts import skeleton
from corequant_transformers.model.sources import Source

__all__ = ["Found", "Target", "fuzz", "targets"]

SECONDS = 2.0
"""Longer than this, one file counts as a hang; the median is below a millisecond."""

MEMORY = 2**29
"""Bytes that reading damaged files may take beyond what the process has."""

NUMBERS = (0, -1, 1, 2, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**12, 10**40, 0.5, 1e400, -1e308)
TEXTS = ("", "x", "\0", "../x", "/etc/passwd", "é" * 50, "9" * 5000, "nan", "{}", "int4", "F32")
PIECES = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"=", b"\n", b"1e999", b"-", b"null", b"\xff")
DEEP = 3000


@dataclass(frozen=True)
class Target:
    """A kind of file: a good one, whether it is JSON, and what reads it."""

    name: str
    good: bytes
    structured: bool
    read: Callable[[bytes], Any]
    share: int
    """Of every hundred files."""


@dataclass
class Found:
    """What reading files came to."""

    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    """Seconds of processor time."""


def fuzz(target: Target, count: int, seed: int) -> Found:
    """Read mutated files; anything but a value or a CorequantError is an AssertionError."""
    generator = random.Random(f"{target.name} {seed}")
    found = Found()
    values = json.loads(target.good) if target.structured else None
    with _limits():
        for k in range(count):
            data = _mutate(target.good, values, generator)
            begun = time.process_time()
            try:
                with _alarm():
                    target.read(data)
                found.read += 1
            except cq.CorequantError:
                found.refused += 1
            except BaseException as error:
                raise AssertionError(
                    f"{target.name} {k} of seed {seed}: {type(error).__name__}: {error}; "
                    f"{data[:2000]!r}"
                ) from error
            found.slowest = max(found.slowest, time.process_time() - begun)
    return found


def targets(folder: Path) -> list[Target]:
    """Return all kinds of files, with good ones in ``folder`` that each is tried beside."""
    model, quantized = folder / "model", folder / "quantized"
    cqhf.tiny_model("llama").save_pretrained(model, max_shard_size="60KB")
    moe = folder / "experts"
    cqhf.tiny_model("qwen3_moe").save_pretrained(moe)
    tokens = np.random.default_rng(0).integers(0, 128, (2, 32))
    recipe = Recipe(block_size=16)
    cqhf.quantize(cqhf.tiny_model("llama"), recipe, tokens, quantized)
    tensors = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int8)})

    def header(data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        parse_header(data[8 : 8 + min(length, len(data))], len(data) - 8 - length)

    def beside(file: Path, read: Callable[[], Any]) -> Callable[[bytes], Any]:
        def write_and_read(data: bytes) -> None:
            file.write_bytes(data)
            read()

        return write_and_read

    def plan(path: Path) -> Callable[[], Any]:
        return lambda: cqhf.plan(path, recipe).cost()

    def header_values(data: bytes) -> None:
        parse_header(data, 27)

    def open_shards(path: Path) -> Callable[[], Any]:
        # Reading headers gives the skeleton nothing, so that one is enough.
        bare, table = skeleton(Source(path).config()), cqhf.plan(path, recipe)
        return lambda: Source(path).weights(bare, table)

    def weights() -> None:
        file = TensorFile(folder / "x")
        for name in file.names:
            file.read(name).array()

    index = model / "model.safetensors.index.json"
    shard = sorted(f.name for f in model.glob("*.safetensors"))[0]
    for name, origin in (
        ("shards", model), ("indexed", model), ("configured", model),
        ("stored", quantized), ("kept", quantized),
    ):  # fmt: skip
        _link(origin, folder / name)
    rows = [
        ("header", tensors, False, header, 30),
        ("header's values", tensors[8:-27], True, header_values, 15),
        ("file of tensors", tensors, False, beside(folder / "x", weights), 10),
        (
            "shard",
            (model / shard).read_bytes(),
            False,
            beside(folder / "shards" / shard, open_shards(folder / "shards")),
            5,
        ),
        ("index", index.read_bytes(), True, beside(folder / "indexed" / index.name,
            open_shards(folder / "indexed")), 10),
        ("recipe", Recipe(block_size=(16, 32)).to_toml().encode(), False,
            lambda data: Recipe.from_toml(data.decode("utf-8", "replace")), 15),
        ("recipe's values", json.dumps(recipe.to_dict()).encode(), True, _recipe_values, 5),
        ("config", (model / "config.json").read_bytes(), True,
            beside(folder / "configured" / "config.json", plan(folder / "configured")), 4),
        ("config of experts", (moe / "config.json").read_bytes(), True,
            beside(moe / "config.json", plan(moe)), 3),
        ("quantized config", (quantized / "config.json").read_bytes(), True,
            beside(folder / "stored" / "config.json", lambda: Stored(folder / "stored")), 1),
        ("float config", (quantized / "float_config.json").read_bytes(), True,
            beside(folder / "kept" / "float_config.json", lambda: Stored(folder / "kept")), 2),
    ]  # fmt: skip
    return [Target(*row) for row in rows]


def _link(origin: Path, folder: Path) -> None:
    """Copy a directory, so that one of its files can be damaged."""
    folder.mkdir()
    for file in origin.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def _recipe_values(data: bytes) -> Recipe:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise cq.RecipeError("not JSON") from None
    return Recipe.from_dict(values)


def _mutate(good: bytes, values: Any, generator: random.Random) -> bytes:
    if values is not None and generator.random() < 0.7:
        changed = json.loads(good)
        for _ in range(generator.choice((1, 1, 1, 2, 3))):
            changed = _replace(changed, generator)
        text = json.dumps(changed)
        if generator.random() < 0.05:
            text = text.replace("null", "[" * DEEP, 1)
        return text.encode()
    data = bytearray(good)
    # Most of what is in a header lies at the beginning of a file.
    reach = len(data) if generator.random() < 0.5 else min(len(data), 400)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        if not data:
            break
        at, kind = generator.randrange(min(reach, len(data))), generator.randrange(6)
        if kind == 0:
            data[at] = generator.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 2:
            del data[at : at + generator.randint(1, 40)]
        elif kind == 3:
            data[at:at] = generator.choice(PIECES)
        elif kind == 4:
            data[at:at] = str(generator.choice(NUMBERS)).encode()
        else:
            stretch = data[at : at + generator.randint(1, 60)]
            data[at:at] = stretch * generator.randint(1, 3)
    if generator.random() < 0.01:
        del data[generator.randrange(len(data) + 1) :]
    return bytes(data)


def _replace(value: Any, generator: random.Random) -> Any:
    """Return a JSON value with something inside it changed."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        changed, key = dict(value), generator.choice(list(value))
        kind = generator.randrange(8)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[generator.choice(TEXTS)] = changed.pop(key)
        else:
            changed[key] = _replace(value[key], generator)
        return changed
    if isinstance(value, list) and value and generator.random() < 0.5:
        position = generator.randrange(len(value))
        return [*value[:position], _replace(value[position], generator), *value[position:]]
    if isinstance(value, int) and not isinstance(value, bool) and generator.random() < 0.3:
        return value + generator.choice((-1, 1, value, -2 * value))
    return generator.choice(
        (
            None, True, False, [], {}, [[]], {"x": 1}, [1] * 50, "yes",
            *generator.sample(NUMBERS, 4), *generator.sample(TEXTS, 4),
        )
    )  # fmt: skip


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError(f"reading took more than {SECONDS} s")

    if not hasattr(signal, "setitimer"):
        # What hangs there hangs; what is slow is still seen.
        used = time.process_time()
        yield
        if time.process_time() - used > SECONDS:
            ring()
        return
    before = signal.signal(signal.SIGALRM, ring)
    # Of this process's own time: others may keep it waiting.
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    used = time.process_time()
    try:
        yield
        if time.process_time() - used > SECONDS:
            ring()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _limits() -> Iterator[None]:
    """Have the system refuse memory beyond a little more than what is in use, if it can."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[5]) * resource.getpagesize()
    except (ModuleNotFoundError, FileNotFoundError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
