"""Token windows of documents: one after the other, or drawn at random."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index
from corequant.errors import CalibrationError
from corequant.recipe import SAMPLINGS
from corequant_transformers.calibration.data.documents import Documents
from corequant_transformers.calibration.data.formats import Document
from corequant_transformers.calibration.data.separators import Separators, tokenize

__all__ = ["Sample", "sample_windows"]

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sample:
    """Token windows and their origin.

    Attributes
    ----------
    tokens : numpy.ndarray (windows, length), int64
    documents : Documents
    sampling : str
    seed : int
        Seed of the draw; it has no part in consecutive windows.
    used : int
        Documents of which the windows hold tokens.
    tokens_read : int
        Tokens of the documents that were read until the windows were full, all of them where every
        window was asked for; separators are not among them.
    separators : int
        Tokens between documents in what the windows were cut from.
    separator : str
        Those between two texts, as the tokenizer writes them; empty where there are no two.
    """

    tokens: Tokens
    documents: Documents
    sampling: str
    seed: int
    used: int
    tokens_read: int
    separators: int
    separator: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        windows, length = self.tokens.shape
        return {
            **self.documents.to_dict(),
            "sampling": self.sampling,
            "seed": self.seed,
            "windows": windows,
            "sequence_length": length,
            "documents_used": self.used,
            "tokens_read": self.tokens_read,
            "separators": self.separators,
            "separator": self.separator,
        }


def sample_windows(
    documents: Documents,
    tokenizer: Any,
    sequence_length: int,
    windows: int | None = None,
    *,
    sampling: str = "consecutive",
    seed: int = 0,
) -> Sample:
    """Take token windows from documents.

    Parameters
    ----------
    documents : Documents
        As ``read_documents`` returns.
    tokenizer : transformers tokenizer
        Conversations go through its chat template.
    sequence_length : int
        Tokens per window.
    windows : int, optional
        Number of windows; all by default.
    sampling : {"consecutive", "random"}
        ``consecutive`` joins the documents in their order, with separators between them, and cuts
        the tokens into windows; a single document is cut as ``token_windows`` cuts its text.
        ``random`` goes through the documents in an order drawn by the seed: one that fills a window
        gives one at a random place, shorter ones are joined, with separators, until they fill one.
        Where every document has had its turn, long ones give further windows, none of which
        overlap.
    seed : int
        Seed of the draw.

    Returns
    -------
    Sample

    Raises
    ------
    CalibrationError
        If the documents don't fill the windows, or hold conversations that the tokenizer has no
        template for.

    Notes
    -----
    Between texts stand the special tokens that the tokenizer itself adds at the end of a text and
    at the beginning of the next, or its end-of-text token where it adds none: what language models
    saw between documents in training. No window begins with a special token of its own, and
    attention crosses separators, as in packed training data.

    Examples
    --------
    >>> import pathlib, tempfile, corequant_transformers as cqhf
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("a.txt", "b.txt"):
    ...         _ = pathlib.Path(folder, name).write_text(name[0] * 5)
    ...     documents = cqhf.read_documents(folder)
    >>> class Letters:
    ...     eos_token_id = 0
    ...     def __call__(self, text, **options):
    ...         return {"input_ids": [ord(c) - 96 for c in text]}
    ...     def decode(self, ids):
    ...         return "".join(chr(96 + i) for i in ids)
    >>> cqhf.sample_windows(documents, Letters(), 11).tokens
    array([[1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2]])
    """
    length = check_index("sequence_length", sequence_length, 2)
    wanted = None if windows is None else check_index("windows", windows)
    if sampling not in SAMPLINGS:
        raise CalibrationError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    stream = _Stream(documents, tokenizer, length)
    if sampling == "consecutive":
        found = stream.consecutive(wanted)
    else:
        found = stream.drawn(wanted, check_index("seed", seed, 0))
    if not found:
        raise CalibrationError(
            f"the text must fill one window of sequence_length={length} tokens, got {stream.all}"
        )
    if wanted is not None and len(found) < wanted:
        raise CalibrationError(
            f"the text must fill {wanted} windows of {length} tokens, it has {stream.all} tokens "
            f"and fills {len(found)}; give more text, or take fewer or shorter windows"
        )
    taken = np.stack(found[:wanted])
    between = stream.separators.between(Document(), []) if len(documents) > 1 else []
    return Sample(
        np.ascontiguousarray(taken[:, 0]),
        documents,
        sampling,
        seed,
        len(np.unique(taken[:, 1][taken[:, 1] >= 0])),
        stream.read,
        stream.between,
        tokenizer.decode(between) if between else "",
    )


class _Stream:
    """Documents as tokens, each with the index of its document; separators have -1.

    Arrays are (2, length): tokens and indices.
    """

    def __init__(self, documents: Documents, tokenizer: Any, length: int) -> None:
        self.documents, self.tokenizer, self.length = documents.entries, tokenizer, length
        self.read = self.between = 0
        self._rest = np.empty((2, 0), np.int64)
        self._last: int | None = None

    @functools.cached_property
    def separators(self) -> Separators:
        """Separator between documents, determined if there are several."""
        return Separators(self.tokenizer)

    @property
    def all(self) -> int:
        """Tokens in all, separators among them."""
        return self.read + self.between

    def consecutive(self, wanted: int | None) -> list[Tokens]:
        """Return windows of all documents joined in their order."""
        found: list[Tokens] = []
        for index in range(len(self.documents)):
            found += self._join(index, self._tokens(index))
            if wanted is not None and len(found) >= wanted:
                break
        return found

    def drawn(self, wanted: int | None, seed: int) -> list[Tokens]:
        """Return windows of documents in a random order."""
        generator = np.random.default_rng([seed, *b"windows"])
        found: list[Tokens] = []
        further: list[Iterator[Tokens]] = []
        for index in generator.permutation(len(self.documents)).tolist():
            ids = self._tokens(index)
            if len(ids) < self.length:
                found += self._join(index, ids)
            else:
                pieces = self._pieces(_owned(ids, index), generator)
                found.append(next(pieces))
                further.append(pieces)
            if wanted is not None and len(found) >= wanted:
                break
        # Every document has had its turn; long ones give more, one window each in a round.
        for round in itertools.zip_longest(*further):
            found += [piece for piece in round if piece is not None]
            if wanted is not None and len(found) >= wanted:
                break
        return found

    def _tokens(self, index: int) -> list[int]:
        ids = tokenize(self.documents[index], self.tokenizer)
        self.read += len(ids)
        return ids

    def _join(self, index: int, ids: list[int]) -> list[Tokens]:
        """Put a document after those before it; return the windows that are full with it."""
        if not ids:
            return []
        between: list[int] = []
        if self._last is not None:
            between = self.separators.between(self.documents[self._last], ids)
        self.between += len(between)
        self._last = index
        joined = np.concatenate([self._rest, _owned(between, -1), _owned(ids, index)], axis=1)
        full = joined.shape[1] // self.length * self.length
        self._rest = joined[:, full:]
        return [joined[:, k : k + self.length] for k in range(0, full, self.length)]

    def _pieces(self, document: Tokens, generator: np.random.Generator) -> Iterator[Tokens]:
        """Yield windows of one document, in a random order, none overlapping another."""
        count, spare = divmod(document.shape[1], self.length)
        start = int(generator.integers(spare + 1))
        for place in (start + self.length * generator.permutation(count)).tolist():
            yield document[:, place : place + self.length]


def _owned(ids: list[int], index: int) -> Tokens:
    return np.array([ids, [index] * len(ids)], np.int64).reshape(2, -1)
