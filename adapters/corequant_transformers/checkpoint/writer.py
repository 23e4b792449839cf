"""Directories that hold a quantized model: written whole or not at all, read with suspicion.

A directory holds ``corequant.safetensors`` (codes, scales and the float matrices), ``config.json``,
``float_config.json`` (the float model's config), ``recipe.toml``, ``report.json`` and the
tokenizer's files. Its model type is one that only this package knows and its weights have a name of
their own: a reader that would ignore the run-time rotation finds neither a model class nor weights
and stops, where it would otherwise compute nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers

from corequant.errors import CheckpointError, OutputError, RecipeError
from corequant.recipe import Recipe
from corequant.storage.arrays import from_arrays, to_arrays
from corequant.storage.files import json_text, open_regular, read_text, version_of
from corequant_transformers.files.atomic import compare
from corequant_transformers.files.digests import (
    DIGESTS,
    check_digests,
    checking,
    sealed_report,
    write_digests,
)
from corequant_transformers.files.outputs import check_output, new_directory
from corequant_transformers.model.configs import (
    as_config_errors,
    check_config,
    read_json,
    settle_config,
)
from corequant_transformers.model.floats import array_of, as_float32, check_writable
from corequant_transformers.model.layouts import standardize
from corequant_transformers.model.parts import Part, part_of, part_plan, skeleton
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.rebuilding import check_rebuilt, rebuild
from corequant_transformers.model.sources import copy_files, quiet_transformers
from corequant_transformers.model.surroundings import undisturbed
from corequant_transformers.planning.model_plan import ModelPlan, plan_model
from corequant_transformers.transforms.matrices import restructure

__all__ = [
    "is_quantized",
    "load",
    "load_tokenizer",
    "part_tensors",
    "place_tensors",
    "read_plan",
    "read_recipe",
    "save",
    "writing",
]

WEIGHTS = "corequant.safetensors"
FORMAT_VERSION = 1


def save(
    model: Any,
    plan: ModelPlan,
    output: str | Path,
    *,
    report: dict[str, Any],
    float_config: str,
    tokenizer: Any = None,
    copied_files: list[Path] | None = None,
) -> Path:
    """Write a quantized model to a new directory, read it back and compare, then give it its name.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With a ``QuantizedLinear`` for each quantized matrix of the plan.
    plan : ModelPlan
    output : str or Path
        A new or empty directory.
    report : dict
        Written to ``report.json``.
    float_config : str
        Text of the float model's ``config.json``.
    tokenizer : transformers tokenizer, optional
        Saved by its own ``save_pretrained`` if there are no files to copy.
    copied_files : list of Path, optional
        Copied byte for byte.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    ArchitectureError
        If the model has something that loading wouldn't build from its config.
    OutputError
        If it can't be written, what was written doesn't read back equal, or the model has numbers
        that float32 doesn't hold. Nothing is left then.
    """
    tensors = _tensors(model, plan)
    check_writable(tensors, plan)
    expected = rebuild(float_config)
    standardize(expected, plan)
    restructure(expected, plan)
    check_rebuilt(model, expected, {m.name for m in plan.quantized})
    name = type(model).__name__
    with writing(
        output,
        name,
        plan,
        report=report,
        float_config=float_config,
        tokenizer=tokenizer,
        copied_files=copied_files,
    ) as folder:
        generation = getattr(model, "generation_config", None)
        file = folder / "generation_config.json"
        # One that was made from the config says nothing that this doesn't.
        if generation is not None and not file.exists() and not generation._from_model_config:
            file.write_text(generation.to_json_string(), encoding="utf-8")
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        compare(folder / WEIGHTS, tensors)
    return Path(output).absolute()


@contextmanager
def writing(
    output: str | Path,
    name: str,
    plan: ModelPlan,
    *,
    report: dict[str, Any],
    float_config: str,
    tokenizer: Any = None,
    copied_files: list[Path] | None = None,
    within: Path | None = None,
    complete: Callable[[Path], object] = lambda folder: None,
) -> Iterator[Path]:
    """Give a new directory with all files but weights and report; it gets its name at the end.

    Parameters
    ----------
    output : str or Path
    name : str
        Of the model's class.
    plan, report, float_config, tokenizer, copied_files
        As for ``save``.
    within : Path, optional
        Where the directory lies until it gets its name; beside ``output`` by default.
    complete : callable
        Called with the directory when all files are in it, before it gets its name.

    Raises
    ------
    OutputError
        If it can't be written. Nothing is left then.
    """
    target = check_output(output)
    with new_directory(target, within) as folder:
        copy_files(copied_files or [], folder)
        if tokenizer is not None and not copied_files:
            with quiet_transformers():
                tokenizer.save_pretrained(folder)
        (folder / "float_config.json").write_text(float_config, encoding="utf-8")
        (folder / "config.json").write_text(_config(name, plan, float_config), encoding="utf-8")
        (folder / "recipe.toml").write_text(plan.recipe.to_toml(), encoding="utf-8")
        yield folder
        (folder / "report.json").write_text(sealed_report(report, folder), encoding="utf-8")
        # The writer makes files that only their owner can read.
        (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)
        write_digests(folder)
        complete(folder)


@undisturbed()
def load(path: str | Path, *, verify: bool = True) -> Any:
    """Load a quantized model with its run-time rotations and activation quantizers.

    Parameters
    ----------
    path : str or Path
        A directory that ``quantize`` wrote.
    verify : bool
        Compare all files with the digests that were written with them, which notices damage of any
        kind, but not a change on purpose by someone who changes the digests as well.

    Returns
    -------
    transformers.PreTrainedModel
        Of the float model's class, in evaluation mode, computing in float32, whatever float dtype
        the directory has what isn't quantized in.

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
    folder = Path(path)
    with checking(folder, verify=verify):
        return _load(folder)


