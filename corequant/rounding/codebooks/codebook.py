"""Weights as indexes of levels: a codebook for each row, column or group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from corequant._cpu.loops.codebooks.labels import label_entries
from corequant._cpu.threads import for_rows
from corequant._validation import (
    check_divides,
    check_index,
    check_matrix,
    check_numpy,
    working_dtype,
)
from corequant.errors import CheckpointError, ShapeError, SpecError
from corequant.rounding.codebooks.coded import (
    CodedWeight,
    Description,
    Tensors,
    check_shape,
    check_values,
    check_weight,
    half,
    take_tensor,
    whole,
)
from corequant.rounding.codebooks.levels import kmeans_levels
from corequant.rounding.codebooks.streams import (
    bits_for,
    pack_stream,
    stream_bytes,
    unpack_stream,
)

__all__ = ["AXES", "MOST_BITS", "Codebook", "check_choices", "check_widths"]

Array = npt.NDArray[Any]

AXES = ("row", "column", "group")
"""Units of a weight that can have a codebook each."""

MOST_BITS = 8
"""Largest width of an index."""


@dataclass(frozen=True, eq=False)
class Codebook(CodedWeight):
    """A weight whose rows, columns or groups have levels of their own.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns.
    axis : str
        Unit that has a codebook: ``"row"``, ``"column"``, or ``"group"``, a run of ``group_size``
        columns of a row.
    widths : numpy.ndarray (entries,), uint8
        Bits of an index, 0 to 8, for each entry, that is, each row, column or group (groups in
        row-major order).
    levels : numpy.ndarray (entries, 2**max(widths)), float32
        Levels in ascending order, float16 numbers times ``2**exponent``. Only the first
        ``2**width`` of an entry are used.
    labels : numpy.ndarray (rows, columns), uint8
        Index of each weight's level.
    exponent : int
    group_size : int or None
        Columns of a group; None unless the axis is ``"group"``.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.0, 1.0, 0.1, 0.9], [5.0, 5.0, 7.0, 7.0]])
    >>> coded = cq.Codebook.fit(W, 1)
    >>> coded.dequantize().round(2)
    array([[0.05, 0.95, 0.05, 0.95],
           [5.  , 5.  , 7.  , 7.  ]], dtype=float32)
    >>> coded.nbytes  # a byte of labels, and four levels
    9
    """

    kind: ClassVar[str] = "codebook"

    shape: tuple[int, int]
    axis: str
    widths: npt.NDArray[np.uint8]
    levels: npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint8]
    exponent: int = 0
    group_size: int | None = None

    @classmethod
    def of(
        cls,
        W: Any,
        levels: Any,
        widths: Any,
        *,
        axis: str = "row",
        group_size: int | None = None,
    ) -> Codebook:
        """Assign each weight to the nearest level of its entry, after rounding levels to float16.

        Parameters
        ----------
        W : numpy.ndarray (rows, columns)
            Floating.
        levels : numpy.ndarray (entries, K)
            Levels in ascending order; only the first ``2**width`` of an entry are used.
        widths : int or numpy.ndarray (entries,)
            Bits of an index, 0 to 8.
        axis, group_size
            See the attributes.

        Raises
        ------
        BlockSizeError, NonFiniteError, ShapeError, SpecError, TypeError, ValueError
            If an argument breaks its rule.
        """
        W = check_weight("W", W)
        entries = _entries(W.shape, axis, group_size)
        widths = check_widths("widths", widths, entries)
        levels = check_matrix("levels", levels)
        most = 1 << int(widths.max(initial=0))
        if levels.shape[0] != entries or levels.shape[1] < most:
            raise ShapeError(
                f"levels must be ({entries}, {most}) or wider for {axis}s of W {W.shape}, "
                f"got {levels.shape}"
            )
        used = np.arange(most) < (1 << widths.astype(np.int64))[:, None]
        levels = np.where(used, levels[:, :most], 0)
        if (np.diff(levels, axis=1)[used[:, 1:]] < 0).any():
            raise ValueError("levels must ascend in each entry")
        stored, exponent = half(levels)
        shape = int(W.shape[0]), int(W.shape[1])
        none = np.zeros(shape, np.uint8)
        book = cls(shape, axis, widths, whole(stored, exponent), none, exponent, group_size)
        return book.encode(W)

    @classmethod
    def fit(
        cls,
        W: Any,
        widths: Any,
        *,
        weights: Any = None,
        axis: str = "row",
        group_size: int | None = None,
    ) -> Codebook:
        """Quantize a weight to the levels of least weighted squared error for each entry.

        Parameters
        ----------
        W : numpy.ndarray (rows, columns)
            Floating and finite.
        widths : int or numpy.ndarray (entries,)
            Bits of an index, 0 to 8.
        weights : numpy.ndarray (columns,) or (rows, columns), optional
            Non-negative weights of the squared errors; equal by default.
        axis, group_size
            See the attributes.

        Raises
        ------
        BlockSizeError, NonFiniteError, ShapeError, SpecError, TypeError, ValueError
            If an argument breaks its rule.
        """
        W = check_weight("W", W)
        entries = _entries(W.shape, axis, group_size)
        widths = check_widths("widths", widths, entries)
        values = _by_entry(W, axis, group_size)
        counts = None
        if weights is not None:
            if check_numpy("weights", weights).shape not in (W.shape, W.shape[1:]):
                raise ShapeError(f"weights must be {W.shape} or {W.shape[1:]}, got {weights.shape}")
            counts = _by_entry(np.broadcast_to(weights, W.shape), axis, group_size)
        levels = np.zeros((entries, 1 << int(widths.max())))
        for width in np.unique(widths):
            chosen = np.flatnonzero(widths == width)
            size = 1 << int(width)
            own = None if counts is None else counts[chosen]
            levels[chosen, :size] = kmeans_levels(values[chosen], own, size)
        return cls.of(W, levels, widths, axis=axis, group_size=group_size)

    def encode(self, values: Array) -> Codebook:
        """Return a codebook with the same levels and the labels nearest to ``values``.

        Raises
        ------
        NonFiniteError, ShapeError, TypeError
            If the values are invalid or have another shape.
        """
        values = check_values("values", values, self.shape)
        found = self._label(_by_entry(values, self.axis, self.group_size), slice(None))
        labels = _from_entries(found, self.shape, self.axis)
        return replace(self, labels=np.ascontiguousarray(labels))

    def enter_block(self, columns: Array, values: Array, curvature: Array) -> None:
        """Do nothing: the levels are already chosen."""

    def quantize_column(self, w: Array, j: int) -> Array:
        """Return the levels for column j that are nearest to ``w`` (rows,), in the dtype of w."""
        part: slice | list[int]
        if self.axis == "column":
            part = [j]
            w = w[None, :]
        else:
            groups = 1 if self.group_size is None else self.shape[1] // self.group_size
            part = slice(0 if self.group_size is None else j // self.group_size, None, groups)
            w = w[:, None]
        labels = self._label(w, part)
        taken: Array = np.take_along_axis(self.levels[part], labels.astype(np.intp), axis=1)
        return taken.reshape(-1).astype(w.dtype)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return the values (rows, columns)."""
        labels = _by_entry(self.labels, self.axis, self.group_size)
        found = np.take_along_axis(self.levels, labels.astype(np.intp), axis=1)
        return np.ascontiguousarray(_from_entries(found, self.shape, self.axis))

    @property
    def nbytes(self) -> int:
        """Bytes of labels, levels, and widths where they differ."""
        length = math.prod(self.shape) // max(1, len(self.widths))
        distinct, counts = np.unique(self.widths, return_counts=True)
        pairs = [(int(w), int(n)) for w, n in zip(distinct, counts, strict=True)]
        labels = sum(stream_bytes(n * length, w) for w, n in pairs)
        levels = sum(n * 2 << w for w, n in pairs)
        return labels + levels + stream_bytes(len(self.widths), bits_for(len(pairs)))

    def to_tensors(self) -> dict[str, Array]:
        """Return labels by width, levels entry by entry, and which width an entry has."""
        distinct = np.unique(self.widths)
        labels = _by_entry(self.labels, self.axis, self.group_size)
        tensors: dict[str, Array] = {}
        for width in distinct:
            if width:
                chosen = labels[self.widths == width].reshape(-1)
                tensors[f"labels.{width}"] = pack_stream(chosen, int(width))
        stored = np.ldexp(self.levels, -self.exponent).astype(np.float16)
        tensors["levels"] = stored[_used(self.widths)]
        if len(distinct) > 1:
            index = np.searchsorted(distinct, self.widths)
            tensors["widths"] = pack_stream(index, bits_for(len(distinct)))
        return tensors

    def describe(self) -> dict[str, Any]:
        """Return shape, axis, group size, exponent and the widths in use."""
        said = {
            "kind": self.kind,
            "shape": list(self.shape),
            "axis": self.axis,
            "exponent": self.exponent,
            "widths": [int(w) for w in np.unique(self.widths)],
        }
        return said if self.group_size is None else {**said, "group_size": self.group_size}

    @classmethod
    def from_tensors(cls, tensors: Tensors, description: Description) -> Codebook:
        """Return the weight of which these are the tensors and the description."""
        shape = check_shape(description)
        axis, group_size = description.get("axis", ""), description.get("group_size")
        distinct, exponent = description.get("widths"), description.get("exponent")
        if not isinstance(exponent, int) or not isinstance(distinct, list) or not distinct:
            raise CheckpointError(
                f"a codebook's exponent must be an integer and its widths a list, got {exponent!r} "
                f"and {distinct!r}"
            )
        try:
            entries = _entries(shape, axis, group_size)
            table = check_widths("widths", np.array(distinct), len(distinct))
        except (SpecError, TypeError, ValueError) as error:
            raise CheckpointError(f"not the description of a codebook: {error}") from error
        widths = np.repeat(table[:1], entries)
        if len(table) > 1:
            width = bits_for(len(table))
            packed = take_tensor(tensors, "widths", np.uint8, stream_bytes(entries, width))
            index = unpack_stream(packed, width, entries)
            if index.max() >= len(table):
                raise CheckpointError(f"widths must point into {distinct}, got {index.max()}")
            widths = table[index]
        used = _used(widths)
        levels = np.zeros(used.shape, np.float16)
        levels[used] = take_tensor(tensors, "levels", np.float16, int(used.sum()))
        length = math.prod(shape) // entries
        labels = np.zeros((entries, length), np.uint8)
        for width in np.unique(widths):
            chosen = np.flatnonzero(widths == width)
            count = len(chosen) * length
            if width:
                name, size = f"labels.{width}", stream_bytes(count, int(width))
                packed = take_tensor(tensors, name, np.uint8, size)
                codes = unpack_stream(packed, int(width), count)
                labels[chosen] = codes.reshape(len(chosen), length)
        back = np.ascontiguousarray(_from_entries(labels, shape, axis))
        return cls(shape, axis, widths, whole(levels, exponent), back, exponent, group_size)

    @cached_property
    def _middles(self) -> tuple[Array, Array]:
        """Midpoints of neighbouring levels (entries, K-1), and how many of them each entry uses."""
        wide = self.levels.astype(np.float64)
        middles = (wide[:, 1:] + wide[:, :-1]) / 2
        return np.ascontiguousarray(middles), (1 << self.widths.astype(np.int64)) - 1

    def _label(self, values: Array, part: slice | list[int]) -> npt.NDArray[np.uint8]:
        """Return the indexes of the levels nearest to ``values`` (entries, length)."""
        middles, counts = (np.ascontiguousarray(a[part]) for a in self._middles)
        values = np.ascontiguousarray(values, working_dtype(values))
        labels = np.zeros(values.shape, np.uint8)

        def work(first: int, last: int) -> None:
            label_entries(first, last, values, middles, counts, labels)

        for_rows(len(values), values.shape[1], work)
        return labels


