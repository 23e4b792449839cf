"""Weights as entropy-coded integers times a scale of their column."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from corequant._cpu.loops.codebooks.ans import LEAST, PRECISION, decode_symbols, encode_symbols
from corequant._validation import check_finite, check_floating, check_numpy
from corequant.errors import CheckpointError, ShapeError
from corequant.rounding.codebooks.coded import (
    CodedWeight,
    Description,
    Tensors,
    check_shape,
    half,
    take_tensor,
    whole,
)
from corequant.rounding.codebooks.streams import pack_stream, stream_bytes, unpack_stream

__all__ = ["LARGEST", "EntropyCoded"]

Array = npt.NDArray[Any]

LARGEST = 2047
"""Largest magnitude of a code."""

_TOTAL = 1 << PRECISION
_WEIGHT_BITS = 6
_WEIGHTS = np.concatenate([[0], np.rint(2.0 ** (np.arange(1, 4 * PRECISION + 1) / 4))])
"""Frequencies that stored numbers stand for, in steps of a quarter of an octave; 0 for none."""

_LEVEL_BITS = 5
_STEPS = 2.0
"""Levels of spread per factor of two: half a step off, a table costs 0.01 bits more."""


@dataclass(frozen=True, eq=False)
class EntropyCoded(CodedWeight):
    """A weight of entropy-coded integers, times a scale for each column.

    The length of a code follows from its frequency, so that the average is close to the entropy,
    which may be any number of bits, even less than one. The table of frequencies depends on the
    spread of the codes in the same row and column.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns.
    codes : numpy.ndarray (rows, columns), int16
        -2047 to 2047.
    scales : numpy.ndarray (columns,), float32
        Float16 numbers times ``2**exponent``.
    row_levels, column_levels : numpy.ndarray (rows,) and (columns,), uint8
        Levels of spread, 0 to 31; the sum of both is the index of a code's table.
    exponent : int

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> codes = np.random.default_rng(0).normal(size=(256, 64)).round().astype(np.int16)
    >>> coded = cq.EntropyCoded.of(codes, np.full(64, 0.5))
    >>> _, counts = np.unique(codes, return_counts=True)
    >>> entropy = -(counts / codes.size * np.log2(counts / codes.size)).sum()
    >>> bool(entropy < coded.bits_per_weight < entropy + 0.4)
    True
    """

    kind: ClassVar[str] = "entropy coded"

    shape: tuple[int, int]
    codes: npt.NDArray[np.int16]
    scales: npt.NDArray[np.float32]
    row_levels: npt.NDArray[np.uint8]
    column_levels: npt.NDArray[np.uint8]
    exponent: int = 0

    @classmethod
    def of(cls, codes: Any, scales: Any) -> EntropyCoded:
        """Choose tables for codes, and round scales to float16.

        Parameters
        ----------
        codes : numpy.ndarray (rows, columns), int16
            -2047 to 2047.
        scales : numpy.ndarray (columns,)

        Raises
        ------
        NonFiniteError, ShapeError, TypeError, ValueError
            If an argument breaks its rule.
        """
        check_numpy("codes", codes)
        if codes.dtype != np.int16:
            raise TypeError(f"codes must be int16, got {codes.dtype}")
        if codes.ndim != 2 or codes.size == 0:
            raise ShapeError(f"codes must be (rows, columns), not empty, got shape {codes.shape}")
        if max(-int(codes.min()), int(codes.max())) > LARGEST:
            raise ValueError(
                f"codes must be -{LARGEST} to {LARGEST}, got {codes.min()} to {codes.max()}"
            )
        check_numpy("scales", scales)
        check_floating("scales", scales)
        if scales.shape != codes.shape[1:]:
            raise ShapeError(
                f"scales must be one for each of {codes.shape[1]} columns, got {scales.shape}"
            )
        check_finite("scales", scales)
        stored, exponent = half(scales)
        squares = np.square(codes.astype(np.float64))
        columns = np.maximum(squares.mean(0), 1e-3)
        rows = np.maximum((squares / columns).mean(1), 1e-3)
        shape = int(codes.shape[0]), int(codes.shape[1])
        levels = _level(rows), _level(columns)
        return cls(shape, codes, whole(stored, exponent), *levels, exponent)

    def rescaled(self, scales: Array) -> EntropyCoded:
        """Return the same codes with other scales (columns,)."""
        return EntropyCoded.of(self.codes, scales)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return the values (rows, columns)."""
        return self.codes.astype(np.float32) * self.scales

    @property
    def nbytes(self) -> int:
        """Bytes of the stream, its tables, levels of spread, and scales."""
        rows, columns = self.shape
        lengths, packed, words = self._coded
        levels = stream_bytes(rows, _LEVEL_BITS) + stream_bytes(columns, _LEVEL_BITS)
        return words.nbytes + packed.nbytes + lengths.nbytes + levels + 2 * columns

    def to_tensors(self) -> dict[str, Array]:
        """Return the stream, its tables, levels of spread, and scales."""
        lengths, packed, words = self._coded
        return {
            "scales": np.ldexp(self.scales, -self.exponent).astype(np.float16),
            "row_levels": pack_stream(self.row_levels, _LEVEL_BITS),
            "column_levels": pack_stream(self.column_levels, _LEVEL_BITS),
            "lengths": lengths,
            "weights": packed,
            "stream": words,
        }

    def describe(self) -> dict[str, Any]:
        """Return shape and exponent."""
        return {"kind": self.kind, "shape": list(self.shape), "exponent": self.exponent}

    @classmethod
    def from_tensors(cls, tensors: Tensors, description: Description) -> EntropyCoded:
        """Return the weight with these tensors and this description."""
        shape, exponent = check_shape(description), description.get("exponent")
        if not isinstance(exponent, int):
            raise CheckpointError(f"exponent must be an integer, got {exponent!r}")
        levels = []
        for name, count in zip(("row_levels", "column_levels"), shape, strict=True):
            packed = take_tensor(tensors, name, np.uint8, stream_bytes(count, _LEVEL_BITS))
            levels.append(unpack_stream(packed, _LEVEL_BITS, count).astype(np.uint8))
        tables = int(levels[0].max()) + int(levels[1].max()) + 1
        lengths = take_tensor(tensors, "lengths", np.uint16, tables).astype(np.int64)
        if lengths.max() > LARGEST + 1:
            raise CheckpointError(f"lengths must be at most {LARGEST + 1}, got {lengths.max()}")
        total = int(lengths.sum())
        packed = take_tensor(tensors, "weights", np.uint8, stream_bytes(total, _WEIGHT_BITS))
        stored = unpack_stream(packed, _WEIGHT_BITS, total).astype(np.int64)
        if total and stored.max() >= len(_WEIGHTS):
            raise CheckpointError(f"weights must be below {len(_WEIGHTS)}, got {stored.max()}")
        frequencies = _frequencies(np.split(stored, np.cumsum(lengths)[:-1]))
        words = tensors.get("stream")
        if words is None or words.dtype != np.uint32 or words.ndim != 1 or len(words) < 2:
            raise CheckpointError("stream must be at least two words of uint32")
        codes = _decoded(words, levels, frequencies, shape)
        scales = whole(take_tensor(tensors, "scales", np.float16, shape[1]), exponent)
        return cls(shape, codes, scales, levels[0], levels[1], exponent)

    @cached_property
    def _coded(self) -> tuple[Array, Array, npt.NDArray[np.uint32]]:
        """Lengths of the tables, their packed contents, and the stream."""
        rows, columns = (v.astype(np.int64) for v in (self.row_levels, self.column_levels))
        tables = int(rows.max()) + int(columns.max()) + 1
        size = 2 * LARGEST + 1
        symbols = self.codes.astype(np.int64) + LARGEST
        flat = (rows[:, None] + columns) * size + symbols
        counts = np.bincount(flat.reshape(-1), minlength=tables * size).reshape(tables, size)
        stored = [_weights(row) for row in counts]
        lengths = np.array([len(row) for row in stored], np.uint16)
        packed = pack_stream(np.concatenate(stored), _WEIGHT_BITS)
        frequencies = _frequencies(stored)
        starts = np.cumsum(frequencies, axis=1) - frequencies
        # A word has 32 bits, a symbol takes at most 14, and the last state takes two words.
        words = np.zeros(symbols.size * PRECISION // 32 + 4, np.uint32)
        used_words = encode_symbols(symbols, rows, columns, frequencies, starts, words)
        return lengths, packed, words[len(words) - used_words :].copy()


def _level(squares: Array) -> npt.NDArray[np.uint8]:
    """Return the levels of spread for mean squares, the smallest as 0."""
    found = np.rint(_STEPS / 2 * np.log2(squares))
    levels: npt.NDArray[np.uint8] = np.minimum(found - found.min(), (1 << _LEVEL_BITS) - 1).astype(
        np.uint8
    )
    return levels


def _weights(counts: Array) -> npt.NDArray[np.int64]:
    """Return the stored form of a table: a number for each magnitude up to the largest in use."""
    both = counts[LARGEST:] + counts[LARGEST::-1]
    used = np.flatnonzero(both)
    if not len(used):
        return np.zeros(0, np.int64)
    both = both[: used[-1] + 1].astype(np.float64)
    # Each sign has half of a magnitude's count, and 0 was counted twice.
    share = both / 2 / counts.sum()
    with np.errstate(divide="ignore"):
        nearest = np.rint(4 * (PRECISION + np.log2(share)))
    return np.where(both > 0, np.clip(nearest, 1, len(_WEIGHTS) - 1), 0).astype(np.int64)


def _frequencies(stored: list[Array]) -> npt.NDArray[np.int64]:
    """Return the frequencies of all codes (tables, K) from the stored form; a table sums to 2**14.

    Both signs of a magnitude have the same frequency, up to the remainder of rounding.
    """
    found = np.zeros((len(stored), 2 * LARGEST + 1), np.int64)
    for table, row in enumerate(stored):
        weights = _WEIGHTS[row].astype(np.int64)
        total = int(2 * weights.sum() - weights[:1].sum())
        if not total:
            continue
        shares = np.maximum(weights * _TOTAL // total, (weights > 0).astype(np.int64))
        own = found[table]
        own[LARGEST : LARGEST + len(row)] = shares
        own[LARGEST - len(row) + 1 : LARGEST + 1] = shares[::-1]
        # The remainder, of either sign, goes to the most frequent codes, where it costs least.
        while (rest := _TOTAL - int(own.sum())) < 0:
            largest = int(own.argmax())
            own[largest] -= min(-rest, int(own[largest]) // 2)
        own[int(own.argmax())] += rest
    return found


def _decoded(
    words: Array, levels: list[Array], frequencies: Array, shape: tuple[int, int]
) -> npt.NDArray[np.int16]:
    """Return the codes of a stream, or raise CheckpointError."""
    rows, columns = (v.astype(np.int64) for v in levels)
    tables = rows[:, None] + columns
    if not frequencies[np.unique(tables)].any(1).all():
        raise CheckpointError("weights must hold frequencies of each table in use, got none of one")
    slots = np.zeros((len(frequencies), _TOTAL), np.int16)
    for table, row in enumerate(frequencies):
        if row.any():
            slots[table] = np.repeat(np.arange(len(row)), row)
    starts = np.cumsum(frequencies, axis=1) - frequencies
    symbols = np.zeros(shape, np.int64)
    first = int(words[0]) << 32 | int(words[1])
    words = np.ascontiguousarray(words)
    broken = not LEAST <= first < LEAST << 32
    if broken or decode_symbols(words, rows, columns, frequencies, starts, slots, symbols):
        raise CheckpointError("stream must end with its last code, got damaged words")
    return (symbols - LARGEST).astype(np.int16)
