"""Safetensors files: validated when opened, written from raw bytes.

A tensor here is its dtype's name, its shape and its bytes, so bfloat16 and 8-bit floats need no
library that knows them. The reader maps the file and believes nothing of its header: types, sizes,
and that the tensors cover the file without overlaps or holes.

Source: the safetensors format, huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.errors import CheckpointError
from corequant.storage.files import open_regular

__all__ = ["ITEM_BYTES", "RawTensor", "TensorFile", "file_bytes", "parse_header", "write_tensors"]

Array = npt.NDArray[Any]

LONGEST_HEADER = 100_000_000
"""Bytes, as the format's own reader allows."""

_MOST_AXES = 16
_ALIGNMENT = 8
_KEYS = {"dtype", "shape", "data_offsets"}
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
_ARRAYS = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "F64": "<f8",
    "I64": "<i8",
    "U64": "<u8",
}
_NAMES = {np.dtype(code): name for name, code in _ARRAYS.items()}
_BYTES = ("F8_E5M2", "F8_E4M3", "F8_E8M0")


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor as a file holds it.

    Attributes
    ----------
    dtype : str
        The format's name, such as ``F32``, ``BF16`` or ``F8_E4M3``.
    shape : tuple of int
    data : numpy.ndarray (bytes,), uint8
        In row-major order, little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, array: Array, dtype: str | None = None) -> RawTensor:
        """Return an array's bytes.

        Parameters
        ----------
        array : numpy.ndarray
        dtype : str, optional
            The array's own by default. A floating array can become ``F64``, ``F32``, ``F16`` or
            ``BF16``, rounded to nearest, ties to even; bytes can be declared 8-bit floats.

        Raises
        ------
        TypeError
            If the format has no such dtype, or the array can't become it.
        ValueError
            If a finite number is beyond the dtype's range.

        Examples
        --------
        >>> import numpy as np
        >>> from corequant.storage.tensor_file import RawTensor
        >>> RawTensor.of(np.ones((2, 2)).T, "BF16").data.tobytes().hex(" ", 2)
        '803f 803f 803f 803f'
        """
        own = _NAMES.get(np.dtype(array.dtype).newbyteorder("<"))
        if own is None:
            raise TypeError(f"array must have a dtype of the file format, got {array.dtype}")
        wanted = own if dtype is None else dtype
        if wanted == own or (wanted in _BYTES and own == "U8"):
            stored = np.ascontiguousarray(array, np.dtype(_ARRAYS[own]))
        elif wanted in ("F64", "F32", "F16", "BF16") and array.dtype.kind == "f":
            stored = _rounded(array, wanted)
        else:
            raise TypeError(f"array of {array.dtype} can't be stored as {wanted}")
        return cls(wanted, array.shape, stored.reshape(-1).view(np.uint8))

    def array(self) -> Array:
        """Return the numbers: bfloat16 as float32, 8-bit floats as their bytes, else as they are.

        Examples
        --------
        >>> import numpy as np
        >>> from corequant.storage.tensor_file import RawTensor
        >>> RawTensor.of(np.array([1.5, -2]), "BF16").array()
        array([ 1.5, -2. ], dtype=float32)
        """
        if self.dtype == "BF16":
            wide = self.data.view("<u2").astype(np.uint32) << np.uint32(16)
            return wide.view(np.float32).reshape(self.shape)
        code = "u1" if self.dtype in _BYTES else _ARRAYS[self.dtype]
        native = np.dtype(code).newbyteorder("=")
        return self.data.view(code).astype(native, copy=False).reshape(self.shape)

    def same(self, other: RawTensor) -> bool:
        """Return whether dtype, shape and every bit agree."""
        return (
            self.dtype == other.dtype
            and self.shape == other.shape
            and bool(np.array_equal(self.data, other.data))
        )