def check_widths(name: str, widths: Any, entries: int) -> npt.NDArray[np.uint8]:
    """Return the bits of an index for each entry, uint8 (entries,), after checking them."""
    if not isinstance(widths, np.ndarray):
        width = check_index(name, widths, 0)
        if width > MOST_BITS:
            raise ValueError(f"{name} must be 0 to {MOST_BITS}, got {width}")
        widths = np.full(entries, width)
    if widths.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {widths.dtype}")
    if widths.shape != (entries,):
        raise ShapeError(f"{name} must have one width for each of {entries}, got {widths.shape}")
    if widths.size and (widths.min() < 0 or widths.max() > MOST_BITS):
        raise ValueError(f"{name} must be 0 to {MOST_BITS}, got {widths.min()} to {widths.max()}")
    checked: npt.NDArray[np.uint8] = widths.astype(np.uint8)
    return checked


def check_choices(widths: Sequence[int]) -> tuple[int, ...]:
    """Return the widths to choose from in ascending order, without duplicates."""
    if isinstance(widths, str | bytes) or not isinstance(widths, Iterable):
        raise TypeError(f"widths must be a sequence of integers, got {type(widths).__name__}")
    given = [check_index("widths", width, 0) for width in widths]
    if any(width > MOST_BITS for width in given):
        raise ValueError(f"widths must be 0 to {MOST_BITS}, got {max(given)}")
    if not given:
        raise SpecError("widths must name at least one, got none")
    return tuple(sorted(set(given)))


def _entries(shape: tuple[int, ...], axis: str, group_size: int | None) -> int:
    """Return how many codebooks a weight has."""
    if axis not in AXES:
        raise SpecError(f"axis must be one of {', '.join(AXES)}, got {axis!r}")
    if (axis == "group") != (group_size is not None):
        raise SpecError(f"group_size must be given with axis 'group' alone, got {group_size!r}")
    if group_size is not None:
        size = check_index("group_size", group_size)
        check_divides("group_size", size, shape[1])
        return shape[0] * (shape[1] // size)
    return shape[0] if axis == "row" else shape[1]


def _used(widths: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return which levels of a padded table (entries, K) are in use."""
    counts = 1 << widths.astype(np.int64)
    return np.arange(int(counts.max(initial=1))) < counts[:, None]


def _by_entry(matrix: Array, axis: str, group_size: int | None) -> Array:
    """Return a matrix (rows, columns) with a row for each codebook."""
    if axis == "column":
        return matrix.T
    return matrix if group_size is None else matrix.reshape(-1, group_size)


def _from_entries(matrix: Array, shape: tuple[int, int], axis: str) -> Array:
    """Undo ``_by_entry``."""
    return matrix.T if axis == "column" else matrix.reshape(shape)
