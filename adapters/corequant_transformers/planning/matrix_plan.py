"""Rows of a plan: what happens to one matrix, and to the channels between matrices.

A row says which norm's gain is folded in, how the channels that it reads and writes are permuted
and rotated, whether its input is rotated at run time, and whether it is quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.errors import BlockSizeError, HadamardOrderError
from corequant.recipe import FLOAT, LayerSettings, Recipe
from corequant.rotation import check_block_size
from corequant.rounding import RoundingOptions
from corequant.specs import QuantSpec
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.dimensions import Dimensions

__all__ = [
    "RESIDUAL",
    "MatrixPlan",
    "Region",
    "RowSlice",
    "Side",
    "Stream",
    "check_rotation",
    "inside",
    "plan_stream",
    "reader_rows",
    "regions_of",
]

RESIDUAL = "residual"
"""Name of the residual stream's signs and of its permutation."""


@dataclass(frozen=True)
class Side:
    """Transformations of the channels on one side of a matrix, in the order of the attributes.

    Attributes
    ----------
    centered : bool
        Whether the mean over the channels is subtracted, as a LayerNorm that reads them would.
    permutation : str, optional
        Name of the region whose permutation applies: the matrix that reads it, or the residual
        stream.
    factors : str, optional
        Name of the signs or scales that the activation's channels are multiplied by.
    rotation : int, optional
        Block length of the rotation; None leaves the channels alone.
    heads, repeat : int
        Number of heads, each with a permutation of its own, and how often each one is repeated in a
        row, as keys and values serve several query heads.
    """

    centered: bool = False
    permutation: str | None = None
    factors: str | None = None
    rotation: int | None = None
    heads: int = 1
    repeat: int = 1


