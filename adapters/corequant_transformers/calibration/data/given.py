"""Token windows from the texts, files and arrays that the public functions accept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index
from corequant.errors import CalibrationError
from corequant.recipe import Recipe
from corequant_transformers.calibration.choices import Calibration
from corequant_transformers.calibration.data.documents import (
    DataFile,
    Documents,
    carried_documents,
    read_documents,
)
from corequant_transformers.calibration.data.formats import Document
from corequant_transformers.calibration.data.windows import Sample, sample_windows
from corequant_transformers.model.forward import check_tokens

__all__ = [
    "CalibrationData",
    "Taken",
    "TextData",
    "needs_tokenizer",
    "take_windows",
    "text_windows",
]

Tokens = npt.NDArray[np.int64]
TextData = str | Path | Sequence[Path] | Documents | Sample | npt.NDArray[Any]
CalibrationData = TextData | Calibration | None


@dataclass(frozen=True, eq=False)
class Taken:
    """Token windows to calibrate on.

    Attributes
    ----------
    tokens : numpy.ndarray (windows, length), int64
    data : mapping
        What they were taken from, for the report.
    calibration : Calibration, optional
        What was given, if it holds statistics already.
    """

    tokens: Tokens
    data: Mapping[str, Any]
    calibration: Calibration | None = None


def needs_tokenizer(calibration: CalibrationData) -> bool:
    """Return whether the input is text that must be tokenized."""
    return not isinstance(calibration, Sample | Calibration) and (
        calibration is None or _documents(calibration) or isinstance(calibration, str)
    )


def take_windows(calibration: CalibrationData, recipe: Recipe, tokenizer: Any = None) -> Taken:
    """Return the token windows that a recipe takes from calibration data.

    Parameters
    ----------
    calibration : str, Path, sequence of Path, Documents, Sample, array or Calibration, optional
        Text, files or folders, what was read or sampled from them, token windows, or statistics;
        the text that the package carries by default.
    recipe : Recipe
    tokenizer : transformers tokenizer, optional
        Needed for everything that is text.

    Raises
    ------
    CalibrationError
        If files can't be read, or there is too little text, or token windows have a wrong shape.
    """
    if isinstance(calibration, Calibration):
        tokens = check_tokens(calibration.tokens)
        return Taken(tokens, calibration.data or _shape(tokens), calibration)
    if isinstance(calibration, Sample):
        return Taken(calibration.tokens, calibration.to_dict())
    if not needs_tokenizer(calibration):
        tokens = check_tokens(calibration)
        return Taken(tokens, _shape(tokens))
    how = {"sampling": recipe.sampling, "seed": recipe.seed}
    sample = _sample(calibration, tokenizer, recipe.sequence_length, recipe.samples, **how)
    return Taken(sample.tokens, sample.to_dict())


def text_windows(
    text: TextData, tokenizer: Any, sequence_length: int, windows: int | None = None
) -> Tokens:
    """Return consecutive token windows of a text: all, or the first.

    Parameters
    ----------
    text : str, Path, sequence of Path, Documents, Sample or numpy.ndarray (windows, length)
    tokenizer : transformers tokenizer or None
        Needed for everything that is text.
    sequence_length : int
        Tokens per window, where they are yet to be made.
    windows : int, optional

    Returns
    -------
    numpy.ndarray (windows, length), int64

    Raises
    ------
    CalibrationError
        If files can't be read, or there is too little text, or token windows have a wrong shape.
    """
    if text is None:
        raise CalibrationError("text must be text, files or token windows, got None")
    if needs_tokenizer(text):
        return _sample(text, tokenizer, sequence_length, windows).tokens
    tokens = check_tokens(text.tokens if isinstance(text, Sample) else text)
    return tokens if windows is None else tokens[: check_index("windows", windows)]


def _sample(text: Any, tokenizer: Any, length: int, windows: int | None, **how: Any) -> Sample:
    if tokenizer is None:
        why = "with text" if text is not None else "to calibrate on the built-in text"
        raise TypeError(f"tokenizer must be given {why}, got None")
    return sample_windows(_read(text), tokenizer, length, windows, **how)


def _documents(calibration: Any) -> bool:
    """Return whether it is files, or documents read from them; a list of strings is an error."""
    if isinstance(calibration, Documents | Path):
        return True
    if not isinstance(calibration, list | tuple) or not calibration:
        return False
    if any(isinstance(entry, str | Path) for entry in calibration):
        for entry in calibration:
            if not isinstance(entry, Path):
                kind = type(entry).__name__
                raise TypeError(
                    "calibration data must be a string of text, or Paths of files and folders, got "
                    f"a {type(calibration).__name__} with the {kind} {str(entry)[:40]!r}"
                )
        return True
    return False


def _read(calibration: Any) -> Documents:
    if calibration is None:
        return carried_documents()
    if isinstance(calibration, Documents):
        return calibration
    if not isinstance(calibration, str):
        return read_documents(calibration)
    if not calibration.strip():
        raise CalibrationError("the text must not be empty, got only white space")
    if _names_file(calibration):
        raise CalibrationError(
            f"text must not be the path of an existing file, got {calibration!r}; to read that "
            f"file, pass Path({calibration!r})"
        )
    whole = Document(calibration, place="the text")
    return Documents((whole,), (DataFile("a text in memory", "text", 1, 0),))


def _names_file(text: str) -> bool:
    try:
        return len(text) < 1024 and Path(text).exists()
    except (OSError, ValueError):
        return False


def _shape(tokens: Tokens) -> dict[str, Any]:
    windows, length = tokens.shape
    return {"files": [], "windows": windows, "sequence_length": length}