def _load(folder: Path) -> Any:
    plan, config = read_plan(folder)
    config.tie_word_embeddings = False
    file = folder / "float_config.json"
    with as_config_errors(file, read_json(file)):
        model = skeleton(config)
    standardize(model, plan)
    restructure(model, plan)
    tensors = _read_tensors(folder / WEIGHTS)
    model.generation_config = read_generation(folder) or model.generation_config
    return place_tensors(model, plan, tensors, folder / WEIGHTS)


def read_generation(folder: Path) -> Any:
    """Return what a directory says about generating text; None where it says nothing.

    Raises
    ------
    CheckpointError
        If the file is malformed.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        with quiet_transformers():
            return transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} can't be loaded: {error}") from error


def place_tensors(
    model: Any, plan: ModelPlan, tensors: dict[str, torch.Tensor], where: Path | str
) -> Any:
    """Give a model the codes, scales and float matrices that were made for it, in place.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Standardized and restructured; its own parameters may be on the meta device.
    plan : ModelPlan
    tensors : dict of str to torch.Tensor
        Of all parts; emptied on the way.
    where : Path or str
        Where they are from, for error messages.

    Raises
    ------
    CheckpointError
        If they are not what the plan leads to expect.
    """
    for matrix in plan.quantized:
        prefix = f"{matrix.name}.weight_"
        own = {k: array_of(k, t, where) for k, t in tensors.items() if k.startswith(prefix)}
        quantized = from_arrays(matrix.name, own, plan.recipe.weights, matrix.shape)
        bias = tensors.pop(f"{matrix.name}.bias", None)
        layer = QuantizedLinear(
            quantized,
            bias,
            matrix.input.rotation if matrix.online else None,
            plan.recipe.activations,
            matrix.name,
        )
        had_bias = model.get_submodule(matrix.name).bias is not None
        if had_bias != (bias is not None):
            rule, got = ("must hold", "without it") if had_bias else ("must not hold", "with it")
            raise CheckpointError(
                f"{where} {rule} {matrix.name}.bias as its config says, got {got}"
            )
        if bias is not None:
            expected, found = {"bias": layer.weight[:, 0]}, {"bias": bias}
            _check_same(f"{matrix.name} in {where}", expected, found)
            layer.bias = found["bias"]
        model.set_submodule(matrix.name, layer)
        for key in own:
            del tensors[key]
    expected = {k: v for k, v in model.state_dict().items() if not _belongs(k, plan)}
    _check_same(where, expected, tensors)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.save_pretrained = refuse_to_save
    return model.eval().requires_grad_(False)


def refuse_to_save(*given: Any, **options: Any) -> None:
    """Stand in for ``save_pretrained``, which would write the layers that it knows, and no other.

    Raises
    ------
    OutputError
        Always.
    """
    raise OutputError(
        "save_pretrained would lose the quantized layers; write what quantize returned with its "
        "method save, or export the directory with corequant_transformers.export"
    )


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
        If there is none that loads, or a file is not as it was written.
    """
    folder = Path(path)
    _, config = read_plan(folder)
    if verify:
        check_digests(folder, lambda name: not name.endswith(".safetensors"))
    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        # Tokenizers raise errors of many kinds for missing and broken files.
        raise CheckpointError(f"{folder} has no tokenizer that loads: {error}") from error


