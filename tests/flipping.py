"""Single bits flipped in files that were written, and whether whoever reads them notices."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.files.digests import DIGESTS
from corequant_transformers.files.marks import CARD

__all__ = ["Flips", "flip", "outputs"]


@dataclass
class Flips:
    """What became of flipped bits."""

    noticed: int = 0
    harmless: int = 0
    """Of JSON that says the same, such as another white space, or of the model card's digest."""
    files: dict[str, int] = field(default_factory=dict)


def flip(path: Path, read: Callable[[], Any], count: int, seed: int) -> Flips:
    """Flip one bit at a time of a file, or of any file of a directory, and read.

    Raises
    ------
    AssertionError
        If a bit goes unnoticed that may have an effect, or something else than a CorequantError
        is raised.
    """
    generator = random.Random(f"{path.name} {seed}")
    # No reader opens a model card.
    files = sorted(f for f in path.iterdir() if f.name != CARD) if path.is_dir() else [path]
    found = Flips(files={file.name: 0 for file in files})
    for _ in range(count):
        file = generator.choice(files)
        at, bit = generator.randrange(file.stat().st_size), generator.randrange(8)
        found.files[file.name] += 1
        with _flipped(file, at, bit) as same:
            try:
                read()
            except cq.CorequantError:
                found.noticed += 1
            except BaseException as error:
                raise AssertionError(f"bit {bit} of byte {at} of {file.name}: {error!r}") from error
            else:
                assert same, f"bit {bit} of byte {at} of {file.name} went unnoticed"
                found.harmless += 1
    return found


@contextmanager
def _flipped(file: Path, at: int, bit: int) -> Iterator[bool]:
    """Flip a bit for a while, and tell whether the file still says the same to who loads it."""
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ (1 << bit)]))
    try:
        data = file.read_bytes()
        changed = data if file.suffix == ".json" else b""
        good = changed[:at] + bytes([byte]) + changed[at + 1 :]
        try:
            same = bool(changed) and json.loads(changed) == json.loads(good)
        except ValueError:
            same = False
        yield same or (file.name == DIGESTS and _is_of_card(data, at, byte))
    finally:
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(bytes([byte]))


def _is_of_card(data: bytes, at: int, byte: int) -> bool:
    """Return whether a byte, which had another value, is in the line of the model card."""
    good = data[:at] + bytes([byte]) + data[at + 1 :]
    start = good.rfind(b"\n", 0, at) + 1
    line = good[start : good.find(b"\n", at)]
    return at < start + len(line) and line.endswith(f"  {CARD}".encode())


def outputs(folder: Path) -> list[tuple[str, Path, Callable[[], Any]]]:
    """Write a saved directory, exports of it in both layouts, and return what reads each."""
    from tests.models.test_gguf_files import write_model

    source = write_model(folder / "source")
    tokens = np.random.default_rng(0).integers(2, 300, (2, 24))
    saved, own = folder / "saved", folder / "own"
    cqhf.quantize(source, Recipe(block_size=16), tokens, saved)
    offline = Recipe(
        rotation="offline", weights="int8:group32:symmetric:float16", activations="none"
    )
    cqhf.quantize(source, offline, tokens, own)
    online = folder / "rotated"
    weights_only = Recipe(block_size=16, weights="int4:group32", activations="none")
    cqhf.quantize(source, weights_only, tokens, folder / "online")
    cqhf.export(folder / "online", online)
    file = cqhf.export(own, folder / "model.gguf", "gguf")
    return [
        ("saved directory", saved, lambda: cqhf.load(saved)),
        ("export, compressed-tensors", online, lambda: cqhf.Source(online).load()),
        ("export, GGUF", file, lambda: cqhf.Source(file).load()),
    ]
