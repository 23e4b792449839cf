"""Weights of a Transformers directory, read from its safetensors files a few tensors at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from corequant.errors import CheckpointError
from corequant_transformers.model.scaled import FLOAT8, ScaledWeights
from corequant_transformers.model.surroundings import quiet_transformers
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["FileWeights"]

_STACKED = (
    [("MergeModulelist", 0)],
    [("MergeModulelist", 0), ("Concatenate", 1)],
)
"""Conversions that put experts' matrices one behind the other, gate above up."""

_WITHOUT_THREADS = {"": "cpu", "no_module_of_this_name": "disk"}
"""Has Transformers convert tensors one after the other. They are in memory already, and the stacks
of threads count where memory is limited."""

_FLOATS = ("F64", "F32", "F16", "BF16")
_COMPUTED = (
    r"rotary_emb\.inv_freq$",
    r"\.attn\.(masked_)?bias$",
    r"\.masked_bias$",
    r"(^|\.)embeddings\.position_ids$",
)
"""Buffers that older releases of Transformers wrote."""


class FileWeights:
    """The weights in a directory's files.

    Names and layouts that differ between files and modules, such as those of experts, are converted
    as Transformers does when it loads a whole model.

    Parameters
    ----------
    folder : Path
        A Transformers directory, for error messages.
    files : sequence of Path
        Its files of weights.
    model : transformers.PreTrainedModel
        A skeleton, before its head is untied from the embedding.
    plan : ModelPlan, optional
        Tells whether embedding and head share a matrix; by default the model does.
    block : tuple of int, optional
        Rows and columns that share a scale, where weights are float8; see ``block_of``.

    Raises
    ------
    CheckpointError
        If a file is malformed, lacks weights, has them in another shape or as codes of a quantizer,
        or holds tensors that the model has no place for.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        model: Any,
        plan: ModelPlan | None = None,
        block: tuple[int, int] | None = None,
    ) -> None:
        self._folder = folder
        self._tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        if plan is not None and not plan.architecture.enclosed:
            a = plan.architecture
            tied = {f"{a.head}.weight": f"{a.embedding}.weight"}
            self._tied = tied if plan.dimensions.tied else {}
        self.shared: dict[str, str] = {}
        """Parameters that no file holds, by the tied ones whose numbers they have."""
        self._places: dict[str, tuple[Path, str]] = {}
        """File and name of the tensors that each parameter is made of; several may make one."""
        self._sources: dict[str, list[str]] = {}
        self._scaled = ScaledWeights(block)
        self._scales: dict[str, str] = {}
        """Names of the scales of float8 weights."""
        self._experts: dict[str, list[list[str]]] = {}
        """Names of each expert's tensors, by the parameter that has those of all experts."""
        self._unconverted: set[str] = set()
        """Parameters that files have as they are, in one tensor."""
        self._read_headers(files, model)

    def _read_headers(self, files: Sequence[Path], model: Any) -> None:
        state = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        covered = set()
        strangers: list[str] = []
        patterns: dict[str, str | None] = {}
        found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        for file in files:
            with _opened(file) as tensors:
                for name in tensors.keys():
                    if name in found:
                        raise CheckpointError(
                            f"the tensor {name} must be in one file, got {found[name][0]} "
                            f"and {file}"
                        )
                    cut = tensors.get_slice(name)
                    found[name] = (file, tuple(cut.get_shape()), cut.get_dtype())
        for name, (file, shape, kind) in found.items():
            if self._scaled.is_scale(name, found):
                self._places[name] = (file, name)
                continue
            key, pattern = rename_source_key(
                name, renamings, converters, model.base_model_prefix, state
            )
            if key not in state:
                strangers += [] if _is_ignored(name, model) else [name]
                continue
            if pattern is None and key in self._sources:
                raise CheckpointError(
                    f"{key} of {type(model).__name__} must be in the files once, got "
                    f"{self._sources[key][0]} and {name}"
                )
            self._places[name] = (file, name)
            self._sources.setdefault(key, []).append(name)
            patterns[name] = pattern
            if pattern is None and shape != tuple(state[key].shape):
                raise CheckpointError(
                    f"{name} of {file} must have shape {tuple(state[key].shape)}, got {shape}"
                )
            scale = self._scaled.scale_of(name, found)
            if kind in FLOAT8 and scale is not None:
                self._scaled.check(name, shape, found[scale][1])
                self._scales[name] = scale
            elif kind not in _FLOATS:
                raise CheckpointError(
                    f"{name} of {file} must be one of {', '.join(_FLOATS)}, got {kind}: "
                    "weights that were quantized already are not read as numbers"
                )
            covered.add(key)
            if pattern is not None:
                covered |= set(_targets(pattern, converters, key))
        self._find_experts(state, patterns, converters)
        self._share(covered)
        missing = sorted(set(state) - covered)
        if missing:
            raise CheckpointError(
                f"{self._folder} lacks {len(missing)} weights, the first is {missing[0]}"
            )
        if strangers:
            raise CheckpointError(
                f"{self._folder} holds {len(strangers)} tensors that {type(model).__name__} "
                f"has no place for, the first is {min(strangers)}"
            )

    def _share(self, covered: set[str]) -> None:
        """Find the matrices that only one of several tied parameters is stored for."""
        for target, origin in self._tied.items():
            for absent, present in ((target, origin), (origin, target)):
                if absent not in covered and present in self._sources:
                    self.shared[absent] = present
        covered |= set(self.shared)

    def _find_experts(
        self, state: Mapping[str, Any], patterns: Mapping[str, str | None], converters: list[Any]
    ) -> None:
        """Find the parameters that are experts' matrices, stacked as they are in files."""
        for key, names in self._sources.items():
            pattern = patterns[names[0]]
            if pattern is None and len(names) == 1:
                self._unconverted.add(key)
            if pattern is None or state[key].ndim < 2:
                continue
            converter = next(c for c in converters if pattern in c.source_patterns)
            kinds = [(type(op).__name__, op.dim) for op in converter.operations if _is_plain(op)]
            if len(kinds) != len(converter.operations) or kinds not in _STACKED:
                continue
            ordered = sorted(names, key=dot_natural_key)
            rows = [[n for n in ordered if patterns[n] == p] for p in converter.source_patterns]
            if all(len(row) == len(state[key]) for row in rows):
                self._experts[key] = [list(each) for each in zip(*rows, strict=True)]

    def has_experts(self, key: str) -> bool:
        """Return whether ``expert`` reads a parameter of several experts."""
        if key in self._experts:
            return True
        return key in self._unconverted and self._sources[key][0] not in self._scales

    def expert(self, key: str, index: int) -> torch.Tensor:
        """Return the part of one expert of a parameter, in float32.

        Parameters
        ----------
        key : str
            For which ``has_experts`` is true.
        index : int
        """
        if key in self._experts:
            parts = [_as_float32(self._read(name)) for name in self._experts[key][index]]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        file, stored = self._places[self._sources[key][0]]
        with _opened(file) as tensors:
            part: torch.Tensor = tensors.get_slice(stored)[index : index + 1]
        return _as_float32(part[0])

    def fill(self, model: Any, keys: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
        """Set the parameters of these names in the modules of ``model``."""
        tensors = {}
        for key in keys:
            if key in self._sources:
                for name in self._sources[key]:
                    tensors[name] = self._read(name)
            elif key in self.shared:
                tensors[key] = self._read(self._sources[self.shared[key]][0])
        mapping: Any = get_model_conversion_mapping(model)
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(
                model,
                tensors,
                LoadStateDictConfig(
                    dtype=dtype,
                    dtype_plan=model._get_dtype_plan(dtype),
                    weight_mapping=mapping,
                    device_map=_WITHOUT_THREADS,
                ),
            )
        failed = sorted(set(keys) & set(info.missing_keys))
        if failed or info.conversion_errors or info.mismatched_keys:
            reasons = [*info.conversion_errors.values(), *info.mismatched_keys, *failed]
            raise CheckpointError(f"{self._folder} can't be loaded: {reasons[0]}")
        for key in keys:
            model.get_parameter_or_buffer(key).requires_grad_(False)

    def _read(self, name: str) -> torch.Tensor:
        weight = self._stored(name)
        scale = self._scales.get(name)
        return weight if scale is None else self._scaled.decode(weight, self._stored(scale))

    def _stored(self, name: str) -> torch.Tensor:
        file, stored = self._places[name]
        with _opened(file) as tensors:
            tensor: torch.Tensor = tensors.get_tensor(stored)
        return tensor


def _is_plain(operation: Any) -> bool:
    return isinstance(operation, MergeModulelist | Concatenate)


def _as_float32(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.float64:
        # While models are compared in float64, torch's own casts keep it.
        return torch.from_numpy(tensor.numpy().astype(np.float32))
    return tensor.to(torch.float32)


def _is_ignored(name: str, model: Any) -> bool:
    """Return whether a tensor is recomputed by a module, so that a file may hold it unused."""
    patterns = (*_COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
    return any(re.search(pattern, name) for pattern in patterns)


class _opened:
    """A file of tensors, not mapped: one that shrinks meanwhile is an error, not a signal."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> Any:
        try:
            opened: Any = safetensors.safe_open(
                self.file, framework="pt", device="cpu", backend="pread"
            )
            self._tensors = opened
            return opened.__enter__()
        except FileNotFoundError:
            raise CheckpointError(f"the model's file {self.file} is missing") from None
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{self.file} can't be loaded: {error}") from error

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._tensors.__exit__(kind, error, traceback)
        if isinstance(error, OSError | ValueError | safetensors.SafetensorError) and not isinstance(
            error, CheckpointError
        ):
            raise CheckpointError(f"{self.file} can't be read: {error}") from error


def _targets(pattern: str, converters: list[Any], key: str) -> list[str]:
    """Return the parameters that a conversion makes, of which ``key`` is the first."""
    for converter in converters:
        if pattern in converter.source_patterns:
            first, *others = converter.target_patterns
            return [key, *(key.replace(first, other) for other in others)]
    return [key]
