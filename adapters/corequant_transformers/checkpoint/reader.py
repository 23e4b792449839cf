"""Directories that ``quantize`` wrote, read with suspicion: as a model, or tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers

from corequant.errors import CheckpointError, RecipeError
from corequant.quantization import QuantizedTensor
from corequant.recipe import Recipe
from corequant.storage.arrays import from_arrays
from corequant.storage.files import open_regular, read_text
from corequant.storage.tensor_file import RawTensor, TensorFile
from corequant_transformers.architectures.known import keep_architecture
from corequant_transformers.checkpoint.origin import read_description
from corequant_transformers.checkpoint.saving import Saving
from corequant_transformers.checkpoint.tensors import place_tensors
from corequant_transformers.files.atomic import read_json, read_tensors
from corequant_transformers.files.digests import check_digests, checking, is_read, warn_of_none
from corequant_transformers.files.hub import locate
from corequant_transformers.files.marks import WEIGHTS, check_settings
from corequant_transformers.model.configs import (
    as_config_errors,
    check_config,
    config_of,
    settle_config,
)
from corequant_transformers.model.layouts import check_description, standardize
from corequant_transformers.model.parts import skeleton
from corequant_transformers.model.source_files import files_to_copy, read_generation
from corequant_transformers.model.surroundings import quiet_transformers, undisturbed
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan, plan_model
from corequant_transformers.transforms.matrices import restructure

__all__ = ["Stored", "is_quantized", "load", "load_tokenizer", "read_plan", "read_recipe"]


@undisturbed()
def load(path: str | Path, *, verify: bool = True) -> Any:
    """Load a quantized model with its run-time rotations and activation quantizers.

    Parameters
    ----------
    path : str or Path
        A directory that ``quantize`` wrote, or the id of one in the local Hugging Face cache.
    verify : bool
        Compare all files with the digests that were written with them, which notices damage of any
        kind, but not a change on purpose by someone who changes the digests as well.

    Returns
    -------
    transformers.PreTrainedModel
        Model of the float model's class, in evaluation mode, computing in float32, whatever float
        dtype the directory stores unquantized tensors in.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated, malformed, not what the recipe leads to expect, or not as
        it was written.

    Warns
    -----
    UserWarning
        If the directory is from before there were digests.
    """
    folder = locate(path)
    with checking(folder, verify=verify):
        return _load(folder)


def _load(folder: Path) -> Any:
    plan, config = read_plan(folder)
    if not plan.architecture.enclosed:
        config.tie_word_embeddings = False
    file = folder / "float_config.json"
    with as_config_errors(file, read_json(file)):
        model = skeleton(config)
    standardize(model, plan)
    check_description(model, plan)
    restructure(model, plan)
    tensors = _read_tensors(folder / WEIGHTS)
    model.generation_config = read_generation(folder) or getattr(model, "generation_config", None)
    place_tensors(model, plan, tensors, folder / WEIGHTS)
    keep_architecture(model, plan.architecture)
    model.save_pretrained = Saving.of(model, plan, folder)
    return model


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        # Opened first, since a pipe in its place would be waited for.
        open_regular(file).close()
        return read_tensors(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} is truncated or malformed: {error}") from error


def load_tokenizer(path: str | Path, *, verify: bool = True) -> Any:
    """Load the tokenizer of a directory that ``quantize`` wrote.

    Parameters
    ----------
    path : str or Path
    verify : bool
        Compare all files but the weights with their digests.

    Raises
    ------
    CheckpointError
        If no tokenizer loads, or a file is not as it was written.
    """
    folder = locate(path)
    _, config = read_plan(folder)
    if verify:
        check_digests(folder, lambda name: is_read(name) and not name.endswith(".safetensors"))
    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        # Tokenizers raise errors of many kinds for missing and broken files.
        raise CheckpointError(f"{folder} has no tokenizer that loads: {error}") from error


def is_quantized(path: str | Path) -> bool:
    """Return whether a path is a directory that ``quantize`` wrote."""
    return (locate(path) / WEIGHTS).is_file()


def read_recipe(path: str | Path) -> Recipe:
    """Read the recipe of a directory that ``quantize`` wrote."""
    file = Path(path) / "recipe.toml"
    try:
        recipe = Recipe.from_toml(read_text(file))
        # From before there was a choice, when everything was float32.
        return replace(recipe, dtype="float32") if recipe.dtype == "auto" else recipe
    except (OSError, UnicodeDecodeError, RecipeError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error


def read_plan(folder: Path) -> tuple[ModelPlan, Any]:
    """Read a directory's recipe and float config, and return the plan and the config."""
    if not folder.is_dir():
        raise CheckpointError(f"MODEL must be a directory that corequant wrote, got {folder}")
    own = read_json(folder / "config.json")
    check_config(own, folder / "config.json")
    check_settings(own.get("quantization_config"), str(folder / "config.json"))
    values = read_json(folder / "float_config.json")
    check_config(values, folder / "float_config.json")
    try:
        config = config_of(values)
    except Exception as error:
        # Transformers validates configs with errors of several kinds.
        raise CheckpointError(f"{folder / 'float_config.json'}: {error}") from error
    settle_config(config, folder / "float_config.json")
    described = read_description(own["quantization_config"], config, folder / "config.json")
    table = plan_model(config, read_recipe(folder), described)
    tied = own.get("tie_word_embeddings") is True and not table.architecture.enclosed
    if tied and not table.tied:
        raise CheckpointError(
            f"tie_word_embeddings of {folder / 'config.json'} must be false, got true: the recipe "
            "gives the head a matrix of its own"
        )
    return replace(table, tied=tied), config


