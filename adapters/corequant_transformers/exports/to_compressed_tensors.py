"""Write a quantized model as a compressed-tensors directory, for Transformers and vLLM."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corequant.errors import OutputError, RecipeError, SpecError
from corequant.hadamard import hadamard_matrix
from corequant.quantization import dequantize
from corequant.specs import Granularity
from corequant.storage.arrays import Layout
from corequant.storage.compressed_tensors import Scheme
from corequant.storage.files import json_text
from corequant.storage.shard_index import read_index
from corequant.storage.tensor_file import RawTensor, TensorFile
from corequant_transformers.checkpoint.card import exported_card
from corequant_transformers.checkpoint.reader import Stored
from corequant_transformers.exports.own_class import check_layers, own_skeleton
from corequant_transformers.exports.prospect import Candidate, Prospect
from corequant_transformers.exports.saved_names import SavedNames, saved_names
from corequant_transformers.exports.weight_files import write_shards
from corequant_transformers.files.digests import write_digests
from corequant_transformers.files.marks import CARD, GUARD
from corequant_transformers.files.outputs import check_output, new_directory
from corequant_transformers.model.loaders import class_name
from corequant_transformers.model.source_files import copy_files
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["check", "expected_layout", "write"]

_VERSION = "0.17.0"
_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OPTIONS = {"embedding": "embeddings", "head": "head"}
"""Fields of a recipe that quantize matrices with a row for each token."""

_DTYPES = {name: tag for tag, name in _TORCH.items()}


def check(candidate: Candidate, source: str | Path | None = None) -> None:
    """Raise the error that ``write`` would, as far as it is known before a model is quantized."""
    _schemes(candidate.plan)
    _check_experts(candidate.plan)
    check_layers(candidate)
    _check_activations(candidate.plan)
    _names(candidate)


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
    names = _names(stored)
    stored.check()
    with new_directory(target, within) as folder:
        copy_files(stored.copied_files(), folder)
        config = json_text(_config(stored, schemes, names)).encode()
        (folder / "config.json").write_bytes(config)
        places = write_shards(folder, _tensors(stored, schemes, names), shard_bytes)
        if (changed := _difference(folder, places, stored, schemes, names)) is not None:
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


def _names(candidate: Candidate) -> SavedNames:
    return saved_names(own_skeleton(candidate), candidate.plan)


def _config(stored: Stored, schemes: Mapping[str, Scheme], names: SavedNames) -> dict[str, Any]:
    plan = stored.plan
    own = ("torch_dtype", "transformers_weights")
    values = {k: v for k, v in stored.float_config.items() if k not in own}
    transforms = _transforms(plan.online)
    members: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(scheme, []).append(name)
    formats = {scheme.format for scheme in members}
    ignored = [m.name for m in plan.matrices if not m.quantized and m.role != "embedding"]
    groups = [
        scheme.config(_targets(stored, found, ignored, names, alone=len(members) == 1))
        for scheme, found in members.items()
    ]
    if not plan.architecture.enclosed:
        values.update(tie_word_embeddings=_is_tied(plan, schemes))
    values.update(
        dtype=_TORCH[_dtype(schemes)],
        architectures=[class_name(stored.config)],
        quantization_config={
            "quant_method": "compressed-tensors",
            "version": _VERSION,
            "quantization_status": GUARD if transforms else "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
            "ignore": _everywhere(ignored, names),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "transform_config": transforms,
        },
    )
    return values


def _everywhere(modules: list[str], names: SavedNames) -> list[str]:
    """Return what modules are called in Transformers, and in vLLM, which keeps the files' names."""
    return list(dict.fromkeys(name for m in modules for name in (m, names.module(m))))


def _targets(
    stored: Stored, quantized: list[str], ignored: list[str], names: SavedNames, alone: bool
) -> list[str]:
    """Name the class where it covers exactly the quantized layers, otherwise each layer.

    Readers take a class for the experts as well, if it is the only group, or a pattern in which
    they are named.
    """
    linear = {n for n, m in own_skeleton(stored).named_modules() if isinstance(m, torch.nn.Linear)}
    dense = [name for name in quantized if name not in names.experts]
    if alone and linear - set(ignored) == set(dense):
        return ["Linear"]
    lists = {names.module(n).rsplit(".", 2)[0] for n in quantized if n in names.experts}
    patterns = {rf"re:.*\.{re.escape(path.rpartition('.')[2])}\.\d+\..*" for path in lists}
    return [*_everywhere(dense, names), *sorted(patterns)]


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


