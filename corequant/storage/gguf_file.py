"""GGUF files: what the header says, and tensors read one at a time.

Fields and the list of tensors come first in a file. Every count and place is compared with the
file's size before anything of that size is made, so that a damaged file is an error and no request
for more memory than there is. Tensors are read, not mapped: a file that shrinks meanwhile is an
error, too.

Source: the GGUF specification of ggml, and gguf.h of llama.cpp.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from corequant.errors import CheckpointError
from corequant.storage.files import open_regular
from corequant.storage.gguf_blocks import DECODED_TYPES, block_shape, decode_blocks

__all__ = ["GgufFile", "GgufTensor"]

Array = npt.NDArray[Any]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_LONGEST_KEY = 1 << 16
_MOST_AXES = 4
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""Types of numbers by their code in a file."""

_STRING, _ARRAY = 8, 9
_FLOATS = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}
_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"},
    **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"},
    **{20: "IQ4_NL", 23: "IQ4_XS", 28: "F64", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
"""Types of tensors that are read, by their code in a file."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is in a file.

    Attributes
    ----------
    name, kind : str
        Name, and type: F32, F16, F64, BF16 or one of ``DECODED_TYPES``.
    shape : tuple of int
        As NumPy has it: the last axis is the one whose numbers are neighbours.
    place, size : int
        First byte in the file, and bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    place: int
    size: int


class GgufFile:
    """The header of a GGUF file, and numbers of its tensors.

    Parameters
    ----------
    path : str or Path

    Attributes
    ----------
    path : Path
    fields : dict
        Values by key: numbers, booleans, texts, and arrays of these (lists of texts, NumPy arrays
        of numbers).
    kinds : dict
        The fields' types by key, as the format numbers them: of a value, or of an array and its
        entries.
    tensors : dict of str to GgufTensor
        In the file's order.

    Raises
    ------
    CheckpointError
        If it isn't such a file, is damaged, or has a tensor of a type that isn't read here.

    Examples
    --------
    >>> import gguf, tempfile, numpy as np
    >>> from corequant.storage.gguf_file import GgufFile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     writer = gguf.GGUFWriter(f"{folder}/m.gguf", "llama")
    ...     writer.add_tensor("output.weight", np.ones((2, 3), np.float16))
    ...     writer.write_header_to_file()
    ...     writer.write_kv_data_to_file()
    ...     writer.write_tensors_to_file()
    ...     writer.close()
    ...     file = GgufFile(f"{folder}/m.gguf")
    ...     file.fields["general.architecture"], file.read("output.weight").shape
    ('llama', (2, 3))
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.fields: dict[str, Any] = {}
        self.kinds: dict[str, tuple[int, ...]] = {}
        self.tensors: dict[str, GgufTensor] = {}
        with open_regular(self.path) as file:
            reader = _Header(file, self.path)
            try:
                reader.fill(self.fields, self.tensors, self.kinds)
            except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
                raise reader.damaged(f"{type(error).__name__} {error}") from None

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[np.float32]:
        """Return a tensor's numbers as float32.

        Parameters
        ----------
        name : str
            A key of ``tensors``.
        rows : slice, optional
            Part of the first axis; all of it by default.

        Returns
        -------
        numpy.ndarray of the tensor's shape, float32

        Raises
        ------
        CheckpointError
            If there is no such tensor, or the file has become shorter.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        begin, end, _ = (rows or slice(None)).indices(tensor.shape[0] if tensor.shape else 1)
        each = tensor.size // (tensor.shape[0] if tensor.shape and tensor.shape[0] else 1)
        with open_regular(self.path) as file:
            file.seek(tensor.place + begin * each)
            data = file.read(max(end - begin, 0) * each)
        if len(data) < max(end - begin, 0) * each:
            raise CheckpointError(f"{self.path} ends before all of its tensor {name}")
        raw = np.frombuffer(data, np.uint8)
        shape = (max(end - begin, 0), *tensor.shape[1:]) if tensor.shape else ()
        if tensor.kind in _FLOATS:
            return _as_float32(raw.view(_FLOATS[tensor.kind]), tensor.kind).reshape(shape)
        _, width = block_shape(tensor.kind)
        numbers, _ = block_shape(tensor.kind)
        return decode_blocks(raw.reshape(-1, width * shape[-1] // numbers), tensor.kind).reshape(
            shape
        )


def _as_float32(numbers: Array, kind: str) -> npt.NDArray[np.float32]:
    if kind == "BF16":
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float32)


class _Header:
    """The parts of a file's beginning, one after another."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._size = file.seek(0, 2)
        file.seek(0)

    def damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is no GGUF file that can be read: {reason}")

    def fill(
        self,
        fields: dict[str, Any],
        tensors: dict[str, GgufTensor],
        kinds: dict[str, tuple[int, ...]],
    ) -> None:
        if self._take(4) != _MAGIC:
            raise self.damaged("it doesn't begin with GGUF")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise self.damaged(f"version must be one of {_VERSIONS}, got {version}")
        count, pairs = self._number("<Q"), self._number("<Q")
        for _ in range(pairs):
            key = self._text()
            if key in fields:
                raise self.damaged(f"the field {key} is there twice")
            code = self._number("<I")
            inner = self._number("<I") if code == _ARRAY else 0
            kinds[key] = (code, inner) if code == _ARRAY else (code,)
            fields[key] = self._value(code, inner)
        found = [self._tensor() for _ in range(count)]
        step = int(fields.get(_ALIGNMENT, 32))
        if step < 1 or step & (step - 1):
            raise self.damaged(f"{_ALIGNMENT} must be a power of two, got {step}")
        begin = -(-self._file.tell() // step) * step
        for name, kind, shape, offset in found:
            size = self._bytes(name, kind, shape)
            if offset % step or begin + offset + size > self._size:
                raise self.damaged(f"the tensor {name} is beyond its end or not at a multiple")
            if name in tensors:
                raise self.damaged(f"the tensor {name} is there twice")
            tensors[name] = GgufTensor(name, kind, shape, begin + offset, size)

    def _bytes(self, name: str, kind: str, shape: tuple[int, ...]) -> int:
        count = math.prod(shape)
        if kind in _FLOATS:
            return count * np.dtype(_FLOATS[kind]).itemsize
        numbers, width = block_shape(kind)
        if not shape or shape[-1] % numbers:
            raise self.damaged(
                f"rows of the {kind} tensor {name} must be multiples of {numbers}, got {shape}"
            )
        return count // numbers * width

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        name, axes = self._text(), self._number("<I")
        if axes > _MOST_AXES:
            raise self.damaged(f"the tensor {name} must have at most {_MOST_AXES} axes, got {axes}")
        shape = tuple(reversed([self._number("<Q") for _ in range(axes)]))
        code, offset = self._number("<I"), self._number("<Q")
        if code not in _TYPES:
            known = ", ".join((*_FLOATS, *DECODED_TYPES))
            raise CheckpointError(
                f"tensors of {self._path} must have one of the types {known}, got number {code} "
                f"for {name}"
            )
        return name, _TYPES[code], shape, offset

    def _take(self, size: int) -> bytes:
        if size > self._size - self._file.tell():
            raise self.damaged("it ends too early")
        return self._file.read(size)

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _text(self) -> str:
        return self._take(self._number("<Q")).decode()

    def _value(self, kind: int, inner: int) -> Any:
        if kind == _STRING:
            return self._take(self._number("<Q")).decode("utf-8", "surrogateescape")
        if kind != _ARRAY:
            return self._numbers(kind, 1)[0].item()
        count = self._number("<Q")
        if inner in _NUMBERS:
            return self._numbers(inner, count)
        if inner == _ARRAY:
            raise self.damaged("an array holds arrays")
        return self._texts(count)

    def _numbers(self, kind: int, count: int) -> Array:
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _texts(self, count: int) -> list[str]:
        # Each takes eight bytes at least, so that a wrong count ends.
        read: Callable[[int], bytes] = self._file.read
        unpack, found = struct.Struct("<Q").unpack, []
        for _ in range(count):
            (size,) = unpack(read(8))
            data = read(size) if size <= self._size else b""
            if len(data) < size:
                raise self.damaged("it ends too early")
            found.append(data.decode("utf-8", "surrogateescape"))
        return found