class Stored:
    """A directory that ``quantize`` wrote.

    Parameters
    ----------
    path : str or Path
    verify : bool
        Whether ``check`` compares all files with their digests.

    Attributes
    ----------
    plan : ModelPlan
    config : transformers.PreTrainedConfig
        The float model's.
    float_config : dict
        The float model's ``config.json``.
    report : dict
    source_name : str
        Name of the file or directory that was quantized; empty for a model in memory.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated or malformed.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.folder, self._verify = locate(path), verify
        self.plan, self.config = read_plan(self.folder)
        self.float_config = read_json(self.folder / "float_config.json")
        self.report = read_json(self.folder / "report.json")
        name = self.report.get("source")
        self.source_name = name if isinstance(name, str) else ""
        self._file = TensorFile(self.folder / WEIGHTS)

    def check(self) -> None:
        """Raise CheckpointError if a file isn't as it was written."""
        if self._verify and check_digests(self.folder, is_read) is None:
            warn_of_none(self.folder)

    def quantized(self, matrix: MatrixPlan) -> QuantizedTensor:
        """Return the codes and scales of a quantized matrix."""
        tied = self.plan.tied and matrix.role == "head"
        stored = self.plan.architecture.embedding if tied else matrix.name
        prefix = f"{stored}.weight_"
        own = {n: self._file.read(n).array() for n in self._file.names if n.startswith(prefix)}
        return from_arrays(stored, own, matrix.weights, matrix.shape)

    def rest(self) -> list[str]:
        """Return the names of what isn't quantized: embeddings, norms, biases, the head."""
        codes = tuple(f"{m.name}.weight_" for m in self.plan.quantized)
        return [n for n in self._file.names if not n.startswith(codes)]

    def read(self, name: str) -> RawTensor:
        """Return a tensor that isn't quantized in float32, which must have its numbers."""
        tensor = self._file.read(name)
        if tensor.dtype == "F32":
            return tensor
        where = f"{name} of {self._file.path}"
        if tensor.dtype not in ("F64", "F16", "BF16"):
            raise CheckpointError(f"{where} must be F32, got {tensor.dtype}")
        given = tensor.array()
        with np.errstate(over="ignore"):
            numbers = given.astype(np.float32)
        if not np.array_equal(numbers, given):
            raise CheckpointError(
                f"{where} must be F32, got {tensor.dtype} with numbers that F32 doesn't have"
            )
        return RawTensor.of(numbers)

    def dtype(self, name: str) -> str:
        """Return the dtype that a tensor is stored in, as files name it."""
        return self._file.read(name).dtype

    def copied_files(self) -> list[Path]:
        """Return the tokenizer's and generation's files."""
        return files_to_copy(self.folder)