def is_quantized(path: str | Path) -> bool:
    """Tell whether a path is a directory that ``quantize`` wrote."""
    return (Path(path) / WEIGHTS).is_file()


def read_recipe(path: str | Path) -> Recipe:
    """Read the recipe of a directory that ``quantize`` wrote."""
    file = Path(path) / "recipe.toml"
    try:
        return Recipe.from_toml(read_text(file))
    except (OSError, UnicodeDecodeError, RecipeError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error


def read_plan(folder: Path) -> tuple[ModelPlan, Any]:
    """Read a directory's recipe and float config, and return the plan and the config."""
    if not folder.is_dir():
        raise CheckpointError(f"MODEL must be a directory that corequant wrote, got {folder}")
    own = read_json(folder / "config.json")
    check_config(own, folder / "config.json")
    settings = own.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "corequant":
        raise CheckpointError(f"{folder / 'config.json'} must be of quant_method corequant")
    version = settings.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"format_version of {folder} must be {FORMAT_VERSION} for this corequant, got {version}"
        )
    values = read_json(folder / "float_config.json")
    check_config(values, folder / "float_config.json")
    try:
        config = transformers.AutoConfig.for_model(**values)
    except Exception as error:
        # Transformers validates configs with errors of several kinds.
        raise CheckpointError(f"{folder / 'float_config.json'}: {error}") from error
    settle_config(config, folder / "float_config.json")
    return plan_model(config, read_recipe(folder)), config


def _config(name: str, plan: ModelPlan, float_config: str) -> str:
    kind = plan.architecture.model_type
    values = json.loads(float_config)
    values.update(
        # Readers that don't know the type print it: it should say what to do.
        model_type=f"corequant_{kind} (load it with corequant_transformers.load)",
        architectures=[f"Corequant{name}"],
        tie_word_embeddings=False,
        quantization_config={
            "quant_method": "corequant",
            "format_version": FORMAT_VERSION,
            "corequant_version": version_of("corequant"),
            "load_with": "corequant_transformers.load",
            "digests": DIGESTS,
            "recipe": plan.recipe.to_dict(),
        },
    )
    return json_text(values)


def _belongs(key: str, plan: ModelPlan) -> bool:
    return any(key.startswith(f"{m.name}.") for m in plan.quantized)


def part_tensors(model: Any, plan: ModelPlan, part: Part) -> dict[str, torch.Tensor]:
    """Return what is stored of an open part of a quantized model."""
    rows = part_plan(plan, part)
    return {k: v for k, v in _tensors(model, rows).items() if part_of(k, plan) == part}


def _tensors(model: Any, plan: ModelPlan) -> dict[str, torch.Tensor]:
    tensors = {}
    for matrix in plan.quantized:
        layer = model.get_submodule(matrix.name)
        if not isinstance(layer, QuantizedLinear):
            got = type(layer).__name__
            raise OutputError(f"{matrix.name} must be the QuantizedLinear that it was, got {got}")
        for key, array in to_arrays(matrix.name, layer.quantized).items():
            tensors[key] = torch.from_numpy(array)
        if layer.bias is not None:
            tensors[f"{matrix.name}.bias"] = _at_home(f"{matrix.name}.bias", layer.bias)
    rest = {k: v for k, v in model.state_dict().items() if not _belongs(k, plan)}
    return {**{k: _at_home(k, v) for k, v in rest.items()}, **tensors}


def _at_home(name: str, tensor: torch.Tensor) -> torch.Tensor:
    # Parts of a skeleton that are not open have no numbers to bring home.
    there = tensor.detach().contiguous()
    if there.is_meta:
        return there
    try:
        # A model may have been cast after it was quantized.
        return as_float32(there.cpu())
    except TypeError as error:
        raise OutputError(
            f"{name} {error}; nothing was written. Save the model as quantize returned it"
        ) from None


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        # Opened first, since a pipe in its place would be waited for.
        open_regular(file).close()
        return safetensors.torch.load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} is truncated or malformed: {error}") from error


def _check_same(
    where: Path | str, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> None:
    for name in sorted(set(expected) ^ set(found)):
        what = "lacks the tensor" if name in expected else "has an unexpected tensor"
        raise CheckpointError(f"{where} {what} {name}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} of {where} must have shape {tuple(tensor.shape)}, "
                f"got {tuple(found[name].shape)}"
            )
        try:
            found[name] = as_float32(found[name])
        except TypeError as error:
            raise CheckpointError(f"{name} of {where} {error}") from None
        if not bool(found[name].isfinite().all()):
            raise CheckpointError(f"{name} of {where} holds NaN or infinity")
