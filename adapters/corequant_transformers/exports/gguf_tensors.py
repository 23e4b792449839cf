"""The tensors of a GGUF file: their names, types, and where their bytes come from.

Codes and scales are those of the directory, in llama.cpp's blocks. Matrices that aren't quantized
are float16, norms, biases and routers float32. What the experts of a layer have for one projection
is one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from corequant.errors import ArchitectureError, SpecError
from corequant.quantization import QuantizedTensor, dequantize
from corequant.storage.gguf import BLOCK_BYTES, decode_blocks, to_blocks
from corequant.storage.tensor_file import RawTensor
from corequant_transformers.checkpoint.reader import Stored
from corequant_transformers.exports.gguf_metadata import rope_factors
from corequant_transformers.model.gguf_files.dialects import Dialect
from corequant_transformers.model.gguf_files.names import norm_offset, row_order, translate
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["Names", "Tensor", "difference", "float_type", "tensors_of"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a file.

    Attributes
    ----------
    name, kind : str
        Name and type in the file.
    shape : tuple of int
        Shape of its bytes there, or of its numbers if it has no blocks.
    make : callable
        Returns the array that is written.
    matrices : tuple of MatrixPlan
        What it holds the codes of: one matrix, or one of each expert.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Array]
    matrices: tuple[MatrixPlan, ...] = ()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of the array that is written."""
        return np.dtype({"F32": "<f4", "F16": "<f2"}.get(self.kind, "u1"))


def float_type(plan: ModelPlan, name: str, axes: int) -> str:
    """Return the type of a tensor that isn't quantized.

    Parameters
    ----------
    plan : ModelPlan
    name : str
        Name of the tensor in the directory.
    axes : int
        Number of its axes.
    """
    routers = {f"{m.name}.weight" for m in plan.matrices if m.role == "router"}
    return "F16" if axes == 2 and name not in routers else "F32"