@dataclass(frozen=True)
class RowSlice:
    """Consecutive rows of a matrix that holds several projections.

    Attributes
    ----------
    rows : int
        Number of rows; of a matrix with several groups, in all of them.
    output : Side
        What happens to them.
    """

    rows: int
    output: Side = Side()


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix and all that happens to it.

    Attributes
    ----------
    name : str
        Path of its module.
    shape : tuple of int
        (out_features, in_features); an embedding is (vocabulary, hidden), its tokens' vectors
        being rows, so that its ``input`` side is what it writes to the residual stream.
    norm : str, optional
        Path of the norm that it reads, whose gain, and bias if it has one, is folded in where
        rotations are merged. Of an embedding, the norm that reads it.
    own_norm : bool
        Whether no other part reads that norm: it is folded in any case.
    input, output : Side
        What happens to its columns and to its rows.
    online : bool
        Whether the input is rotated at run time rather than by the layer before.
    settings : LayerSettings
        How its weight and its input are quantized; by default they stay in float.
    slices : tuple of RowSlice
        The rows of a matrix with several projections, in order, in place of ``output``.
    groups : int
        Number of groups that these rows are stored in, each with its share of every slice.
    reads : str
        Name of the activation that it reads; matrices with the same name read the same one.
    block, expert : int, optional
        Index of the decoder block and of the expert that it belongs to.
    role : str
        ``embedding``, ``mixer_input``, ``steering``, ``mixer_inner``, ``mixer_output``,
        ``attention_input``, ``attention_inner``, ``attention_output``, ``router``, ``mlp_input``,
        ``mlp_output`` or ``head``.
    """

    name: str
    shape: tuple[int, int]
    norm: str | None = None
    own_norm: bool = False
    input: Side = Side()
    output: Side = Side()
    online: bool = False
    settings: LayerSettings = FLOAT
    slices: tuple[RowSlice, ...] = ()
    groups: int = 1
    reads: str = ""
    block: int | None = None
    expert: int | None = None
    role: str = ""

    @property
    def quantized(self) -> bool:
        """Whether its weight is quantized."""
        return self.settings.weights is not None

    @property
    def weights(self) -> QuantSpec:
        """Quantizer of its weight, of a matrix that is quantized."""
        if self.settings.weights is None:
            raise ValueError(f"{self.name} must be quantized to have a quantizer")
        return self.settings.weights

    @property
    def activations(self) -> QuantSpec | None:
        """Quantizer of its input at run time; None leaves it in float."""
        return self.settings.activations

    @property
    def options(self) -> RoundingOptions:
        """How its weight is rounded."""
        return self.settings.options

    @property
    def row_slices(self) -> tuple[RowSlice, ...]:
        """The slices, or the whole matrix as one."""
        return self.slices or (RowSlice(self.shape[0], self.output),)

    def sliced_rows(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Return the indices of each slice's rows."""
        shares = [rows.rows // self.groups for rows in self.row_slices]
        starts = np.cumsum([0, *shares])
        first = np.arange(self.groups)[:, None] * starts[-1]
        pairs = zip(starts, shares, strict=False)
        return tuple((first + start + np.arange(share)).reshape(-1) for start, share in pairs)

    @property
    def region(self) -> str | None:
        """Name of the region that the input belongs to; None where it is not worth measuring."""
        if not self.quantized or self.role in ("embedding", "head"):
            return None
        own = self.role == "mlp_output" or self.input.factors == self.name
        return self.input.permutation or (self.name if own else None)


@dataclass(frozen=True)
class Region:
    """Channels that are measured, and permuted or multiplied by factors of their own.

    Attributes
    ----------
    name : str
        The matrix that reads them, or the residual stream.
    readers : tuple of str
        Matrices whose inputs are measured; of several that read the same activation the first.
    width : int
        Channels, counted once where heads repeat.
    side : Side
        What happens to them.
    settings : LayerSettings
        How the matrix that reads them is quantized; of several the first.
    expert : bool
        Whether a single expert reads them.
    """

    name: str
    readers: tuple[str, ...]
    width: int
    side: Side
    settings: LayerSettings
    expert: bool = False

    @property
    def permuted(self) -> bool:
        """Whether a permutation is to be chosen."""
        return self.side.permutation == self.name

    @property
    def factored(self) -> bool:
        """Whether signs or scales of its own are to be chosen."""
        return self.side.factors == self.name and self.name != RESIDUAL


def regions_of(matrices: Iterable[MatrixPlan]) -> tuple[Region, ...]:
    """Return the regions that rows read, in their order."""
    readers: dict[str, list[MatrixPlan]] = {}
    for matrix in matrices:
        if matrix.region is not None:
            readers.setdefault(matrix.region, []).append(matrix)
    return tuple(_region(name, found) for name, found in readers.items())


def _region(name: str, readers: list[MatrixPlan]) -> Region:
    seen: dict[str, str] = {}
    for matrix in readers:
        seen.setdefault(matrix.reads or matrix.name, matrix.name)
    first = readers[0]
    width = first.shape[1] // first.input.repeat
    expert = first.expert is not None and first.name == name
    return Region(name, tuple(seen.values()), width, first.input, first.settings, expert)


# ---- the residual stream


def check_rotation(what: str, size: int | None, field: str, width: int) -> int:
    """Return the block length of a rotation of ``width`` channels; None is all of them.

    Raises
    ------
    BlockSizeError, HadamardOrderError
        If that rotation doesn't exist; the message names the config's field.
    """
    try:
        return check_block_size(what, size, width)
    except (BlockSizeError, HadamardOrderError) as error:
        raise type(error)(f"{field}={width} of the model: {error}") from None


@dataclass(frozen=True)
class Stream:
    """The residual stream, as layers see it.

    Attributes
    ----------
    written, final, read : Side
        The stream as it is written, as float layers read it, and as quantized ones do.
    online : bool
        Whether the quantized layers' inputs are rotated at run time.
    notes : tuple of str
        What the architecture prevents, and what is done instead.
    """

    written: Side
    final: Side
    read: Side
    online: bool
    notes: tuple[str, ...] = ()


def plan_stream(a: Architecture, recipe: Recipe, sizes: Dimensions) -> Stream:
    """Decide what happens to the residual stream's channels, as far as the architecture lets it.

    Raises
    ------
    BlockSizeError, HadamardOrderError
        If a rotation doesn't fit the stream's width.
    """
    if recipe.rotation == "heads":
        return Stream(Side(), Side(), Side(), online=False)
    if a.enclosed:
        return _stream_of_enclosed(a, recipe, sizes)
    signs = RESIDUAL if recipe.random_signs else None
    if recipe.rotation != "online":
        width = check_rotation("residual rotation", None, "hidden_size", sizes.hidden)
        side = Side(factors=signs, rotation=width)
        if a.merges:
            return Stream(replace(side, centered=a.subtracts_mean), side, side, online=False)
        # RMSNorm without its gain g commutes with a rotation R, since |x R| = |x|; but (x R) ∘ g is
        # (x ∘ g) R for equal gains only. Signs and permutations are no obstacle.
        plain = Side(factors=signs)
        if recipe.rotation == "offline":
            return Stream(plain, plain, plain, online=False, notes=(_unmerged(a),))
        note = (
            f"{_unmerged(a)}; "
            "the inputs of the layers that read the stream are rotated at run time instead"
        )
        return Stream(plain, plain, side, online=True, notes=(note,))
    block = recipe.block_size if isinstance(recipe.block_size, int) else None
    width = check_rotation("block_size", block, "hidden_size", sizes.hidden)
    permuted = recipe.permutation != "identity" and width < sizes.hidden
    notes: tuple[str, ...] = ()
    if signs and a.subtracts_mean:
        signs = None
        notes = (
            "the residual stream gets no random signs: the LayerNorms keep their place with "
            "rotation 'online', and the mean that they subtract doesn't commute with signs",
        )
    side = Side(permutation=RESIDUAL if permuted else None, factors=signs)
    return Stream(side, side, replace(side, rotation=width), online=True, notes=notes)


def _stream_of_enclosed(a: Architecture, recipe: Recipe, sizes: Dimensions) -> Stream:
    plain = Side()
    why = "the residual stream stays as it is, since what surrounds the blocks is left alone"
    if recipe.rotation == "offline":
        note = f"{why}; the inputs of the layers that read it are not rotated"
        return Stream(plain, plain, plain, online=False, notes=(note,))
    given = recipe.block_size if recipe.rotation == "online" else None
    block = given if isinstance(given, int) else None
    what = "residual rotation" if block is None else "block_size"
    width = check_rotation(what, block, "hidden_size", sizes.hidden)
    note = f"{why}; the inputs of the layers that read it are rotated at run time"
    return Stream(plain, plain, Side(rotation=width), online=True, notes=(note,))


def _unmerged(a: Architecture) -> str:
    if a.residual_normed:
        return (
            "the residual rotation can't be merged: parts add to what their norms give, whose "
            "gains don't commute with a rotation"
        )
    return (
        f"the residual rotation can't be merged: the gains of {' and '.join(a.post_norms)} stand "
        "between the writers and the residual stream and don't commute with a rotation"
    )


# ---- rows of its readers


def inside(path: str, name: str | None) -> str | None:
    """Return the path of a module of a decoder block; None for none."""
    return None if name is None else f"{path}.{name}"


def reader_rows(
    path: str,
    norm: str | None,
    projections: Iterable[tuple[str, RowSlice]],
    recipe: Recipe,
    sizes: Dimensions,
    stream: Stream,
    groups: int = 1,
    **where: Any,
) -> Iterator[MatrixPlan]:
    """Yield rows of linear readers of the stream; those with one path are slices of one matrix.

    Parameters
    ----------
    path : str
        The decoder block's.
    norm : str, optional
        The norm that they read.
    projections : iterable of (str, RowSlice)
    recipe : Recipe
    sizes : Dimensions
    stream : Stream
    groups : int
        Groups that the rows of a matrix with several projections are stored in.
    **where
        Block, role and expert.
    """
    fused: dict[str, list[RowSlice]] = {}
    for name, rows in projections:
        fused.setdefault(name, []).append(rows)
    expert = where.get("expert")
    reads = f"{path}.{where['role']}" + ("" if expert is None else f".{expert}")
    for name, slices in fused.items():
        settings = recipe.settings_of(f"{path}.{name}")
        kept = settings.weights is None
        yield MatrixPlan(
            f"{path}.{name}",
            (sum(each.rows for each in slices), sizes.hidden),
            inside(path, norm),
            input=stream.final if kept else stream.read,
            output=slices[0].output if len(slices) == 1 else Side(),
            online=stream.online and not kept,
            settings=settings,
            slices=tuple(slices) if len(slices) > 1 else (),
            groups=groups if len(slices) > 1 else 1,
            reads=reads,
            **where,
        )
