"""Write a quantized model as a GGUF file, for llama.cpp and what is built on it.

Codes and scales are those of the directory, in llama.cpp's blocks. Embedding and head, which
aren't quantized, are float16, norms and biases float32. llama.cpp knows no rotation at run time, so
every rotation must be merged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from corequant.errors import ArchitectureError, OutputError, RecipeError, SpecError
from corequant.quantization import QuantizedTensor, dequantize
from corequant.specs import Granularity, ScaleSearch
from corequant.storage.files import version_of
from corequant.storage.gguf import BLOCK_BYTES, block_type_of, decode_blocks, to_blocks
from corequant.storage.tensor_file import RawTensor
from corequant_transformers.checkpoint.reader import Stored
from corequant_transformers.exports.gguf_metadata import (
    PERMUTED,
    KeyValue,
    about,
    architecture_name,
    hyperparameters,
    metadata_bytes,
    rope_factors,
    vocabulary,
)
from corequant_transformers.exports.own_class import check_layers
from corequant_transformers.exports.prospect import Candidate, Prospect
from corequant_transformers.files.atomic import replacing
from corequant_transformers.files.digests import GGUF_DIGEST, GGUF_VERSION, seal_gguf
from corequant_transformers.files.outputs import check_file_output
from corequant_transformers.model.sources import Source
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["check", "expected_bytes", "write"]

Array = npt.NDArray[Any]

_FILE_TYPES = {"Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1", "Q8_0": "MOSTLY_Q8_0"}
_FILE_TYPES["MXFP4"] = "MOSTLY_MXFP4_MOE"
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor of the file: name, type and shape of its bytes there, and how to get them."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Array]
    matrix: MatrixPlan | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype({"F32": "<f4", "F16": "<f2"}.get(self.kind, "u1"))


def check(candidate: Candidate, source: str | Path | None = None) -> None:
    """Raise the error that ``write`` would, as far as it is known before a model is quantized."""
    for matrix in candidate.plan.quantized:
        _block_type(matrix)
    _check_recipe(candidate.plan)
    architecture_name(candidate.config)
    check_layers(candidate)
    _values(candidate, source)


def write(
    stored: Stored,
    output: str | Path,
    *,
    source: str | Path | None,
    shard_bytes: int,
    within: Path | None = None,
    complete: Callable[[Path], object] = lambda made: None,
) -> Path:
    """Write a new file, read it back and compare, then give it its name.

    Parameters
    ----------
    stored : Stored
    output : str or Path
        A new file that ends in ``.gguf``.
    source : str or Path, optional
        The model that was quantized: a GGUF file's metadata and tokenizer are carried over as they
        are, a directory's tokenizer is translated. By default the tokenizer of ``stored`` is.
    shard_bytes : int
        Ignored: a GGUF file holds everything.
    within : Path, optional
        Folder of the file while it isn't whole; that of ``output`` by default.
    complete : callable
        Called with the file when it is whole, before it gets its name.

    Returns
    -------
    Path

    Raises
    ------
    ArchitectureError
        If llama.cpp's architectures don't hold the model.
    CheckpointError
        If there is no tokenizer that can be carried over.
    RecipeError
        If a layer's input is rotated at run time.
    SpecError
        If GGUF has no blocks for the weights, or llama.cpp rounds activations otherwise.
    OutputError
        If the file can't be written or doesn't read back equal; nothing is left then.
    """
    target = check_file_output(output, ".gguf")
    plan = stored.plan
    kinds = {m.name: _block_type(m) for m in plan.quantized}
    _check_recipe(plan)
    arch = architecture_name(stored.config)
    check_layers(stored)
    values = _values(stored, source)
    values += about(stored, values)
    tensors = list(_tensors(stored, kinds, arch))
    stored.check()
    with replacing(target, within) as part:
        writer = gguf.GGUFWriter(part, arch)
        try:
            # First, where its reader looks for them.
            writer.add_string(GGUF_VERSION, version_of("corequant"))
            writer.add_string(GGUF_DIGEST, "0" * 64)
            for key, value, vtype, sub_type in values:
                writer.add_key_value(key, value, vtype, sub_type)
            writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[_prevailing(plan, kinds)]))
            writer.add_quantization_version(_QUANTIZATION_VERSION)
            for t in tensors:
                size = int(np.prod(t.shape)) * t.dtype.itemsize
                raw = getattr(gguf.GGMLQuantizationType, t.kind)
                writer.add_tensor_info(t.name, t.shape, t.dtype, size, raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for t in tensors:
                writer.write_tensor_data(t.make())
        finally:
            writer.close()
        seal_gguf(part)
        if (changed := _difference(part, tensors, stored)) is not None:
            raise OutputError(changed)
        complete(part)
    return target


def _values(candidate: Candidate, source: str | Path | None) -> list[KeyValue]:
    given = None if source is None else Source(source)
    return [*hyperparameters(candidate.config, candidate.plan), *vocabulary(candidate, given)]


def expected_bytes(candidate: Prospect, source: str | Path | None) -> int:
    """Return the size of the file that ``write`` will write.

    Raises
    ------
    ArchitectureError, CheckpointError, RecipeError, SpecError
        If a GGUF file can't hold the model.
    """
    check(candidate, source)
    plan = candidate.plan
    found = [m.shape[0] * BLOCK_BYTES[_block_type(m)] * m.shape[1] // 32 for m in plan.kept]
    shapes = candidate.shapes()
    if rope_factors(candidate.config) is not None:
        shapes["rope_freqs"] = (plan.dimensions.head_dim // 2,)
    found += [math.prod(shape) * (2 if len(shape) == 2 else 4) for shape in shapes.values()]
    # A tensor's name, axes, type and place take 80 bytes or so, and its data end at a multiple.
    step = gguf.GGUF_DEFAULT_ALIGNMENT
    data = sum(80 + -(-size // step) * step for size in found)
    return metadata_bytes(_values(candidate, source)) + data


def _check_recipe(plan: ModelPlan) -> None:
    if plan.online:
        raise RecipeError(
            f"a GGUF file must have every rotation merged, but {len(plan.online)} layers, the "
            f"first is {plan.online[0].name}, rotate their inputs at run time, which llama.cpp "
            "can't; quantize with rotation 'offline'"
        )
    for matrix in plan.quantized:
        spec = matrix.activations
        if spec is not None and not (
            spec.format.name == "int8"
            and spec.granularity is Granularity.GROUP
            and spec.group_size == 32
            and spec.symmetric
            and spec.scale_search is ScaleSearch.ABSMAX
        ):
            raise SpecError(
                "llama.cpp rounds activations to 8 bits in groups of 32 whatever a file says, so "
                f"activations must be none or int8:group32, got {spec} for {matrix.name}"
            )


def _block_type(matrix: MatrixPlan) -> str:
    try:
        return block_type_of(matrix.weights)
    except SpecError as error:
        option = {"embedding": "embeddings of llama.cpp", "head": "head of llama.cpp"}
        raise SpecError(f"{option.get(matrix.role, matrix.name)}: {error}") from None


def _prevailing(plan: ModelPlan, kinds: Mapping[str, str]) -> str:
    """Return the block type that most weights have, after which the file is called."""
    counts: Counter[str] = Counter()
    for matrix in plan.quantized:
        counts[kinds[matrix.name]] += math.prod(matrix.shape)
    return counts.most_common(1)[0][0]


def _tensors(stored: Stored, kinds: Mapping[str, str], arch: str) -> Iterator[_Tensor]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], stored.plan.dimensions.blocks)

    def translated(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ArchitectureError(f"llama.cpp's {arch!r} has no tensor for {name}")
        return str(found)

    factors = rope_factors(stored.config)
    if factors is not None:
        yield _Tensor("rope_freqs.weight", "F32", factors.shape, lambda: factors)
    for matrix in stored.plan.kept:
        kind = kinds[matrix.name]
        width = BLOCK_BYTES[kind] * matrix.shape[1] // 32
        yield _Tensor(
            translated(f"{matrix.name}.weight"),
            kind,
            (matrix.shape[0], width),
            partial(_blocks, stored, matrix, arch),
            matrix,
        )
    for name in stored.rest():
        shape = stored.read(name).shape
        yield _Tensor(
            translated(name),
            "F16" if len(shape) == 2 else "F32",
            shape,
            partial(_floats, stored, name, arch),
        )


def _blocks(stored: Stored, matrix: MatrixPlan, arch: str) -> Array:
    _, blocks = to_blocks(stored.quantized(matrix))
    order = _order(stored, matrix.name, arch)
    return blocks if order is None else np.ascontiguousarray(blocks[order])


def _floats(stored: Stored, name: str, arch: str) -> Array:
    tensor = stored.read(name)
    dtype = "F16" if len(tensor.shape) == 2 else "F32"
    try:
        array = RawTensor.of(tensor.array(), dtype).array()
    except ValueError as error:
        raise SpecError(f"{name} can't be stored as {dtype}: {error}") from None
    order = _order(stored, name.rpartition(".")[0], arch)
    return np.ascontiguousarray(array if order is None else array[order])


def _order(stored: Stored, module: str, arch: str) -> npt.NDArray[np.int64] | None:
    """Return the order of the rows of a query or key in the file, where it is another.

    Transformers turns the first half of a head's channels against the second, llama.cpp's
    ``llama`` neighbours against each other.
    """
    a, sizes = stored.plan.architecture, stored.plan.dimensions
    heads = {a.query: sizes.heads, a.key: sizes.kv_heads}
    suffix = next((s for s in heads if module.endswith(f".{s}")), None)
    if suffix is None or arch not in PERMUTED:
        return None
    rows = np.arange(heads[suffix] * sizes.head_dim)
    return rows.reshape(heads[suffix], 2, sizes.head_dim // 2).swapaxes(1, 2).reshape(-1)


def _difference(part: Path, tensors: list[_Tensor], stored: Stored) -> str | None:
    """Read everything back, dequantize it, and return which bits aren't as they were meant.

    An error would hold the mapped file, which Windows can't remove then.
    """
    found = {t.name: t for t in gguf.GGUFReader(part).tensors}
    if set(found) != {t.name for t in tensors}:
        return f"{part} did not read back with the tensors that were written"
    arch = architecture_name(stored.config)
    for t in tensors:
        back = found[t.name]
        data = np.ascontiguousarray(back.data)
        if back.tensor_type.name != t.kind or data.tobytes() != t.make().tobytes():
            return f"{t.name} did not read back as it was written"
        if t.matrix is None:
            continue
        quantized, order = stored.quantized(t.matrix), _order(stored, t.matrix.name, arch)
        meant, numbers = dequantize(quantized), decode_blocks(data, t.kind)
        meant = meant if order is None else meant[order]
        if t.kind == "Q4_1":
            same = bool((np.abs(numbers - meant) <= _rounding(quantized, order)).all())
        else:
            # Blocks of MXFP4 are read with one zero, the positive one.
            same = np.array_equal(numbers.view(np.uint32), (meant + 0).view(np.uint32))
        if not same:
            return f"{t.name} does not decode to what was quantized"
    return None


def _rounding(quantized: QuantizedTensor, order: npt.NDArray[np.int64] | None) -> Array:
    """Return how far a Q4_1 block's float16 offset may be from the product that it stands for."""
    least = quantized.spec.format.least_code
    offsets = np.abs((least - quantized.zero_points.astype(np.float32)) * quantized.scales)
    # Half a unit in the last place of float16, and two of float32 for the sums.
    bound = np.maximum(offsets * 2.0**-11, 2.0**-25) + offsets * 2.0**-22
    bound = np.repeat(bound, 32, axis=1)
    return bound if order is None else bound[order]
