"""Write a quantized model as a compressed-tensors directory, for Transformers and vLLM."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from corequant.errors import ArchitectureError, OutputError, SpecError
from corequant.hadamard import hadamard_matrix
from corequant.quantization import dequantize
from corequant.specs import Granularity
from corequant.storage.arrays import Layout
from corequant.storage.compressed_tensors import Scheme
from corequant.storage.files import json_text
from corequant.storage.shard_index import read_index
from corequant.storage.tensor_file import RawTensor, TensorFile, write_tensors
from corequant_transformers.checkpoint.card import exported_card
from corequant_transformers.checkpoint.reader import Stored
from corequant_transformers.exports.prospect import Candidate, Prospect
from corequant_transformers.files.digests import write_digests
from corequant_transformers.files.marks import CARD, GUARD
from corequant_transformers.files.outputs import check_output, new_directory
from corequant_transformers.model.configs import as_config_errors
from corequant_transformers.model.parts import build
from corequant_transformers.model.sources import copy_files
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["check", "check_layers", "expected_layout", "write"]

_VERSION = "0.17.0"
_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OPTIONS = {"embedding": "embeddings", "head": "head"}
"""Fields of a recipe that quantize matrices with a row for each token."""

_DTYPES = {name: tag for tag, name in _TORCH.items()}


def check(candidate: Candidate, source: str | Path | None = None) -> None:
    """Raise the error that ``write`` would, as far as it is known before a model is quantized."""
    _schemes(candidate.plan)
    check_layers(candidate)
    _check_activations(candidate.plan)


def write(
    stored: Stored,
    output: str | Path,
    *,
    source: str | Path | None,
    shard_bytes: int,
    within: Path | None = None,
    complete: Callable[[Path], object] = lambda made: None,
) -> Path:
    """Write a new directory, read it back and compare, then give it its name.

    Parameters
    ----------
    stored : Stored
    output : str or Path
        A new or empty directory.
    source : str or Path, optional
        Must be left out.
    shard_bytes : int
        Largest size of a file of weights.
    within : Path, optional
        Folder of what isn't whole yet; that of ``output`` by default.
    complete : callable
        Called with the directory when all files are in it, before it gets its name.

    Returns
    -------
    Path

    Raises
    ------
    ArchitectureError, SpecError
        If compressed-tensors can't hold the model or its quantizers.
    OutputError
        If it can't be written or doesn't read back equal; nothing is left then.
    """
    if source is not None:
        raise OutputError(f"source must be left out for compressed-tensors, got {str(source)!r}")
    target = check_output(output)
    check(stored)
    schemes = _schemes(stored.plan)
    _check_shared_scales(stored)
    stored.check()
    with new_directory(target, within) as folder:
        copy_files(stored.copied_files(), folder)
        config = json_text(_config(stored, schemes)).encode()
        (folder / "config.json").write_bytes(config)
        places = _write_shards(folder, _tensors(stored, schemes), shard_bytes)
        if (changed := _difference(folder, places, stored, schemes)) is not None:
            raise OutputError(changed)
        files = [folder / place for place in sorted(set(places.values()))]
        formats = {scheme.format for scheme in schemes.values()}
        card = exported_card(stored.plan, stored.report, files, formats)
        (folder / CARD).write_bytes(card.encode())
        write_digests(folder)
        complete(folder)
    return target


def _schemes(plan: ModelPlan) -> dict[str, Scheme]:
    """Return each quantized layer's scheme by its name.

    Raises
    ------
    SpecError
        If there is none, or the readers would need several dtypes; names the layer.
    """
    found: dict[str, Scheme] = {}
    for matrix in plan.quantized:
        try:
            scheme = found[matrix.name] = _scheme(matrix, plan)
        except SpecError as error:
            option = _OPTIONS.get(matrix.role)
            where = f"{option} of Transformers' compressed-tensors" if option else matrix.name
            raise SpecError(f"{where}: {error}") from None
        first = plan.quantized[0]
        if scheme.dtype != found[first.name].dtype:
            raise SpecError(
                "the scales of all layers must be of one format, which is the dtype that readers "
                f"compute in, got {first.weights} for {first.name} and {matrix.weights} for "
                f"{matrix.name}; end both in :float32, :float16 or :bfloat16"
            )
    return found


def _scheme(matrix: MatrixPlan, plan: ModelPlan) -> Scheme:
    bits = matrix.weights.format.bits
    table = matrix.role == "embedding"
    whole = table or (matrix.role == "head" and (plan.tied or bits == 8))
    scheme = Scheme(matrix.weights, matrix.activations, whole)
    if table and scheme.format != "int-quantized":
        raise SpecError(
            f"embeddings must be int2 to int8, got {matrix.weights}: Transformers 5.24 can't load "
            "an embedding that is packed"
        )
    return scheme


def _is_tied(plan: ModelPlan, schemes: Mapping[str, Scheme]) -> bool:
    """Return whether one matrix in the files is both embedding and head.

    Transformers ties ``weight``, which holds int8 codes, too, and nothing that is packed.
    """
    scheme = schemes.get(plan.architecture.head)
    return plan.tied and (scheme is None or scheme.format == "int-quantized")


def _dtype(schemes: Mapping[str, Scheme]) -> str:
    return next(iter(schemes.values())).dtype


def _config(stored: Stored, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    plan = stored.plan
    own = ("torch_dtype", "transformers_weights")
    values = {k: v for k, v in stored.float_config.items() if k not in own}
    transforms = _transforms(plan.online)
    members: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(scheme, []).append(name)
    formats = {scheme.format for scheme in members}
    ignored = [m.name for m in plan.matrices if _is_ignored(m)]
    groups = [
        scheme.config(_targets(stored, names, ignored) if len(members) == 1 else names)
        for scheme, names in members.items()
    ]
    values.update(
        dtype=_TORCH[_dtype(schemes)],
        architectures=[_class_name(stored.config)],
        tie_word_embeddings=_is_tied(plan, schemes),
        quantization_config={
            "quant_method": "compressed-tensors",
            "version": _VERSION,
            "quantization_status": GUARD if transforms else "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
            "ignore": ignored,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "transform_config": transforms,
        },
    )
    return values


def _is_ignored(matrix: MatrixPlan) -> bool:
    """Return whether a matrix is a linear layer that stays in float."""
    return not matrix.quantized and matrix.role not in ("embedding", "router")


def _targets(stored: Stored, names: list[str], ignored: list[str]) -> list[str]:
    """Name the class where it covers exactly the quantized layers, otherwise each layer."""
    linear = {n for n, m in _skeleton(stored).named_modules() if isinstance(m, torch.nn.Linear)}
    return ["Linear"] if linear - set(ignored) == set(names) else names


def _transforms(online: tuple[MatrixPlan, ...]) -> dict[str, Any]:
    sizes: dict[int, list[str]] = {}
    for matrix in online:
        sizes.setdefault(_size(matrix), []).append(matrix.name)
    groups = {}
    for size, targets in sorted(sizes.items()):
        plain = size & (size - 1) == 0
        groups[f"R{size}"] = {
            # By name readers make Sylvester's matrix themselves, whose sizes are powers of two.
            "type": "hadamard" if plain else "random-hadamard",
            "head_dim": size,
            "randomize": False,
            "requires_grad": False,
            "precision": "torch.float32",
            "apply": [
                {"targets": targets, "location": place, "inverse": merged, "ignore": []}
                for place, merged in (("input", False), ("weight_input", True))
            ],
        }
    return {"config_groups": groups} if groups else {}


def _size(matrix: MatrixPlan) -> int:
    return matrix.input.rotation or matrix.shape[1]


def _tensors(stored: Stored, schemes: Mapping[str, Scheme]) -> Iterator[tuple[str, RawTensor]]:
    dtype = _dtype(schemes)
    for matrix in stored.plan.quantized:
        tensors = schemes[matrix.name].tensors(matrix.name, stored.quantized(matrix))
        if matrix.role == "head" and _is_tied(stored.plan, schemes):
            del tensors[f"{matrix.name}.weight"]
        yield from tensors.items()
        if matrix.online:
            size = _size(matrix)
            rotation = hadamard_matrix(size).astype(np.float32)
            name = f"{matrix.name}.R{size}_input.weight"
            yield name, RawTensor.of(rotation, _DTYPES[stored.plan.recipe.dtype])
    for name in stored.rest():
        # Readers cast to the dtype that the config names; float32 has all of their numbers.
        kept = stored.dtype(name) if dtype == "F32" else dtype
        try:
            yield name, RawTensor.of(stored.read(name).array(), kept)
        except ValueError as error:
            raise SpecError(f"{name} can't be stored as {kept}: {error}") from None


def expected_layout(candidate: Prospect) -> Layout:
    """Return dtypes and shapes of the tensors that ``write`` will write.

    Raises
    ------
    ArchitectureError, SpecError
        If compressed-tensors can't hold the model or its quantizers.
    """
    check(candidate)
    plan = candidate.plan
    schemes = _schemes(plan)
    kept = _DTYPES[plan.recipe.dtype]
    dtype = _dtype(schemes)
    found: Layout = {}
    for matrix in plan.quantized:
        found |= schemes[matrix.name].layout(matrix.name, matrix.shape)
        if matrix.role == "head" and _is_tied(plan, schemes):
            del found[f"{matrix.name}.weight"]
        if matrix.online:
            size = _size(matrix)
            found[f"{matrix.name}.R{size}_input.weight"] = (kept, (size, size))
    rest = kept if dtype == "F32" else dtype
    return {**found, **{name: (rest, shape) for name, shape in candidate.shapes().items()}}


def _write_shards(
    folder: Path, tensors: Iterator[tuple[str, RawTensor]], shard_bytes: int
) -> dict[str, str]:
    """Write tensors as they come, a file's worth at a time; return each tensor's file."""
    parts: list[tuple[Path, list[str]]] = []
    pending: dict[str, RawTensor] = {}
    size = total = 0

    def flush() -> None:
        file = folder / f"part-{len(parts):05d}"
        write_tensors(file, pending)
        parts.append((file, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.data.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.data.nbytes
        total += tensor.data.nbytes
    flush()
    places: dict[str, str] = {}
    for number, (file, names) in enumerate(parts, 1):
        title = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        title = title if len(parts) > 1 else "model.safetensors"
        file.rename(folder / title)
        places |= dict.fromkeys(names, title)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        file = folder / "model.safetensors.index.json"
        file.write_bytes(json_text(index).encode())
    return places


def _difference(
    folder: Path, places: dict[str, str], stored: Stored, schemes: Mapping[str, Scheme]
) -> str | None:
    """Read everything back, dequantize it, and return which bits aren't as they were meant.

    An error would hold the mapped files, which Windows can't remove then.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists() and read_index(index) != {n: folder / p for n, p in places.items()}:
        return f"{index.name} did not read back as it was written"
    files = {name: TensorFile(folder / name) for name in set(places.values())}
    written = {name: files[place].read(name) for name, place in places.items()}
    for name, tensor in _tensors(stored, schemes):
        if not written[name].same(tensor):
            return f"{name} did not read back as it was written"
    for matrix in stored.plan.quantized:
        own = {k: t for k, t in written.items() if k.startswith(f"{matrix.name}.weight")}
        if matrix.role == "head" and _is_tied(stored.plan, schemes):
            shared = written[f"{stored.plan.architecture.embedding}.weight"]
            own[f"{matrix.name}.weight"] = shared
        back = dequantize(schemes[matrix.name].read(matrix.name, own, matrix.shape))
        meant = dequantize(stored.quantized(matrix))
        if not np.array_equal(back.view(np.uint32), meant.view(np.uint32)):
            return f"{matrix.name} does not decode to what was quantized"
    return None


