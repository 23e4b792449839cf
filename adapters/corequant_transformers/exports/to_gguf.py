"""Write a quantized model as a GGUF file, for llama.cpp and what is built on it.

llama.cpp knows no rotation at run time, so every rotation must be merged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from corequant.errors import OutputError, RecipeError, SpecError
from corequant.specs import Granularity, ScaleSearch
from corequant.storage.files import version_of
from corequant.storage.gguf import BLOCK_BYTES, block_type_of
from corequant_transformers.checkpoint.reader import Stored
from corequant_transformers.exports.gguf_metadata import (
    KeyValue,
    about,
    hyperparameters,
    metadata_bytes,
    rope_factors,
    vocabulary,
)
from corequant_transformers.exports.gguf_tensors import (
    Names,
    difference,
    float_type,
    tensors_of,
)
from corequant_transformers.exports.prospect import Candidate, Prospect
from corequant_transformers.files.atomic import replacing
from corequant_transformers.files.digests import GGUF_DIGEST, GGUF_VERSION, seal_gguf
from corequant_transformers.files.outputs import check_file_output
from corequant_transformers.model.gguf_files.dialects import Dialect, dialect_of
from corequant_transformers.model.sources import Source
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["check", "expected_bytes", "write"]

Array = npt.NDArray[Any]

_FILE_TYPES = {"Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1", "Q8_0": "MOSTLY_Q8_0"}
_FILE_TYPES["MXFP4"] = "MOSTLY_MXFP4_MOE"
_QUANTIZATION_VERSION = 2


def check(candidate: Candidate, source: str | Path | None = None) -> None:
    """Raise the error that ``write`` would, as far as it is known before a model is quantized."""
    kinds = {m.name: _block_type(m) for m in candidate.plan.quantized}
    _check_recipe(candidate.plan)
    _check_experts(candidate.plan, kinds)
    dialect = dialect_of(candidate.config)
    _check_norms(candidate.plan, dialect)
    _values(candidate, source)
    names = Names(candidate.plan, dialect)
    for name in (*(f"{m.name}.weight" for m in candidate.plan.kept), *candidate.rest()):
        names.tensor(name)


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
    check(stored, source)
    dialect = dialect_of(stored.config)
    values = _values(stored, source)
    values += about(stored, values)
    tensors = list(tensors_of(stored, kinds, dialect))
    stored.check()
    with replacing(target, within) as part:
        writer = gguf.GGUFWriter(part, dialect.name)
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
        if (changed := difference(part, tensors, stored, dialect)) is not None:
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
    if (factors := rope_factors(candidate.config)) is not None:
        shapes["rope_freqs"] = factors.shape
    bytes_of = {"F16": 2, "F32": 4}
    found += [
        math.prod(shape) * bytes_of[float_type(plan, name, len(shape))]
        for name, shape in shapes.items()
    ]
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


def _check_norms(plan: ModelPlan, dialect: Dialect) -> None:
    if plan.architecture.subtracts_mean and plan.folds:
        raise RecipeError(
            f"llama.cpp's {dialect.name!r} computes LayerNorms, which become RMSNorms where the "
            "residual rotation is merged; quantize with rotation 'heads'"
        )
    if dialect.tied and not plan.tied:
        raise RecipeError(
            f"llama.cpp's {dialect.name!r} has no head of its own, so that embedding and head must "
            "stay one matrix; quantize with rotation 'heads'"
        )


def _check_experts(plan: ModelPlan, kinds: Mapping[str, str]) -> None:
    """Refuse experts of several block types, since those of a layer are one tensor in a file."""
    first: dict[tuple[int | None, str], MatrixPlan] = {}
    for matrix in plan.matrices:
        if matrix.expert is None:
            continue
        one = first.setdefault((matrix.block, matrix.name.rpartition(".")[2]), matrix)
        if kinds.get(matrix.name) != kinds.get(one.name):
            raise SpecError(
                "the experts of a layer are one tensor for llama.cpp and must be of one type, got "
                f"{kinds.get(matrix.name, 'float')} for {matrix.name} and "
                f"{kinds.get(one.name, 'float')} for {one.name}"
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
