"""Weights as sums of signed planes: binary or ternary digits times scales of rows and columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index, check_numpy
from corequant.errors import CheckpointError, ShapeError
from corequant.rotation import block_hadamard, check_block_size
from corequant.rounding.binary.alphabet import Alphabet, nearest
from corequant.rounding.binary.layout import Layout
from corequant.rounding.binary.partition import Partition
from corequant.rounding.binary.scales import check_scales, halved
from corequant.rounding.codebooks.coded import (
    CodedWeight,
    check_shape,
    check_values,
    take_tensor,
    whole,
)

__all__ = ["MOST_PLANES", "Additive"]

Array = npt.NDArray[Any]

MOST_PLANES = 4


@dataclass(frozen=True, eq=False)
class Additive(CodedWeight):
    """A weight whose entries are sums of ±1 or of -1, 0, 1, each times a scale.

    A weight in row i and column j of group g and part p is

        ``c_j (μ_igp + Σ_k α_igpk b_ijk)``, or ``Σ_k c_jpk α_igpk b_ijk``

    with digits b, means μ, scales α of rows, and scales c of columns. The columns that the
    partition marks as salient may have another number of planes.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns.
    group : int
        Number of columns that share the scales and means of a row.
    orders : tuple of int
        Number of planes of non-salient columns, and of salient ones.
    base : int
        2 for binary digits, 3 for ternary ones.
    planes : numpy.ndarray (bytes,), uint8
        Packed digits, one bit each, or five ternary digits to a byte. The first plane is stored row
        by row, then the second one for the columns that have it, and so on.
    row_scales : numpy.ndarray (slots, rows, groups), float16
        Scales of rows, with a slot for each plane of each part, in the order of the parts.
    means : numpy.ndarray (parts, rows, groups), float16, or None
    column_scales : numpy.ndarray (n,), float16, or None
        One scale per column, or, slot by slot, one for each column of the slot.
    shared : bool
        Whether a column has one scale for all its parts and planes.
    partition : Partition or None
        Parts of the weight; None for a single part.
    exponent : int
        Exponent of the power of two that stored scales and means of rows are multiplied by.
    rotation : int or None
        Size of the blocks in which columns are rotated; ``dequantize`` undoes the rotation.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.5, -1.5], [2.0, 2.0]])
    >>> signs = np.sign(W)[None] > 0
    >>> coded = cq.Additive.of(signs, abs(W).mean(1).reshape(1, 2, 1))
    >>> coded.dequantize()
    array([[ 1., -1.],
           [ 2.,  2.]], dtype=float32)
    >>> coded.nbytes
    5
    """

    kind = "additive"

    shape: tuple[int, int]
    group: int
    orders: tuple[int, int]
    base: int
    planes: npt.NDArray[np.uint8]
    row_scales: npt.NDArray[np.float16]
    means: npt.NDArray[np.float16] | None = None
    column_scales: npt.NDArray[np.float16] | None = None
    shared: bool = True
    partition: Partition | None = None
    exponent: int = 0
    rotation: int | None = None

    @classmethod
    def of(
        cls,
        digits: Any,
        row_scales: Any,
        *,
        group: int | None = None,
        orders: tuple[int, int] | None = None,
        base: int = 2,
        means: Any = None,
        column_scales: Any = None,
        partition: Partition | None = None,
        exponent: int = 0,
        rotation: int | None = None,
    ) -> Additive:
        """Pack digits and scales.

        Parameters
        ----------
        digits : numpy.ndarray (planes, rows, columns), bool or integer
            Binary digits 0 for -1 and 1 for 1; ternary digits 0, 1, 2 for -1, 0, 1. Digits of
            planes that a column doesn't have are ignored.
        row_scales : numpy.ndarray (slots, rows, groups)
        group : int, optional
            Number of columns of a group; all by default.
        orders : tuple of int, optional
            Number of planes of non-salient columns, and of salient ones; all by default.
        base : int
        means : numpy.ndarray (parts, rows, groups), optional
        column_scales : numpy.ndarray (1, columns) or (slots, columns), optional
        partition : Partition, optional
        exponent : int
            Exponent of the power of two by which scales and means of rows are divided when stored.
        rotation : int, optional

        Raises
        ------
        BlockSizeError, HadamardOrderError
            If columns can't be rotated in blocks of that size.
        NonFiniteError, ShapeError, TypeError, ValueError
            If an argument is invalid, or the arrays don't match each other.
        """
        if check_numpy("digits", digits).dtype.kind not in "biu":
            raise TypeError(f"digits must be bool or integers, got {digits.dtype}")
        if digits.ndim != 3 or not 1 <= len(digits) <= MOST_PLANES or not digits.size:
            raise ShapeError(
                f"digits must be (planes, rows, columns) with 1 to {MOST_PLANES} planes, "
                f"got shape {digits.shape}"
            )
        if base not in (2, 3):
            raise ValueError(f"base must be 2 or 3, got {base!r}")
        most = int(digits.max()), int(digits.min())
        if most[0] >= base or most[1] < 0:
            raise ValueError(f"digits must lie in [0, {base - 1}], got {most[0]} and {most[1]}")
        count, rows, d = digits.shape
        orders = (count, count) if orders is None else _pair(orders)
        if column_scales is not None:
            check_numpy("column_scales", column_scales)
        group = d if group is None else check_index("group", group)
        form = cls(
            (rows, d),
            group,
            orders,
            base,
            np.empty(0, np.uint8),
            np.empty((0, rows, 1), np.float16),
            shared=column_scales is None or column_scales.shape[:1] == (1,),
            partition=partition,
            exponent=check_index("exponent", exponent, -(1 << 12)),
            rotation=rotation,
        )
        form._check()
        if max(orders) > count:
            raise ShapeError(f"digits must have {max(orders)} planes for {orders=}, got {count}")
        layout = form._layout
        slots, groups = list(layout.slots()), -(-d // group)
        check_scales("row_scales", row_scales, (len(slots), rows, groups))
        if means is not None:
            check_scales("means", means, (layout.parts(), rows, groups))
        if column_scales is not None:
            check_scales("column_scales", column_scales, (1 if form.shared else len(slots), d))
            if not form.shared and means is not None:
                raise ValueError("means must not come with column_scales of each plane, got both")
        sides, columns = layout.sides(), column_scales
        if columns is not None and not form.shared:
            columns = np.concatenate(
                [columns[s][sides[kind]] for s, (kind, _, _) in enumerate(slots)]
            )
        stored = halved("row_scales", row_scales, exponent)
        middles = None if means is None else halved("means", means, exponent)
        if row_scales.any() and not (stored.any() or (middles is not None and middles.any())):
            raise ValueError(f"exponent must leave scales that aren't all zero, got {exponent}")
        return replace(
            form,
            planes=layout.pack(digits),
            row_scales=stored,
            means=middles,
            column_scales=(
                None if columns is None else halved("column_scales", columns.reshape(-1), 0)
            ),
        )

    @property
    def _layout(self) -> Layout:
        return Layout(self.shape, self.orders, self.base, self.partition)

    @property
    def alphabets(self) -> tuple[Alphabet, Alphabet]:
        """Alphabets of non-salient and of salient columns."""
        split = (1, 1) if self.partition is None else self.partition.variants()
        mean = self.means is not None
        first, second = (
            Alphabet(v, o, self.base, mean) for v, o in zip(split, self.orders, strict=True)
        )
        return first, second

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return the values (rows, columns), with the rotation undone."""
        values = self.rotated()
        if self.rotation is not None:
            values = block_hadamard(values, self.rotation, inverse=True)
        return values

    def rotated(self) -> npt.NDArray[np.float32]:
        """Return the values (rows, columns) of the rotated weight, as a kernel would use them."""
        values = np.zeros(self.shape, np.float32)
        large = None if self.partition is None else self.partition.large()
        layout = self._layout
        digits, sides, ends = layout.unpack(self.planes), layout.sides(), layout.ends()
        scales, means = whole(self.row_scales, self.exponent), None
        if self.means is not None:
            means = whole(self.means, self.exponent)
        groups = np.arange(self.shape[1]) // self.group
        part = -1
        total: Array = np.empty(0)
        for s, (kind, variant, k) in enumerate(layout.slots()):
            side = sides[kind]
            if k == 0:
                part += 1
                total = np.zeros((self.shape[0], len(side)), np.float32)
                if means is not None:
                    total += means[part][:, groups[side]]
            term = digits[k][:, side] * scales[s][:, groups[side]]
            if self.column_scales is not None and not self.shared:
                term *= self.column_scales[ends[s] : ends[s + 1]].astype(np.float32)
            total += term
            if k == self.orders[kind] - 1:
                if variant:
                    assert large is not None
                    values[:, side] = np.where(large[:, side], total, values[:, side])
                else:
                    values[:, side] = total
        if self.column_scales is not None and self.shared:
            values *= self.column_scales.astype(np.float32)
        return values

    def to_tensors(self) -> dict[str, Array]:
        """Return the packed arrays that a file holds, by name."""
        found: dict[str, Array] = {"planes": self.planes, "row_scales": self.row_scales.reshape(-1)}
        if self.means is not None:
            found["means"] = self.means.reshape(-1)
        if self.column_scales is not None:
            found["column_scales"] = self.column_scales
        if self.partition is not None:
            found.update(self.partition.to_tensors())
        return found

    def describe(self) -> dict[str, Any]:
        """Return what the tensors don't contain, as plain JSON values."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "group": self.group,
            "orders": list(self.orders),
            "base": self.base,
            "shared": self.shared,
            "exponent": self.exponent,
            "rotation": self.rotation,
            "everywhere": None if self.partition is None else self.partition.everywhere,
        }

    @classmethod
    def from_tensors(cls, tensors: Any, description: Any) -> Additive:
        """Return the weight with these tensors and this description.

        Raises
        ------
        CheckpointError
            If they don't belong together.
        """
        (rows, d), said = check_shape(description), dict(description)
        partition = None
        if said.get("everywhere") is not None:
            partition = Partition.from_tensors(tensors, description)
        try:
            form = cls(
                (rows, d),
                check_index("group", said.get("group")),
                _pair(said.get("orders")),
                check_index("base", said.get("base"), 2),
                np.empty(0, np.uint8),
                np.empty((0, rows, 1), np.float16),
                shared=bool(said.get("shared")),
                partition=partition,
                exponent=check_index("exponent", said.get("exponent"), -(1 << 12)),
                rotation=said.get("rotation"),
            )
            form._check()
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"not the description of an additive weight: {error}") from None
        layout = form._layout
        slots, groups, parts = len(list(layout.slots())), -(-d // form.group), layout.parts()
        size = rows * groups
        scales = take_tensor(tensors, "row_scales", np.float16, slots * size)
        planes = take_tensor(tensors, "planes", np.uint8, layout.plane_bytes())
        if form.base == 3 and int(planes.max()) >= 3**5:
            raise CheckpointError(f"planes must hold bytes below 243, got {int(planes.max())}")
        means = columns = None
        if "means" in tensors:
            means = take_tensor(tensors, "means", np.float16, parts * size)
            means = means.reshape(parts, rows, groups)
        if "column_scales" in tensors:
            count = d if form.shared else layout.ends()[-1]
            columns = take_tensor(tensors, "column_scales", np.float16, count)
        return replace(
            form,
            planes=planes,
            row_scales=scales.reshape(slots, rows, groups),
            means=means,
            column_scales=columns,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        arrays = (self.planes, self.row_scales, self.means, self.column_scales)
        bitmaps = 0 if self.partition is None else self.partition.nbytes
        return sum(a.nbytes for a in arrays if a is not None) + bitmaps

    def enter_block(self, columns: Any, values: Any, curvature: Any) -> None:
        """Do nothing: scales are fixed."""

    def quantize_column(self, w: Array, j: int) -> Array:
        """Return the values of column j of the rotated weight nearest to ``w`` (rows,).

        Each weight stays in its part.
        """
        salient = self.partition is not None and bool(self.partition.salient()[j])
        levels = self._levels_of(j, salient).astype(w.dtype)
        found: Array = np.take_along_axis(levels, nearest(w[:, None], levels).astype(np.intp), 1)
        return found[:, 0]

    def scaled(self, exponent: int) -> Additive:
        """Return the weight times ``2**exponent``."""
        return replace(self, exponent=self.exponent + exponent)

    def encode(self, values: Any) -> Additive:
        """Return a weight with the same scales and parts, and the digits nearest to ``values``.

        Parameters
        ----------
        values : numpy.ndarray (rows, columns)
            Values of the rotated weight if there is a rotation.

        Raises
        ------
        NonFiniteError, ShapeError, TypeError
            If the values are invalid or have another shape.
        """
        values = check_values("values", values, self.shape)
        digits = np.zeros((max(self.orders), *self.shape), np.uint8)
        for kind, side in enumerate(self._layout.sides()):
            alphabet = self.alphabets[kind]
            for j in side:
                levels = self._levels_of(int(j), bool(kind))
                codes = nearest(values[:, j, None], levels.astype(values.dtype))
                digits[: alphabet.order, :, j] = alphabet.digits(codes)[..., 0]
        return replace(self, planes=self._layout.pack(digits))

    def _levels_of(self, j: int, salient: bool) -> Array:
        """Return the values (rows, codes) that column j can take within each weight's part."""
        levels = self._column_levels(j, salient)
        if self.partition is None or self.alphabets[salient].variants == 1:
            return levels
        half = levels.shape[1] // 2
        return np.where(self.partition.large_of(j)[:, None], levels[:, half:], levels[:, :half])

    def _column_levels(self, j: int, salient: bool) -> Array:
        """Return the values (rows, codes) that column j can take."""
        alphabet, g = self.alphabets[salient], j // self.group
        layout = self._layout
        sides, ends = layout.sides(), layout.ends()
        parameters, part = [], -1
        for s, (kind, _, k) in enumerate(layout.slots()):
            part += k == 0
            if kind != salient:
                continue
            if k == 0 and self.means is not None:
                parameters.append(whole(self.means[part][:, g], self.exponent))
            factor = np.float32(1)
            if self.column_scales is not None and not self.shared:
                place = int(np.searchsorted(sides[kind], j))
                factor = np.float32(self.column_scales[ends[s] + place])
            parameters.append(whole(self.row_scales[s][:, g], self.exponent) * factor)
        levels = alphabet.levels(np.stack(parameters, 1))
        if self.column_scales is not None and self.shared:
            levels = levels * np.float32(self.column_scales[j])
        return levels

    def _check(self) -> None:
        for name, order in zip(("orders[0]", "orders[1]"), self.orders, strict=True):
            if not 1 <= check_index(name, order) <= MOST_PLANES:
                raise ValueError(f"{name} must be at most {MOST_PLANES}, got {order}")
        if self.base not in (2, 3):
            raise ValueError(f"base must be 2 or 3, got {self.base}")
        if not isinstance(self.partition, Partition | None):
            raise TypeError(f"partition must be a Partition, got {type(self.partition).__name__}")
        if self.partition is not None and tuple(self.partition.shape) != self.shape:
            raise ShapeError(
                f"partition must have the shape {self.shape}, got {self.partition.shape}"
            )
        if self.rotation is not None:
            check_block_size("rotation", check_index("rotation", self.rotation), self.shape[1])


def _pair(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise TypeError(f"orders must be two integers, got {value!r}")
    return value[0], value[1]