def _skeleton(candidate: Candidate) -> Any:
    file = candidate.folder / "float_config.json"
    with as_config_errors(file, candidate.float_config):
        return build(candidate.config)


def _class_name(config: Any) -> str:
    mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return str(mapping[type(config)].__name__)


def check_layers(candidate: Candidate) -> None:
    """Refuse a model whose tensors are not those of Transformers' own class."""
    model, plan = _skeleton(candidate), candidate.plan
    kind = plan.architecture.model_type
    for matrix in plan.quantized:
        try:
            layer = model.get_submodule(matrix.name)
        except AttributeError:
            layer = None
        wanted = torch.nn.Embedding if matrix.role == "embedding" else torch.nn.Linear
        if not isinstance(layer, wanted):
            raise ArchitectureError(
                f"{matrix.name} of {kind!r} is not a linear layer of its own in Transformers, and "
                "compressed-tensors quantizes only these"
            )
    expected = {k for k, _ in model.named_parameters(remove_duplicate=False)}
    if plan.tied:
        expected.discard(f"{plan.architecture.head}.weight")
    quantized = {f"{m.name}.weight" for m in plan.quantized}
    different = (expected - quantized) ^ set(candidate.rest())
    if different:
        raise ArchitectureError(
            f"merging changed which tensors {kind!r} has, so that Transformers' own class can't "
            f"load it: {min(different)}"
        )


def _check_activations(plan: ModelPlan) -> None:
    for matrix in plan.quantized:
        spec = matrix.activations
        if spec is not None and spec.granularity is Granularity.TENSOR_GROUP:
            raise SpecError(
                f"activations of {spec} need a scale per layer from calibration in "
                "compressed-tensors, which corequant chooses per call; export with activations "
                f"'none', got {matrix.name} with them"
            )


def _check_shared_scales(stored: Stored) -> None:
    """Refuse global scales that differ among layers that vLLM fuses: it takes one for all."""
    seen: dict[str, tuple[str, float]] = {}
    for matrix in stored.plan.quantized:
        scale = stored.quantized(matrix).global_scale
        if scale is None:
            continue
        name, first = seen.setdefault(matrix.reads, (matrix.name, float(scale[0])))
        if not math.isclose(first, float(scale[0]), rel_tol=0):
            raise SpecError(
                f"{name} and {matrix.name} read the same input and must share a global scale, got "
                f"{first} and {float(scale[0])}"
            )