class TensorFile:
    """A file of tensors, opened and validated; tensors are read on request.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    CheckpointError
        If the file is missing, truncated or malformed.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from pathlib import Path
    >>> from corequant.storage.tensor_file import RawTensor, TensorFile, write_tensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "x.safetensors"
    ...     write_tensors(path, {"x": RawTensor.of(np.arange(3))})
    ...     TensorFile(path).read("x").array()
    array([0, 1, 2])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open_regular(self.path) as file:
                size = os.fstat(file.fileno()).st_size
                prefix = file.read(8)
                length = int.from_bytes(prefix, "little")
                if len(prefix) < 8 or length > min(LONGEST_HEADER, size - 8):
                    raise CheckpointError(f"{self.path} is truncated or not a safetensors file")
                header = file.read(length)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} is missing") from None
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path} can't be read: {error}") from error
        try:
            self.entries, self.metadata = parse_header(header, size - 8 - length)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} is malformed: {error}") from None
        self._start = 8 + length

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of their bytes."""
        return tuple(self.entries)

    def read(self, name: str) -> RawTensor:
        """Return a tensor; its bytes are read-only and stay in the file until they are used."""
        if name not in self.entries:
            raise CheckpointError(f"{self.path} lacks the tensor {name}")
        dtype, shape, first, last = self.entries[name]
        if first == last:
            return RawTensor(dtype, shape, np.empty(0, np.uint8))
        try:
            data: Array = np.memmap(
                self.path, np.uint8, "r", offset=self._start + first, shape=(last - first,)
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} of {self.path} can't be read: {error}") from error
        return RawTensor(dtype, shape, np.asarray(data))


Entry = tuple[str, tuple[int, ...], int, int]


def file_bytes(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Return the size of a file of tensors.

    Parameters
    ----------
    layout : mapping
        Dtypes, as files name them, and shapes by the tensors' names.

    Examples
    --------
    >>> from corequant.storage.tensor_file import file_bytes
    >>> file_bytes({"x": ("F32", (2, 3))})
    120
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text) // _ALIGNMENT) * _ALIGNMENT + end


def parse_header(header: bytes, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read the JSON header of a file of tensors.

    Parameters
    ----------
    header : bytes
    size : int
        Bytes of data that follow it.

    Returns
    -------
    entries : dict of str to (dtype, shape, first, last)
        In the order of the data; ``first`` and ``last`` are offsets into it.
    metadata : dict of str to str

    Raises
    ------
    CheckpointError
        If anything about it is wrong; the message names the tensor and the rule.

    Examples
    --------
    >>> from corequant.storage.tensor_file import parse_header
    >>> parse_header(b'{"x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', 2)[0]
    {'x': ('U8', (2,), 0, 2)}
    """
    try:
        values = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"the header must be an object, got {type(values).__name__}")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("the header's __metadata__ must map strings to strings")
    entries = sorted(
        ((name, _entry(name, value)) for name, value in values.items()),
        key=lambda item: item[1][2:],
    )
    end = 0
    for name, (_, _, first, last) in entries:
        if first != end:
            raise CheckpointError(f"{name!r} must start at byte {end}, got {first}")
        end = last
    if end != size:
        raise CheckpointError(f"the tensors take {end} bytes of the file's {size}")
    return dict(entries), metadata


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, RawTensor] | Iterable[tuple[str, RawTensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a file, the same bytes for the same tensors in the same order.

    Parameters
    ----------
    path : str or Path
    tensors : mapping of str to RawTensor, or pairs
    metadata : mapping of str to str, optional
        ``{"format": "pt"}`` by default, which Transformers asks for.

    Raises
    ------
    OSError
        If the file can't be written.
    """
    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    # Wide types first, so that every tensor's bytes are aligned to its type.
    pairs.sort(key=lambda pair: -ITEM_BYTES[pair[1].dtype])
    end = 0
    for name, tensor in pairs:
        first, end = end, end + tensor.data.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in pairs:
            np.ascontiguousarray(tensor.data).tofile(file)


def _rounded(array: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            words = np.ascontiguousarray(array, "<f4").view("<u4").astype(np.uint64)
            lower = (words >> np.uint64(16)) & np.uint64(1)
            stored = ((words + np.uint64(0x7FFF) + lower) >> np.uint64(16)).astype("<u2")
            finite = (stored & np.uint16(0x7F80)) != 0x7F80
        else:
            stored = np.ascontiguousarray(array, _ARRAYS[dtype])
            finite = np.isfinite(stored)
    if not finite.all():
        worst = array[~finite].flat[0]
        raise ValueError(f"array must be finite and fit {dtype}, got {worst}")
    return stored


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != _KEYS:
        raise CheckpointError(f"{name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _whole(shape) or len(shape) > _MOST_AXES:
        raise CheckpointError(f"the shape of {name!r} must be a list of sizes")
    if not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"data_offsets of {name!r} must be two ascending numbers")
    if math.prod(shape) * ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
        needs, has = math.prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
        raise CheckpointError(f"{name!r} must have {needs} bytes for its shape, got {has}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