def tensors_of(stored: Stored, kinds: Mapping[str, str], dialect: Dialect) -> Iterator[Tensor]:
    """Yield a file's tensors.

    Parameters
    ----------
    stored : Stored
    kinds : mapping of str to str
        Block types of quantized matrices by their names.
    dialect : Dialect

    Raises
    ------
    ArchitectureError
        If llama.cpp has no tensor for one of the model's.
    """
    plan = stored.plan
    names = Names(plan, dialect)
    factors = rope_factors(stored.config)
    if factors is not None:
        yield Tensor("rope_freqs.weight", "F32", factors.shape, lambda: factors)
    together: dict[str, list[MatrixPlan]] = {}
    for matrix in plan.kept:
        together.setdefault(names.tensor(f"{matrix.name}.weight"), []).append(matrix)
    for name, rows in together.items():
        kind, (height, width) = kinds[rows[0].name], rows[0].shape
        shape: tuple[int, ...] = (height, BLOCK_BYTES[kind] * width // 32)
        if rows[0].expert is not None:
            shape = (len(rows), *shape)
        yield Tensor(name, kind, shape, partial(_blocks, stored, rows, dialect), tuple(rows))
    floats: dict[str, list[str]] = {}
    for name in stored.rest():
        floats.setdefault(names.tensor(name), []).append(name)
    for name, parts in floats.items():
        shape = stored.read(parts[0]).shape
        kind = float_type(plan, parts[0], len(shape))
        shape = (len(parts), *shape) if parts[0] in names.of_experts else shape
        yield Tensor(name, kind, shape, partial(_floats, stored, parts, dialect, shape))


class Names:
    """llama.cpp's names.

    Parameters
    ----------
    plan : ModelPlan
    dialect : Dialect
    """

    def __init__(self, plan: ModelPlan, dialect: Dialect) -> None:
        self._dialect, self._blocks = dialect, plan.dimensions.blocks
        kinds, e = gguf.MODEL_TENSOR, plan.architecture.experts
        self._experts = {}
        if e is not None:
            self._experts = {
                e.gate: kinds.FFN_GATE_EXP,
                e.up: kinds.FFN_UP_EXP,
                e.down: kinds.FFN_DOWN_EXP,
            }
        self._routers = {m.name: m.block for m in plan.matrices if m.role == "router"}
        rows = (m for m in plan.matrices if m.expert is not None)
        self.of_experts = {f"{m.name}.weight": m.block for m in rows}

    def tensor(self, name: str) -> str:
        """Return a parameter's name in the file.

        Raises
        ------
        ArchitectureError
            If llama.cpp has no place for it.
        """
        module = name.rpartition(".")[0]
        if module in self._routers:
            kind = gguf.MODEL_TENSOR.FFN_GATE_INP
            return self._of_block(kind, self._routers[module], name)
        if name in self.of_experts:
            kind = self._experts[module.rpartition(".")[2]]
            return self._of_block(kind, self.of_experts[name], name)
        found = translate(self._dialect, [name], self._blocks)[name]
        if found.endswith(".bias") and not self._dialect.takes_bias(found):
            raise ArchitectureError(
                f"llama.cpp's {self._dialect.name!r} has no bias {found}, which the model has as "
                f"{name}"
            )
        return found

    def _of_block(self, kind: Any, block: int | None, name: str) -> str:
        return f"{gguf.TENSOR_NAMES[kind].format(bid=block)}.{name.rpartition('.')[2]}"


def _blocks(stored: Stored, rows: Sequence[MatrixPlan], dialect: Dialect) -> Array:
    found = []
    for matrix in rows:
        _, blocks = to_blocks(stored.quantized(matrix))
        order = _order(stored, matrix.name, dialect)
        found.append(blocks if order is None else np.ascontiguousarray(blocks[order]))
    return found[0] if rows[0].expert is None else np.stack(found)


def _floats(
    stored: Stored, parts: Sequence[str], dialect: Dialect, shape: tuple[int, ...]
) -> Array:
    return np.stack([_float(stored, name, dialect) for name in parts]).reshape(shape)


def _float(stored: Stored, name: str, dialect: Dialect) -> Array:
    tensor = stored.read(name)
    dtype = float_type(stored.plan, name, len(tensor.shape))
    numbers, offset = tensor.array(), norm_offset(stored.plan.architecture, name)
    try:
        array = RawTensor.of(numbers + np.float32(offset) if offset else numbers, dtype).array()
    except ValueError as error:
        raise SpecError(f"{name} can't be stored as {dtype}: {error}") from None
    order = _order(stored, name.rpartition(".")[0], dialect)
    return np.ascontiguousarray(array if order is None else array[order])


def _order(stored: Stored, module: str, dialect: Dialect) -> npt.NDArray[np.int64] | None:
    return row_order(dialect, stored.plan.architecture, stored.plan.dimensions, module)


def difference(part: Path, tensors: list[Tensor], stored: Stored, dialect: Dialect) -> str | None:
    """Read a file back, dequantize it, and return which bits aren't as they were meant.

    An error would hold the mapped file, which Windows can't remove then.
    """
    found = {t.name: t for t in gguf.GGUFReader(part).tensors}
    if set(found) != {t.name for t in tensors}:
        return f"{part} did not read back with the tensors that were written"
    for t in tensors:
        back = found[t.name]
        data = np.ascontiguousarray(back.data)
        if back.tensor_type.name != t.kind or data.tobytes() != t.make().tobytes():
            return f"{t.name} did not read back as it was written"
        single = len(t.matrices) == 1 and t.matrices[0].expert is None
        for index, matrix in enumerate(t.matrices):
            own = data if single else data[index]
            if not _decodes(
                own, t.kind, stored.quantized(matrix), _order(stored, matrix.name, dialect)
            ):
                return f"{t.name} does not decode to what was quantized"
    return None


def _decodes(
    data: Array, kind: str, quantized: QuantizedTensor, order: npt.NDArray[np.int64] | None
) -> bool:
    meant, numbers = dequantize(quantized), decode_blocks(data, kind)
    meant = meant if order is None else meant[order]
    if kind == "Q4_1":
        return bool((np.abs(numbers - meant) <= _rounding(quantized, order)).all())
    # Blocks of MXFP4 are read with one zero, the positive one.
    return np.array_equal(numbers.view(np.uint32), (meant + 0).view(np.uint32))


def _rounding(quantized: QuantizedTensor, order: npt.NDArray[np.int64] | None) -> Array:
    """Return how far a Q4_1 block's float16 offset may be from the product that it stands for."""
    least = quantized.spec.format.least_code
    offsets = np.abs((least - quantized.zero_points.astype(np.float32)) * quantized.scales)
    # Half a unit in the last place of float16, and two of float32 for the sums.
    bound = np.maximum(offsets * 2.0**-11, 2.0**-25) + offsets * 2.0**-22
    bound = np.repeat(bound, 32, axis=1)
    return bound if order is None else bound[order]