def _tensors(
    stored: Stored, schemes: Mapping[str, Scheme], names: SavedNames
) -> Iterator[tuple[str, RawTensor]]:
    dtype = _dtype(schemes)
    for matrix in stored.plan.quantized:
        place = names.module(matrix.name)
        tensors = schemes[matrix.name].tensors(place, stored.quantized(matrix))
        if matrix.role == "head" and _is_tied(stored.plan, schemes):
            del tensors[f"{place}.weight"]
        yield from tensors.items()
        if matrix.online:
            size = _size(matrix)
            rotation = hadamard_matrix(size).astype(np.float32)
            name = f"{place}.R{size}_input.weight"
            yield name, RawTensor.of(rotation, _DTYPES[stored.plan.recipe.dtype])
    for name in stored.rest():
        # Readers cast to the dtype that the config names; float32 has all of their numbers.
        kept = stored.dtype(name) if dtype == "F32" else dtype
        try:
            yield names.tensor(name), RawTensor.of(stored.read(name).array(), kept)
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
    dtype, names = _dtype(schemes), _names(candidate)
    found: Layout = {}
    for matrix in plan.quantized:
        place = names.module(matrix.name)
        found |= schemes[matrix.name].layout(place, matrix.shape)
        if matrix.role == "head" and _is_tied(plan, schemes):
            del found[f"{place}.weight"]
        if matrix.online:
            size = _size(matrix)
            found[f"{place}.R{size}_input.weight"] = (kept, (size, size))
    rest = kept if dtype == "F32" else dtype
    shapes = candidate.shapes().items()
    return {**found, **{names.tensor(name): (rest, shape) for name, shape in shapes}}


def _difference(
    folder: Path,
    places: dict[str, str],
    stored: Stored,
    schemes: Mapping[str, Scheme],
    names: SavedNames,
) -> str | None:
    """Read everything back, dequantize it, and return which bits aren't as they were meant.

    An error would hold the mapped files, which Windows can't remove then.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists() and read_index(index) != {n: folder / p for n, p in places.items()}:
        return f"{index.name} did not read back as it was written"
    files = {name: TensorFile(folder / name) for name in set(places.values())}
    written = {name: files[place].read(name) for name, place in places.items()}
    for name, tensor in _tensors(stored, schemes, names):
        if not written[name].same(tensor):
            return f"{name} did not read back as it was written"
    modules: dict[str, dict[str, RawTensor]] = {}
    for name, tensor in written.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = tensor
    for matrix in stored.plan.quantized:
        place = names.module(matrix.name)
        own = {k: t for k, t in modules[place].items() if k.startswith(f"{place}.weight")}
        if matrix.role == "head" and _is_tied(stored.plan, schemes):
            shared = written[f"{names.module(stored.plan.architecture.embedding)}.weight"]
            own[f"{place}.weight"] = shared
        back = dequantize(schemes[matrix.name].read(place, own, matrix.shape))
        meant = dequantize(stored.quantized(matrix))
        if not np.array_equal(back.view(np.uint32), meant.view(np.uint32)):
            return f"{matrix.name} does not decode to what was quantized"
    return None


def _check_experts(plan: ModelPlan) -> None:
    """Refuse what Transformers would compute otherwise, or not load: it decodes experts at once."""
    experts = [m for m in plan.matrices if m.expert is not None]
    for matrix in experts:
        if not matrix.quantized or matrix.weights != experts[0].settings.weights:
            raise SpecError(
                "experts must all have one quantizer, since Transformers decodes them by one, got "
                f"{matrix.settings.weights} for {matrix.name} and {experts[0].settings.weights} "
                f"for {experts[0].name}"
            )
        if matrix.weights.granularity is Granularity.TENSOR_GROUP:
            raise SpecError(
                f"experts must have no global scale, which Transformers 5.24 leaves out, got "
                f"{matrix.weights} for {matrix.name}; quantize with mxfp4 or int4"
            )
        if matrix.activations is not None:
            raise SpecError(
                "activations of experts must be none, since Transformers 5.24 rounds nothing that "
                f"experts read, got {matrix.activations} for {matrix.name}"
            )
        if matrix.online:
            raise RecipeError(
                f"the input of {matrix.name} can't be rotated at run time in Transformers, where "
                "the experts of a layer are one module; quantize with rotation 'offline' or "
                "'heads'"
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
